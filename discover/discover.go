// Package discover finds the addresses of servers and of other proxies: a fixed one, those that DNS
// lists, or those that memberlist's gossip tells. It connects to none of them.
package discover

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Source finds addresses (host:port).
type Source interface {
	// Watch calls found with all addresses, sorted, at first and whenever they change, until ctx
	// ends. If nothing is known at first, it is called with none. When a lookup fails, the last known
	// addresses stay; one log line says so, and another one that it works again.
	Watch(ctx context.Context, found func(addrs []string))
	String() string
}

// Most is how many addresses a Source finds at most. Of more, the first ones in order count.
const Most = 256

// Parse reads where addresses come from:
//
//	HOST:PORT               this address, always
//	dns:HOST:PORT           the A and AAAA records of HOST, looked up every few seconds (Interval)
//	srv:_name._proto.HOST   the SRV records of that name, which have ports, looked up as often
//
// The last two can end in ?resolver=IP:PORT: a DNS server to ask instead of the system's.
func Parse(spec string, log *slog.Logger) (Source, error) {
	scheme, rest, _ := strings.Cut(spec, ":")
	if scheme != "dns" && scheme != "srv" {
		addr, err := hostPort(spec)
		if err != nil {
			return nil, fmt.Errorf("%q: %w; want HOST:PORT, dns:HOST:PORT or srv:_name._proto.HOST", spec, err)
		}
		return static(addr), nil
	}
	name, query, asked := strings.Cut(rest, "?")
	l := &lookup{spec: spec, log: log, resolver: net.DefaultResolver}
	if asked {
		server, err := resolverOf(query)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", spec, err)
		}
		l.resolver, l.private = resolverAt(server), true
	}
	var err error
	if scheme == "dns" {
		if name, err = hostPort(name); err == nil {
			l.host, l.port, _ = net.SplitHostPort(name)
			l.find = l.hosts
		}
	} else if err = checkService(name); err == nil {
		l.host, l.find = name, l.services
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", spec, err)
	}
	return l, nil
}

// hostPort checks an address, and returns it in the form of net.JoinHostPort.
func hostPort(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", err
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return "", fmt.Errorf("port %q is not a number from 1 to 65535", port)
	}
	if _, err := netip.ParseAddr(host); err != nil && !isName(host) {
		return "", fmt.Errorf("%q is no name of a host", host)
	}
	return net.JoinHostPort(host, strings.TrimLeft(port, "+0")), nil
}

// isName reports whether a host's name can be looked up.
func isName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(c rune) bool {
			return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_'
		}) {
			return false
		}
	}
	return true
}

// checkService checks the name of SRV records.
func checkService(s string) error {
	labels := strings.SplitN(s, ".", 3)
	if len(labels) < 3 || labels[2] == "" || !isName(s) || !strings.HasPrefix(labels[0], "_") || !strings.HasPrefix(labels[1], "_") {
		return fmt.Errorf("%q is no name of SRV records: want _name._proto.HOST, such as _ollama._tcp.example.com", s)
	}
	return nil
}

// resolverOf reads the address of a DNS server.
func resolverOf(query string) (netip.AddrPort, error) {
	values, err := url.ParseQuery(query)
	if err == nil && len(values) == 1 && len(values["resolver"]) == 1 {
		var server netip.AddrPort
		if server, err = netip.ParseAddrPort(values.Get("resolver")); err == nil && server.Port() != 0 {
			return server, nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("after the question mark there is %q: want resolver=IP:PORT, a DNS server's address", query)
}

// static is one address.
type static string

func (s static) String() string { return string(s) }

func (s static) Watch(ctx context.Context, found func([]string)) {
	found([]string{string(s)})
	<-ctx.Done()
}

// sorted returns addresses in order, each once, and at most Most of them.
func sorted(addrs []string) (list []string, tooMany bool) {
	list = slices.Compact(slices.Sorted(slices.Values(addrs)))
	return list[:min(len(list), Most)], len(list) > Most
}

// Once returns the addresses that a source of Parse finds now.
func Once(ctx context.Context, s Source) ([]string, error) {
	l, ok := s.(*lookup)
	if !ok {
		return []string{s.String()}, nil
	}
	addrs, err := l.once(ctx)
	list, _ := sorted(addrs)
	return list, err
}
