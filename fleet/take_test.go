package fleet

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// asked is what happens to the proxies of a takers' lab.
type asked struct {
	mu   sync.Mutex
	gave map[string]int // how often a host gave something
	idle bool           // a's server is
}

func (a *asked) times(host string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.gave[host]
}

func (a *asked) setIdle(on bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.idle = on
}

// takers returns a lab in which a has a server, b the longest backlog, and c a shorter one. Each gives
// a request when it is asked.
func takers(t *testing.T, change func(l *lab, log *asked)) (*lab, *asked) {
	l := newLab(t, nil, "a", "b", "c")
	log := &asked{gave: map[string]int{}}
	all := []string{"a", "b", "c"}
	for i, host := range all {
		m := l.proxies[host]
		m.kill()
		s := Server{Name: "s" + host, Takes: true, Models: []string{"m"}}
		if host != "a" {
			s.Backlogs = []Backlog{{Options: prefix.Options{Model: host}, Movable: 90 / i, Lanes: 1}}
		}
		m.servers, m.own = []Server{s}, []string{s.Name}
		m.give = func(schedule.Taker) int {
			log.mu.Lock()
			defer log.mu.Unlock()
			log.gave[host]++
			return 1
		}
		m.taker = func(server string, o prefix.Options) (schedule.Taker, bool) {
			log.mu.Lock()
			defer log.mu.Unlock()
			return schedule.Taker{Server: server, Options: o, Free: 1}, host == "a" && log.idle
		}
	}
	change(l, log)
	for _, host := range all {
		l.proxies[host].start(all)
	}
	time.Sleep(2 * time.Second)
	return l, log
}

// TestTakeHangs: a peer that hangs does not hold up asking the next one, and gives nothing when it is
// back to a server that has asked another one meanwhile.
func TestTakeHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, log := takers(t, func(*lab, *asked) {})
		a := l.proxies["a"]
		log.setIdle(true)
		a.Idle()
		if time.Sleep(takeFor); log.times("b") != 1 || log.times("c") != 0 {
			t.Errorf("b, whose backlog is longer, was asked %d times, c %d times", log.times("b"), log.times("c"))
		}
		log.setIdle(false)
		time.Sleep(2 * askedFor) // nothing comes
		l.net.setCut("a", "b", true)
		log.setIdle(true)
		a.Idle()
		if time.Sleep(2 * takeFor); log.times("c") != 1 {
			t.Errorf("while b hangs, c was asked %d times", log.times("c"))
		}
		log.setIdle(false)
		l.net.setCut("a", "b", false)
		if time.Sleep(time.Minute); log.times("b") != 1 {
			t.Error("b gives work to a server that has got some from c")
		}
		log.setIdle(true)
		a.Idle()
		if time.Sleep(takeFor); log.times("b") != 2 || log.times("c") != 1 {
			t.Errorf("b is back, and was asked %d times, c %d times", log.times("b"), log.times("c"))
		}
	})
}

// TestTakeUnanswered: a peer that may have given something, but did not say so, counts as one that
// did: the server takes no more for a while.
func TestTakeUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, log := takers(t, func(l *lab, _ *asked) {
			b := l.proxies["b"]
			gives := b.give
			b.give = func(t schedule.Taker) int {
				defer time.Sleep(2 * takeFor)
				return gives(t)
			}
		})
		log.setIdle(true)
		l.proxies["a"].Idle()
		if time.Sleep(askedFor - 1); log.times("b") != 1 || log.times("c") != 0 {
			t.Errorf("b was asked %d times, and then c %d times", log.times("b"), log.times("c"))
		}
	})
}

// TestTakenSoon: a request that comes before the answer by which it was given is the one that the
// server waited for.
func TestTakenSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, log := takers(t, func(l *lab, log *asked) {
			l.proxies["a"].waits, l.proxies["a"].serves = 0, 0
			b := l.proxies["b"]
			gives := b.give
			b.give = func(t schedule.Taker) int {
				p, _ := b.Choose(Ask{Model: "m", Server: t.Server})
				if _, err := l.move("b", p, "given", 1); err != nil {
					l.t.Error(err)
				}
				log.setIdle(false)
				return gives(t)
			}
		})
		log.setIdle(true)
		l.proxies["a"].Idle()
		if time.Sleep(takeFor); log.times("b") != 1 {
			t.Fatalf("b gave %d times", log.times("b"))
		}
		if l.proxies["a"].expects("sa") {
			t.Error("the request has come and was answered, and its server still waits for it")
		}
	})
}
