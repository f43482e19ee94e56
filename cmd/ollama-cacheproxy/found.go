package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/discover"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// This file is about upstreams that DNS lists (--upstream dns:… and srv:…): they come and go.

// longestName is the length of an upstream's name at most: see upstream.CutName.
const longestName = 64

// cutDiscovered reads [NAME=]dns:HOST:PORT or [NAME=]srv:_name._proto.HOST. Without a name, there is
// one of what is looked up. ok is false for any other upstream, also for a machine called dns or srv.
func cutDiscovered(s string) (name, spec string, ok bool, err error) {
	name, spec, err = upstream.CutName(s)
	if err != nil {
		return "", "", false, nil // whoever reads it as an address says why
	}
	scheme, rest, found := strings.Cut(strings.TrimSpace(spec), ":")
	if !found || scheme != "dns" && scheme != "srv" || rest != "" && strings.Trim(rest, "0123456789") == "" {
		return "", "", false, nil
	}
	spec = scheme + ":" + rest
	source, err := discover.Parse(spec, slog.New(slog.DiscardHandler))
	if err != nil {
		return "", "", false, err
	}
	host, _, _ := strings.Cut(strings.TrimPrefix(source.String(), scheme+":"), "?")
	if scheme == "dns" {
		host = host[:strings.LastIndexByte(host, ':')]
	} else {
		host, _, _ = strings.Cut(host[1:], ".") // the service's name
	}
	return cmp.Or(name, legalName(host)), spec, true, nil
}

// source returns where the servers of a target are listed.
func (t target) source(log *slog.Logger) discover.Source {
	s, err := discover.Parse(t.discovered, log)
	if err != nil {
		panic(err) // impossible: it was parsed before
	}
	return s
}

// at returns the target of a server at an address (host:port) that a source has found. It has the
// same name whenever it is found.
func (t target) at(addr string) (target, error) {
	u, err := upstream.ParseAddr(addr, upstream.DefaultPort)
	if err != nil {
		return target{}, err
	}
	host := u.Host
	if strings.HasPrefix(t.discovered, "dns:") { // all have the same port
		host = u.Hostname()
	}
	one := target{name: legalName(t.name + "-" + host), url: u, slots: t.slots}
	one.expect(os.Getenv("OLLAMA_NUM_PARALLEL"))
	return one, nil
}

// unbracketed removes the brackets of IPv6 addresses.
var unbracketed = strings.NewReplacer("[", "", "]", "")

// legalName makes a text the name of an upstream. Of a long one it keeps the beginning, and a digest
// of the rest.
func legalName(s string) string {
	name := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c) {
			return c
		}
		return '-'
	}, strings.Trim(unbracketed.Replace(s), "."))
	if len(name) <= longestName {
		return name
	}
	sum := sha256.Sum256([]byte(s))
	digest := "-" + hex.EncodeToString(sum[:4])
	return name[:longestName-len(digest)] + digest
}

// foundServers are the servers that the sources of --upstream list at the moment.
type foundServers struct {
	sources []target
	given   []target // the other upstreams
	listen  string   // the proxy's own address
	log     *slog.Logger
	add     func(target)
	remove  func(name string)

	mu    sync.Mutex
	lists [][]string        // by source; guarded by mu
	now   map[string]string // names of the upstreams that have been added, by address; guarded by mu
}

// watch adds and removes upstreams until ctx ends.
func (f *foundServers) watch(ctx context.Context) {
	f.lists, f.now = make([][]string, len(f.sources)), map[string]string{}
	var wg sync.WaitGroup
	for i, t := range f.sources {
		wg.Go(func() { t.source(f.log).Watch(ctx, func(addrs []string) { f.found(i, addrs) }) })
	}
	wg.Wait()
}

// found takes what a source lists now. An address that several list is one upstream, called after
// the first of them.
func (f *foundServers) found(source int, addrs []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists[source] = addrs
	wanted := map[string]target{}
	for i, list := range f.lists {
		for _, addr := range list {
			if _, ok := wanted[addr]; ok {
				continue
			}
			t, err := f.sources[i].at(addr)
			if err == nil {
				err = f.usable(t)
			}
			if err != nil {
				f.log.Debug("an address is no upstream", "source", f.sources[i].discovered, "addr", addr, "err", err)
				continue
			}
			wanted[addr] = t
		}
	}
	for addr, name := range f.now {
		if wanted[addr].name != name {
			f.remove(name)
			delete(f.now, addr)
		}
	}
	for _, addr := range slices.Sorted(maps.Keys(wanted)) {
		if t := wanted[addr]; f.now[addr] == "" {
			f.add(t)
			f.now[addr] = t.name
		}
	}
}

// usable returns why an address cannot be an upstream; nil if it can.
func (f *foundServers) usable(t target) error {
	if selfTarget(f.listen, t.url) {
		return fmt.Errorf("%s is the proxy's own address", t.url)
	}
	for _, other := range f.given {
		if err := t.conflict(other); err != nil {
			return err
		}
	}
	return nil
}

// resolve looks up once what the sources list, for --check. It returns a line about each, and those
// that list nothing.
func (set settings) resolve(ctx context.Context) (text string, found []target, nothing []string) {
	for _, t := range set.sources {
		addrs, err := discover.Once(ctx, t.source(slog.New(slog.DiscardHandler)))
		what := fmt.Sprintf("%d servers: %s", len(addrs), strings.Join(addrs, ", "))
		if err != nil {
			what = "nothing is found: " + err.Error()
			nothing = append(nothing, t.discovered)
		}
		text += fmt.Sprintf("upstream    %s = %s (%s)\n", t.name, t.discovered, what)
		for _, addr := range addrs {
			if one, err := t.at(addr); err == nil {
				found = append(found, one)
			}
		}
	}
	return text, found, nothing
}

// unlimited reports whether any upstream has no lanes, or will have none.
func unlimited(lists ...[]target) bool {
	for _, t := range slices.Concat(lists...) {
		if t.slots == schedule.Unlimited {
			return true
		}
	}
	return false
}
