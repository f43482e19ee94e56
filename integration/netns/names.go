//go:build linux

package netns

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

// Service is where an SRV record leads.
type Service struct {
	Target string // a name that the lab serves
	Port   uint16
}

// names is the lab's DNS server. It answers at once from what it has, and with NXDOMAIN otherwise.
type names struct {
	servers []*dns.Server
	ended   sync.WaitGroup

	mu       sync.Mutex
	addrs    map[string][]netip.Addr // guarded by mu
	services map[string][]Service    // guarded by mu
}

func serveNames(h *Host) (*names, error) {
	n := &names{addrs: map[string][]netip.Addr{}, services: map[string][]Service{}}
	addr := netip.AddrPortFrom(h.Addr, 53).String()
	ln, err := h.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	var packets net.PacketConn
	if h.Do(func() { packets, err = net.ListenPacket("udp", addr) }); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	n.servers = []*dns.Server{{Listener: ln, Handler: n}, {PacketConn: packets, Handler: n}}
	for _, s := range n.servers {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		n.ended.Go(func() { // ends with close; otherwise it could only fail to start
			if s.ActivateAndServe() != nil {
				select {
				case <-started:
				default:
					close(started)
				}
			}
		})
		<-started
	}
	return n, nil
}

func (n *names) close() {
	for _, s := range n.servers {
		s.Shutdown() // an error means that it has ended
	}
	n.ended.Wait()
}

// SetName makes a name lead to these addresses; none means that it does not exist. Records are not
// cached: their time to live is 0.
func (l *Lab) SetName(name string, addrs ...netip.Addr) {
	l.names.mu.Lock()
	defer l.names.mu.Unlock()
	l.names.addrs[key(name)] = slices.Clone(addrs)
}

// SetService makes a name such as _peers._tcp.example.com lead to these services.
func (l *Lab) SetService(name string, services ...Service) {
	l.names.mu.Lock()
	defer l.names.mu.Unlock()
	l.names.services[key(name)] = slices.Clone(services)
}

func key(name string) string { return strings.ToLower(dns.Fqdn(name)) }

func (n *names) lookup(name string) []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.addrs[key(name)]
}

// ServeDNS implements dns.Handler.
func (n *names) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	if len(q.Question) == 1 {
		n.answer(m, q.Question[0])
	}
	w.WriteMsg(m) // a client that has left asks again
}

func (n *names) answer(m *dns.Msg, q dns.Question) {
	n.mu.Lock()
	defer n.mu.Unlock()
	addrs, services := n.addrs[key(q.Name)], n.services[key(q.Name)]
	if len(addrs)+len(services) == 0 {
		m.Rcode = dns.RcodeNameError
		return
	}
	head := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET}
	switch q.Qtype {
	case dns.TypeA:
		for _, a := range addrs {
			m.Answer = append(m.Answer, &dns.A{Hdr: head, A: a.AsSlice()})
		}
	case dns.TypeSRV:
		for _, s := range services {
			m.Answer = append(m.Answer, &dns.SRV{Hdr: head, Target: dns.Fqdn(s.Target), Port: s.Port})
		}
	}
}
