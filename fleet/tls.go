package fleet

import (
	"crypto/tls"
	"crypto/x509"
)

// TLS is how peers prove to each other who they are. Each has a certificate for the name or address
// by which the others reach it, for both sides of a connection.
type TLS struct{ client, server *tls.Config }

// NewTLS returns the configuration for a certificate, and for the authorities that sign the peers'
// certificates. get is called for each connection, so that the certificate can be replaced.
func NewTLS(get func() *tls.Certificate, authorities *x509.CertPool) *TLS {
	return &TLS{
		client: &tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: authorities,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return get(), nil
			},
		},
		server: &tls.Config{
			MinVersion: tls.VersionTLS13, ClientCAs: authorities,
			ClientAuth: tls.RequireAndVerifyClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return get(), nil
			},
		},
	}
}

// Server is for the listener of peers.
func (t *TLS) Server() *tls.Config { return t.server }
