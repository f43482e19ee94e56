package proxy

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// laneRig is a proxy with some lanes in front of an upstream whose connections the test accepts.
func laneRig(t *testing.T, cfg schedule.Config) (*rig, *fake) {
	f := newFake(t, nil)
	return newRig(t, f.URL, &Handler{Lanes: schedule.NewScheduler(cfg)}), f
}

const chatAnswer = `{"model":"m","message":{"role":"assistant","content":"x"},"done":true,"total_duration":1000000,"prompt_eval_count":10,"prompt_eval_duration":1000,"eval_count":1,"eval_duration":1000}`

// waiting waits until that many requests wait for a lane.
func waiting(t *testing.T, rg *rig, n int) {
	t.Helper()
	waitingIn(t, rg.h.Lanes, n)
}

func waitingIn(t *testing.T, lanes *schedule.Scheduler, n int) {
	t.Helper()
	for until := time.Now().Add(patience); ; runtime.Gosched() {
		sum := 0
		for _, w := range lanes.Stats().Waiting {
			sum += w.Requests
		}
		if sum == n {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("%d requests wait, want %d", sum, n)
		}
	}
}

// TestOneAtATime: with one lane, the next request is sent when the one before has ended. Requests
// that take no slot are sent at once.
func TestOneAtATime(t *testing.T) {
	rg, f := laneRig(t, schedule.Config{Lanes: 1})
	first, second := rg.dial(), rg.dial()
	first.send(rawPost("/api/chat", chatWith("s", "one", "")))
	up := f.accept()
	up.receive()
	second.send(rawPost("/api/chat", chatWith("s", "two", "")))
	waiting(t, rg, 1)

	var other *fakeConn // the transport keeps it
	for _, r := range []string{"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n", rawPost("/api/generate", `{"model":"m","keep_alive":0}`), rawPost("/api/chat", `{"model":"gpt-oss:120b-cloud","messages":[{"role":"user","content":"x"}]}`)} {
		c := rg.dial()
		c.send(r)
		if other == nil {
			other = f.accept()
		}
		other.receive()
		other.send(answer(200, "application/json", `{}`))
		c.receive()
		rg.ended()
	}

	up.send(answer(200, "application/json", chatAnswer))
	first.receive()
	next := make(chan received, 2) // it comes over either connection
	for _, c := range []*fakeConn{up, other} {
		go func() { // ends with the request, or the test's connections
			if r, err := c.head(); err == nil && c.rest(&r) == nil {
				next <- r
				c.Write([]byte(answer(200, "application/json", chatAnswer)))
			}
		}()
	}
	if got := <-next; !strings.Contains(string(got.body), "two") {
		t.Errorf("then came %s", got.body)
	}
	second.receive()
	rg.ended()
	if ex := rg.ended(); ex.Priority != "normal" || ex.Waited == 0 {
		t.Errorf("%+v", ex)
	}
}

// TestLeavesWhileWaiting: a client that leaves while it waits is never sent upstream, and takes no
// lane with it.
func TestLeavesWhileWaiting(t *testing.T) {
	rg, f := laneRig(t, schedule.Config{Lanes: 1})
	first, gone, last := rg.dial(), rg.dial(), rg.dial()
	first.send(rawPost("/api/chat", chatWith("s", "one", "")))
	up := f.accept()
	up.receive()
	for range 3 { // the same client comes again and again
		gone.send(rawPost("/api/chat", chatWith("s", "two", "")))
		waiting(t, rg, 1)
		gone.Close()
		if ex := rg.ended(); ex.Outcome != ClientGone {
			t.Errorf("%+v", ex)
		}
		waiting(t, rg, 0)
		gone = rg.dial()
	}
	last.send(rawPost("/api/chat", chatWith("s", "three", "")))
	waiting(t, rg, 1)
	up.send(answer(200, "application/json", chatAnswer))
	if got := up.receive(); !strings.Contains(string(got.body), "three") {
		t.Errorf("then came %s", got.body)
	}
	up.send(answer(200, "application/json", chatAnswer))
	last.receive()
}

// fullRig has its only lane busy, and its queue full.
func fullRig(t *testing.T) *rig {
	t.Helper()
	rg, f := laneRig(t, schedule.Config{Lanes: 1, Limit: 1})
	busy, waits := rg.dial(), rg.dial()
	busy.send(rawPost("/api/chat", chatWith("s", "one", "")))
	f.accept().receive()
	waits.send(rawPost("/api/chat", chatWith("s", "two", "")))
	waiting(t, rg, 1)
	return rg
}

