// Package candidates rates candidates: many requests with one long prefix and a short text of their own, on simulated Ollama servers, directly and
// through the proxy, in virtual time. It is a test, since testing/synctest, which the virtual time of a whole proxy needs, is for tests only;
// as part of the tests it is small, and
//
//	make bench-candidates
//
// is the run in full.
package candidates
