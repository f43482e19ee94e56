package realollama

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"strings"
)

// generated describes a model with random weights. The same description gives the same file, byte
// for byte, everywhere.
//
// Weights are in single precision unless a mix is set. With quantized weights llama.cpp rounds the
// values that it multiplies them with, so the answer to a prompt depends on whether a cache has a
// part of it or all is evaluated in one batch.
type generated struct {
	arch    string // llama, qwen3 or gemma3
	hidden  int
	layers  int
	ff      int
	heads   int
	kvHeads int
	headDim int
	seed    uint64
	// embeds marks an embedding model, with mean pooling.
	embeds bool
	// mix is how the layers' matrices are stored; the zero value is single precision.
	mix mix
}

const (
	// generatedFormat is increased with every change to the written files, so that cached files of
	// older formats are no longer used.
	generatedFormat = 3

	generatedContext = 131072
	// generatedWindow is the sliding window of gemma3, as in its small real models.
	generatedWindow = 512
	generatedMerges = 128
)

// Gains of the random matrices, relative to the one that preserves the scale of values that pass
// through. Attention is made sharp, so that an answer depends on single tokens far back and does
// not fall into a short loop.
const (
	gainAttention = 1.6
	gainOther     = 1.0
	// logitSpread is the standard deviation of the logits.
	logitSpread = 3
	// biasChannel is the value of channel 0 in every embedding. No layer
	// writes to this channel, which makes it a constant input: the output
	// layer uses it to forbid tokens.
	biasChannel = 4
	forbidden   = -100
)

// parameters is the number of weights.
func (m generated) parameters() uint64 {
	var n uint64
	for _, t := range m.tensors(newVocabulary(generatedMerges)) {
		count := uint64(1)
		for _, d := range t.shape {
			count *= d
		}
		n += count
	}
	return n
}

func (m generated) writeTo(w io.Writer) error {
	v := newVocabulary(generatedMerges)
	return writeGGUF(w, m.metadata(v), m.tensors(v))
}

func (m generated) metadata(v *vocabulary) []keyValue {
	kv := []keyValue{
		{"general.architecture", m.arch},
		{"general.name", fmt.Sprintf("random %s, seed %d, %s", m.arch, m.seed, m.quantized())},
		{"general.file_type", m.mix.fileType()},
	}
	own := func(key string, value any) {
		kv = append(kv, keyValue{m.arch + "." + key, value})
	}
	own("context_length", uint32(generatedContext))
	own("embedding_length", uint32(m.hidden))
	own("block_count", uint32(m.layers))
	own("feed_forward_length", uint32(m.ff))
	own("attention.head_count", uint32(m.heads))
	own("attention.head_count_kv", uint32(m.kvHeads))
	own("attention.key_length", uint32(m.headDim))
	own("attention.value_length", uint32(m.headDim))
	own("attention.layer_norm_rms_epsilon", float32(1e-6))
	own("rope.freq_base", float32(1e6))
	own("vocab_size", uint32(len(v.tokens)))
	if m.embeds {
		own("pooling_type", uint32(1))
	}
	switch m.arch {
	case "llama":
		own("rope.dimension_count", uint32(m.headDim))
	case "gemma3":
		own("attention.sliding_window", uint32(generatedWindow))
	}
	return append(kv,
		keyValue{"tokenizer.ggml.model", "gpt2"},
		keyValue{"tokenizer.ggml.pre", "qwen2"},
		keyValue{"tokenizer.ggml.tokens", v.tokens},
		keyValue{"tokenizer.ggml.token_type", v.types},
		keyValue{"tokenizer.ggml.merges", v.merges},
		keyValue{"tokenizer.ggml.bos_token_id", v.id(tokenEndOfText)},
		keyValue{"tokenizer.ggml.eos_token_id", v.id(tokenEnd)},
		keyValue{"tokenizer.ggml.padding_token_id", v.id(tokenEndOfText)},
		keyValue{"tokenizer.ggml.add_bos_token", false},
	)
}

