package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ollama-cacheproxy": main, "ollama": fakeOllama, "llama-server": fakeEngine})
}

// TestScripts runs the command line as users type it; testdata has a feature per file.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			up := httptest.NewServer(http.HandlerFunc(stubOllama))
			env.Defer(up.Close)
			env.Setenv("UPSTREAM", up.URL)
			self, err := os.Executable()
			if err != nil {
				return err
			}
			env.Setenv("TESTPROGRAM", self)
			// With the race detector each process would wait for a second at its end.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			free, err := freeAddr()
			if err != nil {
				return err
			}
			env.Setenv("LISTEN", free)
			closed, err := freeAddr()
			env.Setenv("NOBODY", closed)
			if err != nil {
				return err
			}
			other, err := freeAddr()
			env.Setenv("OTHER", other)
			if err != nil {
				return err
			}
			_, port, err := net.SplitHostPort(other)
			if err != nil {
				return err
			}
			env.Setenv("EVERYWHERE", net.JoinHostPort("0.0.0.0", port)) // with the port of OTHER
			return notUTF8(env.WorkDir)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"waitready": waitReady, "waitlooped": waitLooped, "waitpage": waitPage, "curl": curl, "headers": headers,
			"keepanswers": keepAnswers, "savecontexts": saveContexts, "spoilcontext": spoilContext},
	})
}

// notUTF8 writes files that a txtar cannot contain.
func notUTF8(dir string) error {
	text := []byte("\xff\xfe")
	for _, unit := range utf16.Encode([]rune("name,text,,\r\nMüller,5 €,,\r\n")) {
		text = binary.LittleEndian.AppendUint16(text, unit)
	}
	for name, content := range map[string]string{"utf16.csv": string(text), "broken.csv": "name,text\nok,1\nM\xfcller,2\na,\"3\n4\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o666); err != nil {
			return err
		}
	}
	return nil
}

// stubOllama answers the requests that the proxy makes when it starts.
func stubOllama(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/api/version":
		io.WriteString(w, `{"version":"0.34.1"}`)
	case "/api/tags":
		io.WriteString(w, `{"models":[{"name":"a:latest"},{"name":"b:7b"}]}`)
	case "/slow":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	default:
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	}
}

func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// waitReady polls http://ADDR/_cacheproxy/PAGE until it answers 200.
func waitReady(ts *testscript.TestScript, neg bool, args []string) {
	waitStatus(ts, "http://"+args[0]+"/_cacheproxy/"+args[1], http.StatusOK)
}

// waitLooped polls until the proxy at ADDR has noticed that its upstream leads back to it.
func waitLooped(ts *testscript.TestScript, neg bool, args []string) {
	waitStatus(ts, "http://"+args[0]+"/", http.StatusLoopDetected)
}

// waitPage polls a page until its text matches a regular expression: what a request adds to it is there
// a moment after the client has its answer. Then it prints the text.
func waitPage(ts *testscript.TestScript, neg bool, args []string) {
	want, err := regexp.Compile(args[1])
	ts.Check(err)
	var text []byte
	if !within30s(context.Background(), func() bool {
		_, _, text = exchange(ts, []string{http.MethodGet, args[0], ""})
		return want.Match(text)
	}) {
		ts.Fatalf("%s does not match %s within 30 s:\n%s", args[0], args[1], text)
	}
	fmt.Fprintf(ts.Stdout(), "%s\n", text)
}

func waitStatus(ts *testscript.TestScript, url string, want int) {
	if !within30s(context.Background(), func() bool {
		res, err := http.Get(url)
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == want
	}) {
		ts.Fatalf("%s does not answer %d within 30 s", url, want)
	}
}

// curl METHOD URL BODY [HEADER: VALUE …] prints status and body.
func curl(ts *testscript.TestScript, neg bool, args []string) {
	status, _, body := exchange(ts, args)
	fmt.Fprintf(ts.Stdout(), "%d %s\n", status, body)
}

// headers is like curl, but prints the answer's headers.
func headers(ts *testscript.TestScript, neg bool, args []string) {
	_, header, _ := exchange(ts, args)
	ts.Check(header.Write(ts.Stdout()))
}

