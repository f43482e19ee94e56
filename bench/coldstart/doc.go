// Package coldstart measures the cost of learning how many slots a server has: from the first
// request on, on simulated Ollama servers that have to load their model, directly, with the number
// given, and with it learned, in virtual time. It is a test, since testing/synctest, which the
// virtual time of a whole proxy needs, is for tests only. As part of the tests it is small, and
//
//	make bench-coldstart
//
// prints the table of docs/lanes.md.
package coldstart
