package main

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// saveContexts stores a context of two megabytes for each of the models, in a home.
func saveContexts(ts *testscript.TestScript, neg bool, args []string) {
	dir := filepath.Join(ts.MkAbs(args[0]), "contexts")
	files, err := contextstore.OpenFiles(dir, contextstore.FileLimits{Bytes: 1 << 30}, nil)
	ts.Check(err)
	for i, model := range args[1:] {
		s := contextstore.State{
			Format: "f", Model: model, Links: []uint64{uint64(i + 1)}, Bytes: 2_000_002,
			Cost: 3 * time.Second, Uses: 2,
		}
		name, err := files.Room(s)
		ts.Check(err)
		var state []byte
		for _, word := range []uint32{0x67677371, 3, 7, 1, 2, 3, 4, 5, 6, 7} {
			state = binary.LittleEndian.AppendUint32(state, word)
		}
		state = append(state, make([]byte, int(s.Bytes)-len(state))...)
		ts.Check(os.WriteFile(filepath.Join(dir, name), state, 0o600))
		_, err = files.Commit(name, s)
		ts.Check(err)
	}
	ts.Check(files.Close(context.Background()))
}

// spoilContext changes, truncates or removes the only state's file in a home, or its side file.
func spoilContext(ts *testscript.TestScript, neg bool, args []string) {
	dir := filepath.Join(ts.MkAbs(args[0]), "contexts")
	paths, err := filepath.Glob(filepath.Join(dir, "*.bin"))
	ts.Check(err)
	if len(paths) != 1 {
		ts.Fatalf("%d states", len(paths))
	}
	state, err := os.ReadFile(paths[0])
	ts.Check(err)
	switch args[1] {
	case "flip":
		state = slices.Clone(state)
		state[1_000_000] ^= 1
		ts.Check(os.WriteFile(paths[0], state, 0o600))
	case "cut":
		ts.Check(os.Truncate(paths[0], 1_999_999))
	case "remove":
		_, err := contextstore.RemoveFiles(dir, filepath.Base(paths[0]))
		ts.Check(err)
	}
}
