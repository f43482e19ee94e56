package jsonscan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

type span struct{ key, value string }

func members(text []byte) ([]span, int, error) {
	var got []span
	o := NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		got = append(got, span{string(text[m.Key:m.KeyEnd]), string(text[m.Value:m.ValueEnd])})
	}
	return got, o.End(), o.Err()
}

func TestMembers(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []span
		end  int // offset past the closing brace
	}{
		{`{}`, nil, 2},
		{" \n{ } trailing", nil, 5},
		{`{"a":1}{"b":2}`, []span{{`"a"`, `1`}}, 7},
		{`{"a" : [1,{"b":"}"}] , "a":null}`, []span{{`"a"`, `[1,{"b":"}"}]`}, {`"a"`, `null`}}, 32},
		{`{"k\u0065y":-0.5e+10,"s":"a\"b\\"}`, []span{{`"k\u0065y"`, `-0.5e+10`}, {`"s"`, `"a\"b\\"`}}, 34},
	} {
		got, end, err := members([]byte(tc.in))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tc.want) || end != tc.end {
			t.Errorf("%s: got %v, end %d, %v; want %v, end %d", tc.in, got, end, err, tc.want, tc.end)
		}
	}
}

func TestInvalid(t *testing.T) {
	for in, want := range map[string]error{
		"":                     ErrSyntax,
		" ":                    ErrSyntax,
		"null":                 ErrNotObject,
		"[]":                   ErrNotObject,
		`"x"`:                  ErrNotObject,
		"\xef\xbb\xbf{}":       ErrNotObject, // a byte order mark
		"{\x00\"\x00a\x00":     ErrSyntax,    // UTF-16
		`{"a":1`:               ErrSyntax,
		`{"a":1,}`:             ErrSyntax,
		`{,}`:                  ErrSyntax,
		`{"a" 1}`:              ErrSyntax,
		`{"a":}`:               ErrSyntax,
		`{"a":01}`:             ErrSyntax,
		`{"a":1.}`:             ErrSyntax,
		`{"a":-}`:              ErrSyntax,
		`{"a":1e}`:             ErrSyntax,
		`{"a":tru}`:            ErrSyntax,
		`{"a":nul`:             ErrSyntax,
		`{"a":"` + "\n" + `"}`: ErrSyntax,
		`{"a":"\x"}`:           ErrSyntax,
		`{"a":"\u00g0"}`:       ErrSyntax,
		`{"a":"\u00`:           ErrSyntax,
		`{"a":"\`:              ErrSyntax,
		`{"a":[1,]}`:           ErrSyntax,
		`{"a":[1 2]}`:          ErrSyntax,
		`{a:1}`:                ErrSyntax,
		`{'a':1}`:              ErrSyntax,
	} {
		if _, _, err := members([]byte(in)); err != want {
			t.Errorf("%q: error %v, want %v", in, err, want)
		}
	}
}

// The limit on depth is encoding/json's, to the level.
func TestDepth(t *testing.T) {
	for _, depth := range []int{64, maxDepth - 1, maxDepth, maxDepth + 1} {
		text := []byte(`{"a":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + "}")
		_, _, err := members(text)
		if want := json.Unmarshal(text, new(any)); (err == nil) != (want == nil) {
			t.Errorf("depth %d: %v, encoding/json says %v", depth, err, want)
		}
	}
}

func TestKeyIs(t *testing.T) {
	name := []byte("keep_alive")
	for raw, want := range map[string]bool{
		`"keep_alive"`:                true,
		`"KEEP_Alive"`:                true,
		`"k\u0065ep_alive"`:           true,
		`"` + "\u212a" + `eep_alive"`: true, // the Kelvin sign folds to k
		`"\u212aeep_alive"`:           true,
		`"keep_alive "`:               false,
		`"keepalive"`:                 false,
		`""`:                          false,
		`"keep_aliv\ud800"`:           false,
	} {
		if got := KeyIs([]byte(raw), name); got != want {
			t.Errorf("KeyIs(%s) = %v", raw, got)
		}
		// encoding/json is the reference.
		var v struct {
			F *int `json:"keep_alive"`
		}
		if err := json.Unmarshal([]byte("{"+raw+":1}"), &v); err != nil || (v.F != nil) != want {
			t.Errorf("%s: the case itself is wrong: %v %v", raw, v.F, err)
		}
	}
}

// A special byte is found at every offset, whatever stands around it.
func TestStringEveryOffset(t *testing.T) {
	for n := range 40 {
		for _, fill := range []byte{'a', 0xff, 0x80, 0x20, '#', '!', '[', ']'} {
			s := bytes.Repeat([]byte{fill}, n)
			text := append(append([]byte{'"'}, s...), `"tail`...)
			if got := (&scanner{text: text}).skipString(0); got != n+2 {
				t.Fatalf("%q: end %d, want %d", text, got, n+2)
			}
			bad := append(append([]byte{'"'}, s...), "\x1f\"\"\"\"\"\"\"\""...)
			if got := (&scanner{text: bad}).skipString(0); got != -1 {
				t.Fatalf("%q: control character accepted, end %d", bad, got)
			}
		}
	}
}

