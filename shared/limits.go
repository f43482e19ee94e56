// Package shared is what proxies share through a Valkey or Redis server, besides the prefixes that
// they have seen (contextstore.Valkey): the limits of API keys, and what was learned of servers.
package shared

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

const (
	// TakeWait is how long Limits.Take waits for a slow server.
	TakeWait = 50 * time.Millisecond
	// lease is how long the waiting requests of a proxy count that does not say that they still wait,
	// and renew how often it says so.
	lease = 5 * time.Second
	renew = lease / 4
)

// Limits is a proxy.Limiter for all proxies that use one Valkey or Redis server. Make it with
// NewLimits; it must be closed.
//
// The rate of a key is one number in the server: when all of its requests may be sent again (GCRA), by
// the server's clock. Its waiting requests are a hash, with a number for each proxy, which counts for a
// few seconds unless it is renewed. The name of both is an HMAC of the key's digest.
type Limits struct {
	conn    *valkeyconn.Conn
	self    string // this process, in the hashes of waiting requests
	refused *outage.Outage

	asked, unanswered atomic.Uint64

	wake    chan struct{} // has one place
	stop    context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex          // guards everything below
	waiting map[string]int      // by key, without those that have none
	changed map[string]struct{} // keys whose number is not in the server yet
}

// LimitStats counts the questions of Limits.
type LimitStats struct {
	Asked      uint64 // requests of keys with limits
	Unanswered uint64 // … of these, the ones for which the proxy's own counts decided
}

// NewLimits returns the limits that are kept in the server. The connection must outlive them.
func NewLimits(conn *valkeyconn.Conn) *Limits {
	var id [8]byte
	rand.Read(id[:]) // never fails
	ctx, stop := context.WithCancel(context.Background())
	l := &Limits{
		conn: conn, self: hex.EncodeToString(id[:]), stop: stop, wake: make(chan struct{}, 1),
		waiting: map[string]int{}, changed: map[string]struct{}{},
		refused: conn.Refusal("refuses to count requests of API keys, so that each proxy counts its own",
			"counts requests of API keys again"),
	}
	conn.OnReturn(l.again)
	l.running.Go(func() { l.run(ctx) })
	return l
}

// Close takes this proxy's waiting requests out of the server, if that is there.
func (l *Limits) Close() error {
	l.stop()
	l.running.Wait()
	return nil
}

// key returns the name of what the server keeps for a key.
func (l *Limits) key(kind, key string) string {
	target := l.conn.Target()
	mac := hmac.New(sha256.New, target.Secret)
	io.WriteString(mac, "ollama-cacheproxy API key ")
	io.WriteString(mac, key)
	return target.Prefix + kind + hex.EncodeToString(mac.Sum(nil)[:16])
}

// takeScript takes one request of a key if its rate allows that, and counts the requests of the key
// that wait at other proxies.
//
// KEYS are the key's rate and its waiting requests. ARGV are the microseconds after which one more may
// be sent (0: no limit), how many may be sent at once, how many microseconds' worth the proxy knows to
// be used up, the proxy, 1 if the waiting requests are asked for, and for how many microseconds these
// count. It returns whether the request may be sent, for how many microseconds what is used up lasts,
// and the number that wait.
//
// Whatever the keys contain, also after the server's clock was set back, nobody is locked out for longer
// than it takes to use up everything, or than waiting requests count.
var takeScript = valkey.NewLuaScript(`
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local ok, owed, others = 1, 0, 0
local each, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
if each > 0 then
  local whole = each * burst
  owed = (tonumber(redis.call('GET', KEYS[1])) or 0) - now
  if not (owed >= 0) then owed = 0 end
  owed = math.min(math.max(owed, tonumber(ARGV[3])), whole)
  if owed + each <= whole + 1 then
    owed = owed + each
  else
    ok = 0
  end
  redis.call('SET', KEYS[1], string.format('%.0f', now + owed), 'PX', string.format('%.0f', owed / 1000 + 1))
end
if ARGV[5] == '1' then
  local all = redis.call('HGETALL', KEYS[2])
  for i = 1, #all, 2 do
    local count, till = string.match(all[i + 1], '^(%d+) (%d+)$')
    till = tonumber(till)
    if not till or till < now or till > now + ARGV[6] then
      redis.call('HDEL', KEYS[2], all[i])
    elseif all[i] ~= ARGV[4] then
      others = others + math.min(tonumber(count), 1000000)
    end
  end
end
return {ok, math.floor(owed), others}
`)

