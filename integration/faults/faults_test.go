//go:build linux

package faults

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// TestReadAnswer: only a whole answer counts as one.
func TestReadAnswer(t *testing.T) {
	const ndjson, events, whole = "application/x-ndjson", "text/event-stream", "application/json"
	inAnswer := errorInAnswer("gone")
	for _, c := range []struct {
		kind, body, text string
		err              error // errAny: any
	}{
		{ndjson, `{"message":{"content":"a"}}` + "\n" + `{"message":{"content":"b"},"done":true}` + "\n", "ab", nil},
		{ndjson, `{"response":"a"}` + "\n" + `{"response":"","done":true}` + "\n", "a", nil},
		{ndjson, `{"message":{"content":"a"}}` + "\n", "", errAny},
		{ndjson, `{"message":{"content":"a"},"do`, "", errAny},
		{ndjson, `{"message":{"content":"a"}}` + "\n" + `{"error":"gone"}`, "", inAnswer},
		{ndjson, `{"done":true}` + "\n" + `{"done":true}` + "\n", "", errAny},
		{whole, `{"message":{"content":"ab"},"done":true}`, "ab", nil},
		{whole, `{"choices":[{"message":{"content":"ab"},"finish_reason":"length"}]}`, "ab", nil},
		{whole, `{"choices":[{"message":{"content":"ab"}}]}`, "", errAny},
		{whole, "", "", errAny},
		{events, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n: waiting\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n", "ab", nil},
		{events, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}\n\n", "", errAny},
		{events, "data: {\"error\":\"gone\"}\n\n", "", inAnswer},
	} {
		text, err := readAnswer(c.kind, []byte(c.body))
		var in errorInAnswer
		isIn := errors.As(err, &in)
		if text != c.text || (err == nil) != (c.err == nil) || isIn != (c.err == inAnswer) {
			t.Errorf("%s %q: %q, %v; want %q, %v", c.kind, c.body, text, err, c.text, c.err)
		}
	}
}

var errAny = errors.New("any error")

// TestVerdict: what must not happen is found.
func TestVerdict(t *testing.T) {
	for name, c := range map[string]struct {
		begun  int
		result result
		want   string // in the verdict; "": it is good
	}{
		"answered":         {1, result{outcome: answered}, ""},
		"lost":             {1, result{outcome: brokeOff}, ""},
		"not begun":        {0, result{outcome: noAnswer}, ""},
		"begun twice":      {2, result{outcome: answered}, "was begun 2 times"},
		"twice and failed": {2, result{outcome: "502"}, "was begun 2 times"},
		"from nowhere":     {0, result{outcome: answered}, "was begun 0 times"},
		"hangs":            {1, result{outcome: noAnswer, wrong: errHangs}, errHangs.Error()},
	} {
		f := &fleet{Config: Config{Report: t.Logf}, ledger: &ledger{begun: map[string][]begin{}}}
		l := &load{f: f, outcome: map[string]int{}, bad: map[string]int{}, results: map[*request]result{}}
		for _, k := range kinds { // one good request of each kind
			l.outcome[k.name+": "+k.wants()]++
		}
		q := newRequest(kinds[0], rand.New(rand.NewPCG(1, 2)))
		for i := range c.begun {
			f.ledger.note(q.id, fmt.Sprint("s", i))
		}
		l.add(q, c.result)
		err := l.verdict()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestPlan: each kind of fault comes before any comes again, and the seed decides.
func TestPlan(t *testing.T) {
	f := &fleet{proxies: []*process{{name: "p1"}, {name: "p2"}}, servers: []*server{{name: "s1"}}, valkey: &process{name: "valkey"}}
	plan := func(seed uint64) (all []string) {
		for _, fault := range f.plan(10, rand.New(rand.NewPCG(seed, 0))) {
			all = append(all, fault.kind+" "+fault.what)
		}
		return all
	}
	first := plan(1)
	kinds := map[string]bool{}
	for _, fault := range f.plan(4, rand.New(rand.NewPCG(2, 0))) { // without partitions there are four
		kinds[fault.kind] = true
	}
	if len(first) != 10 || len(kinds) != 4 || fmt.Sprint(first) != fmt.Sprint(plan(1)) || fmt.Sprint(first) == fmt.Sprint(plan(3)) {
		t.Errorf("%v, %v", first, kinds)
	}
}

// TestBound: the bound follows from the settings, so a longer fault means a longer bound.
func TestBound(t *testing.T) {
	short, long := &fleet{Config: Config{HoldMost: time.Second}}, &fleet{Config: Config{HoldMost: time.Minute}}
	if long.bound()-short.bound() != 59*time.Second || short.bound() < tryDuration+silence+dialTimeout {
		t.Errorf("%v, %v", short.bound(), long.bound())
	}
}
