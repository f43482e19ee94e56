package batch

import (
	"strings"
	"testing"
)

// TestPrice: tokens are priced if a price is given, with the basis of their number.
func TestPrice(t *testing.T) {
	s := &Summary{ReusedTokens: Figure{3e6, Estimated}, EvaluatedTokens: measured(5e5)}
	print := func(price float64) string {
		s.SetPrice(price)
		var b strings.Builder
		if err := s.Print(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	if text := print(0); strings.Contains(text, "price") || s.Cost != nil {
		t.Errorf("without a price: %s", text)
	}
	text := print(1.5)
	if *s.Cost != measured(.75) || *s.Worth != (Figure{4.5, Estimated}) || !strings.Contains(text, "4.5000  estimated") || !strings.Contains(text, "0.7500  measured") {
		t.Errorf("%+v, %+v, %s", s.Cost, s.Worth, text)
	}
	s.ReusedTokens = Figure{Basis: Unknown}
	if text := print(1.5); !strings.Contains(text, "of the reused            unknown") {
		t.Errorf("reused tokens unknown: %s", text)
	}
}
