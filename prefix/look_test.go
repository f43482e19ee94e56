package prefix

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// TestLook: the text of a message is found by its bytes, however the body is written.
func TestLook(t *testing.T) {
	r := NewReader()
	long := strings.Repeat("0123456789 ", 2000)
	for _, c := range []struct {
		name             string
		endpoint         Endpoint
		body             string
		message, from, n int
		want             string
		system           bool
	}{
		{"a system message", Chat, `{"messages":[{"role":"system","content":"You are here."}]}`, 0, 4, 3, "are", true},
		{"a later one", Chat, `{"messages":[{"role":"system","content":"a"},{"role":"user","content":"b\u0063d"}]}`, 1, 0, 9, "bcd", false},
		{"a system prompt of blocks", Messages, `{"system":[{"type":"text","text":"one"},{"type":"text","text":"\ntwo"}],"messages":[]}`, 0, 2, 4, `e\nt`, true},
		{"parts", ChatCompletions, `{"messages":[{"role":"system","content":[{"type":"text","text":"abc"}]}]}`, 0, 0, 3, "abc", true},
		{"far into it", Generate, `{"prompt":"` + long + `"}`, 0, 16390, 5, long[16390:16395], false},
		{"past its end", Chat, `{"messages":[{"role":"user","content":"a"}]}`, 0, 5, 5, "", false},
		{"no such message", Chat, `{"messages":[]}`, 3, 0, 5, "", false},
	} {
		x := r.Look(c.endpoint, []byte(c.body), nil, nil, c.message, c.from, c.from+c.n)
		if string(x.Text) != c.want || x.System != c.system || x.Offset != c.from {
			t.Errorf("%s: %+v (%q), want %q", c.name, x, x.Text, c.want)
		}
	}
}

func TestAlike(t *testing.T) {
	r := NewReader()
	prose := func(n int) string {
		var b bytes.Buffer
		for i := 0; b.Len() < n; i++ {
			fmt.Fprintf(&b, "Rule %d is %d. ", i, i*i)
		}
		return b.String()[:n]
	}
	chain := func(system, user string) []Link {
		return r.Read(Chat, "m", []byte(fmt.Sprintf(`{"messages":[{"role":"system","content":%q},{"role":"user","content":%q}]}`, system, user))).Links
	}
	for _, c := range []struct {
		name        string
		a, b        []Link
		least, most int
	}{
		{"a digit at the head", chain("1"+prose(5000), "Go."), chain("2"+prose(5000), "Go."), 4700, 5004},
		{"a few bytes more at the head", chain("Now, the time is 9:59. "+prose(5000), "Go."), chain("Now, the time is 10:01. "+prose(5000), "Go."), 4900, 5024},
		{"many bytes more at the head", chain("Now, the time is 9:59. "+prose(5000), "Go."), chain("Now, the time is 10:01, if that is of interest. "+prose(5000), "Go."), 0, 20},
		{"many, and then the same message", chain("Now, the time is 9:59. "+prose(5000), prose(800)), chain("Now, the time is 10:01, if that is of interest. "+prose(5000), prose(800)), 800, 820},
		{"other text as long", chain("Be brief, and "+prose(5000), "Go."), chain("Be brief, and "+strings.ToUpper(prose(5000)), "Go."), 0, 10},
		{"nothing behind it", chain(prose(5000), "Go."), chain(prose(5000), "No."), 0, 0},
	} {
		s := Common(c.a, c.b)
		if got := Alike(c.a, c.b, s); got < c.least || got > c.most {
			t.Errorf("%s: %d, want %d to %d (%+v)", c.name, got, c.least, c.most, s)
		}
		if one, other := Alike(c.a, c.b, s), Alike(c.b, c.a, Common(c.b, c.a)); one != other {
			t.Errorf("%s: %d, and the other way round %d", c.name, one, other)
		}
	}
}

// TestRestate: restating options gives the chain of a body with those options.
func TestRestate(t *testing.T) {
	r := NewReader()
	body := func(options string) []byte {
		return []byte(`{"messages":[{"role":"user","content":"hi"}],"options":{` + options + `}}`)
	}
	for _, options := range []string{`"num_ctx":2048`, ``, `"num_ctx":4096,"num_gpu":1`} {
		c := r.Read(Chat, "m", body(options))
		want := r.Read(Chat, "m", body(strings.TrimPrefix(options+`,"num_ctx":8192`, ",")))
		c.Restate(c.Runner.WithContext(8192))
		if c.Leaf() != want.Leaf() || c.Runner != want.Runner || c.Links[0] != want.Links[0] {
			t.Errorf("%s: %+v, want %+v", options, c.Runner, want.Runner)
		}
		c.Restate(c.Runner.WithoutContext())
		if none := r.Read(Chat, "m", body("")); options == "" && c.Leaf() != none.Leaf() {
			t.Errorf("without: %+v", c.Runner)
		}
	}
}
