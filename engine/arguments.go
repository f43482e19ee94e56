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
	// value means that the flag takes a value.
	value bool
	// set reads it into a Process. It is nil for settings that neither describe the engine nor
	// change the format of its states.
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
	setAdapter   = setting{true, addAdapter}
	setKeys      = setting{true, func(p *Process, text string) { p.KeyType = text }}
	setValues    = setting{true, func(p *Process, text string) { p.ValueType = text }}
	setSWAFull   = setting{false, func(p *Process, text string) { p.SWAFull = switchedOn(text) }}
	setEmbedding = setting{false, func(p *Process, text string) { p.Embeddings = switchedOn(text) }}
	setFolder    = setting{true, func(p *Process, text string) { p.SaveFolder = text }}
	setHost      = setting{true, setHostOf}
)

func addAdapter(p *Process, text string) { p.Adapters = append(p.Adapters, text) }

// switchedOn reads a switch in the environment as llama-server does; "" stands for a flag.
func switchedOn(text string) bool {
	return slices.Contains([]string{"", "on", "enabled", "true", "1"}, text)
}

// setHostOf keeps an address at which the engine can be reached, if it is not 127.0.0.1.
func setHostOf(p *Process, text string) {
	ip := net.ParseIP(text)
	switch {
	case text == "127.0.0.1", ip != nil && ip.IsUnspecified():
		p.Host = ""
	default:
		p.Host = text
	}
}

// flags are those that Ollama passes, and those that its users may add. An unlisted flag counts as
// decisive for the format of states: then, at worst, a state is not used that could be.
var flags = settings(map[string]setting{
	"--model -m":               setModel,
	"--port":                   setPort,
	"--host":                   setHost,
	"--ctx-size -c":            setSize,
	"--parallel -np":           setSlots,
	"--mmproj -mm":             setProjector,
	"--lora --lora-scaled":     setAdapter,
	"--cache-type-k -ctk":      setKeys,
	"--cache-type-v -ctv":      setValues,
	"--swa-full":               setSWAFull,
	"--embedding --embeddings": setEmbedding,
	"--slot-save-path":         setFolder,
	silentSwitches:             {value: false},
	silentValues:               {value: true},
})

const (
	silentSwitches = `
		--no-webui --webui --no-ui --ui --offline --verbose -v --log-verbose
		--no-log-prefix --log-prefix --no-log-timestamps --log-timestamps
		--no-jinja --jinja --no-mmap --mmap --mlock --context-shift --no-context-shift
		--mmproj-offload --no-mmproj-offload --spec-draft-backend-sampling
		--metrics --props --slots --no-slots --warmup --no-warmup`
	silentValues = `
		--log-verbosity -lv --verbosity --chat-template --load-mode
		-b --batch-size -ub --ubatch-size -ngl --gpu-layers --n-gpu-layers
		-t --threads -tb --threads-batch --threads-http --timeout -to
		--split-mode -sm --main-gpu -mg --tensor-split -ts --fit -fit --fit-target -fitt
		--keep --spec-draft-n-max --cache-ram -cram --cache-reuse --ctx-checkpoints
		--slot-prompt-similarity -sps`
)

// environment has what the engine reads from its environment, by the name without LLAMA_ARG_. A
// flag takes precedence.
var environment = settings(map[string]setting{
	"MODEL":        setModel,
	"PORT":         setPort,
	"HOST":         setHost,
	"CTX_SIZE":     setSize,
	"N_PARALLEL":   setSlots,
	"MMPROJ":       setProjector,
	"CACHE_TYPE_K": setKeys,
	"CACHE_TYPE_V": setValues,
	"SWA_FULL":     setSWAFull,
	"EMBEDDINGS":   setEmbedding,

	`NO_WEBUI UI OFFLINE LOG_VERBOSITY JINJA CHAT_TEMPLATE LOAD_MODE MMAP NO_MMAP MLOCK
	BATCH UBATCH N_GPU_LAYERS THREADS THREADS_HTTP TIMEOUT SPLIT_MODE MAIN_GPU TENSOR_SPLIT
	FIT FIT_TARGET CONTEXT_SHIFT NO_CONTEXT_SHIFT MMPROJ_OFFLOAD NO_MMPROJ_OFFLOAD
	SPEC_DRAFT_N_MAX CACHE_RAM CACHE_REUSE CTX_CHECKPOINTS WARMUP
	ENDPOINT_METRICS ENDPOINT_PROPS ENDPOINT_SLOTS`: {},
})

// settings has every name of every setting.
func settings(of map[string]setting) map[string]setting {
	all := map[string]setting{}
	for names, s := range of {
		for _, name := range strings.Fields(names) {
			all[name] = s
		}
	}
	return all
}

// parse reads the command line of a llama-server, without its name, and its environment
// (NAME=value). A flag without its value is ignored.
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

// startsModel reports whether a command line of llama-server starts a model. Ollama also runs it to
// list devices.
func startsModel(args []string) bool { return parse(args, nil).Model != "" }

// serverAddr returns the address, host and port, on which an Ollama with this OLLAMA_HOST listens,
// as Ollama itself reads it.
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

// blobs returns the files of the model store behind a path of weights. Ollama gives the engine
// weights of several parts as hard links in a folder beside them, which is made for each load and
// whose name is arbitrary.
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

// ggufHead is how much of the weights' file is searched for the names of its tensors, which follow
// the vocabulary: 10 MB in the largest known one.
const ggufHead = 32 << 20

// turnsByContext reports whether the weights have different factors for positions in short and in
// long contexts (LongRoPE, as in Phi-3). The engine chooses by the size of the context, and a state
// that was computed with the other factors is invalid.
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
