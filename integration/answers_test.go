package integration

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/forms"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/keypair"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	costly = "gen-llama-costly"
	cached = "--cache-answers=deterministic"
)

// coldChat is a chat whose answer is determined.
func coldChat(model, text string, tokens int, more string) string {
	return fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":%q}],`+
		`"options":{"temperature":0,"num_predict":%d}%s}`, model, text, tokens, more)
}

// coldV1Chat is the same for /v1/chat/completions and /v1/messages.
func coldV1Chat(model, text string, tokens int, more string) string {
	return fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":%q}],`+
		`"temperature":0,"max_tokens":%d%s}`, model, text, tokens, more)
}

// TestAnswers: kept answers of real servers.
func TestAnswers(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // they mostly wait until answers are kept
			server := realollama.Start(t, realollama.Config{
				Version: version, Models: []string{tiny, tiny + "-b", costly},
			})
			for _, c := range []struct {
				name string
				test func(*testing.T, *realollama.Server)
			}{
				{"same", answersSame}, {"forms", answersForms}, {"together", answersTogether},
				{"changed", answersChanged}, {"apart", answersApart}, {"survive", answersSurvive},
				{"drain", answersDrain}, {"heartbeat", answersHeartbeat}, {"old", answersOld},
				{"http2", answersHTTP2}, {"half-close", answersHalfClose}, {"broken", answersBroken},
			} {
				t.Run(c.name, func(t *testing.T) { c.test(t, server) })
			}
		})
	}
}

// answersSame: a kept answer is the one that was computed, to the byte, in all dialects.
func answersSame(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	for _, stream := range []string{`,"stream":true`, `,"stream":false`} {
		text, usage := "one piece", "" // each form with its own, as one may answer another
		if strings.Contains(stream, "true") {
			text, usage = "stream", `,"stream_options":{"include_usage":true}`
		}
		for _, c := range []struct{ path, body string }{
			{"/api/chat", coldChat(tiny, text, 20, stream)},
			{"/api/chat", coldChat(tiny, text, 20, `,"logprobs":true,"top_logprobs":2`+stream)},
			{"/api/generate", `{"model":"` + tiny + `","prompt":"` + text + `","options":{"temperature":0,"num_predict":20}` + stream + `}`},
			{"/v1/chat/completions", coldV1Chat(tiny, text, 20, stream)},
			{"/v1/chat/completions", coldV1Chat(tiny, text+" with usage", 20, stream+usage)},
			{"/v1/completions", `{"model":"` + tiny + `","prompt":"` + text + `","temperature":0,"max_tokens":20` + stream + `}`},
			{"/v1/responses", `{"model":"` + tiny + `","input":"` + text + `","temperature":0,"max_output_tokens":20` + stream + `}`},
			{"/v1/messages", coldV1Chat(tiny, text, 20, stream)},
		} {
			first := asks(t, p.URL+c.path, c.body)
			if n := len(f.computed()); n != 1 || first.hit() {
				t.Errorf("%s %s was computed %d times: %v", c.path, c.body, n, first.header)
			}
			hits := []reply{kept(t, p.URL+c.path, c.body), asks(t, p.URL+c.path, c.body)}
			for _, second := range hits {
				if !second.hit() || second.header.Get("Age") == "" {
					t.Errorf("%s %s, kept: %v", c.path, c.body, second.header)
				}
				if err := first.same(second); err != nil {
					t.Errorf("%s %s, computed and kept: %v", c.path, c.body, err)
				}
			}
			if more := f.computed(); len(more) > 0 {
				t.Errorf("%s %s was computed again: %q", c.path, c.body, more)
			}
		}
	}
}

