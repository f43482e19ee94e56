// Package coldstart measures what it costs that the proxy has to find out how many slots a server
// has: from its first request on, on simulated Ollama servers that have to load their model,
// directly, with the number given, and with it learned, in virtual time. It is a test, since
// testing/synctest, which the virtual time of a whole proxy needs, is for tests only; as part of
// the tests it is small, and
//
// make bench-coldstart
//
// prints the table of docs/lanes.md.
package coldstart
