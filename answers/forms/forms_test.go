package forms

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// recorded is an answer of Ollama 0.34.1 in both forms, of two computations.
type recorded struct {
	name, path    string
	stream, whole []byte
}

// recordings reads testdata.
func recordings(t testing.TB) []recorded {
	t.Helper()
	files, err := filepath.Glob("testdata/*.whole")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d recordings: %v", len(files), err)
	}
	paths := map[string]string{
		"chat": "/api/chat", "generate": "/api/generate", "chats": "/v1/chat/completions",
		"completions": "/v1/completions", "responses": "/v1/responses", "messages": "/v1/messages",
	}
	var all []recorded
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".whole")
		dialect, _, _ := strings.Cut(name, "-")
		r := recorded{name: name, path: paths[dialect]}
		if r.whole, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
		if r.stream, err = os.ReadFile(strings.TrimSuffix(file, "whole") + "stream"); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

func (r recorded) isStream() string { return ContentType(r.path, true) }

// masks are the members that differ between two computations.
var masks = regexp.MustCompile(`"(created_at|created|completed_at|id|call_id|[a-z_]+_duration)":("[^"]*"|[0-9]+)`)

func masked(text []byte) string { return string(masks.ReplaceAll(text, []byte(`"$1":0`))) }

func TestRecorded(t *testing.T) {
	for _, r := range recordings(t) {
		if pathOf(byte(dialectOf(r.path))) != r.path {
			t.Fatal("the fuzz tests begin with other paths")
		}
		t.Run(r.name, func(t *testing.T) {
			made, ok := Whole(r.path, r.stream, true)
			if !ok || masked(made) != masked(r.whole) {
				t.Errorf("whole: %v\n%s\nwant\n%s", ok, made, r.whole)
			}
			for _, usage := range []bool{false, true} {
				stream, ok := Stream(r.path, r.whole, usage)
				if !ok {
					t.Fatalf("no stream (usage: %v)", usage)
				}
				if back, ok := Whole(r.path, stream, true); ok != (usage || dialectOf(r.path) != chats && dialectOf(r.path) != completions) ||
					ok && !bytes.Equal(back, r.whole) {
					t.Errorf("usage: %v, back: %v\n%s\nwant\n%s\nby\n%s", usage, ok, back, r.whole, stream)
				}
				if _, ok := Complete(r.path, r.isStream(), stream); !ok {
					t.Errorf("the stream is not complete:\n%s", stream)
				}
			}
			if _, ok := Whole(r.path, r.stream, false); ok && strings.Contains(r.name, "tools") && !strings.Contains(r.name, "unused") && dialectOf(r.path) != chat {
				t.Error("calls without tools")
			}
		})
	}
}

// TestBrokenOff: no part of an answer is a complete answer, or makes one. The parts of a stream that
// end between two lines or events are those that a server leaves that breaks off.
func TestBrokenOff(t *testing.T) {
	for _, r := range recordings(t) {
		reason, ok := Complete(r.path, r.isStream(), r.stream)
		if !ok || reason == "" {
			t.Errorf("%s: the stream: %q, %v", r.name, reason, ok)
		}
		if other, ok := Complete(r.path, ContentType(r.path, false), r.whole); !ok || other != reason {
			t.Errorf("%s: the whole answer: %q, %v, want %q", r.name, other, ok, reason)
		}
		var lines [][]byte
		for line := range Lines(r.isStream(), r.stream) {
			lines = append(lines, line)
		}
		if !bytes.Equal(bytes.Join(lines, nil), r.stream) {
			t.Errorf("%s: the lines are not the stream", r.name)
		}
		for i := 0; i < len(lines); i += 1 + len(lines)/100 {
			part := bytes.Join(lines[:i], nil)
			if _, ok := Complete(r.path, r.isStream(), part); ok {
				t.Errorf("%s: complete after %d of %d lines", r.name, i, len(lines))
			}
			if _, ok := Whole(r.path, part, true); ok {
				t.Errorf("%s: a whole answer of %d of %d lines", r.name, i, len(lines))
			}
			twice := bytes.Join([][]byte{r.stream, lines[i]}, nil)
			if _, ok := Whole(r.path, twice, true); ok {
				t.Errorf("%s: a whole answer with line %d behind it", r.name, i)
			}
			if _, ok := Complete(r.path, r.isStream(), twice); ok {
				t.Errorf("%s: complete with line %d behind it", r.name, i)
			}
		}
		for i := 0; i < len(r.whole)-1; i += 1 + len(r.whole)/500 {
			if _, ok := Complete(r.path, ContentType(r.path, false), r.whole[:i]); ok {
				t.Fatalf("%s: complete after %d bytes", r.name, i)
			}
			if _, ok := Stream(r.path, r.whole[:i], true); ok {
				t.Fatalf("%s: a stream of %d bytes", r.name, i)
			}
		}
	}
}

