package proxy

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/gin-contrib/cors"
	"github.com/gin-gonic/gin"
	"github.com/ollama/ollama/envconfig"
)

// ginOllama is Ollama's router as far as Host and CORS are concerned: the same library, configured
// as in server.GenerateRoutes, with OLLAMA_ORIGINS from the environment, listening on loopback.
func ginOllama(t *testing.T) http.Handler {
	gin.SetMode(gin.ReleaseMode)
	config := cors.DefaultConfig()
	config.AllowWildcard = true
	config.AllowBrowserExtensions = true
	config.AllowHeaders = []string{
		"Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta",
		"x-stainless-arch", "x-stainless-async", "x-stainless-custom-poll-interval", "x-stainless-helper-method", "x-stainless-lang", "x-stainless-os",
		"x-stainless-package-version", "x-stainless-poll-helper", "x-stainless-retry-count", "x-stainless-runtime", "x-stainless-runtime-version", "x-stainless-timeout",
	}
	config.AllowOrigins = envconfig.AllowedOrigins()
	r := gin.New()
	r.HandleMethodNotAllowed = true
	r.Use(cors.New(config), func(c *gin.Context) { // allowedHostsMiddleware
		switch through, byName := ollamaHost(t, c.Request.Host); {
		case !through:
			c.AbortWithStatus(http.StatusForbidden)
		case byName && c.Request.Method == http.MethodOptions:
			c.AbortWithStatus(http.StatusNoContent)
		default:
			c.Next()
		}
	})
	answer := func(c *gin.Context) { c.String(http.StatusOK, "Ollama is running") }
	r.GET("/", answer)
	r.HEAD("/", answer)
	r.POST("/api/chat", answer)
	r.GET("/api/tags", answer)
	return r
}

// TestOriginsAsOllama compares status and CORS headers with those of gin's middleware, over many origins.
func TestOriginsAsOllama(t *testing.T) {
	origins := []string{
		"", "http://localhost", "https://localhost", "http://localhost:3000", "https://localhost:1", "http://localhost:", "http://127.0.0.1", "http://127.0.0.1:8080", "https://0.0.0.0", "http://0.0.0.0:5",
		"http://LOCALHOST", "HTTP://localhost", "http://localhost.evil.example", "http://localhost:3000.evil.example", "http://localhost@evil.example", "http://evil.example", "https://evil.example:11434",
		"http://evil.example/http://localhost", "null", "*", "http://", "http://127.0.0.1.evil.example", "http://127.0.0.2", "http://[::1]", "http://[::1]:3000", "http://sub.localhost", "http://host.local",
		"app://obsidian.md", "app://", "file://", "file:///tmp/x", "tauri://localhost", "vscode-webview://abc", "vscode-file://vscode-app", "vscode-fileX", "APP://x", "capacitor://localhost", "ionic://localhost",
		"chrome-extension://abcdef", "moz-extension://x", "safari-extension://x", "ms-browser-extension://x", "http://example.com", "https://example.com", "http://example.com:80",
		"https://chat.example.com", "https://CHAT.example.com", "https://chat.example.com:443", "https://a.example.org", "https://a.b.example.org", "https://example.org", "http://a.example.org", "https://evil.org/.example.org",
		"chrome-extension://one", "chrome-extension://two", " http://localhost",
	}
	for _, settings := range []string{
		"", "*", "https://chat.example.com", "https://*.example.org", "https://Chat.Example.com", " https://chat.example.com ,http://example.com", "chrome-extension://*", "chrome-extension://one",
		"*.example.org", "http://*", "https://*.example.org,*",
	} {
		t.Setenv("OLLAMA_ORIGINS", settings)
		real := ginOllama(t)
		behind := httptest.NewServer(real)
		defer behind.Close()
		u, err := url.Parse(behind.URL)
		if err != nil {
			t.Fatal(err)
		}
		var allow []string
		if settings != "" {
			allow = strings.Split(settings, ",")
		}
		var n int
		rg := newRig(t, u, &Handler{Guard: Guard{AllowOrigins: allow}})
		for _, origin := range origins {
			for _, req := range []struct{ method, path, host string }{
				{"GET", "/", "localhost:11435"}, {"HEAD", "/", "127.0.0.1:11434"}, {"POST", "/api/chat", "localhost:11435"}, {"GET", "/api/tags", "localhost"}, {"OPTIONS", "/api/chat", "localhost:11435"},
				{"OPTIONS", "/", "127.0.0.1"}, {"OPTIONS", "/unknown", "localhost"}, {"GET", "/", "localhost:3000"},
			} {
				n++
				r := httptest.NewRequest(req.method, "http://"+req.host+req.path, nil)
				if origin != "" {
					r.Header.Set("Origin", origin)
				}
				if req.method == "OPTIONS" {
					r.Header.Set("Access-Control-Request-Method", "POST")
					r.Header.Set("Access-Control-Request-Headers", "content-type")
				}
				want, got := httptest.NewRecorder(), httptest.NewRecorder()
				real.ServeHTTP(want, r.Clone(t.Context()))
				rg.h.ServeHTTP(got, r.Clone(t.Context()))
				name := fmt.Sprintf("OLLAMA_ORIGINS=%q Origin %q %s %s%s", settings, origin, req.method, req.host, req.path)
				sameCORS(t, name, want, got)
			}
		}
		if n == 0 {
			t.Fatal("nothing was compared")
		}
	}
}

