package main

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// target is an upstream, as the flags name it.
type target struct {
	name     string
	url      *url.URL
	sim      *ollamasim.Server // nil: a real one, at url
	slots    int               // 0: to be learned; schedule.Unlimited: off
	expected int               // so many, most likely, where they are to be learned; 0: not known
}

// targets reads --upstream and --slots.
func (s *serveCmd) targets(listen string) ([]target, error) {
	addrs := s.Upstream
	if len(addrs) == 0 {
		addrs = []string{defaultUpstream}
	}
	var list []target
	for i, addr := range addrs {
		name, u, sim, err := parseTarget(addr)
		if err != nil {
			return nil, fmt.Errorf("--upstream: %w", err)
		}
		if name == "" {
			name = "upstream"
			if len(addrs) > 1 {
				name += strconv.Itoa(i + 1)
			}
		}
		if sim == nil && selfTarget(listen, u) {
			return nil, fmt.Errorf(
				"--upstream %s is the proxy's own address: give the address of Ollama itself", u)
		}
		t := target{name: name, url: u, sim: sim}
		for _, other := range list {
			if err := t.conflict(other); err != nil {
				return nil, fmt.Errorf("--upstream: %w", err)
			}
		}
		list = append(list, t)
	}
	if len(list) > maxUpstreams {
		return nil, fmt.Errorf("--upstream: %d are given, %d at most can be", len(list), maxUpstreams)
	}
	if err := setSlots(list, s.Slots); err != nil {
		return nil, err
	}
	for i := range list {
		list[i].expect(os.Getenv("OLLAMA_NUM_PARALLEL"))
	}
	return list, nil
}

// conflict says what keeps two upstreams from being given together; nil: nothing.
func (t target) conflict(other target) error {
	switch {
	case t.name == other.name:
		return fmt.Errorf("two are called %q", t.name)
	case t.sim == nil && other.sim == nil && t.url.String() == other.url.String():
		return fmt.Errorf("%s and %s are one address, %s", other.name, t.name, t.url)
	}
	return nil
}

// setSlots gives upstreams the slots that --slots says.
func setSlots(list []target, flags []string) error {
	all := slices.Clone(flags)
	// What is said of one upstream goes before what is said of all.
	slices.SortStableFunc(all, func(a, b string) int {
		return strings.Count(a, "=") - strings.Count(b, "=")
	})
	for _, slots := range all {
		name, value, named := strings.Cut(slots, "=")
		if !named {
			value = slots
		}
		n, err := parseSlots(value)
		if err != nil {
			return fmt.Errorf("--slots %q: %w", slots, err)
		}
		known := !named
		for i := range list {
			if !named || list[i].name == name {
				list[i].slots, known = n, true
			}
		}
		if !known {
			return fmt.Errorf("--slots %q: no --upstream is called %q", slots, name)
		}
	}
	return nil
}

// expect has an Ollama on this machine begin with the slots that the proxy's own environment says:
// most likely it has the same one. What it could not read it ignores, too.
func (t *target) expect(parallel string) {
	if t.sim != nil || t.slots != 0 {
		return
	}
	n, err := strconv.Atoi(strings.Trim(parallel, " \"'"))
	if upstream.Here(t.url) && err == nil && n > 0 && n <= mostSlots {
		t.expected = n
	}
}

// mostSlots bounds how many slots can be given.
const mostSlots = 1024

func parseSlots(s string) (int, error) {
	switch n, err := strconv.Atoi(s); {
	case s == "auto":
		return 0, nil
	case s == "off":
		return schedule.Unlimited, nil
	case err != nil || n < 1 || n > mostSlots:
		return 0, fmt.Errorf("want a number from 1 to %d, auto or off", mostSlots)
	default:
		return n, nil
	}
}

// selfTarget reports whether the proxy would forward to itself.
func selfTarget(listen string, up *url.URL) bool {
	host, port, err := net.SplitHostPort(listen)
	if err != nil || port != up.Port() || port == "0" {
		return false
	}
	local := func(h string) bool {
		ip := net.ParseIP(h)
		return h == "" || h == "localhost" || ip != nil && (ip.IsLoopback() || ip.IsUnspecified())
	}
	return host == up.Hostname() || local(host) && local(up.Hostname())
}
