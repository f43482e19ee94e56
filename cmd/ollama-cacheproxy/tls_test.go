package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// authority issues certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.pem, a.cert = a.sign(a.cert, a.cert, key)
	return a
}

func (a *authority) sign(cert, parent *x509.Certificate, key *ecdsa.PrivateKey) ([]byte, *x509.Certificate) {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), cert
}

// issue returns a certificate for this machine's own names, with a serial number to recognise it
// by.
func (a *authority) issue(number int64) (cert, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, _ = a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(number), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, private)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (a *authority) write(dir string, number int64) (cert, key string) {
	a.t.Helper()
	c, k := a.issue(number)
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(os.WriteFile(cert, c, 0o600), os.WriteFile(key, k, 0o600)); err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// client trusts only this authority, and speaks HTTP/2 if h2.
func (a *authority) client(h2 bool) *http.Client {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	var protocols http.Protocols
	protocols.SetHTTP1(!h2)
	protocols.SetHTTP2(h2)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, Protocols: &protocols}
	a.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// startTLS runs the proxy with these flags at a free address, and returns that and its log.
func startTLS(t *testing.T, flags ...string) (listen string, log *syncBuffer) {
	t.Helper()
	listen, err := freeAddr()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	code := make(chan int, 1)
	log = &syncBuffer{}
	go func() { code <- run(ctx, append([]string{"--listen", listen}, flags...), io.Discard, log) }() // ends with stop
	t.Cleanup(func() {
		stop()
		if c := <-code; c != 0 {
			t.Errorf("exit status %d\n%s", c, log)
		}
	})
	waitFor(t, func() bool { return strings.Contains(log.String(), `"msg":"ready"`) })
	return listen, log
}

// TestTLSFlags: flags that contradict each other are refused, with the reason.
func TestTLSFlags(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 2)
	_, other := a.write(t.TempDir(), 3)
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		flags []string
		want  string
	}{
		{[]string{"--tls-cert", cert}, "go together"},
		{[]string{"--tls-key", key}, "go together"},
		{[]string{"--tls-cert", cert, "--tls-key", other}, "private key does not match"},
		{[]string{"--tls-cert", text, "--tls-key", key}, "failed to find any PEM data"},
		{[]string{"--tls-cert", dir + "/none", "--tls-key", key}, "no such file"},
		{[]string{"--upstream-ca", text}, "there is no certificate in it"},
		{[]string{"--upstream-ca", dir + "/none"}, "no such file"},
	} {
		out := &syncBuffer{}
		if code := run(t.Context(), append([]string{"--check"}, tt.flags...), out, out); code != 2 || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%v: status %d, want 2 and %q\n%s", tt.flags, code, tt.want, out)
		}
	}
}

