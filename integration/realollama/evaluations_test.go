package realollama

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The logs are excerpts of real ones; their names begin with the version.
func TestParseLog(t *testing.T) {
	tests := []struct {
		file  string
		loads int
		want  []Evaluation
	}{
		{"0.24.0-two-slots.log", 2, []Evaluation{
			// Two prefixes in turn use one slot, the other stays empty.
			{466, 0, 466}, {885, 5, 880}, {468, 5, 463}, {887, 5, 882},
			// Two requests at once, then one that waited for a slot.
			{468, 5, 463}, {887, 0, 887}, {468, 456, 12},
			// The same for a model with a sliding window.
			{466, 0, 466}, {885, 5, 880}, {468, 0, 468}, {887, 5, 882},
			{468, 0, 468}, {887, 0, 887}, {468, 456, 12},
		}},
		// Since era B the engine restores prompts that a slot no longer holds.
		// A sliding window is restored only where the match is longer than it.
		{"0.33.0-two-slots.log", 2, []Evaluation{
			{466, 0, 466}, {885, 0, 885}, {468, 456, 12}, {887, 875, 12},
			{887, 875, 12}, {468, 456, 12}, {468, 456, 12},
			{466, 0, 466}, {885, 0, 885}, {468, 0, 468}, {887, 875, 12},
			{468, 0, 468}, {887, 875, 12}, {468, 0, 468},
		}},
		{"0.34.1-two-slots.log", 2, []Evaluation{
			{466, 0, 466}, {885, 0, 885}, {468, 456, 12}, {887, 875, 12},
			{468, 456, 12}, {887, 875, 12}, {468, 456, 12},
			{466, 0, 466}, {885, 0, 885}, {468, 0, 468}, {887, 875, 12},
			{468, 0, 468}, {887, 875, 12}, {468, 0, 468},
		}},
	}
	for _, test := range tests {
		t.Run(test.file, func(t *testing.T) {
			log, err := os.ReadFile(filepath.Join("testdata", test.file))
			if err != nil {
				t.Fatal(err)
			}
			if got := parseEvaluations(string(log)); !slices.Equal(got, test.want) {
				t.Errorf("evaluations\n%v, want\n%v", got, test.want)
			}
			if got := parseBegun(string(log)); !sameAsEvaluated(test.file, got, test.want) {
				t.Errorf("begun\n%v, want\n%v", got, test.want)
			}
			if got := countLoads(string(log)); got != test.loads {
				t.Errorf("%d loads, want %d", got, test.loads)
			}
		})
	}
}

// sameAsEvaluated reports whether the same prompts were begun and evaluated. The log has them in
// another order if two slots work. Era A does not log it.
func sameAsEvaluated(file string, begun, evaluated []Evaluation) bool {
	if strings.HasPrefix(file, EraA) {
		return len(begun) == 0
	}
	order := func(a, b Evaluation) int {
		return cmp.Or(cmp.Compare(a.Total, b.Total), cmp.Compare(a.Reused, b.Reused))
	}
	slices.SortFunc(begun, order)
	return slices.Equal(begun, slices.SortedFunc(slices.Values(evaluated), order))
}

func TestParseEvaluationsOfOtherBuilds(t *testing.T) {
	for log, want := range map[string]Evaluation{
		// Slot and task are on a separate line.
		"slot update_slots: id  0 | task 4 | new prompt, n_ctx_slot = 4096, n_keep = 4, task.n_tokens = 70\n" +
			"slot print_timing: id  0 | task 4 |\nprompt eval time =     160.00 ms /    64 tokens (    2.50 ms per token,   400.00 tokens per second)\n": {70, 6, 64},
		// The length of the whole prompt is missing.
		"prompt eval time =     160.00 ms /    64 tokens (    2.50 ms per token,   400.00 tokens per second)\n": {0, 0, 64},
	} {
		if got := parseEvaluations(log); len(got) != 1 || got[0] != want {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}
