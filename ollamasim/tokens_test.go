package ollamasim

import (
	"slices"
	"testing"
)

// FuzzTokens: tokens join to the text, and texts with a common beginning have tokens with a common
// beginning.
func FuzzTokens(f *testing.F) {
	f.Fuzz(func(t *testing.T, text, more string) {
		tokens := tokenize(nil, text)
		if got := detokenize(tokens); got != text {
			t.Fatalf("%q came back as %q", text, got)
		}
		for _, x := range tokens {
			if x <= 1 || x >= 1<<53 {
				t.Fatalf("the token %x of %q is not exact in JSON", x, text)
			}
		}
		// Only the last word of the text may continue in the rest.
		whole := tokenize(nil, text+"\n"+more)
		if n := common(tokens, whole); n < len(tokens) {
			t.Fatalf("%q has %d tokens, and %d of them with %q after it", text, len(tokens), n, more)
		}
	})
}

// TestAnswerTokens: an answer that is sent back as text has the same tokens.
func TestAnswerTokens(t *testing.T) {
	for seed := range uint64(200) {
		want := answerTokens(nil, seed, 0, 50)
		if got := tokenize(nil, detokenize(want)); !slices.Equal(got, want) {
			t.Fatalf("%q has other tokens than it was made of", detokenize(want))
		}
	}
}

func BenchmarkTokenize(b *testing.B) {
	text := words(1, 2000)
	b.SetBytes(int64(len(text)))
	var list []token
	for b.Loop() {
		list = tokenize(list[:0], text)
	}
}
