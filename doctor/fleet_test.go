package doctor

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// aFleet returns the facts of a healthy edge of three proxies, seen from a, and modified by change.
func aFleet(change func(*Facts)) Facts {
	return factsOf(many(4, func(int, *Request) {}), func(f *Facts) {
		f.Upstreams[0].Name, f.Models[0].Upstream = "gpu-1", "gpu-1"
		f.Fleet = &Fleet{Name: "a", Sources: []string{"dns:proxies:11436"}, Settled: start}
		for i, name := range []string{"a", "b", "c"} {
			address := "10.0.0." + fmt.Sprint(i+1) + ":11436"
			p := Proxy{Name: name, Version: "v1", Hears: true, Servers: []Listed{
				{Name: "gpu-1", Owned: i == 0, Takes: true}, {Name: "gpu-2", Owned: i == 1, Takes: true},
			}}
			if i > 0 {
				p.Address = address
				f.Fleet.Peers = append(f.Fleet.Peers, Peer{Name: name, Address: address, Up: true, Since: start})
			}
			f.Fleet.Proxies = append(f.Fleet.Proxies, p)
		}
		if change != nil {
			change(f)
		}
	})
}

// goes makes proxy b vanish, some time ago.
func (f *Facts) goes(reason Reason, ago time.Duration) {
	p := &f.Fleet.Peers[0]
	p.Up, p.Since, p.Reason, p.Error, p.Servers = false, f.Now.Add(-ago), reason, "dial tcp: …", []string{"gpu-1", "gpu-2"}
	f.Fleet.Proxies = append(f.Fleet.Proxies[:1:1], f.Fleet.Proxies[2])
	f.Fleet.Proxies[1].Servers = []Listed{{Name: "gpu-1", Takes: true}, {Name: "gpu-2", Owned: true, Takes: true}}
}

