package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/discover"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/metrics"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// gossipScheme begins a value of --peers that is a member of a gossip.
const gossipScheme = "gossip:"

// fleetFlags are the flags about other proxies.
type fleetFlags struct {
	Peers          []string `group:"everyday" placeholder:"PEER" help:"Where the other proxies of a fleet are found: HOST:PORT (their --peer-listen), dns:HOST:PORT (all addresses of a name, such as a headless Service), srv:_NAME._tcp.HOST, or gossip:HOST:PORT for one that is known to gossip (--gossip-listen). One of them may be this proxy itself. Each Ollama server is then scheduled by one proxy, its owner, and any proxy takes any request (docs/fleet.md). Repeatable. Default: none, which makes this proxy work alone."`
	PeerListen     string   `placeholder:"ADDR" help:"Address to listen on for the other proxies, which only they may reach: host:port or :port, by convention 11436. Needed with --peers."`
	PeerName       string   `placeholder:"NAME" help:"This proxy's name for the others, which decides with the upstreams' names who owns which. It should stay the same when the proxy is restarted. Default: the host's name and the port of --peer-listen."`
	PeerSecretFile string   `type:"path" default:"" placeholder:"FILE" help:"A file with a secret that all proxies of the fleet have. Without TLS (--peer-cert) it is sent in the clear, so only within a trusted network. Default: none."`
	PeerCert       string   `type:"path" default:"" placeholder:"FILE" help:"The certificate that this proxy shows to the others, as a server and as a client: PEM. It needs --peer-key and --peer-ca. Default: none."`
	PeerKey        string   `type:"path" default:"" placeholder:"FILE" help:"The private key of --peer-cert, in PEM."`
	PeerCA         string   `name:"peer-ca" type:"path" default:"" placeholder:"FILE" help:"The certificate authorities that sign the proxies' certificates: PEM. Who has no certificate of theirs is no peer."`
	GossipListen   string   `placeholder:"ADDR" help:"Address for the gossip by which proxies find each other where there is no DNS (TCP and UDP), with --peers gossip:HOST:PORT. --peer-listen must then name this host's own address. Default: none."`
	Own            []string `placeholder:"NAME" help:"This proxy is beside the upstream of this name, on its machine or in its pod, and schedules it. Repeatable. Default: an upstream is scheduled by one of the proxies that have it, chosen by a hash of their names."`
}

// fleetSettings are the evaluated fleetFlags.
type fleetSettings struct {
	listen string // for net.Listen; "" if the proxy works alone
	secret []byte
	cert   *certFile // nil: without TLS
	tls    *fleet.TLS
	name   string
}

func (f *fleetFlags) settings(upstreams []target) (set fleetSettings, err error) {
	if len(f.Peers) == 0 {
		if f.PeerListen != "" || len(f.Own) > 0 || f.PeerSecretFile != "" || f.PeerCert != "" || f.GossipListen != "" {
			return set, errors.New("--peer-listen, --peer-secret-file, --peer-cert, --gossip-listen and --own are for a fleet: give --peers, too")
		}
		return set, nil
	}
	if f.PeerListen == "" {
		return set, errors.New("--peers needs --peer-listen, where the others reach this proxy, such as --peer-listen :11436")
	}
	host, port, err := net.SplitHostPort(f.PeerListen)
	if err != nil {
		return set, fmt.Errorf("--peer-listen %s: want host:port or :port", f.PeerListen)
	}
	set.listen, set.name = f.PeerListen, f.PeerName
	if set.name == "" {
		set.name = defaultPeerName(host, port)
	}
	for _, t := range upstreams {
		if t.unnamed { // otherwise the Ollamas beside two proxies would be taken for one
			return set, fmt.Errorf("--peers: name each upstream, such as --upstream gpu-1=%s: the proxies of a fleet take those of one name for one server", t.url.Host)
		}
	}
	for _, name := range f.Own {
		if !slices.ContainsFunc(upstreams, func(t target) bool { return t.name == name }) {
			return set, fmt.Errorf("--own %s: there is no upstream of this name; name it with --upstream %s=ADDR", name, name)
		}
	}
	if err = f.secrets(&set); err != nil {
		return set, err
	}
	_, err = f.sources(set.secret, slog.New(slog.DiscardHandler))
	return set, err
}

// defaultPeerName names a proxy by its host and port.
func defaultPeerName(host, port string) string {
	if ip := net.ParseIP(host); host == "" || ip != nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		if own, err := os.Hostname(); err == nil {
			host = own
		}
	}
	return net.JoinHostPort(host, port)
}

