package doctor

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Fleet is what one proxy knows of the others.
type Fleet struct {
	Name string `json:"name"` // of this proxy
	// Sources are the values of --peers.
	Sources []string `json:"sources"`
	// Settled is since when it is the same which proxies are there, have which servers, and own them.
	Settled time.Time `json:"settled"`
	// Peers are the other proxies that were looked for, Proxies all that are there, this one included.
	Peers   []Peer  `json:"peers"`
	Proxies []Proxy `json:"proxies"`
	// Unserved are the servers that no proxy sends requests to.
	Unserved []Unserved `json:"unserved"`
	// Incidents are what went wrong since Facts.Since.
	Incidents []Incident `json:"incidents"`
}

// Peer is another proxy, or an address where there should be one.
type Peer struct {
	Name    string    `json:"name,omitempty"` // "": it was never heard of
	Address string    `json:"address"`
	Up      bool      `json:"up"`
	Since   time.Time `json:"since"`             // of being up, or away
	Stopped bool      `json:"stopped,omitempty"` // it had said that it stops
	// Error is why it is away, and Reason the kind of that; "" before the first try.
	Error   string   `json:"error,omitempty"`
	Reason  Reason   `json:"reason,omitempty"`
	Servers []string `json:"upstreams,omitempty"` // that it had when it was last heard of
}

// Reason is why a peer does not answer: one of fleet.Reason.
type Reason string

// Proxy is a proxy that is there.
type Proxy struct {
	Name    string `json:"name"`
	Address string `json:"address,omitempty"` // "": this proxy
	Version string `json:"version,omitempty"` // "": not known
	Leaving bool   `json:"leaving,omitempty"` // it is about to stop
	// Hears means that it reads what this proxy reports; true for this proxy.
	Hears   bool     `json:"hears"`
	Servers []Listed `json:"upstreams"`
}

// Listed is a server that a proxy has configured, and what that proxy says of it.
type Listed struct {
	Name   string `json:"name"`
	Beside bool   `json:"beside,omitempty"` // --own names it
	Owned  bool   `json:"owned,omitempty"`
	Takes  bool   `json:"takes"` // it answers, and gets requests
}

// Unserved is a server that no proxy sends requests to.
type Unserved struct {
	Server  string `json:"upstream"`
	Owner   string `json:"owner"`             // the name of its last owner
	Address string `json:"address,omitempty"` // of that; "": this proxy
	Away    bool   `json:"away,omitempty"`    // the owner is away
	Drained bool   `json:"drained,omitempty"` // somebody has taken the server out of use
	// Models are those that no other server has which gets requests.
	Models []string `json:"models"`
}

// Incident is that a peer went away without having said so, or with a request.
type Incident struct {
	At    time.Time `json:"at"`
	Peer  string    `json:"peer"`
	Lost  bool      `json:"lost,omitempty"` // a request was lost
	Error string    `json:"error,omitempty"`
}

// Shared is the server of --shared. The zero value means that nothing is wrong.
type Shared struct {
	Down  bool      `json:"down"` // it cannot be used at the moment
	Since time.Time `json:"since,omitzero"`
	Error string    `json:"error,omitempty"`
	// Limited counts the requests of API keys with limits, and Alone those of them for which this
	// proxy's own counts decided, since it was started.
	Limited uint64 `json:"limited"`
	Alone   uint64 `json:"alone"`
}

const (
	// moment is how long proxies may see things differently, as they do after each change.
	moment = 10 * time.Second
	// lookups is how long they may have different servers, until all have looked them up.
	lookups = time.Minute
	// restart is how long a proxy may be away without being missed.
	restart = time.Minute
	// upgrade is how long proxies may differ in their version.
	upgrade = 10 * time.Minute
	// fewIncidents is the number below which they may be chance.
	fewIncidents = 3
	// mostProxies are named in a finding.
	mostProxies = 8

	docFleet = "doctor.md#proxies-of-a-fleet"
)

