package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
)

// secretFile writes a secret for peers.
func secretFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// freeAddrs returns so many addresses at which nobody listens.
func freeAddrs(t *testing.T, n int) (addrs []string) {
	t.Helper()
	for range n {
		addr, err := freeAddr()
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// twoSay starts two proxies in front of one server, with some flags beside those, and fails unless
// the log of each says one of some words within half a minute.
func twoSay(t *testing.T, words []string, flags func(i int) []string) {
	t.Helper()
	ollama := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer ollama.Close()
	secret := secretFile(t)
	ctx, stop := context.WithCancel(t.Context())
	var logs [2]syncBuffer
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	for i := range logs {
		args := append([]string{
			"--listen", "127.0.0.1:0", "--upstream", "a=" + ollama.URL, "--peer-secret-file", secret,
		}, flags(i)...)
		running.Go(func() { run(ctx, args, &logs[i], &logs[i]) })
	}
	for i := range logs {
		if !within30s(ctx, func() bool {
			said := logs[i].String()
			return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(said, w) })
		}) {
			t.Errorf("proxy %d does not say any of %q:\n%s", i, words, logs[i].String())
		}
	}
}

// TestGossipFound: two proxies that know each other by gossip alone find each other. (Reading their
// settings must not take the address for gossip, which they listen at afterwards.)
func TestGossipFound(t *testing.T) {
	at := freeAddrs(t, 4)
	twoSay(t, []string{"peer found", "peer is back"}, func(i int) []string {
		return []string{"--peers", "gossip:" + at[0], "--gossip-listen", at[i], "--peer-listen", at[2+i]}
	})
}

// TestPeerNames: proxies that are called the same say so, as long as both run. By default those at other
// addresses are not.
func TestPeerNames(t *testing.T) {
	at := freeAddrs(t, 2)
	twoSay(t, []string{"has this proxy's name"}, func(i int) []string {
		return []string{
			"--peers", at[0], "--peers", at[1], "--peer-listen", at[i], "--peer-name", "twin",
		}
	})

	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"": own, "0.0.0.0": own, "::": own, "127.0.0.1": own, "::1": own,
		"127.0.0.2": "127.0.0.2", "10.0.0.7": "10.0.0.7", "gpu-1": "gpu-1",
	} {
		if got := defaultPeerName(host, "1"); got != want+":1" {
			t.Errorf("at %q it is called %q, want %s:1", host, got, want)
		}
	}
}

// TestPeerCertificate: what another proxy's certificate may be for, if --peers says dns:peers.example:1
// and that has the address 127.0.0.1.
func TestPeerCertificate(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	pool := x509.NewCertPool()
	pool.AddCert(ours.cert)
	for _, c := range []struct {
		name string
		by   *authority
		dns  []string
		ips  []net.IP
		ends time.Duration // from now
		want string        // of the error; "" for none
	}{
		{"the name that is looked up", ours, []string{"peers.example"}, nil, time.Hour, ""},
		{"all names below that one's domain", ours, []string{"*.example"}, nil, time.Hour, ""},
		{"the address", ours, nil, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Hour, ""},
		{"another name", ours, []string{"peer.example"}, nil, time.Hour, ", nor for other.example, nor for peers.example"},
		{"another address", ours, nil, []net.IP{net.IPv4(127, 0, 0, 2)}, time.Hour, "not 127.0.0.1, nor for other.example"},
		{"of another authority", theirs, []string{"peers.example"}, nil, time.Hour, "unknown authority"},
		{"expired", ours, []string{"peers.example"}, nil, -time.Minute, "expired"},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		_, cert := c.by.sign(&x509.Certificate{
			SerialNumber: big.NewInt(2), DNSNames: c.dns, IPAddresses: c.ips,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(c.ends),
		}, c.by.cert, key)
		pair := &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
		peer := httptest.NewUnstartedServer(http.HandlerFunc(stubOllama))
		peer.TLS = fleet.NewTLS(func() *tls.Certificate { return pair }, pool).Server()
		peer.TLS.Certificates = []tls.Certificate{*pair} // otherwise httptest would show its own
		peer.TLS.ClientAuth = tls.NoClientCert           // this is about the other direction
		peer.Config.ErrorLog = log.New(io.Discard, "", 0)
		peer.StartTLS()
		set := fleetSettings{
			name: "me", hosts: []string{"other.example", "peers.example"},
			tls: fleet.NewTLS(func() *tls.Certificate { return pair }, pool),
		}
		transport := set.config().Transport
		res, err := (&http.Client{Transport: transport}).Get(peer.URL + "/api/version")
		if err == nil {
			res.Body.Close()
		}
		if got := fmt.Sprint(err); err == nil != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok != (err != nil) {
			t.Errorf("%s: the error is %T, and its explanation will be missing", c.name, err)
		}
		transport.CloseIdleConnections()
		peer.Close()
	}
}

