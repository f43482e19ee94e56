package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// TestKeyLines: the settings that a line may have. An error names the line and the valid forms, and
// never contains a key.
func TestKeyLines(t *testing.T) {
	for text, want := range map[string][]string{
		"one\ntwo":     {"::1:::", "::1:::"},
		"one\none\n":   {"::1:::"},
		"weight=2":     {"::1:::"}, // a line of one word is a key, whatever it looks like
		"alice one":    {"alice::1:::"},
		"a.b_c-D@e k=": {"a.b_c-D@e::1:::"},
		"\ufeff# x\r\n\talice\tone   class=batch  weight=0.5 \r\rbob two max-waiting=3 rate=600/m\n": {"alice:batch:0.5:::", "bob::1:3:10:600"},
		"a k rate=10/s class=interactive":                              {"a:interactive:1::10:10"},
		"a k rate=3600/h\nb " + strings.Repeat("k", 5000):              {"a::1::1:3600", "b::1:::"},
		strings.Repeat("n", longestKeyName) + " k class=normal\nplain": {strings.Repeat("n", longestKeyName) + ":normal:1:::", "::1:::"},
	} {
		k, err := ParseKeys(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		var got []string
		for _, p := range *k.holders.Load() {
			s := p.name + ":"
			if p.classed {
				s += p.class.String()
			}
			s += ":" + strconv.FormatFloat(p.weight, 'g', -1, 64) + ":"
			if p.maxWaiting > 0 {
				s += strconv.Itoa(p.maxWaiting)
			}
			s += ":"
			if p.limiter != nil {
				s += fmt.Sprintf("%g:%d", float64(p.limiter.Limit()), p.limiter.Burst())
			} else {
				s += ":"
			}
			got = append(got, s)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	const form = "want KEY, or NAME KEY"
	for text, want := range map[string][]string{
		"":                 {"one key a line"},
		"# only\n\n":       {"one key a line"},
		"a secret\nsecret": {"line 2", "another line has this key"},
		"a one\na secret":  {"line 2", "line 1", `"a"`},
		"sk-secret alice":  {"line 1", "begin with sk-", form},
		"é secret":         {"line 1", "letters", form},
		"a/b secret":       {"line 1", form},
		strings.Repeat("n", longestKeyName+1) + " secret": {"line 1", "64", form},
		"secret weight=2":            {"line 1", "needs a name", form},
		"ok\n\na secret wieght=2":    {"line 3", "no setting", form},
		"a secret secret":            {"no setting", form},
		"a secret weight":            {"no setting", form},
		"a secret weight=0":          {"weight=0", "0.1 to 10"},
		"a secret weight=NaN":        {"weight=NaN", "0.1 to 10"},
		"a secret weight=-1":         {"0.1 to 10"},
		"a secret weight=":           {"0.1 to 10"},
		"a secret weight=1e3":        {"0.1 to 10"},
		"a secret class=Batch":       {"class=Batch", "class=interactive"},
		"a secret class=sparse":      {"class=interactive"},
		"a secret max-waiting=0":     {"max-waiting=0", "from 1 on"},
		"a secret max-waiting=1.5":   {"from 1 on"},
		"a secret rate=10":           {"rate=10", "rate=600/m"},
		"a secret rate=0/s":          {"rate=600/m"},
		"a secret rate=1/d":          {"rate=600/m"},
		"a secret rate=/s":           {"rate=600/m"},
		"a secret rate=1/s rate=1/s": {"rate is given twice"},
		"ok\na \xffsecret":           {"line 2", "UTF-8"},
		"a secret\x00":               {"UTF-8"},
	} {
		_, err := ParseKeys(text)
		if err == nil {
			t.Errorf("%q is taken", text)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q: %v, want it to say %q", text, err, w)
			}
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("the error tells a key: %v", err)
		}
	}
}

// FuzzKeys: no text causes a panic. Accepted keys and names are unique; a file that is refused
// changes nothing.
func FuzzKeys(f *testing.F) {
	for _, text := range []string{
		"one\ntwo\n", "a b c", "a weight=1", "\xff\xfe", "a k weight=1e309",
		"# c\n\ufeffalice one weight=2 class=batch max-waiting=5 rate=10/s\r\nbob two rate=600/m",
		"a k rate=99999999999999999999/s",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		k, err := ParseKeys("the-old-key")
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Replace(text); err != nil {
			if k.Len() != 1 || k.check("the-old-key") == nil {
				t.Errorf("a file with %v replaced the keys", err)
			}
			return
		}
		names, sums := map[string]bool{}, map[[32]byte]bool{}
		for _, p := range *k.holders.Load() {
			if sums[p.sum] || p.name != "" && names[p.name] {
				t.Errorf("twice: %q", p.name)
			}
			names[p.name], sums[p.sum] = true, true
			if p.name == "" &&
				(p.weight != 1 || p.classed || p.maxWaiting != 0 || p.limiter != nil) {
				t.Errorf("settings without a name: %+v", p)
			}
			if !(p.weight >= 0.1 && p.weight <= 10 && p.share > 0 && p.share <= 1) ||
				p.maxWaiting < 0 ||
				p.limiter != nil && !(p.limiter.Limit() > 0 && p.limiter.Burst() > 0) {
				t.Errorf("%+v", p)
			}
		}
		for line := range strings.Lines(text) { // the plain form: one key per line
			key := strings.TrimSuffix(line, "\n")
			plain := key != "" && !strings.HasPrefix(key, "#") && !strings.ContainsAny(key, "\r\ufeff") &&
				!strings.ContainsFunc(key, unicode.IsSpace)
			if plain && k.check(key) == nil {
				t.Errorf("the key %q is not asked for", key)
			}
		}
	})
}

// TestKeyClass: a request's priority depends on the class of its key and on what it asks for.
func TestKeyClass(t *testing.T) {
	k, err := ParseKeys(
		"plain\nnone k0\nfirst k1 class=interactive\nmiddle k2 class=normal\nlast k3 class=batch",
	)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{ // asks: none, junk, interactive, normal, batch
		"":      "normal normal interactive normal batch",
		"plain": "normal normal interactive normal batch",
		"k0":    "normal normal interactive normal batch",
		"k1":    "interactive interactive interactive normal batch",
		"k2":    "normal normal normal normal batch",
		"k3":    "batch batch batch batch batch",
	} {
		var got []string
		for _, asked := range []string{"", "urgent", "Interactive", "normal", "batch"} {
			r := httptest.NewRequest("POST", "/api/chat", nil)
			r.Header.Set(headerPriority, asked)
			got = append(got, k.check(key).priority(r).String())
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %s, want %s", key, s, want)
		}
	}
}

// bearer is the header with a key.
func bearer(key string) string { return "Authorization: Bearer " + key }

// TestKeyMaxWaiting: a key may have its limit of requests waiting. One more is refused in its
// dialect's form, even after the file was read again, while other keys' requests wait. Requests
// that get a lane at once do not count.
func TestKeyMaxWaiting(t *testing.T) {
	const file = "few k1 max-waiting=2\nmany k2\n"
	f := newFake(t, nil)
	rg := newRig(
		t,
		f.URL,
		&Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1}), Guard: withKeys(t, file)},
	)
	var up *fakeConn
	chats := make([]*fakeConn, 4)
	for i, key := range []string{"k1", "k1", "k1", "k2"} {
		chats[i] = rg.dial()
		chats[i].send(rawPost("/api/chat", chatWith("s", fmt.Sprint(i), ""), bearer(key)))
		if i == 0 {
			up = f.accept()
			up.receive()
		}
		waiting(t, rg, i)
	}
	refused := func(path, shape string) {
		t.Helper()
		res, text := rg.post(path, chatWith("s", "more", ""), bearer("k1"))
		if res.StatusCode != 429 || res.Header.Get("Retry-After") != retryAfter ||
			!strings.Contains(text, `named few wait already`) ||
			!strings.Contains(text, shape) ||
			strings.Contains(text, "k1") {
			t.Errorf("%s: %d %s %v", path, res.StatusCode, text, res.Header)
		}
		if ex := rg.ended(); ex.Outcome != Refused || ex.Name != "few" || ex.Status != 429 {
			t.Errorf("%+v", ex)
		}
		waiting(t, rg, 3)
	}
	refused("/api/chat", `{"error":"`)
	refused("/v1/chat/completions", `"type":"rate_limit_error"`)
	refused("/v1/messages", `"type":"rate_limit_error"`)
	if err := rg.h.Guard.Keys.Replace("# read again\n" + file); err != nil {
		t.Fatal(err)
	}
	refused("/api/chat", `{"error":"`)
	long := chatWith("s", strings.Repeat("long ", bodyFirst), "") // it is refused unread
	if res, text := rg.post("/api/chat", long, bearer("k1")); res.StatusCode != 429 {
		t.Errorf("a long body: %d %s", res.StatusCode, text)
	} else if ex := rg.ended(); ex.BytesIn != 0 {
		t.Errorf("%d bytes were read", ex.BytesIn)
	}
	chats[1].Close() // a client that leaves makes room
	if ex := rg.ended(); ex.Outcome != ClientGone {
		t.Errorf("%+v", ex)
	}
	again := rg.dial()
	again.send(rawPost("/api/chat", chatWith("s", "again", ""), bearer("k1")))
	waiting(t, rg, 3)
	for range 4 {
		up.send(answer(200, "application/json", chatAnswer))
		rg.ended()
		if len(rg.done) == 0 && rg.h.Waiting() == 0 && rg.h.InFlight() == 0 {
			break
		}
		up.receive()
	}
	for _, p := range *rg.h.Guard.Keys.holders.Load() {
		if n := p.waiting.Load(); n != 0 {
			t.Errorf("%d requests of %s are counted as waiting", n, p.name)
		}
	}
}

