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
	"net/netip"
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
	hosts  []string // the names of which --peers looks up the addresses
	name   string
}

func (f *fleetFlags) settings(listen string, upstreams []target) (set fleetSettings, err error) {
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
	if err = f.checkAddresses(listen); err != nil {
		return set, err
	}
	set.listen, set.name = f.PeerListen, f.PeerName
	if set.name == "" {
		set.name = defaultPeerName(host, port)
	}
	if err = f.checkNames(upstreams); err != nil {
		return set, err
	}
	if err = f.secrets(&set); err != nil {
		return set, err
	}
	sources, err := f.sources(set.secret, slog.New(slog.DiscardHandler))
	set.hosts = lookedUp(sources)
	return set, err
}

// lookedUp returns the names of which sources look up the addresses, each once.
func lookedUp(sources []discover.Source) (hosts []string) {
	for _, source := range sources {
		if host := discover.Host(source); host != "" && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

// checkAddresses refuses addresses of which only one can be listened at.
func (f *fleetFlags) checkAddresses(listen string) error {
	const want = "%s %s is the address of %s %s: each needs one of its own"
	switch {
	case overlap(f.PeerListen, listen):
		return fmt.Errorf(want, "--peer-listen", f.PeerListen, "--listen", listen)
	case overlap(f.GossipListen, listen):
		return fmt.Errorf(want, "--gossip-listen", f.GossipListen, "--listen", listen)
	case overlap(f.GossipListen, f.PeerListen):
		return fmt.Errorf(want, "--gossip-listen", f.GossipListen, "--peer-listen", f.PeerListen)
	}
	return nil
}

// checkNames refuses upstreams without a name, and what --own names though it is none.
func (f *fleetFlags) checkNames(upstreams []target) error {
	for _, t := range upstreams {
		if t.unnamed { // otherwise the Ollamas beside two proxies would be taken for one
			return fmt.Errorf("--peers: name each upstream, such as --upstream gpu-1=%s: the proxies of a fleet take those of one name for one server", t.url.Host)
		}
	}
	for _, name := range f.Own {
		if !slices.ContainsFunc(upstreams, func(t target) bool { return t.name == name }) {
			return fmt.Errorf("--own %s: there is no upstream of this name; name it with --upstream %s=ADDR", name, name)
		}
	}
	return nil
}

// overlap reports whether only one of two addresses can be listened at.
func overlap(a, b string) bool {
	hostA, portA, err := net.SplitHostPort(a)
	hostB, portB, err2 := net.SplitHostPort(b)
	if err != nil || err2 != nil || portA != portB || portA == "0" {
		return false
	}
	return hostA == hostB || anywhere(hostA) || anywhere(hostB)
}

// anywhere reports whether who listens at a host does so at all addresses of the machine.
func anywhere(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// defaultPeerName names a proxy by its host and port. (Other addresses of loopback than the usual ones
// distinguish proxies on one machine.)
func defaultPeerName(host, port string) string {
	if anywhere(host) || host == "127.0.0.1" || host == "::1" {
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
	if set.cert, err = readCert("--peer-cert", f.PeerCert, "--peer-key", f.PeerKey); err != nil {
		return err
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
	if err != nil || anywhere(host) {
		return nil, fmt.Errorf("--peer-listen %s: with --peers gossip:… it must name this host's own address, which the others are told", f.PeerListen)
	}
	s, err := discover.NewGossip(f.GossipListen, f.PeerListen, seeds, secret, log)
	if err != nil {
		return nil, fmt.Errorf("--gossip-listen, --peers gossip:…: %w", err)
	}
	return append(all, s), nil
}

// config is how this proxy talks to others.
func (set fleetSettings) config() fleet.Config {
	transport := fleet.NewTransport(nil, set.tls)
	c := fleet.Config{Name: set.name, Secret: set.secret, Transport: transport}
	if set.tls != nil {
		c.Scheme = "https"
		transport.DialTLSContext = believing(transport, set.hosts)
	}
	return c
}

// believing returns how a transport makes connections with TLS. It believes a certificate that is for the
// address, as usual, or for one of the names by which addresses were found: nobody knows beforehand which
// ones DNS will list, such as those of pods.
func believing(
	t *http.Transport, names []string,
) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		conn, err := t.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		c := t.TLSClientConfig.Clone()
		c.ServerName = host
		c.InsecureSkipVerify = true // it is verified here
		c.VerifyConnection = func(state tls.ConnectionState) error {
			return believe(state.PeerCertificates, c.RootCAs, host, names)
		}
		secure := tls.Client(conn, c)
		ctx, cancel := context.WithTimeout(ctx, t.TLSHandshakeTimeout)
		defer cancel()
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		return secure, nil
	}
}

// believe verifies a chain of certificates for a host, or one of several names. The error says for what
// it could be.
func believe(chain []*x509.Certificate, roots *x509.CertPool, host string, names []string) (err error) {
	o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()} // by default for a server
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	if _, err = chain[0].Verify(o); err == nil {
		if err = chain[0].VerifyHostname(host); err == nil {
			return nil
		}
		for _, name := range names {
			if chain[0].VerifyHostname(name) == nil {
				return nil
			}
			err = fmt.Errorf("%w, nor for %s", err, name)
		}
	}
	return &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: err}
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

// aboutFleet describes what the settings about other proxies mean, and which of these answer. The
// error says why it could not listen for them; not if it runs with these settings.
func (s *serveCmd) aboutFleet(ctx context.Context, set settings, runs bool) (string, error) {
	if set.fleet.listen == "" {
		return "none: this proxy works alone (--peers)", nil
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
	var cannot error
	if !runs {
		cannot = s.checkPeerListen(ctx)
	}
	found, notes := s.peersFound(ctx, set.fleet)
	return text + notes + set.fleet.ask(ctx, found), cannot
}

// checkPeerListen reports whether the proxy could listen for others.
func (f *fleetFlags) checkPeerListen(ctx context.Context) (err error) {
	for _, x := range []struct{ flag, addr string }{
		{"--peer-listen", f.PeerListen}, {"--gossip-listen", f.GossipListen},
	} {
		if x.addr == "" {
			continue
		}
		ln, cannot := (&net.ListenConfig{}).Listen(ctx, "tcp", x.addr)
		if cannot != nil {
			err = errors.Join(err, fmt.Errorf("the proxy could not listen at %s %s: %w", x.flag, x.addr, cannot))
			continue
		}
		ln.Close()
	}
	return err
}

// nextLine begins a further line of what --check says about one setting.
const nextLine = "\n            "

// peersFound returns where the other proxies are now, and what is to be said about how they are found.
func (s *serveCmd) peersFound(
	ctx context.Context, set fleetSettings,
) (found []discover.Source, notes string) {
	quiet, gossip := slog.New(slog.DiscardHandler), false
	for _, spec := range s.Peers {
		if strings.HasPrefix(spec, gossipScheme) { // a running proxy has the address for gossip
			gossip = true
			notes += nextLine + spec + ": not asked; the running proxy's page " + pathFleet + " says who is there"
			continue
		}
		source, err := discover.Parse(spec, quiet)
		if err == nil {
			var addrs []string
			addrs, err = discover.Once(ctx, source)
			for _, addr := range addrs {
				if set.own(addr) {
					notes += nextLine + addr + ": this proxy's own address"
				} else if at, err := discover.Parse(addr, quiet); err == nil {
					found = append(found, at)
				}
			}
		}
		if err != nil {
			notes += fmt.Sprintf("%s%s: nothing is found: %v (a fleet works without it)", nextLine, spec, err)
		}
	}
	if len(found) == 0 && !gossip {
		notes += nextLine + "no other proxy is found: if that stays so, this one works alone"
	}
	return found, notes
}

// own reports whether the others, or this proxy, would reach this proxy at an address.
func (set fleetSettings) own(addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	at, own, err2 := net.SplitHostPort(set.listen)
	if err != nil || err2 != nil || port != own {
		return false
	}
	if host == at || !anywhere(at) {
		return host == at
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && proxy.OwnAddr(ip.Unmap())
}

// ask asks other proxies, and says what each answers.
func (set fleetSettings) ask(ctx context.Context, found []discover.Source) (text string) {
	c := set.config()
	c.Local = func() []fleet.Server { return nil }
	for _, at := range found {
		c.Sources = append(c.Sources, at)
	}
	for _, p := range askPeers(ctx, c) {
		said := p.Name + " answers"
		switch {
		case p.Up && p.Name == set.name:
			said += ", which has this proxy's name: it is this proxy, which runs, or else each needs a --peer-name of its own"
		case !p.Up && strings.HasPrefix(p.Error, "it answers"):
			said = p.Error + " (a fleet works without it)"
		case !p.Up:
			said = "does not answer: " + cmp.Or(p.Error, "nothing came") + " (a fleet works without it)"
		}
		text += nextLine + p.Address + ": " + said
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
