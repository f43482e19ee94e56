package integration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// linkedServer links a real Ollama in a new folder and runs it from there. The installed one is not
// changed.
func linkedServer(t *testing.T, config realollama.Config) (home string, server *realollama.Server) {
	t.Helper()
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	installed, err := cache.Ollama(t.Context(), config.Version)
	if err != nil {
		t.Fatal(err)
	}
	program, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(filepath.Dir(installed))
	before := treeOf(t, root)
	t.Cleanup(func() {
		if after := treeOf(t, root); after != before {
			t.Errorf("the installed Ollama has changed: %s was %s", after, before)
		}
	})
	home = filepath.Join(t.TempDir(), "linked")
	info, err := engine.Link(engine.LinkOptions{Ollama: installed, Home: home, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	if info.Version != config.Version {
		t.Errorf("linked version %q, want %q", info.Version, config.Version)
	}
	config.Bin = info.Start()
	return home, realollama.Start(t, config)
}

// treeOf returns a hash of the names, sizes, modes and times of all files beneath a folder. The
// number of hard links to a file is left out, since linking adds one.
func treeOf(t *testing.T, root string) string {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(h, path, info.Size(), info.Mode(), info.ModTime().UnixNano())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// prompted makes a server answer a prompt with few tokens; with a keep_alive of 0 it also unloads
// the model.
func prompted(t *testing.T, server *realollama.Server, model, prompt string, keepAlive any) {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"model": model, "prompt": prompt, "stream": false, "keep_alive": keepAlive, "raw": true,
		"options": map[string]any{"temperature": 0, "num_predict": 4, "num_ctx": 2048},
	})
	if err != nil {
		t.Fatal(err)
	}
	status, _, text := post(t, server.URL()+"/api/generate", string(body))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
}

// onlyEngine waits until exactly one engine runs and has loaded its model.
func onlyEngine(t *testing.T, home string) engine.Process {
	t.Helper()
	var p engine.Process
	settles(t, func() error {
		all, err := engine.Processes(home)
		if err != nil || len(all) != 1 {
			return fmt.Errorf("%d engines: %w", len(all), errors.Join(err, errors.New("want one")))
		}
		p = all[0]
		_, err = p.Slots(t.Context())
		return err
	})
	return p
}

// reloaded unloads the model, loads it again, and returns the new engine, whose slots are empty.
func reloaded(t *testing.T, home string, server *realollama.Server, model string) engine.Process {
	t.Helper()
	prompted(t, server, model, "", 0)
	eventually(t, "unloaded", func() bool {
		all, err := engine.Processes(home)
		return err == nil && len(all) == 0
	})
	prompted(t, server, model, "", "10m")
	return onlyEngine(t, home)
}

// evaluatedBy makes a server answer a prompt, and returns the prompt's tokens and how many of them
// were evaluated.
func evaluatedBy(
	t *testing.T, server *realollama.Server, model, prompt string,
) (total, evaluated int) {
	t.Helper()
	mark := server.Mark()
	prompted(t, server, model, prompt, "10m")
	return evaluations(t, server, mark, 1)
}

// TestEngine: a linked Ollama makes its engines known, and their states outlive them.
func TestEngine(t *testing.T) {
	for _, version := range realollama.Versions() {
		if realollama.Era(version) == realollama.EraA {
			continue // era A has no llama-server: see TestEngineOld
		}
		t.Run(version, func(t *testing.T) {
			const model, few = "smollm2", 40
			models := []string{model, "gen-llama-tiny"}
			config := realollama.Config{Version: version, Models: models, Parallel: 2}
			home, server := linkedServer(t, config)
			if all, err := engine.Processes(home); err != nil || len(all) != 0 {
				t.Fatalf("before anything is loaded: %v, %v", all, err)
			}
			document := words(1, 400)
			total, evaluated := evaluatedBy(t, server, model, document+"\nOne:")
			if evaluated != total || total < 400 {
				t.Fatalf("cold: %d of %d tokens evaluated", evaluated, total)
			}
			p := onlyEngine(t, home)
			want := engine.Process{
				PID: p.PID, Port: p.Port, Model: p.Model, Parallel: 2, Context: 4096, ContextEach: 2048,
				KeyType: "f16", ValueType: "f16",
				Server: server.Addr(), Build: p.Build, Version: version,
				SaveFolder: engine.ContextsFolder(home), Decisive: p.Decisive, Started: p.Started,
			}
			if shown(t, p) != shown(t, want) {
				t.Errorf("the note is\n%s, want\n%s", shown(t, p), shown(t, want))
			}
			if p.PID == 0 || p.Port == 0 || len(p.Build) != 32 ||
				len(p.Blob()) != len("sha256-")+64 {
				t.Errorf("the note lacks something: %+v", p)
			}
			slots, err := p.Slots(t.Context())
			if err != nil || len(slots) != 2 {
				t.Fatalf("slots %+v, %v", slots, err)
			}
			used := slices.IndexFunc(slots, func(s engine.Slot) bool {
				return s.Task >= 0 && s.Tokens >= total
			})
			if used < 0 || slots[used].Processing || slots[used].Context != 2048 ||
				slots[1-used].Tokens > 10 {
				t.Fatalf("no slot has the document: %+v", slots)
			}
			saved, err := p.Save(t.Context(), used, "document.bin")
			if err != nil || saved.Tokens < total || saved.Took <= 0 {
				t.Fatalf("saved %+v, %v", saved, err)
			}
			info, err := os.Stat(filepath.Join(engine.ContextsFolder(home), "document.bin"))
			if err != nil || info.Size() != saved.Bytes || info.Mode().Perm() != 0o600 {
				t.Fatalf("the file is %v, want %d bytes for its owner: %v", info, saved.Bytes, err)
			}
			format := p.Format()

			t.Run("reload", func(t *testing.T) {
				p := reloaded(t, home, server, model)
				if p.Format() != format {
					t.Errorf("the same model has another format: %+v", p)
				}
				// The empty prompt that loaded the model has used a slot; the state goes to the
				// other one.
				for slot := range 2 {
					if _, err := p.Restore(t.Context(), slot, "document.bin", saved.Bytes); err != nil {
						t.Fatal(err)
					}
				}
				total, evaluated := evaluatedBy(t, server, model, document+"\nTwo:")
				t.Logf("after a reload: %d of %d tokens evaluated", evaluated, total)
				if evaluated > few {
					t.Errorf("after a restore %d of %d tokens evaluated", evaluated, total)
				}
			})

			t.Run("other slot", func(t *testing.T) {
				p := reloaded(t, home, server, model)
				other := 1 - used
				restored, err := p.Restore(t.Context(), other, "document.bin", saved.Bytes)
				if err != nil || restored.Tokens != saved.Tokens || restored.Bytes != saved.Bytes ||
					restored.Took <= 0 {
					t.Fatalf("restored %+v of %+v: %v", restored, saved, err)
				}
				total, evaluated := evaluatedBy(t, server, model, document+"\nThree:")
				t.Logf("in slot %d: %d of %d tokens evaluated", other, evaluated, total)
				slots, err := p.Slots(t.Context())
				if err != nil || evaluated > few || slots[other].Tokens < total {
					t.Errorf("%d of %d tokens evaluated, slots %+v: %v",
						evaluated, total, slots, err)
				}
				if n, err := p.Erase(t.Context(), other); err != nil || n < total {
					t.Errorf("erased %d tokens of %d: %v", n, total, err)
				}
			})

			t.Run("refused", func(t *testing.T) { refusesFiles(t, home, server, model) })

			t.Run("kill", func(t *testing.T) {
				p := onlyEngine(t, home)
				server.Kill()
				settles(t, func() error {
					all, err := engine.Processes(home)
					if err == nil && len(all) > 0 {
						err = fmt.Errorf("engines of a dead server: %+v", all)
					}
					return err
				})
				if _, err := p.Slots(t.Context()); !errors.Is(err, engine.ErrGone) {
					t.Errorf("a dead engine: %v", err)
				}
				if left, err := os.ReadDir(filepath.Join(home, "engines")); err != nil ||
					len(left) > 0 {
					t.Errorf("notes that are left: %v, %v", left, err)
				}
			})
		})
	}
}

func shown(t *testing.T, p engine.Process) string {
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// refusesFiles: a file that is not a state of this model does no harm to an engine.
func refusesFiles(t *testing.T, home string, server *realollama.Server, model string) {
	p := onlyEngine(t, home)
	folder := engine.ContextsFolder(home)
	state, err := os.ReadFile(filepath.Join(folder, "document.bin"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		content []byte
		size    int // the size given in the note
	}{
		"empty":        {nil, 0},
		"foreign":      {[]byte(words(7, 5000)), len(words(7, 5000))},
		"head":         {state[:20], 20},
		"torn":         {state[:len(state)/2], len(state)},
		"short":        {state[:len(state)-1], len(state)},
		"long":         {append(slices.Clone(state), 0), len(state)},
		".":            {nil, 4096},
		"a/b":          {nil, 0},
		"../link.json": {nil, 969},
	} {
		if filepath.Base(name) == name && name != "." {
			if err := os.WriteFile(filepath.Join(folder, name), c.content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := p.Restore(t.Context(), 0, name, int64(c.size))
		if !errors.Is(err, engine.ErrRefused) {
			t.Errorf("restoring %q: %v", name, err)
		}
	}
	size := foreignState(t, home, server, "gen-llama-tiny", "other-model")
	if _, err := p.Restore(t.Context(), 0, "other-model", size); !errors.Is(err, engine.ErrRefused) {
		t.Errorf("restoring the state of another model: %v", err)
	}
	if _, err := p.Restore(t.Context(), 0, "missing", 40); !errors.Is(err, engine.ErrRefused) ||
		!errors.Is(err, fs.ErrNotExist) {
		t.Errorf("restoring what is not there: %v", err)
	}
	if _, err := p.Save(t.Context(), 0, "../x"); !errors.Is(err, engine.ErrRefused) {
		t.Errorf("saving outside of the folder: %v", err)
	}
	if _, err := p.Save(t.Context(), 7, "x"); !errors.Is(err, engine.ErrRefused) {
		t.Errorf("saving a slot that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Slots(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, engine.ErrGone) {
		t.Errorf("a caller that gave up: %v", err)
	}
	prompted(t, server, model, "It lives.", "10m")
	if now := onlyEngine(t, home); now.PID != p.PID {
		t.Errorf("the engine is another one: %d was %d", now.PID, p.PID)
	}
}

// foreignState loads another model beside the loaded one, saves a state of it, unloads it again,
// and returns the state's size.
func foreignState(
	t *testing.T, home string, server *realollama.Server, model, name string,
) int64 {
	t.Helper()
	prompted(t, server, model, words(3, 50), "10m")
	all, err := engine.Processes(home)
	if err != nil || len(all) != 2 {
		t.Fatalf("engines %+v, want two: %v", all, err)
	}
	slots, err := all[1].Slots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	used := slices.IndexFunc(slots, func(s engine.Slot) bool { return s.Tokens >= 50 })
	saved, err := all[1].Save(t.Context(), used, name)
	if err != nil || saved.Tokens < 50 {
		t.Fatalf("saved %+v of slots %+v: %v", saved, slots, err)
	}
	prompted(t, server, model, "", 0)
	onlyEngine(t, home)
	return saved.Bytes
}

// TestEngineOld: Ollama before 0.30 has no engine to link, and the error says so.
func TestEngineOld(t *testing.T) {
	if !slices.Contains(realollama.Versions(), realollama.EraA) {
		return // the version is not among those to test
	}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	installed, err := cache.Ollama(t.Context(), realollama.EraA)
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(t.TempDir(), "linked")
	const want = "Ollama 0.24.0 has no llama-server; 0.30 and later have"
	if _, err := engine.Link(engine.LinkOptions{Ollama: installed, Home: home}); err == nil ||
		err.Error() != want {
		t.Errorf("linking it: %v", err)
	}
	if _, err := os.Stat(home); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
}
