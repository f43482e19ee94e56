//go:build unix

package valkeyserver

import (
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// Client returns a client of the server, which is closed when the test ends.
func (s *Server) Client(t testing.TB) valkey.Client {
	t.Helper()
	option := valkey.ClientOption{InitAddress: []string{s.Addr()}, DisableCache: true, ForceSingleClient: true}
	if s.tls != nil {
		option.TLSConfig = s.tls.config
	}
	c, err := valkey.NewClient(option)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Until calls f again until it is true, for up to a minute.
func Until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after a minute still not: %s", what)
		}
	}
}
