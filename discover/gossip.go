package discover

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// aloneInterval and joinInterval are how often the seeds are asked for the others: while there
	// are none, and otherwise, so that two halves of a network become one again.
	aloneInterval = 2 * time.Second
	joinInterval  = 15 * time.Second
	// gossipTimeout bounds a connection to a seed, which a stop has to wait for.
	gossipTimeout = 3 * time.Second
	leaveTimeout  = time.Second
)

// gossip is a Source: the other members of a memberlist.
type gossip struct {
	cfg   *memberlist.Config
	list  *memberlist.Memberlist // nil until listen has succeeded
	own   string                 // the name of this member
	seeds []string
	spec  string
	log   *slog.Logger
	news  chan struct{} // holds one if members have come, changed or gone
}

// NewGossip returns a Source of the peer addresses of those that gossip with each other: where
// there is no DNS. While it is watched, it listens at bind (TCP and UDP; if it cannot, it tries again
// every few seconds), tells the others advertisePeer, the address of this proxy for its peers, and
// finds them by the seeds, of which one has to be reachable at some time. What it finds does not
// include itself. Members that know another secret are no members; with an empty one nothing is
// encrypted. Watch may be called once; when it ends, the others are told. The error is about the
// addresses' form: nothing is looked up but bind, if that has a name.
func NewGossip(bind, advertisePeer string, seeds []string, secret []byte, log *slog.Logger) (Source, error) {
	addr, err := net.ResolveTCPAddr("tcp", bind)
	if err != nil {
		return nil, fmt.Errorf("gossip at %q: %w; want HOST:PORT, an address of this machine", bind, err)
	}
	advertisePeer, err = hostPort(advertisePeer)
	if err != nil {
		return nil, fmt.Errorf("gossip: the address that peers are told: %w", err)
	}
	for _, seed := range seeds {
		if _, err := hostPort(seed); err != nil {
			return nil, fmt.Errorf("gossip: a seed: %w; want HOST:PORT", err)
		}
	}
	cfg := memberlist.DefaultLANConfig()
	g := &gossip{cfg: cfg, own: rand.Text(), seeds: seeds, log: log, news: make(chan struct{}, 1)}
	g.spec = "gossip:" + strings.Join(seeds, ",")
	cfg.Name = g.own // not the address: a proxy that is started again is another member
	cfg.Label = "ollama-cacheproxy"
	cfg.BindAddr, cfg.BindPort = "0.0.0.0", addr.Port
	if addr.IP != nil {
		cfg.BindAddr = addr.IP.String()
	}
	cfg.AdvertisePort = cfg.BindPort
	cfg.TCPTimeout = gossipTimeout
	cfg.Delegate, cfg.Events = told(advertisePeer), g
	cfg.Logger = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	if len(secret) > 0 {
		cfg.SecretKey, err = hkdf.Key(sha256.New, secret, nil, "ollama-cacheproxy gossip", 32)
		if err != nil {
			return nil, fmt.Errorf("gossip: a key from the secret: %w", err)
		}
	}
	return g, nil
}

// listen begins to listen.
func (g *gossip) listen() (err error) {
	if g.list == nil {
		g.list, err = memberlist.Create(g.cfg)
	}
	return err
}

// listens begins to listen as soon as that is possible. If it is not at once, it says so, and that
// nobody is found. It returns false if ctx ends before.
func (g *gossip) listens(ctx context.Context, found func([]string)) bool {
	for failing := false; ; failing = true {
		err := g.listen()
		if err == nil {
			if failing {
				g.log.Info("this proxy listens for gossip at last", "address", g.list.LocalNode().Address())
			}
			return true
		}
		if !failing {
			g.log.Error("this proxy cannot listen for gossip, and finds no others by it: it is tried again every few seconds; free the address, or choose another one with --gossip-listen",
				"err", err)
			found(nil)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(aloneInterval):
		}
	}
}

func (g *gossip) String() string { return g.spec }

func (g *gossip) Watch(ctx context.Context, found func([]string)) {
	if !g.listens(ctx, found) {
		return
	}
	defer func() {
		g.list.Leave(leaveTimeout) // an error means that not all have heard it; they notice it
		g.list.Shutdown()
	}()
	joining := make(chan struct{})
	go func() { // ends with ctx
		defer close(joining)
		g.join(ctx)
	}()
	defer func() { <-joining }()
	last := g.others()
	found(slices.Clone(last))
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.news:
		}
		if now := g.others(); !slices.Equal(now, last) {
			last = now
			found(slices.Clone(now))
		}
	}
}

// join asks the seeds for the others again and again.
func (g *gossip) join(ctx context.Context) {
	failing := false
	for {
		var failed error
		joined := 0
		for _, seed := range g.seeds {
			if ctx.Err() != nil {
				return
			}
			n, err := g.list.Join([]string{seed})
			joined += n
			failed = cmp.Or(failed, err)
		}
		alone := len(g.others()) == 0
		if none := joined == 0 && alone && failed != nil; none != failing {
			if failing = none; failing {
				g.log.Warn("no peer can be reached by gossip yet: it is tried again every few seconds; look whether one runs at one of the seeds, with the same secret",
					"seeds", g.seeds, "err", failed)
			} else {
				g.log.Info("peers are reached by gossip", "seeds", g.seeds)
			}
		}
		pause := joinInterval
		if alone {
			pause = aloneInterval
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// others returns the peer addresses of the other members.
func (g *gossip) others() []string {
	var addrs []string
	for _, n := range g.list.Members() {
		if n.Name == g.own {
			continue
		}
		addr, err := hostPort(string(n.Meta))
		if err != nil {
			g.log.Debug("a member of the gossip has no peer address", "member", n.Address(), "err", err)
			continue
		}
		addrs = append(addrs, addr)
	}
	list, _ := sorted(addrs)
	return list
}

// NotifyJoin, NotifyLeave and NotifyUpdate are called by memberlist, which holds locks meanwhile.
func (g *gossip) NotifyJoin(*memberlist.Node)   { g.changed() }
func (g *gossip) NotifyLeave(*memberlist.Node)  { g.changed() }
func (g *gossip) NotifyUpdate(*memberlist.Node) { g.changed() }

func (g *gossip) changed() {
	select {
	case g.news <- struct{}{}:
	default:
	}
}

// told is memberlist's Delegate: what this member tells the others, which is its peer address.
type told string

func (t told) NodeMeta(limit int) []byte       { return []byte(t)[:min(len(t), limit)] }
func (told) NotifyMsg([]byte)                  {}
func (told) GetBroadcasts(_, _ int) [][]byte   { return nil }
func (told) LocalState(bool) []byte            { return nil }
func (told) MergeRemoteState(_ []byte, _ bool) {}
