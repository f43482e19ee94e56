package batch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

const (
	named = 10 // how many of each kind of finding are named
	// tokenBytes is the assumed number of bytes of text per token where nothing was measured:
	// English text, with present vocabularies.
	tokenBytes = 4
	maxModels  = 1000 // that are looked for before the start
)

// Survey describes the input, without sending any of it.
type Survey struct {
	Requests int            // lines or rows that are not blank
	Bad      int            // invalid ones of these
	Models   map[string]int // requests by model, as written
	Text     int64          // bytes of text in all prompts
	Long     int            // prompts that are probably longer than their num_ctx: Ollama cuts them silently
	Repeated int            // lines whose custom_id an earlier one has

	BadLines  []error // the first of each
	LongLines []int
	Repeats   []string // as custom_id and line
}

// TakeSurvey reads the whole input. each, if non-nil, is called for every invalid line.
func TakeSurvey(ctx context.Context, s *Source, each func(error)) (*Survey, error) {
	v := &Survey{Models: map[string]int{}}
	reader := prefix.NewReader()
	seed := maphash.MakeSeed()
	ids := map[uint64]struct{}{} // hashes: some twenty bytes for each
	for it, err := range s.items() {
		if err != nil {
			return nil, fmt.Errorf("reading the input: %w", err)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		v.Requests++
		r, err := s.request(it)
		if _, fatal := badLine(err); fatal != nil {
			return nil, fatal
		}
		if id := compacted(r.customID); id != nil {
			hash := maphash.Bytes(seed, id)
			if _, repeated := ids[hash]; repeated {
				count(&v.Repeated, &v.Repeats, fmt.Sprintf("%s (line %d)", id, it.line))
			}
			ids[hash] = struct{}{}
		}
		if err != nil {
			count(&v.Bad, &v.BadLines, err)
			if each != nil {
				each(err)
			}
			continue
		}
		if _, known := v.Models[r.model]; known || len(v.Models) < maxModels {
			v.Models[r.model]++
		}
		chain := reader.Read(r.endpoint, r.runner(), r.body)
		v.Text += int64(chain.Bytes())
		if n := chain.Runner.NumCtx(); n > 0 && chain.Bytes()/tokenBytes > n {
			count(&v.Long, &v.LongLines, it.line)
		}
	}
	return v, nil
}

// count counts one more, and keeps it if it is among the first.
func count[T any](n *int, first *[]T, one T) {
	if *n++; len(*first) < named {
		*first = append(*first, one)
	}
}

// badLine tells an error in a line from an error of reading.
func badLine(err error) (bad, fatal error) {
	var line *lineError
	if errors.As(err, &line) {
		return line, nil
	}
	return nil, err
}

// AbsentModels returns the models of the survey that the server lacks, sorted.
func (c *Config) AbsentModels(ctx context.Context, v *Survey) ([]string, error) {
	cl := c.client()
	var absent []string
	for _, model := range slices.Sorted(maps.Keys(v.Models)) {
		body, err := json.Marshal(api.ShowRequest{Model: model})
		if err != nil {
			panic(err) // a string
		}
		_, err = cl.call(ctx, http.MethodPost, "/api/show", body)
		var status api.StatusError
		switch {
		case errors.As(err, &status) && (status.StatusCode == http.StatusNotFound || status.StatusCode == http.StatusBadRequest):
			absent = append(absent, model)
		case errors.As(err, &status) && status.StatusCode == http.StatusUnauthorized:
			return nil, fmt.Errorf("asking for model %s: %w", model, err)
		case err != nil && status.StatusCode == 0:
			return nil, fmt.Errorf("%w at %s: %v", ErrUnreachable, c.Server, err)
		}
	}
	return absent, nil
}

// lines formats some lines.
func lines[T any](some []T, of int) string {
	var b strings.Builder
	for i, n := range some {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, n)
	}
	if of > len(some) {
		b.WriteString(", …")
	}
	return b.String()
}
