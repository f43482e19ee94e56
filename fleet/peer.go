package fleet

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// peer is an address at which another proxy listens for its peers.
type peer struct {
	fleet  *Fleet
	addr   string
	forget func() // ends run

	// Guarded by Fleet.mu.
	listed  bool                         // a Source says that a peer is at the address
	report  *Report                      // the last one; nil: away
	last    *Report                      // … also when it is away; nil: it was never there
	changed bool                         // the report differs from what was last concluded from
	gone    chan struct{}                // closed when it goes away; nil: away
	err     error                        // why it is away; nil before the first try
	version string                       // Config.Version, as it was last told; "": not known
	told    bool                         // the log says that it is away …
	foreign bool                         // … and that it does not take this proxy for a peer, or the reverse
	since   time.Time                    // of the present state
	vain    map[prefix.Options]time.Time // when it was last asked for requests with these, and gave none
	mute    bool                         // it did not answer when it was asked for requests
}

func newPeer(f *Fleet, addr string) *peer {
	return &peer{fleet: f, addr: addr, listed: true, since: time.Now()}
}

// errSilent means that a peer has stopped talking.
var errSilent = errors.New("nothing came")

// errNoPeer means that what answers at an address does not talk as a peer does.
var errNoPeer = errors.New("is this the --peer-listen of a proxy?")

// errSelf means that an address is this proxy's own.
var errSelf = errors.New("this is the proxy itself")

// run follows the peer's reports until ctx ends, and connects again when they break off.
func (p *peer) run(ctx context.Context) {
	after := dialAfter
	for ctx.Err() == nil {
		began := time.Now()
		err := p.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		if p.lost(err) || time.Since(began) > silentFor {
			after = dialAfter
		}
		d := after
		if errors.Is(err, errSelf) { // until the address is somebody else's
			d = 10 * dialMost
		}
		if pause(ctx, d) != nil {
			break
		}
		after = min(2*after, dialMost)
	}
	p.lost(nil)
}

// follow reads the peer's reports until they break off.
func (p *peer) follow(ctx context.Context) error {
	f := p.fleet
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(silentFor, func() {
		cancel(fmt.Errorf("%w for %v", errSilent, silentFor))
	})
	defer silent.Stop()
	res, err := f.do(ctx, p.addr, http.MethodGet, pathReport, nil)
	if err != nil {
		return cause(ctx, err)
	}
	defer res.Body.Close()
	f.mu.Lock()
	p.version = res.Header.Get(headerVersion)
	f.mu.Unlock()
	most := &io.LimitedReader{R: res.Body}
	lines := bufio.NewReader(most)
	for {
		most.N = reportMost
		text, err := lines.ReadBytes('\n')
		if err != nil && most.N <= 0 {
			return fmt.Errorf("it sends no report: its line is longer than %d MiB", reportMost>>20)
		}
		if err != nil {
			return cause(ctx, err)
		}
		silent.Reset(silentFor)
		f.trace("report", len(text))
		r := &Report{}
		if err := json.Unmarshal(text, r); err != nil {
			return fmt.Errorf("it sends no report: %w; %w", err, errNoPeer)
		}
		if r.ID == f.ID {
			return errSelf
		}
		p.heard(r)
	}
}

// reportMost is how many bytes a line may have. 10,000 servers need some 2 MB.
const reportMost = 64 << 20

// cause returns why ctx was cancelled, or else err.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil {
		return c
	}
	return err
}

// heard takes over a report.
func (p *peer) heard(r *Report) {
	f := p.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.peers[p.addr] != p {
		return // it was dropped meanwhile
	}
	before := p.report // of the same process: a connection ends with it
	changed := r.since(before)
	p.mute = false
	if p.report, p.last = r, r; p.gone == nil {
		p.gone, p.since = make(chan struct{}), time.Now()
		if f.absent[r.Name] != nil { // at this address or another one
			f.Log.Info("peer is back", "peer", r.Name, "address", p.addr)
		} else {
			f.Log.Info("peer found", "peer", r.Name, "address", p.addr, "upstreams", len(r.Servers))
		}
		if r.Name == f.Name {
			f.Log.Warn("a peer has this proxy's name: who owns which server changes with each restart; "+
				"give each proxy a --peer-name of its own", "peer", r.Name, "address", p.addr)
		}
		p.told, p.foreign, p.err = false, false, nil
	}
	for _, s := range r.Seen {
		f.seen.put(s, false)
	}
	r.Seen = nil
	ordered, seen := f.note(r.Orders)
	defer f.obey(ordered) // before f.mu is unlocked
	if seen {
		changed = standing
	}
	if before == nil || !slices.Equal(r.Orders, before.Orders) {
		f.wake() // somebody may wait for its peers to know an order
	}
	if changed == nothing {
		return
	}
	for _, s := range r.Servers {
		if s.Owned && len(s.Learned) > 0 {
			f.learned[s.Name] = s.Learned
		}
	}
	if p.changed = true; changed == figures {
		f.lookSoon()
	} else {
		f.look()
	}
	if slices.ContainsFunc(r.Servers, func(s Server) bool { return len(s.Backlogs) > 0 }) {
		f.Idle()
	}
}

