//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ollama/ollama/envconfig"
)

// ollamas are command lines of Ollama 0.34.1.
var (
	plain = strings.Fields(`--model /m/sha256-1 --port 4711 --host 127.0.0.1 --no-webui --offline
		-c 8192 -np 2 --log-verbosity 4 --no-log-prefix --no-log-timestamps
		--no-jinja --chat-template chatml --load-mode none --flash-attn auto
		-b 512 -ub 512 --context-shift --keep 4`)
	rich = strings.Fields(`--model /m/sha256-1 --port 4712 --host 127.0.0.1 --no-webui --offline
		-c 4096 -np 1 --mmproj /m/sha256-2 --lora /m/sha256-3 --lora /m/sha256-4
		--cache-type-k q8_0 --cache-type-v q4_0 --embedding -ngl 0 -t 3`)
	discovery = strings.Fields("--port 4713 --host 127.0.0.1 --no-webui --offline --verbose")
	devices   = strings.Fields("--list-devices --offline --verbose")
)

func TestParse(t *testing.T) {
	tests := map[string]struct {
		args, env []string
		want      Process
	}{
		"nothing": {nil, nil, Process{KeyType: "f16", ValueType: "f16"}},
		"plain": {plain, []string{"HOME=/root", "LLAMA_ARG_CACHE_RAM=0"}, Process{
			Model: "/m/sha256-1", Port: 4711, Context: 8192, Parallel: 2, ContextEach: 4096, KeyType: "f16",
			ValueType: "f16", Decisive: []string{"--flash-attn", "auto"},
		}},
		"rich": {rich, nil, Process{
			Model: "/m/sha256-1", Port: 4712, Context: 4096, Parallel: 1, ContextEach: 4096,
			KeyType: "q8_0", ValueType: "q4_0", Projector: "/m/sha256-2",
			Adapters: []string{"/m/sha256-3", "/m/sha256-4"}, Embeddings: true,
		}},
		"environment": {
			[]string{"-m", "m", "-ctk", "q8_0"},
			[]string{
				"LLAMA_ARG_ROPE_SCALING_TYPE=yarn",
				"LLAMA_ARG_FLASH_ATTN=on",
				"LLAMA_ARG_CACHE_TYPE_K=q4_0",
				"LLAMA_ARG_CACHE_TYPE_V=q4_0",
				"LLAMA_ARG_SWA_FULL=1",
				"LLAMA_ARG_MODEL=other",
			},
			Process{
				Model:     "m",
				KeyType:   "q8_0",
				ValueType: "q4_0",
				SWAFull:   true,
				Decisive:  []string{"FLASH_ATTN=on", "ROPE_SCALING_TYPE=yarn"},
			},
		},
		"switched off": {
			nil,
			[]string{"LLAMA_ARG_SWA_FULL=false"},
			Process{KeyType: "f16", ValueType: "f16"},
		},
		"folder": {
			[]string{"--slot-save-path", "/x/", "--swa-full"},
			nil,
			Process{KeyType: "f16", ValueType: "f16", SaveFolder: "/x/", SWAFull: true},
		},
		"no value": {
			[]string{"--swa-full", "--port"},
			nil,
			Process{KeyType: "f16", ValueType: "f16", SWAFull: true},
		},
		"no number": {
			[]string{"--port", "x", "-c", "-5"},
			nil,
			Process{KeyType: "f16", ValueType: "f16"},
		},
		"everywhere": {
			[]string{"--host", "0.0.0.0"},
			nil,
			Process{KeyType: "f16", ValueType: "f16"},
		},
		"other address": {
			[]string{"--host", "::1"},
			nil,
			Process{KeyType: "f16", ValueType: "f16", Host: "::1"},
		},
		"value like a flag": {
			[]string{"--keep", "-1", "--port", "7", "--chat-template", "--model", "-c", "9"},
			nil,
			Process{KeyType: "f16", ValueType: "f16", Port: 7, Context: 9, ContextEach: 9},
		},
	}
	for name, test := range tests {
		if got := parse(test.args, test.env); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s:\n%+v, want\n%+v", name, got, test.want)
		}
	}
	for _, args := range [][]string{plain, rich} {
		if !startsModel(args) {
			t.Errorf("%q starts a model", args)
		}
	}
	for _, args := range [][]string{discovery, devices, nil} {
		if startsModel(args) {
			t.Errorf("%q starts no model", args)
		}
	}
}