// slowStream is an upstream that sends its answers in pieces, when the test provides them.
func slowStream(t *testing.T, pieces <-chan string) *httptest.Server {
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			stubOllama(w, r)
			return
		}
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		for {
			select {
			case piece, ok := <-pieces:
				if !ok {
					return
				}
				io.WriteString(w, piece)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(up.Close)
	return up
}

// TestTLSRotates: a stream over HTTP/2 arrives in pieces, and continues while the certificate is
// replaced. New connections get the new one, and a mismatched pair changes nothing.
func TestTLSRotates(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 100)
	pieces := make(chan string)
	listen, log := startTLS(t, "--tls-cert", cert, "--tls-key", key, "--upstream", slowStream(t, pieces).URL)
	if !strings.Contains(log.String(), `"listen":"https://`+listen) {
		t.Errorf("https is not announced: %s", log)
	}
	for _, h2 := range []bool{true, false} {
		res, err := a.client(h2).Get("https://" + listen + "/api/version")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if got := res.ProtoMajor == 2; got != h2 || res.StatusCode != 200 {
			t.Errorf("%s, %s, want HTTP/2 %v", res.Proto, res.Status, h2)
		}
	}
	res, err := a.client(true).Post("https://"+listen+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"a","stream":true,"messages":[{"role":"user","content":"x"}]}`))
	if err != nil || res.ProtoMajor != 2 {
		t.Fatal(res, err)
	}
	defer res.Body.Close()
	read := bufio.NewReader(res.Body)
	next := func(want string) {
		t.Helper()
		line, err := read.ReadString('\n')
		blank, _ := read.ReadString('\n')
		if err != nil || line+blank != "data: "+want+"\n\n" {
			t.Fatalf("%q %q, %v", line, blank, err)
		}
	}
	pieces <- "data: one\n\n"
	next("one")
	serial := func() string {
		res, err := a.client(true).Get("https://" + listen + "/_cacheproxy/health")
		if err != nil {
			return err.Error()
		}
		res.Body.Close()
		return res.TLS.PeerCertificates[0].SerialNumber.String()
	}
	if got := serial(); got != "100" {
		t.Fatal(got)
	}
	// Only the certificate is replaced. It does not match the key, so the previous one stays.
	newCert, newKey := a.issue(200)
	if err := os.WriteFile(cert, newCert, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return strings.Contains(log.String(), "that from before stays") })
	if got := serial(); got != "100" {
		t.Error(got)
	}
	if err := os.WriteFile(key, newKey, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return serial() == "200" })
	pieces <- "data: two\n\n" // on the old connection
	next("two")
	close(pieces)
	if rest, err := io.ReadAll(read); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

// TestHeartbeatHTTP2: over HTTP/2, too, a waiting stream begins with comments, and one whose
// upstream breaks off ends with an error instead of looking complete; the same over HTTP/1.0 with
// TLS.
func TestHeartbeatHTTP2(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 2)
	pieces := make(chan string)
	listen, _ := startTLS(t, "--tls-cert", cert, "--tls-key", key, "--upstream", slowStream(t, pieces).URL, "--heartbeat", "1s", "--slots", "1")
	post := func() *http.Response {
		t.Helper()
		res, err := a.client(true).Post("https://"+listen+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"a","stream":true,"messages":[{"role":"user","content":"x"}]}`))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { res.Body.Close() })
		return res
	}
	first := post()
	// Its header comes with the first heartbeat, since it waits for the first request's lane.
	second := post()
	if second.ProtoMajor != 2 || second.StatusCode != 200 {
		t.Fatal(second)
	}
	read := bufio.NewReader(second.Body)
	if line, err := read.ReadString('\n'); err != nil || line != ": waiting\n" {
		t.Fatalf("%q, %v", line, err)
	}
	first.Body.Close() // frees the lane
	// It ends with the test; the first request's upstream may take a piece before it notices.
	go func() {
		for {
			select {
			case pieces <- "data: two\n\n":
			case <-t.Context().Done():
				return
			}
		}
	}()
	for line := ""; line != "data: two\n"; {
		var err error
		if line, err = read.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBrokenOverTLS: an answer that breaks off does not look complete.
func TestBrokenOverTLS(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/broken" {
			stubOllama(w, r)
			return
		}
		io.WriteString(w, "a part")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(up.Close)
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 2)
	listen, _ := startTLS(t, "--tls-cert", cert, "--tls-key", key, "--upstream", up.URL)
	for _, h2 := range []bool{true, false} {
		res, err := a.client(h2).Get("https://" + listen + "/broken")
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("HTTP/2 %v: %q looks whole", h2, text)
		}
		res.Body.Close()
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	conn, err := tls.Dial("tcp", listen, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /broken HTTP/1.0\r\nHost: localhost\r\n\r\n")
	if text, err := io.ReadAll(conn); err == nil {
		t.Errorf("HTTP/1.0: %q looks whole", text)
	}
}

