package main

import (
	"math"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// defaultMemory returns how many bytes held bodies may take unless the operator says otherwise: a quarter of what the
// machine has, or of what the cgroup may use if that is less.
func defaultMemory() int64 {
	least := uint64(math.MaxInt64)
	for _, limit := range []memlimit.Provider{memlimit.FromSystem, memlimit.FromCgroup} {
		if n, err := limit(); err == nil { // an error says that there is no such limit here
			least = min(least, n)
		}
	}
	return max(int64(least/4), proxy.MemoryLeast)
}
