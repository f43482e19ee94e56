package discover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// Interval is the mean time between two lookups. They are made at this interval, give or take a
	// fifth, whatever the records' TTL is, since the resolver does not tell it.
	Interval = 5 * time.Second
	// firstInterval is the interval while nothing is known.
	firstInterval = time.Second
	lookupTimeout = 10 * time.Second
	// goneAfter is how many lookups in a row have to lack an address before it is gone. A DNS server
	// may leave out records for a moment: Go's resolver returns what it has if the question for A
	// or for AAAA fails, and some servers answer with a part of the records.
	goneAfter = 2
)

// resolver is the part of net.Resolver that is used; tests have another one.
type resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
}

// resolverAt returns a resolver that asks one DNS server.
func resolverAt(server netip.AddrPort) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, server.String())
	}}
}

// lookup is a Source that asks DNS again and again.
type lookup struct {
	spec     string
	log      *slog.Logger
	resolver resolver
	private  bool   // the resolver is not the system's
	host     string // or the name of SRV records
	port     string // of all addresses; "" for SRV
	find     func(context.Context) ([]string, error)
}

func (l *lookup) String() string { return l.spec }

func (l *lookup) Watch(ctx context.Context, found func([]string)) {
	var now records
	failing := false
	for first := true; ; first = false {
		addrs, err := l.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if failed := err != nil; failed != failing {
			failing = failed
			l.tell(err, len(now.addrs))
		}
		changed := false
		if err == nil {
			if changed = now.update(addrs); now.cut && changed {
				l.log.Warn("more addresses are found than can be used", "source", l.spec, "used", Most)
			}
		}
		if changed || first {
			found(slices.Clone(now.addrs))
		}
		pause := Interval
		if len(now.addrs) == 0 {
			pause = firstInterval
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause - pause/5 + rand.N(2*pause/5)):
		}
	}
}

// tell logs that lookups have begun to fail, or work again.
func (l *lookup) tell(err error, known int) {
	if err == nil {
		l.log.Info("addresses can be looked up again", "source", l.spec)
		return
	}
	l.log.Warn("addresses cannot be looked up: those known stay, and it is tried again every few seconds; if this goes on, look whether the name is right and the DNS server answers",
		"source", l.spec, "known", known, "err", err)
}

func (l *lookup) once(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	addrs, err := l.find(ctx)
	if err == nil && len(addrs) == 0 {
		err = errors.New("there are no records of this name")
	}
	return addrs, err
}

// hosts looks up A and AAAA.
func (l *lookup) hosts(ctx context.Context) ([]string, error) { return l.at(ctx, l.host, l.port) }

// at returns the addresses of a host.
func (l *lookup) at(ctx context.Context, host, port string) ([]string, error) {
	ips, err := l.resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	addrs := make([]string, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, net.JoinHostPort(ip.Unmap().String(), port))
	}
	return addrs, nil
}

// services looks up SRV. The addresses have the records' target names, which stay when a host gets
// another IP address, and which certificates are for. Only those that another DNS server has told
// are looked up there, since nobody else may know them. Priorities and weights are not used.
func (l *lookup) services(ctx context.Context) ([]string, error) {
	_, found, err := l.resolver.LookupSRV(ctx, "", "", l.host)
	if len(found) == 0 { // an error beside records is about others that make no sense
		return nil, err
	}
	var addrs []string
	var failed error
	for _, srv := range found[:min(len(found), Most)] {
		target, port := strings.TrimSuffix(srv.Target, "."), strconv.Itoa(int(srv.Port))
		if target == "" || srv.Port == 0 { // "." says that there is no such service
			continue
		}
		if !l.private {
			addrs = append(addrs, net.JoinHostPort(target, port))
			continue
		}
		at, err := l.at(ctx, srv.Target, port)
		if err != nil {
			failed = fmt.Errorf("looking up %s of the SRV records: %w", srv.Target, err)
		}
		addrs = append(addrs, at...)
	}
	if len(addrs) == 0 {
		return nil, failed
	}
	return addrs, nil
}

// records are the addresses that lookups have found.
type records struct {
	addrs   []string       // sorted
	missing map[string]int // how many lookups in a row have lacked one of addrs
	cut     bool           // there are more
}

// update takes the result of a lookup, and reports whether addrs has changed.
func (r *records) update(found []string) bool {
	missing := map[string]int{}
	all := slices.Clone(found)
	for _, a := range r.addrs {
		if slices.Contains(found, a) {
			continue
		}
		if n := r.missing[a] + 1; n < goneAfter {
			missing[a] = n
			all = append(all, a)
		}
	}
	r.missing = missing
	before := r.addrs
	r.addrs, r.cut = sorted(all)
	return !slices.Equal(before, r.addrs)
}

// Host returns the HOST whose records a source of Parse looks up, without a dot at its end; "" for other
// sources.
func Host(s Source) string {
	l, ok := s.(*lookup)
	if !ok {
		return ""
	}
	host := l.host
	for strings.HasPrefix(l.spec, "srv:") && strings.HasPrefix(host, "_") { // the labels of service and protocol
		_, host, _ = strings.Cut(host, ".")
	}
	return strings.TrimSuffix(host, ".")
}
