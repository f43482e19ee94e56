package schedule

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestNeverSlower: with a model of ordinary cost, no workload takes more than 3 % longer than with
// direct requests, or 5 % if the number of slots has to be learned, plus 1 ms per request.
func TestNeverSlower(t *testing.T) {
	type work struct {
		name string
		do   func(*sim)
	}
	dealt := func(jobs []*job, clients int, think time.Duration) func(*sim) {
		return func(s *sim) {
			for c := range clients {
				var own []*job
				for i := c; i < len(jobs); i += clients {
					jobs[i].client = fmt.Sprint("client", c)
					own = append(own, jobs[i])
				}
				s.after(time.Duration(c)*3*time.Millisecond, func() { s.closed(own, think) })
			}
		}
	}
	works := func() []work {
		list := []work{
			{"32 prefixes x 4, all at once", func(s *sim) { burst(s, groups(32, 4, 1000, 40, 50, 7)) }},
			{"32 prefixes x 4, 8 loops", dealt(groups(32, 4, 1000, 40, 50, 7), 8, 5*time.Millisecond)},
			{"4 scripts", func(s *sim) { scripts(s, 4, 40) }},
			{"2 scripts", func(s *sim) { scripts(s, 2, 40) }},
			{"one prefix, 8 loops", func(s *sim) { hot(s, 8, 20, false) }},
			{"one prefix, all at once", func(s *sim) { hot(s, 8, 20, true) }},
			{"no prefix, 8 loops", dealt(groups(128, 1, 300, 10, 50, 5), 8, 5*time.Millisecond)},
			{"short prompts, long answers, 8 loops", dealt(groups(64, 1, 60, 10, 300, 5), 8, 5*time.Millisecond)},
			{"chats", chats},
			{"a lone client", dealt(groups(4, 16, 500, 40, 50, 5), 1, 5*time.Millisecond)},
			{"two lone clients", dealt(groups(4, 16, 500, 40, 50, 5), 2, 200*time.Millisecond)},
			{"4 people", dealt(groups(8, 8, 500, 40, 100, 5), 4, 3*time.Second)},
		}
		for _, think := range []time.Duration{5 * time.Millisecond, time.Second} {
			list = append(list, work{fmt.Sprint("two num_ctx in turn, 4 loops, think ", think), func(s *sim) {
				jobs := groups(80, 1, 300, 10, 50, 5)
				for i, j := range jobs {
					j.numCtx = 2048 * (1 + (i/4+i)%2)
				}
				dealt(jobs, 4, think)(s)
			}}, work{fmt.Sprint("two models, 4 loops, think ", think), func(s *sim) {
				jobs := groups(80, 1, 300, 10, 50, 5)
				for i, j := range jobs {
					j.model = []string{"a", "b"}[i%2]
				}
				dealt(jobs, 4, think)(s)
			}})
		}
		return list
	}
	for _, lanes := range []bool{true, false} {
		for _, slots := range []int{1, 2, 4} {
			for _, host := range []int{0, 1 << 20} {
				for _, exclude := range []bool{false, true} {
					for i, w := range works() {
						cfg := engineConfig{slots: slots, host: host, untried: true, perToken: time.Millisecond, decode: 20 * time.Millisecond, load: 2 * time.Second, exclude: exclude}
						run := func(q *Queue, w work) *sim {
							ids = 0
							s := newSim(t, cfg, q)
							w.do(s)
							s.run()
							return s
						}
						d := run(nil, w)
						direct := d.now.Sub(start)
						n := slots
						if !lanes {
							n = 0
						}
						l := run(New(Config{Lanes: n}), works()[i])
						wall := l.now.Sub(start)
						more := wall - direct
						name := fmt.Sprintf("%s, %d slots, given %v, host cache %v, exclude %v", w.name, slots, lanes, host > 0, exclude)
						if strings.HasPrefix(w.name, "two models") {
							more -= cfg.load // once, to learn whether both fit
						}
						most := direct * 3 / 100
						if !lanes { // one prompt is evaluated before a second slot is known
							most = direct * 5 / 100
						}
						if more > most && more > time.Duration(len(d.finished))*time.Millisecond {
							t.Errorf("%-95s %6.1f s, directly %6.1f: %.3f", name, wall.Seconds(), direct.Seconds(), float64(wall)/float64(direct))
						}
					}
				}
			}
		}
	}
}
