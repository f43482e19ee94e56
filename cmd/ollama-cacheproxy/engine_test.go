package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// fakeOllama is what scripts install as ollama: it prints its version.
func fakeOllama() {
	version := os.Getenv("TEST_VERSION")
	if version == "" {
		version = "0.34.1"
	}
	fmt.Println("Warning: client version is " + version)
}

// fakeEngine runs under the name of an engine: as the program of a link, like the real one, or as
// the installed one, which prints its arguments.
func fakeEngine() {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	if _, err := os.Lstat(filepath.Join(filepath.Dir(self), "llama-server.installed")); err == nil {
		main()
	}
	fmt.Printf("installed engine: %v\n", os.Args[1:])
}
