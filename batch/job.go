package batch

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// Workers is how several runs of one batch, on any machines, share it through a Valkey or Redis
// server (6.2 or newer).
type Workers struct {
	URL   string
	Job   string // the name of what they share; "": made of the input
	Bytes int64  // the most that the job's answers may fill in the server

	lease time.Duration // 0: jobLease
}

const (
	// jobLease is how long a worker may be silent before others take over what it has begun.
	jobLease = 10 * time.Second
	// jobSilent is how long a worker may be silent before answers that it has not taken are dropped.
	jobSilent = time.Minute
	// How long a job stays in the server: after its last worker has gone, and after its end.
	jobKept     = 7 * 24 * time.Hour
	jobEnded    = 24 * time.Hour
	jobWait     = 10 * time.Second // for an answer of the server
	jobBlock    = time.Second      // how long the server is asked to wait for news
	jobTryEvery = time.Second      // while the server is away, or full
	jobReads    = 16               // answers in one reply
	jobPrefix   = "ollama-cacheproxy:batch:1:"
)

// job is a batch in a Valkey server. Its keys begin with the same prefix:
//
//   - job, a hash: the job's random id and the input's fingerprint, how many windows are planned,
//     answers recorded, and bytes of them recorded and dropped;
//   - work, a stream: spans of items, in the order of the plan, which the consumer group "workers"
//     shares. An entry is deleted once all of its items are answered;
//   - answers, a stream: one line of a journal per item. The nth that is recorded has the ID n-0;
//   - done, a bitmap: the items that are answered. It lets in only one answer for each;
//   - workers, a hash: when each worker was last there, how many answers it has taken, and whether
//     it writes them to an output ("MILLISECONDS TAKEN 0|1").
//
// Every change is one script, which first makes sure that the job is still the one that was joined.
type job struct {
	client   valkey.Client
	target   valkeyconn.Target
	name     string
	keys     []string // job, work, answers, done, workers
	lease    time.Duration
	bytes    int64
	patience time.Duration // how long an outage may last
	me       string        // the name of this worker
	log      *slog.Logger

	id      string // "": not joined yet
	input   string
	window  int // items that are planned at a time
	planned int // windows, as far as is known; of fetch's goroutine
	joined  jobState
	begun   bool // by this worker

	away outage.Outage // the server does not answer
	full outage.Outage // it takes no more answers
}

// jobState is what a job's hash says.
type jobState struct{ count, dropped int }

// Errors of a job.
var (
	errJobLost = errors.New("the job is no longer in the Valkey server: it was restarted without its data, or" +
		" its keys were evicted or deleted; nothing wrong was written. To finish this output alone, run the same" +
		" command without --workers; to start over with all workers, remove the outputs and their journals")
	errJobFull = errors.New("the Valkey server keeps no more answers of this job (--job-bytes): a worker with -o" +
		" must take some first")
	errForeign = errors.New("the job in the Valkey server has something that is not ours: choose another --job," +
		" or remove it with --job-drop")
	errValkeyAway = errors.New("the Valkey server does not answer; run the same command to go on")
)

//go:embed job.lua
var jobScripts string

// script returns one of the scripts in job.lua, which begin with a line "-- name", after the common
// lines that come first.
func script(name string) *valkey.Lua {
	common, rest, _ := strings.Cut(jobScripts, "\n---- ")
	for part := range strings.SplitSeq(rest, "\n---- ") {
		if head, text, _ := strings.Cut(part, "\n"); head == name {
			if name != "join" {
				text = common + text
			}
			return valkey.NewLuaScript(text)
		}
	}
	panic("job.lua has no script " + name)
}

var (
	joinScript   = script("join")
	planScript   = script("plan")
	putScript    = script("put")
	ackScript    = script("ack")
	beatScript   = script("beat")
	leaveScript  = script("leave")
	undoneScript = script("undone")
)

// name is the job's name: input must be the same for all workers, and so is the name that is made
// of it.
func (w *Workers) name(input string) string {
	if w.Job != "" {
		return w.Job
	}
	return input[:16]
}

// fingerprint is what all workers of a job must agree on: the input, its template, and how rows are
// told apart.
func (s *Source) fingerprint() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %q", s.Hash, s.comma, s.columns))
	return hex.EncodeToString(sum[:])
}