// Quotes and escapes that straddle the border of a window are found too.
func TestStringAcrossWindows(t *testing.T) {
	for d := -8; d <= 8; d++ {
		fill := strings.Repeat("a", window+d)
		for _, tail := range []string{``, `\"`, `\\`, `\u00e9`, `\\\"`, `\n\n\n\n\n`} {
			text := []byte(`"` + fill + tail + `"` + `,"x\y"`)
			if got, want := (&scanner{text: text}).skipString(0), len(fill)+len(tail)+2; got != want {
				t.Errorf("%d + %s: end %d, want %d", d, tail, got, want)
			}
		}
		for _, bad := range []string{"\x1f", `\x`, `\u00g`} {
			if got := (&scanner{text: []byte(`"` + fill + bad + `aaaaaaaaaa"`)}).skipString(0); got != -1 {
				t.Errorf("%d + %q: accepted, end %d", d, bad, got)
			}
		}
	}
}

// Of a long string the end is found, whatever stands before it; its first 64 KiB are checked, the
// rest is not.
func TestLongString(t *testing.T) {
	for d := -8; d <= 8; d++ {
		fill := strings.Repeat("a", checked+d)
		for _, tail := range []string{``, `\"`, `\\`, `\\\"`, `\"\"\"`, `\\\\\\`, `\u00e9`, strings.Repeat(`a\"b\\`, 30000)} {
			text := `"` + fill + tail + `"`
			if !json.Valid([]byte(text)) {
				t.Fatalf("%d + %.20s: the case itself is wrong", d, tail)
			}
			if got := (&scanner{text: []byte(text + `,"x\\"`)}).skipString(0); got != len(text) {
				t.Errorf("%d + %.20s: end %d, want %d", d, tail, got, len(text))
			}
		}
	}
	for _, bad := range []string{"\x1f", `\x`} {
		early := `"` + bad + strings.Repeat("a", 2*checked) + `"`
		if got := (&scanner{text: []byte(early)}).skipString(0); got != -1 {
			t.Errorf("%q in front is accepted", bad)
		}
		late := `"` + strings.Repeat("a", 2*checked) + bad + `"`
		if got := (&scanner{text: []byte(late)}).skipString(0); got != len(late) {
			t.Errorf("%q behind %d bytes: end %d, want %d", bad, 2*checked, got, len(late))
		}
	}
	if got := (&scanner{text: []byte(`"` + strings.Repeat("a", 2*checked) + `\"`)}).skipString(0); got != -1 {
		t.Errorf("a string without an end ends at %d", got)
	}
}

// FuzzObject: the same texts are accepted as by encoding/json's Decoder, and the members are the
// same.
func FuzzObject(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"model":"m","keep_alive":"5m"} junk`, `{"a":{"b":[1,2,{"c":null}]},"d":"\u00e9\n"}`,
		`{"a":1e5,"b":-0,"c":0.1}`, "{\"a\":\"\xff\"}", `{"a":"\ud83d\ude00","A":1}`, `[1]`, `{"a":tru`, "{\"\u212a\":1}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > checked {
			return // see TestLongString
		}
		got, end, err := members(text)
		dec := json.NewDecoder(bytes.NewReader(text))
		var raw json.RawMessage
		refErr := dec.Decode(&raw)
		if err == ErrNotObject {
			if refErr == nil && raw[0] == '{' {
				t.Fatalf("%q is an object", text)
			}
			return
		}
		if (err == nil) != (refErr == nil) {
			t.Fatalf("%q: %v, encoding/json: %v", text, err, refErr)
		}
		if err != nil {
			return
		}
		if int64(end) != dec.InputOffset() {
			t.Fatalf("%q: ends at %d, encoding/json: %d", text, end, dec.InputOffset())
		}
		// The last value of each decoded key, and how many keys there are.
		want := map[string]json.RawMessage{}
		if err := json.Unmarshal(raw, &want); err != nil {
			t.Fatal(err)
		}
		last := map[string]string{}
		for _, m := range got {
			k, ok := Unquote([]byte(m.key))
			if !ok {
				t.Fatalf("%q: key %s does not unquote", text, m.key)
			}
			last[k] = m.value
		}
		if len(last) != len(want) {
			t.Fatalf("%q: keys %v, encoding/json: %v", text, last, want)
		}
		for k, v := range want {
			if last[k] != string(v) {
				t.Fatalf("%q: %q is %s, encoding/json: %s", text, k, last[k], v)
			}
		}
	})
}

func BenchmarkObject(b *testing.B) {
	line := "Score the candidate from 1 to 10 and explain in one sentence why.\\n"
	for _, size := range []int{8 << 10, 1 << 20} {
		text := []byte(`{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat(line, size/len(line)) + `"}],"stream":false}`)
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				o := NewObject(text)
				for _, ok := o.Next(); ok; _, ok = o.Next() {
				}
				if o.Err() != nil {
					b.Fatal(o.Err())
				}
			}
		})
	}
}
