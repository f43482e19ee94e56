package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestPeople: a person who asks now and then, beside a script that has hundreds of requests waiting, waits for one running request
// for each lane at most, whoever the script is: another client, another program of the same one, or the same program with another
// prompt. The script pays with few tokens.
func TestPeople(t *testing.T) {
	for _, slots := range []int{1, 4} {
		for _, who := range []struct {
			name    string
			client  string
			program uint64
			flow    uint64
		}{
			{"another client", "person", 1, 1},
			{"another program", "script", 2, 1},
			{"another prompt", "script", 1, 2},
		} {
			t.Run(fmt.Sprint(who.name, ", ", slots, " slots"), func(t *testing.T) {
				alone := 0
				for _, people := range []bool{false, true} {
					s := newSim(t, engineConfig{slots: slots, load: time.Second}, New(Config{Lanes: slots}))
					for i := range 1000 {
						s.submit(&job{segs: []seg{{id: 1, tokens: 1000}, {id: uint64(1000 + i), tokens: 50}}, gen: 100, client: "script", program: 1, flow: 1})
					}
					var chats []*job
					for i := range 10 {
						if !people {
							break
						}
						s.after(time.Duration(i+1)*12*time.Second, func() {
							j := &job{segs: []seg{{id: 2, tokens: 200}, {id: uint64(5000 + i), tokens: 50}}, gen: 50, client: who.client, program: who.program, flow: who.flow}
							chats = append(chats, j)
							s.submit(j)
						})
					}
					s.run()
					if !people {
						alone = s.evaluated
						continue
					}
					own := s.cfg.perToken*250 + s.cfg.decode*50
					running := s.cfg.perToken*1050 + s.cfg.decode*100
					var waits []time.Duration
					for _, j := range chats {
						waits = append(waits, j.end.Sub(j.came)-own)
					}
					slices.Sort(waits)
					more := float64(s.evaluated-len(chats)*250) / float64(alone)
					t.Logf("waits %v, a request of the script takes up to %v; the script evaluates %.3f times as much", waits, running, more)
					if most := waits[len(waits)-1]; most > running {
						t.Errorf("a person waited for %v, longer than for one request, %v", most, running)
					}
					if more > 1+float64(len(chats)*1000*slots)/float64(alone) {
						t.Errorf("the script had %.3f times as many tokens evaluated", more)
					}
				}
			})
		}
	}
}
