package proxy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// PerModel is a choice for all models, and other ones for single models. The zero value is the first
// of W's choices for all.
type PerModel[W choice[W]] struct {
	Default W            // "" is the first of the choices
	Models  map[string]W // by upstream.ModelKey; overrides Default
}

// choice is a type whose values are a few words.
type choice[W any] interface {
	~string
	choices() []W
}

// For returns the choice for a model (upstream.ModelKey).
func (p PerModel[W]) For(model string) W {
	w, ok := p.Models[model]
	if !ok {
		w = p.Default
	}
	return cmp.Or(w, w.choices()[0])
}

// String lists the settings in the form that parsePerModel reads.
func (p PerModel[W]) String() string {
	list := []string{string(p.For(""))}
	for _, model := range slices.Sorted(maps.Keys(p.Models)) {
		list = append(list, upstream.DisplayName(model)+"="+string(p.Models[model]))
	}
	return strings.Join(list, ", ")
}

// parsePerModel parses settings of the form "pin" or "llama3=pin".
func parsePerModel[W choice[W]](settings []string) (PerModel[W], error) {
	p := PerModel[W]{Models: map[string]W{}}
	for _, s := range settings {
		if err := forModel(s, parseChoice[W], &p.Default, p.Models); err != nil {
			return p, fmt.Errorf("%q: %w", s, err)
		}
	}
	return p, nil
}

func parseChoice[W choice[W]](s string) (W, error) {
	all := W("").choices()
	if slices.Contains(all, W(s)) {
		return W(s), nil
	}
	names := make([]string, len(all))
	for i, w := range all {
		names[i] = string(w)
	}
	last := len(names) - 1
	return "", fmt.Errorf("want %s or %s", strings.Join(names[:last], ", "), names[last])
}
