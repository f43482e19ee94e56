// Package proxyprocess builds ollama-cacheproxy from this tree and runs it as a separate process,
// for tests and demonstrations.
package proxyprocess

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	startTimeout = 30 * time.Second
	// stopTimeout is longer than the proxy's own limit for requests that run when it is told to
	// stop.
	stopTimeout = 45 * time.Second
)

// Build builds the program at path; flags are passed to "go build".
func Build(ctx context.Context, path string, flags ...string) error {
	args := append([]string{"build", "-o", path}, flags...)
	out, err := exec.CommandContext(ctx, "go", append(args, "github.com/ollama-cacheproxy/ollama-cacheproxy/cmd/ollama-cacheproxy")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("building the proxy: %w\n%s", err, realollama.Quote(string(out)))
	}
	return nil
}

// Process is a running proxy.
type Process struct {
	URL string // of its listener

	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended and err is set
	err    error
	mu     sync.Mutex
	log    bytes.Buffer // guarded by mu
}

// Start runs the program at path in front of upstream (a URL) on a free port, with additional
// flags, and waits until it listens. The context covers only the start.
func Start(ctx context.Context, path, upstream string, flags ...string) (*Process, error) {
	args := append([]string{"--listen", "127.0.0.1:0", "--upstream", upstream, "--log-format", "json"}, flags...)
	p := &Process{cmd: exec.Command(path, args...), exited: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("starting the proxy: %w", err)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the proxy: %w", err)
	}
	ready := make(chan string, 1)
	go func() { // ends with the process
		realollama.EachLine(stderr, func(line string) { p.note(line, ready) })
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case p.URL = <-ready:
		return p, nil
	case <-p.exited:
		return nil, fmt.Errorf("the proxy ended: %w\n%s", p.err, p.Log())
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("the proxy is not ready: %w\n%s", ctx.Err(), p.Log()), p.Stop())
	}
}

// note adds a line to the log. If it says that the proxy listens, ready gets the address.
func (p *Process) note(text string, ready chan<- string) {
	p.mu.Lock()
	p.log.WriteString(text + "\n")
	p.mu.Unlock()
	var line struct{ Msg, Listen string }
	if json.Unmarshal([]byte(text), &line) != nil ||
		!strings.HasPrefix(line.Msg, "ready") || line.Listen == "" {
		return
	}
	select {
	case ready <- line.Listen:
	default: // it was reported before
	}
}

// Stop asks the proxy to stop, and waits. It returns an error if the proxy's exit status is not 0.
func (p *Process) Stop() error {
	// A process that has ended already needs no signal.
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		p.cmd.Process.Kill()
		<-p.exited
		return fmt.Errorf("the proxy did not stop within %v of SIGTERM", stopTimeout)
	}
	if p.err != nil {
		return fmt.Errorf("the proxy ended with %w", p.err)
	}
	return nil
}

// Kill ends the proxy at once, as a crash does, and waits until it has ended.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// Abort makes the proxy write to its log what each of its goroutines does, and end. It does not
// wait for that, and does nothing if the proxy has ended.
func (p *Process) Abort() { _ = p.cmd.Process.Signal(syscall.SIGQUIT) }

// Log returns the proxy's log.
func (p *Process) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// Fleet is what a proxy says of its fleet.
type Fleet struct {
	Peers     []struct{ Up bool }
	Upstreams []struct {
		Server string // its name
		Here   bool   // this proxy schedules it
	}
	Counts struct{ Received int } // requests that peers passed on
}

// AskFleet asks the proxy at a URL about its fleet.
func AskFleet(ctx context.Context, url string) (f Fleet, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/_cacheproxy/fleet", nil)
	if err != nil {
		return f, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return f, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&f); err != nil {
		return f, fmt.Errorf("reading what the proxy says of its fleet: %s: %w", res.Status, err)
	}
	return f, nil
}

// Joined waits until the proxy at a URL has found that many peers.
func Joined(ctx context.Context, url string, peers int) (Fleet, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		f, err := AskFleet(ctx, url)
		up := 0
		for _, p := range f.Peers {
			if p.Up {
				up++
			}
		}
		if err == nil && up == peers {
			return f, nil
		}
		select {
		case <-ctx.Done():
			return f, fmt.Errorf("the proxy at %s sees %d of %d peers: %w", url, up, peers, errors.Join(ctx.Err(), err))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
