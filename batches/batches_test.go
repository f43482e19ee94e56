package batches

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// settled advances the bubble's clock until a batch has this status.
func (r *rig) settled(owner, id, want string) map[string]any {
	r.t.Helper()
	for range 10_000 {
		synctest.Wait()
		if b := r.batch(owner, id); b["status"] == want {
			return b
		}
		time.Sleep(time.Second)
	}
	r.t.Fatalf("the batch is not %s: %v", want, r.batch(owner, id))
	return nil
}

// TestBatch: a batch goes from its file to its output and error files, in the order of the input.
func TestBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		input := chats(30) + "\n" + chat("bad", "refuse", "m")
		r.fake.hook = func(w http.ResponseWriter, _ *http.Request, text string) bool {
			if text == "refuse" {
				w.WriteHeader(http.StatusBadRequest)
				w.Write([]byte(`{"error":{"message":"no <thank> you","type":"invalid_request_error"}}`))
			}
			return text == "refuse"
		}
		file := r.upload("a", input)
		id := r.create("a", file, "/v1/chat/completions", "24h")
		b := r.settled("a", id, "completed")
		if got := counts(b); got != "completed 31 30 1" {
			t.Error(got)
		}
		if b["usage"].(map[string]any)["total_tokens"] != 150.0 || b["model"] != "m" || b["errors"] != nil ||
			b["metadata"].(map[string]any)["a"] != "b" {
			t.Error(b)
		}
		out := r.lines("a", b, "output_file_id")
		if len(out) != 30 {
			t.Fatalf("%d lines", len(out))
		}
		for i, l := range out {
			if string(l.CustomID) != fmt.Sprintf(`"c-%d"`, i) || l.Response.Status != 200 || l.Error != nil ||
				!strings.Contains(string(l.Response.Body), fmt.Sprintf(`"content":"answer to prompt %d"`, i)) {
				t.Errorf("line %d: %+v %s", i, l, l.Response.Body)
			}
		}
		bad := r.lines("a", b, "error_file_id")
		if len(bad) != 1 || string(bad[0].CustomID) != `"bad"` || bad[0].Response.Status != 400 ||
			!strings.Contains(string(bad[0].Response.Body), "no <thank> you") || bad[0].Error != nil {
			t.Errorf("%+v", bad)
		}
		if entries, err := os.ReadDir(r.path(batchesFolder)); len(entries) != 1 || err != nil {
			t.Error("the batch has left something behind:", entries, err)
		}
	})
}

// TestEndpoints: completions and embeddings are batches, too.
func TestEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		for endpoint, member := range map[string]string{"/v1/completions": `"prompt":"p"`, "/v1/embeddings": `"input":["p","q"]`} {
			file := r.upload("", fmt.Sprintf(`{"custom_id":"1","method":"POST","url":%q,"body":{"model":"m",%s}}`, endpoint, member))
			b := r.settled("", r.create("", file, endpoint, "24h"), "completed")
			if got := counts(b); got != "completed 1 1 0" {
				t.Error(endpoint, got)
			}
		}
	})
}

