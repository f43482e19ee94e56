package savings

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// contentTypes maps the ends of the samples' names to their Content-Type.
var contentTypes = map[string]string{
	".json":   "application/json; charset=utf-8",
	".ndjson": "application/x-ndjson",
	".sse":    "text/event-stream",
}

// readAnswer returns what a Reader finds in a body that arrives in these pieces.
func readAnswer(d Dialect, contentType string, tellsCached bool, limit int, pieces ...[]byte) Answer {
	r := NewReader(d, contentType, tellsCached)
	defer r.Release()
	r.limit = limit
	for _, p := range pieces {
		own := bytes.Clone(p)
		r.Write(own)
		clear(own) // it must not be kept
	}
	a := r.Answer()
	if again := r.Answer(); !sameAnswer(a, again) {
		panic(fmt.Sprintf("asked twice: %+v, then %+v", a, again))
	}
	return a
}

func readBody(d Dialect, contentType string, body string) Answer {
	return readAnswer(d, contentType, false, maxLine, []byte(body))
}

func sameAnswer(a, b Answer) bool {
	return fmt.Sprintf("%#v", a) == fmt.Sprintf("%#v", b)
}

// Prompts of the samples in testdata/answers, which are from real servers, have 46, 61 and 32
// tokens. All but the cold one were sent twice, and the second answer kept. Only 0.34.1 reports how
// many tokens were reused.
const (
	promptTokens    = 46
	coldTokens      = 61
	rawTokens       = 32
	generatedTokens = 3
)

type answerSample struct {
	dialect Dialect
	want    Answer
}

func timed(total, load, promptEval, eval time.Duration, tokens int) answerSample {
	a := Answer{Done: true, Total: tokens, Generated: generatedTokens, DoneReason: "length", TotalTime: total, Load: load, PromptEval: promptEval,
		Eval: eval}
	return answerSample{Native, a}
}

func counted(d Dialect) answerSample {
	return answerSample{d, Answer{Done: true, Total: promptTokens, Generated: generatedTokens}}
}

// answerSamples is what the server reported, by the sample's name; cached is added to those of
// 0.34.1.
func answerSamples(version string) map[string]answerSample {
	all := map[string]answerSample{
		"load.json":                  {Native, Answer{DoneReason: "load"}},
		"chat_load.json":             {Native, Answer{DoneReason: "load"}},
		"unload.json":                {Native, Answer{DoneReason: "unload"}},
		"generate_debug.json":        {Native, Answer{}},
		"chat_error.json":            {Native, Answer{}},
		"messages_error.json":        {Anthropic, Answer{}},
		"v1_chat_nousage.sse":        {OpenAI, Answer{}},
		"v1_completions_nousage.sse": {OpenAI, Answer{}},
		"v1_chat.json":               counted(OpenAI),
		"v1_chat.sse":                counted(OpenAI),
		"v1_completions.json":        counted(OpenAI),
		"v1_completions.sse":         counted(OpenAI),
		"responses.json":             counted(Responses),
		"responses.sse":              counted(Responses),
		"messages.json":              counted(Anthropic),
		"messages.sse":               counted(Anthropic),
	}
	add := func(name string, s answerSample) { all[name] = s }
	switch version {
	case "0.24.0":
		add("chat.json", timed(6476515, 1178832, 534314, 1073235, promptTokens))
		add("chat.ndjson", timed(7298446, 1188236, 764396, 1907264, promptTokens))
		add("generate.json", timed(6714228, 1269947, 660952, 1139584, promptTokens))
		add("generate.ndjson", timed(6684724, 1060125, 1695310, 863253, promptTokens))
		add("generate_cold.ndjson", timed(14531405, 1542733, 2850135, 6678104, coldTokens))
		add("generate_raw.ndjson", timed(3913796, 1073185, 488736, 1299441, rawTokens))
	case "0.33.0":
		add("chat.json", timed(4086623, 803704, 624000, 667000, promptTokens))
		add("chat.ndjson", timed(8951272, 826739, 1046000, 1680000, promptTokens))
		add("generate.json", timed(3468104, 503719, 651000, 796000, promptTokens))
		add("generate.ndjson", timed(6188516, 758006, 772000, 2350000, promptTokens))
		add("generate_cold.ndjson", timed(6979782, 571158, 1986000, 1182000, coldTokens))
		add("generate_raw.ndjson", timed(4009048, 611278, 727000, 1271000, rawTokens))
	case "0.34.1":
		add("chat.json", timed(6440591, 767961, 1172000, 2562000, promptTokens))
		add("chat.ndjson", timed(5258704, 1969927, 516000, 804000, promptTokens))
		add("generate.json", timed(4930437, 1233563, 1004999, 1059000, promptTokens))
		add("generate.ndjson", timed(4250546, 958504, 590000, 842000, promptTokens))
		add("generate_cold.ndjson", timed(12370554, 1642221, 2437000, 1315000, coldTokens))
		add("generate_raw.ndjson", timed(12112750, 7043387, 816000, 1167000, rawTokens))
		for name, s := range all {
			if !s.want.Done {
				continue
			}
			if s.want.CachedKnown = true; name != "generate_cold.ndjson" {
				s.want.Cached = s.want.Total - 1 // the last token is always evaluated
			}
			all[name] = s
		}
	}
	return all
}

