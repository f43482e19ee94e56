package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

func TestContexts(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "ollama-cacheproxy")
	if err := proxyprocess.Build(t.Context(), binary); err != nil {
		t.Fatal(err)
	}
	cache, err := realollama.OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			tmp := t.TempDir()
			t.Setenv("TMPDIR", tmp)
			bin, err := cache.Ollama(t.Context(), version)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			ollama := realollama.Installed{Bin: bin, Version: version}
			if err := contexts(t.Context(), ollama, binary, &out); err != nil {
				t.Errorf("%v\n%s", err, &out)
			}
			want := "Saved: "
			if version == realollama.EraA {
				want = "left out: Ollama 0.24.0 has no llama-server; 0.30 and later have.\n"
			}
			if !strings.Contains(out.String(), want) {
				t.Errorf("%q was to be told:\n%s", want, &out)
			}
			t.Log(&out)
			left, err := filepath.Glob(filepath.Join(tmp, "*"))
			if err != nil || len(left) > 0 {
				t.Errorf("it leaves %v behind (%v)", left, err)
			}
		})
	}
}

func TestConclude(t *testing.T) {
	of := func(bytes int64, last visit) library {
		return library{[]visit{
			{chat.Answer{Text: "a", First: 3500 * time.Millisecond}, 500},
			{chat.Answer{Text: "b", First: 100 * time.Millisecond}, 10},
			last,
		}, bytes, "c"}
	}
	whole := func(text string, first time.Duration) visit {
		return visit{chat.Answer{Text: text, First: first, Load: 500 * time.Millisecond}, 502}
	}
	slow, quick := whole("c", 3600*time.Millisecond), whole("c", 700*time.Millisecond)
	spared := visit{chat.Answer{Text: "c", First: 600 * time.Millisecond}, 12}
	for _, tt := range []struct {
		name            string
		direct, proxied library
		want            string // "" if there must be an error
	}{
		{
			"rounded otherwise", of(0, whole("d", 3*time.Second)), of(12e6, spared),
			"3, 2 equal   3, 3 equal\n(The engine rounds",
		},
		{"attached", of(0, slow), of(12e6, spared), "Saved: 490 of 502 tokens, and 3s of waiting"},
		{"attached in part", of(0, slow), of(12e6, visit{slow.Answer, 200}), ""},
		{"not attached", of(0, slow), of(12e6, slow), ""},
		{"not stored", of(0, slow), of(0, slow), ""},
		{"warm directly, too", of(0, visit{slow.Answer, 12}), of(12e6, spared), ""},
		{"not worth it", of(0, quick), of(0, quick), "evaluates the system prompt in 100ms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			err := conclude(&out, tt.direct, tt.proxied)
			if (err == nil) != (tt.want != "") || !strings.Contains(out.String(), tt.want) {
				t.Errorf("%v, want %q:\n%s", err, tt.want, &out)
			}
		})
	}
}
