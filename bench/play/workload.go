package play

import (
	"fmt"
	"math/rand/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// Request is one chat.
type Request struct {
	ID       int
	Prefix   int // index of its prefix in the workload, if that matters
	Model    string
	NumCtx   int
	Messages []chat.Message
	Generate int
	Priority string
}

// Workload has the requests of some clients. Each client is a list of requests.
type Workload struct {
	Name    string
	Config  realollama.Config
	Servers int // 0 means one
	Clients [][]Request
	Least   []Request   // the same requests in the best order, for one client
	Best    [][]Request // … or for several clients, one after the other
	// Clients send all requests at once; otherwise one after the other, when the last one is
	// answered.
	Open      bool
	Depth     int      // … or this many at a time
	Chats     bool     // answers become messages: the next request includes the last answer
	Addresses []string // the clients' addresses; nil: one for all
	Retries   bool     // clients send failed requests again
	Runs      int      // of which the median is used; 0 means one
	// Events returns the actions to take after a number of answered requests.
	Events func(p *Player, servers []*realollama.Server) map[int]func() error
}

// Config returns a server's configuration, with a host cache of the default size or none; era A has
// none.
func (b Bench) Config(slots int, hostCache bool) realollama.Config {
	c := realollama.Config{Models: []string{b.Model}, Parallel: slots, KeepAlive: "10m"}
	if !hostCache && b.Era != realollama.EraA {
		c.CacheRAMMiB = new(int)
	}
	return c
}

// Chat returns a request with a prefix of about 600 tokens and a tail of 30.
func (b Bench) Chat(id, prefix, n int) Request {
	return Request{ID: id, Prefix: prefix, Model: b.Model, Generate: 4, Messages: []chat.Message{
		chat.System(text.Words(uint64(prefix), 250)), chat.User(text.Words(uint64(1000*prefix+n+7), 12)),
	}}
}

// ServerName is the name of one of several servers for the proxy.
func ServerName(i int) string { return string(rune('a' + i)) }

// UpstreamFlags returns the first server, and the proxy's flags that name the others.
func UpstreamFlags(servers []*realollama.Server) (first string, flags []string) {
	if len(servers) == 1 {
		return servers[0].URL(), nil
	}
	for i, s := range servers[1:] {
		flags = append(flags, "--upstream", ServerName(i+1)+"="+s.URL())
	}
	return ServerName(0) + "=" + servers[0].URL(), flags
}

const (
	upstreamPrefixes = 30
	upstreamClients  = 12
)

// Upstreams has clients that ask several servers for any prefix. If killed, one of the servers is
// killed after a third of the requests, and restarted after two thirds.
func (b Bench) Upstreams(servers, each int, killed bool) Workload {
	w := Workload{
		Name:   fmt.Sprintf("%d upstreams, %d prefixes × %d, %d closed-loop clients", servers, upstreamPrefixes, each, upstreamClients),
		Config: b.Config(1, true), Servers: servers, Clients: make([][]Request, upstreamClients), Retries: true,
	}
	for p := range upstreamPrefixes {
		for n := range each {
			w.Least = append(w.Least, b.Chat(p*each+n, 800+p, n))
		}
	}
	r := rand.New(rand.NewPCG(11, 7))
	for i, k := range r.Perm(len(w.Least)) {
		w.Clients[i%upstreamClients] = append(w.Clients[i%upstreamClients], w.Least[k])
	}
	if killed {
		w.Name += ", one killed and revived"
		w.Events = func(p *Player, servers []*realollama.Server) map[int]func() error {
			gone := make(chan struct{})
			return map[int]func() error{
				len(w.Least) / 3: func() error { servers[0].Kill(); close(gone); return nil },
				2 * len(w.Least) / 3: func() error {
					<-gone
					return servers[0].Restart(p.Ctx)
				},
			}
		}
	}
	return w
}

// Queued has the same requests all at once, on servers without a host cache.
func (b Bench) Queued(servers, each int) Workload {
	w := b.Upstreams(servers, each, false)
	w.Name = fmt.Sprintf("%d upstreams, %d prefixes × %d, all queued, small host cache", servers, upstreamPrefixes, each)
	w.Config, w.Open = b.Config(1, false), true
	return w
}