// answersForms: what was kept of a stream answers one who wants it whole, and the reverse, as if it
// had been computed.
func answersForms(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	generate := func(text, stream string) string {
		return `{"model":"` + tiny + `","prompt":"` + text + `","options":{"temperature":0,"num_predict":20}` + stream + `}`
	}
	chat := func(text, stream string) string { return coldChat(tiny, text, 20, stream) }
	v1 := func(text, stream string) string { return coldV1Chat(tiny, text, 20, stream) }
	for _, c := range []struct {
		path   string
		body   func(text, stream string) string
		native bool
	}{
		{"/api/chat", chat, true}, {"/api/generate", generate, true},
		{"/v1/messages", v1, true},
	} {
		for text, ask := range map[string][2]string{
			"stream first": {`,"stream":true`, `,"stream":false`},
			"whole first":  {`,"stream":false`, `,"stream":true`},
		} {
			asks(t, p.URL+c.path, c.body(text, ask[0]), "Cache-Control", "no-store") // see formCase
			asks(t, p.URL+c.path, c.body(text, ask[0]))
			kept(t, p.URL+c.path, c.body(text, ask[0]))
			f.computed()
			got := asks(t, p.URL+c.path, c.body(text, ask[1]))
			if got.hit() != c.native || len(f.computed()) > 0 == c.native {
				t.Errorf("%s, %s: %v", c.path, text, got.header)
			}
			want := asks(t, f.URL+c.path, c.body(text, ask[1]))
			if got.status != want.status || said(c.path, got) != said(c.path, want) {
				t.Errorf("%s, %s: %d\n%s\nwant %d\n%s", c.path, text, got.status, said(c.path, got), want.status, said(c.path, want))
			}
			for _, name := range []string{"Content-Type", "Cache-Control"} {
				if a, b := got.header.Get(name), want.header.Get(name); a != b {
					t.Errorf("%s, %s: %s %q, want %q", c.path, text, name, a, b)
				}
			}
			if (got.length >= 0) != (want.length >= 0) {
				t.Errorf("%s, %s: length %d, want %d", c.path, text, got.length, want.length)
			}
		}
	}
}

// said returns an answer without its times, and a native stream put together: what is made from an
// answer in one piece has all of the text in one line.
func said(path string, r reply) string {
	if whole, ok := forms.Whole(path, []byte(r.body), false); ok && strings.Count(r.body, "\n") > 1 {
		return masked(string(whole))
	}
	return masked(r.body)
}

// answersTogether: fifty clients ask the same at once. It is computed once. Some leave in the middle,
// and one reads nothing until all others have their answers.
func answersTogether(t *testing.T, server *realollama.Server) {
	const clients, leave = 50, 9
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	for name, body := range map[string]string{
		"/api/chat":            coldChat(tiny, "TOGETHER", 200, ""),
		"/v1/chat/completions": coldV1Chat(tiny, "TOGETHER", 200, `,"stream":true`),
	} {
		asks(t, p.URL+name, strings.Replace(body, "TOGETHER", "load", 1))
		f.computed()
		hold := f.hold("TOGETHER")
		replies := make([]reply, clients)
		firsts := make([]time.Time, clients)
		var all, first sync.WaitGroup
		first.Add(clients)
		others := make(chan struct{})
		for i := range clients {
			all.Go(func() {
				client := plainClient(t)
				res, err := open(t.Context(), client, http.MethodPost, p.URL+name, body)
				if err != nil {
					t.Error(err)
					first.Done()
					return
				}
				defer res.Body.Close()
				begin := make([]byte, 8)
				_, err = io.ReadFull(res.Body, begin)
				firsts[i] = time.Now()
				first.Done()
				if err != nil || i < leave {
					return // it leaves
				}
				if i == clients-1 {
					<-others
				}
				rest, err := io.ReadAll(res.Body)
				replies[i] = reply{res.StatusCode, res.Header, 0, nil, string(begin) + string(rest), err}
			})
		}
		eventually(t, "all of them joined", func() bool {
			return p.Metric(t, "ollama_cacheproxy_in_flight") >= clients+1 // and this request
		})
		close(hold.before)
		first.Wait()
		spread := slices.MaxFunc(firsts, time.Time.Compare).Sub(slices.MinFunc(firsts, time.Time.Compare))
		close(hold.after)
		close(others) // at the end: see below
		all.Wait()
		if asked := f.computed(); len(asked) != 1 {
			t.Errorf("%s: %d computations: %q", name, len(asked), asked)
		}
		for i, r := range replies[leave:] {
			if r.err != nil || r.status != http.StatusOK || r.body != replies[leave].body || len(r.body) < 1000 {
				t.Errorf("%s: client %d: %v %d, %d bytes, another has %d", name, i+leave, r.err, r.status,
					len(r.body), len(replies[leave].body))
			}
		}
		if again := kept(t, p.URL+name, body); again.body != replies[leave].body {
			t.Errorf("%s: another answer was kept than all have got", name)
		}
		t.Logf("%s: the first bytes of %d clients came within %v of each other", name, clients, spread)
	}
}