// TestInvalidInput: what is wrong with an input is said line by line, and nothing is sent.
func TestInvalidInput(t *testing.T) {
	line := func(url, method, body string) string {
		return fmt.Sprintf(`{"custom_id":"x","method":%q,"url":%q,"body":%s}`, method, url, body)
	}
	const endpoint = "/v1/chat/completions"
	good := `{"model":"m","messages":[{"role":"user","content":"p"}]}`
	for name, c := range map[string]struct {
		input string
		want  []string // code and line
	}{
		"no JSON":     {chats(1) + "\n{\"a\":\n", []string{"invalid_json_line 3"}},
		"not UTF-8":   {"{\"custom_id\":\"\xff\"}", []string{"invalid_json_line 1"}},
		"no id":       {`{"method":"POST","url":"/v1/chat/completions","body":{}}`, []string{"missing_required_parameter 1"}},
		"no method":   {`{"custom_id":"1","url":"/v1/chat/completions","body":{}}`, []string{"missing_required_parameter 1"}},
		"GET":         {line(endpoint, "GET", good), []string{"invalid_method 1"}},
		"other URL":   {line("/v1/embeddings", "POST", good), []string{"invalid_url 1"}},
		"no body":     {line(endpoint, "POST", `"text"`), []string{"missing_required_parameter 1"}},
		"no model":    {line(endpoint, "POST", `{}`), []string{"missing_required_parameter 1"}},
		"twice":       {chats(2) + chats(1), []string{"duplicate_custom_id 3"}},
		"empty":       {"\n \n", []string{"empty_file <nil>"}},
		"absent":      {chats(1) + chat("z", "p", "absent"), []string{"model_not_found 2"}},
		"several":     {"1\n" + chats(1) + "2\n", []string{"invalid_json_line 1", "invalid_json_line 3"}},
		"too many":    {chats(MaxRequests + 1), []string{"too_many_requests <nil>"}},
		"byte marked": {"\xef\xbb\xbf" + chats(1) + "x", []string{"invalid_json_line 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				defer r.close()
				b := r.settled("", r.create("", r.upload("", c.input), endpoint, "24h"), "failed")
				var got []string
				for _, e := range b["errors"].(map[string]any)["data"].([]any) {
					e := e.(map[string]any)
					got = append(got, fmt.Sprint(e["code"], " ", e["line"]))
				}
				if !slices.Equal(got, c.want) || len(r.fake.counts()) > 0 || b["output_file_id"] != nil || b["error_file_id"] != nil {
					t.Errorf("%v, want %v: %v", got, c.want, b)
				}
			})
		})
	}
}

// TestCancel: what was answered is in the output, and the rest says that it was cancelled.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		r.fake.hook = hang("prompt 5")
		id := r.create("", r.upload("", chats(6)), "/v1/chat/completions", "24h")
		synctest.Wait()
		if status, answer, raw := r.ask("", "POST", "/v1/batches/"+id+"/cancel", nil, ""); status != 200 || answer["status"] != "cancelling" {
			t.Fatal(status, raw)
		}
		b := r.settled("", id, "cancelled")
		if got := counts(b); got != "cancelled 6 5 0" || len(r.lines("", b, "output_file_id")) != 5 {
			t.Error(got)
		}
		bad := r.lines("", b, "error_file_id")
		if len(bad) != 1 || bad[0].Error.Code != "batch_cancelled" || string(bad[0].CustomID) != `"c-5"` || bad[0].Response != nil {
			t.Errorf("%+v", bad)
		}
		if status, _, _ := r.ask("", "POST", "/v1/batches/"+id+"/cancel", nil, ""); status != 200 {
			t.Error("cancelled again:", status)
		}
	})
}

// hang answers all but one prompt.
func hang(prompt string) func(http.ResponseWriter, *http.Request, string) bool {
	return func(_ http.ResponseWriter, r *http.Request, text string) bool {
		if text != prompt {
			return false
		}
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// TestExpired: a batch ends at its completion window.
func TestExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		r.fake.hook = hang("prompt 1")
		id := r.create("", r.upload("", chats(3)), "/v1/chat/completions", "1h")
		time.Sleep(59 * time.Minute)
		if b := r.batch("", id); counts(b) != "in_progress 3 2 0" {
			t.Error(b)
		}
		time.Sleep(2 * time.Minute)
		b := r.settled("", id, "expired")
		if bad := r.lines("", b, "error_file_id"); counts(b) != "expired 3 2 0" || len(bad) != 1 || bad[0].Error.Code != "batch_expired" {
			t.Error(b, bad)
		}
	})
}

// TestOwners: what belongs to one owner does not exist for another.
func TestOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		file := r.upload("a", chats(1))
		id := r.create("a", file, "/v1/chat/completions", "24h")
		b := r.settled("a", id, "completed")
		output := b["output_file_id"].(string)
		for _, path := range []string{
			"GET /v1/files/" + file, "GET /v1/files/" + file + "/content", "DELETE /v1/files/" + file,
			"GET /v1/files/" + output + "/content", "GET /v1/batches/" + id, "POST /v1/batches/" + id + "/cancel",
		} {
			method, path, _ := strings.Cut(path, " ")
			for _, other := range []string{"b", ""} {
				if status, answer, raw := r.ask(other, method, path, nil, ""); status != 404 || answer["error"] == nil {
					t.Error(path, status, raw)
				}
			}
		}
		for _, path := range []string{"/v1/files", "/v1/batches"} {
			if _, answer, raw := r.ask("b", "GET", path, nil, ""); len(answer["data"].([]any)) != 0 {
				t.Error(path, raw)
			}
		}
		status, _, raw := r.ask("b", "POST", "/v1/batches", strings.NewReader(
			`{"input_file_id":"`+file+`","endpoint":"/v1/chat/completions","completion_window":"24h"}`), "")
		if status != 400 {
			t.Error(status, raw)
		}
		if r.fake.owners["a"] != 1 || len(r.fake.owners) != 1 {
			t.Error(r.fake.owners)
		}
	})
}