func with(args []string, more ...string) []string { return append(slices.Clone(args), more...) }

// replaced returns a command line with another value for a flag.
func replaced(args []string, flag, value string) []string {
	args = slices.Clone(args)
	args[slices.Index(args, flag)+1] = value
	return args
}

func TestFormat(t *testing.T) {
	base := parse(plain, nil)
	base.Build = "b1"
	if n := len(base.Format()); n != 32 {
		t.Errorf("it has %d letters", n)
	}
	for name, args := range map[string][]string{
		"num_ctx": replaced(plain, "-c", "512"), "slots": replaced(plain, "-np", "4"),
		"port": replaced(plain, "--port", "1"), "batch": replaced(plain, "-b", "1"),
		"keep": replaced(plain, "--keep", "9"), "threads": with(plain, "-t", "3"),
		"layers": with(plain, "-ngl", "9"), "folder": with(plain, "--slot-save-path", "/x/"),
		"store moved": replaced(plain, "--model", "/elsewhere/sha256-1"),
	} {
		other := parse(args, []string{"LLAMA_ARG_CACHE_RAM=0", "PATH=/bin"})
		other.Build, other.PID, other.Server = "b1", 7, "x:1"
		if other.Format() != base.Format() {
			t.Errorf("%s changes the format", name)
		}
	}
	seen := map[string]string{base.Format(): "nothing"}
	for name, args := range map[string][]string{
		"weights": replaced(plain, "--model", "/m/sha256-2"), "keys": with(plain, "-ctk", "q8_0"),
		"values": with(plain, "-ctv", "q8_0"), "swa-full": with(plain, "--swa-full"),
		"flash attention": replaced(plain, "--flash-attn", "off"),
		"adapter":         with(plain, "--lora", "/m/a"), "other adapter": with(plain, "--lora", "/m/b"),
		"adapters":  with(plain, "--lora", "/m/a", "--lora", "/m/b"),
		"projector": with(plain, "--mmproj", "/m/a"), "embedding": with(plain, "--embedding"),
		"unknown":         with(plain, "--rope-scaling", "yarn"),
		"another unknown": with(plain, "--rope-scaling", "linear"), "build": nil, "environment": nil,
	} {
		other := parse(args, nil)
		other.Build = "b1"
		switch name {
		case "build":
			other = base
			other.Build = "b2"
		case "environment":
			other = parse(plain, []string{"LLAMA_ARG_ROPE_SCALE=2"})
			other.Build = "b1"
		}
		if as, ok := seen[other.Format()]; ok {
			t.Errorf("%s gives the same format as %s", name, as)
		}
		seen[other.Format()] = name
	}
}

func FuzzParse(f *testing.F) {
	for _, args := range [][]string{nil, plain, rich, discovery, devices, {"--port"},
		{"-c", "99999999999999999999", "-np", "0"}, {"--lora", "--lora", "--lora"}} {
		f.Add(strings.Join(args, "\n"), "LLAMA_ARG_CTX_SIZE=4096\nLLAMA_ARG_X\n=")
	}
	f.Fuzz(func(t *testing.T, line, env string) {
		args, environ := strings.Split(line, "\n"), strings.Split(env, "\n")
		p := parse(args, environ)
		if p.Port < 0 || p.Parallel < 0 || p.Context < 0 || p.ContextEach > p.Context {
			t.Fatalf("numbers that make no sense: %+v", p)
		}
		// Irrelevant flags do not matter, wherever they are.
		before := parse(
			append([]string{"--port", "5", "--offline", "-t", "3"}, args...),
			append([]string{"LLAMA_ARG_THREADS=3"}, environ...),
		)
		before.Port = p.Port
		if !reflect.DeepEqual(before, p) {
			if slices.Contains(args, "--port") || before.Format() != p.Format() {
				t.Fatalf("%+v\n%+v", before, p)
			}
		}
		if before.Format() != p.Format() {
			t.Fatalf("other formats: %+v\n%+v", before, p)
		}
		// Unknown arguments are kept.
		more := parse(append([]string{"--unheard-of"}, args...), environ)
		if more.Format() == p.Format() {
			t.Fatal("an unknown flag is lost")
		}
	})
}

