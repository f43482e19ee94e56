package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// versionText is set by the linker (-X main.versionText=…); otherwise the build information tells.
var versionText string

type versionCmd struct{}

func (versionCmd) Run(c *console) error {
	_, err := fmt.Fprintf(c.stdout, "ollama-cacheproxy %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
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
