package realollama

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// ggufAlignment is the alignment of tensor data in a GGUF file if the metadata does not set another
// one.
const ggufAlignment = 32

// GGUF's numbers for the value types that this package writes.
const (
	ggufUint32  uint32 = 4
	ggufInt32   uint32 = 5
	ggufFloat32 uint32 = 6
	ggufBool    uint32 = 7
	ggufString  uint32 = 8
	ggufArray   uint32 = 9
)

// keyValue is one metadata entry; its value is a uint32, int32, float32, bool,
// string, []string or []int32.
type keyValue struct {
	key   string
	value any
}

// tensor describes one tensor and writes its data on demand, so that a model
// need not fit in memory.
type tensor struct {
	name string
	// shape is in ggml's order: the length of a row first.
	shape []uint64
	// weights is how its values are stored; the zero value is single precision.
	weights weights
	write   func(w io.Writer) error
}

// size is the length of the tensor's data in bytes.
func (t tensor) size() uint64 {
	n := uint64(1)
	for _, d := range t.shape {
		n *= d
	}
	values, bytes := t.weights.block()
	return n / uint64(values) * uint64(bytes)
}

// writeGGUF writes a version 3 GGUF file, little-endian, with the metadata and tensors in the order
// given.
func writeGGUF(w io.Writer, metadata []keyValue, tensors []tensor) error {
	buffered := bufio.NewWriterSize(w, 1<<20)
	g := &ggufWriter{w: buffered}
	g.raw([]byte("GGUF"))
	g.number(uint32(3))
	g.number(uint64(len(tensors)))
	g.number(uint64(len(metadata)))
	for _, kv := range metadata {
		g.text(kv.key)
		g.value(kv)
	}

	var offset uint64
	for _, t := range tensors {
		g.text(t.name)
		g.number(uint32(len(t.shape)))
		for _, d := range t.shape {
			g.number(d)
		}
		g.number(uint32(t.weights))
		g.number(offset)
		offset += padded(t.size())
	}
	g.pad()

	for _, t := range tensors {
		start := g.written
		if g.err == nil {
			g.err = t.write(g)
		}
		if got := g.written - start; g.err == nil && got != t.size() {
			g.err = fmt.Errorf("tensor %s wrote %d bytes, its shape needs %d", t.name, got, t.size())
		}
		g.pad()
	}
	if g.err != nil {
		return fmt.Errorf("writing gguf: %w", g.err)
	}
	if err := buffered.Flush(); err != nil {
		return fmt.Errorf("writing gguf: %w", err)
	}
	return nil
}

func padded(n uint64) uint64 {
	return (n + ggufAlignment - 1) / ggufAlignment * ggufAlignment
}

// ggufWriter keeps the first error, after which it writes nothing.
type ggufWriter struct {
	w       io.Writer
	written uint64
	err     error
}

func (g *ggufWriter) Write(p []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	n, err := g.w.Write(p)
	g.written += uint64(n)
	g.err = err
	return n, err
}

func (g *ggufWriter) raw(p []byte) {
	// The error is kept in g.err.
	_, _ = g.Write(p)
}

func (g *ggufWriter) pad() {
	g.raw(make([]byte, padded(g.written)-g.written))
}

func (g *ggufWriter) number(v any) {
	if g.err == nil {
		g.err = binary.Write(g, binary.LittleEndian, v)
	}
}

func (g *ggufWriter) text(s string) {
	g.number(uint64(len(s)))
	g.raw([]byte(s))
}

func (g *ggufWriter) value(kv keyValue) {
	switch v := kv.value.(type) {
	case uint32:
		g.number(ggufUint32)
		g.number(v)
	case int32:
		g.number(ggufInt32)
		g.number(v)
	case float32:
		g.number(ggufFloat32)
		g.number(math.Float32bits(v))
	case bool:
		g.number(ggufBool)
		g.number(v)
	case string:
		g.number(ggufString)
		g.text(v)
	case []string:
		g.number(ggufArray)
		g.number(ggufString)
		g.number(uint64(len(v)))
		for _, s := range v {
			g.text(s)
		}
	case []int32:
		g.number(ggufArray)
		g.number(ggufInt32)
		g.number(uint64(len(v)))
		g.number(v)
	default:
		if g.err == nil {
			g.err = fmt.Errorf("metadata %s has the unsupported type %T", kv.key, kv.value)
		}
	}
}
