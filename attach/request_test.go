package attach

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/ollama/ollama/api"
)

// Which requests are looked at, as Ollama reads them.
func TestRead(t *testing.T) {
	prompt := `"prompt":` + quote(rubric)
	for body, want := range map[string]bool{
		`{` + prompt + `}`:                                         true,
		`{"Prompt":` + quote(rubric) + `}`:                         true,
		`{"pr\u006fmpt":` + quote(rubric) + `}`:                    true,
		"{" + prompt + ",\"Prompt\":null}":                         true,
		`{"prompt":"x",` + prompt + `}`:                            true,
		`{` + prompt + `,"prompt":"x"}`:                            false, // too short
		`{"prompt":"x","system":` + quote(rubric) + `}`:            true,
		`{"prompt":"x","system":"x"}`:                              false,
		`{"prompt":" ","system":` + quote(rubric) + `}`:            false,
		`{"system":` + quote(rubric) + `}`:                         false,
		`{"prompt":"","system":` + quote(rubric) + `}`:             false,
		`{"prompt":5}`:                                             false,
		`{` + prompt + `,"system":5}`:                              false,
		`[{` + prompt + `}]`:                                       false,
		`{` + prompt:                                               false,
		`{` + prompt + `}{"context":[1]}`:                          true, // what follows is not read
		`{` + prompt + `,"context":[1]}`:                           false,
		`{` + prompt + `,"CONTEXT":[1]}`:                           false,
		`{` + prompt + `,"context":[]}`:                            false, // leaves out the model's own messages
		`{` + prompt + `,"context":null}`:                          true,
		`{` + prompt + `,"raw":true}`:                              false,
		`{` + prompt + `,"raw":false,"raw":null}`:                  true,
		`{` + prompt + `,"suffix":"x"}`:                            false,
		`{` + prompt + `,"suffix":""}`:                             true,
		`{` + prompt + `,"template":"{{ .Prompt }}"}`:              false,
		`{` + prompt + `,"template":""}`:                           true,
		`{` + prompt + `,"images":["aGk="]}`:                       false,
		`{` + prompt + `,"images":[ ]}`:                            true,
		`{` + prompt + `,"_debug_render_only":true}`:               false,
		`{` + prompt + `,"keep_alive":0}`:                          false,
		`{` + prompt + `,"keep_alive":"0s"}`:                       false,
		`{` + prompt + `,"keep_alive":-1}`:                         true,
		`{` + prompt + `,"keep_alive":"10m"}`:                      true,
		`{` + prompt + `,"options":{"num_ctx":"many"}}`:            false,
		`{` + prompt + `,"options":{"num_ctx":0}}`:                 false,
		`{` + prompt + `,"options":[]}`:                            false,
		`{"prompt":` + quote(rubric+"[img-0]") + `}`:               false,
		`{"prompt":` + quote(rubric+"/no_think") + `}`:             false,
		`{"prompt":` + quote(rubric+"<think>") + `}`:               false,
		`{"prompt":` + quote(rubric+"\uFFFD") + `}`:                false,
		`{"prompt":"` + rubric[:600] + "\xff" + `"}`:               false,
		`{"prompt":"` + rubric[:600] + `\ud800"}`:                  false,
		`{"prompt":"` + strings.Repeat("x", 100<<10) + "\n" + `"}`: false, // Ollama refuses it
		`{"prompt":"` + strings.Repeat("x", maxBody) + `"}`:        false,
	} {
		if _, got := read([]byte(body)); got != want {
			t.Errorf("%.80s … %s: %v, want %v", body, body[max(0, len(body)-60):], got, want)
		}
	}
}

