package upstream

import "testing"

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
