package prefix

import (
	"fmt"
	"strconv"
)

// Options are the runner options that a request states: those with which a model is loaded, so that a request with other
// ones makes Ollama load it again. The zero value states none. It is comparable.
type Options struct {
	Model  string // upstream.ModelKey
	set    uint16
	values [numOptions]int64
}

const (
	numCtx = iota
	numBatch
	numGPU
	mainGPU
	useMMap
	numThread
	draftNumPredict
	shift
	numOptions
)

var optionNames = [numOptions]string{"num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict", "shift"}

// NumCtx returns the stated context length in tokens, 0 where none is stated.
func (o Options) NumCtx() int { return int(o.values[numCtx]) }

// Change is one runner option that differs between two requests. "default" stands for an option that is not stated.
type Change struct{ Option, From, To string }

func (c Change) String() string { return fmt.Sprintf("%s from %s to %s", c.Option, c.From, c.To) }

// Changes returns how the options differ from an earlier request's, the model aside.
func (o Options) Changes(from Options) []Change {
	var changes []Change
	for i, name := range optionNames {
		if o.value(i) != from.value(i) {
			changes = append(changes, Change{name, from.value(i), o.value(i)})
		}
	}
	return changes
}

func (o *Options) put(i int, v int64) {
	o.set |= 1 << i
	o.values[i] = v
}

func (o Options) value(i int) string {
	switch {
	case o.set&(1<<i) == 0:
		return "default"
	case i == useMMap || i == shift:
		return strconv.FormatBool(o.values[i] != 0)
	}
	return strconv.FormatInt(o.values[i], 10)
}

func (o *Options) drop(i int) {
	o.set &^= 1 << i
	o.values[i] = 0
}