// TestQueueFull: a request beyond the queue's limit is refused in the dialect of its path.
func TestQueueFull(t *testing.T) {
	rg := fullRig(t)
	const words = "server busy, please try again.  maximum pending requests exceeded"
	for path, want := range map[string]string{
		"/api/chat":            `{"error":"` + words + `"}`,
		"/v1/chat/completions": `{"error":{"code":null,"message":"` + words + `","param":null,"type":"api_error"}}`,
		"/v1/messages":         `{"error":{"message":"` + words + `","type":"overloaded_error"},"type":"error"}`,
	} {
		res, text := rg.post(path, chatWith("s", "three", ""))
		if res.StatusCode != 503 || text != want || res.Header.Get("Retry-After") == "" {
			t.Errorf("%s: %d %s, Retry-After %q", path, res.StatusCode, text, res.Header.Get("Retry-After"))
		}
		if ex := rg.ended(); ex.Outcome != Refused {
			t.Errorf("%+v", ex)
		}
	}
}

// TestPriority: interactive requests go before batch requests; the header is not forwarded.
func TestPriority(t *testing.T) {
	rg, f := laneRig(t, schedule.Config{Lanes: 1})
	busy, batch, urgent := rg.dial(), rg.dial(), rg.dial()
	busy.send(rawPost("/api/chat", chatWith("s", "one", "")))
	up := f.accept()
	up.receive()
	batch.send(rawPost("/api/chat", chatWith("t", "slow", ""), headerPriority+": batch"))
	waiting(t, rg, 1)
	urgent.send(rawPost("/api/chat", chatWith("u", "urgent", ""), headerPriority+": Interactive"))
	waiting(t, rg, 2)
	for i, want := range []string{"urgent", "slow"} {
		up.send(answer(200, "application/json", chatAnswer))
		got := up.receive()
		if !strings.Contains(string(got.body), want) || got.value(headerPriority) != "" {
			t.Errorf("request %d: %s, %v", i, got.body, got.headers)
		}
	}
	up.send(answer(200, "application/json", chatAnswer))
	batch.receive()
}

// TestBrokenAnswersFreeLanes: however a request ends, its lane becomes free. The upstream never
// sees more requests than lanes.
func TestBrokenAnswersFreeLanes(t *testing.T) {
	var mu sync.Mutex
	now, most, n := 0, 0, 0
	f := newFake(t, func(r received) string {
		mu.Lock()
		if now++; now > most {
			most = now
		}
		n++
		status := []int{200, 404, 500}[n%3]
		mu.Unlock()
		defer func() { mu.Lock(); now--; mu.Unlock() }()
		return answer(status, "application/json", chatAnswer)
	})
	rg := newRig(t, f.URL, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 3})})
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() { rg.post("/api/chat", chatWith("s", fmt.Sprint(i%5), "")) })
	}
	wg.Wait()
	for range 200 {
		rg.ended()
	}
	if st := rg.h.Lanes.Stats(); most > 3 || n != 200 || len(st.Runners) > 0 && st.Runners[0].Busy > 0 {
		t.Errorf("%d requests, %d at once, %+v", n, most, st)
	}
}

// TestUnreadWaits: requests that need a prompt evaluated but cannot be read are sent one at a time,
// fairly, beside readable ones, and do not hold those up. When one ends, its lane is free again.
func TestUnreadWaits(t *testing.T) {
	const max = 2000
	padded := `{"model":"m",` + strings.Repeat(" ", 3*max) + `"messages":[{"role":"user","content":"x"}]}`
	for name, request := range map[string]string{
		"padded":         rawPost("/api/chat", padded),
		"large":          rawPost("/v1/chat/completions", chatWith("s", strings.Repeat("x", 3*max), "")),
		"padded, chunks": fmt.Sprintf("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(padded), padded),
		"zstd":           rawPost("/v1/responses", "\x28\xb5\x2f\xfd\x04", "Content-Encoding: zstd"),
		"unknown coding": rawPost("/v1/messages", "abc", "Content-Encoding: new"),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, nil)
			rg := newRig(t, f.URL, &Handler{MaxBody: max, Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1})})
			busy := rg.dial() // the lane of what can be read
			busy.send(rawPost("/api/chat", chatWith("s", "one", "")))
			up := f.accept()
			up.receive()
			clients := []*fakeConn{rg.dial(), rg.dial()}
			clients[0].send(request)
			other := f.accept()
			other.receive()
			clients[1].send(request)
			waitingIn(t, rg.h.Lanes.Aside(), 1)
			if name == "zstd" || name == "unknown coding" { // of a body that was read to its end it is seen that the client leaves
				gone := rg.dial()
				gone.send(request)
				waitingIn(t, rg.h.Lanes.Aside(), 2)
				gone.Close()
				waitingIn(t, rg.h.Lanes.Aside(), 1)
				if ex := rg.ended(); ex.Outcome != ClientGone || ex.Priority != "normal" {
					t.Errorf("told as %+v", ex)
				}
			}
			other.send(answer(200, "application/json", chatAnswer))
			clients[0].receive()
			if ex := rg.ended(); ex.Outcome != OK || ex.Unedited == "" || ex.Upstream != "up" {
				t.Errorf("told as %+v", ex)
			}
			other.receive()
			other.send(answer(500, "application/json", `{"error":"x"}`))
			clients[1].receive()
			if ex := rg.ended(); ex.Waited == 0 {
				t.Errorf("told as %+v", ex)
			}
			waitingIn(t, rg.h.Lanes.Aside(), 0)
			last := rg.dial()
			last.send(request)
			other.receive()
			waits := rg.dial()
			waits.send(request)
			waitingIn(t, rg.h.Lanes.Aside(), 1)
			rg.h.Lanes.Close()
			if got := waits.receive(); !strings.Contains(got.line, " 503 ") {
				t.Errorf("while stopping: %s", got.line)
			}
			for up, c := range map[*fakeConn]*fakeConn{up: busy, other: last} {
				up.send(answer(200, "application/json", chatAnswer))
				if got := c.receive(); !strings.Contains(got.line, " 200 ") {
					t.Errorf("%+v", got)
				}
			}
		})
	}
}

