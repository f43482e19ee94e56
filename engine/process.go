// Package engine knows the engines, llama.cpp's servers, that an Ollama runs.
//
// Ollama 0.30 and later start a process of llama-server for each loaded model, from a folder beside
// Ollama's own binary, and keep its port to themselves. Link makes a second folder like the
// installed one, with links to everything in it, in which this program stands in for llama-server.
// Called by that name (Main), it records what it was asked to start in a note, and becomes the
// installed llama-server, with a folder for its states. The installed Ollama is not changed, and
// supervises the engine itself.
//
// Processes reads the notes of the running engines, and Process has the requests that an engine
// answers: what its slots hold, and saving and restoring them.
//
// The folder of a link, called home here, has
//
//	bin/ollama     a hard link or a copy of the installed binary, which is to be started in its place
//	lib/ollama/    links to what the installed Ollama has there, and this program as llama-server
//	link.json      what was linked
//	engines/       a note for each running engine, which holds a lock on it as long as it lives
//	contexts/      where the engines save states
package engine

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"time"
)

// ContextsFolder is where the engines of a link save states.
func ContextsFolder(home string) string { return filepath.Join(home, "contexts") }

func notesFolder(home string) string { return filepath.Join(home, "engines") }

// Process is a running engine, as it was started.
type Process struct {
	// PID is the engine's process in its own namespace, which another container may not see.
	PID int
	// Port is where it listens, on Host.
	Port int
	// Host is an address at which it can be reached; "" means 127.0.0.1.
	Host string `json:",omitempty"`
	// Model is the path of the weights, or of the first part if there are several.
	Model string
	// Projector is the path of the model that turns images into tokens, or "".
	Projector string `json:",omitempty"`
	// Adapters are the paths of the LoRA adapters, with a scale if one was given.
	Adapters []string `json:",omitempty"`
	// Parallel is how many slots it has (-np), or 0 if not given.
	Parallel int
	// Context is the tokens of all slots together (-c), ContextEach of one slot; 0 if not given.
	Context, ContextEach int
	// KeyType and ValueType are the types of its keys and values; "f16" by default.
	KeyType, ValueType string
	// SWAFull means that layers with a sliding window keep all tokens nevertheless, so that a state
	// can be used up to any of its tokens.
	SWAFull bool
	// Embeddings means that it only embeds.
	Embeddings bool
	// Server is the address, host and port, of the Ollama that started it.
	Server string
	// Build identifies the engine's build.
	Build string
	// Version is the version of Ollama when it was linked, or "" if unknown.
	Version string `json:",omitempty"`
	// SaveFolder is where it saves states, as it sees the file system; see Folder. It is the link's
	// folder contexts unless it was started with a --slot-save-path: then Elsewhere is true.
	SaveFolder string
	Elsewhere  bool `json:",omitempty"`
	// Decisive is everything else in its arguments and environment on which the format of its
	// states may depend.
	Decisive []string `json:",omitempty"`
	// Started is when it was started.
	Started time.Time

	// folder is the link's folder contexts as this process sees it, or "" if it was not read from a
	// note.
	folder string
}

// Folder is where it saves states, as this process sees the file system: another container may have
// the link's folder under another name.
func (p Process) Folder() string {
	if p.Elsewhere || p.folder == "" {
		return p.SaveFolder
	}
	return p.folder
}

// Blob is the base name of the weights' file, such as sha256-…, which identifies weights in Ollama.
func (p Process) Blob() string { return filepath.Base(p.Model) }

// Format is a key of everything on which the format and the meaning of a saved state depend: two
// engines with the same Format can restore each other's states. It does not depend on the number of
// slots or tokens, on the port or on threads. But some models turn positions differently in a long
// context than in a short one, and theirs depends on ContextEach.
func (p Process) Format() string {
	h := sha256.New()
	field := func(values ...string) {
		fmt.Fprintln(h, len(values))
		for _, v := range values {
			fmt.Fprintf(h, "%d %s\n", len(v), v)
		}
	}
	field(p.Build, p.Blob(), baseName(p.Projector), p.KeyType, p.ValueType,
		strconv.FormatBool(p.SWAFull), strconv.FormatBool(p.Embeddings))
	for _, adapter := range p.Adapters {
		field(baseName(adapter))
	}
	field(p.Decisive...)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// baseName is filepath.Base, except that it returns "" for "".
func baseName(path string) string {
	if path == "" {
		return ""
	}
	return filepath.Base(path)
}

// addr is where the engine listens.
func (p Process) addr() string {
	host := p.Host
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, strconv.Itoa(p.Port))
}

// Files are the base names of the files that the engine has loaded: the weights', the projector's
// and the adapters'.
func (p Process) Files() []string {
	files := []string{p.Blob()}
	if p.Projector != "" {
		files = append(files, baseName(p.Projector))
	}
	for _, adapter := range p.Adapters {
		files = append(files, baseName(adapter))
	}
	return files
}

// typeBytes is how many bytes a number takes in each type of a cache: whole numbers, and blocks of
// 32 with a scale or more (llama.cpp, ggml-common.h).
var typeBytes = map[string]float64{
	"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34. / 32, "q5_1": 24. / 32, "q5_0": 22. / 32,
	"q4_1": 20. / 32, "q4_0": 18. / 32, "iq4_nl": 18. / 32,
}

// ValueBytes is how many bytes a number takes in the cache, averaged over keys and values. Unknown
// types count as f16.
func (p Process) ValueBytes() float64 {
	return (cmp.Or(typeBytes[p.KeyType], 2) + cmp.Or(typeBytes[p.ValueType], 2)) / 2
}
