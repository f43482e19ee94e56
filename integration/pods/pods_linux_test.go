package pods

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

var all = flag.Bool("all", false, "restart all pods, one after another, as kubectl rollout restart does")

const (
	tiny, costly = "gen-llama-tiny", "gen-llama-costly"
	serviceURL   = "http://ollama-cacheproxy:11435"
)

// TestPods runs the manifests with a real Ollama in each of the three pods. Any pod's address takes
// a request, and passes it on to where its prefix is; while one pod after another is replaced, no
// request of several clients fails; and a pod has its models and contexts again afterwards. It needs
// root, and is skipped without, unless netns.Required is set.
func TestPods(t *testing.T) {
	const advice = "pods have users, roots and addresses of their own: run this test as root"
	if os.Getuid() != 0 && os.Getenv(netns.Required) == "" {
		t.Skip(advice)
	}
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) }) // after the lab's end
	netns.Test(t, testPods, func(t *testing.T) {
		t.Skip(advice)
	})
}

func testPods(t *testing.T, lab *netns.Lab) {
	c := newCluster(t, lab)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var starting sync.WaitGroup
	for n := range c.set.Spec.Replicas {
		starting.Go(func() {
			if _, err := c.create(n, 0); err != nil {
				t.Error(err)
			}
		})
	}
	starting.Wait()
	if t.Failed() {
		return
	}
	if err := c.await(ctx); err != nil {
		t.Fatal(err)
	}

	c.joined(ctx)
	c.oneFleet(ctx)
	c.linked(ctx)
	server := c.storesContext(ctx)
	// Whichever server has the context is the one that is replaced.
	first, err := strconv.Atoi(server[strings.LastIndex(server, "-")+1:])
	if err != nil {
		t.Fatalf("the server is called %q", server)
	}
	restarts := []int{first}
	for n := 0; *all && n < c.set.Spec.Replicas; n++ {
		if n != first {
			restarts = append(restarts, n)
		}
	}
	c.restarts(ctx, restarts)
	c.joined(ctx)
	c.attaches(ctx, server)
}

// newCluster prepares images, volumes with models, and secrets.
func newCluster(t *testing.T, lab *netns.Lab) *cluster {
	t.Helper()
	m, err := readManifests("../../deploy/kubernetes/ollama-cacheproxy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{
		t: t, ctx: t.Context(), lab: lab, dir: t.TempDir(), manifests: m, pods: map[string]*pod{},
		secrets: map[string]map[string]string{"ollama-cacheproxy-peers": {"secret": strings.Repeat("peer", 12)}},
	}
	// A process in a user namespace may be able to be nobody else.
	users, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if c.users = strings.Contains(string(users), "4294967295"); !c.users {
		t.Log("in this user namespace all containers have the same user, so it is not tried that they are not root")
	}
	t.Cleanup(func() {
		c.mu.Lock()
		var left []*pod
		for _, p := range c.pods {
			left = append(left, p)
		}
		c.mu.Unlock()
		for _, p := range left {
			if t.Failed() {
				t.Log(p.logs())
			}
			p.kill()
		}
	})
	for name, host := range map[string]**netns.Host{"names": nil, "node": &c.node, "client": &c.client} {
		h, err := lab.Host(name)
		if err != nil {
			t.Fatal(err)
		}
		if host == nil {
			c.dns = h.Addr
		} else {
			*host = h
		}
	}
	c.images = map[string]image{"ollama-cacheproxy": proxyImage(t), "ollama/ollama": ollamaImage(t)}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	for n := range c.set.Spec.Replicas {
		models := c.claim("models", c.set.Metadata.Name+"-"+strconv.Itoa(n))
		for _, model := range []string{tiny, costly} {
			if err := cache.Install(t.Context(), model, models); err != nil {
				t.Fatal(err)
			}
		}
	}
	return c
}

// proxyImage is what the Dockerfile makes: the program, without anything that it could link to.
func proxyImage(t *testing.T) image {
	t.Helper()
	program := filepath.Join(t.TempDir(), "ollama-cacheproxy")
	t.Setenv("CGO_ENABLED", "0")
	if err := proxyprocess.Build(t.Context(), program, "-trimpath"); err != nil {
		t.Fatal(err)
	}
	return image{
		files: map[string]string{"ollama-cacheproxy": program}, entrypoint: []string{"/ollama-cacheproxy"},
		env: []string{"OLLAMA_CACHEPROXY_LISTEN=0.0.0.0:11435", "OLLAMA_CACHEPROXY_UPSTREAM=http://host.docker.internal:11434"},
	}
}

