package doctor

import "time"

// loaded is why a request found its model not loaded.
type loaded struct {
	cause     Cause
	by        string // the model that was loaded before, if the cause is CauseEvicted
	gap       time.Duration
	keepAlive time.Duration
	own       bool
}

// ollamaKeepAlive is Ollama's default keep_alive, which applies if the proxy leaves it to Ollama.
const ollamaKeepAlive = 5 * time.Minute

// resident tracks a model through its requests.
type resident struct {
	used      bool
	ended     time.Time // when the last request to it ended
	keepAlive time.Duration
	own       bool
}

// next updates how long the model stays by a request.
func (r *resident) next(q *Request) {
	r.used = true
	if q.Ended.After(r.ended) {
		r.ended = q.Ended
	}
	if q.Foreign && r.own && !q.Loaded {
		// A client's own stays in force until the model is reloaded, or a native request arrives.
		return
	}
	r.keepAlive, r.own = q.KeepAlive, q.OwnKeepAlive
	if r.keepAlive < 0 {
		r.keepAlive = ollamaKeepAlive
	}
}

// loadsOf returns why models were loaded, from requests in the order of sending.
func loadsOf(rows []Request) map[*Request]loaded {
	type other struct {
		name string
		at   time.Time
	}
	found := map[*Request]loaded{}
	models := map[[2]string]*resident{}
	latest := map[string]map[string]other{} // the last load of each model, by server and weights
	for i := range rows {
		q := &rows[i]
		key := [2]string{q.Upstream, q.Weights}
		r := models[key]
		if r == nil {
			r = &resident{}
			models[key] = r
		}
		if q.Loaded {
			l := loaded{cause: CauseUnknown, gap: max(0, q.Sent.Sub(r.ended)), keepAlive: r.keepAlive, own: r.own}
			since := r.ended
			for weights, o := range latest[q.Upstream] {
				if weights != q.Weights && o.at.After(since) {
					l.by, since = o.name, o.at
				}
			}
			switch {
			case q.ByNumCtx:
				l.cause = CauseNumCtx
			case q.ByOptions:
				l.cause = CauseOptions
			case !r.used:
				l.cause = CauseFirst
			case q.Restarted:
				l.cause = CauseRestarted
			case l.gap >= r.keepAlive:
				l.cause = CauseExpired
			case l.by != "":
				l.cause = CauseEvicted
			}
			if l.cause != CauseEvicted {
				l.by = ""
			}
			found[q] = l
			if latest[q.Upstream] == nil {
				latest[q.Upstream] = map[string]other{}
			}
			latest[q.Upstream][q.Weights] = other{q.Model, q.Sent.Add(q.Load)}
		}
		r.next(q)
	}
	return found
}