func sameCORS(t *testing.T, name string, want, got *httptest.ResponseRecorder) {
	t.Helper()
	cors := func(h http.Header) string {
		var list []string
		for k, v := range h {
			if strings.HasPrefix(k, "Access-Control-") || k == "Vary" {
				if k == "Access-Control-Allow-Headers" {
					v = []string{strings.ToLower(strings.Join(v, ","))}
				}
				list = append(list, fmt.Sprint(k, v))
			}
		}
		slices.Sort(list)
		return strings.Join(list, "; ")
	}
	if want.Header().Get("Access-Control-Allow-Origin") == "*" {
		// We send the origin and Vary, where gin sends "*" to all: the same to a browser.
		g := got.Header()
		if g.Get("Access-Control-Allow-Origin") == "" || !slices.Contains(g["Vary"], "Origin") || got.Code != want.Code ||
			!strings.EqualFold(g.Get("Access-Control-Allow-Headers"), want.Header().Get("Access-Control-Allow-Headers")) ||
			g.Get("Access-Control-Allow-Methods") != want.Header().Get("Access-Control-Allow-Methods") {
			t.Errorf("%s: %d %v, want any origin allowed and %d", name, got.Code, g, want.Code)
		}
		return
	}
	if got.Code != want.Code || cors(got.Header()) != cors(want.Header()) {
		t.Errorf("%s:\n%d %s, want\n%d %s", name, got.Code, cors(got.Header()), want.Code, cors(want.Header()))
	}
}

// ollamaHost is Ollama's allowedHostsMiddleware (server/routes.go) on a loopback listener, so that
// the list below is judged by Ollama's rules and not by ours. byName means accepted by name, not by
// address.
func ollamaHost(t *testing.T, requestHost string) (through, byName bool) {
	t.Helper()
	host, _, err := net.SplitHostPort(requestHost)
	if err != nil {
		host = requestHost
	}
	if ip := net.ParseIP(host); ip != nil {
		if ip.IsLoopback() || ip.IsPrivate() || ip.IsUnspecified() {
			return true, false
		}
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if own, _, err := net.ParseCIDR(a.String()); err == nil && own.Equal(ip) {
				return true, false
			}
		}
	}
	host = strings.ToLower(host)
	if own, err := os.Hostname(); err == nil && host == strings.ToLower(own) {
		return true, true
	}
	byName = host == "" || host == "localhost" || strings.HasSuffix(host, ".localhost") || strings.HasSuffix(host, ".local") || strings.HasSuffix(host, ".internal")
	return byName, byName
}