// fleet returns the findings about other proxies.
func (f *Facts) fleet() (list []Finding) {
	if f.Fleet == nil {
		return nil
	}
	list = f.peersAway()
	for _, check := range []func() (Finding, bool){
		f.noPeers, f.oneWay, f.peersLeave, f.peerNames, f.twoOwners, f.ownTwice, f.lists, f.notServed, f.versions,
	} {
		if found, ok := check(); ok {
			found.Doc = docFleet
			list = append(list, found)
		}
	}
	return list
}

// settled reports whether nothing has changed in the fleet for a time.
func (f *Facts) settled(d time.Duration) bool { return f.Now.Sub(f.Fleet.Settled) >= d }

// ago returns how long ago something was.
func (f *Facts) ago(t time.Time) string { return duration(max(0, f.Now.Sub(t).Seconds())) }

// staying returns the proxies that are there and not about to stop.
func (f *Facts) staying() []Proxy {
	return slices.DeleteFunc(slices.Clone(f.Fleet.Proxies), func(p Proxy) bool { return p.Leaving })
}

// named says which proxy it is.
func (p Proxy) named() string {
	if p.Address == "" {
		return p.Name + " (this proxy)"
	}
	return p.Name
}

func (p Peer) named() string {
	switch p.Name {
	case "":
		return "the proxy at " + p.Address
	case p.Address: // the default, where --peer-listen has a host
		return p.Name
	}
	return p.Name + " at " + p.Address
}

// askThere advises to look at another proxy. Where its clients connect is not known, so the default
// port is named.
func askThere(do, address string) Advice {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return Advice{
		Do: do, Where: InShell,
		Set: "ollama-cacheproxy doctor --proxy " + net.JoinHostPort(host, "11435"),
	}
}

// reachedBy names the other proxies that reach a server.
func (f *Facts) reachedBy(server string) (names []string) {
	if f.Fleet == nil {
		return nil
	}
	for _, p := range f.Fleet.Proxies {
		if s, ok := p.server(server); ok && p.Address != "" && s.Takes {
			names = append(names, p.Name)
		}
	}
	return names
}

func (p Proxy) server(name string) (Listed, bool) {
	i := slices.IndexFunc(p.Servers, func(s Listed) bool { return s.Name == name })
	if i < 0 {
		return Listed{}, false
	}
	return p.Servers[i], true
}

// why says what the kinds of errors mean, in the order in which they are reported.
var why = []struct {
	reason Reason
	title  string
	mends  bool // it may pass by itself
	advice func(p Peer, host, port string) []Advice
}{
	{"secret", "they have different secrets", false, func(Peer, string, string) []Advice {
		return []Advice{{
			Do:    "Give all proxies the same secret, and the same way to show it.",
			Where: InProxy, Set: "--peer-secret-file secret",
		}}
	}},
	{"certificate", "their certificates do not fit", false, func(p Peer, _, _ string) []Advice {
		return []Advice{
			{
				Do:    "See for which names the certificate there is, who has issued it, and until when it is good.",
				Where: InShell, Set: "openssl s_client -connect " + p.Address + " </dev/null | openssl x509 -noout -issuer -dates -ext subjectAltName",
			},
			{
				Do:    "Give all proxies certificates of one authority, for the name or address in --peers.",
				Where: InProxy, Set: "--peer-cert cert.pem --peer-key key.pem --peer-ca ca.pem",
			},
		}
	}},
	{"no_peer", "something else listens there", false, func(_ Peer, host, _ string) []Advice {
		return []Advice{{
			Do:    "Name the --peer-listen of that proxy, which is not the address for its clients.",
			Where: InProxy, Set: "--peers " + net.JoinHostPort(host, "11436"),
		}}
	}},
	{"unknown", "its name cannot be looked up", true, func(_ Peer, host, _ string) []Advice {
		return []Advice{{Do: "Correct the name in --peers, or what answers for it.", Where: InShell, Set: "getent hosts " + host}}
	}},
	{"refused", "nobody listens there", true, func(_ Peer, _, port string) []Advice {
		return []Advice{
			{
				Do:    "Start it, with an address at which this one reaches it: 127.0.0.1 is reached from its own machine alone.",
				Where: InProxy, Set: "--peer-listen :" + port,
			},
			{Do: "If it is not coming back, take it out of --peers here."},
		}
	}},
	{"silent", "nothing comes back from there", true, func(_ Peer, host, port string) []Advice {
		return []Advice{{
			Do:    "See whether its machine runs, and whether a firewall lets this one through.",
			Where: InShell, Set: "nc -vz " + host + " " + port,
		}}
	}},
	{"broke", "the connection ends", true, func(p Peer, _, _ string) []Advice {
		return []Advice{askThere("Read its log, and look at it from there.", p.Address)}
	}},
}

