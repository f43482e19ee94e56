package integration

import (
	"fmt"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestDoctorRules: problems that the proxy's own rules solve. A checksum at the head of a prompt is
// found, with its place and cost, and is gone with --stable-heads; and so is a num_ctx on which
// clients disagree, with --num-ctx-policy.
func TestDoctorRules(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{tiny}, Parallel: 1})
	t.Run("heads", func(t *testing.T) {
		ask := func(flags ...string) (doctor.Report, spent) {
			p := startProxy(t, server.URL(), flags...)
			s := spend(t, server, 6, func() {
				for n := range 6 {
					line := fmt.Sprintf("x-anthropic-billing-header: cc_version=2.%d.0; cc_entrypoint=cli; cch=%05x;\n", len(flags), (0xfa690+n*0x1357)&0xfffff)
					mustPost(t, p.URL+"/api/chat", chatWithSystem(t, tiny, line+words(12, 400), nil, words(uint64(n), 10)))
				}
			})
			return examine(t, p), s
		}
		r, before := ask()
		f := finds(t, r, doctor.IDHead, "--stable-heads claude-billing")
		if f.Cost.Tokens*3 < before.evaluated*2 { // five of the six
			t.Errorf("%d tokens are said to be evaluated for it, of %d", f.Cost.Tokens, before.evaluated)
		}
		r, after := ask("--stable-heads", "claude-billing")
		gone(t, r, doctor.IDHead)
		t.Logf("before: %v; after: %v", before, after)
		if after.evaluated*3 > before.evaluated {
			t.Errorf("before: %v; after: %v", before, after)
		}
	})
	t.Run("num_ctx", func(t *testing.T) {
		ask := func(flags ...string) (doctor.Report, spent) {
			p := startProxy(t, server.URL(), flags...)
			s := spend(t, server, 6, func() {
				for n := range 6 {
					mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 13, 300, map[string]any{"num_ctx": []int{2048, 8192}[n%2]}, words(uint64(n), 10)))
				}
			})
			return examine(t, p), s
		}
		r, before := ask()
		finds(t, r, doctor.IDNumCtx, "--num-ctx-policy "+tiny+":latest=raise")
		r, after := ask("--num-ctx-policy", tiny+":latest=raise")
		gone(t, r, doctor.IDNumCtx)
		t.Logf("before: %v; after: %v", before, after)
		if before.loads < 5 || after.loads > 2 {
			t.Errorf("before: %v; after: %v", before, after)
		}
	})
}
