package integration

import (
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/soak"
)

// TestSoak is a short soak. A longer one is make soak.
func TestSoak(t *testing.T) {
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	if err := soak.Run(t.Context(), soak.Config{Proxy: bin, For: 20 * time.Second, Every: 5 * time.Second, Report: t.Logf}); err != nil {
		t.Error(err)
	}
}