// TestKeyMaxWaitingAway: requests that wait for an absent server count as well; a request that was
// admitted before the server died is not refused.
func TestKeyMaxWaitingAway(t *testing.T) {
	for _, lanes := range []int{1, schedule.Unlimited} {
		inTime(
			t,
			lanes,
			time.Minute,
			func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
				h.Guard = withKeys(t, "few k1 max-waiting=1\nmany k2")
				m.live(false)
				waits := ask("/api/embed", `{"model":"m","input":"x"}`, bearer("k1"))
				synctest.Wait()
				late := ask("/api/embed", `{"model":"m","input":"y"}`, bearer("k1"))
				other := ask("/api/embed", `{"model":"m","input":"z"}`, bearer("k2"))
				if got := count([]*asked{waits, late, other}); got[0] != 2 || late.Code != 429 {
					t.Errorf("%v", got)
				}
				m.live(true)
				time.Sleep(5 * time.Second)
				if got := count([]*asked{waits, other}); got[200] != 2 {
					t.Errorf("back: %v", got)
				}
				if n := h.Guard.Keys.check("k1").waiting.Load(); n != 0 {
					t.Errorf("%d are counted as waiting", n)
				}
			},
		)
	}
	p := &keyHolder{maxWaiting: 1, waiting: &atomic.Int64{}}
	if !p.mayWait(false, nil) || p.mayWait(false, nil) || !p.mayWait(true, nil) {
		t.Error("of two that come one may wait, and one that was let in before may wait again")
	}
}