// Take implements proxy.Limiter. It waits at most TakeWait for the server.
func (l *Limits) Take(ctx context.Context, t proxy.Taking) (proxy.Taken, error) {
	each, used, waits := 0.0, 0.0, "0"
	if t.Rate > 0 {
		each = 1e6 / t.Rate
		used = max(t.Used, 0) * each
	}
	if t.Waits {
		waits = "1"
	}
	var taken proxy.Taken
	err := l.conn.Call(ctx, takeWait, func(ctx context.Context, c valkey.Client) error {
		values, err := takeScript.Exec(ctx, c, []string{l.key("rate:", t.Key), l.key("waiting:", t.Key)}, []string{
			strconv.FormatFloat(each, 'f', 6, 64), strconv.Itoa(t.Burst), strconv.FormatFloat(used, 'f', 6, 64),
			l.self, waits, strconv.FormatInt(lease.Microseconds(), 10),
		}).AsIntSlice()
		if err == nil {
			taken, err = parseTaken(values, t)
		}
		return err
	})
	if ctx.Err() == nil { // otherwise the client has left
		l.asked.Add(1)
		if err != nil {
			l.unanswered.Add(1)
		}
		note(l.refused, err)
	}
	return taken, err
}

// note says once that the server answers with errors, and once that it does no longer.
func note(refused *outage.Outage, err error) {
	if valkeyconn.IsAnswer(err) {
		refused.Failure(err)
	} else if err == nil {
		refused.Success()
	}
}

var errTaken = errors.New("the server's answer is not that of our script")

// parseTaken reads what takeScript returned.
func parseTaken(values []int64, t proxy.Taking) (proxy.Taken, error) {
	if len(values) != 3 || values[0]&^1 != 0 || values[1] < 0 || values[2] < 0 {
		return proxy.Taken{}, errTaken
	}
	taken := proxy.Taken{OK: values[0] == 1, Waiting: int(min(values[2], math.MaxInt32))}
	if t.Rate > 0 {
		taken.Used = min(float64(values[1])*t.Rate/1e6, float64(t.Burst))
	}
	return taken, nil
}

// Stats returns how many questions there were.
func (l *Limits) Stats() LimitStats {
	unanswered := l.unanswered.Load() // first, so that it is at most as many
	return LimitStats{Asked: l.asked.Load(), Unanswered: unanswered}
}

// Waiting implements proxy.Limiter.
func (l *Limits) Waiting(key string, n int) {
	l.mu.Lock()
	if l.waiting[key] += n; l.waiting[key] <= 0 {
		delete(l.waiting, key)
	}
	l.changed[key] = struct{}{}
	l.mu.Unlock()
	valkeyconn.Signal(l.wake)
}

// again has all numbers sent again.
func (l *Limits) again() {
	l.mu.Lock()
	for key := range l.waiting {
		l.changed[key] = struct{}{}
	}
	l.mu.Unlock()
	valkeyconn.Signal(l.wake)
}

// run keeps the numbers of waiting requests in the server until ctx ends.
func (l *Limits) run(ctx context.Context) {
	tick := time.NewTicker(renew)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.leave()
			return
		case <-l.wake:
		case <-tick.C:
			l.again()
		}
		l.tell()
	}
}

// leave takes all numbers out of the server.
func (l *Limits) leave() {
	l.mu.Lock()
	for key := range l.waiting {
		delete(l.waiting, key)
		l.changed[key] = struct{}{}
	}
	l.mu.Unlock()
	l.tell()
}

// waitScript notes how many requests of a key wait at a proxy. KEYS is the key's waiting requests;
// ARGV are the proxy, the number, and for how many milliseconds it counts.
var waitScript = valkey.NewLuaScript(`
if ARGV[2] == '0' then
  return redis.call('HDEL', KEYS[1], ARGV[1])
end
local time = redis.call('TIME')
local till = time[1] * 1000000 + time[2] + ARGV[3] * 1000
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %.0f', ARGV[2], till))
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
`)

// tell sends the numbers that have changed. What fails is sent with the next renewal.
func (l *Limits) tell() {
	l.mu.Lock()
	var list []valkey.LuaExec
	for key := range l.changed {
		list = append(list, valkey.LuaExec{Keys: []string{l.key("waiting:", key)}, Args: []string{
			l.self, strconv.Itoa(l.waiting[key]), strconv.FormatInt(lease.Milliseconds(), 10),
		}})
	}
	clear(l.changed)
	l.mu.Unlock()
	if len(list) == 0 {
		return
	}
	err := l.conn.Call(context.Background(), valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
		for _, result := range waitScript.ExecMulti(ctx, c, list...) {
			if err := result.Error(); err != nil {
				return err
			}
		}
		return nil
	})
	note(l.refused, err)
}

// takeWait is TakeWait, except in tests of what is counted, on machines that have no time for it.
var takeWait = TakeWait
