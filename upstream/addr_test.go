package upstream

import (
	"fmt"
	"strings"
	"testing"
)

func TestParseAddr(t *testing.T) {
	for in, want := range map[string]string{
		"":                         "http://127.0.0.1:11434",
		"  localhost ":             "http://localhost:11434",
		"example.com":              "http://example.com:11434",
		"example.com:8080":         "http://example.com:8080",
		":8080":                    "http://127.0.0.1:8080",
		"0.0.0.0":                  "http://127.0.0.1:11434",
		"0.0.0.0:1":                "http://127.0.0.1:1",
		"[::]:1":                   "http://[::1]:1",
		"::1":                      "http://[::1]:11434",
		"[::1]":                    "http://[::1]:11434",
		"[::1]:65535":              "http://[::1]:65535",
		"http://example.com":       "http://example.com:80",
		"https://example.com":      "https://example.com:443",
		"https://example.com:1/":   "https://example.com:1",
		"https://example.com/a/b/": "https://example.com:443/a/b",
		"example.com:1/ollama":     "http://example.com:1/ollama",
		"http://":                  "http://127.0.0.1:80",
	} {
		got, err := ParseAddr(in, DefaultPort)
		if err != nil || got.String() != want {
			t.Errorf("ParseAddr(%q) = %v, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{
		"example.com:0", "example.com:65536", "example.com:x", "example.com:-1", "ftp://example.com", "unix:///tmp/s",
		"http://user:pass@example.com", "http://example.com?x=1", "http://example.com/#a", "a:b:c",
	} {
		if got, err := ParseAddr(in, DefaultPort); err == nil {
			t.Errorf("ParseAddr(%q) = %v, want an error", in, got)
		}
	}
}

func TestParseNamed(t *testing.T) {
	for in, want := range map[string]string{
		"gpu-1=10.0.0.1":                "gpu-1 http://10.0.0.1:11434",
		"a.b_C=https://example.com/x":   "a.b_C https://example.com:443/x",
		" one =[::1]:1":                 "one http://[::1]:1",
		"example.com:8080":              " http://example.com:8080",
		"b=":                            "b http://127.0.0.1:11434",
		strings.Repeat("n", 64) + "=:1": strings.Repeat("n", 64) + " http://127.0.0.1:1",
	} {
		name, u, err := ParseNamed(in, DefaultPort)
		if got := fmt.Sprint(name, " ", u); err != nil || got != want {
			t.Errorf("ParseNamed(%q) = %s, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"=x", "a/b=x", "a b=x", "ä=x", strings.Repeat("n", 65) + "=x", "a=b=c", "http://h?x=1", "a=h:0"} {
		if name, u, err := ParseNamed(in, DefaultPort); err == nil {
			t.Errorf("ParseNamed(%q) = %s, %v, want an error", in, name, u)
		}
	}
}
