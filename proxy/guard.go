package proxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
)

// Guard decides who may use the proxy. Ollama checks Host and Origin so that a web page cannot
// reach a server on its visitor's machine (by DNS rebinding, or by plain cross-origin requests).
// The proxy rewrites Host, so it must check the inbound values itself, by Ollama's rules. The zero
// Guard has those rules and requires no API keys.
type Guard struct {
	AllowHosts   []string // more Host names to accept on a loopback connection; "*" accepts all
	AllowOrigins []string // more origins to accept; each may contain one *
	Keys         *Keys    // if nil, no key is required
}

// defaultOrigins are the origins that Ollama allows (envconfig.AllowedOrigins).
var defaultOrigins = func() []string {
	var list []string
	for _, host := range []string{"localhost", "127.0.0.1", "0.0.0.0"} {
		list = append(list, "http://"+host, "https://"+host, "http://"+host+":*", "https://"+host+":*")
	}
	return append(list, "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")
}()

// host refuses a foreign Host on a loopback connection, where only local names make sense. Ollama
// does the same when it listens on loopback. Both accept connections to other addresses of this
// machine.
func (g *Guard) host(r *http.Request) *refusal {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if addr, err := netip.ParseAddrPort(local.String()); err == nil && !addr.Addr().Unmap().IsLoopback() {
			return nil
		}
	}
	host := hostname(r.Host)
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.IsLoopback() || addr.IsPrivate() || addr.IsUnspecified() || OwnAddr(addr) {
			return nil
		}
	} else if localName(host) {
		return nil
	}
	for _, allowed := range g.AllowHosts {
		if allowed == "*" || strings.EqualFold(allowed, host) {
			return nil
		}
	}
	return &refusal{http.StatusForbidden, fmt.Sprintf("host %q is not allowed on a loopback connection (protection against DNS rebinding); start ollama-cacheproxy with --allow-host %s to accept it", host, host)}
}

// hostname returns a Host header's value without the port, in lower case.
func hostname(hostport string) string {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	return strings.ToLower(strings.Trim(host, "[]"))
}

// localName reports whether Ollama accepts a name for this machine or its network
// (server.allowedHost there).
func localName(host string) bool {
	if host == "" || host == "localhost" {
		return true
	}
	if own, err := os.Hostname(); err == nil && host == strings.ToLower(own) {
		return true
	}
	return strings.HasSuffix(host, ".localhost") || strings.HasSuffix(host, ".local") || strings.HasSuffix(host, ".internal")
}

// OwnAddr reports whether addr belongs to an interface of this machine.
func OwnAddr(addr netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr() == addr {
			return true
		}
	}
	return false
}

// origin returns the origin for the CORS headers; "" if the request does not come from a web page
// of another origin.
func (g *Guard) origin(r *http.Request) (string, *refusal) {
	origin := r.Header.Get("Origin")
	if origin == "" || origin == "http://"+r.Host || origin == "https://"+r.Host {
		return "", nil
	}
	if matchOrigin(defaultOrigins, origin) || matchOrigin(g.AllowOrigins, origin) {
		return origin, nil
	}
	return "", &refusal{http.StatusForbidden, fmt.Sprintf("origin %q is not allowed; start ollama-cacheproxy with --allow-origin %s to accept it", origin, origin)}
}

// matchOrigin ignores the patterns' case, as gin-contrib/cors does in Ollama: browsers send origins
// in lower case.
func matchOrigin(patterns []string, origin string) bool {
	for _, p := range patterns {
		p = strings.ToLower(strings.TrimSpace(p))
		before, after, wild := strings.Cut(p, "*")
		if wild && len(origin) >= len(before)+len(after) && strings.HasPrefix(origin, before) && strings.HasSuffix(origin, after) ||
			!wild && origin == p {
			return true
		}
	}
	return false
}

// allowHeaders are the request headers that a web page may send: Ollama's list.
var allowHeaders = strings.Join([]string{
	"Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "Openai-Beta",
	"X-Stainless-Arch", "X-Stainless-Async", "X-Stainless-Custom-Poll-Interval", "X-Stainless-Helper-Method",
	"X-Stainless-Lang", "X-Stainless-Os", "X-Stainless-Package-Version", "X-Stainless-Poll-Helper",
	"X-Stainless-Retry-Count", "X-Stainless-Runtime", "X-Stainless-Runtime-Version", "X-Stainless-Timeout",
}, ",")

// setCORS replaces all CORS headers in h by those for origin, because the upstream never saw the
// Origin.
func setCORS(h http.Header, origin string) {
	if origin == "" {
		return
	}
	for key := range h {
		if strings.HasPrefix(key, "Access-Control-") {
			h.Del(key)
		}
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Add("Vary", "Origin")
}

// preflight answers an OPTIONS request as Ollama does if it comes from a web page, or names a local
// host. If keys are required, a page may send one in any header that the proxy checks.
func preflight(w http.ResponseWriter, origin string, keys bool) {
	h := w.Header()
	if origin != "" {
		allowed := allowHeaders
		if keys {
			allowed += ",X-Api-Key"
		}
		setCORS(h, origin)
		h.Set("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS")
		h.Set("Access-Control-Allow-Headers", allowed)
		h.Set("Access-Control-Max-Age", "43200")
		h.Add("Vary", "Access-Control-Request-Method")
		h.Add("Vary", "Access-Control-Request-Headers")
	}
	w.WriteHeader(http.StatusNoContent)
}

// key returns the client whose API key the request shows; nil if it shows none, or none is
// required. The spelling of the header's name does not matter, nor do other values in it. spent are
// the headers with one of the proxy's keys: they must not reach the upstream.
func (g *Guard) key(r *http.Request) (client *keyHolder, spent []string) {
	if g.Keys == nil {
		return nil, nil
	}
	if scheme, key, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		if client = g.Keys.check(strings.TrimSpace(key)); client != nil {
			spent = append(spent, "Authorization")
		}
	}
	if key := r.Header.Get("X-Api-Key"); key != "" {
		other := g.Keys.check(key)
		if other != nil {
			spent = append(spent, "X-Api-Key")
		}
		if client == nil && isAnthropic(r.URL.Path) {
			client = other
		}
	}
	return client, spent
}

// keyless reports whether a request needs no key: the probes of monitors and containers. Its
// answers contain nothing from an upstream, and name none: see exchange.stranger.
func keyless(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	_, isFile := pageFile(r.URL.Path) // files contain no data
	return r.URL.Path == "/" || r.URL.Path == pathHealth || r.URL.Path == pathReady || isFile ||
		r.URL.Path+"/" == pathPage
}
