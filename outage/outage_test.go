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

// TestLasted: how long an outage has lasted, and when the last one ended.
func TestLasted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := Outage{Log: slog.New(slog.DiscardHandler)}
		if o.Lasted() != 0 || !o.Ended().IsZero() {
			t.Errorf("before the first, one lasts %v, or ended at %v", o.Lasted(), o.Ended())
		}
		o.Failure(errors.New("why"))
		time.Sleep(time.Second)
		o.Failure(errors.New("why"))
		if o.Lasted() != time.Second || !o.Ended().IsZero() {
			t.Errorf("it lasts %v, want a second, and ended at %v", o.Lasted(), o.Ended())
		}
		o.Success()
		time.Sleep(time.Second)
		if o.Lasted() != 0 || time.Since(o.Ended()) != time.Second {
			t.Errorf("it lasts %v, and ended %v ago", o.Lasted(), time.Since(o.Ended()))
		}
	})
}
