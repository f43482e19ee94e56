package contextstore

import (
	"bytes"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

var someEvents = []event{
	{kind: eventPut, proxy: 1, model: 2, upstream: "big", lane: 3, at: 4, tokens: 5, links: []uint64{6, 7}},
	{kind: eventPut, proxy: 1, model: 2, upstream: "b", at: -1, links: make([]uint64, maxEventLinks)},
	{kind: eventCool, proxy: 1, upstream: "big"},
	{kind: eventCool, proxy: 1, model: 9, upstream: "big"},
	{kind: eventForget, model: 9},
	{kind: eventForget},
}

func init() {
	for i := range someEvents[1].links {
		someEvents[1].links[i] = uint64(i) + 1
	}
}

// FuzzEvent: what is no event is refused, what is one is what it was encoded from, and whatever it
// says, a store stays within its limits and in order.
func FuzzEvent(f *testing.F) {
	for _, e := range someEvents {
		f.Add(e.encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEvent(b)
		if err != nil {
			return
		}
		if again := e.encode(); !bytes.Equal(again, b) {
			t.Fatalf("%x is decoded to %+v, which is %x", b, e, again)
		}
		memory := NewMemory(Limits{Entries: 5, Bytes: 1 << 20})
		v := &Valkey{memory: memory, index: func(string) (uint16, bool) { return 7, true }}
		v.apply(e)
		if s := memory.Stats(); s.Entries > 5 {
			t.Errorf("Stats are %+v", s)
		}
		var links []prefix.Link
		for _, hash := range e.links {
			links = append(links, prefix.Link{Hash: hash})
		}
		if depth, rec := memory.Match(links); depth > len(links) || depth > 0 && (rec.Upstream != 7 || !rec.Warm) {
			t.Errorf("Match is %d, %+v", depth, rec)
		}
	})
}

func TestEvents(t *testing.T) {
	for _, e := range someEvents {
		b := e.encode()
		if got, err := decodeEvent(b); err != nil || !bytes.Equal(got.encode(), b) {
			t.Errorf("%+v is read as %+v, %v", e, got, err)
		}
		for n := range b {
			if got, err := decodeEvent(b[:n]); err == nil && (e.kind != eventPut || (len(b)-n)%8 != 0 || len(got.links) == 0) {
				t.Errorf("%d of %d bytes of %+v are read as %+v", n, len(b), e, got)
			}
		}
		if _, err := decodeEvent(append(b, 1)); err == nil {
			t.Errorf("%+v has a byte too many", e)
		}
	}
}