// TestIncomplete: what is no answer that may be kept.
func TestIncomplete(t *testing.T) {
	const lines, events, whole = "application/x-ndjson", "text/event-stream", "application/json; charset=utf-8"
	for _, test := range []struct{ name, path, contentType, body string }{
		{"nothing", "/api/chat", lines, ""},
		{"nothing, whole", "/api/chat", whole, ""},
		{"another path", "/api/embed", whole, `{"done":true,"done_reason":"stop"}`},
		{"load", "/api/generate", whole, `{"model":"m","created_at":"t","response":"","done":true,"done_reason":"load"}`},
		{"load, stream", "/api/chat", lines, `{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"load"}` + "\n"},
		{"unload", "/api/chat", whole, `{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"unload"}`},
		{"load, as a text", "/v1/completions", whole, `{"choices":[{"text":"","index":0,"finish_reason":"load"}]}` + "\n"},
		{"load, as a message", "/v1/messages", whole, `{"id":"m","type":"message","content":null,"stop_reason":"stop_sequence","usage":{"input_tokens":0,"output_tokens":0}}` + "\n"},
		{"load, as a response", "/v1/responses", whole, `{"id":"r","status":"completed","usage":{"input_tokens":0,"output_tokens":0}}` + "\n"},
		{"rendered for debugging", "/api/chat", whole, `{"model":"m","message":{"role":"","content":""},"done":false,"_debug_info":{"rendered_template":""}}`},
		{"repeated too often", "/api/chat", whole, `{"model":"m","message":{"role":"assistant","content":"x"},"done":false}`},
		{"repeated too often, /v1", "/v1/chat/completions", whole, `{"choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":null}]}` + "\n"},
		{"an error", "/api/chat", whole, `{"error":"no","done":true,"done_reason":"stop"}`},
		{"an error in a stream", "/api/chat", lines, `{"message":{"content":"x"},"done":false}` + "\n" + `{"error":"an error was encountered"}` + "\n"},
		{"an error after the end", "/api/chat", lines, `{"done":true,"done_reason":"stop"}` + "\n" + `{"error":"x"}` + "\n"},
		{"two ends", "/api/chat", lines, `{"done":true,"done_reason":"stop"}` + "\n" + `{"done":true,"done_reason":"stop"}` + "\n"},
		{"not JSON", "/api/chat", lines, `{"done":true,"done_reason":"stop"` + "\n"},
		{"events of a native path", "/api/chat", events, "data: [DONE]\n\n"},
		{"lines of /v1", "/v1/completions", lines, `{"done":true,"done_reason":"stop"}` + "\n"},
		{"no reason", "/v1/chat/completions", events, `data: {"choices":[{"delta":{},"finish_reason":null}]}` + "\n\ndata: [DONE]\n\n"},
		{"no mark of the end", "/v1/chat/completions", events, `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}` + "\n\n"},
		{"an error event", "/v1/chat/completions", events, `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}` + "\n\n" + `data: {"error":{"message":"x"}}` + "\n\ndata: [DONE]\n\n"},
		{"a failed response", "/v1/responses", events, "event: response.failed\ndata: {}\n\n"},
		{"an error of messages", "/v1/messages", events, "event: error\ndata: {}\n\n"},
	} {
		if reason, ok := Complete(test.path, test.contentType, []byte(test.body)); ok || reason != "" {
			t.Errorf("%s: %q, %v", test.name, reason, ok)
		}
	}
}

// TestUnknown: a stream with something that this package does not know makes no whole answer, and a
// whole answer no stream, wherever it is.
func TestUnknown(t *testing.T) {
	key := regexp.MustCompile(`[{,]"[a-z_]+":`)
	for _, r := range recordings(t) {
		for what, text := range map[string][]byte{"stream": r.stream, "whole": r.whole} {
			for _, at := range key.FindAllIndex(text, -1) {
				if what == "stream" && r.path == "/v1/responses" && at[0] < bytes.Index(text, []byte("event: response.completed")) {
					continue // what the last event says again
				}
				changed := fmt.Sprintf(`%s"brandnew":1,%s`, text[:at[0]+1], text[at[0]+1:])
				convert := func(text []byte) ([]byte, bool) { return Whole(r.path, text, true) }
				if what == "whole" {
					convert = func(text []byte) ([]byte, bool) { return Stream(r.path, text, true) }
				}
				if made, ok := convert([]byte(changed)); ok && !bytes.Contains(made, []byte("brandnew")) {
					t.Fatalf("%s, %s: a new member at %d is lost:\n%s", r.name, what, at[0], changed)
				}
			}
		}
	}
}

