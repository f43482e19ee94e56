package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// crowdedQueue has one busy lane and a queue that is full with limit requests, each made by who.
func crowdedQueue(limit int, who func(i int) Request) *Queue {
	q := New(Config{Lanes: 1, Limit: limit})
	for i := range limit + 1 { // the first one is granted
		q.Add(from(who(i), uint64(i), start.Add(time.Duration(i)*time.Millisecond)))
	}
	q.Grants()
	return q
}

// from completes a request that arrives at a time.
func from(r Request, id uint64, now time.Time) (Request, time.Time) {
	r.ID, r.Runner = id, Runner{Options: options("m", 0)}
	r.Links = (&job{model: "m", segs: []seg{{id: 1, tokens: 100}, {id: 10 + id, tokens: 50}}}).links()
	return r, now
}

func script(int) Request { return Request{Client: "script", Program: 1, Flow: 1} }

// TestCrowded: when the queue is full, whoever has the most places gives one up, however many names
// others use.
func TestCrowded(t *testing.T) {
	const limit = 20
	// The first half of the waiting requests is a's, the second half b's.
	halves := func(a, b Request) func(int) Request {
		return func(i int) Request {
			if i <= limit/2 {
				return a
			}
			return b
		}
	}
	names := func(i int) Request { return Request{Client: "script", Program: uint64(i + 1), Flow: uint64(i)} }
	prompts := func(i int) Request { return Request{Client: "script", Program: 1, Flow: uint64(i + 1)} }
	clients := func(i int) Request { return Request{Client: fmt.Sprint("c", i), Program: 1, Flow: 1} }
	urgent := Request{Client: "script", Program: 1, Flow: 1, Priority: Interactive}
	batch := Request{Client: "other", Program: 1, Flow: 1, Priority: Batch}
	for _, c := range []struct {
		name   string
		queued func(i int) Request
		comes  Request
		gone   int  // the request that is refused; limit+1 means the new one
		full   bool // whether it is refused when only its client is known
	}{
		{"another client", script, Request{Client: "person", Program: 1, Flow: 1}, limit, false},
		{"another program", script, Request{Client: "script", Program: 2, Flow: 1}, limit, false},
		{"another flow", script, Request{Client: "script", Program: 1, Flow: 2}, limit, false},
		{"more of the same", script, script(0), limit + 1, false},
		{"a client beside one with many names", names, Request{Client: "person", Program: 1, Flow: 1}, limit, false},
		{"one more name", names, names(limit + 1), limit + 1, true},
		{"one more prompt", prompts, prompts(limit + 1), limit + 1, false},
		{"a program beside one with many prompts", prompts, Request{Client: "script", Program: 2, Flow: 1}, limit, false},
		{"one more client of many", clients, clients(limit + 1), limit + 1, true},
		{"the first of two equal clients", halves(clients(1), clients(2)), clients(1), limit + 1, false},
		{"the second of two equal clients", halves(clients(1), clients(2)), clients(2), limit + 1, false},
		{"a third client beside two", halves(clients(1), clients(2)), clients(3), limit, false},
		{"batch beside what is not", script, batch, limit + 1, true},
		{"what is not beside batch", func(int) Request { return batch }, script(0), limit, false},
		{"interactive beside less that is batch", halves(batch, script(0)), urgent, limit / 2, false},
		{"interactive beside its like", func(int) Request { return urgent }, urgent, limit + 1, false},
		{"normal beside interactive", func(int) Request { return urgent }, script(0), limit + 1, true},
	} {
		q := crowdedQueue(limit, c.queued)
		now := start.Add(time.Second)
		if got := q.full(c.comes.Priority, c.comes.Client, now); got != c.full {
			t.Errorf("%s: that it is full is %v before it is read", c.name, got)
		}
		gone := limit + 1
		if q.Add(from(c.comes, limit+1, now)) {
			no := q.Refusals()
			if len(no) != 1 || no[0].Err != ErrFull {
				t.Errorf("%s: refused was %v", c.name, no)
				continue
			}
			gone = int(no[0].ID)
		}
		if gone != c.gone {
			t.Errorf("%s: refused was %d, want %d", c.name, gone, c.gone)
		}
		if c.full && gone != limit+1 {
			t.Errorf("%s: it would be refused before it is read, and finds a place after", c.name)
		}
	}
}

// TestCrowdedSentInVain: a request whose server did not answer keeps its place by its time of
// arrival.
func TestCrowdedSentInVain(t *testing.T) {
	q := crowdedQueue(2, func(i int) Request {
		return Request{Client: fmt.Sprint("c", i), Program: 1, Flow: 1}
	})
	r, now := from(Request{Client: "late", Program: 1, Flow: 1, Arrived: start}, 9, start.Add(time.Second))
	if !q.Add(r, now) {
		t.Error("it was refused, although it came first")
	}
	if no := q.Refusals(); len(no) != 1 || no[0].ID != 2 {
		t.Errorf("refused was %v", no)
	}
}

// TestCrowdedShares: under a load that fills the queue again and again, every client keeps an equal
// share of its places; the record of the shares is dropped when the queue is half empty.
func TestCrowdedShares(t *testing.T) {
	const limit = 300
	q := crowdedQueue(limit, script)
	who := []Request{
		script(0), {Client: "script", Program: 2, Flow: 1},
		{Client: "b", Program: 1, Flow: 1}, {Client: "c", Program: 1, Flow: 1},
	}
	now := start.Add(time.Second)
	waiting := map[uint64]int{}
	for i := range uint64(limit + 1) {
		waiting[i] = 0
	}
	for i := range 4 * limit {
		now = now.Add(time.Millisecond)
		id := uint64(limit + 1 + i)
		if q.Add(from(who[i%len(who)], id, now)) {
			waiting[id] = i % len(who)
		}
		for _, no := range q.Refusals() {
			delete(waiting, no.ID)
		}
	}
	delete(waiting, 0) // it is being served
	counts := make([]int, len(who))
	for _, w := range waiting {
		counts[w]++
	}
	if want := []int{limit / 6, limit / 6, limit / 3, limit / 3}; !slices.Equal(counts, want) {
		t.Errorf("two programs of one client, and two others, have %v places, want %v", counts, want)
	}
	for id := range waiting {
		if q.Len() <= limit/2 {
			break
		}
		q.Leave(id, now)
	}
	if q.places != nil {
		t.Errorf("who has the places is still noted with %d waiting", q.Len())
	}
}