// TestRevoked: a batch whose owner is not known any more stops.
func TestRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		// The key is revoked when four requests have been answered and all others that were sent wait.
		r.fake.hook = func(_ http.ResponseWriter, q *http.Request, text string) bool {
			switch text {
			case "prompt 0", "prompt 1", "prompt 2", "prompt 3":
			case "prompt 4":
				time.Sleep(time.Second)
				r.mu.Lock()
				r.unknown["a"] = true
				r.mu.Unlock()
			default:
				<-q.Context().Done()
			}
			return false
		}
		id := r.create("a", r.upload("a", chats(100)), "/v1/chat/completions", "24h")
		b := r.settled("a", id, "failed")
		e := b["errors"].(map[string]any)["data"].([]any)[0].(map[string]any)
		done := len(r.lines("a", b, "output_file_id"))
		if e["code"] != "invalid_api_key" || done != 5 || len(r.lines("a", b, "error_file_id")) != 100-done {
			t.Error(done, b)
		}
	})
}

// TestRestart: a batch goes on where it stopped, however it stopped, and its output is the same.
func TestRestart(t *testing.T) {
	bodies := func(list []result) (texts []string) {
		for _, l := range list {
			texts = append(texts, string(l.CustomID)+string(l.Response.Body))
		}
		return texts
	}
	for _, drain := range []bool{false, true} {
		t.Run(fmt.Sprint("drain ", drain), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				file := r.upload("a", chats(200))
				whole := bodies(r.lines("a", r.settled("a", r.create("a", file, "/v1/chat/completions", "24h"), "completed"), "output_file_id"))
				clear(r.fake.asked)
				stop := make(chan struct{})
				var once sync.Once
				r.fake.hook = func(http.ResponseWriter, *http.Request, string) bool {
					if len(r.fake.counts()) >= 50 {
						once.Do(func() { close(stop) })
						time.Sleep(time.Second)
					}
					return false
				}
				id := r.create("a", file, "/v1/chat/completions", "24h")
				<-stop
				if drain {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					r.Drain(ctx)
					if ctx.Err() != nil {
						t.Error("the drain has not come to its end")
					}
					cancel()
				}
				r.close()
				before := r.fake.counts()
				r.fake.hook = nil
				r.open()
				defer r.close()
				b := r.settled("a", id, "completed")
				if got := counts(b); got != "completed 200 200 0" {
					t.Error(got)
				}
				if again := bodies(r.lines("a", b, "output_file_id")); !slices.Equal(whole, again) {
					t.Error("the output is not that of an uninterrupted run")
				}
				twice := 0
				for _, n := range r.fake.counts() {
					twice += n - 1
				}
				if drain && twice > 0 || twice > 3 {
					t.Errorf("%d requests were sent again; %d were sent before the stop", twice, len(before))
				}
				if len(before) >= 200 {
					t.Error("the batch was not interrupted")
				}
			})
		})
	}
}

// TestTurns: so many batches run at once, and owners take turns.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Running = 1 })
		defer r.close()
		var order []string
		now, most := 0, 0
		r.fake.hook = func(_ http.ResponseWriter, req *http.Request, _ string) bool {
			r.mu.Lock()
			order = append(order, ownerOf(req))
			now++
			most = max(most, now)
			r.mu.Unlock()
			time.Sleep(time.Second)
			r.mu.Lock()
			now--
			r.mu.Unlock()
			return false
		}
		var ids []string
		for _, owner := range []string{"a", "a", "a", "b"} {
			ids = append(ids, r.create(owner, r.upload(owner, chats(1)), "/v1/chat/completions", "24h"))
		}
		for i, id := range ids {
			r.settled(map[bool]string{true: "b", false: "a"}[i == 3], id, "completed")
		}
		if got := strings.Join(order, ""); got != "abaa" || most != 1 {
			t.Error(got, most)
		}
	})
}