// TestSplitCharacter: where a character may have been cut in two, the answer is computed.
func TestSplitCharacter(t *testing.T) {
	line := func(text string, done bool) string {
		end := `"done":false}`
		if done {
			end = `"done":true,"done_reason":"stop"}`
		}
		return `{"model":"m","created_at":"t","response":"` + text + `",` + end + "\n"
	}
	for _, test := range []struct {
		a, b string
		ok   bool
	}{
		{"a", "b", true},
		{`\\`, "b", true},
		{"é", "😀", true},
		{`a\u003c`, `\u003eb`, true},
		{`a\ufffd`, "b", false},
		{"a", `\ufffdb`, false},
		{"a\uFFFD", "b", false},
		{"a", "\uFFFDb", false},
		{`a\ud83d`, `\ude00`, false},
		{`a\uD83D`, "b", false},
		{"a", "\x98b", false},
		{`a\ufffd`, "", true},
	} {
		stream := line(test.a, false) + line(test.b, false) + line("", true)
		made, ok := Whole("/api/generate", []byte(stream), false)
		if ok != test.ok {
			t.Errorf("%q and %q: %v, want %v", test.a, test.b, ok, test.ok)
		}
		if want := strings.TrimSuffix(line(test.a+test.b, true), "\n"); ok && string(made) != want {
			t.Errorf("%q and %q: %s", test.a, test.b, made)
		}
	}
}

// TestLong: strings of which jsonscan does not check the end are checked.
func TestLong(t *testing.T) {
	long := strings.Repeat("long ", 20<<10)
	line := `{"model":"m","created_at":"t","response":"` + long + `","done":true,"done_reason":"stop"}`
	if made, ok := Whole("/api/generate", []byte(line+"\n"), false); !ok || string(made) != line {
		t.Error("a long answer is not converted")
	}
	if made, ok := Whole("/api/generate", []byte(strings.Replace(line, `g "`, "g \x01\"", 1)), false); ok {
		t.Errorf("invalid JSON: …%s", made[len(made)-60:])
	}
}

// pathOf returns one of the paths.
func pathOf(d byte) string {
	return [...]string{
		"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses",
		"/v1/messages",
	}[(d+5)%6]
}

// TestMutations changes a byte here and there, which byte by byte fuzzing seldom does within what is
// still an answer. Whatever is converted nevertheless says the same in both forms.
func TestMutations(t *testing.T) {
	converted := 0
	for n, r := range recordings(t) {
		if len(r.stream) > 4<<10 {
			continue
		}
		for i := n % 17; i < len(r.stream); i += 17 {
			for _, c := range []string{"", `"`, `\`, "{", "}", "[", ",", " ", "\n", "0", "x", "null", "\xff", "\x00"} {
				stream := slices.Concat(r.stream[:i], []byte(c), r.stream[i+1:])
				if checkWhole(t, r.path, stream) {
					converted++
				}
			}
		}
		for i := n % 7; i < len(r.whole); i += 7 {
			for _, c := range []string{"", `"`, `\`, "{", "]", " ", "0", "null", "\xff", "\x00"} {
				checkStream(t, r.path, slices.Concat(r.whole[:i], []byte(c), r.whole[i+1:]))
			}
		}
	}
	if converted < 1000 {
		t.Errorf("only %d changed streams were converted", converted)
	}
}

func FuzzWhole(f *testing.F) {
	for _, r := range recordings(f) {
		if len(r.stream) < 4<<10 {
			f.Add(byte(dialectOf(r.path)), r.stream)
		}
	}
	f.Fuzz(func(t *testing.T, d byte, stream []byte) { checkWhole(t, pathOf(d), stream) })
}

// checkWhole checks that if a stream can be made a whole answer, that is one, and so is the stream.
func checkWhole(t *testing.T, path string, stream []byte) bool {
	whole, ok := Whole(path, stream, true)
	if !ok {
		return false
	}
	if !json.Valid(whole) {
		t.Fatalf("not JSON: %s", whole)
	}
	reason, ok := Complete(path, ContentType(path, false), whole)
	if !ok {
		t.Fatalf("not complete: %s", whole)
	}
	if r, ok := Complete(path, ContentType(path, true), stream); !ok || r != reason {
		t.Fatalf("the stream is complete: %v, %q, want %q:\n%s", ok, r, reason, stream)
	}
	checkStream(t, path, whole)
	return true
}