// answersChanged: what a name stands for changes, past the proxy and through it.
func answersChanged(t *testing.T, server *realollama.Server) {
	const name = "swap"
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	body := coldChat(name, "changed", 20, `,"stream":false`)
	point := func(base, to string) { mustPost(t, base+"/api/copy", `{"source":"`+to+`","destination":"`+name+`"}`) }
	text := func(body string) string { return masked(strings.ReplaceAll(body, "_count", "_duration")) }
	says := map[string]string{}
	for _, model := range []string{tiny, tiny + "-b"} {
		point(server.URL(), model)
		says[model] = text(asks(t, server.URL()+"/api/chat", body).body)
	}
	if says[tiny] == says[tiny+"-b"] {
		t.Fatalf("both models answer %s", says[tiny])
	}
	point(server.URL(), tiny)
	settles(t, func() error { // the proxy learns that there is such a model
		asks(t, p.URL+"/api/chat", body)
		if r := request(t.Context(), plainClient(t), http.MethodPost, p.URL+"/api/chat", body, "Cache-Control", "only-if-cached"); !r.hit() {
			return fmt.Errorf("not kept: %v", r.header)
		}
		return nil
	})
	if got := text(kept(t, p.URL+"/api/chat", body).body); got != says[tiny] {
		t.Fatalf("%s, want %s", got, says[tiny])
	}

	// Past the proxy: as soon as it has listed the models again, the old answer is gone.
	_, before := f.count()
	point(server.URL(), tiny+"-b")
	settles(t, func() error {
		_, lists := f.count()
		got := asks(t, p.URL+"/api/chat", body)
		switch text(got.body) {
		case says[tiny+"-b"]:
			return nil
		case says[tiny]:
			// One of them may have been under way, and the last one may not have been read to its
			// end. They follow each other.
			if lists > before+2 {
				t.Fatalf("the old answer, after %d lists of models", lists-before)
			}
			return errors.New("still the old answer")
		}
		t.Fatalf("neither model's: %s", got.body)
		return nil
	})
	kept(t, p.URL+"/api/chat", body)

	// Through the proxy: at once.
	for i, base := range []string{tiny, tiny + "-b", tiny} {
		point(p.URL, base)
		got := asks(t, p.URL+"/api/chat", body)
		if text(got.body) != says[base] {
			t.Errorf("change %d: %s, want %s", i, got.body, says[base])
		}
		again := asks(t, p.URL+"/api/chat", body)
		if text(again.body) != says[base] {
			t.Errorf("change %d, again: %s, want %s", i, again.body, says[base])
		}
	}
	kept(t, p.URL+"/api/chat", body)
	mustPost(t, p.URL+"/api/create", `{"model":"`+name+`","from":"`+tiny+`","system":"Be brief.","stream":false}`)
	if got := asks(t, p.URL+"/api/chat", body); got.hit() || text(got.body) == says[tiny] {
		t.Errorf("created anew: %v %s", got.header, got.body)
	}
	kept(t, p.URL+"/api/chat", body)
	if status, _, text := do(t, http.MethodDelete, p.URL+"/api/delete", `{"model":"`+name+`"}`); status != http.StatusOK {
		t.Fatal(text)
	}
	if got := request(t.Context(), plainClient(t), http.MethodPost, p.URL+"/api/chat", body); got.status != http.StatusNotFound {
		t.Errorf("deleted: %d %v %s", got.status, got.header, got.body)
	}
}

