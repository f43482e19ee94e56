package realollama

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ollama/ollama/fs/gguf"
	"github.com/x448/float16"
)

// readRow reads what appendRow stores, value by value, by the formulas of ggml-quants.c (the
// functions dequantize_row_*).
func readRow(w weights, stored []byte) []float32 {
	half := func(at []byte) float32 { return float16.Frombits(binary.LittleEndian.Uint16(at)).Float32() }
	values, size := w.block()
	var row []float32
	for block := range slices.Chunk(stored, size) {
		for i := range values {
			var v float32
			switch w {
			case f32:
				v = math.Float32frombits(binary.LittleEndian.Uint32(block))
			case q4_1:
				q := block[4+i%16] >> (4 * (i / 16)) & 15
				v = half(block)*float32(q) + half(block[2:])
			case q5_0:
				q := int(block[6+i%16]>>(4*(i/16))&15) | int(binary.LittleEndian.Uint32(block[2:])>>i&1)<<4
				v = half(block) * float32(q-16)
			case q8_0:
				v = half(block) * float32(int8(block[2+i]))
			case q4_K:
				group, packed := i/32, block[4:16]
				s, m := packed[group%4]&63, packed[group%4+4]&63
				if group >= 4 {
					s = packed[group+4]&15 | packed[group-4]>>6<<4
					m = packed[group+4]>>4 | packed[group]>>6<<4
				}
				q := block[16+i/64*32+i%32] >> (4 * (i / 32 % 2)) & 15
				v = half(block)*float32(s)*float32(q) - half(block[2:])*float32(m)
			case q6_K:
				j, quarter := i%32, i%128/32
				low := block[i/128*64+j+quarter%2*32] >> (4 * (quarter / 2)) & 15
				high := block[128+i/128*32+j] >> (2 * quarter) & 3
				v = half(block[208:]) * float32(int8(block[192+i/16])) * float32(int(low|high<<4)-32)
			}
			row = append(row, v)
		}
	}
	return row
}

func TestWeightsAreReadAsTheyWereStored(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	row := make([]float32, 1024)
	for i := range row {
		row[i] = float32(r.Float64()*2 - 1)
	}
	// The largest error, in values from -1 to 1: half a step, and for the K types as much again for
	// the rounding of their groups' scales.
	for w, most := range map[weights]float32{f32: 0, q4_1: 0.068, q5_0: 0.069, q8_0: 0.0041, q4_K: 0.14, q6_K: 0.034} {
		got := readRow(w, w.appendRow(nil, row))
		if len(got) != len(row) {
			t.Fatalf("type %d: %d values of %d", w, len(got), len(row))
		}
		worst, at := float32(0), 0
		for i, v := range got {
			if e := max(v-row[i], row[i]-v); e > worst {
				worst, at = e, i
			}
		}
		if worst > most {
			t.Errorf("type %d: value %d is %v, stored as %v", w, at, row[at], got[at])
		}
		zeros := w.appendRow(nil, make([]float32, 256))
		if v := readRow(w, zeros); slices.Max(v) != 0 || slices.Min(v) != 0 {
			t.Errorf("type %d: zeros are from %v to %v", w, slices.Min(v), slices.Max(v))
		}
	}
}

// TestProbeCoversWeights: the probe's models have each type of weights that any model of the tests
// has. A server that cannot compute with one of them must fail its probe, not a test.
func TestProbeCoversWeights(t *testing.T) {
	c, err := OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	kinds := func(name string) []string {
		path, err := c.Model(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := gguf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var all []string
		for _, info := range f.TensorInfos() {
			all = append(all, strings.ToUpper(fmt.Sprint(info.Type)))
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	var probed []string
	for _, name := range probeModels {
		probed = append(probed, kinds(name)...)
	}
	for _, want := range []string{"F32", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0"} {
		if !slices.Contains(probed, want) {
			t.Errorf("no probe with weights of type %s: the probe's models have %v", want, probed)
		}
	}
	for _, name := range ModelNames() {
		for _, kind := range kinds(name) {
			if !slices.Contains(probed, kind) {
				t.Errorf("the model %s has weights of type %s, which no probe has", name, kind)
			}
		}
	}
}
