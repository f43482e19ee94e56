package bench

import (
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// TestPrice: tokens are priced if a price is given, and only then.
func TestPrice(t *testing.T) {
	r := &Report{Workload: "same", Modes: []*ModeResult{{Mode: Full, Basis: savings.Measured, Evaluated: 250_000, Reused: 1_500_000, HitRate: 1}}}
	print := func() string {
		var b strings.Builder
		if err := r.Print(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	if text := print(); strings.Contains(text, "a million") {
		t.Errorf("without a price: %s", text)
	}
	r.Price = 2
	if text := print(); !strings.Contains(text, "at 2 a million: evaluated (reused)") || !strings.Contains(text, "0.5000 (3.0000)") {
		t.Errorf("at 2 a million: %s", text)
	}
}