// answersApart: nothing crosses keys, models and options.
func answersApart(t *testing.T, server *realollama.Server) {
	keys := filepath.Join(t.TempDir(), "keys.txt")
	if err := os.WriteFile(keys, []byte("a ka\nb kb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const auth, a, b = "Authorization", "Bearer ka", "Bearer kb"
	body := coldChat(tiny, "apart", 20, `,"stream":false`)
	for _, shared := range []bool{false, true} {
		f := newFront(t, server)
		p := startProxy(t, f.URL, cached, "--api-keys-file", keys, fmt.Sprintf("--answers-shared=%v", shared))
		url := p.URL + "/api/chat"
		asks(t, url, body, auth, a)
		mine := kept(t, url, body, auth, a)
		if shared {
			if err := kept(t, url, body, auth, b).same(mine); err != nil {
				t.Errorf("shared: %v", err)
			}
		} else {
			unkept(t, url, body, auth, b)
			x := asks(t, url, body, auth, b)
			if y := kept(t, url, body, auth, b); x.body != y.body || x.body == mine.body {
				t.Errorf("%s\n%s\n%s", mine.body, x.body, y.body) // times differ
			}
		}
		for _, other := range []string{
			coldChat(tiny+"-b", "apart", 20, `,"stream":false`),
			coldChat(tiny+":latest", "apart", 20, `,"stream":false`),
			coldChat(tiny, "apart", 21, `,"stream":false`),
			coldChat(tiny, "apart ", 20, `,"stream":false`),
			coldChat(tiny, "apart", 20, `,"stream":false,"format":"json"`),
			strings.Replace(body, `"temperature":0`, `"temperature":0,"top_k":1`, 1),
			strings.Replace(body, `"temperature":0`, `"temperature":0,"seed":1`, 1),
			strings.Replace(body, `"user"`, `"system"`, 1),
		} {
			unkept(t, url, other, auth, a)
		}
		unkept(t, p.URL+"/v1/chat/completions", coldV1Chat(tiny, "apart", 20, ""), auth, a)
		if r := request(t.Context(), plainClient(t), http.MethodPost, url, body); r.status != http.StatusUnauthorized {
			t.Errorf("without a key: %d", r.status)
		}
		if r := request(t.Context(), plainClient(t), http.MethodPost, url, body, auth, "Bearer kc"); r.status != http.StatusUnauthorized {
			t.Errorf("with a wrong key: %d", r.status)
		}
	}
}

// answersSurvive: a client is lost in the middle of its stream, and fetches the rest.
func answersSurvive(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL) // with the cache off, too
	for path, body := range map[string]string{
		"/api/chat":            coldChat(tiny, "SURVIVE", 100, ""),
		"/v1/chat/completions": coldV1Chat(tiny, "SURVIVE", 100, `,"stream":true`),
	} {
		hold := f.hold("SURVIVE")
		close(hold.before)
		ctx, leave := context.WithCancel(t.Context())
		res, err := open(ctx, plainClient(t), http.MethodPost, p.URL+path, body, "X-Cacheproxy-Survive", "true")
		if err != nil {
			t.Fatal(err)
		}
		begin := make([]byte, 20)
		if _, err := io.ReadFull(res.Body, begin); err != nil {
			t.Fatal(err)
		}
		leave()
		res.Body.Close()
		close(hold.after)
		url := p.URL + "/_cacheproxy/answers/" + res.Header.Get("X-Cacheproxy-Answer")
		whole := request(t.Context(), plainClient(t), http.MethodGet, url, "")
		if whole.status != http.StatusOK || whole.err != nil || !strings.HasPrefix(whole.body, string(begin)) {
			t.Fatalf("%s, fetched: %d %q %v, began with %q", path, whole.status, whole.body, whole.err, begin)
		}
		want := f.last()
		if whole.body != want.body {
			t.Errorf("%s, fetched\n%s\nwant\n%s", path, whole.body, want.body)
		}
		if a, b := whole.header.Get("Content-Type"), want.header.Get("Content-Type"); a != b {
			t.Errorf("%s: Content-Type %q, want %q", path, a, b)
		}
		end := "\n"
		if strings.HasPrefix(path, "/v1") {
			end = "\n\n"
		}
		lines := strings.SplitAfter(whole.body, end)
		for _, from := range []int{0, 1, 7, len(lines) - 2, len(lines) - 1, len(lines) + 5} {
			rest := request(t.Context(), plainClient(t), http.MethodGet, fmt.Sprintf("%s?from=%d", url, from), "")
			if want := strings.Join(lines[min(from, len(lines)):], ""); rest.status != http.StatusOK || rest.body != want {
				t.Errorf("%s, from line %d: %d %q, want %q", path, from, rest.status, rest.body, want)
			}
		}
	}
}

// answersDrain: an answer that survives its client is computed to its end when the proxy is told to
// stop.
func answersDrain(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	hold := f.hold("DRAIN")
	close(hold.before)
	ctx, leave := context.WithCancel(t.Context())
	res, err := open(ctx, plainClient(t), http.MethodPost, p.URL+"/api/chat", coldChat(tiny, "DRAIN", 50, ""), "X-Cacheproxy-Survive", "true")
	if err != nil {
		t.Fatal(err)
	}
	leave()
	res.Body.Close()
	stopped := make(chan error, 1)
	go func() { stopped <- p.Stop() }() // ends with the proxy
	eventually(t, "no longer listening", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	before, _ := f.count()
	select {
	case err := <-stopped:
		t.Fatalf("the proxy has ended before the answer: %v", err)
	default:
	}
	close(hold.after)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if whole, _ := f.count(); whole != before+1 {
		t.Errorf("%d answers were computed to their end, want 1", whole-before)
	}
}

// answersHeartbeat: those who wait together get the comments; what is kept has none.
func answersHeartbeat(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached, "--heartbeat", "1s", "--slots", "1")
	body := coldV1Chat(tiny, "HEART", 20, `,"stream":true`)
	asks(t, p.URL+"/v1/chat/completions", coldV1Chat(tiny, "load", 1, ""))
	hold := f.hold("OTHER") // its lane is what the others wait for
	close(hold.after)
	var all, beat sync.WaitGroup
	all.Go(func() {
		request(t.Context(), plainClient(t), http.MethodPost, p.URL+"/api/chat", coldChat(tiny, "OTHER", 1, ""))
	})
	eventually(t, "computing", func() bool { _, busy, _ := queued(p.URL); return busy == 1 })
	const comment = ": waiting\n\n"
	replies := make([]reply, 3)
	for i := range replies {
		beat.Add(1)
		all.Go(func() {
			res, err := open(t.Context(), plainClient(t), http.MethodPost, p.URL+"/v1/chat/completions", body)
			if err != nil {
				t.Error(err)
				beat.Done()
				return
			}
			defer res.Body.Close()
			r := bufio.NewReader(res.Body)
			begin := make([]byte, len(comment))
			_, err = io.ReadFull(r, begin)
			if string(begin) != comment || err != nil {
				t.Errorf("client %d begins with %q, %v", i, begin, err)
			}
			beat.Done()
			rest, err := io.ReadAll(r)
			replies[i] = reply{res.StatusCode, res.Header, 0, nil, string(begin) + string(rest), err}
		})
		if i == 0 {
			beat.Wait() // the others join an answer that has begun
		}
	}
	beat.Wait()
	close(hold.before)
	all.Wait()
	hit := kept(t, p.URL+"/v1/chat/completions", body)
	if strings.Contains(hit.body, comment) {
		t.Errorf("the kept answer has comments: %q", hit.body)
	}
	for i, r := range replies {
		if got := strings.ReplaceAll(r.body, comment, ""); r.err != nil || got != hit.body {
			t.Errorf("client %d: %v %q, kept %q", i, r.err, got, hit.body)
		}
	}
	computed := 0
	for _, asked := range f.computed() {
		if strings.Contains(asked, "HEART") {
			computed++
		}
	}
	if computed != 1 {
		t.Errorf("%d computations", computed)
	}
}

// raw sends a request as it is, and returns all that comes back.
func raw(t testing.TB, base, request string, shut bool) (string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	if shut {
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	text, err := io.ReadAll(conn)
	return string(text), err
}

// answersOld: clients that speak HTTP/1.0 get the same answer, which ends with the connection.
func answersOld(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	plain, p := startProxy(t, f.URL), startProxy(t, f.URL, cached)
	for _, more := range []string{"", `,"stream":false`} {
		body := coldChat(tiny, "old", 20, more)
		request := strings.Replace(rawPost("/api/chat", body), "HTTP/1.1", "HTTP/1.0", 1)
		bodies := map[string]bool{}
		heads := []string{}
		for _, base := range []string{plain.URL, p.URL, p.URL} {
			text, err := raw(t, base, request, false)
			head, answer, _ := strings.Cut(text, "\r\n\r\n")
			if err != nil || !strings.HasPrefix(head, "HTTP/1.0 200 OK\r\n") {
				t.Fatalf("%v: %s", err, text)
			}
			if base == p.URL {
				bodies[answer] = true
				kept(t, p.URL+"/api/chat", body)
			}
			var lines []string
			for line := range strings.Lines(head + "\r\n") {
				if name, _, _ := strings.Cut(line, ":"); !slices.Contains([]string{"Date", "Cache-Status", "Age", "Server-Timing", "Content-Length"}, name) && !strings.HasPrefix(name, "X-Cacheproxy") {
					lines = append(lines, line)
				}
			}
			slices.Sort(lines)
			heads = append(heads, strings.Join(lines, ""))
		}
		if len(bodies) != 1 {
			t.Errorf("%d different answers: %v", len(bodies), bodies)
		}
		if heads[0] != heads[1] || heads[1] != heads[2] {
			t.Errorf("headers without the cache, computed and kept:\n%s", strings.Join(heads, "\n"))
		}
	}
}

// answersHTTP2: over HTTP/2 a client may leave in the middle, while another of the same connection
// goes on.
func answersHTTP2(t *testing.T, server *realollama.Server) {
	issuer := httptest.NewTLSServer(nil) // for its certificate, which is for 127.0.0.1
	defer issuer.Close()
	cert, key := keypair.Write(t, issuer.TLS.Certificates[0], t.TempDir())
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached, "--tls-cert", cert, "--tls-key", key)
	pool := x509.NewCertPool()
	pool.AddCert(issuer.Certificate())
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true, DisableCompression: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for _, leads := range []bool{true, false} {
		word := fmt.Sprintf("TWO%v", leads)
		body := coldChat(tiny, word, 100, "")
		hold := f.hold(word)
		close(hold.before)
		first, leave := context.WithCancel(t.Context())
		a, err := open(first, client, http.MethodPost, p.URL+"/api/chat", body)
		if err != nil {
			t.Fatal(err)
		}
		if a.ProtoMajor != 2 {
			t.Fatalf("%s", a.Proto)
		}
		second, leaveToo := context.WithCancel(t.Context())
		b, err := open(second, client, http.MethodPost, p.URL+"/api/chat", body)
		if err != nil {
			t.Fatal(err)
		}
		if status := b.Header.Get("Cache-Status"); !strings.Contains(status, "collapsed") {
			t.Errorf("the second one: %q", status)
		}
		stays := b
		if leads { // the one whose request is computed
			leave()
		} else {
			leaveToo()
			stays = a
		}
		close(hold.after)
		text, err := io.ReadAll(stays.Body)
		hit := request(t.Context(), client, http.MethodPost, p.URL+"/api/chat", body)
		if err != nil || hit.body != string(text) || !strings.Contains(hit.body, `"done":true`) {
			t.Errorf("%v: %q, then %q", err, text, hit.body)
		}
		leave()
		leaveToo()
		a.Body.Close()
		b.Body.Close()
		if n := len(f.computed()); n != 1 {
			t.Errorf("%d computations", n)
		}

		// All leave: the computation ends.
		hold = f.hold(word + "alone")
		close(hold.before)
		ctx, leave := context.WithCancel(t.Context())
		c, err := open(ctx, client, http.MethodPost, p.URL+"/api/chat", coldChat(tiny, word+"alone", 100, ""))
		if err != nil {
			t.Fatal(err)
		}
		leave()
		c.Body.Close()
		f.computed()
	}
	scrape := func() (string, error) {
		r := request(t.Context(), client, http.MethodGet, p.URL+"/metrics", "")
		return r.body, r.err
	}
	settles(t, func() error {
		text, err := scrape()
		if err == nil && !strings.Contains(text, "\nollama_cacheproxy_in_flight 1\n") { // this one
			err = errors.New("requests are still in flight")
		}
		return err
	})
	if log := p.Log(); strings.Contains(log, "a fault in this program") {
		t.Errorf("a fault:\n%s", log)
	}
}

// answersHalfClose: who shuts its sending side has left, as without the cache: what is kept may
// reach it, and nothing is computed for it.
func answersHalfClose(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	asks(t, p.URL+"/api/chat", coldChat(tiny, "half", 20, ""))
	whole := kept(t, p.URL+"/api/chat", coldChat(tiny, "half", 20, ""))
	f.hold("HALF")
	for range 5 {
		text, err := raw(t, p.URL, rawPost("/api/chat", coldChat(tiny, "HALF", 20, "")), true)
		if strings.HasPrefix(text, "HTTP/1.1 200") {
			t.Errorf("it was computed: %q %v", text, err)
		}
	}
	eventually(t, "ended", func() bool { return p.Metric(t, "ollama_cacheproxy_in_flight") <= 1 })
	answered := 0
	for range 10 {
		text, err := raw(t, p.URL, rawPost("/api/chat", coldChat(tiny, "half", 20, ""), "Connection: close"), true)
		if text == "" {
			continue
		}
		if answered++; err != nil || !strings.Contains(text, `"done":true`) {
			t.Errorf("half of an answer: %q %v", text, err)
		}
	}
	if again := kept(t, p.URL+"/api/chat", coldChat(tiny, "half", 20, "")); again.body != whole.body {
		t.Errorf("%q, then %q", whole.body, again.body)
	}
	t.Logf("%d of 10 got the kept answer", answered)
}

// killRunners ends the processes that have a server's models loaded, and returns how many.
func killRunners(t testing.TB, server *realollama.Server) (n int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), server.ModelsDir()) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(file, "/proc/%d/cmdline", &pid); err != nil {
			t.Fatal(err)
		}
		process, err := os.FindProcess(pid)
		if err == nil && process.Kill() == nil {
			n++
		}
	}
	return n
}

