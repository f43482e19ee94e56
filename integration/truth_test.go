package integration

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	truthError = 0.05 // of the evaluated tokens, at most
	truthRight = 0.95 // of the requests, at least
)

// TestTruth holds the ledger's figures, and those of its estimator, to the server's own log, which neither of them sees.
func TestTruth(t *testing.T) {
	for _, version := range realollama.Versions() {
		t.Run(version, func(t *testing.T) {
			var all comparison
			var table strings.Builder
			fmt.Fprintf(&table, "%-38s %8s %7s | %9s | %9s %7s %7s | %9s %7s %7s | %s\n", "ollama "+version, "requests", "tokens",
				"evaluated", "ledger", "error", "right", "estimate", "error", "right", "unestimated")
			for _, at := range places(version) {
				// A place has ended when its subtest has: two servers at once would disturb each other.
				t.Run(at.name, func(t *testing.T) {
					server := realollama.Start(t, at.config)
					p := startProxy(t, server.URL(), "--slots", "off") // four requests at once are four at once
					for _, w := range at.workloads {
						c := compareTruth(t, server, p, w)
						all.add(c)
						fmt.Fprintln(&table, c.row(at.name+" "+w.name))
					}
				})
			}
			fmt.Fprintln(&table, all.row("all"))
			t.Logf("the server's log and the ledger\n%s", table.String())
			if all.requests == 0 {
				return // every place has failed, and said why
			}
			for what, kept := range map[string]account{"the ledger": all.ledger, "the estimator": all.estimate} {
				if e := kept.wrong(); !(math.Abs(e) <= truthError) {
					t.Errorf("%s is off by %.1f%% of the tokens that were evaluated, want at most %.0f%%", what, 100*e, 100*truthError)
				}
				if share := float64(kept.right) / float64(all.requests); !(share >= truthRight) {
					t.Errorf("%s classified %.1f%% of the requests right, want at least %.0f%%", what, 100*share, 100*truthRight)
				}
			}
		})
	}
}

// compareTruth runs a workload and compares, request by request.
func compareTruth(t *testing.T, server *realollama.Server, p *proxyProcess, w workload) comparison {
	t.Helper()
	var before int64
	if past := ledgerSince(t, p, 0); len(past) > 0 {
		before = past[len(past)-1].ID
	}
	mark := server.Mark()
	u := newUser(t.Context(), p.URL, w)
	if err := w.run(u); err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	log, err := server.WaitEvaluations(t.Context(), mark, len(u.asked))
	if err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	truths, err := assign(u.asked, log, func(e realollama.Evaluation) int { return e.Total })
	if err != nil {
		t.Fatalf("%s in the server's log: %v", w.name, err)
	}
	// A request may be recorded a moment after its answer has ended.
	var recorded []record
	settles(t, func() error {
		if recorded = ledgerSince(t, p, before); len(recorded) < len(u.asked) {
			return fmt.Errorf("%s: %d requests in the ledger, sent were %d", w.name, len(recorded), len(u.asked))
		}
		return nil
	})
	records, err := assign(u.asked, recorded, func(r record) int { return r.Tokens.Total })
	if err != nil {
		t.Fatalf("%s in the ledger: %v", w.name, err)
	}

	var c comparison
	for i, truth := range truths {
		r, want := records[i], verdict(truth.Reused, truth.Total)
		c.requests++
		c.total += truth.Total
		c.evaluated += truth.Evaluated
		c.ledger.enter(truth, r.Tokens.Evaluated, r.Verdict)
		estimated := "unknown"
		if r.Estimate.Reused != nil {
			estimated = verdict(*r.Estimate.Reused, truth.Total)
		}
		c.estimate.enter(truth, r.Estimate.Evaluated, estimated)
		if measured := r.Basis == "measured"; measured != (server.Version() == realollama.EraC) {
			t.Errorf("%s, request %d to %s: the ledger's figures are %s on %s", w.name, i, r.Endpoint, r.Basis, server.Version())
		} else if measured && !r.is(truth) {
			t.Errorf("%s, request %d to %s: %s; the log has %+v", w.name, i, r.Endpoint, r, truth)
		} else if r.Verdict != want || estimated != want {
			t.Logf("%s, request %d to %s: %s; the log has %+v, %s", w.name, i, r.Endpoint, r, truth, want)
		}
	}
	return c
}

// record is what the tests read of a request in the ledger.
type record struct {
	ID       int64
	Endpoint string
	Basis    string
	Tokens   struct {
		Total             int
		Reused, Evaluated *int // nil: unknown
	}
	Estimate struct{ Reused, Evaluated *int }
	Expected *int `json:"expected_reuse"`
	Verdict  string
	Reason   string
}