// peersAway finds peers that do not answer, one finding for each reason.
func (f *Facts) peersAway() (list []Finding) {
	for _, w := range why {
		var away []Peer
		for _, p := range f.Fleet.Peers {
			if !p.Up && p.Reason == w.reason {
				away = append(away, p)
			}
		}
		if len(away) == 0 {
			continue
		}
		host, port, err := net.SplitHostPort(away[0].Address)
		if err != nil {
			host, port = away[0].Address, "11436"
		}
		found := Finding{
			ID: IDPeersAway, Severity: Low, Doc: docFleet, Advice: w.advice(away[0], host, port),
			Title: fmt.Sprintf("%d of the other proxies do not answer: %s", len(away), w.title),
		}
		if len(away) == 1 {
			found.Title = fmt.Sprintf("The proxy %s does not answer: %s", strings.TrimPrefix(away[0].named(), "the proxy "), w.title)
		}
		for i, p := range away {
			found.Severity = worse(found.Severity, f.missed(p, w.mends))
			if i < mostProxies {
				found.Evidence = append(found.Evidence, f.gone(p))
			}
		}
		if more := len(away) - mostProxies; more > 0 {
			found.Evidence = append(found.Evidence, fmt.Sprintf("And %d more.", more))
		}
		found.Evidence = append(found.Evidence, f.missing(away)...)
		if f.lonely() {
			found.Evidence = append(found.Evidence, "No other proxy answers: this one works alone, and so may others in front of the same servers.")
		}
		list = append(list, found)
	}
	return list
}

// missing says which models nobody serves since some peers are away.
func (f *Facts) missing(away []Peer) (lines []string) {
	for _, u := range f.Fleet.Unserved {
		if u.Away && len(u.Models) > 0 && slices.ContainsFunc(away, func(p Peer) bool { return p.Address == u.Address }) {
			lines = append(lines, u.waits())
		}
	}
	return lines
}

// lonely reports whether no other proxy is there.
func (f *Facts) lonely() bool {
	return !slices.ContainsFunc(f.Fleet.Peers, func(p Peer) bool { return p.Up })
}

// missed says how bad it is that a peer is away: at first it may just be starting, and its models may
// be loaded nowhere else.
func (f *Facts) missed(p Peer, mends bool) Severity {
	patience := restart
	if p.Stopped {
		patience = upgrade
	}
	switch only := slices.ContainsFunc(f.Fleet.Unserved, func(u Unserved) bool {
		return u.Away && u.Address == p.Address && len(u.Models) > 0
	}); {
	case mends && f.Now.Sub(p.Since) < patience:
		return Low
	case only:
		return High
	}
	return Medium
}

func worse(a, b Severity) Severity {
	if slices.Index(severities, b) < slices.Index(severities, a) {
		return b
	}
	return a
}

// gone says since when a peer is away, and why.
func (f *Facts) gone(p Peer) string {
	text := fmt.Sprintf("%s: away for %s", p.named(), f.ago(p.Since))
	switch {
	case p.Name == "":
		text = fmt.Sprintf("%s: never reached, for %s", p.Address, f.ago(p.Since))
	case p.Stopped:
		text = fmt.Sprintf("%s: stopped, as it had said, for %s", p.named(), f.ago(p.Since))
	}
	if len(p.Servers) > 0 {
		text += ", with " + join(p.Servers)
	}
	return text + ". The error: " + p.Error
}

