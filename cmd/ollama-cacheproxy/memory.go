package main

import (
	"context"
	"math"
	"net/http"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// defaultMemory returns how many bytes held bodies may take unless the operator says otherwise: a
// quarter of the least of these limits.
func defaultMemory(limits ...memlimit.Provider) int64 {
	least := uint64(math.MaxInt64)
	for _, limit := range limits {
		if n, err := limit(); err == nil { // an error says that there is no such limit here
			least = min(least, n)
		}
	}
	return max(int64(least/4), proxy.MemoryLeast)
}

const (
	trimEvery = 15 * time.Second
	trimQuiet = 8 << 20  // bytes allocated in that time, up to which there is no load
	trimWorth = 32 << 20 // bytes allocated since the last time, below which there is little to give back
)

// trim gives memory back to the system after a load, until ctx ends. By itself Go collects garbage
// when as much was allocated as is held, which takes long once nobody asks for anything, and what
// is pooled only at the second time after that.
func trim(ctx context.Context, transport *http.Transport) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	var last, trimmed uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := allocated()
		quiet := now-last < trimQuiet
		if last = now; !quiet || now-trimmed < trimWorth {
			continue
		}
		transport.CloseIdleConnections() // each has buffers
		runtime.GC()
		debug.FreeOSMemory() // collects once more
		trimmed = allocated()
	}
}

// allocated returns how many bytes were allocated since the program began.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