// TestHostsAsOllama: on a loopback connection the proxy refuses the same foreign Host names as
// Ollama.
func TestHostsAsOllama(t *testing.T) {
	hosts := []string{
		"localhost", "localhost:11435", "LocalHost:1", "127.0.0.1", "127.0.0.1:11435", "127.8.9.1", "[::1]:11435", "0.0.0.0", "[::]:80", "10.1.2.3", "192.168.1.1:80", "172.16.0.1", "172.32.0.1", "8.8.8.8", "8.8.8.8:80", "169.254.1.1",
		"[fe80::1]:80", "[fd00::1]:80", "[2001:db8::1]:80", "[::ffff:127.0.0.1]:80", "[::ffff:8.8.8.8]:80", "evil.example", "evil.example:11434", "localhost.evil.example", "evil.localhost", "a.local", "a.b.internal", "local", "internal", ".local",
		"localhost.", "evil.example.", "xlocalhost", "a.localx", "127.0.0.1.evil.example", "0x7f.1", "2130706433", "host.docker.internal", "host.docker.internal:11434", "ollama", "ollama:11434",
	}
	if own, err := os.Hostname(); err == nil {
		hosts = append(hosts, own, strings.ToUpper(own)+":80", own+".evil.example")
	}
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{})
	for _, host := range hosts {
		for _, path := range []string{"/api/tags", "/", "/_cacheproxy/health", "/v1/models"} {
			client := rg.dial()
			client.send("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
			got := client.receive()
			client.Close()
			through, _ := ollamaHost(t, host)
			if ok := !strings.Contains(got.line, " 403 "); ok != through {
				t.Errorf("Host %q, %s: %s, but Ollama lets it through: %v", host, path, got.line, through)
			}
			if strings.Contains(got.line, " 403 ") {
				if ex := rg.ended(); ex.Outcome != Refused || ex.Status != 403 {
					t.Errorf("told as %+v", ex)
				}
			} else {
				rg.ended()
			}
		}
	}
	// Brackets without a port: Ollama refuses "[::1]", which clients of the default port send. We
	// accept it.
	client := rg.dial()
	client.send("GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n")
	if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
		t.Errorf("Host [::1]: %s", got.line)
	}
}

// TestAllowHost: what the operator allows is allowed, and nothing else.
func TestAllowHost(t *testing.T) {
	f := newFake(t, okAnswer)
	for _, tt := range []struct {
		allow []string
		host  string
		want  string
	}{
		{[]string{"llm.example.com"}, "llm.example.com", "200"}, {[]string{"llm.example.com"}, "LLM.example.com:8080", "200"}, {[]string{"LLM.example.com"}, "llm.example.com", "200"},
		{[]string{"llm.example.com"}, "x.llm.example.com", "403"}, {[]string{"llm.example.com"}, "example.com", "403"}, {[]string{"*"}, "anything.example", "200"}, {[]string{"8.8.8.8"}, "8.8.8.8:80", "200"}, {nil, "x.example", "403"},
	} {
		rg := newRig(t, f.URL, &Handler{Guard: Guard{AllowHosts: tt.allow}})
		client := rg.dial()
		client.send("POST /api/chat HTTP/1.1\r\nHost: " + tt.host + "\r\nContent-Length: 0\r\n\r\n")
		if got := client.receive(); !strings.HasPrefix(got.line, "HTTP/1.1 "+tt.want+" ") {
			t.Errorf("%q allows %s: %s", tt.allow, tt.host, got.line)
		}
	}
}

// addrListener makes a server believe that a client connected to another address of this machine.
type addrListener struct {
	net.Listener
	local net.Addr
}

type addrConn struct {
	net.Conn
	local net.Addr
}

func (l addrListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return addrConn{c, l.local}, err
}

func (c addrConn) LocalAddr() net.Addr { return c.local }

// TestHostBeyondLoopback: on a connection to a real address every Host is accepted, as by Ollama.
// The proxy checks the connection and not the listener, so 0.0.0.0 is still guarded for loopback
// clients: stricter.
func TestHostBeyondLoopback(t *testing.T) {
	f := newFake(t, okAnswer)
	for local, want := range map[string]string{"172.17.0.2:11435": "200", "[2001:db8::1]:11435": "200", "127.0.0.1:11435": "403", "[::1]:11435": "403", "[::ffff:127.0.0.1]:11435": "403"} {
		rg := newRig(t, f.URL, &Handler{})
		addr, err := net.ResolveTCPAddr("tcp", local)
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(rg.h)
		srv.Listener = addrListener{srv.Listener, addr}
		srv.Start()
		conn, err := net.DialTimeout("tcp", srv.Listener.(addrListener).Listener.Addr().String(), patience)
		if err != nil {
			t.Fatal(err)
		}
		client := newFakeConn(t, conn)
		client.send("GET / HTTP/1.1\r\nHost: llm.example.com\r\n\r\n")
		if got := client.receive(); !strings.HasPrefix(got.line, "HTTP/1.1 "+want+" ") {
			t.Errorf("on %s: %s, want %s", local, got.line, want)
		}
		client.Close()
		srv.Close()
	}
}