// ollamaImage has Ollama where its official image has it.
func ollamaImage(t *testing.T) image {
	t.Helper()
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := cache.Ollama(t.Context(), realollama.EraC)
	if err != nil {
		t.Fatal(err)
	}
	usr := filepath.Join(t.TempDir(), "usr")
	for _, err := range []error{
		copyFile(bin, filepath.Join(usr, "bin", "ollama")),
		os.CopyFS(filepath.Join(usr, "lib", "ollama"), os.DirFS(filepath.Join(filepath.Dir(bin), "..", "lib", "ollama"))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return image{
		usr: usr, entrypoint: []string{"/bin/ollama"},
		files: map[string]string{"etc/passwd": "/etc/passwd", "etc/ld.so.cache": "/etc/ld.so.cache"},
		env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "OLLAMA_HOST=0.0.0.0:11434",
			"OLLAMA_NO_CLOUD=1", "OMP_WAIT_POLICY=passive",
		},
	}
}

// joined waits until every proxy knows all others, which may have looked for a name of the first
// pods only, and what their servers have.
func (c *cluster) joined(ctx context.Context) {
	c.t.Helper()
	client := &http.Client{Transport: c.node.Transport()}
	defer client.CloseIdleConnections()
	for _, p := range c.readyPods() {
		for {
			_, text, err := get(ctx, client, "http://"+p.address("http")+"/_cacheproxy/fleet")
			var page struct {
				Peers     []struct{ Up bool }
				Upstreams []struct{ Models int }
			}
			if err == nil {
				err = json.Unmarshal([]byte(text), &page)
			}
			if err != nil {
				c.t.Fatalf("%s: %v in %s\n%s", p.name, err, text, p.logs())
			}
			up, full := 0, 0
			for _, other := range page.Peers {
				if other.Up {
					up++
				}
			}
			for _, server := range page.Upstreams {
				if server.Models > 0 {
					full++
				}
			}
			if up == c.set.Spec.Replicas-1 && full == c.set.Spec.Replicas {
				break
			}
			time.Sleep(50 * time.Millisecond) // until the next look; ctx bounds them
		}
	}
}

// oneFleet: any pod takes requests for all servers, and a prompt goes to one server, at whichever pod
// it enters.
func (c *cluster) oneFleet(ctx context.Context) {
	c.t.Helper()
	transport := c.client.Transport()
	defer transport.CloseIdleConnections()
	anywhere := map[string]bool{}
	for _, p := range c.readyPods() {
		url := "http://" + p.address("http")
		for _, other := range c.readyPods() {
			client := &http.Client{Transport: to{transport, other.name}}
			a, err := chat.Send(ctx, client, url, short("of the server "+other.name))
			if err != nil || a.Server != other.name {
				c.t.Fatalf("%s was asked for an answer of %s: it is of %s, err %v\n%s", p.name, other.name, a.Server, err, p.logs())
			}
		}
		a, err := chat.Send(ctx, &http.Client{Transport: transport}, url, short("of any server"))
		if err != nil {
			c.t.Fatalf("%s: %v\n%s", p.name, err, p.logs())
		}
		anywhere[a.Server] = true
	}
	if len(anywhere) != 1 {
		c.t.Errorf("one prompt was evaluated by %v, depending on where it entered", anywhere)
	}
}

// short is a request with a prompt of a few hundred tokens, which begins with a text.
func short(text string) chat.Request {
	return chat.Request{Model: tiny, Generate: 3, Messages: []chat.Message{chat.User(text + strings.Repeat(", and so on", 60))}}
}

// linked: each Ollama's engines are linked to the proxy, which does not complain that it cannot see
// what is in Ollama's image.
func (c *cluster) linked(ctx context.Context) {
	c.t.Helper()
	for _, p := range c.readyPods() {
		for _, r := range p.started {
			if log := r.log.String(); strings.Contains(log, "no context is stored") || strings.Contains(log, "stored contexts are off") {
				c.t.Errorf("%s: %s says that contexts are off:\n%s", p.name, r.name, log)
			}
		}
		for _, ct := range c.set.Spec.Template.Spec.InitContainers {
			if ct.Name != "ollama" {
				continue
			}
			r, err := p.begin(ct, filepath.Join(p.dir, "root-"+ct.Name), c.images["ollama/ollama"], "/linked/ollama-cacheproxy", "engine", "status", "/linked")
			if err != nil {
				c.t.Fatal(err)
			}
			if <-r.done; r.err != nil || !strings.Contains(r.log.end(), " slots: ") {
				c.t.Errorf("%s: engine status ends with %v:\n%s", p.name, r.err, r.log.end())
			}
		}
	}
}

// long is a prompt that takes a while to evaluate.
var long = chat.Request{Model: costly, Generate: 2, Messages: []chat.Message{
	chat.System(strings.Repeat("Whoever asks gets an answer, and whoever answers is asked again. ", 60)), chat.User("Why?"),
}}

// storesContext sends that prompt, and returns the server that has it now.
func (c *cluster) storesContext(ctx context.Context) (server string) {
	c.t.Helper()
	client := &http.Client{Transport: c.transport()}
	defer client.CloseIdleConnections()
	a, err := chat.Send(ctx, client, serviceURL, long)
	if err != nil {
		c.t.Fatal(err)
	}
	return a.Server
}

// to asks for an answer of one server.
type to struct {
	*http.Transport
	server string
}

func (t to) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(chat.HeaderServer, t.server)
	return t.Transport.RoundTrip(r)
}