func (m generated) tensors(v *vocabulary) []tensor {
	// gemma3 multiplies embeddings by the square root of their width.
	scale := 1.0
	if m.arch == "gemma3" {
		scale = 1 / math.Sqrt(float64(m.hidden))
	}
	all := []tensor{
		m.random2D("token_embd.weight", f32, m.hidden, len(v.tokens), scale, func(_, column int) (float64, bool) {
			return biasChannel * scale, column == 0
		}),
		m.constant("output_norm.weight", m.hidden, 1, 1),
		m.random2D("output.weight", f32, m.hidden, len(v.tokens), logitSpread/math.Sqrt(float64(m.hidden)), func(row, column int) (float64, bool) {
			if v.speakable[row] {
				return 0, column == 0
			}
			return forbidden, column == 0
		}),
	}
	for i := range m.layers {
		block := func(name string) string { return fmt.Sprintf("blk.%d.%s.weight", i, name) }
		matrix := func(name string, columns, rows int, gain float64, silentFirst bool) tensor {
			return m.matrix(block(name), m.mix.weights(name), columns, rows, gain, silentFirst)
		}
		qSize, kvSize := m.heads*m.headDim, m.kvHeads*m.headDim
		all = append(all,
			m.constant(block("attn_norm"), m.hidden, 1, 1),
			matrix("attn_q", m.hidden, qSize, gainAttention, false),
			matrix("attn_k", m.hidden, kvSize, gainAttention, false),
			matrix("attn_v", m.hidden, kvSize, gainOther, false),
			matrix("attn_output", qSize, m.hidden, gainOther, true),
			m.constant(block("ffn_norm"), m.hidden, 1, 1),
			matrix("ffn_gate", m.hidden, m.ff, gainOther, false),
			matrix("ffn_up", m.hidden, m.ff, gainOther, false),
			matrix("ffn_down", m.ff, m.hidden, gainOther, true),
		)
		if m.arch == "qwen3" || m.arch == "gemma3" {
			all = append(all,
				m.constant(block("attn_q_norm"), m.headDim, gainAttention, gainAttention),
				m.constant(block("attn_k_norm"), m.headDim, gainAttention, gainAttention))
		}
		if m.arch == "gemma3" {
			all = append(all,
				m.constant(block("post_attention_norm"), m.hidden, 1, 0),
				m.constant(block("post_ffw_norm"), m.hidden, 1, 0))
		}
	}
	return all
}

// random is the source of one tensor's weights.
func (m generated) random(name string) *rand.PCG {
	h := fnv.New64a()
	_, _ = io.WriteString(h, m.arch+"/"+name)
	return rand.NewPCG(m.seed, h.Sum64())
}

// constant is a vector of one value, except for its first channel.
func (m generated) constant(name string, n int, value, first float32) tensor {
	return tensor{name: name, shape: []uint64{uint64(n)}, write: func(w io.Writer) error {
		values := make([]float32, n)
		for i := range values {
			values[i] = value
		}
		values[0] = first
		return binary.Write(w, binary.LittleEndian, values)
	}}
}

// random2D is a matrix of uniform random values with the given standard
// deviation; fixed may set single values.
func (m generated) random2D(name string, stored weights, columns, rows int, deviation float64, fixed func(row, column int) (float64, bool)) tensor {
	return tensor{name: name, shape: []uint64{uint64(columns), uint64(rows)}, weights: stored, write: func(w io.Writer) error {
		r := m.random(name)
		values := make([]float32, columns)
		var row []byte
		for i := range rows {
			for column := range values {
				uniform := float64(r.Uint64()>>11)/(1<<52) - 1
				values[column] = float32(uniform * deviation * math.Sqrt(3))
				if v, ok := fixed(i, column); ok {
					values[column] = float32(v)
				}
			}
			row = stored.appendRow(row[:0], values)
			if _, err := w.Write(row); err != nil {
				return err
			}
		}
		return nil
	}}
}

// matrix is a matrix from columns inputs to rows outputs. Its first output is
// always zero if silentFirst.
func (m generated) matrix(name string, stored weights, columns, rows int, gain float64, silentFirst bool) tensor {
	return m.random2D(name, stored, columns, rows, gain/math.Sqrt(float64(columns)), func(row, _ int) (float64, bool) {
		return 0, silentFirst && row == 0
	})
}

// quantized is Ollama's name for how the weights are stored.
func (m generated) quantized() string { return string(cmp.Or(m.mix, "F32")) }

// sizeName is a number of weights as Ollama shows it.
func sizeName(n uint64) string {
	if n >= 1e8 {
		return fmt.Sprintf("%dM", n/1e6)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(n)/1e6), ".0") + "M"
}
