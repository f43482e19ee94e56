package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
)

const domain = "default.svc.cluster.local"

// cluster runs the pods of a StatefulSet.
type cluster struct {
	t       *testing.T
	ctx     context.Context // ends with the test
	lab     *netns.Lab
	dir     string
	dns     netip.Addr
	users   bool // containers can run as other users
	images  map[string]image
	secrets map[string]map[string]string
	manifests

	node, client *netns.Host

	mu   sync.Mutex
	pods map[string]*pod // by name; guarded by mu
}

// pod is a pod that was created and is not gone yet.
type pod struct {
	cluster *cluster
	name    string
	host    *netns.Host
	dir     string
	started []*running // in the order in which they were started
	mains   int        // how many of them, the last ones, are the pod's containers
	stop    context.CancelFunc
	probing sync.WaitGroup

	mu    sync.Mutex
	ready bool // guarded by mu
}

// create makes the pod of a number, with volumes that it had before, and returns when its containers
// run. Each time it has another address.
func (c *cluster) create(number, incarnation int) (*pod, error) {
	name := c.set.Metadata.Name + "-" + strconv.Itoa(number)
	unique := fmt.Sprintf("%s.%d", name, incarnation)
	host, err := c.lab.Host(unique)
	if err != nil {
		return nil, err
	}
	p := &pod{cluster: c, name: name, host: host, dir: filepath.Join(c.dir, "pods", unique)}
	host.Do(func() {
		// As allowPrivilegeEscalation: false says; and the pod's name is its host's.
		err = errors.Join(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), syscall.Unshare(syscall.CLONE_NEWUTS), syscall.Sethostname([]byte(name)))
	})
	if err != nil {
		return nil, err
	}
	volumes, err := p.volumes()
	if err != nil {
		return nil, err
	}
	if err := p.run(volumes); err != nil {
		return nil, errors.Join(err, p.kill())
	}
	// Peers find a pod before it is ready, but the first one looks for a name that does not exist yet.
	c.change(func() { c.pods[name] = p })
	return p, nil
}

func (p *pod) volumes() (map[string]string, error) {
	spec := p.cluster.set.Spec
	group, list, errs := int(spec.Template.Spec.SecurityContext.FSGroup), map[string]string{}, []error(nil)
	if !p.cluster.users {
		group = os.Getgid()
	}
	add := func(name, path string) {
		place, err := volume(path, group)
		list[name], errs = place, append(errs, err)
	}
	for _, claim := range spec.VolumeClaimTemplates {
		add(claim.Metadata.Name, p.cluster.claim(claim.Metadata.Name, p.name))
	}
	for _, v := range spec.Template.Spec.Volumes {
		add(v.Name, filepath.Join(p.dir, "volumes", v.Name))
		if v.Secret == nil {
			continue
		}
		for name, text := range p.cluster.secrets[v.Secret.SecretName] {
			file := filepath.Join(list[v.Name], name)
			errs = append(errs, os.WriteFile(file, []byte(text), os.FileMode(v.Secret.DefaultMode)), os.Chown(file, -1, group))
		}
	}
	return list, errors.Join(errs...)
}

// claim returns where a pod's volume is that outlives it.
func (c *cluster) claim(volume, pod string) string {
	return filepath.Join(c.dir, "claims", volume+"-"+pod)
}

// run starts the containers in their order: those that prepare have to end well, and those that
// always run are started before the pod's own.
func (p *pod) run(volumes map[string]string) error {
	spec := p.cluster.set.Spec.Template.Spec
	for i, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		repository, _, _ := strings.Cut(c.Image, ":")
		im, ok := p.cluster.images[repository]
		if !ok {
			return fmt.Errorf("there is no image %s", c.Image)
		}
		root, err := p.root(c, im, volumes)
		if err != nil {
			return fmt.Errorf("pod %s: container %s: %w", p.name, c.Name, err)
		}
		r, err := p.begin(c, root, im)
		if err != nil {
			return err
		}
		main := i >= len(spec.InitContainers)
		if !main && c.RestartPolicy != "Always" {
			if <-r.done; r.err != nil {
				return fmt.Errorf("pod %s: %s ended with %w:\n%s", p.name, c.Name, r.err, r.log.end())
			}
			continue
		}
		p.started = append(p.started, r)
		if main {
			p.mains++
		}
	}
	ctx, stop := context.WithCancel(p.cluster.ctx)
	p.stop = stop
	for _, c := range spec.Containers {
		p.probing.Go(func() { p.probe(ctx, c.ReadinessProbe, p.setReady) })
		p.probing.Go(func() {
			p.probe(ctx, c.LivenessProbe, func(well bool) {
				if !well {
					p.cluster.t.Errorf("pod %s: Kubernetes would restart %s, which does not answer:\n%s", p.name, c.Name, p.logs())
				}
			})
		})
	}
	return nil
}

// probe asks what a probe asks, until ctx ends, and tells whether it succeeds, when that changes.
func (p *pod) probe(ctx context.Context, pr *probe, tell func(bool)) {
	transport := p.cluster.node.Transport()
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Duration(pr.TimeoutSeconds) * time.Second}
	url := "http://" + p.address(pr.HTTPGet.Port) + pr.HTTPGet.Path
	ticks := time.NewTicker(time.Duration(pr.PeriodSeconds) * time.Second)
	defer ticks.Stop()
	well, failed := false, 0
	for {
		status, _, err := get(ctx, client, url)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && status == http.StatusOK:
			if failed = 0; !well {
				well = true
				tell(true)
			}
		default:
			if failed++; well && failed >= pr.FailureThreshold {
				well = false
				tell(false)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
		}
	}
}

