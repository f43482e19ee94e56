package integration

import (
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/faults"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
)

// inFleet runs a test of a fleet with partitions, or without them where this process may make none.
func inFleet(t *testing.T, run func(t *testing.T, c faults.Config)) {
	t.Helper()
	t.Parallel() // they mostly wait
	config := func(t *testing.T) faults.Config {
		bin, err := proxyBinary()
		if err != nil {
			t.Fatal(err)
		}
		return faults.Config{
			Proxy: bin, Dir: t.TempDir(), Proxies: 3, Servers: 4, Seed: 1,
			HoldLeast: time.Second, HoldMost: 4 * time.Second, Pause: 2 * time.Second, Report: t.Logf,
		}
	}
	netns.Test(t, func(t *testing.T, lab *netns.Lab) {
		c := config(t)
		c.Lab = lab
		run(t, c)
	}, func(t *testing.T) { run(t, config(t)) })
}

// TestFleetFaults: while proxies, servers and Valkey are killed and stopped, and cut off from each
// other, every request ends with the right answer or an error, and none is begun twice. A longer one
// is make soak-fleet.
func TestFleetFaults(t *testing.T) {
	inFleet(t, func(t *testing.T, c faults.Config) {
		c.Faults = 7 // one of each kind
		if err := faults.Run(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
}

// TestFleetFaultsSidecar is the same with a server beside each proxy.
func TestFleetFaultsSidecar(t *testing.T) {
	inFleet(t, func(t *testing.T, c faults.Config) {
		c.Faults, c.Sidecar = 6, true
		if err := faults.Run(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
}

// TestFleetRolling: all proxies are restarted, one after the other, and no request fails of clients
// that ask ready ones.
func TestFleetRolling(t *testing.T) {
	inFleet(t, func(t *testing.T, c faults.Config) {
		if err := faults.RunRolling(t.Context(), c, 1); err != nil {
			t.Error(err)
		}
	})
}

// TestFleetRollingSidecar is the same with a server beside each proxy, which no other proxy reaches.
func TestFleetRollingSidecar(t *testing.T) {
	inFleet(t, func(t *testing.T, c faults.Config) {
		c.Sidecar = true
		if err := faults.RunRolling(t.Context(), c, 1); err != nil {
			t.Error(err)
		}
	})
}
