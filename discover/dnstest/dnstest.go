// Package dnstest is a small DNS server on loopback, for tests.
package dnstest

import (
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// Server answers questions from its records, by UDP.
type Server struct {
	Addr string // host:port

	mu      sync.Mutex
	records []dns.RR // guarded by mu
}

// Start starts a server that ends with the test. A record is a line of a zone file, such as
// "ollama.test. 1 IN A 127.0.0.1".
func Start(t testing.TB, records ...string) *Server {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Addr: conn.LocalAddr().String()}
	s.Set(t, records...)
	server := &dns.Server{PacketConn: conn, Handler: s}
	done := make(chan struct{})
	go func() { // ends with the connection
		defer close(done)
		server.ActivateAndServe()
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return s
}

// Set replaces all records.
func (s *Server) Set(t testing.TB, records ...string) {
	t.Helper()
	var list []dns.RR
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		list = append(list, rr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = list
}

// ServeDNS answers a question. A name without records does not exist.
func (s *Server) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := new(dns.Msg)
	m.SetRcode(r, dns.RcodeNameError)
	for _, rr := range s.records {
		if !strings.EqualFold(rr.Header().Name, r.Question[0].Name) {
			continue
		}
		m.Rcode = dns.RcodeSuccess
		if rr.Header().Rrtype == r.Question[0].Qtype {
			m.Answer = append(m.Answer, rr)
		}
	}
	w.WriteMsg(m) // an error means that the client is gone
}
