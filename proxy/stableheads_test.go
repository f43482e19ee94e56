package proxy

import (
	"bytes"
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// heads are the rules with these names.
func heads(t testing.TB, names ...string) StableHeads {
	t.Helper()
	s, err := ParseStableHeads(names)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// applied returns the body that the rules produce.
func applied(t testing.TB, s StableHeads, e prefix.Endpoint, body string) (string, []HeadEdits) {
	t.Helper()
	data := []byte(body)
	f, err := scan(data, nil)
	if err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	done := s.apply(e, data, f.members, f.long)
	return string(data), done
}

const (
	billed = `x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;`
	steady = `x-anthropic-billing-header: cc_version=2.1.177.000; cc_entrypoint=cli; cch=00000;`
	left   = `{"role":"system","content":"<total_tokens>14999841 tokens left</total_tokens>"}`
)

func TestStableHeads(t *testing.T) {
	all := heads(t, "claude-billing", "total-tokens")
	none := strings.Repeat(" ", len(left))
	for _, c := range []struct {
		name     string
		endpoint prefix.Endpoint
		body     string
		want     string // "" if nothing is edited
		edits    int
	}{
		{"a system string", prefix.Messages, `{"model":"m","system":"` + billed + `\nYou are"}`, `{"model":"m","system":"` + steady + `\nYou are"}`, 2},
		{"a block of its own", prefix.Messages, `{"system":[{"type":"text","text":"` + billed + `"},{"type":"text","text":"You are"}]}`, `{"system":[{"type":"text","text":"` + steady + `"},{"type":"text","text":"You are"}]}`, 2},
		{"a chat", prefix.Chat, `{"messages":[{"role":"system","content":"` + billed + `\nYou"},{"role":"user","content":"hi"}]}`, `{"messages":[{"role":"system","content":"` + steady + `\nYou"},{"role":"user","content":"hi"}]}`, 2},
		{"a completion with parts", prefix.ChatCompletions, `{"messages":[{"content":[{"text":"` + billed + `","type":"text"}],"role":"system"}]}`, `{"messages":[{"content":[{"text":"` + steady + `","type":"text"}],"role":"system"}]}`, 2},
		{"no checksum of the version", prefix.Messages, `{"system":"x-anthropic-billing-header: cc_version=2.1.177; cch=36ee5;\nYou"}`, `{"system":"x-anthropic-billing-header: cc_version=2.1.177; cch=00000;\nYou"}`, 1},
		{"keys in other cases", prefix.Chat, `{"Messages":[{"Role":"system","CONTENT":"` + billed + `"}]}`, `{"Messages":[{"Role":"system","CONTENT":"` + steady + `"}]}`, 2},

		{"another header", prefix.Messages, `{"system":"x-anthropic-other-header: cch=36ee5;\nYou"}`, "", 0},
		{"not at the start", prefix.Messages, `{"system":"Note: ` + billed + `\nYou"}`, "", 0},
		{"not in the first line", prefix.Messages, `{"system":"\n` + billed + `\nYou"}`, "", 0},
		{"words in the line", prefix.Messages, `{"system":"x-anthropic-billing-header: cch=36ee5; is what a line looks like\nYou"}`, "", 0},
		{"an open line", prefix.Messages, `{"system":"x-anthropic-billing-header: cch=36ee5 and more\nYou"}`, "", 0},
		{"no hexadecimal", prefix.Messages, `{"system":"x-anthropic-billing-header: cch=hello;\nYou"}`, "", 0},
		{"a user's message", prefix.Messages, `{"messages":[{"role":"user","content":"` + billed + `"}]}`, "", 0},
		{"a later system message", prefix.Chat, `{"messages":[{"role":"system","content":"You"},{"role":"system","content":"` + billed + `"}]}`, "", 0},
		{"a second block", prefix.Messages, `{"system":[{"type":"text","text":"You"},{"type":"text","text":"` + billed + `"}]}`, "", 0},
		{"two system prompts", prefix.Messages, `{"system":"` + billed + `","system":"` + billed + `"}`, "", 0},
		{"two roles", prefix.Chat, `{"messages":[{"role":"system","role":"user","content":"` + billed + `"}]}`, "", 0},
		{"a prompt", prefix.Generate, `{"system":"` + billed + `","prompt":"hi"}`, "", 0},
		{"a very long line", prefix.Messages, `{"system":"x-anthropic-billing-header: ` + strings.Repeat("a=b; ", 120) + `cch=36ee5;"}`, "", 0},

		{"countdowns", prefix.Messages, `{"messages":[{"role":"user","content":"a"},` + left + `,{"role":"user","content":"b"}, ` + left + ` ]}`, `{"messages":[{"role":"user","content":"a"},` + none + ` {"role":"user","content":"b"}  ` + none + ` ]}`, 2},
		{"the last ones", prefix.Chat, `{"messages":[{"role":"user","content":"a"},` + left + `,` + left + `]}`, `{"messages":[{"role":"user","content":"a"} ` + none + ` ` + none + `]}`, 2},
		{"the first one", prefix.ChatCompletions, `{"messages":[` + left + `,{"role":"user","content":"a"}]}`, `{"messages":[` + none + ` {"role":"user","content":"a"}]}`, 1},

		{"behind an assistant's", prefix.Chat, `{"messages":[{"role":"user","content":"a"},` + left + `,{"role":"assistant","content":"b"},` + left + `,` + left + `]}`, `{"messages":[{"role":"user","content":"a"},` + none + ` {"role":"assistant","content":"b"},` + none + ` ` + left + `]}`, 2},

		{"nothing else", prefix.Messages, `{"messages":[` + left + `]}`, "", 0},
		{"said by a user", prefix.Messages, `{"messages":[{"role":"user","content":"<total_tokens>5 tokens left</total_tokens>"},{"role":"user","content":"a"}]}`, "", 0},
		{"with a word more", prefix.Messages, `{"messages":[{"role":"system","content":"<total_tokens>5 tokens left</total_tokens> Hurry."},{"role":"user","content":"a"}]}`, "", 0},
		{"another count", prefix.Messages, `{"messages":[{"role":"system","content":"<total_tokens>5</total_tokens>"},{"role":"user","content":"a"}]}`, "", 0},
		{"half a reminder", prefix.Messages, `{"messages":[{"role":"system","content":"<system-reminder><total_tokens>5 tokens left</total_tokens>"},{"role":"user","content":"a"}]}`, "", 0},
		{"with a picture", prefix.Chat, `{"messages":[{"role":"system","content":"<total_tokens>5 tokens left</total_tokens>","images":["x"]},{"role":"user","content":"a"}]}`, "", 0},
		{"a block more", prefix.Messages, `{"messages":[{"role":"system","content":[{"type":"text","text":"<total_tokens>5 tokens left</total_tokens>"},{"type":"text","text":"Think."}]},{"role":"user","content":"a"}]}`, "", 0},
		{"no blocks", prefix.Messages, `{"messages":[{"role":"system","content":[]},{"role":"user","content":"a"}]}`, "", 0},
		{"a null content", prefix.Messages, `{"messages":[{"role":"system","content":null},{"role":"user","content":"a"}]}`, "", 0},
		{"no messages", prefix.Messages, `{"messages":{"role":"system"}}`, "", 0},
		{"messages that are none", prefix.Chat, `{"messages":[null,1,[],"x"]}`, "", 0},
		{"an empty list", prefix.Chat, `{"messages":[]}`, "", 0},
	} {
		got, done := applied(t, all, c.endpoint, c.body)
		want, edits := c.want, 0
		if want == "" {
			want = c.body
		}
		for _, d := range done {
			edits += d.Edits
		}
		if got != want || edits != c.edits {
			t.Errorf("%s: %d edits, want %d\n  of  %s\n  got %s", c.name, edits, c.edits, c.body, got)
		}
		if off, done := applied(t, StableHeads{}, c.endpoint, c.body); off != c.body || done != nil {
			t.Errorf("%s: edited without a rule: %s", c.name, off)
		}
	}
	for _, body := range []string{
		`{"messages":[{"role":"user","content":"a"},{"role":"system","content":"<system-reminder>\n<total_tokens>1 tokens left</total_tokens>\n</system-reminder>\n"}]}`,
		`{"messages":[{"role":"user","content":"a"},{"role":"system","content":"\u003ctotal_tokens\u003e1 tokens left\u003c/total_tokens\u003e"}]}`,
		`{"messages":[{"role":"user","content":"a"},{"role":"system","content":[{"type":"text","text":"<total_tokens>1 tokens left</total_tokens>","cache_control":{"type":"ephemeral"}}]}]}`,
	} {
		got, done := applied(t, all, prefix.Messages, body)
		if len(got) != len(body) || strings.TrimRight(strings.TrimSuffix(got, "]}"), " ") != `{"messages":[{"role":"user","content":"a"}` || len(done) != 1 {
			t.Errorf("%s became %s", body, got)
		}
	}
	if got, _ := applied(t, heads(t, "total-tokens"), prefix.Messages, `{"system":"`+billed+`"}`); !strings.Contains(got, billed) {
		t.Errorf("a rule that was not asked for: %s", got)
	}
	if _, err := ParseStableHeads([]string{"claude-billing", "dates"}); err == nil || !strings.Contains(err.Error(), "claude-billing, total-tokens") {
		t.Errorf("an unknown rule: %v", err)
	}
	for _, s := range []StableHeads{all, {}} {
		if again, err := ParseStableHeads(strings.Split(s.String(), ", ")); err != nil || again.String() != s.String() {
			t.Errorf("%s is read as %s: %v", s, again, err)
		}
	}
	if s := all.String() + "/" + (StableHeads{}).String(); s != "claude-billing, total-tokens/off" {
		t.Error(s)
	}
}

// TestStableHeadsSent: an edited body goes upstream with its old length, parses as one prompt, is
// counted, and is reported; a compressed body stays as it is.
func TestStableHeadsSent(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{StableHeads: heads(t, "claude-billing")})
	body := func(cch string) string {
		return `{"model":"m","stream":false,"messages":[{"role":"system","content":"x-anthropic-billing-header: cch=` + cch + `;\nYou are an agent."},{"role":"user","content":"hi"}]}`
	}
	for _, cch := range []string{"36ee5", "0aaa9"} {
		rg.post("/api/chat", body(cch))
		if got := string(f.next().body); got != body("00000") {
			t.Errorf("sent %s", got)
		}
		if ex := rg.ended(); !reflect.DeepEqual(ex.Heads, []HeadEdits{{"claude-billing", 1}}) {
			t.Errorf("told %+v", ex.Heads)
		}
	}
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := string(encoder.EncodeAll([]byte(body("36ee5")), nil))
	if _, text := rg.post("/v1/chat/completions", packed, "Content-Encoding: zstd"); text == "" {
		t.Error("no answer")
	}
	if got := string(f.next().body); got != packed {
		t.Errorf("a compressed body was changed: %q", got)
	}
	if ex := rg.ended(); ex.Heads != nil || ex.Unedited != UneditedEncoded {
		t.Errorf("a compressed body: %+v, %q", ex.Heads, ex.Unedited)
	}
}

// FuzzStableHeads: an edited body keeps its length, and means the same to Ollama except for the
// text that the rules remove.
func FuzzStableHeads(f *testing.F) {
	for _, seed := range []string{
		`{"system":"` + billed + `\nYou"}`, `{"messages":[{"role":"user","content":"a"},` + left + `]}`,
		`{"messages":[{"role":"system","content":"` + billed + `"},` + left + `]}`, `{}`,
		`{"system":[{"type":"text","text":"` + billed + `"}],"messages":[` + left + `,` + left + `,null]}`,
	} {
		f.Add([]byte(seed))
	}
	all := heads(f, "claude-billing", "total-tokens")
	digits := regexp.MustCompile(`^x-anthropic-billing-header:[^\n]*`)
	counts := regexp.MustCompile(`^[\s\S]*<total_tokens>[0-9]+ tokens left</total_tokens>[\s\S]*$`)
	type prompt struct {
		System   any
		Messages []any
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, e := range []prefix.Endpoint{prefix.Chat, prefix.ChatCompletions, prefix.Messages} {
			body := bytes.Clone(data)
			members, err := scan(body, nil)
			if err != nil {
				return
			}
			done := all.apply(e, body, members.members, members.long)
			if len(body) != len(data) || done == nil && !bytes.Equal(body, data) {
				t.Fatalf("%q became %q", data, body)
			}
			if done == nil {
				continue
			}
			var before, after prompt
			if json.NewDecoder(bytes.NewReader(data)).Decode(&before) != nil {
				continue
			}
			if err := json.NewDecoder(bytes.NewReader(body)).Decode(&after); err != nil {
				t.Fatalf("%q became %q: %v", data, body, err)
			}
			plain := func(v any) string { // without the text that may change
				text, _ := json.Marshal(v)
				var any any
				json.Unmarshal(text, &any)
				walk(&any, func(s string) string {
					return digits.ReplaceAllStringFunc(s, func(line string) string {
						return regexp.MustCompile(`[0-9a-f]`).ReplaceAllString(line, "0")
					})
				})
				text, _ = json.Marshal(any)
				return string(text)
			}
			if plain(before.System) != plain(after.System) {
				t.Fatalf("%q became %q", data, body)
			}
			rest := after.Messages
			for _, m := range before.Messages {
				text, _ := json.Marshal(m)
				if len(rest) > 0 && plain(m) == plain(rest[0]) {
					rest = rest[1:]
				} else if o, ok := m.(map[string]any); !ok || len(o) != 2 || !counts.MatchString(strings.NewReplacer(`\u003c`, "<", `\u003e`, ">").Replace(string(text))) {
					t.Fatalf("%s was taken out of %q, which became %q", text, data, body)
				}
			}
			if len(rest) > 0 || len(after.Messages) == 0 && len(before.Messages) > 0 {
				t.Fatalf("%q became %q", data, body)
			}
		}
	})
}

// walk changes all strings of a decoded value.
func walk(v *any, change func(string) string) {
	switch x := (*v).(type) {
	case string:
		*v = change(x)
	case []any:
		for i := range x {
			walk(&x[i], change)
		}
	case map[string]any:
		for k, item := range x {
			walk(&item, change)
			x[k] = item
		}
	}
}