// TestUnreadIsSent: without a limit of lanes, or without a prompt, unreadable requests do not wait.
func TestUnreadIsSent(t *testing.T) {
	f := newFake(t, nil)
	off := schedule.NewScheduler(schedule.Config{Lanes: 1})
	off.SetLanes(0, schedule.Unlimited)
	for path, lanes := range map[string]*schedule.Scheduler{"/api/chat": off, "/v1/messages": nil, "/v1/embeddings": schedule.NewScheduler(schedule.Config{Lanes: 1}), "/api/embed": schedule.NewScheduler(schedule.Config{Lanes: 1})} {
		rg := newRig(t, f.URL, &Handler{MaxBody: 2000, Lanes: lanes})
		for range 3 {
			rg.dial().send(rawPost(path, `{"model":"m","x":"`+strings.Repeat("x", 3000)+`"}`))
			f.accept().receive() // none has been answered
		}
	}
}

// TestStopping: requests that wait when the proxy stops get an answer at once.
func TestStopping(t *testing.T) {
	rg, f := laneRig(t, schedule.Config{Lanes: 1})
	busy, waits := rg.dial(), rg.dial()
	busy.send(rawPost("/api/chat", chatWith("s", "one", "")))
	up := f.accept()
	up.receive()
	waits.send(rawPost("/api/chat", chatWith("s", "two", "")))
	waiting(t, rg, 1)
	rg.h.Lanes.Close()
	if got := waits.receive(); !strings.Contains(got.line, " 503 ") || got.value("Retry-After") == "" || !strings.Contains(string(got.body), "is stopping") {
		t.Errorf("%+v %s", got, got.body)
	}
	up.send(answer(200, "application/json", chatAnswer))
	if got := busy.receive(); !strings.Contains(got.line, " 200 ") {
		t.Errorf("%+v", got)
	}
}

// TestNoWaitWhileDown: requests do not wait one after the other for an upstream that does not
// answer.
func TestNoWaitWhileDown(t *testing.T) {
	rg := newRig(t, refusing(t), &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1})})
	rg.h.Upstreams[0].Poll(t.Context())
	for range 3 {
		if res, _ := rg.post("/api/chat", chatWith("s", "one", "")); res.StatusCode != 502 {
			t.Errorf("%d", res.StatusCode)
		}
		if ex := rg.ended(); ex.Priority != "" {
			t.Errorf("it waited for a lane: %+v", ex)
		}
	}
}

// TestStreamsTellSlots: of streams in every dialect it is known how many run at the same time as
// soon as they have begun; of answers that are not streamed, when they end.
func TestStreamsTellSlots(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n" +
		"Transfer-Encoding: chunked\r\n\r\n"
	for _, w := range []struct {
		path, fields string
		lanes        int // once two have begun
	}{
		{"/api/chat", ``, 2},
		{"/api/chat", `"stream":false,`, 1},
		{"/v1/chat/completions", `"stream":true,`, 2},
		{"/v1/chat/completions", ``, 1},
		{"/v1/messages", `"stream":true,`, 2},
		{"/v1/messages", ``, 1},
	} {
		t.Run(w.path+" "+w.fields, func(t *testing.T) {
			rg, f := laneRig(t, schedule.Config{})
			var clients, ups []*fakeConn
			for i := range 2 {
				c := rg.dial()
				message := fmt.Sprintf(`{%s"model":"m","messages":[{"role":"user","content":"%d"}]}`, w.fields, i)
				c.send(rawPost(w.path, message))
				up := f.accept()
				up.receive()
				up.send(head)
				up.chunk("x")
				if c.mustHead(); c.mustChunk() != "x" {
					t.Error("another chunk came")
				}
				clients, ups = append(clients, c), append(ups, up)
			}
			if got := rg.h.Lanes.Stats().Runners[0].Lanes; got != w.lanes {
				t.Errorf("%d lanes, want %d", got, w.lanes)
			}
			for i := range clients {
				ups[i].send("0\r\n\r\n")
				if chunk, err := clients[i].nextChunk(); chunk != "" || err != nil {
					t.Errorf("%q %v", chunk, err)
				}
				rg.ended()
			}
		})
	}
}