func exchange(ts *testscript.TestScript, args []string) (int, http.Header, []byte) {
	req, err := http.NewRequest(args[0], args[1], strings.NewReader(args[2]))
	ts.Check(err)
	for _, h := range args[3:] {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	res, err := http.DefaultClient.Do(req)
	ts.Check(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	return res.StatusCode, res.Header, body
}

// TestDrain: after SIGTERM running streams finish within --drain, new requests are not accepted,
// and the streams left after that are cut off.
func TestDrain(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			listen, err := freeAddr()
			if err != nil {
				t.Fatal(err)
			}
			release := make(chan struct{})
			stream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/stream" {
					stubOllama(w, r)
					return
				}
				io.WriteString(w, "first")
				w.(http.Flusher).Flush()
				select {
				case <-release:
					io.WriteString(w, "last")
				case <-r.Context().Done():
				}
			}))
			defer stream.Close()
			drain := "30s"
			if cut {
				drain = "10ms"
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			code := make(chan int, 1)
			log := &syncBuffer{}
			go func() { // ends with stop
				code <- run(ctx, []string{"--listen", listen, "--upstream", stream.URL, "--drain", drain}, io.Discard, log)
			}()
			waitFor(t, func() bool {
				res, err := http.Get("http://" + listen + "/_cacheproxy/health")
				if err == nil {
					res.Body.Close()
				}
				return err == nil
			})
			res, err := http.Get("http://" + listen + "/stream")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if _, err := io.ReadFull(res.Body, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			stop()
			if !cut {
				waitFor(t, func() bool { _, err := net.Dial("tcp", listen); return err != nil }) // no new requests
				close(release)
			}
			rest, err := io.ReadAll(res.Body)
			if !cut && (err != nil || string(rest) != "last") || cut && err == nil {
				t.Errorf("the stream ended with %q, %v", rest, err)
			}
			if c := <-code; c != 0 {
				t.Errorf("exit status %d, want 0\n%s", c, log)
			}
			if got := strings.Contains(log.String(), `"outcome":"drained"`); got != cut {
				t.Errorf("the log has an outcome drained: %v, want %v\n%s", got, cut, log)
			}
			if got := strings.Contains(log.String(), "cut off after the drain limit"); got != cut {
				t.Errorf("the log says that requests were cut off: %v, want %v\n%s", got, cut, log)
			}
		})
	}
}

// TestDrainSurviving: an answer that goes on without its client has as long as --drain when the proxy
// is told to stop, and is cut off after that.
func TestDrainSurviving(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			listen, err := freeAddr()
			if err != nil {
				t.Fatal(err)
			}
			came, release := make(chan struct{}), make(chan struct{})
			up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/api/chat" {
					stubOllama(w, r)
					return
				}
				io.Copy(io.Discard, r.Body)
				close(came)
				select {
				case <-release:
					io.WriteString(w, `{"done":true}`+"\n")
				case <-r.Context().Done():
				}
			}))
			defer up.Close()
			drain := "30s"
			if cut {
				drain = "10ms"
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			code := make(chan int, 1)
			log := &syncBuffer{}
			go func() { // ends with stop
				code <- run(ctx, []string{"--listen", listen, "--upstream", up.URL, "--drain", drain}, io.Discard, log)
			}()
			waitFor(t, func() bool {
				res, err := http.Get("http://" + listen + "/_cacheproxy/ready")
				if err == nil {
					res.Body.Close()
				}
				return err == nil && res.StatusCode == http.StatusOK
			})
			req, err := http.NewRequest(http.MethodPost, "http://"+listen+"/api/chat",
				strings.NewReader(`{"model":"a","messages":[{"role":"user","content":"x"}]}`))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Prefer", "respond-async")
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != http.StatusAccepted {
				t.Fatalf("%s", res.Status)
			}
			<-came
			stop()
			if !cut {
				waitFor(t, func() bool { _, err := net.Dial("tcp", listen); return err != nil }) // no new requests
				close(release)
			}
			if c := <-code; c != 0 {
				t.Errorf("exit status %d, want 0\n%s", c, log)
			}
			want := `"outcome":"ok","client"`
			if cut {
				want = `"outcome":"drained"`
			}
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log has no %s:\n%s", want, log)
			}
		})
	}
}

