package realollama

import (
	"slices"
	"strings"
)

// Special tokens of the generated models; they are the last ones of the vocabulary.
const (
	tokenEndOfText = "<|endoftext|>"
	tokenStart     = "<|im_start|>"
	tokenEnd       = "<|im_end|>"
)

// ggml's token types.
const (
	tokenNormal  int32 = 1
	tokenControl int32 = 3
)

// vocabularyText is the text that merges are learned from: plain English like that of prompts, so
// that a prompt has about three letters a token.
const vocabularyText = `you are a helpful assistant that reads the document below and answers the question about it
the context of this request is shared with many other requests so the server can keep the prefix in its cache
summarize the following text in one short sentence and then list the most important facts in the order they appear
rank these candidates by relevance to the query and return only the number of the best one without any explanation
when the user asks for code write a small function with a clear name return an error and explain what it does
she said that they would have been there before the others came back from their long walk through the old town
every system needs some time to start and there is always more work to do than people think when they make a plan
if nothing else is known about the world the first answer might be right but which part could still be wrong
please translate each line into another language keep the meaning and do not add or remove information
where should we go next what will happen after this how long does it take and why is the result different`

// vocabulary is a byte-level byte-pair encoding like GPT-2's: 256 byte tokens, one token per merge,
// then the special tokens.
type vocabulary struct {
	tokens []string
	types  []int32
	merges []string
	// speakable says of each token whether a model may answer with it: tokens of printable ASCII,
	// so that answers are valid UTF-8 and never end early.
	speakable []bool
}

func (v *vocabulary) id(token string) uint32 {
	return uint32(slices.Index(v.tokens, token))
}

// newVocabulary learns the given number of merges from vocabularyText, the most frequent pair
// first, and ties in the order of the text.
func newVocabulary(merges int) *vocabulary {
	v := &vocabulary{}
	for b := range 256 {
		v.add(byteSymbol(byte(b)), tokenNormal, b == ' ' || b == '\n' || (b > ' ' && b < 127))
	}

	var words [][]string
	for _, line := range strings.Split(vocabularyText, "\n") {
		for i, word := range strings.Fields(line) {
			if i > 0 {
				word = " " + word
			}
			var symbols []string
			for _, b := range []byte(word) {
				symbols = append(symbols, byteSymbol(b))
			}
			words = append(words, symbols)
		}
	}
	for range merges {
		left, right, ok := mostFrequentPair(words)
		if !ok {
			break
		}
		for i := range words {
			words[i] = mergePair(words[i], left, right)
		}
		v.merges = append(v.merges, left+" "+right)
		// Two pairs may join to one token: "a bc" and "ab c".
		if !slices.Contains(v.tokens, left+right) {
			v.add(left+right, tokenNormal, true)
		}
	}
	for _, special := range []string{tokenEndOfText, tokenStart, tokenEnd} {
		v.add(special, tokenControl, false)
	}
	return v
}

func (v *vocabulary) add(token string, typ int32, speakable bool) {
	v.tokens = append(v.tokens, token)
	v.types = append(v.types, typ)
	v.speakable = append(v.speakable, speakable)
}

func mostFrequentPair(words [][]string) (left, right string, ok bool) {
	counts := map[[2]string]int{}
	var best [2]string
	for _, w := range words {
		for i := range len(w) - 1 {
			counts[[2]string{w[i], w[i+1]}]++
		}
	}
	most := 1 // nothing is learned from a pair that occurs once
	for _, w := range words {
		for i := range len(w) - 1 {
			pair := [2]string{w[i], w[i+1]}
			if n := counts[pair]; n > most {
				most, best = n, pair
			}
		}
	}
	return best[0], best[1], most > 1
}

func mergePair(word []string, left, right string) []string {
	merged := word[:0:0]
	for i := 0; i < len(word); i++ {
		if i+1 < len(word) && word[i] == left && word[i+1] == right {
			merged = append(merged, left+right)
			i++
			continue
		}
		merged = append(merged, word[i])
	}
	return merged
}

// byteSymbol returns the printable character by which byte-level encodings name a byte: itself if
// it is printable, else one from U+0100 on.
func byteSymbol(b byte) string {
	printable := func(c int) bool {
		return c >= '!' && c <= '~' || c >= 0xa1 && c <= 0xac || c >= 0xae
	}
	if printable(int(b)) {
		return string(rune(b))
	}
	next := 0x100
	for c := range int(b) {
		if !printable(c) {
			next++
		}
	}
	return string(rune(next))
}
