//go:build linux

// Package netns is a network of its own for tests: a Lab has hosts, which are network namespaces
// with an address each, joined by a bridge that leads nowhere else. Any two hosts can be cut off
// from each other, as a broken cable between them would: their packets vanish, and no connection
// learns of it. The lab serves names by DNS.
//
// Nothing of a lab has a name in the system, so nothing stays when its process ends, however that
// ends: namespaces and links go with it, and processes that were started in them are killed.
//
// Making namespaces needs root, or else user namespaces that anyone may make; see Test.
package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The first of these addresses are the names' server's and the first host's.
var (
	network  = netip.MustParsePrefix("10.77.0.0/16")
	dnsAddr  = netip.MustParseAddr("10.77.0.1")
	nowhere  = net.HardwareAddr{0x02, 0xff, 0xff, 0xff, 0xff, 0xff} // nobody's
	maxHosts = 1000
)

const (
	bridge   = "bridge"
	card     = "eth0" // each host's
	nameHost = "names"
)

// Lab is a network. Its methods are safe for concurrent use.
type Lab struct {
	wire  *space // has the bridge
	names *names

	mu    sync.Mutex
	hosts map[string]*Host // guarded by mu
}

// New makes an empty network. The error says what is missing if this process may not do that.
func New() (*Lab, error) {
	wire, err := newSpace("")
	if err != nil {
		return nil, err
	}
	l := &Lab{wire: wire, hosts: map[string]*Host{}}
	err = wire.handle.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}})
	if err == nil {
		err = wire.up(bridge)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making a bridge: %w", err), l.Close())
	}
	host, err := l.Host(nameHost)
	if err == nil {
		l.names, err = serveNames(host)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close ends what runs in the lab, and removes it. Connections that this process has there stay
// until they are closed, but carry nothing any more.
func (l *Lab) Close() error {
	if l.names != nil {
		l.names.close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, h := range l.hosts {
		// A link is removed with its peer. Sockets may keep a namespace for a while, without it.
		errs = append(errs, h.space.remove(card))
		h.space.close() // kills what was started in it
	}
	l.hosts = nil
	l.wire.close()
	return errors.Join(errs...)
}

// Host returns the host of this name, and makes it at first. Other hosts find its address by this
// name.
func (l *Lab) Host(name string) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.hosts[name]; h != nil {
		return h, nil
	}
	n := len(l.hosts) + 1
	if n > maxHosts {
		return nil, fmt.Errorf("making host %s: a lab has at most %d hosts", name, maxHosts)
	}
	h := &Host{Name: name, lab: l, mac: net.HardwareAddr{0x02, 0, 0, 0, byte(n >> 8), byte(n)}}
	h.Addr = dnsAddr
	for range n - 1 {
		h.Addr = h.Addr.Next()
	}
	var err error
	if h.space, err = newSpace(fmt.Sprintf("nameserver %v\noptions timeout:1 attempts:2\n", dnsAddr)); err != nil {
		return nil, err
	}
	if err := h.plug(fmt.Sprintf("h%d", n)); err != nil {
		h.space.close()
		return nil, fmt.Errorf("making host %s: %w", name, err)
	}
	l.hosts[name] = h
	if l.names != nil {
		l.SetName(name, h.Addr)
	}
	return h, nil
}

// Cut makes all packets between two hosts vanish, in both directions, until Heal. Connections stay,
// and time out as their programs see fit.
func (l *Lab) Cut(a, b *Host) error {
	return errors.Join(a.neighbour(b, nowhere), b.neighbour(a, nowhere))
}

// Heal ends a Cut.
func (l *Lab) Heal(a, b *Host) error {
	return errors.Join(a.neighbour(b, b.mac), b.neighbour(a, a.mac))
}

// Host is a network namespace with an address, and a view of the file system in which the lab
// serves names.
type Host struct {
	Name string
	Addr netip.Addr

	lab   *Lab
	space *space
	mac   net.HardwareAddr
}

// plug connects a new host to the bridge by a link whose other end has this name.
func (h *Host) plug(far string) error {
	wire := h.lab.wire
	master, err := wire.handle.LinkByName(bridge)
	if err != nil {
		return err
	}
	err = wire.handle.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: far, MasterIndex: master.Attrs().Index},
		PeerName:  card, PeerHardwareAddr: h.mac, PeerNamespace: netlink.NsFd(int(h.space.net.Fd())),
	})
	if err != nil {
		return fmt.Errorf("adding a link: %w", err)
	}
	link, err := h.space.handle.LinkByName(card)
	if err != nil {
		return err
	}
	ones := network.Bits()
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: h.Addr.AsSlice(), Mask: net.CIDRMask(ones, 32)}}
	if err := h.space.handle.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("adding an address: %w", err)
	}
	return errors.Join(wire.up(far), h.space.up("lo"), h.space.up(card))
}

// neighbour sets where packets to another host go.
func (h *Host) neighbour(to *Host, mac net.HardwareAddr) error {
	link, err := h.space.handle.LinkByName(card)
	if err == nil {
		err = h.space.handle.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
			IP: to.Addr.AsSlice(), HardwareAddr: mac,
		})
	}
	if err != nil {
		return fmt.Errorf("%s: setting the way to %s: %w", h.Name, to.Name, err)
	}
	return nil
}

// Do calls f on the host: sockets that f makes and processes that it starts are there, but not what
// other goroutines do for it. A host runs one function at a time.
func (h *Host) Do(f func()) { h.space.do(f) }

// Command returns a command, to be started with Start. When ctx or this process ends, it is killed.
func (h *Host) Command(ctx context.Context, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Start starts a command on the host.
func (h *Host) Start(cmd *exec.Cmd) (err error) {
	h.Do(func() { err = cmd.Start() })
	return err
}

// Run runs a command on the host to its end, and returns what it wrote.
func (h *Host) Run(ctx context.Context, path string, args ...string) (string, error) {
	out := new(lockedBuffer)
	cmd := h.Command(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := h.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// Listen listens on the host, for this process.
func (h *Host) Listen(network, addr string) (ln net.Listener, err error) {
	h.Do(func() { ln, err = net.Listen(network, addr) })
	return ln, err
}

// DialContext connects from the host, for this process, to an address or to a name that the lab
// serves.
func (h *Host) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	to, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(to); err != nil {
		list := h.lab.names.lookup(to)
		if len(list) == 0 {
			return nil, &net.DNSError{Err: "no such host", Name: to, IsNotFound: true}
		}
		to = list[0].String()
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends with the attempt, and its thread with it, which cannot be used for anything else
		if err := h.space.enter(); err != nil {
			done <- result{err: err}
			return
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, net.JoinHostPort(to, port))
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// Transport returns a transport of requests from the host. It uses no proxy and reaches nothing
// outside of the lab.
func (h *Host) Transport() *http.Transport {
	return &http.Transport{DialContext: h.DialContext, MaxIdleConnsPerHost: 100}
}

// lockedBuffer collects what a command writes.
type lockedBuffer struct {
	mu  sync.Mutex
	all []byte
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, p...)
	return len(p), nil
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.all)
}
