package realollama

import (
	"encoding/binary"
	"math"

	"github.com/x448/float16"
)

// weights is how the values of a tensor are stored: one of ggml's types.
type weights uint32

// The types that this package writes, by ggml's numbers.
const (
	f32  weights = 0
	q4_1 weights = 3
	q5_0 weights = 6
	q8_0 weights = 8
	q4_K weights = 12
	q6_K weights = 14
)

// block returns how many values of a row are stored together, and in how many bytes.
func (w weights) block() (values, bytes int) {
	switch w {
	case q4_1:
		return 32, 20
	case q5_0:
		return 32, 22
	case q8_0:
		return 32, 34
	case q4_K:
		return 256, 144
	case q6_K:
		return 256, 210
	}
	return 1, 4
}

// appendRow stores a row of values, whose number is a multiple of a block's, in the formats of
// ggml-common.h (llama.cpp b10865). Values are rounded to the nearest one in a block's scale, which
// is simpler and less exact than llama-quantize.
func (w weights) appendRow(to []byte, row []float32) []byte {
	values, _ := w.block()
	for ; len(row) > 0; row = row[values:] {
		block := row[:values]
		switch w {
		case q4_1:
			to = appendQ4_1(to, block)
		case q5_0:
			to = appendQ5_0(to, block)
		case q8_0:
			to = appendQ8_0(to, block)
		case q4_K:
			to = appendQ4K(to, block)
		case q6_K:
			to = appendQ6K(to, block)
		default:
			to = binary.LittleEndian.AppendUint32(to, math.Float32bits(block[0]))
		}
	}
	return to
}

// appendHalf stores a scale and returns it as it will be read.
func appendHalf(to []byte, v float32) ([]byte, float32) {
	half := float16.Fromfloat32(v)
	return binary.LittleEndian.AppendUint16(to, half.Bits()), half.Float32()
}

// quantum returns v in units of scale, as a whole number within the given range.
func quantum(v, scale float32, lowest, highest int) int {
	if scale == 0 {
		return max(lowest, min(0, highest))
	}
	return max(lowest, min(int(math.RoundToEven(float64(v/scale))), highest))
}

func bounds(values []float32) (lowest, highest, largest float32) {
	lowest, highest = values[0], values[0]
	for _, v := range values {
		lowest, highest = min(lowest, v), max(highest, v)
	}
	return lowest, highest, max(-lowest, highest)
}

// appendQ4_1: a value is scale·q + lowest, q of 4 bits; the second half of the values is in the
// high bits.
func appendQ4_1(to []byte, values []float32) []byte {
	low, high, _ := bounds(values)
	to, scale := appendHalf(to, (high-low)/15)
	to, low = appendHalf(to, low)
	for i := range 16 {
		to = append(to, byte(quantum(values[i]-low, scale, 0, 15)|quantum(values[i+16]-low, scale, 0, 15)<<4))
	}
	return to
}

// appendQ5_0: a value is scale·(q − 16), q of 5 bits, whose fifth ones are together.
func appendQ5_0(to []byte, values []float32) []byte {
	_, _, largest := bounds(values)
	to, scale := appendHalf(to, largest/15)
	var fifth uint32
	var low [16]byte
	for i, v := range values {
		q := quantum(v, scale, -16, 15) + 16
		fifth |= uint32(q>>4) << i
		low[i%16] |= byte(q&15) << (i / 16 * 4)
	}
	return append(binary.LittleEndian.AppendUint32(to, fifth), low[:]...)
}

// appendQ8_0: a value is scale·q, q of 8 bits.
func appendQ8_0(to []byte, values []float32) []byte {
	_, _, largest := bounds(values)
	to, scale := appendHalf(to, largest/127)
	for _, v := range values {
		to = append(to, byte(int8(quantum(v, scale, -127, 127))))
	}
	return to
}

// appendQ4K: eight groups of 32 values, each with a scale s and an offset m of 6 bits; a value is
// scale·s·q − offset·m, q of 4 bits.
func appendQ4K(to []byte, values []float32) []byte {
	var spans, offsets [8]float32
	var span, offset float32
	for i := range 8 {
		low, high, _ := bounds(values[32*i : 32*i+32])
		offsets[i] = max(0, -low)
		spans[i] = (high + offsets[i]) / 15
		span, offset = max(span, spans[i]), max(offset, offsets[i])
	}
	to, scale := appendHalf(to, span/63)
	to, unit := appendHalf(to, offset/63)
	var packed [12]byte
	var quanta [256]int
	for i := range 8 {
		s, m := quantum(spans[i], scale, 0, 63), quantum(offsets[i], unit, 0, 63)
		if i < 4 {
			packed[i] |= byte(s)
			packed[i+4] |= byte(m)
		} else {
			packed[i-4] |= byte(s>>4) << 6
			packed[i] |= byte(m>>4) << 6
			packed[i+4] = byte(s&15 | m&15<<4)
		}
		for j := range 32 {
			quanta[32*i+j] = quantum(values[32*i+j]+unit*float32(m), scale*float32(s), 0, 15)
		}
	}
	to = append(to, packed[:]...)
	for i := 0; i < 256; i += 64 {
		for j := range 32 {
			to = append(to, byte(quanta[i+j]|quanta[i+j+32]<<4))
		}
	}
	return to
}

// appendQ6K: sixteen groups of 16 values, each with a scale s of 8 bits; a value is scale·s·(q −
// 32), q of 6 bits, of which the upper two are apart.
func appendQ6K(to []byte, values []float32) []byte {
	_, _, largest := bounds(values)
	scaleBits, scale := appendHalf(nil, largest/31/127)
	var quanta [256]int
	var groups [16]byte
	for i := range 16 {
		_, _, of := bounds(values[16*i : 16*i+16])
		s := quantum(of/31, scale, 0, 127)
		groups[i] = byte(s)
		for j := range 16 {
			quanta[16*i+j] = quantum(values[16*i+j], scale*float32(s), -32, 31) + 32
		}
	}
	var low [128]byte
	var high [64]byte
	for half := range 2 {
		q := quanta[128*half:]
		for j := range 32 {
			low[64*half+j] = byte(q[j]&15 | q[j+64]&15<<4)
			low[64*half+j+32] = byte(q[j+32]&15 | q[j+96]&15<<4)
			high[32*half+j] = byte(q[j]>>4 | q[j+32]>>4<<2 | q[j+64]>>4<<4 | q[j+96]>>4<<6)
		}
	}
	to = append(append(append(to, low[:]...), high[:]...), groups[:]...)
	return append(to, scaleBits...)
}

// mix is how the matrices of a model's layers are stored, by Ollama's name; the zero value is
// single precision.
type mix string

const (
	mixQ4_1 mix = "Q4_1"
	mixQ8_0 mix = "Q8_0"
	// mixQ4KM has the same types as files of that name, in other proportions. Q5_0 is used where a
	// real model has rows that are not a multiple of 256 values.
	mixQ4KM mix = "Q4_K_M"
)

// fileType is llama.cpp's number of the mix.
func (m mix) fileType() uint32 {
	return map[mix]uint32{mixQ4_1: 3, mixQ8_0: 7, mixQ4KM: 15}[m]
}

// weights returns how a layer's matrix, such as "attn_q", is stored.
func (m mix) weights(matrix string) weights {
	switch m {
	case mixQ4_1:
		return q4_1
	case mixQ8_0:
		return q8_0
	case mixQ4KM:
		switch matrix {
		case "attn_v", "ffn_down":
			return q6_K
		case "attn_output":
			return q5_0
		}
		return q4_K
	}
	return f32
}
