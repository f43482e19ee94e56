package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

type doctorCmd struct {
	Proxy    string        `env:"OLLAMA_CACHEPROXY_PROXY,OLLAMA_CACHEPROXY_LISTEN" default:"127.0.0.1:11435" placeholder:"ADDR" help:"Where the proxy listens. Default: 127.0.0.1:11435."`
	Upstream []string      `env:"-" placeholder:"[NAME=]ADDR" help:"Ask this Ollama itself what it has loaded, and not through the proxy. Repeatable. Default: all that the proxy has, through it."`
	APIKey   string        `name:"api-key" placeholder:"KEY" help:"The key that the proxy asks for."`
	CA       string        `name:"ca" type:"path" default:"" placeholder:"FILE" help:"Believe certificates of https servers that are issued by one of these authorities, too: PEM."`
	Last     time.Duration `env:"-" placeholder:"TIME" help:"Look at the requests of this last time alone, such as 1h. Default: at all that the proxy remembers, the last 10,000 since it was started."`
	JSON     bool          `name:"json" env:"-" help:"Write the findings to stdout as JSON."`
}

const (
	doctorTimeout = 15 * time.Second // for the whole examination
	doctorMost    = 64 << 20         // bytes of one answer
	statusFound   = 1
	statusUsage   = 2
	statusUnasked = 3
)

func (d *doctorCmd) Help() string {
	return `Looks at what a running proxy remembers of its last requests, and at what its servers have loaded, and says what is wrong: with figures, and with the setting that changes it, worst first (docs/doctor.md). It changes nothing.

Examples:

  ollama-cacheproxy doctor
      what is wrong since the proxy was started
  ollama-cacheproxy doctor --last 1h
      … in the last hour, such as after a change
  ollama-cacheproxy doctor --proxy gpu-box:11435 --api-key "$KEY" --json
      a proxy elsewhere, for a program

Exit status: 0 nothing is wrong, 1 something is, 2 the arguments make no sense, 3 the proxy could not be asked.`
}

func (d *doctorCmd) Run(ctx context.Context, c *console) error {
	u, err := upstream.ParseAddr(d.Proxy, defaultPort)
	if err != nil {
		return exitError{statusUsage, fmt.Errorf("--proxy: %w", err)}
	}
	if d.Last < 0 {
		return exitError{statusUsage, fmt.Errorf("--last %v: want a time that is not negative", d.Last)}
	}
	direct := map[string]*url.URL{}
	for _, text := range d.Upstream {
		name, addr, err := upstream.ParseNamed(text, "11434")
		if err != nil {
			return exitError{statusUsage, fmt.Errorf("--upstream: %w", err)}
		}
		if name == "" {
			name = addr.String()
		}
		direct[name] = addr
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	transport, err := newTransport(d.CA)
	if err != nil {
		return exitError{statusUsage, err}
	}
	defer transport.CloseIdleConnections()
	ask := &asking{base: u, key: d.APIKey, flag: "--proxy ", transport: transport}
	facts, err := ask.facts(ctx, d.Last)
	if err != nil {
		return exitError{statusUnasked, err}
	}
	if facts.Loaded, err = ask.servers(ctx, facts.Upstreams, direct); err != nil {
		return exitError{statusUsage, err}
	}
	facts.Proxy = u.String()
	report := doctor.NewReport(facts)
	if d.JSON {
		encoder := json.NewEncoder(c.stdout)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		err = encoder.Encode(report)
	} else {
		err = report.Write(c.stdout)
	}
	if err == nil && len(report.Findings) > 0 {
		err = silentError{statusFound}
	}
	return err
}

// silentError ends the program with a status but without a message: everything has been printed.
type silentError struct{ code int }

func (e silentError) Error() string { return "exit status " + strconv.Itoa(e.code) }

// asking sends requests to a proxy and, through it, to its servers.
type asking struct {
	base      *url.URL
	key       string
	flag      string // what comes before the address on the command line: "--proxy "
	transport http.RoundTripper
}

// RoundTrip adds the key to a request and sends it.
func (a *asking) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.key != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+a.key)
	}
	return a.transport.RoundTrip(r)
}

// through sends requests to one of the proxy's servers.
type through struct {
	*asking
	name string
}

func (t through) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Cacheproxy-Upstream", t.name)
	return t.asking.RoundTrip(r)
}

// facts gathers the facts from the proxy's pages.
func (a *asking) facts(ctx context.Context, last time.Duration) (f doctor.Facts, err error) {
	query := url.Values{}
	if last > 0 {
		query.Set("last", last.String())
	}
	if err := a.page(ctx, http.MethodGet, "facts", query, &f); err != nil {
		return f, err
	}
	var recent struct {
		Requests []doctor.Entry `json:"requests"`
	}
	if err := a.page(ctx, http.MethodGet, "requests", url.Values{"n": {strconv.Itoa(rememberRequests)}}, &recent); err != nil {
		return f, err
	}
	f.Changed = doctor.ChangedOf(recent.Requests, f.Since)
	return f, nil
}

