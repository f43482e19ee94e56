package proxy

import (
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	pathQueue  = ownPrefix + "queue"
	shownQueue = 100 // entries on the page without ?n=
	queueMost  = 1000
)

// queuePage is the content of pathQueue: the requests that wait for a lane, in the expected order
// of starting.
type queuePage struct {
	Waiting int `json:"waiting"` // for a lane, for memory, or for an absent server
	Queued  int `json:"queued"`  // of these, for a lane; Requests lists the first of them

	Priorities map[string]queuedEntry `json:"priorities"`
	Requests   []waitingEntry         `json:"requests"`
	Estimates  estimatesEntry         `json:"estimates"`
	Servers    []lanesEntry           `json:"servers"`
}

// queuedEntry counts the queued requests of one priority.
type queuedEntry struct {
	Requests int     `json:"requests"`
	Oldest   float64 `json:"oldest_s"`
}

// waitingEntry is one request that waits for a lane.
type waitingEntry struct {
	Place    int     `json:"place"` // among the requests for the same model on the same server
	Name     string  `json:"name,omitempty"`
	Client   string  `json:"client"` // hashed, like Flow
	Flow     string  `json:"flow"`
	Model    string  `json:"model"`
	Upstream string  `json:"upstream"`
	Priority string  `json:"priority"`
	Sparse   bool    `json:"sparse,omitempty"` // goes before the other requests of its priority
	Age      float64 `json:"age_s"`
	Tokens   int     `json:"estimated_prompt_tokens"`
	// Start is how many seconds from now it is expected to begin; nil if unknown.
	Start *float64 `json:"estimated_start_s"`
}

// estimatesEntry compares estimated and real waits.
type estimatesEntry struct {
	Count  int64    `json:"count"`       // estimated requests that have begun since
	Waited *float64 `json:"mean_wait_s"` // nil, like the next two, if Count is 0
	Error  *float64 `json:"mean_absolute_error_s"`
	Bias   *float64 `json:"bias_s"` // mean of the real minus the estimated wait
}

// lanesEntry is a server and the models that it has loaded or is to load.
type lanesEntry struct {
	Name     string       `json:"name"`
	Up       bool         `json:"up"`
	Draining bool         `json:"draining"`
	Models   []modelLanes `json:"models"`
}

// modelLanes are the lanes of a model with one set of options.
type modelLanes struct {
	Model   string `json:"model"`
	NumCtx  int    `json:"num_ctx,omitempty"`
	Loaded  bool   `json:"loaded"`
	Waiting int    `json:"waiting"`
	Busy    int    `json:"lanes_busy"`
	Lanes   int    `json:"lanes"`   // 0: no limit
	Learned bool   `json:"learned"` // otherwise the number was given
}

// queue returns the waiting requests, up to a limit.
func (h *Handler) queue(limit int) queuePage {
	page := queuePage{
		Waiting: int(h.Waiting()), Priorities: map[string]queuedEntry{}, Requests: []waitingEntry{},
	}
	for p := schedule.Interactive; p <= schedule.Batch; p++ {
		page.Priorities[p.String()] = queuedEntry{}
	}
	list := h.present()
	for _, b := range list {
		st := b.State()
		page.Servers = append(
			page.Servers,
			lanesEntry{
				Name:     b.Name,
				Up:       st.Up,
				Draining: b.draining.Load() || b.leaving.Load(),
				Models:   []modelLanes{},
			},
		)
	}
	if h.Lanes == nil {
		return page
	}
	waits, st := h.Lanes.Waiting(limit), h.Lanes.Stats()
	page.Queued, page.Estimates = waits.Total, estimatesOf(waits.Estimates)
	for p, q := range waits.By {
		page.Priorities[p.String()] = queuedEntry{q.Requests, seconds(q.Oldest)}
	}
	for _, x := range st.Runners {
		i := indexOf(list, x.Runner.Upstream)
		if i < 0 {
			continue // it is gone
		}
		s := &page.Servers[i]
		s.Models = append(s.Models, modelLanes{
			Model: h.modelName(x.Runner), NumCtx: x.Runner.Options.NumCtx(),
			Loaded: x.Loaded, Waiting: x.Waiting, Busy: x.Busy, Lanes: x.Lanes, Learned: x.Learned,
		})
	}
	for _, q := range waits.First {
		page.Requests = append(page.Requests, h.waitingEntry(q))
	}
	return page
}

func (h *Handler) waitingEntry(q schedule.Waiter) waitingEntry {
	e := waitingEntry{
		Place: q.Place, Client: hashed(q.Client), Flow: hashed([3]any{q.Client, q.Program, q.Flow}),
		Model: h.modelName(schedule.Runner{Upstream: q.Upstream, Options: q.Options}), Upstream: h.UpstreamName(q.Upstream),
		Priority: q.Priority.String(), Sparse: q.Sparse, Age: seconds(q.Age), Tokens: q.Tokens,
	}
	if p := h.Guard.Keys.holder(q.Client); p != nil {
		e.Name = p.name
	}
	if q.StartKnown {
		start := seconds(q.Start)
		e.Start = &start
	}
	return e
}

// modelName returns the readable name of a runner's model.
func (h *Handler) modelName(r schedule.Runner) string {
	return h.at(r.Upstream).modelName(r.Options.Model)
}

// modelName returns the readable name by which a model, by its weights, was last used.
func (b *backend) modelName(weights string) string {
	return upstream.DisplayName(b.runners.Name(weights))
}

func estimatesOf(e schedule.Estimates) estimatesEntry {
	if e.Count == 0 {
		return estimatesEntry{}
	}
	mean := func(sum time.Duration) *float64 {
		v := seconds(sum / time.Duration(e.Count))
		return &v
	}
	return estimatesEntry{int64(e.Count), mean(e.Waited), mean(e.Absolute), mean(e.Late)}
}

// seconds rounds to milliseconds.
func seconds(d time.Duration) float64 { return d.Round(time.Millisecond).Seconds() }