// TestDrainWaiting: requests that wait for a slot when the proxy is told to stop may get one within
// --drain, and get 503 after it.
func TestDrainWaiting(t *testing.T) {
	for _, tc := range []struct {
		drain  string
		status int
	}{{"30s", 200}, {"10ms", 503}, {"0s", 503}} {
		t.Run(tc.drain, func(t *testing.T) {
			listen, err := freeAddr()
			if err != nil {
				t.Fatal(err)
			}
			release := make(chan struct{})
			up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/api/chat" {
					stubOllama(w, r)
					return
				}
				io.Copy(io.Discard, r.Body) // only then does net/http notice when a client leaves
				select {
				case <-release:
					io.WriteString(w, `{"done":true}`)
				case <-r.Context().Done():
				}
			}))
			defer up.Close()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			code := make(chan int, 1)
			log := &syncBuffer{}
			go func() { // ends with stop
				code <- run(ctx, []string{"--listen", listen, "--upstream", up.URL, "--drain", tc.drain, "--slots", "1"}, io.Discard, log)
			}()
			waitFor(t, func() bool {
				res, err := http.Get("http://" + listen + "/_cacheproxy/ready")
				if err == nil {
					res.Body.Close()
				}
				return err == nil && res.StatusCode == 200
			})
			type answer struct {
				status int
				retry  string
				err    error
			}
			answers := make(chan answer, 2)
			for range 2 {
				go func() {
					res, err := http.Post("http://"+listen+"/api/chat", "application/json", strings.NewReader(`{"model":"a","messages":[{"role":"user","content":"hello"}]}`))
					if err != nil {
						answers <- answer{err: err}
						return
					}
					defer res.Body.Close()
					_, err = io.ReadAll(res.Body)
					answers <- answer{res.StatusCode, res.Header.Get("Retry-After"), err}
				}()
			}
			waitFor(t, func() bool {
				res, err := http.Get("http://" + listen + "/metrics")
				if err != nil {
					return false
				}
				defer res.Body.Close()
				text, err := io.ReadAll(res.Body)
				return err == nil && strings.Contains(string(text), `ollama_cacheproxy_queue_requests{priority="normal"} 1`)
			})
			stop()
			if tc.status == 200 {
				waitFor(t, func() bool { return strings.Contains(log.String(), "stopping: no new requests") })
				close(release)
			}
			a, b := <-answers, <-answers
			if a.status != tc.status {
				// a is the one that waited: the other may be cut off before this one gets its answer.
				a, b = b, a
			}
			if a.status != tc.status || a.err != nil || a.status == 503 && a.retry == "" {
				t.Errorf("what waited: %+v, want %d", a, tc.status)
			}
			if ran := b.err == nil && b.status == 200; ran != (tc.status == 200) {
				t.Errorf("what ran: %+v", b)
			}
			if c := <-code; c != 0 {
				t.Errorf("exit status %d, want 0\n%s", c, log)
			}
		})
	}
}

// syncBuffer is written by the program and read by the test.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// waitFor polls until ok returns true.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	if !within30s(t.Context(), ok) {
		t.Fatal("not within 30 s")
	}
}

// within30s polls until ok returns true; false if it does not in time.
func within30s(ctx context.Context, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
	return true
}

func TestListenAddr(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1:11435": "127.0.0.1:11435", ":80": ":80", "0.0.0.0": "0.0.0.0:11435", "::": "[::]:11435", "[::1]:1": "[::1]:1",
		"localhost": "localhost:11435", "127.0.0.1:0": "127.0.0.1:0",
	} {
		if got, err := listenAddr(in); err != nil || got != want {
			t.Errorf("listenAddr(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"http://x/y", "a b:c:d", "13001"} {
		if got, err := listenAddr(in); err == nil {
			t.Errorf("listenAddr(%q) = %q, want an error", in, got)
		}
	}
}

// TestCheckExits: scripts can distinguish a wrong setting from an absent Ollama.
func TestCheckExits(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"version":"0.34.1"}`) }))
	defer ollama.Close()
	for _, at := range []struct {
		args []string
		want int
	}{
		{[]string{"--upstream", ollama.URL}, 0},
		{[]string{"--upstream", "127.0.0.1:1"}, 1},
		{[]string{"--upstream", ollama.URL, "--upstream", "127.0.0.1:1"}, 1},
		{[]string{"--upstream", "ftp://x"}, 2},
	} {
		var out syncBuffer
		if got := run(t.Context(), append([]string{"--check"}, at.args...), &out, &out); got != at.want {
			t.Errorf("--check %v exits with %d, want %d\n%s", at.args, got, at.want, out.String())
		}
	}
}
