// Package fleetsim is a benchmark of a fleet of proxies in front of many simulated Ollama servers,
// with the real handlers and the real messages between them, over connections in memory, in virtual
// time. It is a test, since testing/synctest is for tests only. As part of the tests it is small,
// and
//
//	make bench-fleet-sim
//
// is the full run: 64 servers, 8 proxies, 1,000 clients.
package fleetsim
