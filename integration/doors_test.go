package integration

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// rawPost returns a request as bytes.
func rawPost(path, body string, headers ...string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n%s", path, strings.Join(append(headers, ""), "\r\n"), len(body), body)
}

// exchangeRaw sends a request on a new connection, shuts the sending side if asked to, and returns
// the answer's status; "" without an answer.
func exchangeRaw(t testing.TB, base, request string, shut bool) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	if shut {
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	var got []byte
	for buf := make([]byte, 4096); !strings.Contains(string(got), "\r\n"); {
		n, err := conn.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			break
		}
	}
	line, _, _ := strings.Cut(string(got), "\r\n")
	return strings.TrimPrefix(line, "HTTP/1.1 ")
}

// zstdFrame returns text as a zstd frame with one uncompressed block.
func zstdFrame(text string) string {
	block := len(text)<<3 | 1 // raw, and the last one
	return "\x28\xb5\x2f\xfd\x20" + string([]byte{byte(len(text)), byte(block), byte(block >> 8), byte(block >> 16)}) + text
}

// TestDoors checks the proxy's assumptions about Ollama's HTTP server on real servers: how much of
// a body is read, which protocols are spoken, what happens to a client that shuts its sending side,
// and the answers to preflights.
func TestDoors(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
			mustPost(t, server.URL()+"/api/generate", generate(tiny, ""))
			t.Run("bodies", func(t *testing.T) { doorsBodies(t, server) })
			p := startProxy(t, server.URL())
			t.Run("upgrade", func(t *testing.T) { doorsUpgrade(t, server.URL(), p.URL) })
			t.Run("half-close", func(t *testing.T) { doorsHalfClose(t, server.URL(), p.URL) })
			t.Run("preflight", func(t *testing.T) { doorsPreflight(t, server.URL(), p.URL) })
		})
	}
}

// doorsBodies: Ollama reads the first value of a body and ignores its Content-Encoding, except for
// zstd under /v1. So does the proxy.
func doorsBodies(t *testing.T, server *realollama.Server) {
	p := startProxy(t, server.URL(), "--max-body", "1000", "--keep-alive-policy", "force", "--slots", "1")
	native, foreign := generate(tiny, `,"keep_alive":"7m"`), v1(tiny)
	padding := strings.Repeat(" ", 70_000)
	for _, tt := range []struct {
		path, body, encoding string
		want                 string
		held                 bool // the proxy sets keep_alive
	}{
		{"/api/generate", native, "", "200 OK", true},
		{"/api/generate", native, "x", "200 OK", true},
		{"/api/generate", native, "gzip", "200 OK", true},
		{"/api/generate", native, "zstd", "200 OK", true},
		{"/api/generate", native + padding, "", "200 OK", true},
		{"/api/generate", native + "}]" + padding, "br", "200 OK", true},
		{"/api/generate", padding + native, "", "200 OK", false},
		{"/api/generate", zstdFrame(native), "zstd", "400 Bad Request", false},
		{"/v1/chat/completions", foreign, "x", "200 OK", false},
		{"/v1/chat/completions", foreign, "gzip", "200 OK", false},
		{"/v1/chat/completions", foreign + padding, "", "200 OK", false},
		{"/v1/chat/completions", foreign, "zstd", "400 Bad Request", false},
		{"/v1/chat/completions", zstdFrame(foreign), "zstd", "200 OK", false},
	} {
		name := fmt.Sprintf("%s %.20q, %d bytes, %q", tt.path, tt.body, len(tt.body), tt.encoding)
		var headers []string
		if tt.encoding != "" {
			headers = []string{"Content-Encoding: " + tt.encoding}
		}
		if got := exchangeRaw(t, server.URL(), rawPost(tt.path, tt.body, headers...), false); got != tt.want {
			t.Errorf("%s, directly: %s, want %s", name, got, tt.want)
		}
		if got := exchangeRaw(t, p.URL, rawPost(tt.path, tt.body, headers...), false); got != tt.want {
			t.Errorf("%s, through the proxy: %s, want %s", name, got, tt.want)
		}
		if tt.path != "/api/generate" || tt.want != "200 OK" {
			continue
		}
		want := 7 * time.Minute
		if tt.held {
			want = 24 * time.Hour
		}
		settles(t, func() error {
			for model, stays := range loaded(t, server.URL()) {
				if !about(stays, want) {
					return fmt.Errorf("%s: %s stays for %v, want %v", name, model, stays, want)
				}
			}
			return nil
		})
	}
	for _, reason := range []string{
		"too_large", // one with its padding before it
		"encoded",   // zstd where Ollama does not decode it
	} {
		p.counts(t, `ollama_cacheproxy_unedited_total{reason="`+reason+`"`, 1)
	}
}