// answersBroken: the engine dies in the middle of an answer. All who read it see that it is not
// whole, and it is not kept.
func answersBroken(t *testing.T, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	for path, body := range map[string]string{
		"/api/chat":            coldChat(costly, "broken", 1500, ""),
		"/v1/chat/completions": coldV1Chat(costly, "broken", 1500, `,"stream":true`),
	} {
		const clients = 4
		replies := make([]reply, clients)
		var all, begun sync.WaitGroup
		begun.Add(clients)
		for i := range replies {
			all.Go(func() {
				res, err := open(t.Context(), plainClient(t), http.MethodPost, p.URL+path, body)
				if err != nil {
					t.Error(err)
					begun.Done()
					return
				}
				defer res.Body.Close()
				begin := make([]byte, 40)
				io.ReadFull(res.Body, begin)
				begun.Done()
				rest, err := io.ReadAll(res.Body)
				replies[i] = reply{res.StatusCode, res.Header, 0, nil, string(begin) + string(rest), err}
			})
		}
		begun.Wait()
		if n := killRunners(t, server); n == 0 {
			t.Fatal("no engine was found")
		}
		all.Wait()
		for i, r := range replies {
			if strings.Contains(r.body, `"done":true`) || strings.Contains(r.body, "[DONE]") {
				t.Errorf("%s: client %d has a whole answer of %d bytes", path, i, len(r.body))
			}
			if r.body != replies[0].body || (r.err == nil) != (replies[0].err == nil) {
				t.Errorf("%s: client %d: %d bytes, %v; another: %d bytes, %v", path, i, len(r.body), r.err, len(replies[0].body), replies[0].err)
			}
		}
		if n := len(f.computed()); n != 1 {
			t.Errorf("%s: %d computations", path, n)
		}
		unkept(t, p.URL+path, body)
		t.Logf("%s: %d bytes, then %v: …%s", path, len(replies[0].body), replies[0].err, replies[0].body[max(0, len(replies[0].body)-200):])
	}
	asks(t, p.URL+"/api/chat", coldChat(tiny, "after it", 20, ""))
	kept(t, p.URL+"/api/chat", coldChat(tiny, "after it", 20, ""))
}

