package shared

import (
	"encoding/binary"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// FuzzTaken: whatever the server answers, what is believed of it is within bounds.
func FuzzTaken(f *testing.F) {
	f.Add(int64(1), int64(1e6), int64(3), 10.0, 5)
	f.Add(int64(0), int64(1<<62), int64(1<<62), 1e9, 1)
	f.Add(int64(2), int64(0), int64(-1), 0.0, 0)
	f.Add(int64(-1), int64(-1), int64(0), 0.001, 1000)
	f.Fuzz(func(t *testing.T, ok, owed, others int64, rate float64, burst int) {
		if rate != rate || rate < 0 || burst < 0 {
			return // there are no such keys
		}
		got, err := parseTaken([]int64{ok, owed, others}, proxy.Taking{Rate: rate, Burst: burst})
		if err != nil {
			if got != (proxy.Taken{}) {
				t.Errorf("%+v beside an error", got)
			}
			return
		}
		if ok != 0 && ok != 1 || got.OK != (ok == 1) || got.Waiting < 0 || got.Used < 0 || got.Used > float64(burst) {
			t.Errorf("%d, %d, %d are read as %+v", ok, owed, others, got)
		}
	})
	for _, values := range [][]int64{nil, {1}, {1, 0, 0, 0}} {
		if _, err := parseTaken(values, proxy.Taking{}); err == nil {
			f.Errorf("%v is believed", values)
		}
	}
}

// saved is a value as save writes it.
func saved(at time.Time, blob string) string {
	return string(binary.LittleEndian.AppendUint64(nil, uint64(at.UnixMilli()))) + blob
}

// FuzzLearned: what others wrote is passed over, unless it is JSON of this week.
func FuzzLearned(f *testing.F) {
	now := time.UnixMilli(1_800_000_000_000)
	f.Add("big", saved(now, `{"slots":4}`))
	f.Add("", saved(now, `{}`))
	f.Add("big", saved(now.Add(-8*24*time.Hour), `{}`))
	f.Add("big", saved(now.Add(8*24*time.Hour), `{}`))
	f.Add("big", "\xff\xff\xff\xff\xff\xff\xff\xff{}")
	f.Add("big", "short")
	f.Add("big", saved(now, "{"))
	f.Fuzz(func(t *testing.T, name, value string) {
		for got, blob := range parseLearned(map[string]string{name: value}, now) {
			if got != name || name == "" || len(name) > maxName || !json.Valid(blob) || len(blob) > maxLearned ||
				!strings.HasSuffix(value, string(blob)) {
				t.Errorf("%q: %q is read as %q", name, value, blob)
			}
		}
	})
}

func TestParseLearned(t *testing.T) {
	now := time.Now()
	got := parseLearned(map[string]string{
		"good": saved(now.Add(-6*24*time.Hour), `{"slots":4}`), "old": saved(now.Add(-8*24*time.Hour), `{}`),
		"future": saved(now.Add(8*24*time.Hour), `{}`), "torn": saved(now, `{"slots":`), "empty": "",
		"long": saved(now, `"`+strings.Repeat("x", maxLearned)+`"`), strings.Repeat("n", 256): saved(now, `{}`),
	}, now)
	if len(got) != 1 || string(got["good"]) != `{"slots":4}` {
		t.Errorf("%q", got)
	}
}
