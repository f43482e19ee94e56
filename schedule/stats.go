package schedule

import "time"

// Stats is what a page or a scrape shows.
type Stats struct {
	Counts
	Waiting map[Priority]Waiting
	Runners []RunnerStats // loaded, or with a backlog

	Estimates Estimates // filled in by Scheduler
}

// Waiting counts the waiting requests of one priority.
type Waiting struct {
	Requests int
	Oldest   time.Duration // how long the earliest one has waited
}

// RunnerStats is the state of a runner.
type RunnerStats struct {
	Runner  Runner
	Loaded  bool
	Waiting int
	Lanes   int  // 0: Unlimited
	Learned bool // the number of lanes is learned, not given
	Told    bool // … but told by the model's engine
	Busy    int  // lanes that serve a request
	Held    int  // lanes that are free although requests wait
}

// Stats returns the queue's Stats.
func (q *Queue) Stats(now time.Time) Stats {
	st := Stats{Counts: q.count, Waiting: map[Priority]Waiting{}}
	for r := range ranks {
		w := st.Waiting[r.priority()]
		w.Requests += q.waiting[r]
		for _, s := range q.servers {
			for _, x := range s.runners {
				if it := x.classes[r].fifo.front(); it != nil {
					w.Oldest = max(w.Oldest, now.Sub(it.arrived))
				}
			}
		}
		st.Waiting[r.priority()] = w
	}
	for _, s := range q.servers {
		for _, x := range s.runners {
			if !x.resident && x.waiting == 0 {
				continue
			}
			r := RunnerStats{Runner: x.key, Loaded: x.resident, Waiting: x.waiting, Lanes: x.want, Learned: x.given() == 0, Busy: x.busy}
			r.Told = s.lanes == 0 && x.given() > 0
			if s.lanes == Unlimited {
				r.Lanes = 0
			}
			if x.resident && x.waiting > 0 {
				r.Held = max(0, x.want-x.busy)
			}
			st.Runners = append(st.Runners, r)
		}
	}
	return st
}
