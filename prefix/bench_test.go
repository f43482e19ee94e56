package prefix

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/cespare/xxhash/v2"
	"github.com/ollama/ollama/api"
)

// BenchmarkRead reads the chain of a chat with a long user message, at 8 KB to 64 MiB, compared
// with decoding it into Ollama's own type and hashing the texts.
func BenchmarkRead(b *testing.B) {
	for _, size := range []int{8 << 10, 1 << 20, 64 << 20} {
		body := chatBody(size)
		name := fmt.Sprintf("%dKiB", size>>10)
		b.Run(name+"/chain", func(b *testing.B) {
			r := NewReader()
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if c := r.Read(Chat, "m", body); len(c.Links) < 4 {
					b.Fatal(c)
				}
			}
		})
		b.Run(name+"/unmarshal", func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				var req api.ChatRequest
				if err := json.Unmarshal(body, &req); err != nil {
					b.Fatal(err)
				}
				for _, m := range req.Messages {
					xxhash.Sum64String(m.Content)
				}
			}
		})
	}
}

// chatBody is a chat with a system prompt, a long user message with a newline every 75 bytes, and a
// short one.
func chatBody(size int) []byte {
	var text []byte
	for i := 0; len(text) < size; i++ {
		text = fmt.Appendf(text, "%d. Score the candidate from 1 to 10 and explain why in one sentence.\n", i)
	}
	body, err := json.Marshal(map[string]any{
		"model":    "m",
		"messages": []map[string]string{{"role": "system", "content": "You are a recruiter."}, {"role": "user", "content": string(text)}, {"role": "user", "content": "And now?"}},
		"options":  map[string]any{"temperature": 0, "num_ctx": 8192},
		"stream":   false,
	})
	if err != nil {
		panic(err)
	}
	return body
}
