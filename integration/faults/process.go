//go:build linux

package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// place is where a program runs: a host of a lab, or an address of loopback.
type place struct {
	name string
	addr netip.Addr
	host *netns.Host // nil: loopback
}

// places makes places: in a lab if there is one.
type places struct{ lab *netns.Lab }

// made counts the places on loopback, which have addresses of their own.
var made atomic.Uint32

func (p *places) place(name string) (place, error) {
	if p.lab != nil {
		h, err := p.lab.Host(name)
		if err != nil {
			return place{}, err
		}
		return place{name, h.Addr, h}, nil
	}
	pid := os.Getpid()
	return place{name: name, addr: netip.AddrFrom4([4]byte{127, byte(1 + pid>>8%250), byte(pid), byte(made.Add(1))})}, nil
}

func (p place) listen(addr string) (net.Listener, error) {
	if p.host != nil {
		return p.host.Listen("tcp", addr)
	}
	return net.Listen("tcp", addr)
}

func (p place) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if p.host != nil {
		return p.host.DialContext(ctx, network, addr)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

// process is a program that is ended and started again.
type process struct {
	name string
	at   place
	path string
	env  []string
	args []string

	cmd    *exec.Cmd
	exited chan struct{} // closed when it has ended and err is set
	err    error
	log    tail
}

func (p *process) start() error {
	if p.at.host != nil {
		p.cmd = p.at.host.Command(context.Background(), p.path, p.args...)
	} else {
		p.cmd = exec.Command(p.path, p.args...)
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	p.cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1"), p.env...)
	// The reading end is ours alone, so reading ends with the program.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	p.cmd.Stdout, p.cmd.Stderr = w, w
	if p.at.host != nil {
		err = p.at.host.Start(p.cmd)
	} else {
		err = p.cmd.Start()
	}
	w.Close()
	if err != nil {
		r.Close()
		return fmt.Errorf("starting %s: %w", p.name, err)
	}
	p.log.add(fmt.Sprintf("--- %s started, process %d", p.name, p.cmd.Process.Pid))
	p.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) { // ends with the process
		defer close(exited)
		defer r.Close()
		realollama.EachLine(r, p.log.add)
		p.err = cmd.Wait()
	}(p.cmd, p.exited)
	return nil
}

func (p *process) running() bool {
	if p.exited == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill is kill -9.
func (p *process) kill() error {
	if !p.running() {
		return fmt.Errorf("%s ended by itself: %w", p.name, p.err)
	}
	p.cmd.Process.Kill() // if it has ended meanwhile, that is seen below
	<-p.exited
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		return fmt.Errorf("%s ended by itself: %w", p.name, p.err)
	}
	return nil
}

// stop is SIGTERM; the program ends with status 0.
func (p *process) stop(limit time.Duration) error {
	if !p.running() {
		return fmt.Errorf("%s ended by itself: %w", p.name, p.err)
	}
	p.cmd.Process.Signal(syscall.SIGTERM) // as above
	select {
	case <-p.exited:
	case <-time.After(limit):
		return errors.Join(fmt.Errorf("%s did not end within %v of SIGTERM", p.name, limit), p.kill())
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w", p.name, p.err)
	}
	return nil
}

// tail keeps the last lines of a log, and a line that says that something panicked.
type tail struct {
	mu       sync.Mutex
	lines    []string // guarded by mu, until the process has ended
	panicked string
}

const tailLines = 2000

func (t *tail) add(line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if strings.Contains(line, "panic serving") {
		t.panicked = line
	}
	if t.lines = append(t.lines, line); len(t.lines) > 2*tailLines {
		t.lines = append(t.lines[:0:0], t.lines[tailLines:]...)
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.lines, "\n")
}
