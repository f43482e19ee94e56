package outage

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestAgain: what goes again whenever it has just come back is tried less and less often, so that it
// does not fill the log; after a while without an outage everything is as at first.
func TestAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		o := Outage{
			Log: slog.New(slog.NewTextHandler(&log, nil)), Gone: "it is gone", Back: "it is back",
			First: 100 * time.Millisecond, Most: 10 * time.Second,
		}
		wait := func() time.Duration {
			o.Failure(errors.New("why"))
			return time.Until(o.Next())
		}
		for began := time.Now(); time.Since(began) < 10*time.Minute; {
			time.Sleep(wait())
			o.Success()
			time.Sleep(50 * time.Millisecond)
		}
		if gone, back := strings.Count(log.String(), "it is gone"), strings.Count(log.String(), "it is back"); gone > 70 || gone < 50 || gone != back {
			t.Errorf("in ten minutes, %d lines say that it is gone, and %d that it is back", gone, back)
		}
		time.Sleep(time.Minute)
		if first, second, third := wait(), wait(), wait(); first != o.First || second != 2*o.First || third != 4*o.First {
			t.Errorf("after a minute without an outage it is tried after %v, %v and %v", first, second, third)
		}
	})
}

// TestWhy: since when there is an outage, and why, and when the last one ended.
func TestWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := Outage{Log: slog.New(slog.DiscardHandler)}
		if since, err := o.Why(); !since.IsZero() || err != nil || !o.Ended().IsZero() {
			t.Errorf("before the first, there is one since %v (%v), or one ended at %v", since, err, o.Ended())
		}
		began := o.Failure(errors.New("why"))
		time.Sleep(time.Second)
		last := errors.New("why it is still there")
		if again := o.Failure(last); !began.Equal(again) || time.Since(again) != time.Second {
			t.Errorf("it began at %v, and later at %v", began, again)
		}
		if since, err := o.Why(); time.Since(since) != time.Second || err != last || !o.Ended().IsZero() {
			t.Errorf("a second later: since %v (%v), and one ended at %v", since, err, o.Ended())
		}
		o.Success()
		time.Sleep(time.Second)
		if since, err := o.Why(); !since.IsZero() || err != nil || time.Since(o.Ended()) != time.Second {
			t.Errorf("since %v (%v), and the last ended %v ago", since, err, time.Since(o.Ended()))
		}
	})
}
