package proxy

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// asking sends a request in virtual time; see inTime.
type asking func(path, body string, headers ...string) *asked

// get returns the answer to a GET.
func get(ask asking, path string, headers ...string) *asked {
	a := ask(path, "", headers...)
	<-a.ended
	return a
}

// queueOf reads the page.
func queueOf(
	t *testing.T,
	ask asking,
	query string,
	headers ...string,
) (page queuePage, text string) {
	t.Helper()
	a := get(ask, pathQueue+query, headers...)
	text = a.Body.String()
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&page); err != nil || a.Code != http.StatusOK {
		t.Fatalf("%d %v: %s", a.Code, err, text)
	}
	return page, text
}

// TestQueuePage: waiting requests are shown with their place, age and expected start, once
// something is known, and with the error of earlier estimates; clients and keys are not shown.
func TestQueuePage(t *testing.T) {
	inTime(
		t,
		1,
		time.Minute,
		func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			h.Guard = withKeys(t, "alice "+theKey+"\nplain-key")
			chat := func(text, key string, headers ...string) *asked {
				a := ask("/api/chat", chatWith("system", text, ""), append(headers, bearer(key))...)
				synctest.Wait()
				return a
			}
			all := []*asked{
				chat("one", theKey),
				chat("two", "plain-key"),
				chat("three", theKey, headerPriority+": batch"),
			}
			time.Sleep(500 * time.Millisecond)
			page, text := queueOf(t, ask, "", bearer(theKey))
			if page.Waiting != 2 || page.Queued != 2 || len(page.Requests) != 2 ||
				page.Priorities["batch"].Requests != 1 ||
				page.Priorities["normal"] != (queuedEntry{1, 0.5}) ||
				page.Priorities["interactive"].Requests != 0 {
				t.Fatalf("%s", text)
			}
			first, second := page.Requests[0], page.Requests[1]
			if first.Place != 1 || second.Place != 2 || first.Start != nil || first.Age != 0.5 || first.Name != "" ||
				second.Name != "alice" || second.Priority != "batch" ||
				first.Model != "m:latest" ||
				first.Upstream != "up" ||
				first.Tokens < 1 ||
				first.Client == second.Client ||
				first.Flow == second.Flow ||
				len(first.Client) != 16 {
				t.Errorf("%+v, %+v", first, second)
			}
			if e := page.Estimates; e.Count != 0 || e.Error != nil || e.Waited != nil ||
				e.Bias != nil ||
				!strings.Contains(text, `"estimated_start_s":null`) {
				t.Errorf("nothing is known yet: %s", text)
			}
			if s := page.Servers; len(s) != 1 || !s[0].Up || s[0].Name != "up" ||
				len(s[0].Models) != 1 ||
				s[0].Models[0].Busy != 1 ||
				s[0].Models[0].Lanes != 1 ||
				s[0].Models[0].Learned ||
				s[0].Models[0].Waiting != 2 {
				t.Errorf("servers: %+v", s)
			}
			for _, secret := range []string{theKey, "plain-key", "one", "two", "system", "192.0.2.1"} {
				if strings.Contains(text, secret) {
					t.Errorf("the page tells %q: %s", secret, text)
				}
			}
			time.Sleep(time.Minute)
			for i := range 5 {
				all = append(all, chat(fmt.Sprint("again ", i), theKey))
			}
			time.Sleep(250 * time.Millisecond)
			page, text = queueOf(t, ask, "?limit=2", bearer("plain-key"))
			if page.Queued != 4 || len(page.Requests) != 2 {
				t.Fatalf("%s", text)
			}
			for i, q := range page.Requests {
				want := 0.75 + float64(i) // each takes a second
				if q.Start == nil || *q.Start < want-0.2 || *q.Start > want+0.2 ||
					q.Client != second.Client {
					t.Errorf("request %d, which will begin in %v s: %s", i, want, text)
				}
			}
			time.Sleep(time.Minute)
			if got := count(all); got[200] != len(all) {
				t.Errorf("%v", got)
			}
			page, text = queueOf(t, ask, "?limit=0", bearer(theKey))
			if e := page.Estimates; e.Count != 4 || *e.Error > 0.3 || *e.Bias > *e.Error ||
				*e.Bias < -*e.Error ||
				page.Queued != 0 {
				t.Errorf("%s", text)
			}
			for query, want := range map[string]string{
				"?limit=x": "limit: want how many", "?limit=-1": "up to 1000",
				"?limit=1001": "?limit=20",
			} {
				if w := get(
					ask,
					pathQueue+query,
					bearer(theKey),
				); w.Code != 400 ||
					!strings.Contains(w.Body.String(), want) {
					t.Errorf("%s: %d %s", query, w.Code, w.Body)
				}
			}
			if w := get(ask, pathQueue); w.Code != http.StatusUnauthorized {
				t.Errorf("without a key: %d %s", w.Code, w.Body)
			}
		},
	)
}

