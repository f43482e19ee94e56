//go:build linux

package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"regexp"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// idPattern finds the id that each request has in its prompt.
var idPattern = regexp.MustCompile(`request-[0-9a-f]{16}`)

// begin is one time that a server began with a request.
type begin struct {
	server string
	at     time.Time
}

func (b begin) String() string { return b.server + " at " + b.at.Format("15:04:05.000") }

// ledger notes which requests servers began with. It outlives them.
type ledger struct {
	mu    sync.Mutex
	begun map[string][]begin // by id; guarded by mu
}

func (l *ledger) note(id, server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begun[id] = append(l.begun[id], begin{server, time.Now()})
}

func (l *ledger) of(id string) []begin {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.begun[id]
}

// server is an Ollama, simulated or real, before which every request is noted as soon as it is
// complete: that is when Ollama begins with it.
type server struct {
	name   string
	at     place
	ledger *ledger
	inner  http.Handler
	sim    *ollamasim.Server  // if it is simulated
	real   *realollama.Server // if it is real

	serving  *http.Server
	listener *abrupt
	ended    chan struct{} // closed when serving has ended
}

// model is the one that clients ask for: small and real, or simulated.
const model = "gen-llama-tiny"

// simulated returns a server that answers within a fraction of a second.
func simulated() (*ollamasim.Server, error) {
	return ollamasim.New(ollamasim.Config{Parallel: slots, Models: []ollamasim.Model{{
		Name: model, LoadTime: 300 * time.Millisecond, PromptRate: 4000, AnswerRate: 60, AnswerTokens: 16,
	}}})
}

func newServer(ctx context.Context, name string, at place, real bool, l *ledger) (*server, error) {
	s := &server{name: name, at: at, ledger: l}
	var err error
	if !real {
		s.sim, err = simulated()
		s.inner = s.sim
	} else if s.real, err = realollama.Run(ctx, realollama.Config{
		Version: realollama.Version("c"), Models: []string{model}, Parallel: slots,
	}, nil); err == nil {
		s.inner = passOn(s.real.URL())
	}
	if err != nil {
		return nil, fmt.Errorf("starting server %s: %w", name, err)
	}
	return s, s.listen()
}

// passOn returns a handler that breaks an answer off where the server does.
func passOn(to string) http.Handler {
	u, err := url.Parse(to)
	if err != nil {
		panic(err) // realollama made it
	}
	return &httputil.ReverseProxy{
		FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(u) },
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
}

func (s *server) addr() string { return netip.AddrPortFrom(s.at.addr, serverPort).String() }

func (s *server) listen() error {
	ln, err := s.at.listen(s.addr())
	if err != nil {
		return fmt.Errorf("server %s: %w", s.name, err)
	}
	s.listener, s.ended = &abrupt{Listener: ln, conns: map[*net.TCPConn]struct{}{}}, make(chan struct{})
	s.serving = &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
	go func(srv *http.Server, ended chan struct{}) { // ends with kill
		defer close(ended)
		srv.Serve(s.listener)
	}(s.serving, s.ended)
	return nil
}

// ServeHTTP notes the request, and answers it.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		body, err := io.ReadAll(r.Body)
		if err != nil { // not complete: Ollama would not begin with it
			panic(http.ErrAbortHandler)
		}
		if id := idPattern.Find(body); id != nil {
			s.ledger.note(string(id), s.name)
		}
		r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	}
	s.inner.ServeHTTP(w, r)
}

// kill ends the server as kill -9 does: connections are reset, nothing is loaded any more.
func (s *server) kill() {
	s.listener.reset()
	s.serving.Close()
	<-s.ended
	if s.real != nil {
		s.real.Kill()
	} else {
		s.sim.Crash()
	}
}

func (s *server) restart(ctx context.Context) error {
	if s.real != nil {
		if err := s.real.Restart(ctx); err != nil {
			return err
		}
	} else {
		s.sim.Restart()
	}
	return s.listen()
}

func (s *server) close() error {
	s.kill()
	if s.real != nil {
		return s.real.Stop()
	}
	return nil
}

// abrupt is a listener whose connections can be reset.
type abrupt struct {
	net.Listener

	mu    sync.Mutex
	conns map[*net.TCPConn]struct{} // guarded by mu
}

func (l *abrupt) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(errors.New("not a TCP connection"), conn.Close())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[tcp] = struct{}{}
	return &tracked{tcp, l}, nil
}

// reset makes closing each connection reset it.
func (l *abrupt) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn := range l.conns {
		conn.SetLinger(0) // an error means that it is closed
	}
}

type tracked struct {
	*net.TCPConn
	listener *abrupt
}

func (c *tracked) Close() error {
	c.listener.mu.Lock()
	delete(c.listener.conns, c.TCPConn)
	c.listener.mu.Unlock()
	return c.TCPConn.Close()
}