// lost notes that the peer is away, and reports whether it was there before. Without an error it is
// this proxy that does not follow it any more.
func (p *peer) lost(err error) (was bool) {
	f := p.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		p.err = err
	}
	if p.gone == nil {
		// At the start it often is not there yet; what stands in the way afterwards is another matter.
		if foreign := isForeign(err); err != nil && (!p.told || foreign && !p.foreign) && !errors.Is(err, errSelf) {
			p.told, p.foreign = true, foreign
			f.Log.Warn("peer does not answer; this proxy goes on without it", "address", p.addr,
				"err", err)
		}
		f.wake()
		return false
	}
	id, name, left := p.report.ID, p.report.Name, p.report.Draining
	close(p.gone)
	f.forgets(id)
	p.report, p.gone, p.since, p.changed = nil, nil, time.Now(), false
	f.absent[name] = p
	if !p.listed {
		f.drop(p)
	}
	switch {
	case err == nil:
	case !p.listed:
		f.Log.Info("peer has gone, and is no longer listed", "peer", name, "address", p.addr)
	case left:
		f.Log.Info("peer has stopped", "peer", name, "address", p.addr)
	case f.hears(id):
		f.Log.Warn("peer does not answer any more at one of its addresses, but at another one", "peer", name,
			"address", p.addr, "err", err)
	default:
		f.counts.Away++
		f.history.add(Incident{At: time.Now(), Peer: name, Error: err.Error()})
		f.Log.Warn("peer is away; this proxy goes on without it", "peer", name, "address", p.addr,
			"err", err)
	}
	p.told = true
	if err != nil { // otherwise Run ends, and this proxy owns nothing more because of that
		f.look()
	}
	return true
}

// hears reports whether a process is there, at whatever address. f.mu must be held.
func (f *Fleet) hears(id string) bool {
	for _, p := range f.peers {
		if p.report != nil && p.report.ID == id {
			return true
		}
	}
	return false
}

// errForeign means that a peer does not take this proxy for one, or the reverse.
var errForeign = errors.New("is it of this fleet? All need the same --peer-secret-file, or " +
	"--peer-cert and --peer-key of an authority in --peer-ca, for the name or address in --peers")

// These are errForeign where it is known which of the two it is about. They read the same.
var errSecret, errCertificate = fmt.Errorf("%w", errForeign), fmt.Errorf("%w", errForeign)

func isForeign(err error) bool { return errors.Is(err, errForeign) }

// explained adds the next step to an error of the connection to a peer, if it is about who that is.
func explained(err error) error {
	if err == nil {
		return nil
	}
	_, verify := errors.AsType[*tls.CertificateVerificationError](err)
	_, alert := errors.AsType[tls.AlertError](err)
	_, record := errors.AsType[tls.RecordHeaderError](err)
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		alert = true
	}
	if verify || alert || record {
		return fmt.Errorf("%w; %w", err, errCertificate)
	}
	return err
}

// maxAnswer is how many bytes of a peer's refusal are read.
const maxAnswer = 4096

// do sends a request of the fleet's own. Without an error the answer's status is 200.
func (f *Fleet) do(
	ctx context.Context, addr, method, path string, body io.Reader,
) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, f.Scheme+"://"+addr+path, body)
	if err != nil {
		return nil, err
	}
	f.sign(req.Header)
	res, err := f.Transport.RoundTrip(req)
	if err != nil {
		return nil, explained(err)
	}
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
		res.Body.Close()
		err = fmt.Errorf("it answers %s: %s", res.Status, bytes.TrimSpace(text))
		switch {
		case strings.HasPrefix(string(text), notPeer):
			err = fmt.Errorf("%w; %w", err, errSecret)
		case res.StatusCode == http.StatusBadRequest: // net/http's: this address wants https
			err = fmt.Errorf("%w; %w", err, errCertificate)
		case res.StatusCode == http.StatusForbidden:
			err = fmt.Errorf("%w; %w", err, errForeign)
		case res.StatusCode < http.StatusInternalServerError:
			err = fmt.Errorf("%w; %w", err, errNoPeer)
		}
		return nil, err
	}
	return res, nil
}

// sign shows the peer that a request is from one of its peers.
func (f *Fleet) sign(h http.Header) {
	h.Set(HeaderPeer, f.ID)
	if len(f.Secret) > 0 {
		h.Set(headerSecret, string(f.Secret))
	}
}
