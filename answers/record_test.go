package answers

import (
	"bytes"
	"net/http"
	"reflect"
	"testing"
	"time"
)

func TestRecord(t *testing.T) {
	for _, r := range []Record{
		{},
		{Head: Head{Status: 200, Header: http.Header{"Content-Type": {"a", "b"}}, Sized: true, Cost: time.Second,
			Prompt: 1, Evaluated: 2, Generated: 3}, Body: []byte("text")},
		{Marks: []Mark{{1, time.Millisecond}, {1, time.Second}, {4, time.Second}}, Body: []byte("text")},
	} {
		got, err := DecodeRecord(r.Encode())
		if r.Body == nil {
			r.Body = []byte{}
		}
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("got %+v, %v; want %+v", got, err, r)
		}
		whole := r.Encode()
		for n := range whole {
			if _, err := DecodeRecord(whole[:n]); err == nil {
				t.Errorf("the first %d of %d bytes were taken for a record", n, len(whole))
			}
		}
		if _, err := DecodeRecord(append(whole, 0)); err == nil {
			t.Error("a record with another byte was taken for one")
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte{})
	f.Add((&Record{}).Encode())
	f.Add((&Record{Head: Head{Status: 200}, Marks: []Mark{{2, time.Second}}, Body: []byte("text")}).Encode())
	f.Add([]byte{recordVersion, 2, '{', '}', 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := DecodeRecord(data)
		if err != nil {
			return
		}
		again, err := DecodeRecord(r.Encode())
		if err != nil || !bytes.Equal(again.Body, r.Body) || len(again.Marks) != len(r.Marks) {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}