// target reads the server's URL.
func (w *Workers) target() (valkeyconn.Target, error) {
	t, err := valkeyconn.Parse(w.URL, jobPrefix)
	if err == nil && t.Secret != nil {
		err = errors.New("secret-file would hide nothing: the answers of a batch are in the server as they are")
	}
	if err != nil {
		return t, valkeyconn.Wrong("--workers", w.URL, err)
	}
	return t, nil
}

// Check reports whether the settings can be used, without asking the server.
func (w *Workers) Check() error {
	if _, err := w.target(); err != nil {
		return err
	}
	if w.Bytes <= 0 {
		return fmt.Errorf("--job-bytes %d: want more than 0", w.Bytes)
	}
	return nil
}

// open connects to the server, which is waited for.
func (w *Workers) open(ctx context.Context, input string, patience time.Duration, log *slog.Logger) (*job, error) {
	target, err := w.target()
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	j := &job{
		target: target, lease: w.lease, bytes: w.Bytes, patience: patience, log: log, name: w.name(input), input: input,
		me: fmt.Sprintf("%s-%d-%08x", host, os.Getpid(), rand.Uint32()),
	}
	if j.lease == 0 {
		j.lease = jobLease
	}
	for _, key := range []string{"job", "work", "answers", "done", "workers"} {
		j.keys = append(j.keys, target.Prefix+"{"+j.name+"}:"+key) // braces: a cluster has them in one place
	}
	server := []any{"server", target.Address}
	j.away = outage.Outage{Log: log, Args: server, First: jobTryEvery, Most: jobTryEvery,
		Gone: fmt.Sprintf("the Valkey server does not answer; requests that were begun are finished, and then it"+
			" is waited for, up to %v (--wait-for-server)", patience),
		Back: "the Valkey server answers again"}
	j.full = outage.Outage{Log: log, Args: server, First: jobTryEvery, Most: jobTryEvery,
		Gone: fmt.Sprintf("the Valkey server keeps no more answers (--job-bytes, or its maxmemory); waiting, up to"+
			" %v (--wait-for-server), until a worker with -o has taken some", patience),
		Back: "the Valkey server keeps answers again"}
	o := target.Option() // persist repeats what fails
	o.Dialer.Timeout = jobWait
	o.ConnWriteTimeout = jobWait
	err = j.persist(ctx, func(context.Context) (err error) {
		j.client, err = valkeyconn.Connect(o)
		return err
	})
	return j, err
}

// endure notes that the server does not do what it should, and returns an error, which is that of
// such an outage, if it has lasted for too long.
func (j *job) endure(o *outage.Outage, gives, err error) error {
	var waited time.Duration
	if j.patience > 0 {
		waited = time.Since(o.Failure(err))
	}
	if waited >= j.patience {
		return fmt.Errorf("%w: %w (waited %v: --wait-for-server)", gives, err, waited.Round(time.Second))
	}
	return nil
}

// waiting reports whether the server is away, or full.
func (j *job) waiting() bool {
	away, _ := j.away.State()
	full, _ := j.full.State()
	return away || full
}