// address returns where a port of the pod is.
func (p *pod) address(port string) string {
	return net.JoinHostPort(p.host.Addr.String(), strconv.Itoa(p.cluster.set.Spec.Template.Spec.port(port)))
}

func (p *pod) setReady(ready bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = ready
}

func (p *pod) isReady() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ready
}

// delete stops a pod as Kubernetes does: its containers at first, then those that run beside them,
// and all of them after the time that the pod has. It returns how long that took.
//
// The pod gets requests until its probe has failed: that is a load balancer that learns of a pod's
// end as late as possible.
func (p *pod) delete() (time.Duration, error) {
	grace := time.Duration(p.cluster.set.Spec.Template.Spec.TerminationGracePeriodSeconds) * time.Second
	began := time.Now()
	over, cancel := context.WithTimeout(p.cluster.ctx, grace)
	defer cancel()
	var errs []error
	end := func(r *running) {
		if r.ended() {
			errs = append(errs, fmt.Errorf("pod %s: %s ended before it was told to (%v):\n%s", p.name, r.name, r.err, r.log.end()))
			return
		}
		r.cmd.Process.Signal(syscall.SIGTERM) // an error means that it has ended just now
		select {
		case <-r.done:
			if r.err != nil {
				errs = append(errs, fmt.Errorf("pod %s: %s ended with %w:\n%s", p.name, r.name, r.err, r.log.end()))
			}
		case <-over.Done():
			errs = append(errs, fmt.Errorf("pod %s: %s has not ended %v after it was told to:\n%s", p.name, r.name, grace, r.log.end()))
		}
	}
	var mains sync.WaitGroup
	for _, r := range p.started[len(p.started)-p.mains:] {
		mains.Go(func() { end(r) })
	}
	mains.Wait()
	for _, r := range slices.Backward(p.started[:len(p.started)-p.mains]) {
		end(r)
	}
	return time.Since(began), errors.Join(append(errs, p.kill())...)
}

// kill ends what is left of a pod.
func (p *pod) kill() error {
	if p.stop != nil {
		p.stop()
	}
	p.probing.Wait()
	p.setReady(false)
	for _, r := range p.started {
		r.cmd.Process.Kill()
		<-r.done
	}
	p.cluster.change(func() {
		if p.cluster.pods[p.name] == p {
			delete(p.cluster.pods, p.name)
		}
	})
	return nil
}

func (p *pod) logs() string {
	var b strings.Builder
	for _, r := range p.started {
		fmt.Fprintf(&b, "%s of %s:\n%s\n", r.name, p.name, r.log.end())
	}
	return b.String()
}

// change changes which pods there are, and then the names of headless Services.
func (c *cluster) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	labels := c.set.Spec.Template.Metadata.Labels
	for _, s := range c.services {
		if s.Spec.ClusterIP != "None" || !has(labels, s.Spec.Selector) {
			continue
		}
		if !s.Spec.PublishNotReadyAddresses {
			c.t.Fatalf("Service %s leads to pods that are ready, which this test does not know", s.Metadata.Name)
		}
		var addrs []netip.Addr
		for _, name := range slices.Sorted(maps.Keys(c.pods)) {
			addrs = append(addrs, c.pods[name].host.Addr)
		}
		c.lab.SetName(s.Metadata.Name+"."+domain, addrs...)
	}
}

func has(labels, wanted map[string]string) bool {
	for name, value := range wanted {
		if labels[name] != value {
			return false
		}
	}
	return true
}

// readyPods returns the pods that a Service for clients leads to.
func (c *cluster) readyPods() []*pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []*pod
	for _, name := range slices.Sorted(maps.Keys(c.pods)) {
		if c.pods[name].isReady() {
			list = append(list, c.pods[name])
		}
	}
	return list
}

// await waits until as many pods are ready as there should be.
func (c *cluster) await(ctx context.Context) error {
	for len(c.readyPods()) != c.set.Spec.Replicas {
		select {
		case <-ctx.Done():
			var logs strings.Builder
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, p := range c.pods {
				logs.WriteString(p.logs())
			}
			return fmt.Errorf("the pods are not ready: %w\n%s", ctx.Err(), logs.String())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// transport returns a transport of requests to a Service: each connection goes to one of its pods
// that are ready, as kube-proxy chooses it.
func (c *cluster) transport() *http.Transport {
	t := c.client.Transport()
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		for _, s := range c.services {
			for _, p := range s.Spec.Ports {
				if s.Metadata.Name != host || strconv.Itoa(p.Port) != port {
					continue
				}
				ready := c.readyPods()
				if len(ready) == 0 {
					return nil, fmt.Errorf("no pod of %s is ready", host)
				}
				addr = ready[rand.IntN(len(ready))].address(p.TargetPort)
			}
		}
		return c.client.DialContext(ctx, network, addr)
	}
	return t
}

// get asks for a page.
func get(ctx context.Context, client *http.Client, url string) (status int, text string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	return res.StatusCode, string(all), err
}
