//go:build race

package virtual

// raced reports whether the race detector is on.
const raced = true
