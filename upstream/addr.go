package upstream

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// DefaultPort is Ollama's own.
const DefaultPort = "11434"

// Here reports whether an address is a loopback address of this machine.
func Here(u *url.URL) bool {
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}

// ParseNamed reads NAME=ADDR, or an address alone, for which name is empty. Logs, metrics, pages
// and headers show the name: at most 64 letters, digits, dots, dashes and underscores.
func ParseNamed(s, defaultPort string) (name string, u *url.URL, err error) {
	name, addr, err := CutName(s)
	if err != nil {
		return "", nil, err
	}
	u, err = ParseAddr(addr, defaultPort)
	return name, u, err
}

// CutName splits NAME=REST; name is empty if there is none. Text after a question mark is never a
// name.
func CutName(s string) (name, rest string, err error) {
	name, rest, named := strings.Cut(s, "=")
	if !named || strings.Contains(name, "?") {
		return "", s, nil
	}
	if name = strings.TrimSpace(name); !validName(name) {
		return "", "", fmt.Errorf("name %q: want letters, digits, dots, dashes and underscores, 64 at most", name)
	}
	return name, rest, nil
}

func validName(s string) bool {
	for _, c := range s {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c) {
			continue
		}
		return false
	}
	return s != "" && len(s) <= 64
}

// ParseAddr reads an address in the forms that OLLAMA_HOST takes: a host, host:port, :port, an IPv6
// address with or without brackets, or a URL with an optional path prefix. A missing host means
// 127.0.0.1, and so does an unspecified one (0.0.0.0, ::), on which one can listen but to which one
// cannot connect. A missing port means defaultPort, or 80 and 443 where the scheme http or https is
// written out.
//
// Unlike Ollama, which falls back to the default, it refuses a port that is not a number from 1 to
// 65535.
func ParseAddr(s, defaultPort string) (*url.URL, error) {
	s = strings.TrimSpace(s)
	scheme, rest, ok := strings.Cut(s, "://")
	switch {
	case !ok:
		scheme, rest = "http", s
	case scheme == "http":
		defaultPort = "80"
	case scheme == "https":
		defaultPort = "443"
	default:
		return nil, fmt.Errorf("address %q: scheme %q is neither http nor https", s, scheme)
	}
	hostport, path, _ := strings.Cut(rest, "/")
	if strings.Contains(hostport, "@") { // not quoted: it holds a password
		return nil, errors.New("an address with a user name cannot be used: want a host, host:port or http(s)://host:port/path")
	}
	if strings.ContainsAny(hostport, "?#=") || strings.ContainsAny(path, "?#") {
		return nil, fmt.Errorf("address %q: want a host, host:port or http(s)://host:port/path", s)
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = strings.Trim(hostport, "[]"), defaultPort
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return nil, fmt.Errorf("address %q: %w", s, err)
		}
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return nil, fmt.Errorf("address %q: port %q is not a number from 1 to 65535", s, port)
	}
	u := &url.URL{Scheme: scheme, Host: net.JoinHostPort(reachable(host), port)}
	if path = strings.Trim(path, "/"); path != "" {
		u.Path = "/" + path
	}
	return u, nil
}

// reachable returns the host to connect to in order to reach what listens on a host.
func reachable(host string) string {
	ip := net.ParseIP(host)
	switch {
	case host == "" || ip.Equal(net.IPv4zero):
		return "127.0.0.1"
	case ip.Equal(net.IPv6unspecified):
		return "::1"
	}
	return host
}