// waits says what is missing while nobody serves a server.
func (u Unserved) waits() string {
	return fmt.Sprintf("Only %s has %s: requests for that wait for --try-duration, and then get 503.", u.Server, join(u.Models))
}

func (f *Facts) noPeers() (Finding, bool) {
	if len(f.Fleet.Peers) > 0 || !f.settled(moment) {
		return Finding{}, false
	}
	return Finding{
		ID: IDNoPeers, Severity: Low, Title: "This proxy has found no other one",
		Evidence: []string{fmt.Sprintf("It has looked for %s for %s, and found nobody but perhaps itself. It works alone.",
			join(f.Fleet.Sources), f.ago(f.Fleet.Settled))},
		Advice: []Advice{
			{Do: "Correct where it looks, or start the others. If it is to be the only one for now, all is well.", Where: InProxy, Set: "--peers dns:HOST:11436"},
		},
	}, true
}

// oneWay finds a peer that this proxy hears, but that does not hear this one.
func (f *Facts) oneWay() (Finding, bool) {
	var deaf []Proxy
	for _, p := range f.staying() {
		if !p.Hears {
			deaf = append(deaf, p)
		}
	}
	if len(deaf) == 0 || !f.settled(moment) {
		return Finding{}, false
	}
	found := Finding{
		ID: IDOneWay, Severity: Medium, Title: fmt.Sprintf("%s answers, but does not follow this proxy", deaf[0].Name),
		Advice: []Advice{
			{Do: "Have it look for this proxy, too: all proxies need --peers with the addresses of all, and reach each other there.",
				Where: InProxy, Set: "--peers HOST:11436"},
			askThere("It knows why it does not reach this one.", deaf[0].Address),
		},
	}
	if len(deaf) > 1 {
		found.Title = fmt.Sprintf("%d proxies answer, but do not follow this one", len(deaf))
	}
	for _, p := range deaf[:min(len(deaf), mostProxies)] {
		line := fmt.Sprintf("%s does not know this proxy, or takes it for away, for %s at least: it passes nothing on to it.",
			Peer{Name: p.Name, Address: p.Address}.named(), f.ago(f.Fleet.Settled))
		var both []string
		for _, s := range p.Servers {
			if owners := f.owners(s.Name); s.Owned && len(owners) > 1 {
				both = append(both, s.Name)
			}
		}
		if len(both) > 0 {
			line += fmt.Sprintf(" Both schedule %s, which costs order and evaluated tokens.", join(both))
		}
		found.Evidence = append(found.Evidence, line)
	}
	return found, true
}

// owners returns the proxies that say that they own a server.
func (f *Facts) owners(server string) (list []Proxy) {
	for _, p := range f.staying() {
		if s, ok := p.server(server); ok && s.Owned {
			list = append(list, p)
		}
	}
	return list
}

