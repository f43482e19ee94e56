package proxy

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestCloud: the answers of a model that runs elsewhere are passed on unchanged, once. No
// keep_alive is written or sent for it, and it has no residence.
func TestCloud(t *testing.T) {
	const ok = "{\"message\":{\"content\":\"hi\"},\"done\":false}\n{\"done\":true}\n"
	answers := map[string]struct {
		status  int
		headers string
		body    string
		outcome Outcome
	}{
		"sign in":   {401, "Content-Type: application/json; charset=utf-8\r\n", `{"error":"unauthorized","signin_url":"https://ollama.com/connect?name=x\u0026key=y"}`, ClientError},
		"off":       {403, "Content-Type: application/json; charset=utf-8\r\n", `{"error":"ollama cloud is disabled: remote inference is unavailable"}`, ClientError},
		"limited":   {429, "Content-Type: application/json\r\nRetry-After: 17\r\nX-Ratelimit-Remaining: 0\r\n", `{"error":"you have reached your hourly usage limit"}`, ClientError},
		"gateway":   {502, "Content-Type: application/json\r\n", `{"error":"bad gateway"}`, UpstreamError},
		"good":      {200, "Content-Type: application/x-ndjson\r\n", ok, OK},
		"not found": {404, "Content-Type: application/json\r\n", `{"error":"model 'glm:cloud' not found"}`, ClientError},
	}
	for name, tt := range answers {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(r received) string {
				return fmt.Sprintf("HTTP/1.1 %d X\r\n%sContent-Length: %d\r\n\r\n%s", tt.status, tt.headers, len(tt.body), tt.body)
			})
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h")})
			for _, model := range []string{"gpt-oss:120b-cloud", "glm:cloud", "GLM:CLOUD", "kimi-k2:1t-Cloud", "user/x:cloud", " glm:cloud "} {
				for _, path := range []string{"/api/chat", "/api/generate", "/api/embed", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"} {
					body := `{"model":"` + model + `","messages":[],"keep_alive":null}`
					client := rg.dial()
					client.send(rawPost(path, body, "Authorization: Bearer up"))
					got := client.receive()
					client.Close()
					if got.line != fmt.Sprintf("HTTP/1.1 %d %s", tt.status, http.StatusText(tt.status)) || string(got.body) != tt.body {
						t.Errorf("%s %s: %s %s", path, model, got.line, got.body)
					}
					for h := range strings.SplitSeq(strings.TrimSuffix(tt.headers, "\r\n"), "\r\n") {
						if !slices.Contains(got.headers, h) {
							t.Errorf("%s %s: %q is not in %q", path, model, h, got.headers)
						}
					}
					if req := f.next(); string(req.body) != body || req.value("Authorization") != "Bearer up" {
						t.Errorf("%s went as %q %s", body, req.headers, req.body)
					}
					if ex := rg.ended(); ex.Outcome != tt.outcome || ex.KeepAlive != "" || ex.Model != model {
						t.Errorf("told as %+v", ex)
					}
				}
			}
			f.none()
			if n := rg.h.backends()[0].residency.models.Len(); n != 0 {
				t.Errorf("%d residences", n)
			}
			if _, ok := rg.h.backends()[0].residency.due(time.Now()); ok {
				t.Error("a touch is due")
			}
		})
	}
}

// TestCloudNames: names that only resemble a cloud model's.
func TestCloudNames(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	for model, cloud := range map[string]bool{
		"cloud": false, "cloud:7b": false, "my-cloud": false, "my-cloud:7b": false, "cloud/x": false, "glm:clouds": false, "glm:cloudy-1": false, "glm:local": false, "localhost:5000-cloud/a/b": false,
		"glm:cloud": true, "glm:7b-cloud": true,
	} {
		rg.post("/api/chat", `{"model":"`+model+`"}`)
		if got := string(f.next().body); strings.Contains(got, "keep_alive") == cloud {
			t.Errorf("%s went as %s", model, got)
		}
	}
}

// TestTouchEndToEnd: a /v1 request is followed by /api/ps and the native empty request that sets
// keep_alive; but not for a cloud model, for NoTouch, or for a request that failed.
func TestTouchEndToEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		noTouch bool
		path    string
		body    string
		status  int
		touch   string // the body
		at      string
	}{
		"chat":       {false, "/v1/chat/completions", `{"model":"m"}`, 200, `"keep_alive":"24h0m0s"`, "/api/generate"},
		"messages":   {false, "/v1/messages", `{"model":"m"}`, 200, `"keep_alive":"24h0m0s"`, "/api/generate"},
		"responses":  {false, "/v1/responses", `{"model":"M:latest"}`, 200, `"keep_alive":"24h0m0s"`, "/api/generate"},
		"embeddings": {false, "/v1/embeddings", `{"model":"m","input":"x"}`, 200, `"keep_alive":"24h0m0s"`, "/api/embed"},
		"turned off": {true, "/v1/chat/completions", `{"model":"m"}`, 200, "", ""},
		"cloud":      {false, "/v1/chat/completions", `{"model":"m:cloud"}`, 200, "", ""},
		"native":     {false, "/api/chat", `{"model":"m"}`, 200, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(r received) string {
				switch {
				case strings.Contains(r.line, "/api/ps"):
					return answer(200, "application/json", `{"models":[{"name":"m:latest","model":"m:latest","expires_at":"2026-01-01T00:00:00Z"}]}`)
				case strings.Contains(r.line, "/api/embed"):
					return answer(200, "application/json", `{"model":"m","embeddings":[]}`)
				}
				return answer(tt.status, "application/json", `{"done":true}`)
			})
			touched := make(chan string, 10)
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), NoTouch: tt.noTouch, Touched: func(model string, err error) { touched <- fmt.Sprint(model, err) }})
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { rg.h.Run(ctx) }) // ends with cancel
			defer wg.Wait()
			defer cancel()
			rg.post(tt.path, tt.body)
			f.next()
			rg.ended()
			if tt.touch == "" {
				if wait, ok := rg.h.backends()[0].residency.due(time.Now()); ok && wait >= 0 {
					t.Errorf("a touch is due in %v", wait)
				}
				return
			}
			for {
				got := f.next()
				if strings.Contains(got.line, "/api/ps") {
					continue
				}
				if !strings.HasPrefix(got.line, "POST "+tt.at+" ") || !strings.Contains(string(got.body), tt.touch) || strings.Contains(string(got.body), `"prompt":"x`) {
					t.Errorf("touched by %s %s", got.line, got.body)
				}
				break
			}
			if got := <-touched; !strings.HasSuffix(got, "<nil>") {
				t.Errorf("told as %q", got)
			}
		})
	}
}
