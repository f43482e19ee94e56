package answers

import (
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

func TestClockOf(t *testing.T) {
	for _, c := range []struct {
		modelfile, template string
		want                Clock
	}{
		{"", "{{ .Prompt }}", NoClock},
		{"FROM x\nRENDERER qwen3-coder\nLICENSE glimmer\n", "", NoClock},
		{"FROM x\nRENDERER glimmer\n", "", DateClock},
		{"", "Current date: {{ currentDate }}", DateClock},
		{"", "{{- yesterdayDate }}", DateClock},
		{"", "{{- 'Today Date: ' + date_string }}", DateClock},
		{"", "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", DateClock},
		{"", `{{ strftime_now("%Y-%m-%d") }}{{ strftime_now( "%B %-d, %Y") }}`, DateClock},
		{"", `{{ strftime_now("%Y-%m-%d") }}{{ strftime_now("%H:%M") }}`, TimeClock},
		{"", `{{ strftime_now(format) }}`, TimeClock},
		{"", `{{ strftime_now("%`, TimeClock},
		{"", `{{ strftime_now('%') }}`, TimeClock},
	} {
		if got := ClockOf(c.modelfile, c.template); got != c.want {
			t.Errorf("%q %q: %d, want %d", c.modelfile, c.template, got, c.want)
		}
	}
	if id := identify(prefix.Generate, `{"prompt":"a","template":"{{ current\u0044ate }}"}`); id.Clock != DateClock {
		t.Errorf("a request's own template: %d", id.Clock)
	}
}

func TestDay(t *testing.T) {
	at := time.Date(2026, 3, 31, 23, 59, 59, 0, time.UTC)
	east := time.FixedZone("", 5*3600+45*60)
	if a, b := Day(at, time.UTC), Day(at.Add(time.Second), time.UTC); a != "2026-03-31" || b != "2026-04-01" {
		t.Error(a, b)
	}
	if got := Day(at, east); got != "2026-04-01" {
		t.Error(got)
	}
	// Within a slot no zone's date changes: all are quarters of an hour apart.
	for at := at.Add(time.Second); at.Day() == 1; at = at.Add(15 * time.Minute) {
		last := at.Add(15*time.Minute - 1)
		if Day(at, nil) != Day(last, nil) || Day(at, nil) == Day(last.Add(1), nil) {
			t.Fatal(at)
		}
		if Day(at, east) != Day(last, east) {
			t.Fatal(at)
		}
	}
}