// servers returns the names of all servers that some proxy has which is there, each once.
func (f *Facts) servers() (names []string) {
	for _, p := range f.Fleet.Proxies {
		for _, s := range p.Servers {
			names = append(names, s.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// twoOwners finds servers that several proxies schedule. Where one of them does not hear this proxy,
// that is known for the reason.
func (f *Facts) twoOwners() (Finding, bool) {
	if !f.settled(moment) {
		return Finding{}, false
	}
	var found Finding
	for _, name := range f.servers() {
		owners := f.owners(name)
		if len(owners) < 2 || slices.ContainsFunc(owners, func(p Proxy) bool { return !p.Hears }) {
			continue
		}
		var of []string
		for _, p := range owners {
			of = append(of, p.named())
			if p.Address != "" && len(found.Advice) < 2 {
				found.Advice = append(found.Advice, askThere("See which other proxies it does not reach, and why.", p.Address))
			}
		}
		found.Evidence = append(found.Evidence, fmt.Sprintf("%s: %s, for %s.", name, join(of), f.ago(f.Fleet.Settled)))
	}
	found.ID, found.Severity = IDTwoOwners, Medium
	found.Title = fmt.Sprintf("Two proxies at a time schedule %s", plural(len(found.Evidence), "server"))
	return found.short("They do not reach each other, although this one reaches both. It costs order and evaluated tokens, and no answer.")
}

// short keeps the first lines of the evidence, and adds a last one; without evidence there is nothing.
func (found Finding) short(last string) (Finding, bool) {
	n := len(found.Evidence)
	if n == 0 {
		return Finding{}, false
	}
	if n > mostProxies {
		found.Evidence = append(found.Evidence[:mostProxies:mostProxies], fmt.Sprintf("And %d more.", n-mostProxies))
	}
	found.Evidence = append(found.Evidence, last)
	return found, true
}

// ownTwice finds a server that several proxies say they are beside of.
func (f *Facts) ownTwice() (Finding, bool) {
	if !f.settled(moment) {
		return Finding{}, false
	}
	var found Finding
	first := ""
	for _, name := range f.servers() {
		var of []string
		for _, p := range f.staying() {
			if s, ok := p.server(name); ok && s.Beside {
				of = append(of, p.named())
			}
		}
		if len(of) > 1 {
			if first == "" {
				first = name
			}
			found.Evidence = append(found.Evidence, fmt.Sprintf("%s: %s.", name, join(of)))
		}
	}
	found.ID, found.Severity = IDOwnTwice, Medium
	found.Title = fmt.Sprintf("Several proxies say that they are beside %s", first)
	found.Advice = []Advice{{
		Do:    "If these are different Ollamas, give each its own name.",
		Where: InProxy, Set: fmt.Sprintf("--upstream %s-2=127.0.0.1:11434 --own %s-2", first, first),
	}, {Do: "If it is one, give --own to one of the proxies alone."}}
	return found.short("What has one name is taken for one server, and one of the proxies schedules it: " +
		"if these are several Ollamas, the others get no requests.")
}

// peerNames finds proxies of one name.
func (f *Facts) peerNames() (Finding, bool) {
	if !f.settled(moment) {
		return Finding{}, false
	}
	at := map[string][]string{}
	for _, p := range f.staying() {
		address := p.Address
		if address == "" {
			address = "this proxy"
		}
		at[p.Name] = append(at[p.Name], address)
	}
	found := Finding{
		ID: IDPeerNames, Severity: Low, Title: "Several proxies have the same name",
		Advice: []Advice{{Do: "Give each a name of its own, which it keeps.", Where: InProxy, Set: "--peer-name NAME"}},
	}
	for name, list := range at {
		if len(list) > 1 {
			found.Evidence = append(found.Evidence, fmt.Sprintf("%s: %s.", name, join(list)))
		}
	}
	slices.Sort(found.Evidence)
	return found.short("So it changes with each restart which of them schedules which server.")
}

// lists finds servers that one proxy has and another, which shares others with it, has not.
func (f *Facts) lists() (Finding, bool) {
	if !f.settled(lookups) {
		return Finding{}, false
	}
	found := Finding{ID: IDLists, Severity: Low}
	first, edges := "", f.edges()
	for _, name := range f.servers() {
		with, without := edges.having(name)
		if len(without) == 0 {
			continue
		}
		if first == "" {
			first = name
		}
		line := fmt.Sprintf("%s: in %s, but not in %s.", name, join(with), join(without))
		if len(with) == 1 {
			found.Severity = Medium
			line += " When the first is away, nobody serves it."
		}
		found.Evidence = append(found.Evidence, line)
	}
	found.Title = fmt.Sprintf("The proxies have different upstreams: %s not everywhere", is(len(found.Evidence)))
	address := "ADDR"
	for _, u := range f.Upstreams {
		if u.Name == first {
			address = u.URL
		}
	}
	found.Advice = []Advice{{
		Do:    "Give all proxies that reach it the same list.",
		Where: InProxy, Set: fmt.Sprintf("--upstream %s=%s", first, address),
	}, {Do: "If it is one server under two names, give it the same name everywhere: it is scheduled twice."}}
	return found.short("A server is scheduled by one of the proxies that have it, so those that have not depend on them.")
}

// edges are proxies with the servers that none of them is beside of.
type edges []Proxy

func (f *Facts) edges() edges {
	beside := map[string]bool{}
	all := f.staying()
	for _, p := range all {
		for _, s := range p.Servers {
			beside[s.Name] = beside[s.Name] || s.Beside
		}
	}
	for i := range all {
		all[i].Servers = slices.DeleteFunc(slices.Clone(all[i].Servers), func(s Listed) bool { return beside[s.Name] })
	}
	return all
}

// having names the proxies that have a server, and those that have not, but share others with them.
func (e edges) having(server string) (with, without []string) {
	shared := map[string]bool{}
	for _, p := range e {
		if _, ok := p.server(server); ok {
			with = append(with, p.named())
			for _, s := range p.Servers {
				shared[s.Name] = true
			}
		}
	}
	for _, p := range e {
		_, ok := p.server(server)
		if !ok && slices.ContainsFunc(p.Servers, func(s Listed) bool { return shared[s.Name] }) {
			without = append(without, p.named())
		}
	}
	return with, without
}

func is(n int) string {
	if n == 1 {
		return "one is"
	}
	return fmt.Sprintf("%d are", n)
}

// notServed finds servers that no proxy gets an answer from, although their owner is there; and models
// that went with a proxy which is looked for no longer, and may be back at another address: one that
// stops says that its servers are drained. This proxy's own servers are found by away. (A proxy that
// has just been started often is there before the Ollama beside it.)
func (f *Facts) notServed() (Finding, bool) {
	if !f.settled(moment) {
		return Finding{}, false
	}
	found := Finding{ID: IDNotServed, Severity: Medium}
	var names []string
	for _, u := range f.Fleet.Unserved {
		mine := slices.ContainsFunc(f.Upstreams, func(x Upstream) bool { return x.Name == u.Server })
		known := slices.ContainsFunc(f.Fleet.Peers, func(p Peer) bool { return p.Address == u.Address })
		gone := u.Away && !known && len(u.Models) > 0 && f.settled(restart)
		if mine || !gone && (u.Away || u.Drained) {
			continue
		}
		names = append(names, u.Server)
		line := fmt.Sprintf("%s: %s is there, and gets no answer from it.", u.Server, u.Owner)
		if u.Away {
			line = fmt.Sprintf("%s: %s is gone, and no other proxy has it.", u.Server, u.Owner)
		}
		if len(u.Models) > 0 {
			found.Severity = High
			line += " " + u.waits()
		}
		found.Evidence = append(found.Evidence, line)
		if len(found.Advice) == 0 {
			found.Advice = []Advice{askThere("Look at it from its proxy. Start Ollama there.", u.Address)}
			if u.Away {
				found.Advice = []Advice{{Do: "Start that proxy again, or pull the models elsewhere.", Where: InShell, Set: "ollama pull MODEL"}}
			}
		}
	}
	found.Title = fmt.Sprintf("No proxy reaches %s", join(names[:min(len(names), mostProxies)]))
	return found.short("Requests go to other servers that have their model, where there are any.")
}

// versions finds proxies of different versions, once an upgrade should be over.
func (f *Facts) versions() (Finding, bool) {
	of := map[string][]string{}
	for _, p := range f.staying() {
		if p.Version != "" {
			of[p.Version] = append(of[p.Version], p.named())
		}
	}
	if len(of) < 2 || !f.settled(upgrade) {
		return Finding{}, false
	}
	found := Finding{
		ID: IDVersions, Severity: Low, Title: "The proxies are of different versions",
		Advice: []Advice{{Do: "Finish the upgrade: install the same version everywhere, one after the other.", Where: InShell, Set: "ollama-cacheproxy version"}},
	}
	for version, names := range of {
		more := ""
		if n := len(names) - mostProxies; n > 0 {
			names, more = names[:mostProxies], fmt.Sprintf(", and %d more", n)
		}
		found.Evidence = append(found.Evidence, fmt.Sprintf("%s: %s%s.", version, join(names), more))
	}
	slices.Sort(found.Evidence)
	return found.short(fmt.Sprintf("Nothing has changed for %s, so no upgrade seems to be under way.", f.ago(f.Fleet.Settled)))
}

// peersLeave finds peers that keep going away, and requests that were lost with them.
func (f *Facts) peersLeave() (Finding, bool) {
	type count struct {
		away, lost int
		last       Incident
	}
	all := map[string]*count{}
	away, lost := 0, 0
	for _, i := range f.Fleet.Incidents {
		c := all[i.Peer]
		if c == nil {
			c = &count{}
			all[i.Peer] = c
		}
		if i.Lost {
			c.lost, lost = c.lost+1, lost+1
			continue
		}
		c.away, away, c.last = c.away+1, away+1, i
	}
	if away < fewIncidents && lost < fewIncidents {
		return Finding{}, false
	}
	found := Finding{
		ID: IDPeersLeave, Severity: Medium, Title: fmt.Sprintf("Proxies go away without having said so: %s", times(away)),
		Advice: []Advice{
			{Do: "See what ends them, or cuts them off: too little memory, a crash, a network that drops connections.",
				Where: InShell, Set: "journalctl -k | grep -i 'out of memory'"},
			{Do: "If they are restarted on purpose, stop them with SIGTERM, and give them the time to finish.",
				Where: InProxy, Set: "--drain-delay 5s"},
		},
	}
	switch {
	case away == 0: // connections break, and the proxies stay
		found.Title = fmt.Sprintf("Between proxies %s lost", were(lost))
	case lost > 0:
		found.Title += fmt.Sprintf(", and %s lost", were(lost))
		if away >= fewIncidents {
			found.Severity = High
		}
	}
	for name, c := range all {
		var what []string
		if c.away > 0 {
			what = append(what, fmt.Sprintf("%s, last at %s: %s", times(c.away), c.last.At.Local().Format("15:04:05"), c.last.Error))
		}
		if c.lost > 0 {
			what = append(what, fmt.Sprintf("%s had an error for it", plural(c.lost, "client")))
		}
		found.Evidence = append(found.Evidence, fmt.Sprintf("%s: %s.", name, strings.Join(what, "; ")))
	}
	slices.Sort(found.Evidence)
	return found.short("What waited there was sent elsewhere; what had begun was not, since it may have done something.")
}

func were(n int) string {
	if n == 1 {
		return "1 request was"
	}
	return number(n) + " requests were"
}

// shared finds that the Valkey server of --shared is gone.
func (f *Facts) shared() (Finding, bool) {
	if !f.Shared.Down {
		return Finding{}, false
	}
	found := Finding{
		ID: IDShared, Severity: Low, Title: "The Valkey server of --shared is gone, and this proxy goes on with what it knows itself",
		Evidence: []string{fmt.Sprintf("It is away for %s: %s", f.ago(f.Shared.Since), f.Shared.Error)},
		Advice: []Advice{
			{Do: "Start it, or correct its URL. It is tried again by itself.", Where: InProxy, Set: "--shared valkey://HOST:6379/0"},
		},
		Doc: "doctor.md#a-valkey-server-that-is-away",
	}
	if f.Shared.Limited > 0 {
		found.Severity = Medium
		found.Evidence = append(found.Evidence, fmt.Sprintf("API keys have limits, which each proxy counts alone meanwhile: "+
			"for %s of %s since this proxy was started.", number(int(f.Shared.Alone)), plural(int(f.Shared.Limited), "request")))
	}
	return found, true
}