func FuzzStream(f *testing.F) {
	for _, r := range recordings(f) {
		if len(r.whole) < 4<<10 {
			f.Add(byte(dialectOf(r.path)), r.whole)
		}
	}
	f.Fuzz(func(t *testing.T, d byte, whole []byte) { checkStream(t, pathOf(d), whole) })
}

// checkStream checks that if a whole answer can be made a stream, that says the same.
func checkStream(t *testing.T, path string, whole []byte) {
	stream, ok := Stream(path, whole, true)
	if !ok {
		return
	}
	if back, ok := Whole(path, stream, true); !ok || !bytes.Equal(back, whole) {
		t.Fatalf("whole:\n%s\nstream:\n%s\nwhole again (%v):\n%s", whole, stream, ok, back)
	}
	if _, ok := Complete(path, ContentType(path, true), stream); !ok {
		t.Fatalf("not complete:\n%s", stream)
	}
	short, ok := Stream(path, whole, false)
	if !ok {
		t.Fatal("only with usage")
	}
	if _, ok := Complete(path, ContentType(path, true), short); !ok {
		t.Fatalf("not complete:\n%s", short)
	}
}

func FuzzComplete(f *testing.F) {
	for _, r := range recordings(f) {
		if len(r.stream) < 4<<10 {
			f.Add(byte(dialectOf(r.path)), true, r.stream)
			f.Add(byte(dialectOf(r.path)), false, r.whole)
		}
	}
	f.Fuzz(func(t *testing.T, d byte, stream bool, body []byte) {
		path := pathOf(d)
		contentType := ContentType(path, stream)
		if reason, ok := Complete(path, contentType, body); ok != (reason != "") {
			t.Fatalf("%q, %v", reason, ok)
		}
		var lines []byte
		for line := range Lines(contentType, body) {
			if len(line) == 0 {
				t.Fatal("an empty line")
			}
			lines = append(lines, line...)
		}
		if !bytes.Equal(lines, body) {
			t.Fatalf("the lines are %q", lines)
		}
	})
}

// kilobytes8 returns a stream whose text has 8 KB, one word a line.
func kilobytes8(b *testing.B, path string) (stream, whole []byte) {
	b.Helper()
	var text strings.Builder
	for text.Len() < 8<<10 {
		text.WriteString("and so on, ")
	}
	switch path {
	case "/api/chat":
		var s bytes.Buffer
		for word := range strings.SplitAfterSeq(text.String(), " ") {
			fmt.Fprintf(&s, `{"model":"smollm2","created_at":"2026-11-30T05:53:12.400086371Z","message":{"role":"assistant","content":%q},"done":false}`+"\n", word)
		}
		s.WriteString(`{"model":"smollm2","created_at":"2026-11-30T05:53:12.623035792Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":282370939,"load_duration":1042406,"prompt_eval_count":100,"prompt_eval_cached_count":82,"prompt_eval_duration":53176000,"eval_count":13,"eval_duration":222567000}` + "\n")
		stream = s.Bytes()
	case "/v1/chat/completions":
		var s bytes.Buffer
		const head = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1796018542,"model":"smollm2","system_fingerprint":"fp_ollama","choices":[`
		role := `"role":"assistant",`
		for word := range strings.SplitAfterSeq(text.String(), " ") {
			fmt.Fprintf(&s, head+`{"index":0,"delta":{%s"content":%q},"finish_reason":null}]}`+"\n\n", role, word)
			role = ""
		}
		s.WriteString(head + `{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n")
		s.WriteString(head + `],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}` + "\n\ndata: [DONE]\n\n")
		stream = s.Bytes()
	}
	whole, ok := Whole(path, stream, false)
	if !ok {
		b.Fatalf("%s: not converted:\n%s", path, stream)
	}
	return stream, whole
}

func BenchmarkConvert(b *testing.B) {
	for _, path := range []string{"/api/chat", "/v1/chat/completions"} {
		stream, whole := kilobytes8(b, path)
		b.Run("Whole"+path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Whole(path, stream, false)
			}
		})
		b.Run("Stream"+path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Stream(path, whole, true)
			}
		})
		b.Run("Complete"+path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Complete(path, ContentType(path, true), stream)
			}
		})
	}
}
