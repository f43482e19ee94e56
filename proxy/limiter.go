package proxy

import (
	"context"
	"time"
)

// Limiter counts the requests of API keys over several proxies. Its methods may be called
// concurrently.
//
// What this proxy has counted itself is kept in step with it, and decides when a Limiter fails: no
// client is refused because it does, and none gets more than its limits at each proxy.
type Limiter interface {
	// Take takes one request of a key, if its rate allows that, and tells how many requests of the key
	// wait at other proxies. It is called once for each request of a key with limits, and must return
	// soon.
	Take(context.Context, Taking) (Taken, error)
	// Waiting notes that n more requests of the key wait at this proxy; n may be negative. It must not
	// wait.
	Waiting(key string, n int)
}

// Taking is what is asked of a Limiter.
type Taking struct {
	Key   string  // a digest of the key
	Rate  float64 // requests in a second; 0: no limit
	Burst int     // how many may be sent at once
	Used  float64 // how many of these are used up, as far as this proxy knows
	Waits bool    // the number of waiting requests is limited
}

// Taken is a Limiter's answer.
type Taken struct {
	OK      bool    // the request may be sent
	Used    float64 // how many of Taking.Burst are used up now, over all proxies
	Waiting int     // requests of the key that wait at other proxies
}

// inStep is by how much of a request a proxy's own limiter may be stricter than the shared one: they are
// not asked at the same moment, and requests are taken as whole ones.
const inStep = 0.01

// take takes one of the client's requests, over all proxies if shared is not nil. It returns how long
// the client has to wait for it: 0 or less if it may be sent.
func (p *keyHolder) take(ctx context.Context, shared Limiter) time.Duration {
	if shared != nil && (p.limiter != nil || p.maxWaiting > 0) {
		t := Taking{Key: p.client(), Waits: p.maxWaiting > 0}
		if p.limiter != nil {
			t.Rate, t.Burst = float64(p.limiter.Limit()), p.limiter.Burst()
			t.Used = max(float64(t.Burst)-p.limiter.Tokens()-inStep, 0)
		}
		taken, err := shared.Take(ctx, t)
		p.elsewhere.Store(int64(taken.Waiting))
		if err == nil {
			return p.follow(taken)
		}
	}
	if p.limiter == nil {
		return 0
	}
	now := time.Now()
	res := p.limiter.ReserveN(now, 1)
	wait := res.DelayFrom(now)
	if wait > 0 {
		res.CancelAt(now)
	}
	return wait
}

// count asks how many of the client's requests wait at other proxies, without taking one.
func (p *keyHolder) count(ctx context.Context, shared Limiter) {
	if shared == nil || p.maxWaiting == 0 {
		return
	}
	taken, _ := shared.Take(ctx, Taking{Key: p.client(), Waits: true})
	p.elsewhere.Store(int64(taken.Waiting)) // if it fails, 0
}

// follow keeps the client's own limiter in step with what was taken over all proxies, so that nothing
// jumps when that one decides again. It returns how long the client has to wait.
//
// What this limiter has used up is passed to the next Take, which believes it, so it must not be more
// than all have.
func (p *keyHolder) follow(taken Taken) time.Duration {
	if p.limiter == nil {
		return 0
	}
	now, burst := time.Now(), float64(p.limiter.Burst())
	if taken.OK {
		p.limiter.ReserveN(now, 1)
	}
	left := burst - min(max(taken.Used, 0), burst)
	if ahead := int(min(p.limiter.TokensAt(now)-left+inStep, burst)); ahead > 0 {
		p.limiter.ReserveN(now, ahead)
	}
	if taken.OK {
		return 0
	}
	wait := time.Duration((1 - left) / float64(p.limiter.Limit()) * float64(time.Second))
	return max(wait, time.Millisecond)
}
