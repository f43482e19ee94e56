package realollama

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// BenchmarkEvaluate measures the cost of a prompt that no cache holds, in milliseconds per 1,000
// tokens as Ollama reports them, and the cost of a generated token. docs/real-ollama.md has its
// figures.
func BenchmarkEvaluate(b *testing.B) {
	for _, version := range Versions() {
		for _, model := range ModelNames() {
			if model == "gen-llama-embed" {
				continue
			}
			b.Run(version+"/"+model, func(b *testing.B) {
				s := Start(b, Config{Version: version, Models: []string{model}})
				generate(b, s, model, "load", 1)
				var evaluating, generating time.Duration
				var evaluated, generated int
				for n := 0; b.Loop(); n++ {
					// About 1,000 tokens of each vocabulary, with a new beginning each time.
					const sentence = "the document is about the town and the world and the people in it "
					sentences := 70
					if strings.HasPrefix(model, "gen-") {
						sentences = 42
					}
					a := generate(b, s, model, fmt.Sprintf("%d ", n)+strings.Repeat(sentence, sentences), 16)
					evaluating += time.Duration(a.Duration)
					evaluated += a.Count
					generating += time.Duration(a.Generating)
					generated += a.Generated
				}
				b.ReportMetric(float64(evaluating.Milliseconds())*1000/float64(evaluated), "ms/1000-tokens")
				b.ReportMetric(float64(generating.Microseconds())/1000/float64(max(1, generated)), "ms/answer-token")
				b.ReportMetric(float64(evaluated)/float64(b.N), "tokens/prompt")
			})
		}
	}
}
