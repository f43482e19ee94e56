//go:build linux

package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace and a mount namespace, with a thread that lives in them.
type space struct {
	net    *os.File        // the network namespace
	handle *netlink.Handle // its links, addresses and neighbours

	run   chan func()
	ended chan struct{} // closed when the thread has ended
}

// newSpace makes namespaces. If resolv is not empty, programs there read it in /etc/resolv.conf.
func newSpace(resolv string) (*space, error) {
	s := &space{run: make(chan func()), ended: make(chan struct{})}
	made := make(chan error, 1)
	go s.live(resolv, made)
	if err := <-made; err != nil {
		<-s.ended
		if s.net != nil {
			s.net.Close()
		}
		return nil, fmt.Errorf("making a network namespace: %w", err)
	}
	return s, nil
}

// live is the thread of the space. It is never unlocked, so it ends with this function. The
// processes that were started on it get their signal then (PR_SET_PDEATHSIG means the thread).
func (s *space) live(resolv string, made chan<- error) {
	defer close(s.ended)
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	if err == nil {
		s.net, err = os.Open("/proc/thread-self/ns/net")
	}
	if err == nil {
		s.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	if err == nil && resolv != "" {
		err = setResolver(resolv)
	}
	if made <- err; err != nil {
		return
	}
	for f := range s.run {
		f()
	}
}

// setResolver replaces /etc/resolv.conf for this thread and what it starts.
func setResolver(text string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping mounts from others: %w", err)
	}
	f, err := os.CreateTemp("", "netns-resolv-")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name()) // the mount keeps the file
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Chmod(0o644)); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("replacing /etc/resolv.conf: %w", err)
	}
	return nil
}

// do calls f on the space's thread.
func (s *space) do(f func()) {
	done := make(chan struct{})
	s.run <- func() {
		defer close(done)
		f()
	}
	<-done
}

// enter moves the calling goroutine into the network namespace, for the rest of its life.
func (s *space) enter() error {
	runtime.LockOSThread()
	return os.NewSyscallError("setns", unix.Setns(int(s.net.Fd()), unix.CLONE_NEWNET))
}

func (s *space) up(name string) error {
	link, err := s.handle.LinkByName(name)
	if err == nil {
		err = s.handle.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("setting up link %s: %w", name, err)
	}
	return nil
}

func (s *space) remove(name string) error {
	link, err := s.handle.LinkByName(name)
	if err == nil {
		err = s.handle.LinkDel(link)
	}
	if err != nil && !errors.Is(err, syscall.ENODEV) {
		return fmt.Errorf("removing link %s: %w", name, err)
	}
	return nil
}

// close ends the thread.
func (s *space) close() {
	close(s.run)
	<-s.ended
	s.handle.Close()
	s.net.Close()
}
