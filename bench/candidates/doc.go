// Package candidates is a benchmark of many requests with one long prefix and a short individual
// text, as for rating candidates, on simulated Ollama servers, directly and through the proxy, in
// virtual time. It is a test, since testing/synctest, which the virtual time of a whole proxy
// needs, is for tests only. As part of the tests it is small, and
//
//	make bench-candidates
//
// is the full run.
package candidates