// TestSamples reads real servers' answers, split at every byte and broken off at every byte.
func TestSamples(t *testing.T) {
	for _, version := range []string{"0.24.0", "0.33.0", "0.34.1"} {
		dir := filepath.Join("testdata", "answers", version)
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		want := answerSamples(version)
		if len(files) != len(want) {
			t.Errorf("%s: %d samples, of which %d are known", version, len(files), len(want))
		}
		for _, file := range files {
			s, name := want[file.Name()], file.Name()
			body, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			t.Run(version+"/"+name, func(t *testing.T) {
				contentType := contentTypes[filepath.Ext(name)]
				read := func(pieces ...[]byte) Answer {
					return readAnswer(s.dialect, contentType, version == "0.34.1", maxLine, pieces...)
				}
				if got := read(body); !sameAnswer(got, s.want) {
					t.Fatalf("got  %+v\nwant %+v", got, s.want)
				}
				if got := read(bytes.ReplaceAll(body, []byte("\n"), []byte("\r\n"))); !sameAnswer(got, s.want) {
					t.Errorf("with CRLF: %+v", got)
				}
				if got := read(bytes.TrimRight(body, "\n")); !sameAnswer(got, s.want) {
					t.Errorf("without the final newline: %+v", got)
				}
				for i := range body {
					if got := read(body[:i], body[i:]); !sameAnswer(got, s.want) {
						t.Fatalf("split at %d: %+v", i, got)
					}
					if got := read(body[:i]); !sameAnswer(got, s.want) && !sameAnswer(got, Answer{}) {
						t.Fatalf("broken off at %d: %+v", i, got)
					}
				}
				pieces := make([][]byte, len(body))
				for i := range body {
					pieces[i] = body[i : i+1]
				}
				if got := read(pieces...); !sameAnswer(got, s.want) {
					t.Errorf("a byte at a time: %+v", got)
				}
			})
		}
	}
}

// TestCachedTold: 0 reused tokens in /v1/responses mean none only if the server is known to report
// them.
func TestCachedTold(t *testing.T) {
	const body = `{"usage":{"input_tokens":9,"output_tokens":2,"input_tokens_details":{"cached_tokens":%d}}}`
	for _, test := range []struct {
		cached      int
		tellsCached bool
		known       bool
	}{{0, false, false}, {0, true, true}, {4, false, true}, {4, true, true}} {
		got := readAnswer(Responses, contentTypes[".json"], test.tellsCached, maxLine, fmt.Appendf(nil, body, test.cached))
		want := Answer{Done: true, Total: 9, Generated: 2, Cached: test.cached, CachedKnown: test.known}
		if !sameAnswer(got, want) {
			t.Errorf("%+v: %+v", test, got)
		}
	}
}