// What makes two requests one group.
func TestGroupOf(t *testing.T) {
	base := bodyOf(0, `,"system":"You grade.","options":{"num_ctx":4096,"seed":1}`)
	for body, want := range map[string]bool{
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096,"seed":2,"temperature":1}`):           true,
		bodyOf(1, `,"keep_alive":"1h","system":"You grade.","options":{"top_k":1,"num_ctx":4096}`):        true,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"logprobs":true`):                    true,
		bodyOf(1, `,"system":"You grade!","options":{"num_ctx":4096}`):                                    false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":2048}`):                                    false,
		bodyOf(1, `,"system":"You grade."`):                                                               false,
		bodyOf(1, `,"system":"You grade.","num_ctx":4096`):                                                false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"options":null`):                     false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"think":"low"`):                      false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"format":"json"`):                    false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"shift":false`):                      false,
		bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096},"unknown":1`):                        false,
		strings.Replace(bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096}`), "Grade", "G", 1):  false,
		strings.Replace(bodyOf(1, `,"system":"You grade.","options":{"num_ctx":4096}`), `yes\"`, `\n`, 1): false,
	} {
		a, ok1 := read([]byte(base))
		b, ok2 := read([]byte(body))
		if !ok1 || !ok2 || (a.group == b.group) != want {
			t.Errorf("%s: read %v and %v, want one group: %v", body[len(body)-90:], ok1, ok2, want)
		}
	}
}

// Whatever the body, the attached one is the same request to Ollama but for what attaching is, and the one to render is
// the same but for that.
func FuzzBody(f *testing.F) {
	context := []byte("[1,2,3]")
	f.Fuzz(func(t *testing.T, before, after, rest string) {
		body := []byte("{" + before + `"prompt":` + quote(rubric) + after + "}")
		r, ok := read(body)
		if !ok {
			return
		}
		own, err := decode(body)
		if err != nil {
			return // Ollama refuses it
		}
		if r.prompt != own.Prompt || r.system != own.System {
			t.Errorf("read prompt %q and system %q, Ollama reads %q and %q", r.prompt, r.system, own.Prompt, own.System)
		}
		if own.Context != nil || own.Raw || own.Suffix != "" || len(own.Images) > 0 || own.Template != "" || own.DebugRenderOnly || own.KeepAlive != nil && own.KeepAlive.Duration == 0 {
			t.Errorf("not a request to attach to: %+v", own)
		}
		same := func(name string, got []byte, want api.GenerateRequest) {
			req, err := decode(got)
			if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, got)
			}
			// What replaced an incomplete character on the way is the same text to Ollama.
			if !reflect.DeepEqual(req, want) {
				t.Errorf("%s: Ollama reads\n%+v\nwant\n%+v", name, req, want)
			}
			if bytes.Contains(got, []byte("123456789012345678901234567890")) != bytes.Contains(body, []byte("123456789012345678901234567890")) {
				t.Errorf("%s: a number was changed: %s", name, got)
			}
		}
		rendering := own
		rendering.KeepAlive, rendering.DebugRenderOnly = nil, true
		same("rendering", r.rendering(), rendering)

		with := own
		with.Prompt = strings.ToValidUTF8(rest, "\uFFFD")
		if coded, err := json.Marshal(rest); err != nil || json.Unmarshal(coded, &with.Prompt) != nil {
			t.Fatal(err)
		}
		with.System, with.Template, with.Context = "", passThrough, []int{1, 2, 3}
		same("attached", r.attached(rest, context), with)

		with.KeepAlive, with.DebugRenderOnly = nil, true
		same("attached, rendering", r.rendering(r.attachedChanges(rest, context)...), with)
	})
}

// tokens accepts what encoding/json accepts as integers of 32 bits, and array writes it.
func FuzzTokens(f *testing.F) {
	f.Fuzz(func(t *testing.T, text []byte) {
		got, ok := tokens(text)
		var want []int32
		err := json.Unmarshal(text, &want)
		if err == nil && want != nil {
			if !ok || !reflect.DeepEqual(append([]int32{}, got...), append([]int32{}, want...)) {
				t.Errorf("%s: %v %v, want %v", text, got, ok, want)
			}
		}
		if ok {
			if again, ok := tokens(array(got)); !ok || !reflect.DeepEqual(again, got) {
				t.Errorf("%v written as %s", got, array(got))
			}
		}
	})
}