// TestTooFast: an owner's own limits delay a batch, and fail nothing.
func TestTooFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		began := time.Now()
		r.fake.hook = func(w http.ResponseWriter, _ *http.Request, _ string) bool {
			if time.Since(began) < 10*time.Minute {
				w.Header().Set("Retry-After", "30")
				w.WriteHeader(http.StatusTooManyRequests)
				return true
			}
			return false
		}
		b := r.settled("", r.create("", r.upload("", chats(3)), "/v1/chat/completions", "24h"), "completed")
		if got := counts(b); got != "completed 3 3 0" {
			t.Error(got)
		}
	})
}

// TestBytes: uploads end at the limit, and leave nothing behind; a batch at the limit waits.
func TestBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Bytes = 100_000 })
		defer r.close()
		filler := r.upload("", strings.Repeat("x", 90_000))
		body, kind := uploadForm(map[string]string{"purpose": "batch"}, strings.Repeat("x", 20_000))
		if status, answer, raw := r.ask("", "POST", "/v1/files", body, kind); status != 413 || answer["error"].(map[string]any)["code"] != "storage_full" {
			t.Error(status, raw)
		}
		if entries, err := os.ReadDir(r.path(filesFolder)); len(entries) != 2 || err != nil {
			t.Error(entries, err)
		}
		input := r.upload("", chats(50))
		r.fake.hook = func(http.ResponseWriter, *http.Request, string) bool {
			time.Sleep(5 * time.Second)
			return false
		}
		id := r.create("", input, "/v1/chat/completions", "24h")
		time.Sleep(5 * time.Minute)
		b := r.batch("", id)
		if b["status"] != "in_progress" || b["errors"].(map[string]any)["data"].([]any)[0].(map[string]any)["code"] != "storage_full" {
			t.Error(b)
		}
		if status, _, raw := r.ask("", "DELETE", "/v1/files/"+filler, nil, ""); status != 200 {
			t.Error(status, raw)
		}
		if b := r.settled("", id, "completed"); counts(b) != "completed 50 50 0" || b["errors"] != nil {
			t.Error(b)
		}
	})
}

// TestAge: files and ended batches go after --batches-ttl, and a file at its own time.
func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.TTL = 48 * time.Hour })
		defer r.close()
		body, kind := uploadForm(map[string]string{
			"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600",
		}, chats(1))
		_, short, raw := r.ask("", "POST", "/v1/files", body, kind)
		if short["expires_at"].(float64)-short["created_at"].(float64) != 3600 {
			t.Error(raw)
		}
		input := r.upload("", chats(1))
		id := r.create("", input, "/v1/chat/completions", "24h")
		r.settled("", id, "completed")
		left := func() int {
			_, files, _ := r.ask("", "GET", "/v1/files", nil, "")
			_, batches, _ := r.ask("", "GET", "/v1/batches", nil, "")
			return len(files["data"].([]any)) + len(batches["data"].([]any))
		}
		for _, step := range []struct {
			wait time.Duration
			want int
		}{{time.Minute, 4}, {time.Hour, 3}, {46 * time.Hour, 3}, {2 * time.Hour, 0}} {
			time.Sleep(step.wait)
			if n := left(); n != step.want {
				t.Errorf("%d are left after %v more, want %d", n, step.wait, step.want)
			}
		}
		if entries, err := os.ReadDir(r.path(filesFolder)); len(entries) != 0 || err != nil {
			t.Error(entries, err)
		}
	})
}

