package answers

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// BenchmarkIdentify reads bodies of chats whose members are known.
func BenchmarkIdentify(b *testing.B) {
	for _, kind := range []struct{ name, line string }{
		{"plain", "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "},
		{"escapes", `The quick \"brown\" fox\njumps over the lazy dog,\n\tand the dog sl\u00e9eps on. `},
	} {
		for _, size := range []int{8 << 10, 64 << 10} {
			message := `{"role":"user","content":"` + strings.Repeat(kind.line, 2048/len(kind.line)) + `"},`
			body := []byte(`{"model":"m","messages":[` + strings.Repeat(message, size/2048) +
				`{"role":"user","content":"?"}],"options":{"temperature":0,"num_ctx":8192},"stream":false}`)
			var members []jsonscan.Member
			o := jsonscan.NewObject(body)
			for m, ok := o.Next(); ok; m, ok = o.Next() {
				members = append(members, m)
			}
			b.Run(fmt.Sprintf("%s/%dK", kind.name, size>>10), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(len(body)))
				for b.Loop() {
					if id := Identify(prefix.Chat, body, members, o.Long(), Defaults{}); !id.Deterministic {
						b.Fatal(id)
					}
				}
			})
		}
	}
}

// BenchmarkMakeKey makes the key of a request.
func BenchmarkMakeKey(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		MakeKey([32]byte{}, Text, "0123456789abcdef0123456789abcdef", "/api/chat", "m", "sha256:0123456789abcdef", "0.34.1", "", "1", "")
	}
}
