//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"
)

const (
	startTimeout = time.Minute
	stopTimeout  = 20 * time.Second
	poll         = 50 * time.Millisecond
)

// stopping has what must be stopped, in the order in which it was started.
type stopping struct{ all []func() error }

func (s *stopping) add(stop func() error) { s.all = append(s.all, stop) }

// stop stops the last one first.
func (s *stopping) stop() error {
	var failed []error
	for _, stop := range slices.Backward(s.all) {
		failed = append(failed, stop())
	}
	return errors.Join(failed...)
}

// child is a program of others.
type child struct {
	name, path string
	args, env  []string
	ports      []int // where it listens once it is ready
}

// start starts the program, waits until it listens, and adds what stops it.
func (c child) start(ctx context.Context, s *stopping) error {
	var log bytes.Buffer // read only when the process has ended
	cmd := exec.Command(c.path, c.args...)
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", c.name, err)
	}
	exited := make(chan struct{})
	go func() { // ends with the process
		cmd.Wait()
		close(exited)
	}()
	stop := func() error {
		cmd.Process.Signal(syscall.SIGTERM) // one that has ended needs none
		select {
		case <-exited:
			return nil
		case <-time.After(stopTimeout):
			cmd.Process.Kill()
			<-exited
			return fmt.Errorf("%s did not stop within %v", c.name, stopTimeout)
		}
	}
	err := until(ctx, func() (bool, error) {
		select {
		case <-exited:
			return false, errors.New("it has ended")
		default:
		}
		for _, port := range c.ports {
			conn, err := net.Dial("tcp", loopback(port))
			if err != nil {
				return false, nil
			}
			conn.Close()
		}
		return true, nil
	})
	if err != nil {
		err = errors.Join(err, stop())
		return fmt.Errorf("%s does not start: %w\n%s", c.name, err, log.Bytes())
	}
	s.add(stop)
	return nil
}

// until waits until done says so, for at most startTimeout.
func until(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(poll):
		}
	}
}

// herdSees waits until a herd router knows n nodes that are online.
func herdSees(ctx context.Context, url string, n int) error {
	err := until(ctx, func() (bool, error) {
		res, err := http.Get(url + "/fleet/status")
		if err != nil {
			return false, err
		}
		defer res.Body.Close()
		var status struct{ Nodes []struct{ Status string } }
		if err := json.NewDecoder(res.Body).Decode(&status); err != nil {
			return false, err
		}
		online := 0
		for _, node := range status.Nodes {
			if node.Status == "online" {
				online++
			}
		}
		return online == n, nil
	})
	if err != nil {
		return fmt.Errorf("herd does not see all %d nodes: %w", n, err)
	}
	return nil
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// freePorts returns ports on which nothing listens. Within this namespace nobody else takes them.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close() // when all are found, so that they differ
		ports = append(ports, ln.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
