package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
)

// Fleet adds the series of what a proxy does with others. It looks at each scrape.
func (m *Metrics) Fleet(f *fleet.Fleet) {
	m.registry.MustRegister(fleets{f})
}

// fleets collects what a fleet counts.
type fleets struct{ *fleet.Fleet }

var (
	peerUp       = prometheus.NewDesc(namespace+"_peer_up", "1 if the other proxy at this address answers.", []string{"address"}, nil)
	peersAway    = prometheus.NewDesc(namespace+"_peers_away_total", "How often another proxy went away without having said that it stops.", nil, nil)
	fleetOwned   = prometheus.NewDesc(namespace+"_fleet_owned", "1 if this proxy schedules the upstream, 0 if another one does.", []string{"upstream"}, nil)
	fleetOwners  = prometheus.NewDesc(namespace+"_fleet_owner_changes_total", "How often this proxy began or ceased to schedule an upstream.", nil, nil)
	fleetHops    = prometheus.NewDesc(namespace+"_fleet_hops_total", "Requests that were passed on to another proxy, by result: begun (and answered), again (that proxy went away before it began, so that another one got them), elsewhere (an idle upstream of another proxy took them over), lost (it went away after it had begun).", []string{"result"}, nil)
	fleetGiven   = prometheus.NewDesc(namespace+"_fleet_given_total", "Waiting requests that this proxy gave to an idle upstream of another one.", nil, nil)
	fleetForgot  = prometheus.NewDesc(namespace+"_fleet_forgotten_total", "Requests from other proxies that were not sent to an upstream, since the proxy that passed them on was away and may have sent them elsewhere.", nil, nil)
	fleetMembers = []*prometheus.Desc{peerUp, peersAway, fleetOwned, fleetOwners, fleetHops, fleetGiven, fleetForgot}
)

func (f fleets) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range fleetMembers {
		ch <- d
	}
}

func (f fleets) Collect(ch chan<- prometheus.Metric) {
	if f.Fleet == nil { // only described
		return
	}
	value := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	yes := map[bool]float64{true: 1}
	for _, p := range f.Peers() {
		value(peerUp, prometheus.GaugeValue, yes[p.Up], p.Address)
	}
	for _, o := range f.Owners() {
		value(fleetOwned, prometheus.GaugeValue, yes[o.Here], o.Server)
	}
	c := f.Counts()
	value(peersAway, prometheus.CounterValue, float64(c.Away))
	value(fleetOwners, prometheus.CounterValue, float64(c.Owners))
	for result, n := range map[string]uint64{
		"begun": c.Begun, "again": c.Again, "elsewhere": c.Elsewhere,
		"lost": c.Lost,
	} {
		value(fleetHops, prometheus.CounterValue, float64(n), result)
	}
	value(fleetGiven, prometheus.CounterValue, float64(c.Given))
	value(fleetForgot, prometheus.CounterValue, float64(c.Forgotten))
}
