package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/keypair"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// startFleet starts a proxy with each list of flags, which begins with the address of an upstream,
// and waits until they know each other. Without flags about secrets they share one.
func startFleet(t *testing.T, lists [][]string) (proxies []*proxyProcess) {
	t.Helper()
	proxies = startPeers(t, lists)
	for _, p := range proxies {
		if _, err := proxyprocess.Joined(t.Context(), p.URL, len(lists)-1); err != nil {
			t.Fatal(err)
		}
	}
	return proxies
}

func startPeers(t *testing.T, lists [][]string) (proxies []*proxyProcess) {
	t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of-all-proxies-of-this-fleet\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var addresses, peers []string
	for range lists {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() // all are different, and free when the proxies start
		addresses = append(addresses, ln.Addr().String())
		peers = append(peers, "--peers", ln.Addr().String())
		ln.Close()
	}
	for i, list := range lists {
		flags := slices.Concat([]string{"--log-level", "debug", "--peer-listen", addresses[i]}, peers, list[2:])
		if !slices.Contains(list, "--peer-secret-file") && !slices.Contains(list, "--peer-cert") {
			flags = append(flags, "--peer-secret-file", secret)
		}
		p, err := proxyprocess.Start(t.Context(), bin, list[1], flags...)
		if err != nil {
			t.Fatal(err)
		}
		over := watched(t, p)
		t.Cleanup(func() {
			lines := over(40)
			p.Kill() // does nothing if it has ended
			if t.Failed() {
				t.Logf("the log of proxy %d:\n%s", i, tail(p.Log(), lines))
			}
		})
		proxies = append(proxies, &proxyProcess{p})
	}
	return proxies
}