// secrets reads what peers show each other.
func (f *fleetFlags) secrets(set *fleetSettings) (err error) {
	if f.PeerSecretFile != "" {
		text, err := os.ReadFile(f.PeerSecretFile)
		if err != nil {
			return fmt.Errorf("--peer-secret-file: %w", err)
		}
		if set.secret = bytes.TrimSpace(text); len(set.secret) < secretLeast || bytes.ContainsFunc(set.secret, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("--peer-secret-file %s: want at least %d printable ASCII characters, such as those that 'openssl rand -hex 32' writes", f.PeerSecretFile, secretLeast)
		}
	}
	given := 0
	for _, path := range []string{f.PeerCert, f.PeerKey, f.PeerCA} {
		if path != "" {
			given++
		}
	}
	switch {
	case given == 0 && len(set.secret) == 0:
		return errors.New("the proxies of a fleet need something to know each other by: give --peer-secret-file, or --peer-cert, --peer-key and --peer-ca")
	case given == 0:
		return nil
	case given < 3:
		return errors.New("--peer-cert, --peer-key and --peer-ca go together: give all three")
	}
	if set.cert, err = readCert(f.PeerCert, f.PeerKey); err != nil {
		return fmt.Errorf("--peer-cert, --peer-key: %w", err)
	}
	text, err := os.ReadFile(f.PeerCA)
	if err != nil {
		return fmt.Errorf("--peer-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return fmt.Errorf("--peer-ca %s: there is no certificate in it: want PEM, which begins with -----BEGIN CERTIFICATE-----", f.PeerCA)
	}
	set.tls = fleet.NewTLS(func() *tls.Certificate { return set.cert.pair.Load() }, pool)
	return nil
}

// secretLeast is the least length of a secret, in bytes.
const secretLeast = 16

// sources evaluates where peers are found. It neither looks anything up nor listens.
func (f *fleetFlags) sources(secret []byte, log *slog.Logger) (all []discover.Source, err error) {
	var seeds []string
	for _, spec := range f.Peers {
		if seed, ok := strings.CutPrefix(spec, gossipScheme); ok {
			seeds = append(seeds, seed)
			continue
		}
		s, err := discover.Parse(spec, log)
		if err != nil {
			return nil, fmt.Errorf("--peers %s: %w", spec, err)
		}
		all = append(all, s)
	}
	switch {
	case len(seeds) == 0 && f.GossipListen != "":
		return nil, errors.New("--gossip-listen needs --peers gossip:HOST:PORT, the address of one that is known to gossip, which may be this one")
	case len(seeds) == 0:
		return all, nil
	case f.GossipListen == "":
		return nil, errors.New("--peers gossip:… needs --gossip-listen, such as --gossip-listen :7946")
	}
	host, _, err := net.SplitHostPort(f.PeerListen)
	if ip := net.ParseIP(host); err != nil || host == "" || ip != nil && ip.IsUnspecified() {
		return nil, fmt.Errorf("--peer-listen %s: with --peers gossip:… it must name this host's own address, which the others are told", f.PeerListen)
	}
	s, err := discover.NewGossip(f.GossipListen, f.PeerListen, seeds, secret, log)
	if err != nil {
		return nil, fmt.Errorf("--gossip-listen %s: %w", f.GossipListen, err)
	}
	return append(all, s), nil
}

// config is how this proxy talks to others.
func (set fleetSettings) config() fleet.Config {
	c := fleet.Config{
		Name: set.name, Secret: set.secret, Transport: fleet.NewTransport(nil, set.tls),
	}
	if set.tls != nil {
		c.Scheme = "https"
	}
	return c
}

// join makes the handler one of a fleet. Call it before the handler's Init.
func (s *serveCmd) join(
	set settings, h *proxy.Handler, counts *metrics.Metrics, log *slog.Logger,
) {
	if set.fleet.listen == "" {
		return
	}
	c := set.fleet.config()
	c.Own, c.Log, c.Version = s.Own, log, version()
	sources, err := s.sources(set.fleet.secret, log)
	if err != nil {
		log.Error("this proxy looks for no others until it is started again", "err", err)
	}
	for _, source := range sources {
		c.Sources = append(c.Sources, source)
	}
	h.Join(&c)
	h.Fleet = fleet.New(c)
	counts.Fleet(h.Fleet)
}

// peerServer is the listener for the other proxies, with its server; both nil if there are none.
type peerServer struct {
	ln  net.Listener
	srv *http.Server
}

// listenPeers begins to listen for the other proxies.
func (set settings) listenPeers(
	ctx, base context.Context, h *proxy.Handler, log *slog.Logger,
) (*peerServer, error) {
	if h.Fleet == nil {
		return &peerServer{}, nil
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", set.fleet.listen)
	if err != nil {
		return nil, fmt.Errorf("--peer-listen %s: %w", set.fleet.listen, err)
	}
	log.Info("peers reach this proxy", "peer_listen", ln.Addr().String(), "name", set.fleet.name,
		"tls", set.fleet.tls != nil)
	srv := newServer(base, h.Fleet.Handler(h), log)
	// A stranger that tries again and again would fill the log. What is wrong says the proxy that dials.
	srv.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	srv.RegisterOnShutdown(h.Fleet.HangUp)
	return &peerServer{ln, srv}, nil
}

// serve serves the other proxies until close.
func (p *peerServer) serve(set settings) error {
	if p.srv == nil {
		return http.ErrServerClosed
	}
	if set.fleet.tls == nil {
		return p.srv.Serve(p.ln)
	}
	p.srv.TLSConfig = set.fleet.tls.Server()
	// Requests are passed on over HTTP/1.1: only there a handler can answer before the body's end.
	p.srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	return p.srv.ServeTLS(p.ln, "", "")
}

// close ends the last answers, of which all but the end may have been written.
func (p *peerServer) close() {
	if p.srv == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cutOff)
	defer cancel()
	if p.srv.Shutdown(ctx) != nil {
		p.srv.Close()
	}
}

// peersWait is how long --check waits for the answers of peers.
const peersWait = 3 * time.Second

// aboutFleet describes what the settings about other proxies mean, and which of these answer.
func (s *serveCmd) aboutFleet(ctx context.Context, set settings) string {
	if set.fleet.listen == "" {
		return "none: this proxy works alone (--peers)"
	}
	shown := "a secret, in the clear"
	switch {
	case set.fleet.tls != nil && len(set.fleet.secret) > 0:
		shown = "certificates and a secret"
	case set.fleet.tls != nil:
		shown = "certificates"
	}
	text := fmt.Sprintf("this proxy is %s, others reach it at %s; they show each other %s", set.fleet.name, set.fleet.listen, shown)
	if len(s.Own) > 0 {
		text += "; it schedules " + strings.Join(s.Own, ", ")
	}
	c := set.fleet.config()
	c.Local = func() []fleet.Server { return nil }
	for _, spec := range s.Peers {
		if strings.HasPrefix(spec, gossipScheme) { // a running proxy has the address for gossip
			text += "\n            " + spec + ": not asked; the running proxy's page " + pathFleet + " says who is there"
			continue
		}
		source, err := discover.Parse(spec, slog.New(slog.DiscardHandler))
		if err != nil {
			return text + "\n            " + err.Error() // impossible: the settings were read
		}
		c.Sources = append(c.Sources, source)
	}
	for _, p := range askPeers(ctx, c) {
		switch {
		case p.Up && p.Name == set.fleet.name:
			text += fmt.Sprintf("\n            %s: %s answers, which has this proxy's name: it is running, or another one needs another --peer-name", p.Address, p.Name)
		case p.Up:
			text += fmt.Sprintf("\n            %s: %s answers", p.Address, p.Name)
		default:
			text += fmt.Sprintf("\n            %s: does not answer: %s (a fleet works without it)", p.Address, cmp.Or(p.Error, "nothing came"))
		}
	}
	return text
}

// pathFleet is the page about the fleet.
const pathFleet = "/_cacheproxy/fleet"

// askPeers returns the peers, once each has answered or failed to, or after peersWait.
func askPeers(ctx context.Context, c fleet.Config) []fleet.Peer {
	if len(c.Sources) == 0 {
		return nil
	}
	f := fleet.New(c)
	ctx, cancel := context.WithTimeout(ctx, peersWait)
	var wg sync.WaitGroup
	wg.Go(func() { f.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	for {
		news, peers := f.News(), f.Peers()
		open := func(p fleet.Peer) bool { return !p.Up && p.Error == "" }
		if len(peers) > 0 && !slices.ContainsFunc(peers, open) {
			return peers
		}
		select {
		case <-news:
		case <-ctx.Done():
			return peers
		}
	}
}
