package realollama

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// wheelEngine returns the folder of the prebuilt llama-server.
func wheelEngine(t *testing.T) string {
	t.Helper()
	c, err := OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := c.ensure(t.Context(), wheelRecipe())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestWheelRefusesWhatItDoesNotKnow: the command line written for the package refuses unknown
// flags, rather than running a server with other settings than those asked for.
func TestWheelRefusesWhatItDoesNotKnow(t *testing.T) {
	launcher := filepath.Join(wheelEngine(t), "llama-server")
	for _, at := range []struct {
		env, flags, want string
	}{
		{"", "--model m.gguf --mirostat 2", "does not know the flag --mirostat"},
		{"LLAMA_ARG_POOLING=mean", "", "has LLAMA_ARG_POOLING, which it does not know"},
		{"LLAMA_ARG_CACHE_RAM=much", "", `LLAMA_ARG_CACHE_RAM is 'much'`},
		{"LLAMA_ARG_SWA_FULL=perhaps", "", `LLAMA_ARG_SWA_FULL is 'perhaps': on or off is expected`},
		{"", "-c", "the flag -c needs a value"},
		{"", "-c 99999999999", "-c is '99999999999'"},
		{"", "--flash-attn sometimes", "--flash-attn is 'sometimes': one of auto, disabled, enabled, off, on is expected"},
	} {
		cmd := exec.CommandContext(t.Context(), launcher, strings.Fields(at.flags)...)
		cmd.Env = append(os.Environ(), at.env)
		output, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); err == nil || code != 2 {
			t.Errorf("%s llama-server %s: %v, exit status %d, want 2", at.env, at.flags, err, code)
		}
		if !strings.Contains(string(output), at.want) {
			t.Errorf("%s llama-server %s says\n%swant %q", at.env, at.flags, output, at.want)
		}
	}
}