// TestAnswersClients: the clients that people use get the same answers a second time, and nothing is
// evaluated for it.
func TestAnswersClients(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // as in TestAnswers
			server := realollama.Start(t, realollama.Config{
				Version: version, Models: []string{"smollm2", tiny, "gen-llama-embed"}, MaxLoaded: 4,
			})
			for _, c := range clients() {
				t.Run(c.name, func(t *testing.T) { askTwice(t, c, server) })
			}
		})
	}
}

func askTwice(t *testing.T, c client, server *realollama.Server) {
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached)
	for _, model := range []string{"smollm2", tiny} { // until the proxy knows the models
		asks(t, p.URL+"/api/chat", coldChat(model, c.name, 1, ""))
		settles(t, func() error {
			asks(t, p.URL+"/api/chat", coldChat(model, c.name, 1, ""))
			r := request(t.Context(), plainClient(t), http.MethodPost, p.URL+"/api/chat", coldChat(model, c.name, 1, ""), "Cache-Control", "only-if-cached")
			if !r.hit() {
				return fmt.Errorf("not kept: %v", r.header)
			}
			return nil
		})
	}
	f.computed()
	first := c.run(t, target{p.URL, server})
	ran := len(f.answers())
	f.computed()
	second := c.run(t, target{p.URL, server})
	again := f.answers()
	first, second = roundTrip(t, first), roundTrip(t, second)
	for _, results := range []map[string]any{first, second} {
		if async, ok := results["async"].(map[string]any); ok {
			delete(async, "ps") // a kept answer loads no model
		}
	}
	for _, name := range slices.Sorted(maps.Keys(first)) {
		if !reflect.DeepEqual(first[name], second[name]) {
			t.Errorf("%s differs\n  first: %s\n  then:  %s", name, short(first[name]), short(second[name]))
		}
	}
	if len(first) != len(second) || len(first) < 5 {
		t.Errorf("%d results, then %d", len(first), len(second))
	}
	for _, asked := range again {
		// A model that the client has made, and removed before its answer could be kept.
		made := strings.Contains(asked, "-made") || strings.Contains(asked, "command-")
		determined := strings.Contains(asked, `"temperature"`) && !strings.Contains(asked, "_debug_render_only")
		if !made && determined {
			t.Errorf("computed again: %s", asked)
		}
	}
	t.Logf("%d results; %d chats and generations were computed, the second time %d: %.300q", len(first), ran, len(again), again)
}