// doorsUpgrade: Ollama speaks no other protocol, and answers as if none had been requested.
func doorsUpgrade(t *testing.T, direct, proxied string) {
	for _, wish := range [][]string{{"Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"}, {"Connection: Upgrade", "Upgrade: websocket"}} {
		for _, request := range []string{
			rawPost("/api/generate", generate(tiny, ""), wish...),
			"GET /api/version HTTP/1.1\r\nHost: localhost\r\n" + strings.Join(wish, "\r\n") + "\r\n\r\n",
		} {
			for name, base := range map[string]string{"directly": direct, "through the proxy": proxied} {
				if got := exchangeRaw(t, base, request, false); got != "200 OK" {
					t.Errorf("%.20q %q, %s: %s", request, wish, name, got)
				}
			}
		}
	}
}

// doorsHalfClose: a request that evaluates nothing gets its answer although the client has shut its
// sending side, at least as often as from Ollama, which sometimes answers lists with 500.
func doorsHalfClose(t *testing.T, direct, proxied string) {
	const times = 20
	count := func(base, request string) (ok int) {
		for range times {
			if exchangeRaw(t, base, request, true) == "200 OK" {
				ok++
			}
		}
		return ok
	}
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /api/ps HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n", rawPost("/api/show", `{"model":"`+tiny+`"}`),
	} {
		d, p := count(direct, request), count(proxied, request)
		t.Logf("%.20q: directly %d of %d, through the proxy %d", request, d, times, p)
		if p != times {
			t.Errorf("%.20q: %d of %d are answered through the proxy, %d directly", request, p, times, d)
		}
	}
	// For requests that evaluate, Ollama takes such a client for one that has left, and mostly
	// sends no answer. (A long one: a short one may be on its way before the proxy sees the end.)
	long := strings.Replace(generate(tiny, ""), `"num_predict":1`, `"num_predict":1000`, 1)
	if got := exchangeRaw(t, proxied, rawPost("/api/generate", long), true); got == "200 OK" {
		t.Errorf("an evaluation, through the proxy: %s", got)
	}
}

// doorsPreflight: the answers to preflights are Ollama's, except for Allow, which browsers ignore
// there, and for the time that refused ones waited.
func doorsPreflight(t *testing.T, direct, proxied string) {
	keys := filepath.Join(t.TempDir(), "keys.txt")
	if err := os.WriteFile(keys, []byte("\ufeffsk-one\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	locked := startProxy(t, direct, "--api-keys-file", keys)
	ask := func(base, path, origin string) (int, http.Header) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Origin", origin)
		req.Header.Set("Access-Control-Request-Method", "POST")
		req.Header.Set("Access-Control-Request-Headers", "content-type,x-api-key")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		for _, name := range []string{"Allow", "Date", "Content-Length", "Content-Type", "Server-Timing", "X-Cacheproxy-Waited"} {
			res.Header.Del(name)
		}
		return res.StatusCode, res.Header
	}
	for _, path := range []string{"/api/chat", "/", "/api/tags", "/v1/messages", "/v1/models/x", "/unknown"} {
		for _, origin := range []string{"http://localhost:3000", "app://obsidian.md", "http://evil.example", "null"} {
			status, header := ask(direct, path, origin)
			s, h := ask(proxied, path, origin)
			if same := maps.EqualFunc(header, h, func(a, b []string) bool { return strings.Join(a, ";") == strings.Join(b, ";") }); s != status || !same {
				t.Errorf("%s from %s: %d %v, directly %d %v", path, origin, s, h, status, header)
			}
			s, h = ask(locked.URL, path, origin)
			want := header.Get("Access-Control-Allow-Headers")
			if want != "" {
				want += ",X-Api-Key"
			}
			if s != status || h.Get("Access-Control-Allow-Headers") != want {
				t.Errorf("%s from %s, with keys: %d %v", path, origin, s, h)
			}
		}
	}
}
