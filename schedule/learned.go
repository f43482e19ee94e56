package schedule

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// What a proxy has learned of a server's models is of use to the one that schedules the server
// next. It begins with that, and corrects it by what it sees.

// learnedVersion is the version of Learned. Others are ignored.
const learnedVersion = 1

const (
	maxLearnedModels = 64
	maxLearnedName   = 512 // bytes of a model's name
)

// Learned is what has been learned of a server, as JSON for other proxies.
type Learned struct {
	Version int                     `json:"version"`
	Models  map[string]LearnedModel `json:"models,omitempty"` // by Runner.Options.Model
	Apart   [][2]string             `json:"apart,omitempty"`  // pairs of models that do not fit beside each other
}

// LearnedModel is what has been learned of a model on a server. Times are in nanoseconds.
type LearnedModel struct {
	Slots int  `json:"slots,omitempty"` // 0: not known
	Sure  bool `json:"sure,omitempty"`  // one more was one too many …
	Pause int  `json:"pause,omitempty"` // … and is tried again after so many requests

	Answer  Belief `json:"answer"`  // tokens of an answer
	Prompt  Belief `json:"prompt"`  // time to evaluate a token
	Decode  Belief `json:"decode"`  // time to generate a token
	Load    Belief `json:"load"`    // time to load it
	Service Belief `json:"service"` // time from a grant to the end
	Pace    Belief `json:"pace"`    // … of that without loads, per token of its work
	Around  Belief `json:"around"`  // … during which the engine did not work for it
	Host    Belief `json:"host"`    // how often the host cache had a prompt that no slot had
	Kept    Belief `json:"kept"`    // … or that, or another slot
}

// Belief is a mean, and the weight of what it is from; 0: nothing.
type Belief struct {
	Value  float64 `json:"v"`
	Weight float64 `json:"n"`
}

func (m mean) belief() Belief { return Belief{m.v, float64(m.n)} }
func (b Belief) mean() mean   { return mean{b.Value, int(min(b.Weight, meanOver))} }
func (b Belief) ratio() ratio { return ratio{b.Value * b.Weight, b.Weight} }
func (r ratio) belief() Belief {
	if r.under == 0 {
		return Belief{}
	}
	return Belief{r.over / r.under, r.under}
}

// sane reports whether a belief can be one: from 0 to most, of a weight that more can outweigh.
func (b Belief) sane(most float64) bool {
	return b.Value >= 0 && b.Value <= most && b.Weight >= 0 && b.Weight <= math.MaxInt32 // NaN is not
}

// sane reports whether all of it is possible.
func (m LearnedModel) sane() bool {
	token, day := float64(time.Minute), float64(24*time.Hour)
	return m.Slots >= 0 && m.Slots <= maxLearned && m.Pause >= 0 && m.Pause <= lastPause &&
		m.Answer.sane(math.MaxInt32) && m.Prompt.sane(token) && m.Decode.sane(token) && m.Load.sane(day) &&
		m.Service.sane(day) && m.Pace.sane(token) && m.Around.sane(day) && m.Host.sane(1) && m.Kept.sane(1)
}

// learned returns what is known of a runner's model.
func (x *runner) learned() LearnedModel {
	r := &x.rates
	m := LearnedModel{
		Answer: r.answer.belief(), Prompt: r.prompt.belief(), Decode: r.decode.belief(), Load: r.loadTime.belief(),
		Service: r.service.belief(), Pace: r.pace.belief(), Around: r.around.belief(), Host: r.host.belief(), Kept: r.kept.belief(),
	}
	switch n := x.given(); {
	case n == 0:
		m.Slots, m.Sure, m.Pause = x.want, x.learner.ceiling, x.learner.pause
	case n > 0:
		m.Slots, m.Sure = min(n, maxLearned), true
	}
	return m
}

// Learned returns what has been learned of a server: of the models that were used last, and of each
// with the options with which it was.
func (q *Queue) Learned(upstream uint16) Learned {
	l := Learned{Version: learnedVersion}
	s := q.server(upstream)
	used := slices.DeleteFunc(slices.Clone(s.runners), func(x *runner) bool { return x.rates.service.n == 0 || len(x.key.Options.Model) > maxLearnedName })
	slices.SortStableFunc(used, func(a, b *runner) int { return b.used.Compare(a.used) })
	for _, x := range used {
		if _, later := l.Models[x.key.Options.Model]; later {
			continue
		}
		if m := x.learned(); m.sane() && len(l.Models) < maxLearnedModels {
			if l.Models == nil {
				l.Models = map[string]LearnedModel{}
			}
			l.Models[x.key.Options.Model] = m
		}
	}
	for pair, r := range s.relations {
		if _, first := l.Models[pair[0]]; r == apart && first && len(l.Apart) < maxLearnedModels {
			if _, second := l.Models[pair[1]]; second {
				l.Apart = append(l.Apart, pair)
			}
		}
	}
	slices.SortFunc(l.Apart, func(a, b [2]string) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) })
	return l
}

// SetLearned sets what another proxy has learned of a server. Of models that have been used here
// since this proxy schedules the server, what was learned here stays. What cannot be true, or has
// another version, is ignored.
func (q *Queue) SetLearned(upstream uint16, l Learned, now time.Time) {
	if l.Version != learnedVersion || len(l.Models) > maxLearnedModels || len(l.Apart) > maxLearnedModels {
		return
	}
	s := q.server(upstream)
	s.believed = map[string]LearnedModel{}
	for name, m := range l.Models {
		if len(name) <= maxLearnedName && m.sane() {
			s.believed[name] = m
		}
	}
	for _, p := range l.Apart {
		_, first := s.believed[p[0]]
		_, second := s.believed[p[1]]
		if first && second && p[0] != p[1] && s.between(p[0], p[1]) == untried {
			s.relate(p[0], p[1], apart)
		}
	}
	for _, x := range s.runners {
		if s.foreign || !x.taught {
			x.believes(now)
		}
	}
	q.pump(s, now)
}

// believes makes what another proxy has learned of the runner's model what is known of it.
func (x *runner) believes(now time.Time) {
	m, ok := x.server.believed[x.key.Options.Model]
	if !ok {
		return
	}
	x.rates = rates{
		answer: m.Answer.mean(), prompt: m.Prompt.ratio(), decode: m.Decode.ratio(), loadTime: m.Load.mean(),
		service: m.Service.mean(), pace: m.Pace.ratio(), around: m.Around.mean(), host: m.Host.mean(), kept: m.Kept.mean(),
	}
	if x.given() != 0 || m.Slots == 0 {
		return
	}
	x.want, x.server.found = m.Slots, m.Slots
	x.learner.anew()
	if m.Sure {
		x.learner.ceiling, x.learner.since, x.learner.pause = true, now, max(m.Pause, firstPause)
	}
	x.resize()
}

// Learned returns what has been learned of the server: see Queue.Learned.
func (s *Scheduler) Learned(upstream uint16) Learned {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.Learned(upstream)
}

// SetLearned sets what another proxy has learned of the server: see Queue.SetLearned.
func (s *Scheduler) SetLearned(upstream uint16, l Learned) {
	s.do(func(q *Queue, now time.Time) { q.SetLearned(upstream, l, now) })
}
