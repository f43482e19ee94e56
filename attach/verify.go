package attach

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

const (
	// margin is how many tokens before the point where prompts differ the stored context ends, so that no token spans the cut
	// whatever a prompt goes on with. Pre-tokenizers cut between words and SentencePiece's tokens have a few words at most.
	margin = 16
	// minTokens is the least number of tokens worth attaching.
	minTokens = 32
	// characterTokens is how many tokens one character may be made of: one for each byte of UTF-8.
	characterTokens = 4
	// maxMark is how many tokens of the text behind the prompt are looked for in an answer's context.
	maxMark = 4
)

// leadingBOS are texts with which a rendered prompt begins where Ollama takes them off again because the tokenizer adds
// that token (LeadingBOS in model/renderers of Ollama 0.34.1, and the same texts in other templates). It does so only
// with the model's own template.
var leadingBOS = []string{"<s>", "<bos>", "<BOS_TOKEN>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "〈|EOS|〉"}

// form is how the requests of a group are sent with their stored context. It does not change.
type form struct {
	tokens  []int32
	context []byte // tokens as a JSON array
	text    string // what the tokens stand for
	// Around the prompt stand, in the rendered text:
	head, tail string
	// mark are the last tokens of what stands before an answer, without the very last one: a model's tokenizer may have put
	// a token before the prompt that is counted and not in the context, or the last token may be one with the answer's first.
	mark []int32
}

// rest returns what is sent as the prompt in place of prompt; false where the prompt does not begin as the stored text does.
func (f *form) rest(prompt string) (string, bool) {
	rest := ""
	if cut := len(f.text) - len(f.head); cut <= 0 {
		rest = f.head[len(f.text):] + prompt + f.tail
	} else if strings.HasPrefix(prompt, f.text[len(f.head):]) {
		rest = prompt[cut:] + f.tail
	}
	return rest, rest != "" // an empty prompt would only load the model
}

// judge looks at the answer to a request of the group, attached or not: nil if it is as it must be. sure is false where
// the count cannot be checked, because the mark has become one with the answer.
func (f *form) judge(context []int32, promptTokens int) (sure bool, err error) {
	if len(context) < len(f.tokens) || !slices.Equal(context[:len(f.tokens)], f.tokens) {
		return false, &reason{ContextDiffers, "the returned context does not begin with the stored tokens"}
	}
	for _, off := range []int{0, 1, -1, 2, -2} {
		end := promptTokens - 1 + off
		if end > len(context) || end < len(f.mark) || !slices.Equal(context[end-len(f.mark):end], f.mark) {
			continue
		}
		if off == 0 {
			return true, nil
		}
		return false, &reason{CountDiffers, fmt.Sprintf("the prompt has %d tokens in place of %d", promptTokens, promptTokens+off)}
	}
	return false, nil
}

// sample is an answered request of a group that was sent as it came.
type sample struct {
	*request
	tokens []int32 // of the prompt, as the returned context has it, without its last one
}

func (s *sample) size() int { return len(s.body) + len(s.prompt) + len(s.system) + 4*cap(s.tokens) }

// reason says why nothing is attached: an outcome, and what was found, for the log.
type reason struct{ outcome, found string }

func (r *reason) Error() string { return r.found }

// What is wrong with a pair of samples, and not with the model.
var (
	errTrimmed    = errors.New("the model's template trims the prompt")
	errUnsuitable = errors.New("the pair tells too little")
)

// newForm finds the form of two samples' group and compares what it renders to with what the samples render to. common
// are the tokens that all samples of the group so far had in common. It renders five times, up to eight if the cut lies
// within a character.
func (a *Attacher) newForm(ctx context.Context, pair [2]*sample, common []int32) (*form, error) {
	if len(common) < minTokens+margin {
		return nil, errUnsuitable
	}
	var rendered [2]string
	for i, s := range pair {
		var err error
		if rendered[i], err = a.render(ctx, s.rendering()); err != nil {
			return nil, err
		}
	}
	f := &form{}
	var err error
	if f.head, f.tail, err = locate(rendered[0], pair[0].prompt); err != nil {
		return nil, err
	}
	if rendered[1] != f.head+pair[1].prompt+f.tail {
		return nil, &reason{Template, "the template writes something else around another prompt"}
	}
	if dated(f.head, pair[0].system) || dated(f.tail, "") {
		return nil, &reason{Template, "the template writes digits, which may be a date"}
	}
	if slices.ContainsFunc(leadingBOS, func(bos string) bool { return strings.HasPrefix(rendered[0], bos) }) {
		return nil, &reason{Template, "the template writes the token that begins a text"}
	}
	end := commonSuffix(pair[0].tokens, pair[1].tokens)
	if len(end) == 0 {
		return nil, &reason{Unverifiable, "no token before the answer is known"}
	}
	f.mark = slices.Clone(end[max(0, len(end)-maxMark):])

	shared := f.head + commonText(pair[0].prompt, pair[1].prompt)
	if err := a.cut(ctx, f, pair[0], common[:len(common)-margin], shared); err != nil {
		return nil, err
	}
	for i, s := range pair {
		rest, ok := f.rest(s.prompt)
		if !ok {
			return nil, errUnsuitable
		}
		text, err := a.render(ctx, s.rendering(s.attachedChanges(rest, f.context)...))
		if err != nil {
			return nil, err
		}
		if text != rendered[i] {
			return nil, &reason{TextDiffers, "the attached form renders to another text"}
		}
	}
	return f, nil
}

// cut sets the stored context: the tokens, or a few less where the last of them is only a part of a character.
func (a *Attacher) cut(ctx context.Context, f *form, s *sample, tokens []int32, shared string) error {
	var err error
	for range characterTokens {
		f.tokens = slices.Clone(tokens)
		f.context = array(tokens)
		var text string
		text, err = a.render(ctx, s.rendering(s.attachedChanges("x", f.context)...))
		var ok bool
		if f.text, ok = strings.CutSuffix(text, "x"); err == nil && ok && strings.HasPrefix(shared, f.text) && !strings.Contains(f.text, "\uFFFD") {
			return nil
		}
		// An incomplete character is shown as U+FFFD, and refused by some tokenizers.
		if _, refused := errors.AsType[*reason](err); err != nil && !refused || err == nil && !strings.HasSuffix(f.text, "\uFFFD") {
			break
		}
		tokens = tokens[:len(tokens)-1]
	}
	if err != nil {
		return err
	}
	return &reason{TextDiffers, "the stored tokens stand for another text"}
}

// locate finds what stands around the prompt, which is there once.
func locate(rendered, prompt string) (head, tail string, err error) {
	at := strings.Index(rendered, prompt)
	if at < 0 {
		if text := strings.TrimSpace(prompt); text != prompt && strings.Contains(rendered, text) {
			return "", "", errTrimmed
		}
		return "", "", &reason{Template, "the template changes the prompt"}
	}
	if at != strings.LastIndex(rendered, prompt) {
		return "", "", errUnsuitable
	}
	return rendered[:at], rendered[at+len(prompt):], nil
}

// dated reports whether a template's own text has a number of two digits or more, as a date does. What is stored today would
// then be wrong tomorrow.
func dated(text, system string) bool {
	if system = strings.TrimSpace(system); system != "" {
		text = strings.Replace(text, system, "", 1)
	}
	digit := func(c byte) bool { return '0' <= c && c <= '9' }
	for i := 1; i < len(text); i++ {
		if digit(text[i-1]) && digit(text[i]) {
			return true
		}
	}
	return false
}

func commonText(a, b string) string {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return a[:n]
}

func commonPrefix(a, b []int32) []int32 {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return a[:n]
}

func commonSuffix(a, b []int32) []int32 {
	n := 0
	for n < len(a) && n < len(b) && a[len(a)-1-n] == b[len(b)-1-n] {
		n++
	}
	return a[len(a)-n:]
}
