package answers

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dunglas/httpsfv"
)

func TestParseControl(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		lines []string
		want  Control
	}{
		{nil, Control{}},
		{[]string{""}, Control{}},
		{[]string{"no-store"}, Control{NoStore: true}},
		{[]string{"No-Cache , ONLY-IF-CACHED"}, Control{NoCache: true, OnlyIfCached: true}},
		{[]string{"no-cache", "max-age=60"}, Control{NoCache: true, HasMaxAge: true, MaxAge: 60 * s}},
		{[]string{"max-age=0"}, Control{HasMaxAge: true}},
		{[]string{`max-age="5"`}, Control{HasMaxAge: true, MaxAge: 5 * s}},
		{[]string{"max-age=9, max-age=5", "max-age=7"}, Control{HasMaxAge: true, MaxAge: 5 * s}},
		{[]string{"max-age=99999999999999999999999"}, Control{HasMaxAge: true, MaxAge: 1 << 31 * s}},
		{[]string{"max-age, max-age=, max-age=-1, max-age=1.5, max-age=x, max-age = 3"}, Control{}},
		{[]string{"max-age=1 2, no-store"}, Control{NoStore: true}},
		{[]string{"max-stale"}, Control{MaxStale: Any, hasMaxStale: true}},
		{[]string{"max-stale=30,min-fresh=10"}, Control{MaxStale: 30 * s, hasMaxStale: true, MinFresh: 10 * s}},
		{[]string{"max-stale=0, max-stale=30"}, Control{hasMaxStale: true}},
		{[]string{"min-fresh, max-stale=x"}, Control{}},
		{[]string{`private="a, no-store", no-transform, x=y`}, Control{}},
		{[]string{`x="a\", no-store`, "no-cache"}, Control{NoCache: true}},
		{[]string{`;;; "no-store, a", no-cache`}, Control{NoCache: true}},
		{[]string{",, ,no-store,,"}, Control{NoStore: true}},
		{[]string{`no-cache="x"`}, Control{NoCache: true}},
	} {
		if got := ParseControl(http.Header{"Cache-Control": c.lines}); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.lines, got, c.want)
		}
	}
	pragma := http.Header{"Pragma": {"x, no-cache"}}
	if !ParseControl(pragma).NoCache {
		t.Error("Pragma is not read")
	}
	pragma.Set("Cache-Control", "max-age=5")
	if ParseControl(pragma).NoCache {
		t.Error("Pragma is read although there is a Cache-Control")
	}
	if ParseControl(http.Header{"Pragma": {"no-store"}}) != (Control{}) {
		t.Error("Pragma says more than it can")
	}
}

func TestTakes(t *testing.T) {
	const h = time.Hour
	for _, c := range []struct {
		control   string
		age, life time.Duration
		want      bool
	}{
		{"", h, 0, true},
		{"", h, 2 * h, true},
		{"", 3 * h, 2 * h, false},
		{"no-cache", 0, 0, false},
		{"no-store", 0, 0, false},
		{"max-age=3600", h, 0, true},
		{"max-age=3599", h, 0, false},
		{"max-age=0", time.Millisecond, 0, false},
		{"min-fresh=3600", h, 2 * h, true},
		{"min-fresh=3601", h, 2 * h, false},
		{"min-fresh=3601", h, 0, true},
		{"max-stale", 30 * h, 2 * h, true},
		{"max-stale=3600", 3 * h, 2 * h, true},
		{"max-stale=3599", 3 * h, 2 * h, false},
		{"max-stale, max-age=60", 3 * h, 2 * h, false},
		{"only-if-cached", h, 2 * h, true},
	} {
		got := ParseControl(http.Header{"Cache-Control": {c.control}}).Takes(c.age, c.life)
		if got != c.want {
			t.Errorf("%q, age %v of %v: %v", c.control, c.age, c.life, got)
		}
	}
}

// FuzzControl: what is read of two lines is what is read of both as one, as long as none of them
// breaks off in the middle of a string; and spaces and unknown directives change nothing.
func FuzzControl(f *testing.F) {
	f.Add("no-store, max-age=5", "no-cache")
	f.Add(`max-stale, x="a, \"no-store"`, `min-fresh=4,,`)
	f.Add(`a="`, `"=, only-if-cached`)
	f.Fuzz(func(t *testing.T, a, b string) {
		parse := func(lines ...string) Control { return ParseControl(http.Header{"Cache-Control": lines}) }
		two := parse(a, b)
		if strings.Count(a, `"`) == 0 {
			if one := parse(a + "," + b); one != two {
				t.Fatalf("%q and %q: %+v, in one line %+v", a, b, two, one)
			}
		}
		if other := parse("x=\"no-cache,\", no-transform ,\t"+a, b); other != two {
			t.Fatalf("%q and %q: %+v, after others %+v", a, b, two, other)
		}
		for _, d := range []time.Duration{two.MaxAge, two.MinFresh, two.MaxStale} {
			if d < 0 || d != Any && d%time.Second != 0 {
				t.Fatalf("%q and %q: %+v", a, b, two)
			}
		}
		if two.NoStore && !strings.Contains(strings.ToLower(a+b), "no-store") {
			t.Fatalf("%q and %q: %+v", a, b, two)
		}
	})
}

