package savings

import (
	"math"
	"math/rand/v2"
	"testing"
)

// machine determines how much longer evaluations take than on an otherwise idle machine.
type machine func(r *rand.Rand) func() (prompt, answer float64)

// scatter returns a log-normal factor of at least one.
func scatter(r *rand.Rand, sigma float64) float64 {
	return math.Exp(math.Abs(r.NormFloat64()) * sigma)
}

// scattered slows down each request by another factor, its prompt and its answer alike except for a
// small difference.
func scattered(common, own float64) machine {
	return func(r *rand.Rand) func() (prompt, answer float64) {
		return func() (prompt, answer float64) {
			f := scatter(r, common)
			return f * scatter(r, own), f * scatter(r, own)
		}
	}
}

// bursts is quiet and busy in turn, each for up to that many requests; busy means 2 to 20 times
// slower.
func bursts(most int) machine {
	return func(r *rand.Rand) func() (prompt, answer float64) {
		left, f := 1+r.IntN(most), 1.0
		return func() (prompt, answer float64) {
			if left--; left < 0 {
				left = r.IntN(most)
				if f > 1 {
					f = 1
				} else {
					f = 2 * math.Pow(10, r.Float64())
				}
			}
			return f * scatter(r, 0.2), f * scatter(r, 0.2)
		}
	}
}

// from becomes slower by a factor, permanently, after that many requests.
func from(after int, factor float64) machine {
	return func(r *rand.Rand) func() (prompt, answer float64) {
		n := 0
		return func() (prompt, answer float64) {
			f := 1.0
			if n++; n > after {
				f = factor
			}
			return f * scatter(r, 0.2), f * scatter(r, 0.2)
		}
	}
}

// until is slower by a factor, until that many requests were served.
func until(after int, factor float64) machine {
	return func(r *rand.Rand) func() (prompt, answer float64) {
		slower := from(after, 1/factor)(r)
		return func() (prompt, answer float64) {
			p, a := slower()
			return p * factor, a * factor
		}
	}
}

// misleading slows down prompts only: the answer's tokens suggest a quiet machine.
func (m machine) misleading() machine {
	return func(r *rand.Rand) func() (prompt, answer float64) {
		next := m(r)
		return func() (prompt, answer float64) {
			prompt, _ = next()
			return prompt, 1
		}
	}
}

// TestBusy: whatever other work does to the times, the estimator's figures are right, and it does
// not report everything as unknown.
func TestBusy(t *testing.T) {
	for _, c := range []struct {
		name    string
		machine machine
		answer  int     // tokens; with one token, no time would show how busy the machine is
		unknown float64 // fraction of the requests, at most
		wrong   float64 // fraction of the others, at most
	}{
		{"quiet", scattered(0.05, 0.05), 8, 0.03, 0.02},
		{"quiet, answers of one token", scattered(0.05, 0.05), 1, 0.03, 0.02},
		{"some noise", scattered(0.2, 0.2), 8, 0.05, 0.02},
		{"noise", scattered(0.5, 0.2), 8, 0.1, 0.05},
		{"much noise", scattered(1, 0.3), 8, 0.2, 0.05},
		{"noise of their own", scattered(0, 0.5), 8, 0.2, 0.05},
		{"single bursts", bursts(1), 8, 0.2, 0.05},
		{"bursts", bursts(10), 8, 0.2, 0.05},
		{"long bursts", bursts(40), 8, 0.2, 0.05},
		{"bursts, answers of one token", bursts(10), 1, 0.5, 0.05},
		{"slow after 3 requests", from(3, 6), 8, 0.2, 0.05},
		{"slow after 15 requests", from(15, 10), 8, 0.2, 0.05},
		{"slow after 15 requests, answers of one token", from(15, 10), 1, 0.5, 0.05},
		{"slow for 6 requests", until(6, 8), 8, 0.3, 0.05},
		// The worst case: the sign of a busy machine suggests a quiet one.
		{"misleading bursts", bursts(10).misleading(), 8, 0.5, 0.1},
		{"misleadingly slow after 15 requests", from(15, 10).misleading(), 8, 0.5, 0.05},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := newBench(t, 0, 1, false)
			for seed := range uint64(4) {
				for _, w := range workloads {
					b := newBench(t, seed, w.slots, w.host)
					b.silent, b.answer, b.sim.noise = true, c.answer, 0
					b.sim.busy = c.machine(rand.New(rand.NewPCG(seed, 3)))
					w.run(b)
					all.add(b.figures)
				}
			}
			share := func(n, of int) float64 { return 100 * float64(n) / float64(of) }
			t.Logf("%d requests, %.1f %% unknown; of the others %.1f %% right, tokens %+.1f %% off",
				all.requests, share(all.unknown, all.requests), share(all.right, all.told()), 100*all.off())
			wrong := float64(all.told()-all.right) / float64(all.told())
			if wrong > c.wrong || math.Abs(all.off()) > c.wrong {
				t.Errorf("%d of %d verdicts right, tokens %+.1f %% off, want at most %.0f %% wrong",
					all.right, all.told(), 100*all.off(), 100*c.wrong)
			}
			if float64(all.unknown) > c.unknown*float64(all.requests) {
				t.Errorf("%d of %d unknown, want at most %.0f %%", all.unknown, all.requests, 100*c.unknown)
			}
		})
	}
}

// workloads are the workloads that the estimator has to handle beside other work.
var workloads = []struct {
	name  string
	slots int
	host  bool
	run   func(b *bench)
}{
	{"one rubric", 1, false, func(b *bench) {
		rubric := prose(b.sim.r, 900)
		for range 20 {
			b.chat("default", msg{"system", rubric}, msg{"user", prose(b.sim.r, 20+b.sim.r.IntN(60))})
		}
	}},
	{"four in turn, one slot", 1, false, inTurn},
	{"four in turn, four slots", 4, false, inTurn},
	{"four in turn, host cache", 1, true, inTurn},
	{"chats", 1, false, inChats},
	{"chats, host cache", 1, true, inChats},
}

func inTurn(b *bench) {
	var rubrics []string
	for range 4 {
		rubrics = append(rubrics, prose(b.sim.r, 600+b.sim.r.IntN(600)))
	}
	for i := range 24 {
		b.chat("default", msg{"system", rubrics[i%4]}, msg{"user", prose(b.sim.r, 20+b.sim.r.IntN(60))})
	}
}

func inChats(b *bench) {
	system := msg{"system", prose(b.sim.r, 400)}
	chats := [][]msg{{system}, {system}, {system}}
	for range 6 {
		for i := range chats {
			chats[i] = append(chats[i], msg{"user", prose(b.sim.r, 40+b.sim.r.IntN(100))})
			chats[i] = append(chats[i], msg{"assistant", b.chat("default", chats[i]...)})
		}
	}
}
