package batch

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
)

// TestLearnedSlots: without a proxy's lanes, one more request than there are slots is in flight, as
// far as times reveal the slots.
func TestLearnedSlots(t *testing.T) {
	for _, slots := range []int{1, 2, 4, 16} {
		var l limit
		for range 400 {
			n := l.target()
			const served = 100 * time.Millisecond
			waited := max(0, time.Duration(float64(served)*(float64(n)/float64(slots)-1)))
			l.answered(n, Counts{Answers: 1, Total: served + waited, PromptEval: served / 2, Eval: served / 2})
		}
		if got := l.target(); got < slots || got > slots+2 {
			t.Errorf("%d slots: %d in flight", slots, got)
		}
	}
}

func TestBackOff(t *testing.T) {
	l := limit{lanes: 4}
	if l.target() != perLane*5 {
		t.Fatalf("%d in flight for four lanes", l.target())
	}
	at := time.Now()
	if !l.backOff(at, at.Add(time.Second)) || l.backOff(at.Add(time.Millisecond), at.Add(2*time.Second)) {
		t.Error("requests that were sent together count once")
	}
	half := perLane * 5 / 2
	if l.target() != half {
		t.Errorf("%d in flight after the first, want %d", l.target(), half)
	}
	for i := range 20 {
		l.backOff(at.Add(time.Duration(i+2)*time.Second), at.Add(time.Duration(i+2)*time.Second))
	}
	if l.target() != 1 {
		t.Errorf("%d in flight after many", l.target())
	}
	for range 3 * recoverAfter {
		l.answered(1, Counts{Answers: 1})
	}
	if l.target() != 4 {
		t.Errorf("%d in flight after %d answers", l.target(), 3*recoverAfter)
	}
	fixed := limit{fixed: 7}
	if fixed.backOff(at, at); fixed.target() != 7 {
		t.Errorf("%d in flight where 7 are wanted", fixed.target())
	}
}

func TestOverloaded(t *testing.T) {
	for text, want := range map[string]bool{
		"cudaMalloc failed: out of memory": true, "model requires more system memory (9 GiB) than is available (2 GiB)": true,
		"model runner has unexpectedly stopped": false, "": false,
	} {
		if overloaded(500, text) != want || !overloaded(503, text) {
			t.Errorf("%q", text)
		}
	}
}

// TestGPU: a model that leaves GPU memory, in part, is reported once; one that was never in it is
// not.
func TestGPU(t *testing.T) {
	c := config(t, serve(t, &fake{}), numbered(1))
	b := &batch{Config: &c, limit: limit{lanes: 8}, context: map[string]int{}, onGPU: map[string]float64{}}
	all := b.limit.target()
	see := func(model string, vram int64, want int) {
		t.Helper()
		b.look(nil, []api.ProcessModelResponse{{Name: model, Size: 100, SizeVRAM: vram, ContextLength: 4096}})
		if got := b.limit.target(); got != want {
			t.Errorf("%s with %d in GPU memory: %d in flight, want %d", model, vram, got, want)
		}
	}
	see("cpu", 0, all)
	see("cpu", 0, all)
	see("gpu", 100, all)
	see("gpu", 60, all/2)
	see("gpu", 60, all/2)
	see("gpu", 0, all/4)
	see("big", 50, all/8)
	if b.context["gpu:latest"] != 4096 {
		t.Errorf("%v", b.context)
	}
}

// TestFollowsLanes: the number in flight follows a proxy's lanes, and drops at once for a server
// that is overloaded.
func TestFollowsLanes(t *testing.T) {
	var most, now, refused atomic.Int64
	f := &fake{}
	f.get = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/metrics" {
			fmt.Fprint(w, "# what a proxy tells\nollama_cacheproxy_lanes{model=\"m\",state=\"busy\"} 1\nollama_cacheproxy_lanes{model=\"m\",state=\"idle\"} 1\n")
		}
		return r.URL.Path == "/metrics"
	}
	f.ask = func(w http.ResponseWriter, r *http.Request, user string) bool {
		defer now.Add(-1)
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if r.Header.Get("X-Cacheproxy-Priority") != "batch" {
			t.Error("the priority is not batch")
		}
		if n > 20 {
			refused.Add(1)
			w.WriteHeader(503)
			return true
		}
		for refused.Load() == 0 { // until there are too many
			select {
			case <-r.Context().Done():
				return true
			case <-time.After(time.Millisecond):
			}
		}
		return false
	}
	c := config(t, serve(t, f), numbered(400))
	c.Retries = 20
	lowest := 1 << 30
	c.Progress = func(p Progress) { lowest = min(lowest, p.Concurrency) }
	s, _ := run(t, c)
	if s.Succeeded != 400 || refused.Load() == 0 || most.Load() <= 20 || lowest > perLane*3/2 {
		t.Errorf("%d succeeded, %d refused, at most %d at once, %d allowed at last", s.Succeeded, refused.Load(), most.Load(), lowest)
	}
}

