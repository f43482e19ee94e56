package main

import (
	"runtime/debug"
	"testing"
)

func TestCommitOf(t *testing.T) {
	const commit = "0123456789abcdef0123456789abcdef01234567"
	built := func(modified string) *debug.BuildInfo {
		return &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: commit}, {Key: "vcs.modified", Value: modified}}}
	}
	for name, test := range map[string]struct {
		linked string
		build  *debug.BuildInfo
		want   string
	}{
		"nothing is known":        {"", nil, ""},
		"go install of a version": {"", &debug.BuildInfo{}, ""},
		"a clean tree":            {"", built("false"), "0123456789ab"},
		"a changed tree":          {"", built("true"), "0123456789ab+dirty"},
		"the linker's":            {"fedcba9876543210", built("true"), "fedcba987654"},
		"a short one":             {"fedcba9", nil, "fedcba9"},
	} {
		t.Run(name, func(t *testing.T) {
			commitText = test.linked
			t.Cleanup(func() { commitText = "" })
			if got := commitOf(test.build); got != test.want {
				t.Errorf("%q, not %q", got, test.want)
			}
		})
	}
}
