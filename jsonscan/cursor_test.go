package jsonscan

import (
	"bytes"
	"encoding/json"
	"testing"
)

// rebuild writes the value at the cursor anew, without spaces.
func rebuild(b *bytes.Buffer, c *Cursor, depth int) {
	kind := c.Kind()
	if kind != '{' && kind != '[' || depth > 500 {
		b.Write(c.Value())
		return
	}
	b.WriteByte(kind)
	n := 0
	for c.Enter(); c.More(); n++ {
		if n > 0 {
			b.WriteByte(',')
		}
		if kind == '{' {
			key := c.Key()
			KeyIs(key, []byte("a"))
			b.Write(key)
			b.WriteByte(':')
		}
		rebuild(b, c, depth+1)
	}
	b.WriteByte(kind + 2) // } and ] come two after { and [
}

// FuzzCursor walks any text: it must end, and find in a valid one what encoding/json finds.
func FuzzCursor(f *testing.F) {
	for _, text := range []string{
		`{}`, ` { "a" : [ 1 , -2.5e3, true,false , null, {"b":"\"]}"} , [] ] } x`, `{"a":{"b":[{"c":"\\"}]},"a":""}`,
		`{"a":1,}`, `{"a"`, `{"a":"`, `{"a":[`, `{"a":}`, `[`, ``, `{"a":"\\\"","b":[[],{}]}`, `{:::,,]`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var got bytes.Buffer
		c := NewCursor(text, 0)
		rebuild(&got, &c, 0)
		o := NewObject(text)
		for _, ok := o.Next(); ok; _, ok = o.Next() {
		}
		if o.Err() != nil || bytes.Count(text, []byte("[")) > 400 {
			return
		}
		var want bytes.Buffer
		if err := json.Compact(&want, text[:o.End()]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Fatalf("%q became %q, want %q", text, got.Bytes(), want.Bytes())
		}
	})
}

func TestName(t *testing.T) {
	if got := Name([]byte(`"role"`)); string(got) != "role" {
		t.Errorf("%q", got)
	}
	if Name([]byte(`"r\u006fle"`)) != nil || Name([]byte(`"`)) != nil {
		t.Error("a name where none is written plainly")
	}
}
