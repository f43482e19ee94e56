package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/discover/dnstest"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

func TestCutDiscovered(t *testing.T) {
	for spec, want := range map[string][2]string{
		"dns:ollama.default.svc:11434":                     {"ollama.default.svc", "dns:ollama.default.svc:11434"},
		"gpu=dns:ollama:11434":                             {"gpu", "dns:ollama:11434"},
		"dns:[fd00::1]:11434":                              {"fd00--1", "dns:[fd00::1]:11434"},
		"dns:ollama.test.:11434?resolver=127.0.0.1:53":     {"ollama.test", "dns:ollama.test.:11434?resolver=127.0.0.1:53"},
		"srv:_ollama._tcp.example.com":                     {"ollama", "srv:_ollama._tcp.example.com"},
		"x=srv:_ollama._tcp.example.com?resolver=[::1]:53": {"x", "srv:_ollama._tcp.example.com?resolver=[::1]:53"},
	} {
		name, source, ok, err := cutDiscovered(spec)
		if err != nil || !ok || name != want[0] || source != want[1] {
			t.Errorf("%q: %q, %q, %v, %v", spec, name, source, ok, err)
		}
	}
	for _, spec := range []string{"dns:11434", "srv:80", "dns", "ollama:11434", "http://dns:80", "sim:", "bad name=dns:ollama:1"} {
		if _, _, ok, err := cutDiscovered(spec); ok || err != nil {
			t.Errorf("%q: %v, %v", spec, ok, err)
		}
	}
	for _, spec := range []string{"dns:", "dns:ollama", "srv:", "srv:ollama.example.com", "dns:ollama:1?resolver=x"} {
		if _, _, _, err := cutDiscovered(spec); err == nil {
			t.Errorf("%q: no error", spec)
		}
	}
}

// TestNamesOfFound: the name of a server that was found is that of its source and its address,
// legal, and the same each time; different addresses have different names.
func TestNamesOfFound(t *testing.T) {
	long := strings.Repeat("long-name-of-a-host.", 9) + "example"
	for _, x := range []struct{ source, name, addr, want string }{
		{"dns:ollama:11434", "gpu", "10.0.0.7:11434", "gpu-10.0.0.7"},
		{"dns:ollama:11434", "gpu", "[fd00::7]:11434", "gpu-fd00--7"},
		{"srv:_o._tcp.x", "o", "ollama-0.ollama.svc:11434", "o-ollama-0.ollama.svc-11434"},
		{"srv:_o._tcp.x", "o", "[fd00::7]:80", "o-fd00--7-80"},
		{"srv:_o._tcp.x", "o", long + ":1", "o-" + long[:53] + "-" + "*"},
	} {
		one, err := target{name: x.name, discovered: x.source}.at(x.addr)
		want, cut := strings.CutSuffix(x.want, "*")
		if err != nil || one.name != want && !(cut && strings.HasPrefix(one.name, want)) || one.url.Host != x.addr {
			t.Errorf("%s at %s: %q, %v, %v; want %q", x.source, x.addr, one.name, one.url, err, x.want)
		}
	}
}

func FuzzLegalName(f *testing.F) {
	f.Add("gpu-10.0.0.7", "gpu-10.0.0.8")
	f.Add("gpu-[::1]:80", strings.Repeat("x", 100))
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, s := range []string{"x" + a, "x" + b} {
			name := legalName(s)
			if got, rest, err := upstream.CutName(name + "=rest"); err != nil || got != name || rest != "rest" {
				t.Errorf("%q: %q is no name: %v", s, name, err)
			}
			if legalName(name) != name {
				t.Errorf("%q: %q becomes %q", s, name, legalName(name))
			}
		}
	})
}

// TestFoundServers: an address that several sources list is one upstream, and is there as long as
// any of them lists it; the proxy's own address, and those of other upstreams, are none.
func TestFoundServers(t *testing.T) {
	var events []string
	given := target{name: "given", url: &url.URL{Scheme: "http", Host: "10.0.0.9:11434"}}
	f := &foundServers{
		sources: []target{{name: "a", discovered: "dns:a:11434", slots: 3}, {name: "b", discovered: "dns:b:11434"}},
		given:   []target{given}, listen: "127.0.0.1:11435", log: slog.New(slog.DiscardHandler),
		add:    func(t target) { events = append(events, fmt.Sprintf("+%s %s %d", t.name, t.url.Host, t.slots)) },
		remove: func(name string) { events = append(events, "-"+name) },
		lists:  make([][]string, 2), now: map[string]string{},
	}
	for i, step := range []struct {
		source int
		addrs  []string
		want   []string
	}{
		{0, nil, nil},
		{1, []string{"10.0.0.1:11434", "10.0.0.9:11434", "127.0.0.1:11435"}, []string{"+b-10.0.0.1 10.0.0.1:11434 0"}},
		{0, []string{"10.0.0.2:11434"}, []string{"+a-10.0.0.2 10.0.0.2:11434 3"}},
		{1, []string{"10.0.0.1:11434", "10.0.0.2:11434"}, nil},
		{0, []string{"10.0.0.3:11434"}, []string{"-a-10.0.0.2", "+b-10.0.0.2 10.0.0.2:11434 0", "+a-10.0.0.3 10.0.0.3:11434 3"}},
		{1, []string{"10.0.0.1:11434"}, []string{"-b-10.0.0.2"}},
		{1, []string{"10.0.0.1:11434"}, nil},
	} {
		events = nil
		f.found(step.source, step.addrs)
		slices.Sort(events)
		slices.Sort(step.want)
		if !slices.Equal(events, step.want) {
			t.Errorf("step %d: %q, want %q", i, events, step.want)
		}
	}
}

