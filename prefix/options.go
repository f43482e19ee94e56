package prefix

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"github.com/cespare/xxhash/v2"
)

// Options are the runner options that a request states. Ollama loads a model with them, and loads
// it again for a request with different ones. The zero value states none. Options are comparable.
type Options struct {
	Model  string // upstream.ModelKey; in package runners, the key of the weights
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

// NumCtx returns the stated context length in tokens, or 0.
func (o Options) NumCtx() int { return int(o.values[numCtx]) }

// WithContext returns the options with this context length, in tokens.
func (o Options) WithContext(tokens int) Options {
	o.set |= 1 << numCtx
	o.values[numCtx] = int64(tokens)
	return o
}

// WithoutContext returns the options without a context length.
func (o Options) WithoutContext() Options {
	o.drop(numCtx)
	return o
}

// MarshalJSON writes the options as an object, for other proxies: the model, and what is stated.
func (o Options) MarshalJSON() ([]byte, error) {
	stated := map[string]int64{}
	for i, name := range optionNames {
		if o.set&(1<<i) != 0 {
			stated[name] = o.values[i]
		}
	}
	return json.Marshal(optionsJSON{o.Model, stated})
}

// UnmarshalJSON reads what MarshalJSON writes. With an option that it does not know, since another
// version wrote it, they become the zero value, which is of no model: the rest would be others.
func (o *Options) UnmarshalJSON(text []byte) error {
	var from optionsJSON
	if err := json.Unmarshal(text, &from); err != nil {
		return err
	}
	*o = Options{Model: from.Model}
	for name, v := range from.Stated {
		i := slices.Index(optionNames[:], name)
		if i < 0 {
			*o = Options{}
			break
		}
		o.put(i, v)
	}
	return nil
}

type optionsJSON struct {
	Model  string           `json:"model"`
	Stated map[string]int64 `json:"stated,omitempty"`
}

// Change is one runner option that differs between two requests. An option that is not stated has
// the value "default".
type Change struct{ Option, From, To string }

func (c Change) String() string { return fmt.Sprintf("%s from %s to %s", c.Option, c.From, c.To) }

// Changes returns the differences from an earlier request's options, except for the model.
func (o Options) Changes(from Options) []Change {
	var changes []Change
	for i, name := range optionNames {
		if o.value(i) != from.value(i) {
			changes = append(changes, Change{name, from.value(i), o.value(i)})
		}
	}
	return changes
}

// hash returns a fingerprint of the options without the model; 0 if none is stated.
func (o Options) hash() uint64 {
	if o.set == 0 {
		return 0
	}
	stated := binary.LittleEndian.AppendUint16(make([]byte, 0, 2+8*numOptions), o.set)
	for _, v := range o.values {
		stated = binary.LittleEndian.AppendUint64(stated, uint64(v))
	}
	return xxhash.Sum64(stated)
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

// Set states an option, with its value in a Modelfile's form. It returns false if the name is no
// runner option or the value is invalid.
func (o *Options) Set(name, text string) bool {
	i := option(name)
	return i >= 0 && o.parse(i, text)
}

// option returns the index of an option in optionNames, or -1 if an options object cannot have it.
func option(name string) int { return slices.Index(optionNames[:shift], name) }

// parse sets an option from a number, true or false. A negative num_gpu counts as not stated.
func (o *Options) parse(i int, text string) bool {
	switch text {
	case "true":
		o.put(i, 1)
	case "false":
		o.put(i, 0)
	default:
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return false
		}
		if o.put(i, int64(v)); i == numGPU && v < 0 {
			o.drop(i)
		}
	}
	return true
}

// Over returns the options, with unstated ones taken from defaults. The model stays.
func (o Options) Over(defaults Options) Options {
	for i := range o.values {
		if defaults.set&^o.set&(1<<i) != 0 {
			o.put(i, defaults.values[i])
		}
	}
	return o
}

// Request returns the options and the shift with which a request states the same.
func (o Options) Request() (options map[string]any, shifts *bool) {
	for i, name := range optionNames {
		if o.set&(1<<i) == 0 {
			continue
		}
		var value any = o.values[i]
		switch i {
		case shift:
			on := o.values[i] != 0
			shifts = &on
			continue
		case useMMap:
			value = o.values[i] != 0
		}
		if options == nil {
			options = map[string]any{}
		}
		options[name] = value
	}
	return options, shifts
}

func (o *Options) drop(i int) {
	o.set &^= 1 << i
	o.values[i] = 0
}