// TestQueuePageAway: requests that wait for an absent server are shown without a time. With --slots
// off no request has a place.
func TestQueuePageAway(t *testing.T) {
	for _, lanes := range []int{1, schedule.Unlimited, -2} {
		inTime(
			t,
			lanes,
			time.Minute,
			func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
				m.live(false)
				a := ask("/api/chat", chatWith("s", "one", ""))
				synctest.Wait()
				page, text := queueOf(t, ask, "")
				queued := 1
				if h.Lanes == nil {
					queued = 0
				}
				if page.Waiting != 1 || page.Queued != queued || len(page.Requests) != queued ||
					page.Estimates.Count != 0 || len(page.Priorities) != 3 {
					t.Errorf("%s", text)
				}
				for _, q := range page.Requests {
					if q.Start != nil {
						t.Errorf("%s", text)
					}
				}
				m.live(true)
				time.Sleep(5 * time.Second)
				if got := count([]*asked{a}); got[200] != 1 {
					t.Error(got)
				}
			},
		)
	}
}

// TestRequestsTellWaits: the page of the last requests and the log show the client, as on the page
// of the queue, the request's wait in the proxy, and its whole duration.
func TestRequestsTellWaits(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		log := &logBuffer{}
		h.Log = slog.New(slog.NewJSONHandler(log, nil))
		h.Guard = withKeys(t, "alice "+theKey+"\nplain-key")
		first := ask("/api/chat", chatWith("system", "one", ""), bearer("plain-key"))
		synctest.Wait()
		second := ask("/api/chat", chatWith("another", "two", ""), bearer(theKey))
		synctest.Wait()
		queue, text := queueOf(t, ask, "", bearer(theKey))
		if len(queue.Requests) != 1 {
			t.Fatal(text)
		}
		<-first.ended
		<-second.ended
		var page requestsPage
		if err := json.Unmarshal(get(ask, pathRequests, bearer(theKey)).Body.Bytes(), &page); err != nil || len(page.Requests) != 2 {
			t.Fatal(err, page)
		}
		s, f := page.Requests[0], page.Requests[1]
		// Each works for a second, and the second one waits for the first.
		if s.Waited != 1000 || s.Duration != 2000 || f.Waited != 0 || f.Duration != 1000 {
			t.Errorf("waited %v and %v ms of %v and %v", f.Waited, s.Waited, f.Duration, s.Duration)
		}
		if s.Client != queue.Requests[0].Client || s.Name != "alice" || f.Client == s.Client || f.Client == "" || f.Name != "" {
			t.Errorf("asked by %q (%q) and %q (%q), queued by %q", f.Client, f.Name, s.Client, s.Name, queue.Requests[0].Client)
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		want := []string{`"client":"` + s.Client + `"`, `"waited_ms":1000`, `"duration_ms":2000`, `"key_name":"alice"`}
		for _, w := range want {
			if !strings.Contains(lines[len(lines)-1], w) {
				t.Errorf("the log lacks %s: %s", w, lines[len(lines)-1])
			}
		}
	})
}
