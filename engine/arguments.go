package engine

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// setting is what one of llama-server's flags, or its name in the environment, sets.
type setting struct {
	// flag without a value, or with one.
	value bool
	// set reads it into a Process; nil for what neither says anything of the engine nor changes the
	// format of its states.
	set func(*Process, string)
}

func number(field func(*Process) *int) func(*Process, string) {
	return func(p *Process, text string) {
		if n, err := strconv.Atoi(text); err == nil && n >= 0 {
			*field(p) = n
		}
	}
}

var (
	setPort  = setting{true, number(func(p *Process) *int { return &p.Port })}
	setSize  = setting{true, number(func(p *Process) *int { return &p.Context })}
	setSlots = setting{true, number(func(p *Process) *int { return &p.Parallel })}

	setModel     = setting{true, func(p *Process, text string) { p.Model = text }}
	setProjector = setting{true, func(p *Process, text string) { p.Projector = text }}
	setAdapter   = setting{true, func(p *Process, text string) { p.Adapters = append(p.Adapters, text) }}
	setKeys      = setting{true, func(p *Process, text string) { p.KeyType = text }}
	setValues    = setting{true, func(p *Process, text string) { p.ValueType = text }}
	setSWAFull   = setting{false, func(p *Process, text string) { p.SWAFull = switchedOn(text) }}
	setEmbedding = setting{false, func(p *Process, text string) { p.Embeddings = switchedOn(text) }}
	setFolder    = setting{true, func(p *Process, text string) { p.SaveFolder = text }}
	setHost      = setting{true, setHostOf}

	// silent are settings that do not matter here.
	silentSwitch = setting{false, nil}
	silentValue  = setting{true, nil}
)

// switchedOn is how llama-server reads a switch in the environment; "" stands for a flag.
func switchedOn(text string) bool {
	return slices.Contains([]string{"", "on", "enabled", "true", "1"}, text)
}

// setHostOf keeps an address at which the engine can be reached, where it is not 127.0.0.1.
func setHostOf(p *Process, text string) {
	ip := net.ParseIP(text)
	switch {
	case text == "127.0.0.1", ip != nil && ip.IsUnspecified():
		p.Host = ""
	default:
		p.Host = text
	}
}

// flags are those that Ollama passes and whoever starts it may add. What is not here counts as
// decisive for the format of states: then, at worst, a state is not used that could be.
var flags = map[string]setting{
	"--model": setModel, "-m": setModel,
	"--port": setPort, "--host": setHost,
	"-c": setSize, "--ctx-size": setSize,
	"-np": setSlots, "--parallel": setSlots,
	"--mmproj": setProjector, "-mm": setProjector,
	"--lora": setAdapter, "--lora-scaled": setAdapter,
	"--cache-type-k": setKeys, "-ctk": setKeys,
	"--cache-type-v": setValues, "-ctv": setValues,
	"--swa-full":  setSWAFull,
	"--embedding": setEmbedding, "--embeddings": setEmbedding,
	"--slot-save-path": setFolder,

	"--no-webui": silentSwitch, "--webui": silentSwitch, "--no-ui": silentSwitch, "--ui": silentSwitch,
	"--offline":       silentSwitch,
	"--log-verbosity": silentValue, "-lv": silentValue, "--verbosity": silentValue,
	"--verbose": silentSwitch, "-v": silentSwitch, "--log-verbose": silentSwitch,
	"--no-log-prefix": silentSwitch, "--log-prefix": silentSwitch,
	"--no-log-timestamps": silentSwitch, "--log-timestamps": silentSwitch,
	"--no-jinja": silentSwitch, "--jinja": silentSwitch, "--chat-template": silentValue,
	"--load-mode": silentValue, "--no-mmap": silentSwitch, "--mmap": silentSwitch, "--mlock": silentSwitch,
	"-b": silentValue, "--batch-size": silentValue, "-ub": silentValue, "--ubatch-size": silentValue,
	"-ngl": silentValue, "--gpu-layers": silentValue, "--n-gpu-layers": silentValue,
	"-t": silentValue, "--threads": silentValue, "-tb": silentValue, "--threads-batch": silentValue,
	"--threads-http": silentValue,
	"--split-mode":   silentValue, "-sm": silentValue, "--main-gpu": silentValue, "-mg": silentValue,
	"--tensor-split": silentValue, "-ts": silentValue,
	"--fit": silentValue, "-fit": silentValue, "--fit-target": silentValue, "-fitt": silentValue,
	"--context-shift": silentSwitch, "--no-context-shift": silentSwitch, "--keep": silentValue,
	"--mmproj-offload": silentSwitch, "--no-mmproj-offload": silentSwitch,
	"--spec-draft-n-max": silentValue, "--spec-draft-backend-sampling": silentSwitch,
	"--cache-ram": silentValue, "-cram": silentValue, "--cache-reuse": silentValue,
	"--ctx-checkpoints": silentValue, "--slot-prompt-similarity": silentValue, "-sps": silentValue,
	"--metrics": silentSwitch, "--props": silentSwitch, "--slots": silentSwitch, "--no-slots": silentSwitch,
	"--warmup": silentSwitch, "--no-warmup": silentSwitch, "--timeout": silentValue, "-to": silentValue,
}