// TestWheelMapsEachFlag sets every flag that Ollama 0.33 and 0.34 pass (llm/llama_server.go), and
// the environment that tests and people use, and checks the package's parameters.
func TestWheelMapsEachFlag(t *testing.T) {
	const show = `
import json, sys
sys.path.insert(0, sys.argv[1])
import llama_server as s
params = s.x.CommonParams()
env = dict(pair.split("=", 1) for pair in sys.argv[2].split())
s.from_environment(params, env)
s.from_arguments(params, sys.argv[3].split())
def value(path):
    of = params
    for name in path.split("."):
        of = of[int(name)] if name.isdigit() else getattr(of, name)
    return of.name if hasattr(of, "name") else of
print(json.dumps({path: value(path) for path in sys.argv[4:]}))
`
	settings := []struct {
		env, flags, param string
		want              any
	}{
		{"", "--model /m.gguf", "model.path", "/m.gguf"},
		{"", "--port 4711", "port", 4711.0},
		{"", "--host 127.0.0.1", "hostname", "127.0.0.1"},
		{"", "--no-webui", "ui", false},
		{"", "--offline", "offline", true},
		{"", "-c 8192", "n_ctx", 8192.0},
		{"", "-np 4", "n_parallel", 4.0},
		{"", "--log-verbosity 4 --no-log-prefix --no-log-timestamps", "verbosity", 4.0},
		{"", "--no-jinja", "use_jinja", false},
		{"", "--chat-template chatml", "chat_template", "chatml"},
		{"", "--mmproj /p.gguf", "mmproj.path", "/p.gguf"},
		{"", "--no-mmproj-offload", "mmproj_use_gpu", false},
		{"", "--image-min-tokens 1024", "image_min_tokens", 1024.0},
		{"", "--spec-draft-n-max 3", "speculative.draft.n_max", 3.0},
		{"", "--spec-draft-backend-sampling", "speculative.draft.backend_sampling", true},
		{"", "--spec-draft-model /d.gguf", "speculative.draft.mparams.path", "/d.gguf"},
		{"", "--spec-type draft-mtp", "speculative.types.0", "COMMON_SPECULATIVE_TYPE_DRAFT_MTP"},
		{"", "--lora /a.gguf", "lora_adapters.0.path", "/a.gguf"},
		{"", "--load-mode dio", "load_mode", "LLAMA_LOAD_MODE_DIRECT_IO"},
		{"", "--cache-type-k q8_0", "cache_type_k", "GGML_TYPE_Q8_0"},
		{"", "--cache-type-v q4_0", "cache_type_v", "GGML_TYPE_Q4_0"},
		{"", "--flash-attn on", "flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_ENABLED"},
		{"", "--embedding", "embedding", true},
		{"", "-b 1024", "n_batch", 1024.0},
		{"", "-ub 256", "n_ubatch", 256.0},
		{"", "-ngl 0", "n_gpu_layers", 0.0},
		{"", "-t 3", "cpuparams.n_threads", 3.0},
		{"", "--split-mode none", "split_mode", "LLAMA_SPLIT_MODE_NONE"},
		{"", "--main-gpu 1", "main_gpu", 1.0},
		{"", "--context-shift", "ctx_shift", true},
		{"", "--keep 4", "n_keep", 4.0},
		{"LLAMA_ARG_CACHE_RAM=8", "", "cache_ram_mib", 8.0},
		{"LLAMA_ARG_CACHE_REUSE=64", "", "n_cache_reuse", 64.0},
		{"LLAMA_ARG_CTX_CHECKPOINTS=2", "", "n_ctx_checkpoints", 2.0},
		{"LLAMA_ARG_SWA_FULL=1", "", "swa_full", true},
		{"LLAMA_ARG_ENDPOINT_SLOTS=0", "", "endpoint_slots", false},
		{"LLAMA_ARG_FIT_TARGET=512", "", "fit_params_target.0", 512.0 * (1 << 20)},
		{"OTHER=1", "--slot-save-path /s", "slot_save_path", "/s"},
	}
	dir := wheelEngine(t)
	var env, flags []string
	args := []string{"-I", "-B", "-c", show, dir, "", ""}
	for _, s := range settings {
		env, flags, args = append(env, s.env), append(flags, s.flags), append(args, s.param)
	}
	args[5], args[6] = strings.Join(env, " "), strings.Join(flags, " ")
	output, err := exec.CommandContext(t.Context(), "python3", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	got := map[string]any{}
	if err := json.Unmarshal(output, &got); err != nil {
		t.Fatalf("%v in %s", err, output)
	}
	for _, s := range settings {
		if got[s.param] != s.want {
			t.Errorf("%s%s gives %s = %v, want %v", s.env, s.flags, s.param, got[s.param], s.want)
		}
	}
	// The command line wins over the environment.
	args = []string{"-I", "-B", "-c", show, dir, "LLAMA_ARG_CTX_SIZE=1", "-c 2", "n_ctx"}
	if output, err := exec.CommandContext(t.Context(), "python3", args...).CombinedOutput(); err != nil || strings.TrimSpace(string(output)) != `{"n_ctx": 2}` {
		t.Errorf("with both there is %s, %v", output, err)
	}
}

// TestWheelKnowsEachFlag reads the flags from the sources of the versions that use it, so that a
// flag of a new version is noticed.
func TestWheelKnowsEachFlag(t *testing.T) {
	literal := regexp.MustCompile(`"(--?[a-z][a-z-]*)"`)
	for _, version := range []string{EraB, EraC} {
		output, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", "github.com/ollama/ollama@v"+version).Output()
		if err != nil {
			t.Fatalf("downloading the source of %s: %v", version, err)
		}
		var module struct{ Dir string }
		if err := json.Unmarshal(output, &module); err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, name := range []string{"llm/llama_server.go", "discover/llama_server.go"} {
			source, err := os.ReadFile(filepath.Join(module.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range literal.FindAllStringSubmatch(string(source), -1) {
				seen++
				if !strings.Contains(wheelServer, `"`+m[1]+`"`) {
					t.Errorf("%s of %s has the flag %s, which llama_server.py does not know", name, version, m[1])
				}
			}
		}
		if seen < 30 {
			t.Errorf("only %d flags were found in %s: look for them elsewhere", seen, version)
		}
	}
}

func TestEngineIsChosen(t *testing.T) {
	c, told := openTestCache(t)
	choose := func() recipe {
		t.Helper()
		r, err := c.engineRecipe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	t.Setenv(engineEnv, "steam")
	if _, err := c.engineRecipe(t.Context()); err == nil || !strings.Contains(err.Error(), "want source or nothing") {
		t.Errorf("an unknown engine gave %v", err)
	}
	t.Setenv(engineEnv, "source")
	if r := choose(); r.key() != sourceEngineRecipe().key() {
		t.Errorf("when the source is asked for, it is %s", r.name)
	}

	// A source that was built before does not replace the wheel.
	t.Setenv(engineEnv, "")
	if err := os.MkdirAll(c.path(sourceEngineRecipe()), 0o755); err != nil {
		t.Fatal(err)
	}
	if r := choose(); r.key() != wheelRecipe().key() {
		t.Errorf("where there is a wheel, the engine is %s", r.name)
	}

	// If PyPI has no wheel for the machine, the source is built, and the progress says so.
	if err := os.RemoveAll(c.path(wheelRecipe())); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PIP_NO_INDEX", "1")
	if r := choose(); r.key() != sourceEngineRecipe().key() {
		t.Errorf("without a wheel, the engine is %s", r.name)
	}
	if !strings.Contains(told.String(), "no ready llama-server for this machine, so it is built from its source: PyPI has no wheel of xllamacpp==") {
		t.Errorf("that the source is built is not told:\n%s", told.String())
	}

	// An index that cannot be reached does not mean that there is no wheel.
	if err := os.RemoveAll(c.path(wheelRecipe())); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PIP_NO_INDEX", "0")
	t.Setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
	t.Setenv("PIP_RETRIES", "1")
	if r, err := c.engineRecipe(t.Context()); err == nil || !strings.Contains(err.Error(), engineEnv+"=source") {
		t.Errorf("without an index there is %s, %v", r.name, err)
	}
}