func TestStatus(t *testing.T) {
	for _, c := range []struct {
		status Status
		want   string
	}{
		{Status{Hit: true, TTL: 90 * time.Second}, "ollama-cacheproxy; hit; ttl=90"},
		{Status{Fwd: URIMiss, Stored: true}, "ollama-cacheproxy; fwd=uri-miss; stored"},
		{Status{Fwd: URIMiss, Collapsed: true}, "ollama-cacheproxy; fwd=uri-miss; collapsed"},
		{Status{Fwd: Partial, Detail: "990/1000"}, `ollama-cacheproxy; fwd=partial; detail="990/1000"`},
		{Status{Fwd: Request}, "ollama-cacheproxy; fwd=request"},
		{Status{Fwd: Bypass, FwdStatus: 200, Detail: `"a\"é`}, `ollama-cacheproxy; fwd=bypass; fwd-status=200; detail="\"a\\\"??"`},
		{Status{Fwd: Stale, TTL: -5 * time.Second}, "ollama-cacheproxy; fwd=stale; ttl=-5"},
	} {
		if got := c.status.String(); got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
		parsed(t, c.status, http.Header{})
		parsed(t, c.status, http.Header{"Cache-Status": {"Origin; hit, Edge; fwd=miss", `"a b"; fwd=stale; key="x"`}})
	}
}

// parsed reads a status with another implementation of structured fields.
func parsed(t *testing.T, s Status, h http.Header) {
	t.Helper()
	before, err := httpsfv.UnmarshalList(h["Cache-Status"])
	if err != nil && len(h) > 0 {
		t.Fatal(err)
	}
	s.Set(h)
	list, err := httpsfv.UnmarshalList(h["Cache-Status"])
	if err != nil {
		t.Fatalf("%q: %v", h["Cache-Status"], err)
	}
	if len(list) != len(before)+1 {
		t.Fatalf("%q: %d members", h["Cache-Status"], len(list))
	}
	item := list[len(list)-1].(httpsfv.Item)
	get := func(name string) any { v, _ := item.Params.Get(name); return v }
	want := map[string]any{"hit": nil, "fwd": nil, "ttl": nil, "stored": nil, "collapsed": nil, "detail": nil, "fwd-status": nil}
	if s.Hit {
		want["hit"] = true
	} else {
		want["fwd"] = httpsfv.Token(s.Fwd)
		for name, set := range map[string]bool{"stored": s.Stored, "collapsed": s.Collapsed} {
			if set {
				want[name] = true
			}
		}
		if s.FwdStatus != 0 {
			want["fwd-status"] = int64(s.FwdStatus)
		}
	}
	if s.TTL != 0 {
		want["ttl"] = int64(s.TTL.Seconds())
	}
	if s.Detail != "" {
		want["detail"] = strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return '?'
			}
			return r
		}, string(latin1(s.Detail)))
	}
	for name, v := range want {
		if get(name) != v {
			t.Errorf("%q: %s is %v, want %v", h["Cache-Status"], name, get(name), v)
		}
	}
	if item.Value != httpsfv.Token(CacheName) {
		t.Errorf("%v", item.Value)
	}
}

// latin1 takes each byte for a letter.
func latin1(s string) (out []rune) {
	for i := range len(s) {
		out = append(out, rune(s[i]))
	}
	return out
}

// FuzzStatus: every status can be read.
func FuzzStatus(f *testing.F) {
	f.Add(uint8(0), uint8(0), int32(5), `a"\`+"\x7f")
	f.Fuzz(func(t *testing.T, flags, fwd uint8, ttl int32, detail string) {
		parsed(t, Status{
			Hit: flags&1 > 0, Stored: flags&2 > 0, Collapsed: flags&4 > 0, FwdStatus: int(flags>>3) * 20,
			Fwd: []Forward{Bypass, Request, URIMiss, Partial, Stale}[fwd%5], TTL: time.Duration(ttl) * time.Second, Detail: detail,
		}, http.Header{})
	})
}

func TestSetAge(t *testing.T) {
	for _, c := range []struct {
		before string
		kept   time.Duration
		want   string
	}{{"", 1999 * time.Millisecond, "1"}, {"", -time.Second, "0"}, {"10", time.Minute, "70"}, {"x", time.Minute, "60"}} {
		h := http.Header{}
		if c.before != "" {
			h.Set("Age", c.before)
		}
		SetAge(h, c.kept)
		if got := fmt.Sprint(h["Age"]); got != "["+c.want+"]" {
			t.Errorf("%+v: %s", c, got)
		}
	}
}