// TestKeyRate: a request beyond the rate learns when it may be sent; lists do not count, and other
// keys are not affected.
func TestKeyRate(t *testing.T) {
	const file = "slow k1 rate=2/h admin\nquick k2\n"
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, file)})
	ask := func(path, key string) (int, string, string) {
		res, text := rg.post(path, `{"model":"m"}`, bearer(key))
		rg.ended()
		return res.StatusCode, text, res.Header.Get("Retry-After")
	}
	for i := range 2 {
		if status, text, _ := ask("/api/chat", "k1"); status != 200 {
			t.Fatalf("request %d: %d %s", i, status, text)
		}
	}
	refused := func(path, shape string) {
		t.Helper()
		status, text, after := ask(path, "k1")
		if n, err := strconv.Atoi(
			after,
		); status != 429 || err != nil || n < 1 || n > 1800 || !strings.Contains(text, shape) ||
			!strings.Contains(text, "named slow") {
			t.Errorf("%s: %d %s, Retry-After %q", path, status, text, after)
		}
	}
	refused("/api/embed", `{"error":"`)
	refused("/v1/messages", `{"error":{"message":`)
	refused(pathAudio, `"type":"rate_limit_error"`)
	for _, path := range []string{"/api/show", "/api/pull"} {
		if status, text, _ := ask(path, "k1"); status != 200 {
			t.Errorf("%s: %d %s", path, status, text)
		}
	}
	if status, text, _ := ask("/api/chat", "k2"); status != 200 {
		t.Errorf("another key: %d %s", status, text)
	}
	if err := rg.h.Guard.Keys.Replace("# read again\n" + file); err != nil {
		t.Fatal(err)
	}
	refused("/api/chat", `{"error":"`)
	if err := rg.h.Guard.Keys.Replace("slow k1 rate=3/h"); err != nil {
		t.Fatal(err)
	}
	if status, text, _ := ask("/api/chat", "k1"); status != 200 {
		t.Errorf("with a higher rate: %d %s", status, text)
	}
}

// TestKeyNames: a request is reported with the name of its key, and the key appears nowhere.
func TestKeyNames(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, "alice "+theKey+"\nplain-key")})
	for key, name := range map[string]string{theKey: "alice", "plain-key": "", "wrong": ""} {
		rg.post("/api/chat", `{"model":"m"}`, bearer(key))
		if ex := rg.ended(); ex.Name != name {
			t.Errorf("%s: told as %q", key, ex.Name)
		}
	}
	if log := rg.log.String(); strings.Contains(log, theKey) ||
		strings.Contains(log, "plain-key") ||
		!strings.Contains(log, `"key_name":"alice"`) {
		t.Errorf("the log: %s", log)
	}
}

// TestKeysWhileReplaced: a request that is admitted while the file is read again has the limits
// that one of the two files sets for its key.
func TestKeysWhileReplaced(t *testing.T) {
	const limited, without = "alice k1 class=batch max-waiting=3\n", "bob k2\n"
	g := withKeys(t, limited)
	h := newRig(t, newFake(t, okAnswer).URL, &Handler{Guard: g}).h
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				g.Keys.Replace([]string{without, limited}[i%2])
			}
		}
	}()
	in := 0
	for range 20_000 {
		r := httptest.NewRequest(http.MethodPost, "/api/chat", nil)
		r.Host = "localhost"
		r.Header.Set("Authorization", "Bearer k1")
		r.Header.Set(headerPriority, "interactive")
		ex := &exchange{header: http.Header{}}
		if h.admit(httptest.NewRecorder(), r, ex) {
			continue
		}
		in++
		if p := ex.holder.priority(r); p != schedule.Batch || ex.Name != "alice" {
			t.Fatalf("it is let in as %q, with priority %v", ex.Name, p)
		}
	}
	close(stop)
	<-stopped
	if in == 0 {
		t.Error("nobody was let in")
	}
}