func TestServerAddr(t *testing.T) {
	for host, want := range map[string]string{
		"": "127.0.0.1:11434", "0.0.0.0": "0.0.0.0:11434", "127.0.0.1:5": "127.0.0.1:5",
		"http://h": "h:80", "https://h": "h:443", "https://h:5/path": "h:5",
		"[::1]": "[::1]:11434", "::1": "[::1]:11434", "[::1]:7": "[::1]:7", ":8": ":8",
		"h:70000": "h:11434", "h:x": "h:11434", ` "h:9" `: "h:9", "ollama.com": "ollama.com:443",
	} {
		if got := serverAddr(host); got != want {
			t.Errorf("OLLAMA_HOST=%q is %q, want %q", host, got, want)
		}
		t.Setenv("OLLAMA_HOST", host)
		if got := envconfig.Host().Host; got != want {
			t.Errorf("Ollama itself reads OLLAMA_HOST=%q as %q, not as %q", host, got, want)
		}
	}
}

func TestBlobs(t *testing.T) {
	store, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sha256-a", "sha256-b", "sha256-c"} {
		write(t, filepath.Join(store, name), name)
	}
	at := func(names ...string) []string {
		for i := range names {
			names[i] = filepath.Join(store, names[i])
		}
		return names
	}
	if got, want := blobs(at("sha256-a")[0]), at("sha256-a"); !slices.Equal(got, want) {
		t.Errorf("one file: %q, want %q", got, want)
	}
	if err := os.Symlink("sha256-b", filepath.Join(store, "link")); err != nil {
		t.Fatal(err)
	}
	if got, want := blobs(at("link")[0]), at("sha256-b"); !slices.Equal(got, want) {
		t.Errorf("a link: %q, want %q", got, want)
	}
	split := filepath.Join(store, ".ollama-split-abc-1")
	if err := os.Mkdir(split, 0o700); err != nil {
		t.Fatal(err)
	}
	first := filepath.Join(split, "model-00001-of-00002.gguf")
	for part, blob := range map[string]string{first: "sha256-c",
		filepath.Join(split, "model-00002-of-00002.gguf"): "sha256-a"} {
		if err := os.Link(filepath.Join(store, blob), part); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := blobs(first), at("sha256-c", "sha256-a"); !slices.Equal(got, want) {
		t.Errorf("two parts: %q, want %q", got, want)
	}
	write(t, filepath.Join(split, "model-00003-of-00003.gguf"), "of nowhere")
	if got, want := blobs(first), []string{first}; !slices.Equal(got, want) {
		t.Errorf("a part of nowhere: %q, want %q", got, want)
	}
	if got := blobs("/no/such"); !slices.Equal(got, []string{"/no/such"}) {
		t.Errorf("no file: %q", got)
	}
}

func TestTurnsByContext(t *testing.T) {
	name := []byte("rope_factors_long")
	path := filepath.Join(t.TempDir(), "model")
	for _, test := range []struct {
		size, at int
		want     bool
	}{{0, -1, false}, {100, -1, false}, {100, 10, true}, {3 << 20, 1<<20 - 5, true},
		{3 << 20, 2<<20 - 30, true}, {3 << 20, 3<<20 - len(name), true},
		{ggufHead + 2<<20, ggufHead + 1<<20 + 1<<19, false}} {
		content := bytes.Repeat([]byte("x"), test.size)
		if test.at >= 0 {
			copy(content[test.at:], name)
		}
		write(t, path, string(content))
		if got := turnsByContext(path); got != test.want {
			t.Errorf("of %d bytes, at %d: %v", test.size, test.at, got)
		}
	}
	if turnsByContext(path + "x") {
		t.Error("a file that is not there")
	}
}