func (r record) is(e realollama.Evaluation) bool {
	return r.Tokens.Reused != nil && *r.Tokens.Reused == e.Reused && r.Tokens.Evaluated != nil && *r.Tokens.Evaluated == e.Evaluated
}

func (r record) String() string {
	figure := func(n *int) string {
		if n == nil {
			return "?"
		}
		return fmt.Sprint(*n)
	}
	return fmt.Sprintf("%s (%s), %d tokens = %s reused + %s evaluated, estimated %s + %s, expected reuse %s", r.Verdict, r.Reason, r.Tokens.Total,
		figure(r.Tokens.Reused), figure(r.Tokens.Evaluated), figure(r.Estimate.Reused), figure(r.Estimate.Evaluated), figure(r.Expected))
}

// ledgerSince returns the requests after the one with the given id, oldest first.
func ledgerSince(t *testing.T, p *proxyProcess, id int64) []record {
	t.Helper()
	status, _, text := get(t, p.URL+"/_cacheproxy/requests?n=1000")
	var page struct{ Requests []record }
	if err := json.Unmarshal([]byte(text), &page); status != http.StatusOK || err != nil {
		t.Fatalf("/_cacheproxy/requests: %d %.500s, %v", status, text, err)
	}
	slices.Reverse(page.Requests)
	return slices.DeleteFunc(page.Requests, func(r record) bool { return r.ID <= id })
}

// assign returns the entry of every request. They are told apart by the prompt's tokens, and those of one client, which
// asks one thing at a time, by their order.
func assign[E any](requests []asked, entries []E, total func(E) int) ([]E, error) {
	byTotal := map[int][]E{}
	for _, e := range entries {
		byTotal[total(e)] = append(byTotal[total(e)], e)
	}
	clients := map[int]int{}
	assigned := make([]E, 0, len(requests))
	for i, r := range requests {
		if client, seen := clients[r.total]; seen && client != r.client {
			return nil, fmt.Errorf("clients %d and %d both have prompts of %d tokens, which cannot be told apart: change the workload", client, r.client, r.total)
		}
		clients[r.total] = r.client
		same := byTotal[r.total]
		if len(same) == 0 {
			return nil, fmt.Errorf("request %d to %s, of %d tokens, is missing", i, r.endpoint, r.total)
		}
		assigned = append(assigned, same[0])
		byTotal[r.total] = same[1:]
	}
	if len(entries) != len(requests) {
		return nil, fmt.Errorf("%d entries for %d requests", len(entries), len(requests))
	}
	return assigned, nil
}

// verdict is how a request counts of whose prompt's tokens so many were reused.
func verdict(reused, total int) string {
	switch {
	case 2*reused >= total:
		return "hit"
	case 10*reused < total:
		return "cold"
	}
	return "partial"
}

// comparison is what the log says of some requests, and what the ledger and its estimator say.
type comparison struct {
	requests, total, evaluated int
	ledger, estimate           account
}

// account is one view of the same requests.
type account struct {
	known, evaluated, truth int // requests with a figure, what the figures sum up to, and what the log's figures do
	right                   int
}

// enter adds a request; evaluated is nil where the view has no figure.
func (a *account) enter(truth realollama.Evaluation, evaluated *int, is string) {
	if evaluated != nil {
		a.known++
		a.evaluated += *evaluated
		a.truth += truth.Evaluated
	}
	if is == verdict(truth.Reused, truth.Total) {
		a.right++
	}
}

// wrong is by how much the figures differ from the log's, as a part of those; not a number without figures.
func (a account) wrong() float64 { return float64(a.evaluated-a.truth) / float64(a.truth) }

func (a *account) add(b account) {
	a.known += b.known
	a.evaluated += b.evaluated
	a.truth += b.truth
	a.right += b.right
}

func (c *comparison) add(d comparison) {
	c.requests += d.requests
	c.total += d.total
	c.evaluated += d.evaluated
	c.ledger.add(d.ledger)
	c.estimate.add(d.estimate)
}

func (c comparison) row(name string) string {
	view := func(a account) string {
		return fmt.Sprintf("%9d %6.1f%% %3d/%3d", a.evaluated, 100*a.wrong(), a.right, c.requests)
	}
	return fmt.Sprintf("%-38s %8d %7d | %9d | %s | %s | %d, %d tokens", name, c.requests, c.total, c.evaluated, view(c.ledger), view(c.estimate),
		c.requests-c.estimate.known, c.evaluated-c.estimate.truth)
}