func TestPlan(t *testing.T) {
	var data strings.Builder
	data.WriteString("id,city,name\n")
	for i := range 60 {
		fmt.Fprintf(&data, "%d,%s,%s\n", i, []string{"Paris", "Rome", "Bonn"}[i%3], words(i, 20))
	}
	rubric := words(7, 300)
	template := func(system, user string) string {
		text, err := json.Marshal(map[string]any{"model": "m", "messages": []map[string]string{{"role": "system", "content": system}, {"role": "user", "content": user}}})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	plan := func(s *Source) (*Plan, string) {
		t.Helper()
		c := over(t, "http://127.0.0.1:1", s, "-")
		p, err := MakePlan(t.Context(), &c)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := p.Print(&b); err != nil {
			t.Fatal(err)
		}
		return p, b.String()
	}
	rows := func(template string) (*Plan, string) {
		t.Helper()
		s, err := rowsOf(t, "rows.csv", data.String(), template)
		if err != nil {
			t.Fatal(err)
		}
		return plan(s)
	}

	bad, text := rows(template("No. {{id}}: "+rubric, "{{name}} of {{city}}"))
	if !strings.Contains(text, "what would help: the template's own text first, then {{city}}, {{name}}, {{id}}.") {
		t.Errorf("%s", text)
	}
	if f := bad.Fields[0]; f.Name != "id" || f.Values != 60 || f.After != len(": "+rubric+" of ") {
		t.Errorf("%+v", bad.Fields)
	}
	good, text := rows(template(rubric, "{{city}} {{name}}"))
	if strings.Contains(text, "what would help") || good.Groups != 1 || good.Largest != 60 || good.Everywhere < len(rubric) {
		t.Errorf("%+v\n%s", good, text)
	}
	// Each distinct part of the tree counts once: the rubric, the names. The prefixes' blocks leave
	// out less than a block per row.
	if least := int64(len(rubric)); good.Ordered < least || good.Ordered > least+60*(20*8+40) || bad.Ordered < 50*least {
		t.Errorf("%d and %d bytes to evaluate", good.Ordered, bad.Ordered)
	}
	// The layout's own sum is that of a plan with that layout.
	if d := bad.Layout.Then - good.Ordered; d < -60*40 || d > 60*40 {
		t.Errorf("moved, %d bytes; and %d as it would be", bad.Layout.Then, good.Ordered)
	}

	early := func(line func(i int) string) string {
		var b strings.Builder
		for i := range 20 {
			text, err := json.Marshal(map[string]any{"model": "m", "prompt": line(i)})
			if err != nil {
				t.Fatal(err)
			}
			b.Write(append(text, '\n'))
		}
		c := config(t, "http://127.0.0.1:1", b.String())
		_, text := plan(c.Source)
		return text
	}
	if text := early(func(i int) string { return fmt.Sprintf("At 12:%02d:00 %s candidate %d", i, rubric, i) }); !strings.Contains(text, "neighbours differ at byte 6 of text 1") {
		t.Errorf("%s", text)
	}
	if text := early(func(i int) string { return rubric + words(i+500, 100) }); strings.Contains(text, "what would help") {
		t.Errorf("%s", text)
	}
}

// TestPlanRates: the expected time is based on what the batch itself has measured so far.
func TestPlanRates(t *testing.T) {
	c := config(t, serve(t, &fake{}), numbered(10))
	run(t, c)
	p, err := MakePlan(t.Context(), &c)
	if err != nil {
		t.Fatal(err)
	}
	if p.Rates.Answer != 1000 || p.Rates.Length != 2 || p.Rates.Prompt != 10000 {
		t.Errorf("%+v", p.Rates)
	}
}

// TestSurvey: the fields that a survey reads and names.
func TestSurvey(t *testing.T) {
	long := `{"model":"big","prompt":"` + words(1, 3000) + `","options":{"num_ctx":2048}}`
	c := config(t, serve(t, &fake{}), "{\n"+long+"\n"+numbered(3)+`{"model":"m"}`)
	var told []string
	v, err := TakeSurvey(t.Context(), c.Source, func(err error) { told = append(told, err.Error()) })
	if err != nil {
		t.Fatal(err)
	}
	if v.Requests != 6 || v.Bad != 2 || len(told) != 2 || !strings.HasPrefix(told[1], "line 6: neither messages") || v.Long != 1 || v.LongLines[0] != 2 || v.Models["m"] != 3 {
		t.Errorf("%+v, %q", v, told)
	}
	absent, err := c.AbsentModels(t.Context(), v)
	if err != nil || len(absent) != 0 {
		t.Errorf("%v, %v", absent, err)
	}
}
