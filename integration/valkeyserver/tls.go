//go:build unix

package valkeyserver

import (
	"crypto/tls"
	"crypto/x509"
	"net/http/httptest"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/keypair"
)

// identity is a certificate, which is its own authority, and its key.
type identity struct {
	cert, key string // files
	config    *tls.Config
}

func newIdentity(t testing.TB) *identity {
	t.Helper()
	issuer := httptest.NewTLSServer(nil) // for its certificate, which is for 127.0.0.1
	issuer.Close()
	i := &identity{config: &tls.Config{RootCAs: x509.NewCertPool()}}
	i.config.RootCAs.AddCert(issuer.Certificate())
	i.cert, i.key = keypair.Write(t, issuer.TLS.Certificates[0], t.TempDir())
	return i
}
