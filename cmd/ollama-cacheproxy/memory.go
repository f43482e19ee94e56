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

// defaultMemory returns the default budget for held bodies, in bytes: a quarter of the smallest of
// these limits.
func defaultMemory(limits ...memlimit.Provider) int64 {
	least := uint64(math.MaxInt64)
	for _, limit := range limits {
		if n, err := limit(); err == nil { // an error means that there is no such limit here
			least = min(least, n)
		}
	}
	return max(int64(least/4), proxy.MemoryLeast)
}

const (
	trimEvery = 15 * time.Second
	trimQuiet = 8 << 20  // bytes allocated per interval, up to which there is no load
	trimWorth = 32 << 20 // bytes allocated since the last time: less is not worth a collection
)

// trim returns memory to the system after a load, until ctx ends. Go by itself collects garbage
// only after allocating as much as is held, which takes long without requests, and it frees pooled
// memory only at the second collection after that.
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
