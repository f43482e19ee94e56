package schedule

import "time"

// maxWarm is how many of a runner's last prompts are remembered where lanes are Unlimited.
const maxWarm = 16

// release grants everything that waits for a server with unlimited lanes.
func (q *Queue) release(s *server, now time.Time) {
	for _, x := range s.runners {
		if x.waiting == 0 {
			continue
		}
		if !x.resident {
			for y := range x.rivals() {
				if y.resident {
					y.cool()
				}
			}
			x.loads(now)
			q.count.RunnerLoads++
		}
		for x.waiting > 0 {
			it := x.classes[x.top()].fifo.front()
			q.grant(it, x.vacant(it), byMatch, now)
		}
	}
}

// vacant returns a free lane for a request, adding one if necessary: the one that holds the most of
// its prompt, if that is enough for the engine to choose the slot for it. There may be more lanes
// than slots, so a lane that holds something else is not used up.
func (x *runner) vacant(it *item) *lane {
	if x.busy < len(x.lanes) {
		if l, tokens := x.landing(it); l.holds == nil || tokens > slack && float64(tokens) > similarity*float64(it.tokens) {
			return l
		}
	}
	l := &lane{name: x.unused()}
	x.lanes = append(x.lanes, l)
	x.want = len(x.lanes)
	return l
}

// unused returns the least number that no lane has.
func (x *runner) unused() int {
	taken := make([]bool, len(x.lanes)+1)
	for _, l := range x.lanes {
		if l.name < len(taken) {
			taken[l.name] = true
		}
	}
	for i, t := range taken {
		if !t {
			return i
		}
	}
	panic("more names than lanes")
}
