package integration

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	aliceKey = "key-of-alice"
	bobKey   = "key-of-bob"
)

// batchSeen is a batch as the client sees it at its end.
type batchSeen struct {
	Status   string
	Counts   struct{ Total, Completed, Failed int }
	Metadata map[string]string
	Errors   []struct {
		Code string
		Line *int
	}
	Output, Failed []batchLine
}

type batchLine struct {
	CustomID string `json:"custom_id"`
	Response *struct {
		Status int            `json:"status_code"`
		Body   map[string]any `json:"body"`
	}
	Error *struct{ Code string }
}

// batchClient returns the command of the OpenAI client's script.
func batchClient(t *testing.T, url string, env ...string) *exec.Cmd {
	t.Helper()
	programs, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir := programs.scripts(t)
	cmd := command(t, programs.python, filepath.Join(dir, "python_openai_batches.py"))
	cmd.Dir = dir
	cmd.Env = clientEnv(dir, append([]string{
		"CLIENT_BASE_URL=" + url, "CLIENT_API_KEY=" + aliceKey, "CLIENT_OTHER_KEY=" + bobKey,
		"PYTHONDONTWRITEBYTECODE=1",
	}, env...)...)
	return cmd
}

// batchFlags are those of a proxy with two keys that serves batches.
func batchFlags(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	if err := os.WriteFile(keys, []byte("alice "+aliceKey+"\nbob "+bobKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--api-keys-file", keys, "--batches", filepath.Join(dir, "batches")}
}

// TestOpenAIBatches: the OpenAI client, unchanged, sends batches of all kinds.
func TestOpenAIBatches(t *testing.T) {
	server := realollama.Start(t, realollama.Config{
		Version: realollama.Newest(), Models: []string{"gen-llama-tiny", "gen-llama-embed"},
	})
	p := startProxy(t, server.URL(), batchFlags(t)...)
	cmd := batchClient(t, p.URL)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(stderr.String(), 40))
	}
	var found struct {
		Chat, Completions, Embeddings, Invalid, Cancelled batchSeen
		Direct                                            map[string]any
		Cancelling                                        string
		Files, Outputs                                    int
		Batches                                           []string
		File                                              map[string]any
		Others                                            []any
		Deleted                                           bool
		Gone                                              []any
		Wrong                                             []any `json:"wrong purpose"`
	}
	if err := json.Unmarshal(text, &found); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for name, c := range map[string]struct {
		seen batchSeen
		want string
	}{
		"chat": {found.Chat, "completed {14 13 1}"}, "completions": {found.Completions, "completed {4 4 0}"},
		"embeddings": {found.Embeddings, "completed {4 4 0}"},
	} {
		if got := fmt.Sprint(c.seen.Status, " ", c.seen.Counts); got != c.want || len(c.seen.Output) != c.seen.Counts.Completed || len(c.seen.Failed) != c.seen.Counts.Failed {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if l := found.Chat.Failed; len(l) != 1 || l[0].CustomID != "request-refused" || l[0].Response == nil || l[0].Response.Status != 400 || l[0].Error != nil {
		t.Errorf("the error file: %s", short(l))
	}
	if l := found.Embeddings.Output; len(l) == 0 || !reflect.DeepEqual(l[0].Response.Body["data"], found.Direct["data"]) {
		t.Errorf("an embedding is not what the client gets without a batch: %s, %s", short(l), short(found.Direct))
	}
	var invalid []string
	for _, e := range found.Invalid.Errors {
		invalid = append(invalid, fmt.Sprint(e.Code, " ", *e.Line))
	}
	if want := "[duplicate_custom_id 2 invalid_url 3 missing_required_parameter 4]"; fmt.Sprint(invalid) != want || found.Invalid.Status != "failed" {
		t.Errorf("%v, want %s", invalid, want)
	}
	c := found.Cancelled
	if found.Cancelling != "cancelling" || c.Status != "cancelled" || len(c.Output) != c.Counts.Completed || len(c.Output) < 3 ||
		len(c.Output)+len(c.Failed) != 2000 || c.Failed[0].Error.Code != "batch_cancelled" {
		t.Errorf("cancelled: %s %s %+v, %d and %d lines", found.Cancelling, c.Status, c.Counts, len(c.Output), len(c.Failed))
	}
	// Five inputs, and the files of four batches: two with errors, one of these with both.
	if found.Files != 11 || found.Outputs != 6 || fmt.Sprint(found.Batches) != "[cancelled failed completed completed completed]" {
		t.Errorf("%d files, %d outputs, batches %v", found.Files, found.Outputs, found.Batches)
	}
	others := `[0,0,["NotFoundError",404],["NotFoundError",404],["NotFoundError",404],["NotFoundError",404],["NotFoundError",404],["BadRequestError",400]]`
	if got := short(found.Others); got != others {
		t.Errorf("another key: %s", got)
	}
	if !found.Deleted || short(found.Gone) != `["NotFoundError",404]` || short(found.Wrong) != `["BadRequestError",400]` {
		t.Errorf("deleted %v, gone %v, wrong purpose %v", found.Deleted, found.Gone, found.Wrong)
	}
	_, _, metrics := do(t, http.MethodGet, p.URL+"/metrics", "", "Authorization", "Bearer "+aliceKey)
	if !strings.Contains(metrics, `ollama_cacheproxy_requests_total{endpoint="/v1/batches"`) {
		t.Error("requests to /v1/batches are not counted under their path")
	}
}

// TestOpenAIBatchRestarts: the proxy is killed, or stopped, several times while a batch runs. The
// client, which only asks on, gets what an uninterrupted batch gives. After a stop no request is
// sent twice, after a kill only those that were under way.
func TestOpenAIBatchRestarts(t *testing.T) {
	const requests, ends = 300, 3
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{"gen-llama-tiny"}})
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	flags := batchFlags(t)
	start := func(more ...string) *proxyprocess.Process {
		p, err := proxyprocess.Start(t.Context(), bin, server.URL(), append(flags, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	defer func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}()
	listen := []string{"--listen", strings.TrimPrefix(p.URL, "http://")}
	run := func(during func(id string)) (seen batchSeen, sent int) {
		mark := server.Mark()
		cmd := batchClient(t, p.URL, fmt.Sprint("CLIENT_INTERRUPTED=", requests))
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(stderr)
		id, _ := in.ReadString('\n') // an error shows in what follows
		during(strings.TrimSpace(id))
		rest, _ := io.ReadAll(in)
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v\n%s%s", err, id, tail(string(rest), 40))
		}
		var found struct{ Chat batchSeen }
		if err := json.Unmarshal(stdout.Bytes(), &found); err != nil {
			t.Fatal(err)
		}
		return found.Chat, served(t, server, mark)["/v1/chat/completions"]
	}
	whole, sent := run(func(string) {})
	if sent != requests || whole.Counts.Completed != requests {
		t.Fatalf("without a crash: %d requests were sent: %+v", sent, whole.Counts)
	}
	for name, c := range map[string]struct {
		end   func(*proxyprocess.Process) error
		twice int // requests that may be sent twice at each end
	}{
		"kill": {func(p *proxyprocess.Process) error { p.Kill(); return nil }, 4},
		"stop": {(*proxyprocess.Process).Stop, 0},
	} {
		t.Run(name, func(t *testing.T) {
			seen, sent := run(func(id string) {
				for n := range ends {
					settles(t, func() error { return cameTo(t, p.URL, id, (n+1)*requests/(ends+2)) })
					if err := c.end(p); err != nil {
						t.Error(err)
					}
					p = start(listen...)
				}
			})
			if seen.Status != "completed" || seen.Counts.Completed != requests || len(seen.Output) != requests {
				t.Fatalf("%s %+v, %d lines", seen.Status, seen.Counts, len(seen.Output))
			}
			same := 0
			for i := range requests {
				if seen.Output[i].CustomID != whole.Output[i].CustomID {
					t.Fatalf("line %d is %s, want %s", i+1, seen.Output[i].CustomID, whole.Output[i].CustomID)
				}
				if reflect.DeepEqual(seen.Output[i], whole.Output[i]) {
					same++
				}
			}
			t.Logf("%d of %d answers are those of the uninterrupted batch; %d requests were sent, with %d ends", same, requests, sent, ends)
			// The engine itself answers differently now and then: see TestBatch.
			if same < requests*95/100 {
				t.Errorf("only %d of %d answers are those of the uninterrupted batch", same, requests)
			}
			if sent < requests || sent > requests+ends*c.twice {
				t.Errorf("%d requests were sent for %d, with %d ends", sent, requests, ends)
			}
		})
	}
}

// cameTo returns an error until so many of a batch's requests are answered.
func cameTo(t *testing.T, url, id string, completed int) error {
	_, _, text := do(t, http.MethodGet, url+"/v1/batches/"+id, "", "Authorization", "Bearer "+aliceKey)
	var b struct {
		Counts struct{ Completed int } `json:"request_counts"`
	}
	if err := json.Unmarshal([]byte(text), &b); err != nil || b.Counts.Completed < completed {
		return fmt.Errorf("the batch has not come far enough: %s (%v)", text, err)
	}
	return nil
}
