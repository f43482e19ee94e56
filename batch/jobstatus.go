package batch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// JobStatus is how far a shared batch is.
type JobStatus struct {
	Name     string
	Requests int
	Answered int
	Held     int64 // bytes of answers in the server
	Dropped  int   // answers that are no longer there
	Begun    time.Time
	Kept     time.Duration // until the server removes it, unless a worker comes
	Workers  map[string]time.Duration
}

// ErrNoJob is that there is no such job.
var ErrNoJob = errors.New("the Valkey server has no such job")

// LookAtJob asks how far the batch is, without joining it.
func LookAtJob(ctx context.Context, c *Config) (*JobStatus, error) {
	j, err := c.Workers.open(ctx, c.Source.fingerprint(), c.WaitForServer, c.Log)
	if err != nil {
		return nil, err
	}
	defer j.client.Close()
	v, err := TakeSurvey(ctx, c.Source, nil)
	if err != nil {
		return nil, err
	}
	s := &JobStatus{Name: j.name, Requests: v.Requests, Workers: map[string]time.Duration{}}
	var job, workers map[string]string
	var left int64
	var now time.Time
	err = j.persist(ctx, func(ctx context.Context) (err error) {
		b := j.client.B()
		if job, err = j.client.Do(ctx, b.Hgetall().Key(j.keys[0]).Build()).AsStrMap(); err != nil {
			return err
		}
		if workers, err = j.client.Do(ctx, b.Hgetall().Key(j.keys[4]).Build()).AsStrMap(); err != nil {
			return err
		}
		if left, err = j.client.Do(ctx, b.Pttl().Key(j.keys[0]).Build()).AsInt64(); err != nil {
			return err
		}
		at, err := j.client.Do(ctx, b.Time().Build()).AsStrSlice()
		if err == nil {
			now, err = seconds(at[0])
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(job) == 0 {
		return nil, fmt.Errorf("%w: %s", ErrNoJob, s.Name)
	}
	s.Kept = time.Duration(max(0, left)) * time.Millisecond
	return s, s.read(job, workers, now)
}

func seconds(text string) (time.Time, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	return time.Unix(n, 0), err
}

// read reads the job's hash and that of its workers.
func (s *JobStatus) read(job, workers map[string]string, now time.Time) error {
	var bytes, dropped int64
	for name, to := range map[string]*int64{"bytes": &bytes, "dropped_bytes": &dropped} {
		n, err := strconv.ParseInt(job[name], 10, 64)
		if err != nil {
			return foreign(err)
		}
		*to = n
	}
	for name, to := range map[string]*int{"count": &s.Answered, "dropped": &s.Dropped} {
		n, err := strconv.Atoi(job[name])
		if err != nil {
			return foreign(err)
		}
		*to = n
	}
	var err error
	if s.Begun, err = seconds(job["begun"]); err != nil {
		return foreign(err)
	}
	if s.Held = bytes - dropped; s.Held < 0 || dropped < 0 || s.Dropped < 0 || s.Dropped > s.Answered {
		return foreign(fmt.Errorf("no numbers of a job: %q", job))
	}
	for name, state := range workers {
		at, _, _ := strings.Cut(state, " ")
		n, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return foreign(err)
		}
		s.Workers[name] = max(0, now.Sub(time.UnixMilli(n)))
	}
	return nil
}

// Print writes the status as text.
func (s *JobStatus) Print(w io.Writer) error {
	text := fmt.Sprintf("job         %s, begun %s\n", s.Name, s.Begun.UTC().Format(time.RFC3339))
	text += fmt.Sprintf("requests    %d, of which %d are answered\n", s.Requests, s.Answered)
	text += fmt.Sprintf("answers     %d bytes in the Valkey server; %d answers were dropped there\n", s.Held, s.Dropped)
	text += fmt.Sprintf("kept        for another %v, and longer when a worker comes\n", s.Kept.Round(time.Second))
	for _, name := range slices.Sorted(maps.Keys(s.Workers)) {
		text += fmt.Sprintf("worker      %s, heard of %v ago\n", name, s.Workers[name].Round(time.Second))
	}
	_, err := io.WriteString(w, text)
	return err
}

// DropJob removes the batch from the server, and returns its name. Its workers end with an error.
// errors.Is ErrNoJob: there is none.
func DropJob(ctx context.Context, c *Config) (name string, err error) {
	j, err := c.Workers.open(ctx, c.Source.fingerprint(), c.WaitForServer, c.Log)
	if err != nil {
		return "", err
	}
	defer j.client.Close()
	var removed int64 // by all tries
	err = j.persist(ctx, func(ctx context.Context) error {
		n, err := j.client.Do(ctx, j.client.B().Unlink().Key(j.keys...).Build()).AsInt64()
		removed += n
		return err
	})
	if err == nil && removed == 0 {
		err = fmt.Errorf("%w: %s", ErrNoJob, j.name)
	}
	return j.name, err
}
