package savings

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// benchmarkReader reads one answer per iteration, in pieces as the transport's reads return them.
func benchmarkReader(b *testing.B, d Dialect, contentType string, pieces [][]byte, want Answer) {
	size := 0
	for _, p := range pieces {
		size += len(p)
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		r := NewReader(d, contentType, false)
		for _, p := range pieces {
			r.Write(p)
		}
		if a := r.Answer(); a.Total != want.Total || a.Generated != want.Generated {
			b.Fatalf("%+v", a)
		}
		r.Release()
	}
}

// proxyReads splits a body into the proxy's reads.
func proxyReads(body []byte) [][]byte {
	var pieces [][]byte
	for len(body) > 0 {
		n := min(len(body), 32<<10)
		pieces, body = append(pieces, body[:n]), body[n:]
	}
	return pieces
}

func BenchmarkReader(b *testing.B) {
	const (
		line     = `{"model":"llama3.2:3b","created_at":"2026-01-02T03:04:05.123456789Z","message":{"role":"assistant","content":" river"},"done":false}` + "\n"
		lastLine = `{"model":"llama3.2:3b","created_at":"2026-01-02T03:04:05.123456789Z","message":{"role":"assistant","content":""},"done":true,` +
			`"done_reason":"stop","total_duration":5258704,"load_duration":1969927,"prompt_eval_count":46,"prompt_eval_cached_count":45,` +
			`"prompt_eval_duration":516000,"eval_count":20,"eval_duration":804000}` + "\n"
		event = `data: {"id":"chatcmpl-351","object":"chat.completion.chunk","created":1795595570,"model":"llama3.2:3b",` +
			`"system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"content":" river"},"finish_reason":null}]}` + "\n\n"
		usage = `data: {"id":"chatcmpl-351","object":"chat.completion.chunk","created":1795595570,"model":"llama3.2:3b",` +
			`"system_fingerprint":"fp_ollama","choices":[],"usage":{"prompt_tokens":46,"prompt_tokens_details":{"cached_tokens":45},` +
			`"completion_tokens":20,"total_tokens":66}}` + "\n\n"
		done = "data: [DONE]\n\n"
	)
	want := Answer{Total: 46, Generated: 20}
	stream := func(chunk string, n int, end ...string) [][]byte {
		pieces := bytes.SplitAfter([]byte(strings.Repeat(chunk, n)), []byte(chunk))[:n]
		for _, e := range end {
			pieces = append(pieces, []byte(e))
		}
		return pieces
	}
	b.Run("lines-20", func(b *testing.B) {
		benchmarkReader(b, Native, "application/x-ndjson", stream(line, 20, lastLine), want)
	})
	b.Run("lines-2000", func(b *testing.B) {
		benchmarkReader(b, Native, "application/x-ndjson", stream(line, 2000, lastLine), want)
	})
	b.Run("events-20", func(b *testing.B) {
		benchmarkReader(b, OpenAI, "text/event-stream", stream(event, 20, usage, done), want)
	})
	b.Run("events-2000", func(b *testing.B) {
		benchmarkReader(b, OpenAI, "text/event-stream", stream(event, 2000, usage, done), want)
	})

	text := strings.Repeat("the river runs under the bridge,\\n", 1_000_000/34)
	body := strings.Replace(lastLine, `"content":""`, `"content":"`+text+`"`, 1)
	b.Run("body-1MB", func(b *testing.B) { benchmarkReader(b, Native, "application/json", proxyReads([]byte(body)), want) })

	context := strings.Repeat("12345,", 128<<10)
	body = line + strings.Replace(lastLine, `"total_duration"`, fmt.Sprintf(`"context":[%s1],"total_duration"`, context), 1)
	b.Run("context-128k", func(b *testing.B) { benchmarkReader(b, Native, "application/x-ndjson", proxyReads([]byte(body)), want) })
}

// BenchmarkCopy measures the cost of copying the same bytes.
func BenchmarkCopy(b *testing.B) {
	from, to := make([]byte, 32<<10), make([]byte, 32<<10)
	b.SetBytes(int64(len(from)))
	for b.Loop() {
		copy(to, from)
	}
}
