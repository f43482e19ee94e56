package batches

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestFullDisk: a full disk refuses an upload with its reason, makes a batch wait, and loses
// nothing. Who may not mount a small disk is told that only what limits can tell was tested.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Logf("no disk of its own, so that TestBytes is all that was tested of this: %v", err)
		return
	}
	defer func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Dir = filepath.Join(dir, "batches") })
		defer r.close()
		input := r.upload("", chats(300))
		r.fake.hook = func(http.ResponseWriter, *http.Request, string) bool {
			time.Sleep(time.Second)
			return false
		}
		id := r.create("", input, "/v1/chat/completions", "24h")
		time.Sleep(20 * time.Second)
		filler := filepath.Join(dir, "filler")
		if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		body, kind := uploadForm(map[string]string{"purpose": "batch"}, strings.Repeat("x", 100_000))
		status, answer, raw := r.ask("", "POST", "/v1/files", body, kind)
		if e, ok := answer["error"].(map[string]any); status != http.StatusInsufficientStorage || !ok || e["code"] != "disk_full" {
			t.Error(status, raw)
		}
		time.Sleep(10 * time.Minute)
		b := r.batch("", id)
		if e, ok := b["errors"].(map[string]any); b["status"] != "in_progress" || !ok ||
			e["data"].([]any)[0].(map[string]any)["code"] != "storage_full" {
			t.Error(b)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		b = r.settled("", id, "completed")
		if counts(b) != "completed 300 300 0" || len(r.lines("", b, "output_file_id")) != 300 {
			t.Error(b)
		}
		if entries, err := os.ReadDir(r.path(filesFolder)); len(entries) != 4 || err != nil {
			t.Error(entries, err)
		}
	})
}