// TestExamineFleet plants each problem of a fleet, and a case that just falls short of it.
func TestExamineFleet(t *testing.T) {
	changed := func(ago time.Duration) func(*Facts) {
		return func(f *Facts) { f.Fleet.Settled = f.Now.Add(-ago) }
	}
	both := func(list ...func(*Facts)) func(*Facts) {
		return func(f *Facts) {
			for _, change := range list {
				change(f)
			}
		}
	}
	away := func(reason Reason, ago time.Duration) func(*Facts) {
		return func(f *Facts) { f.goes(reason, ago) }
	}
	only := func(f *Facts) {
		f.Fleet.Unserved = []Unserved{{Server: "gpu-3", Owner: "b", Address: "10.0.0.2:11436", Away: true, Models: []string{"n:latest"}}}
	}
	deaf := func(f *Facts) { f.Fleet.Proxies[1].Hears = false }
	owned := func(f *Facts) { f.Fleet.Proxies[2].Servers[1].Owned = true }
	beside := func(f *Facts) {
		f.Fleet.Proxies[1].Servers[1].Beside, f.Fleet.Proxies[2].Servers[1].Beside = true, true
	}
	alike := func(f *Facts) { f.Fleet.Proxies[2].Name = "b" }
	without := func(f *Facts) { f.Fleet.Proxies[2].Servers = f.Fleet.Proxies[2].Servers[:1] }
	upgraded := func(f *Facts) { f.Fleet.Proxies[2].Version = "v2" }
	leaving := func(f *Facts) { f.Fleet.Proxies[2].Leaving = true }
	notServed := func(u Unserved) func(*Facts) {
		return func(f *Facts) { f.Fleet.Unserved = []Unserved{u} }
	}
	stopped := notServed(Unserved{Server: "gpu-3", Owner: "d", Address: "10.0.0.9:11436", Away: true, Drained: true, Models: []string{"n"}})
	incidents := func(away, lost int) func(*Facts) {
		return func(f *Facts) {
			for i := range away + lost {
				f.Fleet.Incidents = append(f.Fleet.Incidents, Incident{At: at(float64(i)), Peer: "b", Lost: i >= away, Error: "nothing came for 3s"})
			}
		}
	}
	shared := func(limited uint64) func(*Facts) {
		return func(f *Facts) {
			f.Shared = Shared{Down: true, Since: start, Error: "connection refused", Limited: limited, Alone: limited / 2}
		}
	}
	docs, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		change   func(*Facts)
		want     string // the findings' IDs
		severity Severity
		set      string // a setting that the first finding advises
	}{
		{"healthy", nil, "", "", ""},
		{"no fleet", func(f *Facts) { f.Fleet = nil }, "", "", ""},
		{"it was just started", both(changed(0), func(f *Facts) {
			f.Fleet.Peers, f.Fleet.Proxies = []Peer{{Address: "10.0.0.2:11436", Since: f.Now}}, f.Fleet.Proxies[:1]
		}), "", "", ""},

		{"nobody listens, a restart", away("refused", 5*time.Second), IDPeersAway, Low, "--peer-listen :11436"},
		{"… for longer", away("refused", 5*time.Minute), IDPeersAway, Medium, "--peer-listen :11436"},
		{"… since it was stopped", both(away("refused", 5*time.Minute), func(f *Facts) { f.Fleet.Peers[0].Stopped = true }), IDPeersAway, Low, ""},
		{"… with the only model", both(away("refused", 5*time.Minute), only), IDPeersAway, High, ""},
		{"… which may come back", both(away("refused", 5*time.Second), only), IDPeersAway, Low, ""},
		{"nothing comes back", away("silent", time.Hour), IDPeersAway, Medium, "nc -vz 10.0.0.2 11436"},
		{"another secret", away("secret", time.Second), IDPeersAway, Medium, "--peer-secret-file"},
		{"another authority", away("certificate", time.Second), IDPeersAway, Medium, "openssl s_client -connect 10.0.0.2:11436"},
		{"the address for clients", away("no_peer", time.Second), IDPeersAway, Medium, "--peers 10.0.0.2:11436"},
		{"an unknown name", away("unknown", time.Hour), IDPeersAway, Medium, "getent hosts 10.0.0.2"},
		{"the connection ends", away("broke", time.Hour), IDPeersAway, Medium, "doctor --proxy 10.0.0.2:11435"},
		{"two reasons", both(away("secret", time.Hour), func(f *Facts) {
			f.Fleet.Peers[1].Up, f.Fleet.Peers[1].Reason, f.Fleet.Proxies = false, "refused", f.Fleet.Proxies[:1]
		}), IDPeersAway + " " + IDPeersAway, Medium, ""},

		{"nobody is found", func(f *Facts) { f.Fleet.Peers, f.Fleet.Proxies = nil, f.Fleet.Proxies[:1] }, IDNoPeers, Low, "--peers dns:"},
		{"… yet", both(changed(time.Second), func(f *Facts) { f.Fleet.Peers, f.Fleet.Proxies = nil, f.Fleet.Proxies[:1] }), "", "", ""},

		{"its name is its address", both(away("refused", 5*time.Second), func(f *Facts) { f.Fleet.Peers[0].Name = "10.0.0.2:11436" }), IDPeersAway, Low, ""},
		{"one does not hear this one", deaf, IDOneWay, Medium, "--peers"},
		{"… yet", both(deaf, changed(time.Second)), "", "", ""},
		{"… and both schedule a server", both(deaf, func(f *Facts) { f.Fleet.Proxies[1].Servers[0].Owned = true }), IDOneWay, Medium, ""},

		{"two owners", owned, IDTwoOwners, Medium, "doctor --proxy 10.0.0.2:11435"},
		{"… for a moment", both(owned, changed(time.Second)), "", "", ""},
		{"… of which one is leaving", both(owned, leaving), "", "", ""},

		{"two proxies beside one server", beside, IDOwnTwice, Medium, "--own gpu-2-2"},
		{"… of which one is leaving", both(beside, leaving), "", "", ""},
		{"a proxy beside its server", func(f *Facts) { f.Fleet.Proxies[1].Servers[1].Beside = true }, "", "", ""},

		{"two proxies of one name", alike, IDPeerNames, Low, "--peer-name"},
		{"… of which one is leaving", both(alike, leaving), "", "", ""},

		{"an upstream that one has not", without, IDLists, Low, "--upstream gpu-2="},
		{"… yet", both(without, changed(30*time.Second)), "", "", ""},
		{"an upstream that one alone has", both(without, func(f *Facts) { f.Fleet.Proxies[1].Servers = f.Fleet.Proxies[1].Servers[:1] }), IDLists, Medium, ""},
		{"sidecars", func(f *Facts) {
			for i := range f.Fleet.Proxies {
				f.Fleet.Proxies[i].Servers = []Listed{{Name: fmt.Sprint("gpu-", i), Beside: true, Owned: true, Takes: true}}
			}
		}, "", "", ""},
		{"… without --own", func(f *Facts) {
			for i := range f.Fleet.Proxies {
				f.Fleet.Proxies[i].Servers = []Listed{{Name: fmt.Sprint("gpu-", i), Owned: true, Takes: true}}
			}
		}, "", "", ""},
		{"a sidecar among edges", func(f *Facts) {
			f.Fleet.Proxies[2].Servers = append(f.Fleet.Proxies[2].Servers, Listed{Name: "own", Beside: true, Owned: true, Takes: true})
		}, "", "", ""},

		{"a server that its proxy does not reach", notServed(Unserved{Server: "gpu-3", Owner: "b", Address: "10.0.0.2:11436"}), IDNotServed, Medium, "doctor --proxy 10.0.0.2:11435"},
		{"… with the only model", notServed(Unserved{Server: "gpu-3", Owner: "b", Address: "10.0.0.2:11436", Models: []string{"n"}}), IDNotServed, High, ""},
		{"… yet", both(changed(time.Second), notServed(Unserved{Server: "gpu-3", Owner: "b", Address: "10.0.0.2:11436", Models: []string{"n"}})), "", "", ""},
		{"… which was drained", notServed(Unserved{Server: "gpu-3", Owner: "b", Address: "10.0.0.2:11436", Drained: true}), "", "", ""},
		{"this proxy's own, which somebody drained", notServed(Unserved{Server: "gpu-1", Owner: "a"}), "", "", ""},
		{"a proxy was taken away", notServed(Unserved{Server: "gpu-3", Owner: "d", Address: "10.0.0.9:11436", Away: true}), "", "", ""},
		{"… with the only model", notServed(Unserved{Server: "gpu-3", Owner: "d", Address: "10.0.0.9:11436", Away: true, Models: []string{"n"}}), IDNotServed, High, "ollama pull"},
		{"… and was stopped for that", stopped, IDNotServed, High, "ollama pull"},
		{"… and may be back", both(stopped, changed(30*time.Second)), "", "", ""},
		{"this proxy alone does not reach a server", func(f *Facts) { f.Upstreams[0].Up = false }, IDUnreachable, Medium, ""},
		{"nor does any other", func(f *Facts) {
			f.Upstreams[0].Up = false
			for i := range f.Fleet.Proxies {
				f.Fleet.Proxies[i].Servers[0].Takes = false
			}
		}, IDUnreachable, High, ""},

		{"two versions", upgraded, IDVersions, Low, "ollama-cacheproxy version"},
		{"… during an upgrade", both(upgraded, changed(5*time.Minute)), "", "", ""},
		{"one that does not tell its version", func(f *Facts) { f.Fleet.Proxies[2].Version = "" }, "", "", ""},

		{"a proxy that went away twice", incidents(2, 2), "", "", ""},
		{"… and keeps doing so", incidents(3, 0), IDPeersLeave, Medium, "journalctl"},
		{"… with requests", incidents(3, 1), IDPeersLeave, High, ""},
		{"once, with many requests", incidents(1, 5), IDPeersLeave, Medium, ""},
		{"never, with many requests", incidents(0, 5), IDPeersLeave, Medium, ""},

		{"Valkey is gone", shared(0), IDShared, Low, "--shared"},
		{"… which counts for limits", shared(10), IDShared, Medium, "--shared"},
		{"… without a fleet", both(shared(0), func(f *Facts) { f.Fleet = nil }), IDShared, Low, ""},
	} {
		found := Examine(aFleet(c.change))
		var ids []string
		for _, f := range found {
			ids = append(ids, f.ID)
			if f.Title == "" || len(f.Evidence) == 0 || len(f.Advice) == 0 || f.Doc == "" || !slices.Contains(headings(t), strings.TrimPrefix(f.Doc, "doctor.md#")) && f.Doc != "failure.md" {
				t.Errorf("%s: incomplete: %+v", c.name, f)
			}
			if text := fmt.Sprint(f); strings.Contains(text, "10.0.0.2:11436 at 10.0.0.2:11436") {
				t.Errorf("%s: it is named twice: %s", c.name, text)
			}
			if text := fmt.Sprint(f); strings.Contains(text, "0 times") || strings.Contains(text, "never:") {
				t.Errorf("%s: nothing is counted: %s", c.name, text)
			}
			if !bytes.Contains(docs, []byte("`"+f.ID+"`")) {
				t.Errorf("docs/doctor.md does not list %s", f.ID)
			}
		}
		if got := strings.Join(ids, " "); got != c.want {
			t.Errorf("%s: %q, want %q\n%+v", c.name, got, c.want, found)
			continue
		}
		if len(found) > 0 && found[0].Severity != c.severity {
			t.Errorf("%s: %s, want %s", c.name, found[0].Severity, c.severity)
		}
		if c.set != "" && !slices.ContainsFunc(found[0].Advice, func(a Advice) bool { return strings.Contains(a.Set, c.set) }) {
			t.Errorf("%s: %q is not advised: %+v", c.name, c.set, found[0].Advice)
		}
	}
}