// persist does something until the server has answered, however often it must be repeated: all that
// is done is harmless when it is repeated.
func (j *job) persist(ctx context.Context, do func(context.Context) error) error {
	for {
		limited, cancel := context.WithTimeout(ctx, jobWait+jobBlock)
		err := do(limited)
		cancel()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		over := j.judge(err)
		if err == nil || over != nil {
			return over
		}
		select {
		case <-time.After(jobTryEvery):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// judge returns the error that ends the batch; nil: there was none, or it may pass.
func (j *job) judge(err error) error {
	if err == nil {
		j.away.Success()
		return nil
	}
	if errors.Is(err, errForeign) {
		return err
	}
	if _, is := errors.AsType[*tls.CertificateVerificationError](err); is {
		return fmt.Errorf("the certificate of the Valkey server at %s is not believed (check the host and"+
			" ca-file in --workers): %w", j.target.Address, err)
	}
	refused, isAnswer := valkey.IsValkeyErr(err)
	if !isAnswer {
		return j.endure(&j.away, errValkeyAway, err)
	}
	text := refused.Error() // without "ERR "
	kind, _, _ := strings.Cut(text, " ")
	switch {
	case kind == "JOBLOST" || kind == "NOGROUP":
		return errJobLost
	case kind == "JOBFULL" || strings.Contains(text, "OOM command not allowed"): // Redis 6 puts words before that
		return j.endure(&j.full, errJobFull, err)
	case !valkeyconn.IsWrong(err):
		return j.endure(&j.away, errValkeyAway, err)
	}
	return j.target.Refused("--workers", fmt.Errorf("%w (it must be Valkey, or Redis 6.2 or newer)", err))
}

// call runs a script of this job, and returns its reply.
func (j *job) call(ctx context.Context, s *valkey.Lua, args ...string) (reply valkey.ValkeyResult, err error) {
	err = j.persist(ctx, func(ctx context.Context) error {
		reply = s.Exec(ctx, j.client, j.keys, append([]string{j.id}, args...))
		return reply.Error()
	})
	return reply, err
}

func millis(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// numbers runs a script whose reply is a list of numbers, of which some are wanted.
func (j *job) numbers(ctx context.Context, want int, s *valkey.Lua, args ...string) ([]int64, error) {
	reply, err := j.call(ctx, s, args...)
	if err != nil {
		return nil, err
	}
	all, err := reply.AsIntSlice()
	if err == nil && len(all) < want {
		err = fmt.Errorf("%d numbers, not %d", len(all), want)
	}
	if err != nil {
		return nil, foreign(err)
	}
	return all, nil
}

// foreign is the error of a value that this program did not write.
func foreign(err error) error { return fmt.Errorf("%w: %w", errForeign, err) }

// join begins the job, or joins it.
func (j *job) join(ctx context.Context, window int) error {
	id := fmt.Sprintf("%016x", rand.Uint64())
	reply, err := j.call(ctx, joinScript, id, j.input, strconv.Itoa(window), millis(jobKept))
	if err != nil {
		return err
	}
	fields, err := reply.AsStrSlice()
	if err != nil {
		return foreign(err)
	}
	h, err := parseJob(fields)
	if err != nil {
		return foreign(err)
	}
	if h.input != j.input {
		return fmt.Errorf("the job %s belongs to another input, template or --encoding (sha256 %.12s…, here %.12s…):"+
			" all workers need the same; choose another --job", j.name, h.input, j.input)
	}
	j.begun = h.id == id
	j.id, j.window, j.planned, j.joined = h.id, h.window, h.planned, jobState{h.count, h.dropped}
	if h.window != window {
		j.log.Info("the job was begun with another --window, which is used here, too", "window", h.window)
	}
	j.warn(ctx)
	return nil
}

// jobHash is what join replies.
type jobHash struct {
	id, input                       string
	window, planned, count, dropped int
}

// parseJob reads the reply of join: id, input, window, planned, count, dropped.
func parseJob(fields []string) (h jobHash, err error) {
	if len(fields) != 6 {
		return h, fmt.Errorf("%d fields, not 6", len(fields))
	}
	h.id, h.input = fields[0], fields[1]
	for i, to := range []*int{&h.window, &h.planned, &h.count, &h.dropped} {
		if *to, err = strconv.Atoi(fields[i+2]); err != nil {
			return h, err
		}
	}
	const most = 1 << 30
	if h.id == "" || h.window < 1 || h.window > most || h.planned < 0 || h.planned > most ||
		h.count < 0 || h.dropped < 0 || h.dropped > h.count {
		return h, fmt.Errorf("no numbers of a job: %q", fields)
	}
	return h, nil
}

// warn says that the server may evict the job.
func (j *job) warn(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, jobWait)
	defer cancel()
	// Redis 6 takes one pattern.
	got, err := j.client.Do(ctx, j.client.B().ConfigGet().Parameter("maxmemory*").Build()).AsStrMap()
	if err != nil || got["maxmemory"] == "0" || got["maxmemory-policy"] == "noeviction" {
		return // it may be forbidden to ask
	}
	j.log.Warn("the Valkey server evicts keys when it is full, and may so lose this job: use another server, or"+
		" maxmemory-policy noeviction", "maxmemory_policy", got["maxmemory-policy"], "maxmemory", got["maxmemory"])
}

// plan adds the spans of the window that has a number, unless that is planned already or least, the
// number of an item, and all before it are not answered yet. It returns how many are planned then.
func (j *job) plan(ctx context.Context, window, least int, spans []string) (planned int, err error) {
	args := append([]string{strconv.Itoa(window), strconv.Itoa(least)}, spans...)
	n, err := j.numbers(ctx, 1, planScript, args...)
	if err != nil {
		return 0, err
	}
	return int(n[0]), nil
}

// put records an item's answer, a line of a journal, unless it has one.
func (j *job) put(ctx context.Context, index int, line []byte) error {
	_, err := j.call(ctx, putScript, strconv.Itoa(index), string(line),
		strconv.FormatInt(j.bytes, 10), millis(jobSilent))
	if err == nil {
		j.full.Success()
	}
	return err
}

// ack says that all of a span's items are answered.
func (j *job) ack(ctx context.Context, id string) error {
	_, err := j.call(ctx, ackScript, id)
	return err
}

// beat says that this worker is there, has taken so many answers and works at these spans, unless
// it does not renew them. It returns the answers recorded, the workers, the bytes of answers that the
// server has, and the places in held of spans that others have taken over.
func (j *job) beat(ctx context.Context, total, taken int, output, renew bool, held []string) (b pulse, err error) {
	bit := map[bool]string{true: "1", false: "0"}
	n, err := j.numbers(ctx, 3, beatScript, append([]string{
		j.me, strconv.Itoa(taken), bit[output], bit[renew], strconv.Itoa(total),
		millis(2 * j.lease),
		millis(jobKept), millis(jobEnded),
	}, held...)...)
	if err != nil {
		return b, err
	}
	b = pulse{count: int(n[0]), workers: int(n[1]), bytes: n[2]}
	for _, place := range n[3:] {
		if place < 1 || int(place) > len(held) {
			return b, foreign(fmt.Errorf("there is no span %d of %d", place, len(held)))
		}
		b.lost = append(b.lost, held[place-1])
	}
	return b, nil
}

// pulse is what beat returns.
type pulse struct {
	count   int
	workers int
	bytes   int64
	lost    []string
}

// leave gives back the spans at once, and says that this worker is gone. If all items are answered,
// the job is kept for a shorter time from now on; total 0: how many there are is not known.
func (j *job) leave(total int, held []string) {
	ctx, cancel := context.WithTimeout(context.Background(), jobWait)
	defer cancel()
	args := append([]string{j.id, j.me, strconv.Itoa(total), millis(jobEnded)}, held...)
	if err := leaveScript.Exec(ctx, j.client, j.keys, args).Error(); err != nil {
		j.log.Debug("leaving the job; others take over what was begun after a while", "err", err)
	}
}

// undone returns which of the items are not answered.
func (j *job) undone(ctx context.Context, items []item) ([]item, error) {
	var indexes []string
	for _, it := range items {
		indexes = append(indexes, strconv.Itoa(it.index))
	}
	bits, err := j.numbers(ctx, len(items), undoneScript, indexes...)
	if err != nil {
		return nil, err
	}
	var rest []item
	for i, it := range items {
		if bits[i] == 0 {
			rest = append(rest, it)
		}
	}
	return rest, nil
}

// entry is an entry of a stream.
type entry struct{ id, value string }

func entries(all []valkey.XRangeEntry, field string) (found []entry) {
	for _, e := range all {
		found = append(found, entry{e.ID, e.FieldValues[field]})
	}
	return found
}

// next returns a span that no worker has yet, waiting for one if it may. None: there is none.
func (j *job) next(ctx context.Context, wait bool) (found []entry, err error) {
	err = j.persist(ctx, func(ctx context.Context) error {
		c := j.client.B().Xreadgroup().Group("workers", j.me).Count(1)
		streams := c.Streams
		if wait {
			streams = c.Block(jobBlock.Milliseconds()).Streams
		}
		got, err := j.client.Do(ctx, streams().Key(j.keys[1]).Id(">").Build()).AsXRead()
		if valkey.IsValkeyNil(err) {
			found = nil
			return nil
		}
		found = entries(got[j.keys[1]], "span")
		return err
	})
	return found, err
}

// claim takes over a span of a worker that has been silent for as long as the lease. cursor is where
// to go on, "0-0" at the beginning and at the end.
func (j *job) claim(ctx context.Context, cursor string) (next string, found []entry, err error) {
	err = j.persist(ctx, func(ctx context.Context) error {
		got, err := j.client.Do(ctx, j.client.B().Xautoclaim().Key(j.keys[1]).Group("workers").Consumer(j.me).
			MinIdleTime(millis(j.lease)).Start(cursor).Count(1).Build()).ToArray()
		if err != nil {
			return err
		}
		if len(got) < 2 {
			return foreign(fmt.Errorf("XAUTOCLAIM has %d parts", len(got)))
		}
		if next, err = got[0].ToString(); err != nil {
			return err
		}
		all, err := got[1].AsXRange()
		found = entries(all, "span")
		return err
	})
	return next, found, err
}

// answers returns the next answers after the nth, waiting a while for one.
func (j *job) answers(ctx context.Context, n int) (found []entry, err error) {
	err = j.persist(ctx, func(ctx context.Context) error {
		got, err := j.client.Do(ctx, j.client.B().Xread().Count(jobReads).Block(jobBlock.Milliseconds()).
			Streams().Key(j.keys[2]).Id(fmt.Sprintf("%d-0", n)).Build()).AsXRead()
		if valkey.IsValkeyNil(err) {
			found = nil
			return nil // none yet; beat notices if the job is lost
		}
		found = entries(got[j.keys[2]], "answer")
		return err
	})
	return found, err
}

// spanItem is an item within a span.
type spanItem struct {
	Index int    `json:"i"`
	Line  int    `json:"l"`
	Off   int64  `json:"o"`
	Size  int    `json:"s"`
	Text  int    `json:"t,omitempty"`
	Bad   string `json:"bad,omitempty"`
}

// encodeSpan returns a span's value.
func encodeSpan(items []item) string {
	var all []spanItem
	for _, it := range items {
		s := spanItem{Index: it.index, Line: it.line, Off: it.off, Size: it.size, Text: it.text}
		if it.bad != nil {
			s.Bad = it.bad.Error()
		}
		all = append(all, s)
	}
	text, err := json.Marshal(all)
	if err != nil {
		panic(err) // numbers and short texts
	}
	return string(text)
}

// errNotOurs is what is wrong with a value that another program wrote.
var errNotOurs = errors.New("no items of this input")

// decodeSpan reads a span of an input of so many items and bytes.
func decodeSpan(text string, total int, size int64) ([]item, error) {
	var all []spanItem
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return nil, err
	}
	if len(all) == 0 || len(all) > mostInSpan {
		return nil, errNotOurs
	}
	items := make([]item, len(all))
	for i, s := range all {
		if !within(s.Index, s.Line, s.Off, s.Size, total, size) || s.Text < 0 {
			return nil, errNotOurs
		}
		items[i] = item{index: s.Index, line: s.Line, off: s.Off, size: s.Size, text: s.Text}
		if s.Bad != "" {
			items[i].bad = errors.New(s.Bad)
		}
	}
	return items, nil
}

// within reports whether an item can be one of an input.
func within(index, line int, off int64, length, total int, size int64) bool {
	return index >= 0 && index < total && line >= 1 && off >= 0 && length >= 0 && length <= maxLine &&
		off <= size-int64(length)
}

// decodeAnswer reads an entry of the answers: which in a row it is, and the line of the journal.
func decodeAnswer(e entry, total int, size int64) (n int, line journalEntry, err error) {
	number, rest, _ := strings.Cut(e.id, "-")
	if n, err = strconv.Atoi(number); err != nil {
		return 0, line, err
	}
	if err := json.Unmarshal([]byte(e.value), &line); err != nil {
		return 0, line, err
	}
	if n < 1 || rest != "0" || !within(line.Index, line.Line, line.Off, line.Size, total, size) ||
		line.Counts == nil || len(line.Result) == 0 || strings.ContainsAny(string(line.Result), "\r\n") {
		return 0, line, errNotOurs
	}
	return n, line, nil
}