func TestAnswers(t *testing.T) {
	const (
		json, ndjson, sse = "application/json", "application/x-ndjson", "text/event-stream; charset=utf-8"

		delta = `data: {"type":"message_delta","usage":{"input_tokens":5,"output_tokens":2}}`
		usage = `data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}`
		end   = `{"done":true,"done_reason":"stop","prompt_eval_count":5,"eval_count":2}`
	)
	told := Answer{Done: true, Total: 5, Generated: 2}
	stopped := Answer{Done: true, Total: 5, Generated: 2, DoneReason: "stop"}
	for _, test := range []struct {
		name        string
		dialect     Dialect
		contentType string
		body        string
		want        Answer
	}{
		{"nothing", Native, ndjson, "", Answer{}},
		{"an error after some text", Native, ndjson, `{"done":false}` + "\n" + `{"error":"out of memory"}` + "\n", Answer{}},
		{"an error after the end", Native, ndjson, end + "\n" + `{"error":"out of memory"}` + "\n", Answer{}},
		{"blank lines at the end", Native, ndjson, end + "\n\n \r\n", stopped},
		{"spaces and another order", Native, ndjson, ` { "eval_count" : 2 , "prompt_eval_count":5, "done_reason":"stop","done" : true } `, stopped},
		{"written over lines", Native, json, strings.ReplaceAll(end, ",", ",\n  "), stopped},
		{"lines under the name of JSON", Native, json, `{"done":false}` + "\n" + end, Answer{}},
		{"text after the object", Native, json, end + "\n" + `{"error":"out of memory"}`, Answer{}},
		{"no content type", Native, "", end, stopped},
		{"media type in capitals", Native, "Application/X-NDJSON ; charset=utf-8", "{}\n" + end, stopped},
		{"done in a tool call", Native, ndjson, `{"message":{"tool_calls":[{"function":{"arguments":{"done":true,"prompt_eval_count":5}}}]},"done":false}`, Answer{}},
		{"plain text", Native, json, `the word "done":true is "usage":{"prompt_tokens":5} only text`, Answer{}},
		{"an array", Native, json, "[" + end + "]", Answer{}},
		{"no prompt count", Native, json, `{"done":true,"eval_count":2}`, Answer{Done: true, Generated: 2}},
		{"numbers that are none", Native, json,
			`{"done":true,"eval_count":2,"prompt_eval_count":-5,"prompt_eval_cached_count":1.5,"eval_duration":"3","load_duration":-1,"total_duration":1e3,"context":null}`,
			Answer{Done: true, Generated: 2}},
		{"huge numbers", Native, json, `{"done":true,"eval_count":2,"prompt_eval_count":99999999999999999999,"eval_duration":99999999999999999999}`,
			Answer{Done: true, Generated: 2}},
		{"more reused than there are", Native, json, `{"done":true,"prompt_eval_count":5,"prompt_eval_cached_count":6}`, Answer{Done: true, Total: 5}},
		{"none reused", Native, json, `{"done":true,"prompt_eval_count":5,"prompt_eval_cached_count":0}`, Answer{Done: true, Total: 5, CachedKnown: true}},
		{"null reused", Native, json, `{"done":true,"prompt_eval_count":5,"prompt_eval_cached_count":null}`, Answer{Done: true, Total: 5}},
		{"Native as events", Native, sse, "data: " + end + "\n\n", Answer{}},

		{"usage and the end", OpenAI, sse, usage + "\n\ndata: [DONE]\n\n", told},
		{"no space after data:", OpenAI, sse, strings.Replace(usage, "data: ", "data:", 1) + "\n\ndata:[DONE]", told},
		{"usage, but no end", OpenAI, sse, usage + "\n\n", Answer{}},
		{"usage null", OpenAI, sse, `data: {"choices":[],"usage":null}` + "\n\ndata: [DONE]\n\n", Answer{}},
		{"zeros", OpenAI, sse, `data: {"usage":{"prompt_tokens":0,"completion_tokens":0}}` + "\n\ndata: [DONE]\n\n", Answer{}},
		{"usage is the text", OpenAI, sse, `data: {"choices":[{"delta":{"content":"usage"}}]}` + "\n\n" + usage + "\n\ndata: [DONE]\n\n", told},
		{"usage in a comment, a name and an unknown field", OpenAI, sse,
			usage + "\n\n: " + usage + "\nevent: " + usage + "\nxdata: " + usage + "\n\ndata: [DONE]\n\n", told},
		{"usage in a choice", OpenAI, json, `{"choices":[{"usage":{"prompt_tokens":5}}]}`, Answer{}},
		{"an error", OpenAI, json, `{"error":{"message":"\"usage\":{\"prompt_tokens\":5}","type":"api_error"}}`, Answer{}},

		{"message_start only guesses", Anthropic, sse, `data: {"type":"message_start","message":{"usage":{"input_tokens":9}}}` + "\n\n", Answer{}},
		{"message_delta", Anthropic, sse, delta + "\n\n", told},
		{"lines that end with CR alone", Anthropic, sse, strings.Replace(delta, "5", "4", 1) + "\r\r" + delta + "\r\r", Answer{}},
		{"message_delta is the text", Anthropic, sse,
			delta + "\n\n" + `data: {"type":"content_block_delta","delta":{"text":"message_delta"},"usage":{"input_tokens":9}}` + "\n\n", Answer{}},
		{"reused tokens apart", Anthropic, json, `{"usage":{"input_tokens":1,"cache_read_input_tokens":4,"output_tokens":2}}`,
			Answer{Done: true, Total: 5, Cached: 4, CachedKnown: true, Generated: 2}},
		{"all reused", Anthropic, json, `{"usage":{"input_tokens":0,"cache_read_input_tokens":5}}`, Answer{Done: true, Total: 5, Cached: 5, CachedKnown: true}},

		{"response.failed", Responses, sse,
			`data: {"type":"response.failed","response":{"output":"response.completed","usage":{"input_tokens":5}}}` + "\n\n", Answer{}},
		{"usage beside the response", Responses, sse, `data: {"type":"response.completed","usage":{"input_tokens":5}}` + "\n\n", Answer{}},
		{"the response is text", Responses, sse, `data: {"type":"response.completed","response":"usage"}` + "\n\n", Answer{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := readBody(test.dialect, test.contentType, test.body); !sameAnswer(got, test.want) {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

// TestLongLines: a line beyond the limit is skipped, however it arrives, and the line before it
// does not count as the end.
func TestLongLines(t *testing.T) {
	end := `{"done":true,"prompt_eval_count":5,"pad":"%s"}`
	fits := fmt.Sprintf(end, strings.Repeat("x", maxLine-len(end)+2))
	tooLong := fmt.Sprintf(end, strings.Repeat("x", maxLine-len(end)+3))
	told := Answer{Done: true, Total: 5}
	for _, test := range []struct {
		name, kind, body string
		want             Answer
	}{
		{"a body that fits", ".json", fits, told},
		{"a body too long", ".json", tooLong, Answer{}},
		{"a line that fits", ".ndjson", "{}\n" + fits + "\n", told},
		{"a line too long", ".ndjson", "{}\n" + tooLong + "\n", Answer{}},
		{"a line too long without an end", ".ndjson", fits + "\n" + tooLong, Answer{}},
		{"after the end", ".ndjson", fits + "\n" + tooLong + "\n", Answer{}},
		{"before the end", ".ndjson", tooLong + "\n" + fits + "\n", told},
	} {
		t.Run(test.name, func(t *testing.T) {
			if (len(fits) <= maxLine) == (len(tooLong) <= maxLine) {
				t.Fatalf("%d and %d", len(fits), len(tooLong))
			}
			body := []byte(test.body)
			if got := readAnswer(Native, contentTypes[test.kind], false, maxLine, body); !sameAnswer(got, test.want) {
				t.Errorf("at once: %+v", got)
			}
			var pieces [][]byte
			for b := body; len(b) > 0; b = b[min(len(b), 32<<10):] {
				pieces = append(pieces, b[:min(len(b), 32<<10)])
			}
			if got := readAnswer(Native, contentTypes[test.kind], false, maxLine, pieces...); !sameAnswer(got, test.want) {
				t.Errorf("in pieces: %+v", got)
			}
		})
	}
}

// TestMemory: a Reader's memory stays within its limit, and a large buffer is not kept for the next
// one.
func TestMemory(t *testing.T) {
	for kind, contentType := range contentTypes {
		r := NewReader(OpenAI, contentType, false)
		piece := []byte(`data: "usage"` + strings.Repeat("x", 1<<20-13))
		for i := range 64 {
			if r.Write(piece); i%5 == 2 {
				r.Write([]byte("\n"))
			}
			if held := cap(r.line) + cap(r.last); held > 3*maxLine { // append grows by more than is asked for
				t.Fatalf("%s: %d bytes held", kind, held)
			}
			if r.over && r.line != nil {
				t.Fatalf("%s: a line that is given up is held", kind)
			}
		}
		r.Release()
		if cap(r.line) > maxPooled || cap(r.last) > maxPooled {
			t.Errorf("%s: %d and %d bytes kept", kind, cap(r.line), cap(r.last))
		}
	}
}

// FuzzSplits: any bytes give the same result in any pieces, and never nonsense.
func FuzzSplits(f *testing.F) {
	files, err := filepath.Glob(filepath.Join("testdata", "answers", "0.34.1", "*"))
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for name, s := range answerSamples("0.34.1") {
		body, err := os.ReadFile(filepath.Join("testdata", "answers", "0.34.1", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body, uint8(s.dialect), filepath.Ext(name), uint16(600), []byte{1, 0, 7, 200})
	}
	f.Fuzz(func(t *testing.T, body []byte, dialect uint8, kind string, limit uint16, cuts []byte) {
		d, contentType := Dialect(dialect)%(Anthropic+1), contentTypes[kind]
		var pieces [][]byte
		rest := body
		for _, cut := range cuts {
			n := min(int(cut), len(rest))
			pieces, rest = append(pieces, rest[:n]), rest[n:]
		}
		pieces = append(pieces, rest)
		want := readAnswer(d, contentType, true, int(limit), body)
		if got := readAnswer(d, contentType, true, int(limit), pieces...); !sameAnswer(got, want) {
			t.Fatalf("in pieces %+v\nat once   %+v", got, want)
		}
		if want.Done != (want.Total > 0 || want.Generated > 0) || want.Cached > want.Total || !want.CachedKnown && want.Cached != 0 ||
			min(want.Total, want.Cached, want.Generated) < 0 || min(want.TotalTime, want.Load, want.PromptEval, want.Eval) < 0 {
			t.Fatalf("%+v", want)
		}
		if !want.Done && !sameAnswer(want, Answer{DoneReason: want.DoneReason}) {
			t.Fatalf("not done, but %+v", want)
		}
	})
}

// FuzzText: no text of an answer, whatever it says, is mistaken for its counts.
func FuzzText(f *testing.F) {
	for _, text := range []string{
		"", "usage", "message_delta", "response.completed", "[DONE]", "\ndata: [DONE]\n\n", `\`, `"`, `\"`, "é\u2028\r\n",
		`","done":true,"prompt_eval_count":7}` + "\n", `{"done":true,"prompt_eval_count":7,"eval_count":7}`,
		`{"usage":{"prompt_tokens":7}}`, `"}}],"usage":{"prompt_tokens":7}}`, "\n\n" + `data: {"usage":{"prompt_tokens":7}}` + "\n\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1<<20 {
			return
		}
		quoted, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		say := func(s string) string { return strings.ReplaceAll(s, "TEXT", string(quoted)) }
		for _, test := range []struct {
			dialect    Dialect
			kind       string
			begin, end string // of one answer
		}{
			{Native, ".ndjson", `{"message":{"content":TEXT},"done":false}` + "\n",
				`{"message":{"content":TEXT},"done":true,"prompt_eval_count":5,"eval_count":2}` + "\n"},
			{Native, ".json", "", `{"response":TEXT,"done":true,"prompt_eval_count":5,"eval_count":2}`},
			{OpenAI, ".sse", `data: {"choices":[{"delta":{"content":TEXT}}]}` + "\n\n",
				`data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}` + "\n\ndata: [DONE]\n\n"},
			{OpenAI, ".json", "", `{"choices":[{"message":{"content":TEXT}}],"usage":{"prompt_tokens":5,"completion_tokens":2}}`},
			{Responses, ".sse", "event: response.created\n" + `data: {"delta":TEXT,"type":"response.output_text.delta"}` + "\n\n",
				"event: response.completed\n" +
					`data: {"response":{"output":[TEXT],"usage":{"input_tokens":5,"output_tokens":2}},"type":"response.completed"}` + "\n\n"},
			{Responses, ".json", "", `{"output":[TEXT],"usage":{"input_tokens":5,"output_tokens":2}}`},
			{Anthropic, ".sse", "event: content_block_delta\n" + `data: {"type":"content_block_delta","delta":{"text":TEXT}}` + "\n\n",
				"event: message_delta\n" + `data: {"type":"message_delta","usage":{"input_tokens":5,"output_tokens":2}}` + "\n\n" +
					`data: {"type":"message_stop"}` + "\n\n"},
			{Anthropic, ".json", "", `{"content":[{"text":TEXT}],"usage":{"input_tokens":5,"output_tokens":2}}`},
		} {
			begin, end := say(test.begin), say(test.end)
			if got := readBody(test.dialect, contentTypes[test.kind], begin+begin); !sameAnswer(got, Answer{}) {
				t.Fatalf("%q tells %+v", begin, got)
			}
			want := Answer{Done: true, Total: 5, Generated: 2}
			if got := readBody(test.dialect, contentTypes[test.kind], begin+end); !sameAnswer(got, want) {
				t.Fatalf("%q tells %+v", begin+end, got)
			}
			// A plain text that is not JSON, such as a proxy's error page.
			if got := readBody(test.dialect, contentTypes[test.kind], "error: "+end); test.kind != ".sse" && !strings.Contains(end, "\n") && !sameAnswer(got, Answer{}) {
				t.Fatalf("a text tells %+v", got)
			}
		}
	})
}
