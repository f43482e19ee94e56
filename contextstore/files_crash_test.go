package contextstore_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// saveForEver is the environment variable that has the test program save states in a folder until
// it is killed.
const saveForEver = "CONTEXTSTORE_SAVE_FOR_EVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(saveForEver); dir != "" {
		saveUntilKilled(dir)
	}
	goleak.VerifyTestMain(m)
}

// saveUntilKilled prints the ID of each state when it is stored.
func saveUntilKilled(dir string) {
	f, err := contextstore.OpenFiles(dir, ample, nil)
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		s := stateOf(chainOf(fmt.Sprint(os.Getpid(), "-", i, "x"), 50), 50_000)
		name, err := f.Room(s)
		if err != nil {
			panic(err)
		}
		file := stateFile(100, int(s.Bytes))
		if err := os.WriteFile(filepath.Join(dir, name), file, 0o600); err != nil {
			panic(err)
		}
		if s, err = f.Commit(name, s); err != nil {
			panic(err)
		}
		fmt.Println(s.ID)
	}
}

// TestFilesKilled: what was stored when the process is killed is there afterwards, and nothing else.
func TestFilesKilled(t *testing.T) {
	dir := t.TempDir()
	stored := map[string]bool{}
	for kills := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), saveForEver+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n < 20+kills && lines.Scan(); n++ {
			stored[lines.Text()] = true
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what it had written until then
			if strings.HasSuffix(lines.Text(), ".bin") {
				stored[lines.Text()] = true
			}
		}
		cmd.Wait()

		f, _ := openFiles(t, dir, ample)
		held := map[string]bool{}
		for _, s := range f.List() {
			held[s.ID] = true
		}
		for id := range stored {
			if !held[id] {
				t.Errorf("%s was stored and is gone", id)
			}
		}
		if n := len(names(t, dir)); n != 2*len(held) {
			t.Errorf("%d files of %d states", n, len(held))
		}
		for id := range held { // one at most whose ID was not printed any more
			stored[id] = true
		}
		if err := f.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(stored) < 100 {
		t.Errorf("only %d states were stored", len(stored))
	}
	if v, problems, err := contextstore.Verify(t.Context(), dir, true); err != nil ||
		len(problems) > 0 || v.States != len(stored) || v.Hashed != v.States {
		t.Errorf("%+v %v %v", v, problems, err)
	}
}