// TestPages: lists have pages, in both orders.
func TestPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		var ids []string
		for range 5 {
			ids = append(ids, r.upload("", "x"))
		}
		for _, order := range []string{"asc", "desc"} {
			var got []string
			for after, more := "", true; more; {
				_, page, _ := r.ask("", "GET", "/v1/files?limit=2&purpose=batch&order="+order+"&after="+after, nil, "")
				for _, f := range page["data"].([]any) {
					got = append(got, f.(map[string]any)["id"].(string))
				}
				after, more = page["last_id"].(string), page["has_more"].(bool)
			}
			if order == "desc" {
				slices.Reverse(got)
			}
			if !slices.Equal(got, ids) {
				t.Error(order, got, ids)
			}
		}
		for _, query := range []string{"limit=0", "limit=x", "order=up", "after=nothing", "limit=10001"} {
			if status, _, raw := r.ask("", "GET", "/v1/files?"+query, nil, ""); status != 400 {
				t.Error(query, status, raw)
			}
		}
		if _, page, _ := r.ask("", "GET", "/v1/files?purpose=batch_output", nil, ""); len(page["data"].([]any)) != 0 {
			t.Error(page)
		}
	})
}

// TestRefused: wrong requests are refused in OpenAI's shape, and leave nothing behind.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		file := r.upload("", chats(1))
		create := func(file, endpoint, window, more string) string {
			return fmt.Sprintf(`{"input_file_id":%q,"endpoint":%q,"completion_window":%q%s}`, file, endpoint, window, more)
		}
		const chat = "/v1/chat/completions"
		for _, body := range []string{
			"", "[]", "{}", create("file-x", chat, "24h", ""), create(file, "/v1/responses", "24h", ""),
			create(file, "/v1/moderations", "24h", ""), create(file, chat, "soon", ""), create(file, chat, "9000h", ""),
			create(file, chat, "24h", `,"metadata":{"`+strings.Repeat("k", 65)+`":"v"}`),
			create(file, chat, "24h", `,"metadata":{"k":1}`),
			create(file, chat, "24h", `,"output_expires_after":{"anchor":"now","seconds":3600}`),
		} {
			status, answer, raw := r.ask("", "POST", "/v1/batches", strings.NewReader(body), "application/json")
			e, _ := answer["error"].(map[string]any)
			if status != 400 || e["message"] == "" || e["type"] != "invalid_request_error" {
				t.Errorf("%s: %d %s", body, status, raw)
			}
		}
		for name, fields := range map[string]map[string]string{
			"no purpose": {}, "other purpose": {"purpose": "vision"},
			"too soon": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
		} {
			body, kind := uploadForm(fields, "x")
			if status, _, raw := r.ask("", "POST", "/v1/files", body, kind); status != 400 {
				t.Error(name, status, raw)
			}
		}
		body, kind := uploadForm(map[string]string{"purpose": "batch"}, "")
		if status, _, raw := r.ask("", "POST", "/v1/files", body, kind); status != 400 {
			t.Error(status, raw)
		}
		torn, kind := uploadForm(map[string]string{"purpose": "batch"}, strings.Repeat("x", 1000))
		if status, _, raw := r.ask("", "POST", "/v1/files", &limited{torn, 900}, kind); status != 400 {
			t.Error("torn:", status, raw)
		}
		if status, _, raw := r.ask("", "POST", "/v1/files", strings.NewReader("x"), "text/plain"); status != 400 {
			t.Error(status, raw)
		}
		for _, path := range []string{"PUT /v1/files", "GET /v1/files/" + file + "/other", "PATCH /v1/batches"} {
			method, path, _ := strings.Cut(path, " ")
			if status, answer, raw := r.ask("", method, path, nil, ""); status != 404 || answer["error"] == nil {
				t.Error(path, status, raw)
			}
		}
		if entries, err := os.ReadDir(r.path(filesFolder)); len(entries) != 2 || err != nil {
			t.Error("left behind:", entries, err)
		}
		id := r.create("", file, chat, "24h")
		r.settled("", id, "completed")
		if status, _, raw := r.ask("", "POST", "/v1/batches/"+id+"/cancel", nil, ""); status != 400 {
			t.Error("cancelled after its end:", status, raw)
		}
	})
}

