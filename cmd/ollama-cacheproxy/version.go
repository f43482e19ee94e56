package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// These are set by the linker (-X main.versionText=…); otherwise the build information is used.
var versionText, commitText string

type versionCmd struct{}

func (versionCmd) Run(c *console) error {
	build, _ := debug.ReadBuildInfo()
	commit := ""
	if text := commitOf(build); text != "" {
		commit = " commit " + text
	}
	_, err := fmt.Fprintf(c.stdout, "ollama-cacheproxy %s%s %s %s/%s\n", version(), commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

func version() string {
	if versionText != "" {
		return versionText
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// commitOf returns the first twelve hexadecimal digits of the commit that the program was built
// from, with "+dirty" if the tree had changes. It returns "" if neither the linker nor build (nil:
// none) has one, as after go install of a version, which identifies the source by itself.
func commitOf(build *debug.BuildInfo) string {
	commit, dirty := commitText, ""
	if commit == "" && build != nil {
		for _, s := range build.Settings {
			switch {
			case s.Key == "vcs.revision":
				commit = s.Value
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = "+dirty"
			}
		}
	}
	if commit == "" {
		return ""
	}
	return commit[:min(12, len(commit))] + dirty
}
