//go:build !linux

package proxy

import (
	"net"
	"testing"
)

// reserve returns an address of this machine that refuses connections until something listens there,
// which here may be another process, too.
func reserve(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	return ln.Addr().String()
}
