// Package valkeyconn is a connection to a Valkey or Redis server that may go away at any time.
//
// While it is gone, calls fail at once, and it is tried again in the background. One line says that
// it is gone, and one that it is back.
package valkeyconn

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
)

const (
	// Wait is how long what is done in the background waits for a slow server.
	Wait = 2 * time.Second
	// slow is how many calls in a row may end without an answer before the server counts as gone.
	slow = 3
	// tendEvery is how often Options.Tend is called.
	tendEvery = 5 * time.Second

	firstTry = 100 * time.Millisecond // after the server went
	lastTry  = 10 * time.Second       // the longest time between two tries
)

// ErrGone is the error of calls while the server is gone.
var ErrGone = errors.New("the Valkey server cannot be used at the moment; it is tried again by itself")

// Options say what a connection is for. All but Setting, Gone and Back may be zero.
type Options struct {
	Setting string       // names the setting that the target is from, for errors
	Gone    string       // the line that says that the server is gone
	Back    string       // the line that says that it is back
	Log     *slog.Logger // nil: nothing is logged

	// Ready is called with each new connection, before anybody else can use it. With an error it is
	// not used. It has Wait for that.
	Ready func(context.Context, valkey.Client) error
	// Tend is called every few seconds while the server is there.
	Tend func(context.Context, valkey.Client) error
}

// Conn is a connection. Open it with Open; it must be closed. Its methods may be called concurrently.
//
// If the server closes the connection, or leaves three calls in a row unanswered, it is gone. It is
// tried again after 0.1 s at first and at most every 10 s.
type Conn struct {
	options Options
	target  Target
	dialing valkey.ClientOption
	outage  *outage.Outage

	client atomic.Pointer[client] // nil: gone

	wake    chan struct{} // has one place
	ctx     context.Context
	stop    context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex
	returned []func() // guarded by mu
}

type client struct {
	valkey.Client
	late atomic.Int32 // calls in a row without an answer
}

// Open connects to the server. It fails if the server refuses us for a reason that time does not
// mend; a server that is not there is tried again.
func Open(target Target, options Options) (*Conn, error) {
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	c := &Conn{options: options, target: target, wake: make(chan struct{}, 1)}
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.outage = &outage.Outage{
		Log: options.Log, Gone: options.Gone, Back: options.Back, Args: []any{"server", target.Address},
		First: firstTry, Most: lastTry,
	}
	c.dialing = target.Option()
	c.dialing.AlwaysPipelining = true // a call that ends early does not end the connection
	c.dialing.PipelineMultiplex = 1
	c.dialing.Dialer.Timeout = Wait
	c.dialing.ConnWriteTimeout = Wait
	c.dialing.DialCtxFn = c.dial
	if err := c.connect(); err != nil {
		if IsWrong(err) {
			c.stop()
			return nil, target.Refused(options.Setting, err)
		}
		c.outage.Failure(err)
	}
	c.running.Go(c.tend)
	return c, nil
}

// dial ends when the connection is closed, so that nobody waits for a server that is not there.
func (c *Conn) dial(
	ctx context.Context, address string, dialer *net.Dialer, secure *tls.Config,
) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	if secure != nil {
		return (&tls.Dialer{NetDialer: dialer, Config: secure}).DialContext(ctx, "tcp", address)
	}
	return dialer.DialContext(ctx, "tcp", address)
}

// connect makes the server usable, if it is there.
func (c *Conn) connect() error {
	fresh, err := Connect(c.dialing)
	if err != nil {
		return err
	}
	if c.options.Ready != nil {
		ctx, cancel := context.WithTimeout(c.ctx, Wait)
		defer cancel()
		if err := c.options.Ready(ctx, fresh); err != nil {
			fresh.Close()
			return err
		}
	}
	c.client.Store(&client{Client: fresh})
	return nil
}

// tend connects again, and tends the connection, until it is closed.
func (c *Conn) tend() {
	for {
		wait := tendEvery
		if c.Gone() {
			wait = max(time.Until(c.outage.Next()), time.Millisecond)
		}
		timer := time.NewTimer(wait)
		select {
		case <-c.ctx.Done():
			timer.Stop()
			return
		case <-c.wake:
			timer.Stop()
			continue // wait as long as the outage says
		case <-timer.C:
		}
		c.try()
	}
}

