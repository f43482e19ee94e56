package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// certFile is --tls-cert with --tls-key: the certificate that clients see.
type certFile struct {
	cert, key settingsFile
	pair      atomic.Pointer[tls.Certificate]
}

// readCert reads the files of two flags for the first time; nil without them.
func readCert(certFlag, cert, keyFlag, key string) (*certFile, error) {
	if cert == "" && key == "" {
		return nil, nil
	}
	if cert == "" || key == "" {
		return nil, fmt.Errorf("%s and %s go together: give both files", certFlag, keyFlag)
	}
	f := &certFile{cert: settingsFile{path: cert}, key: settingsFile{path: key}}
	if err := f.read(); err != nil {
		return nil, fmt.Errorf("%s %s, %s %s: %w", certFlag, cert, keyFlag, key, err)
	}
	return f, nil
}

// read reads the files, and uses them if they belong together.
func (f *certFile) read() error {
	var text, key string
	take := func(into *string) func(string) error {
		return func(s string) error { *into = s; return nil }
	}
	if err := errors.Join(f.cert.again(take(&text)), f.key.again(take(&key))); err != nil {
		return err
	}
	pair, err := tls.X509KeyPair([]byte(text), []byte(key))
	if err != nil {
		return err
	}
	f.pair.Store(&pair)
	return nil
}

func (f *certFile) due() bool {
	cert, key := f.cert.due(), f.key.due()
	return cert || key
}

// reload reads both files again. If they do not match, for instance because only one has been
// replaced yet, the previous certificate stays. Open connections keep the one that they began with.
func (f *certFile) reload(logger *slog.Logger) {
	if err := f.read(); err != nil {
		logger.Error("the certificate could not be read again: that from before stays",
			"file", f.cert.path, "key", f.key.path, "err", err)
		return
	}
	leaf := f.pair.Load().Leaf
	logger.Info("certificate read again", "file", f.cert.path, "names", leaf.DNSNames, "until", leaf.NotAfter)
}

// warn logs if the certificate is not valid now.
func (f *certFile) warn(logger *slog.Logger) {
	leaf, now := f.pair.Load().Leaf, time.Now()
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		logger.Warn("clients will not believe the certificate: it is not valid now",
			"file", f.cert.path, "from", leaf.NotBefore, "until", leaf.NotAfter)
	}
}

// serve serves clients, with TLS if there is a certificate.
func (set settings) serve(srv *http.Server, ln net.Listener) error {
	if set.cert == nil {
		return srv.Serve(ln)
	}
	srv.Handler = takesRest(srv.Handler)
	srv.TLSConfig = &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return set.cert.pair.Load(), nil
		},
	}
	return srv.ServeTLS(ln, "", "")
}

const (
	restMost = 256 << 10 // bytes, as many as net/http takes over HTTP/1.1
	restWait = time.Second
)

// takesRest reads the rest of a request's body after its answer, which net/http does only over
// HTTP/1.1. Over HTTP/2 it resets the stream instead, and curl 7 then loses the answer: a refusal,
// which is sent before the body has been read.
func takesRest(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r)
		if r.ProtoMajor == 2 && r.Body != nil {
			// Too slow a rest is reset after all.
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(restWait))
			io.CopyN(io.Discard, r.Body, restMost)
		}
	})
}

// scheme is the scheme of the proxy's URL for clients.
func (set settings) scheme() string {
	if set.cert == nil {
		return "http"
	}
	return "https"
}

// newTransport returns the transport to servers; for ca, see certificates.
func newTransport(ca string) (*http.Transport, error) {
	t := proxy.NewTransport()
	var err error
	if t.TLSClientConfig, err = certificates("--ca", ca); err != nil {
		return nil, err
	}
	return t, nil
}

// certificates configures the trust in https upstreams: their certificates must be valid for the
// system, or issued by one of the authorities in the file. nil without a file.
func certificates(flag, path string) (*tls.Config, error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // this system has none
	}
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s %s: there is no certificate in it: want PEM, which begins with -----BEGIN CERTIFICATE-----", flag, path)
	}
	return &tls.Config{RootCAs: roots}, nil
}