// page reads one of the proxy's own pages, or with another method changes what it is about.
func (a *asking) page(ctx context.Context, method, name string, query url.Values, into any) error {
	u := a.base.JoinPath("/_cacheproxy/", name)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return err
	}
	res, err := a.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("no proxy answers at %s: %w%s", a.base, err, a.nextStep(err))
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, doctorMost))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", u, err)
	}
	switch {
	case res.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("the proxy at %s asks for an API key: give it with --api-key, or in OLLAMA_CACHEPROXY_API_KEY", a.base)
	case res.StatusCode == http.StatusNotFound:
		return a.whoIsThere(ctx)
	// These are net/http's own words.
	case res.StatusCode == http.StatusBadRequest && strings.Contains(string(text), "HTTPS server"):
		return fmt.Errorf("what listens at %s wants https: give %shttps://%s", a.base, a.flag, a.base.Host)
	case res.StatusCode != http.StatusOK:
		return fmt.Errorf("%s answers %s: %s", u, res.Status, strings.TrimSpace(string(text[:min(len(text), 500)])))
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("the page %s cannot be read (is the proxy of another version than this program?): %w", u, err)
	}
	return nil
}

// nextStep says what to do if nothing listens, or if its certificate is not trusted.
func (a *asking) nextStep(err error) string {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "\n  If its certificate is your own, say who has issued it with --ca FILE."
	}
	hint := "\n  Start it with: ollama-cacheproxy\n  or say where it is: " + a.flag + "ADDR."
	if inContainer() && upstream.Here(a.base) {
		hint += "\n  This is a container, and its 127.0.0.1 is not the host's: try " + a.flag + "http://host.docker.internal:" + a.base.Port()
	}
	return hint
}

// whoIsThere says who answers at the address, if it is not a proxy with this page.
func (a *asking) whoIsThere(ctx context.Context) error {
	probe := upstream.NewServer("", a.base, a, slog.New(slog.DiscardHandler))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base.JoinPath("/_cacheproxy/health").String(), nil)
	if err != nil {
		return err
	}
	if res, err := a.RoundTrip(req); err == nil {
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return fmt.Errorf("the proxy at %s is older than this program and has no page for it: restart it with this version", a.base)
		}
	}
	if st := probe.Poll(ctx); st.Up {
		return fmt.Errorf("at %s listens Ollama %s itself, and no proxy.\n"+
			"  If OLLAMA_HOST is exported for the whole machine, 'ollama serve' takes the proxy's port. Start it with a port of its own,\n"+
			"  OLLAMA_HOST=127.0.0.1:11434 ollama serve\n  and then the proxy, or say where that is: %sADDR", a.base, st.Version, a.flag)
	}
	return fmt.Errorf("what listens at %s is neither an ollama-cacheproxy nor an Ollama: say where the proxy is: %sADDR", a.base, a.flag)
}

// servers asks the proxy's servers which models are loaded: those in direct at that address, the
// others through the proxy.
func (a *asking) servers(ctx context.Context, list []doctor.Upstream, direct map[string]*url.URL) (map[string][]doctor.Resident, error) {
	found := map[string][]doctor.Resident{}
	var names []string
	var mu sync.Mutex
	var wg sync.WaitGroup
	used := 0
	for _, u := range list {
		names = append(names, u.Name+"="+u.URL)
		var transport http.RoundTripper = through{a, u.Name}
		at := a.base
		for _, key := range []string{u.Name, u.URL} {
			if addr, ok := direct[key]; ok {
				at, transport = addr, a.transport
				used++
				break
			}
		}
		wg.Go(func() {
			server := upstream.NewServer(u.Name, at, transport, slog.New(slog.DiscardHandler))
			loaded := loadedOn(server.Poll(ctx))
			mu.Lock()
			defer mu.Unlock()
			found[u.Name] = loaded
		})
	}
	wg.Wait()
	if used < len(direct) {
		return nil, errors.New("--upstream: the proxy has no such server; it has " + strings.Join(names, ", "))
	}
	return found, nil
}

func loadedOn(st upstream.State) (list []doctor.Resident) {
	for _, l := range st.Loaded {
		list = append(list, doctor.Resident{
			Name: upstream.DisplayName(upstream.ModelKey(l.Name)), Size: l.Size, SizeVRAM: l.SizeVRAM,
			ContextLength: l.ContextLength,
		})
	}
	return list
}