// attaches: the server was replaced, but its context was not lost.
func (c *cluster) attaches(ctx context.Context, server string) {
	c.t.Helper()
	client := &http.Client{Transport: to{c.transport(), server}}
	defer client.CloseIdleConnections()
	a, err := chat.Send(ctx, client, serviceURL, long)
	if err != nil || a.Server != server {
		c.t.Fatalf("%s answers, err %v; want %s", a.Server, err, server)
	}
	for _, p := range c.readyPods() {
		if p.name != server {
			continue
		}
		_, text, err := get(ctx, client, "http://"+p.address("http")+"/metrics")
		if err != nil {
			c.t.Fatal(err)
		}
		if m := regexp.MustCompile(`(?m)^ollama_cacheproxy_contexts_attached_total (\d+)`).FindStringSubmatch(text); m == nil || m[1] == "0" {
			c.t.Errorf("%s: no context was attached:\n%s", server, p.logs())
		}
	}
}

// restarts replaces pods, one after another, while clients send requests to the Service.
func (c *cluster) restarts(ctx context.Context, numbers []int) {
	c.t.Helper()
	var (
		clients sync.WaitGroup
		sent    atomic.Int64
		enough  = make(chan struct{})
	)
	for n := range 6 {
		clients.Go(func() {
			transport := c.transport()
			// Half of the clients connect anew for each request.
			transport.DisableKeepAlives = n%2 == 0
			client := &http.Client{Transport: transport}
			defer client.CloseIdleConnections()
			for turn := 0; ; turn++ {
				select {
				case <-enough:
					return
				default:
				}
				text := fmt.Sprintf("client %d, subject %d: %s", n, turn/4, strings.Repeat("and so on ", 20))
				_, err := chat.Send(ctx, client, serviceURL, chat.Request{
					Model: tiny, Generate: 8, Stream: turn%2 == 0, Messages: []chat.Message{chat.User(text), chat.Assistant("yes"), chat.User(strconv.Itoa(turn))},
				})
				if err != nil {
					c.t.Errorf("client %d, request %d: %v", n, turn, err)
				}
				sent.Add(1)
			}
		})
	}
	for i, n := range numbers {
		before := sent.Load()
		name := c.set.Metadata.Name + "-" + strconv.Itoa(n)
		c.mu.Lock()
		p := c.pods[name]
		c.mu.Unlock()
		took, err := p.delete()
		if err != nil {
			c.t.Error(err)
		}
		c.t.Logf("%s ended after %.1f s; meanwhile %d requests", name, took.Seconds(), sent.Load()-before)
		if _, err := c.create(n, i+1); err != nil {
			c.t.Error(err)
			break
		}
		if err := c.await(ctx); err != nil {
			c.t.Error(err)
			break
		}
	}
	close(enough)
	clients.Wait()
	c.t.Logf("%d requests in all", sent.Load())
	if sent.Load() < 20 {
		c.t.Errorf("%d requests were sent: too few to say anything", sent.Load())
	}
}