// TestInnerAlone: the proxy within another verb is none of the fleet that the environment configures
// for the proxy which runs all the time, such as in a container where both are started.
func TestInnerAlone(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer ollama.Close()
	at := freeAddrs(t, 2)
	t.Setenv("OLLAMA_CACHEPROXY_PEERS", at[0])
	t.Setenv("OLLAMA_CACHEPROXY_PEER_LISTEN", at[1])
	t.Setenv("OLLAMA_CACHEPROXY_PEER_SECRET_FILE", secretFile(t))
	t.Setenv("OLLAMA_CACHEPROXY_OWN", "gpu")
	server, stop, err := runInner(t.Context(), &console{io.Discard, io.Discard},
		[]string{"--upstream", ollama.URL}, nil, environment)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	res, err := http.Get(server.String() + pathFleet)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusNotFound {
		t.Errorf("%s is answered %d: it is one of a fleet", pathFleet, res.StatusCode)
	}
}

// TestCheckFleet: --check says what the settings about other proxies mean, and which of these answer.
func TestCheckFleet(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer ollama.Close()
	dir := t.TempDir()
	secret, other := filepath.Join(dir, "secret"), filepath.Join(dir, "other")
	for _, path := range []string{secret, other} {
		if err := os.WriteFile(path, []byte(path+"-0123456789abcdef"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := fleet.New(fleet.Config{
		Name: "the-other", Secret: []byte(secret + "-0123456789abcdef"),
		Local: func() []fleet.Server { return nil },
	})
	var running sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	running.Go(func() { f.Run(ctx) })
	defer running.Wait()
	defer stop()
	peer := httptest.NewServer(f.Handler(http.NotFoundHandler()))
	defer peer.Close()
	defer peer.CloseClientConnections()
	at := strings.TrimPrefix(peer.URL, "http://")
	own := freeAddrs(t, 1)[0]
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	// fleetArgs are the flags of a proxy of the fleet, but for what it listens at.
	fleetArgs := []string{"--peers", at, "--peer-name", "me"}
	for _, c := range []struct {
		args []string
		exit int
		want []string
	}{
		{nil, 0, []string{"fleet       none: this proxy works alone"}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", secret, "--own", "gpu", "--peers", own), 0,
			[]string{"fleet       this proxy is me, others reach it at " + own, "it schedules gpu", at + ": the-other answers", own + ": this proxy's own address"}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", other, "--peers", "127.0.0.1:1"), 0,
			[]string{"127.0.0.1:1: does not answer", at + ": it answers 403", "--peer-secret-file"}},
		{[]string{"--peers", own, "--peer-listen", own, "--peer-secret-file", secret}, 0,
			[]string{"no other proxy is found"}},
		{[]string{"--peers", "dns:nobody.invalid:1?resolver=127.0.0.1:1", "--peer-listen", own, "--peer-secret-file", secret}, 0,
			[]string{"dns:nobody.invalid:1?resolver=127.0.0.1:1: nothing is found: "}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", secret, "--peer-name", "the-other"), 0,
			[]string{"which has this proxy's name"}},
		{append(fleetArgs, "--peer-listen", taken.Addr().String(), "--peer-secret-file", secret), 1,
			[]string{"could not listen at --peer-listen " + taken.Addr().String()}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", secret, "--peers", "gossip:"+own, "--gossip-listen", taken.Addr().String()), 1,
			[]string{"could not listen at --gossip-listen " + taken.Addr().String()}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", secret, "--listen", own), 2,
			[]string{"--peer-listen " + own + " is the address of --listen"}},
		{append(fleetArgs, "--peer-listen", own, "--peer-secret-file", secret, "--peers", "gossip:"+own, "--gossip-listen", own), 2,
			[]string{"is the address of --peer-listen"}},
		{append(fleetArgs, "--peer-listen", own, "--peer-cert", secret, "--peer-key", secret, "--peer-ca", secret), 2,
			[]string{"--peer-cert " + secret}},
	} {
		var out syncBuffer
		args := append([]string{"--check", "--listen", "127.0.0.1:0", "--upstream", "gpu=" + ollama.URL}, c.args...)
		if got := run(t.Context(), args, &out, &out); got != c.exit {
			t.Errorf("--check %v exits with %d, want %d", c.args, got, c.exit)
		}
		for _, want := range c.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("--check %v does not say %q:\n%s", c.args, want, out.String())
			}
		}
	}
}