// TestUpstreamCA: an https upstream is polled and used if --upstream-ca has its issuer, and not
// without that.
func TestUpstreamCA(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	certFile, keyFile := a.write(dir, 2)
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	up := httptest.NewUnstartedServer(http.HandlerFunc(stubOllama))
	up.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	up.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	up.StartTLS()
	t.Cleanup(up.Close)
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, a.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		flags []string
		code  int
		want  string
	}{
		{nil, 1, "x509: certificate signed by unknown authority"},
		{[]string{"--upstream-ca", ca}, 0, "Ollama 0.34.1, 2 models"},
	} {
		out := &syncBuffer{}
		if code := run(t.Context(), append([]string{"--check", "--listen", "127.0.0.1:0", "--upstream", up.URL}, tt.flags...), out, out); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%v: status %d, want %d and %q\n%s", tt.flags, code, tt.code, tt.want, out)
		}
	}
	// The other verbs that ask servers trust it by --ca.
	secure, _ := startTLS(t, "--upstream", up.URL, "--upstream-ca", ca, "--tls-cert", certFile, "--tls-key", keyFile)
	for _, tt := range []struct {
		flags []string
		code  int
	}{{nil, statusUnasked}, {[]string{"--ca", ca}, 0}} {
		out := &syncBuffer{}
		if code := run(t.Context(), append([]string{"doctor", "--proxy", "https://" + secure}, tt.flags...), out, out); code != tt.code {
			t.Errorf("doctor %v: status %d, want %d\n%s", tt.flags, code, tt.code, out)
		}
	}
	listen, _ := startTLS(t, "--upstream", up.URL, "--upstream-ca", ca)
	res, err := http.Post("http://"+listen+"/api/chat", "application/json", strings.NewReader(`{"model":"a"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if text, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(text), `"model":"a"`) {
		t.Errorf("%q, %v", text, err)
	}
}

// TestCertFile: a pair of files is used once both match, whichever changes first.
func TestCertFile(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 1000)
	f, err := readCert("--tls-cert", cert, "--tls-key", key)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { // ends with stop
			defer close(done)
			watchFiles(ctx, nil, slog.New(slog.NewTextHandler(&log, nil)), f)
		}()
		step := func(what string, serial int64, level string, change func() error) {
			t.Helper()
			before := log.String()
			if err := change(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(filesEvery + 1)
			synctest.Wait()
			lines := strings.TrimPrefix(log.String(), before)
			if got := f.pair.Load().Leaf.SerialNumber.Int64(); got != serial || !strings.Contains(lines, level) || level == "" && lines != "" {
				t.Errorf("%s: certificate %d, want %d and %q:\n%s", what, got, serial, level, lines)
			}
		}
		c, k := a.issue(2000)
		step("nothing", 1000, "", func() error { return nil })
		step("the key first", 1000, "ERROR", func() error { return os.WriteFile(key, k, 0o600) })
		step("no change", 1000, "", func() error { return nil })
		step("then the certificate", 2000, "INFO", func() error { return os.WriteFile(cert, c, 0o600) })
		step("one is removed", 2000, "ERROR", func() error { return os.Remove(key) })
		step("and is there again", 2000, "INFO", func() error { return os.WriteFile(key, k, 0o600) })
		stop()
		<-done
	})
}

// TestRefusedOverHTTP2: a refusal does not wait for a body that never arrives. (TestHTTPS in
// package integration checks with curl that it does not interrupt a body that does arrive.)
func TestRefusedOverHTTP2(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	cert, key := a.write(dir, 2)
	keys := filepath.Join(dir, "keys.txt")
	if err := os.WriteFile(keys, []byte("one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	t.Cleanup(up.Close)
	listen, _ := startTLS(t, "--tls-cert", cert, "--tls-key", key, "--api-keys-file", keys, "--upstream", up.URL)
	body, write := io.Pipe()
	defer write.Close()
	res, err := a.client(true).Post("https://"+listen+"/api/chat", "application/json", body)
	if err != nil || res.StatusCode != http.StatusUnauthorized || res.ProtoMajor != 2 {
		t.Fatal(res, err)
	}
	defer res.Body.Close()
	if text, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(text), "a valid API key is needed") {
		t.Errorf("%q, %v", text, err)
	}
}