func (c *Conn) try() {
	if !c.Gone() {
		if c.options.Tend != nil {
			c.Call(c.ctx, Wait, c.options.Tend) // Call notes its error
		}
		return
	}
	if err := c.connect(); err != nil {
		if c.ctx.Err() == nil {
			c.outage.Failure(err)
		}
		return
	}
	c.outage.Success()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.returned {
		f()
	}
}

// OnReturn has f called whenever the server is back. f must not wait.
func (c *Conn) OnReturn(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returned = append(c.returned, f)
}

// Refusal returns an Outage for a server that is there, and answers certain calls with errors. gone
// and back are what it does then.
func (c *Conn) Refusal(gone, back string) *outage.Outage {
	return &outage.Outage{
		Log: c.options.Log, Args: []any{"server", c.target.Address},
		Gone: "the Valkey server " + gone + "; check that it is a primary and no cluster, its" +
			" maxmemory-policy, and what this user may do there (docs/shared.md)",
		Back: "the Valkey server " + back,
	}
}

// Target returns what was given to Open.
func (c *Conn) Target() Target { return c.target }

// Call calls f with the connected client, or returns ErrGone. limit is how long f may take; 0 means
// that only ctx limits it. f must return the errors of its calls, except those that the server
// answered and that are no concern of the connection's.
func (c *Conn) Call(
	ctx context.Context, limit time.Duration, f func(context.Context, valkey.Client) error,
) error {
	now := c.client.Load()
	if now == nil {
		return ErrGone
	}
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	err := f(ctx, now)
	if err == nil {
		now.late.Store(0)
	} else {
		c.failed(ctx, now, err)
	}
	return err
}

// failed notes that a call failed, and whether the server is gone. ctx is the call's.
func (c *Conn) failed(ctx context.Context, with *client, err error) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	unanswered := errors.Is(err, context.DeadlineExceeded)
	if IsAnswer(err) || unanswered && with.late.Add(1) < slow {
		c.outage.Note()
		return
	}
	if !c.client.CompareAndSwap(with, nil) {
		c.outage.Note()
		return
	}
	c.outage.Failure(err)
	c.running.Go(with.Close) // it waits for calls under way
	Signal(c.wake)
}

// Signal leaves a token in a channel that has one place.
func Signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Note counts an error that leaves the server usable, such as a value that is not ours.
func (c *Conn) Note() { c.outage.Note() }

// Gone reports whether the server is gone.
func (c *Conn) Gone() bool { return c.client.Load() == nil }

// State returns whether the server is gone, and how many calls have failed, without those that were
// not made because it is gone.
func (c *Conn) State() (gone bool, failed uint64) { return c.outage.State() }

// Why returns since when the server is gone, and the error of the last try; zero if it is not gone.
func (c *Conn) Why() (since time.Time, err error) { return c.outage.Why() }

// Close closes the connection. There must be no other call any more.
func (c *Conn) Close() {
	c.stop()
	c.running.Wait()
	if last := c.client.Swap(nil); last != nil {
		last.Close()
	}
}

// IsAnswer reports whether an error is what the server said.
func IsAnswer(err error) bool {
	_, ok := valkey.IsValkeyErr(err)
	return ok
}

// IsFull reports whether the server refuses to write for lack of memory.
func IsFull(err error) bool {
	refused, ok := valkey.IsValkeyErr(err)
	return ok && strings.HasPrefix(refused.Error(), "OOM")
}

// passing are the errors of a server that is being loaded, is busy or full, has lost its replicas or
// its master, or cannot write its disk.
var passing = []string{
	"LOADING", "BUSY", "MISCONF", "NOREPLICAS", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN",
	"UNBLOCKED", "UNKILLABLE", "OOM",
}

// IsWrong reports whether an error is the server's, and one of the settings, which no time mends.
func IsWrong(err error) bool {
	refused, ok := valkey.IsValkeyErr(err)
	if !ok || refused.IsNil() {
		return false
	}
	text := refused.Error() // without "ERR ", which valkey-go takes away
	kind, _, _ := strings.Cut(text, " ")
	return !slices.Contains(passing, kind) && !strings.HasPrefix(text, "max number of clients")
}