// environment has what the engine reads of its environment, by the name without LLAMA_ARG_. A flag
// wins over it.
var environment = map[string]setting{
	"MODEL": setModel, "PORT": setPort, "HOST": setHost, "CTX_SIZE": setSize, "N_PARALLEL": setSlots,
	"MMPROJ": setProjector, "CACHE_TYPE_K": setKeys, "CACHE_TYPE_V": setValues, "SWA_FULL": setSWAFull,
	"EMBEDDINGS": setEmbedding,
	"NO_WEBUI":   silentSwitch, "UI": silentSwitch, "OFFLINE": silentSwitch, "LOG_VERBOSITY": silentValue,
	"JINJA": silentSwitch, "CHAT_TEMPLATE": silentValue, "LOAD_MODE": silentValue, "MMAP": silentSwitch,
	"NO_MMAP": silentSwitch, "MLOCK": silentSwitch, "BATCH": silentValue, "UBATCH": silentValue,
	"N_GPU_LAYERS": silentValue, "THREADS": silentValue, "THREADS_HTTP": silentValue,
	"SPLIT_MODE": silentValue, "MAIN_GPU": silentValue, "TENSOR_SPLIT": silentValue, "FIT": silentValue,
	"FIT_TARGET": silentValue, "CONTEXT_SHIFT": silentSwitch, "NO_CONTEXT_SHIFT": silentSwitch,
	"MMPROJ_OFFLOAD": silentSwitch, "NO_MMPROJ_OFFLOAD": silentSwitch,
	"SPEC_DRAFT_N_MAX": silentValue, "CACHE_RAM": silentValue, "CACHE_REUSE": silentValue,
	"CTX_CHECKPOINTS": silentValue, "ENDPOINT_METRICS": silentSwitch, "ENDPOINT_PROPS": silentSwitch,
	"ENDPOINT_SLOTS": silentSwitch, "WARMUP": silentSwitch, "TIMEOUT": silentValue,
}

// parse reads the command line of a llama-server, without its name, and its environment
// (NAME=value). A flag that lacks its value is as if it were not there.
func parse(args, environ []string) Process {
	p := Process{KeyType: "f16", ValueType: "f16"}
	for _, entry := range environ {
		name, text, _ := strings.Cut(entry, "=")
		name, ok := strings.CutPrefix(name, "LLAMA_ARG_")
		if !ok {
			continue
		}
		if s, known := environment[name]; !known {
			p.Decisive = append(p.Decisive, name+"="+text)
		} else if s.set != nil {
			s.set(&p, text)
		}
	}
	slices.Sort(p.Decisive) // the environment has no order
	for i := 0; i < len(args); i++ {
		s, known := flags[args[i]]
		text := ""
		switch {
		case !known:
			p.Decisive = append(p.Decisive, args[i])
			continue
		case s.value && i+1 == len(args):
			continue
		case s.value:
			i++
			text = args[i]
		}
		if s.set != nil {
			s.set(&p, text)
		}
	}
	p.ContextEach = p.Context / max(1, p.Parallel)
	return p
}

// startsModel is whether a command line of llama-server starts a model: Ollama also has it look for
// devices.
func startsModel(args []string) bool { return parse(args, nil).Model != "" }

// serverAddr is the address, host and port, that an Ollama with this OLLAMA_HOST listens on, as
// Ollama itself reads it.
func serverAddr(ollamaHost string) string {
	defaultPort := "11434"
	s := strings.TrimSpace(strings.Trim(strings.TrimSpace(ollamaHost), `"'`))
	scheme, hostPort, ok := strings.Cut(s, "://")
	switch {
	case !ok:
		hostPort = s
		if s == "ollama.com" {
			hostPort = "ollama.com:443"
		}
	case scheme == "http":
		defaultPort = "80"
	case scheme == "https":
		defaultPort = "443"
	}
	hostPort, _, _ = strings.Cut(hostPort, "/")
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		host, port = "127.0.0.1", defaultPort
		if ip := net.ParseIP(strings.Trim(hostPort, "[]")); ip != nil {
			host = ip.String()
		} else if hostPort != "" {
			host = hostPort
		}
	}
	if n, err := strconv.ParseInt(port, 10, 32); err != nil || n > 65535 || n < 0 {
		port = defaultPort
	}
	return net.JoinHostPort(host, port)
}

// blobs are the files of the model store that a path of weights stands for. Weights of several parts
// are given to the engine by hard links in a folder beside them that is made anew for each load, and
// whose name says nothing.
func blobs(model string) []string {
	folder := filepath.Dir(model)
	if !strings.HasPrefix(filepath.Base(folder), ".ollama-split-") {
		if real, err := filepath.EvalSymlinks(model); err == nil {
			return []string{real}
		}
		return []string{model}
	}
	parts, err := os.ReadDir(folder)
	if err != nil {
		return []string{model}
	}
	store := filepath.Dir(folder)
	stored, err := os.ReadDir(store)
	if err != nil {
		return []string{model}
	}
	var found []string
	for _, part := range parts {
		info, err := part.Info()
		if err != nil {
			continue
		}
		for _, blob := range stored {
			if other, err := blob.Info(); err == nil && os.SameFile(info, other) {
				found = append(found, filepath.Join(store, blob.Name()))
				break
			}
		}
	}
	if len(found) != len(parts) || len(found) == 0 {
		return []string{model}
	}
	return found
}

// ggufHead is how much of the weights' file is searched for the names of its tensors, which come
// after the vocabulary: 10 MB of the largest known.
const ggufHead = 32 << 20

// turnsByContext is whether the weights have one set of factors for positions in short contexts and
// another one for those in long ones (LongRoPE, as Phi-3 has it). The engine takes one by the size
// of the context, and a state that was computed with the other means something else.
func turnsByContext(model string) bool {
	f, err := os.Open(model)
	if err != nil {
		return false
	}
	defer f.Close()
	name := []byte("rope_factors_long")
	buffer := make([]byte, 1<<20)
	kept := 0
	for read := 0; read < ggufHead; {
		n, err := io.ReadFull(f, buffer[kept:])
		read += n
		if bytes.Contains(buffer[:kept+n], name) {
			return true
		}
		if err != nil {
			return false
		}
		kept = copy(buffer, buffer[len(buffer)-len(name):])
	}
	return false
}
