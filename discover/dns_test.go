package discover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/discover/dnstest"
)

// answer is what a scripted resolver returns.
type answer struct {
	ips []string
	srv []*net.SRV
	err error
}

// script is a resolver that returns these answers, one after the other, and then the last again.
type script struct {
	answers []answer
	asked   int
}

func (s *script) next() answer {
	a := s.answers[min(s.asked, len(s.answers)-1)]
	s.asked++
	return a
}

func (s *script) LookupNetIP(context.Context, string, string) (ips []netip.Addr, err error) {
	a := s.next()
	for _, ip := range a.ips {
		ips = append(ips, netip.MustParseAddr(ip))
	}
	return ips, a.err
}

func (s *script) LookupSRV(context.Context, string, string, string) (string, []*net.SRV, error) {
	a := s.next()
	return "", a.srv, a.err
}

// scripted returns a source that asks a scripted resolver.
func scripted(t *testing.T, spec string, log *slog.Logger, answers ...answer) *lookup {
	s, err := Parse(spec, log)
	if err != nil {
		t.Fatal(err)
	}
	l := s.(*lookup)
	l.resolver = &script{answers: answers}
	return l
}

// TestLookups: what changes is found, what a lookup lacks once stays, and when lookups fail the last
// addresses stay, with one line when that begins and one when it ends.
func TestLookups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		failed := answer{err: errors.New("the DNS server is on fire")}
		one, two := answer{ips: []string{"10.0.0.1"}}, answer{ips: []string{"10.0.0.2", "10.0.0.1", "::ffff:10.0.0.2"}}
		l := scripted(t, "dns:host:11434", slog.New(slog.NewTextHandler(&log, nil)),
			failed, failed, two, // it begins with none
			one, two, // gone once: stays
			failed, failed, failed, answer{}, // stays
			two, one, one, // gone twice
			answer{ips: []string{"fd00::1"}}, answer{ips: []string{"fd00::1"}},
		)
		began := time.Now()
		found, stop := watch(t, l)
		for _, want := range [][]string{
			nil, {"10.0.0.1:11434", "10.0.0.2:11434"}, {"10.0.0.1:11434"}, {"10.0.0.1:11434", "[fd00::1]:11434"}, {"[fd00::1]:11434"},
		} {
			if got := <-found; !slices.Equal(got, want) {
				t.Fatalf("found %v, want %v", got, want)
			}
		}
		// Two of the pauses are those while nothing is known.
		if took := time.Since(began); took < 11*Interval*4/5 || took > 11*Interval*6/5+2*firstInterval*6/5 {
			t.Errorf("14 lookups took %v", took)
		}
		time.Sleep(10 * Interval)
		stop()
		if len(found) > 0 {
			t.Errorf("found %v, though nothing has changed", <-found)
		}
		for text, want := range map[string]int{"cannot be looked up": 2, "can be looked up again": 2, "level=": 4} {
			if n := strings.Count(log.String(), text); n != want {
				t.Errorf("%q is logged %d times, want %d:\n%s", text, n, want, &log)
			}
		}
	})
}

// TestTooMany: of more addresses than Most the first ones are used, and one line says so.
func TestTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var a answer
		for i := range Most + 1 {
			a.ips = append(a.ips, fmt.Sprintf("10.0.%d.%d", i/200, i%200))
		}
		found, _ := watch(t, scripted(t, "dns:host:1", slog.New(slog.NewTextHandler(&log, nil)), a))
		if n := len(<-found); n != Most {
			t.Errorf("found %d", n)
		}
		time.Sleep(10 * Interval)
		if n := strings.Count(log.String(), "more addresses"); n != 1 || len(found) > 0 {
			t.Errorf("logged %d times, found %d times again", n, len(found))
		}
	})
}

// TestServices: addresses by SRV have the targets' names; a target "." is none.
func TestServices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		some := answer{srv: []*net.SRV{{Target: "b.example.", Port: 2}, {Target: "a.example.", Port: 1}, {Target: ".", Port: 9}}, err: errors.New("one had an invalid name")}
		found, _ := watch(t, scripted(t, "srv:_x._tcp.example", slog.New(slog.DiscardHandler), some))
		if got := <-found; !slices.Equal(got, []string{"a.example:1", "b.example:2"}) {
			t.Errorf("found %v", got)
		}
	})
}

// TestServer asks a DNS server, by ?resolver=, for addresses and for services with their addresses.
func TestServer(t *testing.T) {
	z := dnstest.Start(t,
		"ollama.test. 1 IN A 127.0.0.2", "ollama.test. 1 IN A 127.0.0.1", "ollama.test. 1 IN AAAA ::1",
		"_ollama._tcp.test. 1 IN SRV 0 0 11501 one.test.", "_ollama._tcp.test. 1 IN SRV 9 9 11502 two.test.",
		"one.test. 1 IN A 127.0.0.1", "two.test. 1 IN A 127.0.0.2",
	)
	parse := func(spec string) *lookup {
		s, err := Parse(spec+"?resolver="+z.Addr, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return s.(*lookup)
	}
	hosts, services := parse("dns:ollama.test.:11434"), parse("srv:_ollama._tcp.test.")
	found, _ := watch(t, hosts)
	until(t, found, "127.0.0.1:11434", "127.0.0.2:11434", "[::1]:11434")
	found, _ = watch(t, services)
	until(t, found, "127.0.0.1:11501", "127.0.0.2:11502")

	z.Set(t, "ollama.test. 1 IN A 127.0.0.3", "_ollama._tcp.test. 1 IN SRV 0 0 11501 one.test.", "_ollama._tcp.test. 1 IN SRV 0 0 11502 two.test.", "two.test. 1 IN A 127.0.0.9")
	for l, want := range map[*lookup][]string{hosts: {"127.0.0.3:11434"}, services: {"127.0.0.9:11502"}} {
		if got, err := l.once(t.Context()); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", l, got, err, want)
		}
	}
	z.Set(t)
	for _, l := range []*lookup{hosts, services} {
		if got, err := l.once(t.Context()); err == nil {
			t.Errorf("%s: %v, though there are no records", l, got)
		}
	}
	z.Set(t, "_ollama._tcp.test. 1 IN SRV 0 0 0 .", "ollama.test. 1 IN TXT empty")
	for _, l := range []*lookup{hosts, services} {
		if got, err := l.once(t.Context()); err == nil {
			t.Errorf("%s: %v, though there are no records of this kind", l, got)
		}
	}
}

func TestHost(t *testing.T) {
	for spec, want := range map[string]string{
		"10.0.0.7:1": "", "gpu-1:1": "", "dns:peers.example:1": "peers.example",
		"dns:peers.example.:1?resolver=127.0.0.1:53": "peers.example",
		"srv:_peer._tcp.example.com":                 "example.com",
		"srv:_peer._tcp.example.com.":                "example.com",
	} {
		s, err := Parse(spec, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if got := Host(s); got != want {
			t.Errorf("%s: %q, want %q", spec, got, want)
		}
	}
}
