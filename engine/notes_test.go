//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
)

// holdNote writes a note for the home and port in TEST_HOLD_NOTE, and keeps it until its input
// ends.
func holdNote() int {
	home, port, _ := strings.Cut(os.Getenv("TEST_HOLD_NOTE"), "|")
	p := parse(nil, nil)
	p.PID, p.Started = os.Getpid(), time.Unix(1_800_000_000, 0).UTC()
	p.Port, _ = strconv.Atoi(port)
	// The highest port is the oldest.
	p.Started = p.Started.Add(-time.Duration(p.Port) * time.Second)
	if err := writeNote(home, p); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("held")
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// hold starts a process that writes a note, and returns a function that ends it.
func hold(t testing.TB, home string, port int) (pid int, end func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("TEST_HOLD_NOTE=%s|%d", home, port))
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() { cmd.Process.Kill(); cmd.Wait() }
	t.Cleanup(end)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("no note is held: %q, %v", line, err)
	}
	return cmd.Process.Pid, end
}

func processes(t testing.TB, home string) []Process {
	t.Helper()
	all, err := Processes(home)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestProcesses(t *testing.T) {
	home := t.TempDir()
	if all := processes(t, home); len(all) != 0 {
		t.Fatalf("where there is no link: %+v", all)
	}
	young, endYoung := hold(t, home, 1)
	old, endOld := hold(t, home, 2)
	all := processes(t, home)
	if len(all) != 2 || all[0].PID != old || all[1].PID != young {
		t.Fatalf("%+v, want %d and %d", all, old, young)
	}
	want := Process{
		PID:       young,
		Port:      1,
		KeyType:   "f16",
		ValueType: "f16",
		Started:   all[1].Started,
		folder:    filepath.Join(home, "contexts"),
	}
	if !reflect.DeepEqual(all[1], want) {
		t.Errorf("%+v, want %+v", all[1], want)
	}
	endOld()
	if all := processes(t, home); len(all) != 1 || all[0].PID != young {
		t.Errorf("%+v, want %d", all, young)
	}
	if left, err := os.ReadDir(notesFolder(home)); err != nil || len(left) != 1 {
		t.Errorf("notes %v, want one: %v", left, err)
	} else if info, err := left[0].Info(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("a note that others may read: %v, %v", info.Mode(), err)
	}
	endYoung()
	if all := processes(t, home); len(all) != 0 {
		t.Errorf("%+v, want none", all)
	}
	if left, err := os.ReadDir(notesFolder(home)); err != nil || len(left) != 0 {
		t.Errorf("notes %v, want none: %v", left, err)
	}
}

// TestProcessesElse: other files among the notes, and unusable notes.
func TestProcessesElse(t *testing.T) {
	home := t.TempDir()
	if err := os.MkdirAll(notesFolder(home), 0o700); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(notesFolder(home), name) }
	write(t, at("1-1.json.new"), "{")
	write(t, at("2-2.json.new"), "{")
	write(t, at("README"), "hello")
	write(t, at("3-3.json"), "of an engine that has ended")
	past := time.Now().Add(-2 * forgottenAfter)
	if err := os.Chtimes(at("2-2.json.new"), past, past); err != nil {
		t.Fatal(err)
	}
	if all := processes(t, home); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	for name, stays := range map[string]bool{"1-1.json.new": true, "2-2.json.new": false,
		"README": true, "3-3.json": false} {
		if _, err := os.Stat(at(name)); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The note of a living engine is damaged.
	hold(t, home, 7)
	for _, content := range []string{"{", strings.Repeat(" ", noteLimit+1)} {
		for _, entry := range must(os.ReadDir(notesFolder(home))) {
			if strings.HasSuffix(entry.Name(), noteSuffix) {
				write(t, at(entry.Name()), content)
			}
		}
		if _, err := Processes(home); err == nil ||
			!strings.Contains(err.Error(), "reading an engine's note") {
			t.Errorf("a damaged note: %v", err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestWriteNote(t *testing.T) {
	home := t.TempDir()
	write(t, notesFolder(home), "no folder")
	if err := writeNote(home, Process{}); err == nil {
		t.Error("a note was written into a file")
	}
	if _, err := Processes(home); err == nil {
		t.Error("notes were read from a file")
	}
}

func BenchmarkProcesses(b *testing.B) {
	home := b.TempDir()
	hold(b, home, 1)
	for b.Loop() {
		if len(processes(b, home)) != 1 {
			b.Fatal("not one engine")
		}
	}
}
