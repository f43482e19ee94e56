package ollamasim

import (
	"encoding/json"
	"strings"
	"unicode/utf8"

	"github.com/ollama/ollama/api"
)

// token is a piece of text of up to maxPiece bytes, which it contains: a 1 and then its bytes. So a
// token can be turned into text without a vocabulary, and is exact as a number in JSON.
type token = uint64

const maxPiece = 6 // bytes

// tokenize adds the text's tokens to list: words with the blank before them, in pieces of maxPiece
// bytes, and everything else one character at a time. English then has about four bytes per token.
// Where a text is cut does not depend on what follows, so prompts that begin alike have tokens that
// begin alike.
func tokenize(list []token, text string) []token {
	for len(text) > 0 {
		n := piece(text)
		t := token(1)
		for i := range n {
			t = t<<8 | token(text[i])
		}
		list = append(list, t)
		text = text[n:]
	}
	return list
}

// piece returns the length of the text's first token.
func piece(text string) int {
	n := 0
	if text[0] == ' ' {
		n = 1
	}
	for n < len(text) && n < maxPiece && letter(text[n]) {
		n++
	}
	if n == 0 {
		_, n = utf8.DecodeRuneInString(text) // at most 4 bytes
	}
	return n
}

func letter(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_'
}

// appendText adds the token's text.
func appendText(b []byte, t token) []byte {
	shift := 0
	for t>>shift > 1 {
		shift += 8
	}
	for shift > 0 {
		shift -= 8
		b = append(b, byte(t>>shift))
	}
	return b
}

func detokenize(tokens []token) string {
	b := make([]byte, 0, 4*len(tokens))
	for _, t := range tokens {
		b = appendText(b, t)
	}
	return string(b)
}

// common returns how many leading tokens two texts share.
func common(a, b []token) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// seed is what an answer is made from: equal for equal prompts to one model.
func seed(model string, prompt []token) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(model) {
		h = mix(h, uint64(model[i]))
	}
	for _, t := range prompt {
		h = mix(h, t)
	}
	return h
}

func mix(h, v uint64) uint64 {
	h = (h ^ v) * 0x9E3779B97F4A7C15
	return h ^ h>>29
}

// answerToken returns the answer's token number i: a made-up word of four letters with a blank
// before it, except for the first.
func answerToken(seed uint64, i int) token {
	h := mix(seed, uint64(i)+1)
	t := token(1)
	if i > 0 {
		t = t<<8 | ' '
	}
	const consonants, vowels = "bdfgklmnprstvz", "aeiou"
	for range 2 {
		t = t<<16 | token(consonants[h%uint64(len(consonants))])<<8 | token(vowels[h>>8%uint64(len(vowels))])
		h = mix(h, 7)
	}
	return t
}

func answerTokens(list []token, seed uint64, from, to int) []token {
	for i := from; i < to; i++ {
		list = append(list, answerToken(seed, i))
	}
	return list
}

// render returns the prompt of a conversation, in ChatML.
func render(messages []api.Message, tools api.Tools) string {
	var b strings.Builder
	if len(tools) > 0 && (len(messages) == 0 || messages[0].Role != "system") {
		b.WriteString("<|im_start|>system\n")
		writeTools(&b, tools)
		b.WriteString("<|im_end|>\n")
	}
	for i, m := range messages {
		b.WriteString("<|im_start|>")
		b.WriteString(m.Role)
		b.WriteByte('\n')
		b.WriteString(m.Content)
		if i == 0 && m.Role == "system" {
			writeTools(&b, tools)
		}
		for _, c := range m.ToolCalls {
			b.WriteString("\n<tool_call>")
			writeJSON(&b, c.Function)
			b.WriteString("</tool_call>")
		}
		b.WriteString("<|im_end|>\n")
	}
	b.WriteString("<|im_start|>assistant\n")
	return b.String()
}

func writeTools(b *strings.Builder, tools api.Tools) {
	for _, t := range tools {
		b.WriteByte('\n')
		writeJSON(b, t)
	}
}

func writeJSON(b *strings.Builder, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it was read from JSON
	}
	b.Write(text)
}
