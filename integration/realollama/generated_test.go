package realollama

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ollama/ollama/fs/gguf"
)

func TestGeneratedFileReadsBackWithOllama(t *testing.T) {
	for _, arch := range []string{"llama", "qwen3", "gemma3"} {
		t.Run(arch, func(t *testing.T) {
			m := generated{arch: arch, hidden: 64, layers: 1, ff: 96, heads: 2, kvHeads: 1, headDim: 32, seed: 5}
			var first, second bytes.Buffer
			if err := m.writeTo(&first); err != nil {
				t.Fatal(err)
			}
			if err := m.writeTo(&second); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(first.Bytes(), second.Bytes()) {
				t.Error("two writes of one model differ")
			}
			path := filepath.Join(t.TempDir(), "model.gguf")
			if err := os.WriteFile(path, first.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			f, err := gguf.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := f.KeyValue("general.architecture").String(); got != arch {
				t.Errorf("architecture %q", got)
			}
			if got := f.KeyValue("context_length").Uint(); got != generatedContext {
				t.Errorf("context length %d", got)
			}
			if got := f.KeyValue("tokenizer.ggml.merges").Strings(); len(got) != generatedMerges {
				t.Errorf("%d merges", len(got))
			}
			var weights uint64
			for _, info := range f.TensorInfos() {
				n := uint64(1)
				for _, d := range info.Shape {
					n *= d
				}
				weights += n
			}
			if weights != m.parameters() {
				t.Errorf("the file has %d weights, want %d", weights, m.parameters())
			}
			if err := f.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestWriteGGUFRefusesBadInput(t *testing.T) {
	var out bytes.Buffer
	if err := writeGGUF(&out, []keyValue{{"k", 1.5}}, nil); err == nil || !strings.Contains(err.Error(), "float64") {
		t.Errorf("an unsupported value gave %v", err)
	}
	short := generated{}.constant("t", 3, 1, 1)
	short.shape = []uint64{4}
	if err := writeGGUF(&out, nil, []tensor{short}); err == nil || !strings.Contains(err.Error(), "tensor t wrote 12 bytes") {
		t.Errorf("a tensor of the wrong size gave %v", err)
	}
}

func TestMatrixHasItsDeviationAndSilentRow(t *testing.T) {
	const columns, rows = 128, 64
	var out bytes.Buffer
	if err := (generated{seed: 1}).matrix("m", f32, columns, rows, 2, true).write(&out); err != nil {
		t.Fatal(err)
	}
	values := make([]float32, columns*rows)
	if err := binary.Read(&out, binary.LittleEndian, values); err != nil {
		t.Fatal(err)
	}
	for _, v := range values[:columns] {
		if v != 0 {
			t.Fatalf("the first row has %v", v)
		}
	}
	var squares float64
	for _, v := range values[columns:] {
		squares += float64(v) * float64(v)
	}
	want := 2 / math.Sqrt(columns)
	if got := math.Sqrt(squares / (columns * (rows - 1))); math.Abs(got-want) > 0.02*want {
		t.Errorf("the deviation is %v, want %v", got, want)
	}
}

func TestVocabulary(t *testing.T) {
	v := newVocabulary(generatedMerges)
	if len(v.merges) != generatedMerges {
		t.Errorf("the text has only %d merges", len(v.merges))
	}
	seen := map[string]bool{}
	for _, token := range v.tokens {
		if seen[token] {
			t.Errorf("token %q is there twice", token)
		}
		seen[token] = true
	}
	for _, merge := range v.merges {
		left, right, _ := strings.Cut(merge, " ")
		if !seen[left] || !seen[right] || !seen[left+right] {
			t.Errorf("merge %q uses an unknown token", merge)
		}
	}
	for b, want := range map[byte]string{'a': "a", ' ': "Ġ", '\n': "Ċ", 0: "Ā", 0xad: "Ń", 0xff: "ÿ"} {
		if got := byteSymbol(b); got != want {
			t.Errorf("byte %#x is %q, want %q", b, got, want)
		}
	}
	for i, token := range v.tokens {
		if v.speakable[i] && (token == tokenEnd || strings.ContainsFunc(token, func(r rune) bool { return r > 0x120 })) {
			t.Errorf("a model may say %q", token)
		}
	}
}
