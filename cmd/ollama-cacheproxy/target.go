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

// target is an upstream as given by the flags.
type target struct {
	name     string
	unnamed  bool // name was made up
	url      *url.URL
	sim      *ollamasim.Server // nil: a real server, at url
	slots    int               // 0: learned; schedule.Unlimited: off
	expected int               // most likely number, while it is learned; 0: unknown

	discovered string // dns:… or srv:…: not one server but all that are listed there; else ""
}

// targets reads --upstream and --slots. It returns those that DNS lists apart.
func (s *serveCmd) targets(listen string) (given, sources []target, err error) {
	list, err := s.readTargets(listen)
	if err != nil {
		return nil, nil, err
	}
	for _, t := range list {
		if t.discovered != "" {
			sources = append(sources, t)
		} else {
			t.expect(os.Getenv("OLLAMA_NUM_PARALLEL"))
			given = append(given, t)
		}
	}
	return given, sources, nil
}

func (s *serveCmd) readTargets(listen string) ([]target, error) {
	addrs := s.Upstream
	if len(addrs) == 0 {
		addrs = []string{defaultUpstream}
	}
	var list []target
	for i, addr := range addrs {
		t, err := readTarget(addr)
		if err != nil {
			return nil, fmt.Errorf("--upstream: %w", err)
		}
		if t.name == "" {
			t.name, t.unnamed = "upstream", true
			if len(addrs) > 1 {
				t.name += strconv.Itoa(i + 1)
			}
		}
		if t.url != nil && selfTarget(listen, t.url) {
			return nil, fmt.Errorf(
				"--upstream %s is the proxy's own address: give the address of Ollama itself", t.url)
		}
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
	return list, nil
}

// readTarget reads one --upstream.
func readTarget(s string) (t target, err error) {
	var ok bool
	if t.name, t.discovered, ok, err = cutDiscovered(s); ok || err != nil {
		return t, err
	}
	t.name, t.url, t.sim, err = parseTarget(s)
	return t, err
}

// conflict returns why two upstreams cannot be used together; nil if they can.
func (t target) conflict(other target) error {
	switch {
	case t.name == other.name:
		return fmt.Errorf("two are called %q", t.name)
	case t.discovered != "" && t.discovered == other.discovered:
		return fmt.Errorf("%s and %s are one, %s", other.name, t.name, t.discovered)
	case t.url != nil && other.url != nil && t.url.String() == other.url.String():
		return fmt.Errorf("%s and %s are one address, %s", other.name, t.name, t.url)
	}
	return nil
}

// setSlots sets the upstreams' slots from --slots.
func setSlots(list []target, flags []string) error {
	all := slices.Clone(flags)
	// A setting for one upstream overrides the setting for all.
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

// expect takes the number of slots of an Ollama on this machine from the proxy's own environment,
// since Ollama most likely has the same. It ignores a value that it cannot read, as Ollama does.
func (t *target) expect(parallel string) {
	if t.sim != nil || t.slots != 0 {
		return
	}
	n, err := strconv.Atoi(strings.Trim(parallel, " \"'"))
	if upstream.Here(t.url) && err == nil && n > 0 && n <= mostSlots {
		t.expected = n
	}
}

// mostSlots is the largest number of slots that can be set.
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
		return anywhere(h) || h == "localhost" || ip != nil && ip.IsLoopback()
	}
	return host == up.Hostname() || local(host) && local(up.Hostname())
}