// TestFleet: several proxies are to clients of real Ollama servers like one: in both shapes answers
// are Ollama's own, and a conversation whose turns enter at different proxies stays warm.
func TestFleet(t *testing.T) {
	servers := map[string]*realollama.Server{}
	for _, name := range []string{"a", "b"} {
		servers[name] = realollama.Start(t, realollama.Config{
			Version: realollama.EraC, Models: []string{tiny}, Parallel: 4,
			CacheRAMMiB: new(int), // only the slot holds a prompt
		})
	}
	at := func(name string) string { return name + "=" + servers[name].URL() }
	both := []string{"--upstream", at("a"), "--upstream", at("b")}

	// converse holds four conversations of six turns, and returns what Ollama evaluated.
	converse := func(t *testing.T, seed uint64, proxies ...*proxyProcess) (answers []string, evaluated int) {
		marks := map[string]realollama.Mark{}
		for name, s := range servers {
			marks[name] = s.Mark()
		}
		type message = map[string]string
		talks := make([][]message, 4)
		for i := range talks {
			talks[i] = []message{{"role": "system", "content": words(seed+uint64(i), 150)}}
		}
		sent := map[string]int{}
		for turn := range 6 {
			for i := range talks {
				talks[i] = append(talks[i], message{"role": "user", "content": words(seed+uint64(100*turn+i), 20)})
				body, err := json.Marshal(map[string]any{
					"model": tiny, "stream": false, "messages": talks[i],
					"options": map[string]any{"temperature": 0, "num_predict": 8},
				})
				if err != nil {
					t.Fatal(err)
				}
				p := proxies[(turn+i)%len(proxies)]
				res, err := http.Post(p.URL+"/api/chat", "application/json", strings.NewReader(string(body)))
				if err != nil {
					t.Fatal(err)
				}
				var answer struct{ Message struct{ Content string } }
				err = json.NewDecoder(res.Body).Decode(&answer)
				if res.Body.Close(); err != nil || res.StatusCode != 200 {
					t.Fatal(res.Status, err)
				}
				sent[res.Header.Get("X-Cacheproxy-Upstream")]++
				talks[i] = append(talks[i], message{"role": "assistant", "content": answer.Message.Content})
				answers = append(answers, answer.Message.Content)
			}
		}
		for name, n := range sent {
			if servers[name] == nil {
				t.Fatalf("answered by %v", sent)
			}
			_, sum := evaluations(t, servers[name], marks[name], n)
			evaluated += sum
		}
		return answers, evaluated
	}
	restart := func() { // both have nothing loaded
		for _, s := range servers {
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	one := startProxy(t, at("a"), "--upstream", at("b"))
	want, least := converse(t, 1, one)

	// alike compares what a client sees through each proxy with what Ollama says.
	alike := func(t *testing.T, proxies []*proxyProcess) {
		for _, c := range [][3]string{
			{"POST", "/api/generate", `{"model":"` + tiny + `","prompt":"one two","stream":false,"options":{"temperature":0,"num_predict":8}}`},
			{"POST", "/api/generate", `{"model":"` + tiny + `","prompt":"one two","options":{"temperature":0,"num_predict":8}}`},
			{"POST", "/v1/chat/completions", `{"model":"` + tiny + `","temperature":0,"max_tokens":8,"messages":[{"role":"user","content":"one"}]}`},
			{"POST", "/v1/chat/completions", `{"model":"` + tiny + `","temperature":0,"max_tokens":8,"stream":true,"messages":[{"role":"user","content":"one"}]}`},
			{"POST", "/api/show", `{"model":"` + tiny + `"}`},
			{"POST", "/api/chat", `{"model":"nowhere","messages":[{"role":"user","content":"one"}]}`},
			{"POST", "/api/chat", `{"model":"` + tiny + `","messages":"none"}`},
			{"GET", "/v1/models/" + tiny, ""},
			{"GET", "/api/version", ""},
		} {
			status, kind, text := do(t, c[0], servers["a"].URL()+c[1], c[2])
			for i, p := range proxies {
				if s, k, got := do(t, c[0], p.URL+c[1], c[2]); s != status || k != kind || timeless(got) != timeless(text) {
					t.Errorf("%s %s through proxy %d: %d %s %s\nOllama: %d %s %s", c[0], c[1], i, s, k, got, status, kind, text)
				}
			}
		}
	}
	for name, lists := range map[string][][]string{
		"edge":    {both, both},
		"sidecar": {{"--upstream", at("a"), "--own", "a"}, {"--upstream", at("b"), "--own", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			restart()
			proxies := startFleet(t, lists)
			got, evaluated := converse(t, 1, proxies...)
			if !slices.Equal(got, want) {
				t.Errorf("the answers differ from those through one proxy: %q, %q", got, want)
			}
			t.Logf("evaluated tokens: %d, through one proxy %d", evaluated, least)
			if float64(evaluated) > 1.05*float64(least) {
				t.Errorf("evaluated %d tokens, through one proxy %d", evaluated, least)
			}
			sum := func(series string) (n float64) {
				for _, p := range proxies {
					n += p.Metric(t, "ollama_cacheproxy_"+series)
				}
				return n
			}
			settles(t, func() error { // an owner may count a request after its client has the answer
				if n := sum(`requests_total{endpoint="/api/chat"`); n != 24 {
					return fmt.Errorf("%v requests are counted, 24 were sent", n)
				}
				if n := sum(`prompt_tokens_total{kind="evaluated"`); int(n) != evaluated {
					return fmt.Errorf("%v evaluated tokens are counted, want %d", n, evaluated)
				}
				return nil
			})
			if n := sum(`upstream_requests_total{`); n < 24 {
				t.Errorf("%v requests were sent to Ollama", n)
			}
			alike(t, proxies)
			drained(t, proxies, servers["b"])
			for i, p := range proxies {
				if err := p.Stop(); err != nil {
					t.Errorf("proxy %d: %v", i, err)
				}
			}
		})
	}
}

// drained drains server b at one of the proxies and resumes it at another one, and fails t unless all
// obey. Only one of the proxies need have it.
func drained(t *testing.T, proxies []*proxyProcess, b *realollama.Server) {
	t.Helper()
	say := func(p *proxyProcess, verb, want string) {
		t.Helper()
		status, _, text := do(t, "POST", p.URL+"/_cacheproxy/upstreams/b/"+verb, "")
		if status != 200 || !strings.Contains(text, want) || strings.Contains(text, "unheard") {
			t.Errorf("%s: %d %s", verb, status, text)
		}
	}
	answers := func(name string) {
		t.Helper()
		for i, p := range proxies {
			req, err := http.NewRequestWithContext(t.Context(), "POST", p.URL+"/api/generate",
				strings.NewReader(`{"model":"`+tiny+`","prompt":"drained `+fmt.Sprint(i)+`","stream":false}`))
			if err != nil {
				t.Fatal(err)
			}
			if name == "b" {
				req.Header.Set("X-Cacheproxy-Upstream", "b") // none prefers it after all this
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if got := res.Header.Get("X-Cacheproxy-Upstream"); res.StatusCode != 200 || got != name {
				t.Errorf("through proxy %d: %s from %q, want %q", i, res.Status, got, name)
			}
		}
	}
	say(proxies[0], "drain", `"draining":true`)
	mark := b.Mark()
	answers("a")
	if n, _ := evaluations(t, b, mark, 0); n != 0 {
		t.Errorf("the drained server evaluated %d prompts", n)
	}
	say(proxies[1], "resume", `"draining":false`)
	answers("b")
}

// timeless removes from an answer what differs each time: times, identifiers, what was reused, and
// where a server has its files.
func timeless(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		data, event := strings.CutPrefix(line, "data: ")
		var members map[string]any
		if json.Unmarshal([]byte(data), &members) != nil {
			lines = append(lines, line)
			continue
		}
		for name := range members {
			if strings.HasSuffix(name, "_duration") || strings.HasPrefix(name, "created") ||
				slices.Contains([]string{"id", "modified_at", "modelfile", "prompt_eval_cached_count"}, name) {
				delete(members, name)
			}
		}
		if text, ok := members["parameters"].(string); ok {
			members["parameters"] = anyOrder(text)
		}
		if usage, ok := members["usage"].(map[string]any); ok {
			delete(usage, "prompt_tokens_details")
		}
		again, err := json.Marshal(members)
		if err != nil {
			panic(err) // it was JSON
		}
		lines = append(lines, fmt.Sprint(event, string(again)))
	}
	return strings.Join(lines, "\n")
}

// TestFleetStrangers: proxies know each other by certificates, or by a secret. One that has another
// is refused, and both logs say what to do, as the verb doctor does.
func TestFleetStrangers(t *testing.T) {
	sim, err := ollamasim.New(ollamasim.Config{Parallel: 2, Models: []ollamasim.Model{{Name: "m", LoadTime: time.Millisecond}}})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(sim)
	t.Cleanup(front.Close)
	upstream := func(name string, flags ...string) []string {
		return append([]string{"--upstream", name + "=" + front.URL, "--own", name}, flags...)
	}
	ours, theirs := peerCertificates(t), peerCertificates(t)
	secret := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(secret, []byte("of-another-fleet-altogether\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	proxies := startFleet(t, [][]string{upstream("one", ours...), upstream("two", ours...)})
	res, err := http.Post(proxies[0].URL+"/api/chat", "application/json",
		strings.NewReader(`{"model":"m","stream":false,"messages":[{"role":"user","content":"one"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, proxies[0].URL+"/api/chat",
		strings.NewReader(`{"model":"m","stream":false,"messages":[{"role":"user","content":"one"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Cacheproxy-Upstream", "two")
	if res, err = http.DefaultClient.Do(req); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if f, err := proxyprocess.AskFleet(t.Context(), proxies[1].URL); res.StatusCode != 200 || err != nil || f.Counts.Received == 0 {
		t.Errorf("with certificates: %s, %+v, %v", res.Status, f, err)
	}

	for _, p := range proxies { // which know each other
		if r := examine(t, p); len(r.Findings) > 0 {
			t.Errorf("a healthy fleet: %+v", r.Findings)
		}
	}
	if err := proxies[1].Stop(); err != nil {
		t.Error(err)
	}
	settles(t, func() error {
		if text, _ := proxies[0].doctor(t); !strings.Contains(text, "nobody listens there") {
			return fmt.Errorf("one has stopped, and doctor says: %s", text)
		}
		return nil
	})
	found := finds(t, examine(t, proxies[0]), doctor.IDPeersAway, "--peer-listen :")
	if text := fmt.Sprint(found.Evidence); found.Severity != doctor.Low || !strings.Contains(text, "stopped, as it had said") ||
		!strings.Contains(text, "with two") || !strings.Contains(text, "connection refused") {
		t.Errorf("a proxy that has just been stopped: %+v", found)
	}

	for _, c := range []struct {
		name  string
		lists [][]string
		want  string // in both logs, and advised
	}{
		{"another secret", [][]string{upstream("one"), upstream("two", "--peer-secret-file", secret)}, "--peer-secret-file"},
		{"another authority", [][]string{upstream("one", ours...), upstream("two", theirs...)}, "--peer-ca"},
		{"no certificate", [][]string{upstream("one", ours...), upstream("two")}, "--peer-cert"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i, p := range startPeers(t, c.lists) {
				settles(t, func() error {
					for line := range strings.Lines(p.Log()) {
						if strings.Contains(line, "peer does not answer") && strings.Contains(line, c.want) {
							return nil
						}
					}
					return fmt.Errorf("proxy %d does not say %q: %s", i, c.want, p.Log())
				})
				if f, err := proxyprocess.AskFleet(t.Context(), p.URL); err != nil || len(f.Peers) != 1 || f.Peers[0].Up {
					t.Errorf("%+v, %v", f, err)
				}
				// At first it was not there; now it is, and does not accept this one.
				settles(t, func() error {
					if text, _ := p.doctor(t); !strings.Contains(text, c.want) {
						return fmt.Errorf("proxy %d: doctor says: %s", i, text)
					}
					return nil
				})
				if f := finds(t, examine(t, p), doctor.IDPeersAway, c.want); f.Severity != doctor.Medium {
					t.Errorf("it does not mend by itself: %+v", f)
				}
			}
		})
	}
}

// peerCertificates makes an authority, and a certificate of it for peers on this machine. It returns
// the flags that name them.
func peerCertificates(t *testing.T) (flags []string) {
	t.Helper()
	var parent *x509.Certificate
	var signer *ecdsa.PrivateKey
	for i, name := range []string{"ca", "cert"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: i == 0, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		if i == 0 {
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, private := keypair.Write(t, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, t.TempDir())
		if i == 0 {
			flags = append(flags, "--peer-ca", cert)
			continue
		}
		flags = append(flags, "--peer-cert", cert, "--peer-key", private)
	}
	return flags
}
