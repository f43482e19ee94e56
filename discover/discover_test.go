package discover

import (
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, spec := range []string{
		"10.0.0.7:11436", "[::1]:11436", "peer-1.example.com:11436", "dns:ollama.default.svc:11434",
		"dns:ollama:11434?resolver=127.0.0.1:5353", "dns:[fd00::1]:11434?resolver=[::1]:53",
		"srv:_ollama._tcp.example.com", "srv:_ollama._tcp.example.com.?resolver=10.0.0.1:53",
	} {
		s, err := Parse(spec, slog.Default())
		if err != nil {
			t.Errorf("Parse(%q): %v", spec, err)
		} else if s.String() != spec {
			t.Errorf("Parse(%q).String() = %q", spec, s)
		}
	}
	for spec, want := range map[string]string{
		"":                                       "want HOST:PORT, dns:HOST:PORT or srv:",
		"host":                                   "missing port",
		"host:0":                                 "from 1 to 65535",
		"host:70000":                             "from 1 to 65535",
		"ho st:1":                                "no name of a host",
		":11436":                                 "no name of a host",
		"http://host:1":                          "want HOST:PORT",
		"gossip:host:1":                          "want HOST:PORT",
		"dns:host":                               "missing port",
		"dns::11434":                             "no name of a host",
		"dns:host:11434?resolver=example.com:53": "want resolver=IP:PORT",
		"dns:host:11434?resolver=127.0.0.1":      "want resolver=IP:PORT",
		"dns:host:11434?resolver=127.0.0.1:0":    "want resolver=IP:PORT",
		"dns:host:11434?ttl=5":                   "want resolver=IP:PORT",
		"dns:host:11434?":                        "want resolver=IP:PORT",
		"srv:ollama._tcp.example.com":            "want _name._proto.HOST",
		"srv:_ollama._tcp":                       "want _name._proto.HOST",
		"srv:_ollama._tcp.":                      "want _name._proto.HOST",
		"srv:_ollama._tcp.example.com:11434":     "want _name._proto.HOST",
	} {
		if _, err := Parse(spec, slog.Default()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%q): %v; want %q", spec, err, want)
		}
	}
}

func TestStatic(t *testing.T) {
	s, err := Parse("10.0.0.7:011436", slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	found, _ := watch(t, s)
	until(t, found, "10.0.0.7:11436")
}

func TestSorted(t *testing.T) {
	var all []string
	for i := range Most + 10 {
		a := fmt.Sprintf("host%03d:1", i)
		all = append(all, a, a)
	}
	slices.Reverse(all)
	got, tooMany := sorted(all)
	if len(got) != Most || !tooMany || got[0] != "host000:1" || got[Most-1] != "host255:1" {
		t.Errorf("%d addresses from %s to %s, too many: %v", len(got), got[0], got[len(got)-1], tooMany)
	}
}

// FuzzParse: whatever is accepted can be looked up, and says what it was made of.
func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, spec string) {
		s, err := Parse(spec, slog.New(slog.DiscardHandler))
		if err != nil {
			if !strings.Contains(err.Error(), "want ") && !strings.Contains(err.Error(), "port") && !strings.Contains(err.Error(), "no name") && !strings.Contains(err.Error(), "address") {
				t.Errorf("%q: the error does not say what is wrong: %v", spec, err)
			}
			return
		}
		switch s := s.(type) {
		case static:
			host, port, err := net.SplitHostPort(string(s))
			if err != nil || host == "" || port == "" {
				t.Errorf("%q: found %q", spec, s)
			}
			if again, err := Parse(string(s), nil); err != nil || again.String() != s.String() {
				t.Errorf("%q: %q is read as %v, %v", spec, s, again, err)
			}
		case *lookup:
			if s.host == "" || s.find == nil || s.String() != spec {
				t.Errorf("%q: %+v", spec, s)
			}
			if isDNS := strings.HasPrefix(spec, "dns:"); isDNS != (s.port != "") {
				t.Errorf("%q: the port is %q", spec, s.port)
			}
		default:
			t.Errorf("%q: a %T", spec, s)
		}
	})
}
