package batches

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/batch"
)

// FuzzInput: whatever the input is, errors name lines that it has, and an input without errors is
// understood by package batch alike: as many requests, of the same models.
func FuzzInput(f *testing.F) {
	f.Add([]byte(chats(2)))
	f.Add([]byte("\xef\xbb\xbf" + chats(1) + "\n\n{"))
	f.Add([]byte(`{"custom_id":"1","custom_id":null,"METHOD":"post","url":"/v1/chat/completions","body":{"model":"m","Model":"n"}}`))
	f.Add([]byte("{\"custom_id\":\"\\ud800\"}\r\n[]\n\"\\u0000\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		in, err := readInput(t.Context(), bytes.NewReader(text), "/v1/chat/completions")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range in.errors {
			if e.Line != nil && (*e.Line < 1 || *e.Line > bytes.Count(text, []byte("\n"))+1) || e.Message == "" {
				t.Errorf("%+v", e)
			}
		}
		if len(in.errors) > 0 {
			return
		}
		path := filepath.Join(t.TempDir(), "in.jsonl")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		source, err := batch.OpenLines(path, nil, batch.UTF8)
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		survey, err := batch.TakeSurvey(t.Context(), source, nil)
		if err != nil {
			t.Fatal(err)
		}
		if survey.Requests != in.requests || survey.Repeated > 0 {
			t.Errorf("%d requests, package batch finds %d, %d of them repeated", in.requests, survey.Requests, survey.Repeated)
		}
		for model := range survey.Models {
			if in.models[model] == 0 {
				t.Errorf("package batch finds the model %q, which was not looked for", model)
			}
		}
	})
}
