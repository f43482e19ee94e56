//go:build !race

package virtual

// raced says that the race detector is on.
const raced = false