// TestFilesLeftovers opens folders as a crash at any moment, a full disk or a person leaves them.
func TestFilesLeftovers(t *testing.T) {
	const other = "00112233445566778899aabbccddeeff"
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(t *testing.T, path string) string {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, test := range []struct {
		name  string
		spoil func(t *testing.T, stem string) // the path of a stored state without its extension
		kept  bool
		quiet bool
	}{
		{"nothing happened", func(*testing.T, string) {}, true, true},
		{"a save was begun", func(t *testing.T, stem string) {
			write(t, filepath.Join(filepath.Dir(stem), other+".part"), "half")
		}, true, false},
		{"renamed, and nothing says yet what it is", func(t *testing.T, stem string) {
			write(t, filepath.Join(filepath.Dir(stem), other+".bin"), read(t, stem+".bin"))
		}, true, false},
		{"the side file was begun", func(t *testing.T, stem string) {
			write(t, filepath.Join(filepath.Dir(stem), other+".bin"), read(t, stem+".bin"))
			write(t, filepath.Join(filepath.Dir(stem), other+".json.new"), "{")
		}, true, false},
		{"the side file was being written again", func(t *testing.T, stem string) {
			write(t, stem+".json.new", "{")
		}, true, false},
		{"half removed", func(t *testing.T, stem string) {
			if err := os.Remove(stem + ".json"); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"the state was removed by hand", func(t *testing.T, stem string) {
			if err := os.Remove(stem + ".bin"); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"torn", func(t *testing.T, stem string) {
			if err := os.Truncate(stem+".bin", 3999); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"torn side file", func(t *testing.T, stem string) {
			if err := os.Truncate(stem+".json", 100); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"empty side file", func(t *testing.T, stem string) {
			write(t, stem+".json", "")
		}, false, false},
		{"another version", func(t *testing.T, stem string) {
			text := strings.Replace(read(t, stem+".json"), `"version":1`, `"version":2`, 1)
			write(t, stem+".json", text)
		}, false, false},
		{"another's side file", func(t *testing.T, stem string) {
			dir := filepath.Dir(stem)
			write(t, filepath.Join(dir, other+".json"), read(t, stem+".json"))
			write(t, filepath.Join(dir, other+".bin"), read(t, stem+".bin"))
		}, true, false},
		{"a folder in place of the state", func(t *testing.T, stem string) {
			if err := errors.Join(os.Remove(stem+".bin"), os.Mkdir(stem+".bin", 0o700)); err != nil {
				t.Fatal(err)
			}
		}, false, false},
		{"a torn salt", func(t *testing.T, stem string) {
			write(t, filepath.Join(filepath.Dir(stem), "salt"), "short")
		}, true, true},
		{"the machine stopped", func(t *testing.T, stem string) {
			text := read(t, stem+".json")
			at := strings.Index(text, `"boot":"`)
			write(t, stem+".json", text[:at]+`"boot":"other"}`)
		}, false, false},
		{"files of a person", func(t *testing.T, stem string) {
			dir := filepath.Dir(stem)
			write(t, filepath.Join(dir, "notes.json"), "mine")
			write(t, filepath.Join(dir, "model.bin"), "mine")
			t.Cleanup(func() {
				if read(t, filepath.Join(dir, "notes.json"))+read(t, filepath.Join(dir, "model.bin")) !=
					"minemine" {
					t.Error("a person's files were touched")
				}
				os.Remove(filepath.Join(dir, "notes.json"))
				os.Remove(filepath.Join(dir, "model.bin"))
			})
		}, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			f, _ := openFiles(t, dir, ample)
			s := mustSave(t, f, stateOf(chainOf("a", 5), 4000))
			copied := filepath.Join(t.TempDir(), "as it was left")
			if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			test.spoil(t, filepath.Join(copied, strings.TrimSuffix(s.ID, ".bin")))

			left, log := openFiles(t, copied, ample)
			_, depth, kept := left.Best(contextstore.Query{Format: "f", Links: s.Links})
			if kept != test.kept || kept && depth != 5 {
				t.Errorf("kept: %v, %d links", kept, depth)
			}
			if (strings.Count(log.String(), "\n") == 0) != test.quiet ||
				strings.Count(log.String(), "\n") > 1 {
				t.Errorf("logged: %s", log)
			}
			mustSave(t, left, stateOf(chainOf("b", 5), 4000))
			ours := slices.DeleteFunc(names(t, copied), func(name string) bool {
				return name == "notes.json" || name == "model.bin"
			})
			if n := left.Stats().States; len(ours) != 2*n {
				t.Errorf("%d states; files are %q", n, ours)
			}
		})
	}
}

// TestFilesSettled: what has been put on the disk is there after the machine was started again, what
// has not is not taken for whole.
func TestFilesSettled(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, ample)
	f.SetBoot("one")
	settled := mustSave(t, f, stateOf(chainOf("a", 5), 4000))
	if err := f.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, _ = openFiles(t, dir, ample)
	f.SetBoot("one")
	mustSave(t, f, stateOf(chainOf("b", 5), 4000))
	copied := filepath.Join(t.TempDir(), "as it was left") // without Close
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	f, log := openFiles(t, copied, ample)
	if list := f.List(); len(list) != 1 || list[0].ID != settled.ID {
		t.Errorf("kept are %+v", list)
	}
	if log.count("the machine stopped before it was on the disk") != 1 {
		t.Errorf("logged: %s", log)
	}
}
