package proxy

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

func trusting(t testing.TB, list ...string) *TrustedProxies {
	t.Helper()
	trusted, err := ParseTrustedProxies(list)
	if err != nil {
		t.Fatal(err)
	}
	return trusted
}

// askedBy is a request from an address.
func askedBy(peer string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/api/chat", nil)
	r.RemoteAddr = peer
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	return r
}

// TestForwardedClient: a trusted proxy names the client, and no one else can. If its headers cannot
// be parsed, or contradict each other, the connection's address counts.
func TestForwardedClient(t *testing.T) {
	trusted := trusting(t, "10.0.0.0/8", " 127.0.0.1", "fd00::/8", "::1", "fe80::9%eth0")
	for _, c := range []struct {
		peer    string
		headers []string
		want    string
	}{
		{"10.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7"}, "192.0.2.7"},
		{"127.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7"}, "192.0.2.7"},
		{"[fd00::1]:99", []string{"X-Forwarded-For: 192.0.2.7"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7, 10.0.0.2,fd00::9"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 198.51.100.1, 192.0.2.7"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 192.0.2.7"},
			"192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: junk, 192.0.2.7"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 2001:db8::1"}, "2001:db8::1"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: ::ffff:192.0.2.7"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7:1234"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: fe80::1%anything"}, "fe80::1"},
		{"10.0.0.1:99", []string{"Forwarded: for=192.0.2.7"}, "192.0.2.7"},
		{"10.0.0.1:99", []string{`Forwarded: For="[2001:db8::1]:4711";proto=http;by=10.0.0.1`}, "2001:db8::1"},
		{"10.0.0.1:99", []string{`Forwarded: for=198.51.100.1, proto=https;for="192.0.2.7:80", for=10.0.0.3`},
			"192.0.2.7"},
		{"10.0.0.1:99", []string{"Forwarded: for=192.0.2.7", "X-Forwarded-For: 192.0.2.7"}, "192.0.2.7"},

		{"[fe80::9%eth0]:99", []string{"X-Forwarded-For: 192.0.2.7"}, "192.0.2.7"},
		{"[fe80::9%eth0]:99", []string{"X-Forwarded-For: 192.0.2.7, fe80::9%eth1"}, "192.0.2.7"},

		{"10.0.0.1:99", nil, "10.0.0.1"},
		{"[fe80::8%eth0]:99", []string{"X-Forwarded-For: 192.0.2.7"}, "fe80::8%eth0"},
		{"10.0.0.1:99", []string{"Forwarded: for=192.0.2.8", "X-Forwarded-For: 192.0.2.7"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: "}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7, junk"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 192.0.2.7, 0.0.0.0"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"X-Forwarded-For: 10.0.0.2"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"Forwarded: for=unknown"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"Forwarded: for=_hidden"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{`Forwarded: for="192.0.2.7`}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"Forwarded: proto=http"}, "10.0.0.1"},
		{"10.0.0.1:99", []string{"X-Real-IP: 192.0.2.7"}, "10.0.0.1"},

		{"192.0.2.1:99", []string{"X-Forwarded-For: 192.0.2.7"}, "192.0.2.1"},
		{"192.0.2.1:99", []string{"Forwarded: for=192.0.2.7"}, "192.0.2.1"},
		{"192.0.2.1:99", []string{headerUser + ": 1"}, "192.0.2.1"},
		{"[::2]:99", []string{"X-Forwarded-For: 192.0.2.7"}, "::2"},
		{"pipe", []string{"X-Forwarded-For: 192.0.2.7"}, "pipe"},
	} {
		r := askedBy(c.peer, c.headers...)
		if got := trusted.clientOf(r, ""); got != c.want {
			t.Errorf("%s, %q: %s, want %s", c.peer, c.headers, got, c.want)
		}
		if got := trusted.clientOf(r, "key"); got != "key" {
			t.Errorf("%s, %q, with a key: %s", c.peer, c.headers, got)
		}
		peer := (*TrustedProxies)(nil).clientOf(askedBy(c.peer), "")
		if got := (*TrustedProxies)(nil).clientOf(r, ""); got != peer {
			t.Errorf("%s, %q: %s, although nobody is trusted", c.peer, c.headers, got)
		}
	}
}

// TestForwardedUser: a trusted proxy can name its users; an untrusted one behind it cannot.
func TestForwardedUser(t *testing.T) {
	trusted := trusting(t, "10.0.0.1")
	who := func(peer string, headers ...string) string {
		return trusted.clientOf(askedBy(peer, headers...), "")
	}
	ann, bob := who("10.0.0.1:1", headerUser+": ann"), who("10.0.0.1:1", headerUser+": bob")
	if ann == bob || ann == "10.0.0.1" || ann != who("10.0.0.1:2", headerUser+": ann") {
		t.Errorf("two users are %q and %q", ann, bob)
	}
	if strings.Contains(ann, "ann") {
		t.Errorf("the name is in %q", ann)
	}
	if got := who("10.0.0.1:1", headerUser+": ann", "X-Forwarded-For: 192.0.2.7"); got != "192.0.2.7" {
		t.Errorf("behind a front: %s", got)
	}
	for _, forwarded := range []string{"X-Forwarded-For: junk", "Forwarded: for=unknown"} {
		if got := who("10.0.0.1:1", headerUser+": ann", forwarded); got != "10.0.0.1" {
			t.Errorf("behind a front, %s: %s", forwarded, got)
		}
	}
}

// TestForwardedIsNoKey: the headers of a trusted proxy neither admit nor exclude a client.
func TestForwardedIsNoKey(t *testing.T) {
	const forwarded = "X-Forwarded-For: 127.0.0.1"
	trusted := trusting(t, "127.0.0.1", "10.0.0.1")
	h := &Handler{Trusted: trusted, Guard: withKeys(t, "one")}
	rg := newRig(t, newFake(t, nil).URL, h)
	res, _ := rg.do(http.MethodGet, "/api/version", "", forwarded, headerUser+": ann")
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a key: %d", res.StatusCode)
	}
	open := &Handler{Trusted: trusted}
	rg = newRig(t, newFake(t, nil).URL, open)
	for _, header := range []string{"Host: evil.example", "Origin: http://evil.example"} {
		res, _ := rg.do(http.MethodGet, "/api/version", "", forwarded, header)
		if res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %d", header, res.StatusCode)
		}
	}
}

// FuzzForwarded: whatever the headers contain, the client is the connection, or an address that is
// not a trusted proxy's; and only the part that a trusted proxy adds at the end counts.
func FuzzForwarded(f *testing.F) {
	f.Add("192.0.2.7", "")
	f.Add("192.0.2.7, 10.0.0.2", `for="[2001:db8::1]:4711";proto=http`)
	f.Add("::ffff:10.0.0.1,fe80::1%eth0", `for="a, for=192.0.2.7"`)
	f.Add(",,", `for="`)
	f.Fuzz(func(t *testing.T, xff, forwarded string) {
		const peer = "10.0.0.1"
		trusted := trusting(t, "10.0.0.0/8", "fd00::/8")
		who := func(xff, forwarded []string) string {
			r := askedBy(peer + ":99")
			r.Header["X-Forwarded-For"], r.Header["Forwarded"] = xff, forwarded
			return trusted.clientOf(r, "")
		}
		for _, got := range []string{
			who([]string{xff}, nil), who(nil, []string{forwarded}), who([]string{xff}, []string{forwarded}),
		} {
			addr, err := netip.ParseAddr(got)
			if err != nil || addr.Zone() != "" || got != peer && trusted.trusts(got) {
				t.Errorf("%q, %q: %q", xff, forwarded, got)
			}
			// The header may spell the address differently than it is reported.
			if said := xff + forwarded; addr.Is4() && got != peer && !strings.Contains(said, got) &&
				!strings.Contains(said, ":") {
				t.Errorf("%q, %q: %q is in neither", xff, forwarded, got)
			}
		}
		for _, got := range []string{
			who([]string{xff + ", 192.0.2.9"}, nil), who([]string{xff, "192.0.2.9, 10.9.9.9"}, nil),
			who(nil, []string{forwarded, "for=192.0.2.9;proto=https"}),
			who(nil, []string{forwarded + `, for="192.0.2.9:80"`}),
			who([]string{xff, "192.0.2.9"}, []string{forwarded, "for=192.0.2.9"}),
		} {
			if got != "192.0.2.9" {
				t.Errorf("%q, %q: %q in place of what the front has added", xff, forwarded, got)
			}
		}
	})
}

// whoIn reads the client from a body.
func whoIn(t testing.TB, body string, headers ...string) (program, flow uint64) {
	t.Helper()
	f, err := scan([]byte(body), nil)
	if err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	ex := &exchange{fields: f, chain: &prefix.Chain{Opening: 7}}
	r := askedBy("192.0.2.1:99", headers...)
	return programOf(r, ex), flowOf(r, ex)
}

// TestNamesInBodies: users and conversations that bodies name are separate flows within one
// program.
func TestNamesInBodies(t *testing.T) {
	one, nobody := whoIn(t, `{}`)
	flows := []uint64{nobody}
	for _, body := range []string{
		`{"user":"ann"}`, `{"user":"bob"}`, `{"safety_identifier":"ann"}`,
		`{"metadata":{"user_id":"ann"}}`, `{"metadata":{"user_id":"bob"}}`,
		`{"user":"ann","metadata":{"user_id":"ann"}}`,
		`{"prompt_cache_key":"one"}`, `{"prompt_cache_key":"two"}`, `{"prompt_cache_key":"one","user":"ann"}`,
	} {
		program, flow := whoIn(t, body)
		if slices.Contains(flows, flow) || program != one {
			t.Errorf("%s is somebody else's flow, or another program's", body)
		}
		flows = append(flows, flow)
	}
	for _, same := range [][2]string{
		{`{"user":"ann"}`, `{"model":"m", "USER": "ann", "messages":[{"user":"bob"}]}`},
		{`{"user":"ann"}`, `{"user":"bob","user":"ann"}`},
		{`{}`, `{"user":""}`},
		{`{}`, `{"user":null}`},
		{`{}`, `{"user":7}`},
		{`{}`, `{"user":["ann"]}`},
		{`{}`, `{"metadata":"ann"}`},
		{`{}`, `{"metadata":{"x":{"user_id":"ann"}}}`},
		{`{}`, `{"metadata":{"user_id":"ann"},"metadata":null}`},
		{`{}`, `{"metadata":{"user_id":"` + strings.Repeat("x", metadataMost) + `"}}`},
		{`{"metadata":{"user_id":"ann"}}`, `{"metadata":{"x":[{}],"user_id":"bob","User_Id":"ann"}}`},
	} {
		_, a := whoIn(t, same[0])
		if _, b := whoIn(t, same[1]); a != b {
			t.Errorf("%s and %s are two", same[0], same[1])
		}
	}
	_, chat := whoIn(t, `{"prompt_cache_key":"one"}`, headerChat+": a")
	if _, again := whoIn(t, `{"user":"ann"}`, headerChat+": a"); chat != again || slices.Contains(flows, chat) {
		t.Errorf("one chat is %x and %x", chat, again)
	}
	ann, _ := whoIn(t, `{}`, headerUser+": ann")
	if bob, _ := whoIn(t, `{}`, headerUser+": bob"); ann == bob || ann == one {
		t.Errorf("two users of Open WebUI are %x and %x", ann, bob)
	}
}

// FuzzNames: reading the client from a body never fails, and does not depend on the rest of the
// body.
func FuzzNames(f *testing.F) {
	for _, body := range []string{
		`{"user":"ann"}`, `{"metadata":{"user_id":"ann","user_id":null}}`, `{"metadata":{"a":[{"b":"}"}]}}`,
		`{"prompt_cache_key":"\u0061"}`, `{"safety_identifier":"","user":{}}`, `{"metadata":{}}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		found, err := scan(data, nil)
		if err != nil || found.empty {
			return
		}
		rest := append([]byte(`{"model":"m","messages":[{"user":"x"}],`), data[found.open:]...)
		if again, err := scan(rest, nil); err != nil || again.names != found.names {
			t.Errorf("%s: %v, beside other members %v (%v)", data, found.names, again.names, err)
		}
	})
}