// TestInUse: a file that a batch reads is not deleted.
func TestInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		r.fake.hook = hang("prompt 0")
		file := r.upload("", chats(1))
		id := r.create("", file, "/v1/chat/completions", "24h")
		synctest.Wait()
		if status, _, raw := r.ask("", "DELETE", "/v1/files/"+file, nil, ""); status != 400 || !strings.Contains(raw, id) {
			t.Error(status, raw)
		}
		r.ask("", "POST", "/v1/batches/"+id+"/cancel", nil, "")
		r.settled("", id, "cancelled")
		if status, answer, raw := r.ask("", "DELETE", "/v1/files/"+file, nil, ""); status != 200 || answer["deleted"] != true {
			t.Error(status, raw)
		}
		if status, _, _ := r.ask("", "GET", "/v1/files/"+file, nil, ""); status != 404 {
			t.Error(status)
		}
	})
}

// TestFolder: others may read nothing of the folder, a second process may not use it, and what a
// crash left is removed.
func TestFolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.fake.hook = hang("prompt 5")
		file := r.upload("", chats(6))
		id := r.create("", file, "/v1/chat/completions", "24h")
		synctest.Wait()
		if _, err := Open(r.config); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Error(err)
		}
		for _, dir := range []string{"", filesFolder, batchesFolder, batchesFolder + "/" + id} {
			info, err := os.Stat(r.path(dir))
			if err != nil || info.Mode().Perm() != 0o700 {
				t.Error(dir, info, err)
			}
			entries, _ := os.ReadDir(r.path(dir))
			for _, e := range entries {
				if info, err := e.Info(); err != nil || !e.IsDir() && info.Mode().Perm() != 0o600 {
					t.Error(info.Name(), info.Mode(), err)
				}
			}
		}
		r.close()
		left := []string{"files/file-1.data", "files/file-1.json.new", "batches/batch_1.json.new"}
		for _, name := range left {
			if err := os.WriteFile(r.path(name), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		broken := r.path("files/file-2.json")
		if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.fake.hook = nil
		r.open()
		defer r.close()
		for _, name := range left {
			if _, err := os.Stat(r.path(name)); !os.IsNotExist(err) {
				t.Error(name, err)
			}
		}
		if _, err := os.Stat(broken); err != nil {
			t.Error("a description that cannot be read is gone:", err)
		}
		if b := r.settled("", id, "completed"); counts(b) != "completed 6 6 0" {
			t.Error(b)
		}
	})
}

// TestInputGone: a batch whose input somebody has removed from the folder fails, with what was
// answered before.
func TestInputGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.fake.hook = hang("prompt 5")
		ids := []string{r.create("", r.upload("", chats(6)), "/v1/chat/completions", "24h")}
		synctest.Wait()
		r.close()
		for name := range r.files {
			if err := os.Remove(r.path(filesFolder, name+dataSuffix)); err != nil {
				t.Fatal(err)
			}
		}
		r.open()
		defer r.close()
		b := r.settled("", ids[0], "failed")
		if len(r.lines("", b, "output_file_id")) != 5 || !strings.Contains(fmt.Sprint(b["errors"]), codeLost) {
			t.Error(b)
		}
	})
}

// TestDrainAtRest: batches that wait for their turn, for their owner's limits or for room do not
// hold up the end of the process.
func TestDrainAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Running = 1 })
		r.fake.hook = func(w http.ResponseWriter, _ *http.Request, _ string) bool {
			w.Header().Set("Retry-After", "100")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		for range 2 {
			r.create("", r.upload("", chats(3)), "/v1/chat/completions", "24h")
		}
		synctest.Wait()
		began := time.Now()
		r.Drain(t.Context())
		if waited := time.Since(began); waited > 0 { // of the bubble
			t.Error("the drain has waited", waited)
		}
		r.close()
	})
}

// TestModelGone: a batch whose model is removed after the validation says so, and waits.
func TestModelGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.fake.hook = hang("prompt 5")
		id := r.create("", r.upload("", chats(6)), "/v1/chat/completions", "24h")
		synctest.Wait()
		r.close()
		r.fake.hook = nil
		r.fake.absent.Store("m")
		r.open()
		defer r.close()
		time.Sleep(time.Hour)
		b := r.batch("", id)
		if b["status"] != "in_progress" || !strings.Contains(fmt.Sprint(b["errors"]), "ollama pull m") {
			t.Error(b)
		}
		r.fake.absent.Store("")
		if b := r.settled("", id, "completed"); counts(b) != "completed 6 6 0" || b["errors"] != nil {
			t.Error(b)
		}
	})
}