func TestDiscoveredSettings(t *testing.T) {
	s := &serveCmd{Upstream: []string{"gpu=dns:ollama:11434", "big=10.0.0.7"}, Slots: []string{"gpu=4", "2"}}
	given, sources, err := s.targets("127.0.0.1:11435")
	if err != nil || len(given) != 1 || len(sources) != 1 || given[0].name != "big" || given[0].slots != 2 || sources[0].slots != 4 {
		t.Fatalf("%+v, %+v, %v", given, sources, err)
	}
	for _, wrong := range [][]string{{"dns:ollama"}, {"x=srv:ollama"}, {"a=dns:o:1", "a=dns:p:1"}, {"a=dns:o:1", "b=dns:o:1"}} {
		if _, _, err := (&serveCmd{Upstream: wrong}).targets("127.0.0.1:11435"); err == nil {
			t.Errorf("%q: no error", wrong)
		}
	}
	if set := (settings{sources: []target{{slots: schedule.Unlimited}}}); !set.several() || !unlimited(nil, set.sources) {
		t.Error("a source is not one server")
	}
}

// someOllama answers the proxy's polls on a loopback address with a port that others have, too.
func someOllama(t *testing.T, addr string) string {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/tags":
			io.WriteString(w, `{"models":[{"name":"m","digest":"1"}]}`)
		case "/api/ps":
			io.WriteString(w, `{"models":[]}`)
		case "/api/version":
			io.WriteString(w, `{"version":"0.34.1"}`)
		default:
			io.WriteString(w, `{"done":true}`)
		}
	}))
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	t.Cleanup(srv.Close)
	return ln.Addr().String()
}

// TestServeDiscovered starts the proxy before any server is listed, then lists one: requests are
// answered by it. --check shows what is found.
func TestServeDiscovered(t *testing.T) {
	dns := dnstest.Start(t)
	at := someOllama(t, "127.0.0.1:0")
	_, port, _ := strings.Cut(at, ":")
	spec := "gpu=dns:ollama.test.:" + port + "?resolver=" + dns.Addr
	proxy, stop, err := runInner(t.Context(), &console{stdout: io.Discard, stderr: io.Discard}, []string{"--upstream", spec}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	ask := func() (int, string) {
		res, err := http.Post(proxy.String()+"/api/generate", "application/json", strings.NewReader(`{"model":"m","prompt":"x"}`))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		return res.StatusCode, res.Header.Get("X-Cacheproxy-Upstream")
	}
	if status, _ := ask(); status != 503 {
		t.Errorf("before any server is listed: %d", status)
	}
	check := func() (string, int) {
		var out strings.Builder
		code := run(t.Context(), []string{"--check", "--listen", "127.0.0.1:0", "--upstream", spec}, &out, &out)
		return out.String(), code
	}
	if text, code := check(); code != 1 || !strings.Contains(text, "nothing is found") || !strings.Contains(text, "no Ollama answers at dns:ollama.test.") {
		t.Errorf("--check without servers: %d\n%s", code, text)
	}
	dns.Set(t, "ollama.test. 1 IN A 127.0.0.1")
	if text, code := check(); code != 0 || !strings.Contains(text, "1 servers: "+at) || !strings.Contains(text, "gpu-127.0.0.1 = http://"+at) {
		t.Errorf("--check: %d\n%s", code, text)
	}
	status, from := ask()
	for limit := time.Now().Add(time.Minute); status != 200 && time.Now().Before(limit); status, from = ask() {
		time.Sleep(20 * time.Millisecond) // until the next lookup
	}
	if status != 200 || from != "gpu-127.0.0.1" {
		t.Errorf("%d from %q", status, from)
	}
	metrics := func() string {
		res, err := http.Get(proxy.String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	const series = `upstream_up{upstream="gpu-127.0.0.1"} 1`
	for limit := time.Now().Add(time.Minute); !strings.Contains(metrics(), series); {
		if time.Now().After(limit) {
			t.Fatal("the metrics lack the server")
		}
		time.Sleep(20 * time.Millisecond) // until its first poll has ended
	}
	var page struct{ Upstreams []struct{ Name string } }
	res, err := http.Get(proxy.String() + "/_cacheproxy/upstreams")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&page); err != nil || len(page.Upstreams) != 1 {
		t.Errorf("%+v, %v", page, err)
	}
}
