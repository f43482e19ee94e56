package batch

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Plan is what is known of a batch before it runs. Tokens are estimates, from bytes of text.
type Plan struct {
	Survey *Survey

	TokenBytes float64 // bytes of text per token
	AsItIs     int64   // bytes to evaluate in the input's order, one request after the other
	Ordered    int64   // … in the order of sending: the least possible, as far as the window reaches
	Groups     int     // of requests that share at least half of their prompt with the one before, in that order
	Largest    int     // requests in the largest of them
	Everywhere int     // bytes that all prompts begin with
	Runners    int     // changes of model or options in that order, including the first: loads, if each needs one

	Rates  Rates
	Fields []Field  // of a template, in the order in which the prompt has them
	Layout *Layout  // of a template with fields in its prompt
	Early  []string // what differs too early
}

// Rates are a server's, for one request at a time; 0 means unknown.
type Rates struct {
	Prompt float64 // tokens per second
	Answer float64 // tokens per second
	Length float64 // tokens per answer
	From   string  // the source of the figures
}

// Field is a field of a template.
type Field struct {
	Name   string
	Values int     // different ones, in the examined rows
	Bytes  float64 // of a value, on average
	After  int     // bytes of the template's own text that follow it in the prompt
}

// Layout compares a template with one that has its own text first, then the fields whose values
// repeat most (Liu et al., "Optimizing LLM queries in relational workloads", arXiv 2403.05821).
// Prompts are never changed.
type Layout struct {
	Rows      int // examined
	Order     []string
	Now, Then int64 // bytes of all of these prompts to evaluate, as the template is and as it would be
}

const (
	earlyPairs = 200 // compared neighbours
	worthwhile = 256 // bytes that are worth advice
)

// MakePlan reads the whole input, and asks the server for its rates if it is there.
func MakePlan(ctx context.Context, c *Config) (*Plan, error) {
	p := &Plan{TokenBytes: tokenBytes}
	var err error
	if p.Survey, err = TakeSurvey(ctx, c.Source, nil); err != nil {
		return nil, err
	}
	if err := p.walk(ctx, c); err != nil {
		return nil, err
	}
	p.rates(ctx, c)
	if c.Source.Template != nil {
		return p, p.fields(c)
	}
	return p, p.early(c)
}

// walk adds up what is to be evaluated, in both orders.
func (p *Plan) walk(ctx context.Context, c *Config) error {
	w := newWindow(c.Source, c.Window, func(int) bool { return false })
	defer w.stop()
	var last prefix.Chain
	group := 0
	for {
		it, ok, err := w.take()
		if err != nil {
			return fmt.Errorf("reading the input: %w", err)
		}
		if !ok {
			break
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		chain, err := w.chain(it)
		if err != nil {
			continue // the survey reports its line
		}
		shared := prefix.Common(chain.Links, last.Links)
		first := len(last.Links) == 0
		if p.Everywhere = min(p.Everywhere, shared.Bytes); first {
			p.Everywhere = chain.Bytes()
		}
		if shared.Links == 0 {
			p.Runners++
		}
		if group++; first || 2*shared.Bytes < chain.Bytes() {
			p.Groups++
			group = 1
		}
		p.Largest = max(p.Largest, group)
		p.Ordered += rest(&chain, shared.Bytes)
		last = chain
	}
	last = prefix.Chain{}
	for it, err := range c.Source.items() {
		if err != nil {
			return fmt.Errorf("reading the input: %w", err)
		}
		if chain, err := w.chain(it); err == nil {
			p.AsItIs += rest(&chain, prefix.Common(chain.Links, last.Links).Bytes)
			last = chain
		}
	}
	return nil
}

// rest is what is to be evaluated of a prompt: at least one token. Nothing is known of embedded
// text.
func rest(c *prefix.Chain, shared int) int64 {
	if c.Bytes() == 0 {
		return 0
	}
	return int64(max(c.Bytes()-shared, tokenBytes))
}

// rates looks for measured rates: in the journal of this batch, otherwise in a proxy's list of its
// last requests.
func (p *Plan) rates(ctx context.Context, c *Config) {
	if counts, err := journalCounts(c.Output + JournalSuffix); err == nil && counts.Answers > 0 && counts.PromptEval > 0 {
		evaluated := counts.Prompt - int(counts.reuse().Value)
		p.Rates = Rates{per(evaluated, counts.PromptEval), per(counts.Generated, counts.Eval), float64(counts.Generated) / float64(counts.Answers), "the part of this batch that is done"}
		if counts.Prompt > 0 {
			p.TokenBytes = float64(counts.Text) / float64(counts.Prompt)
		}
		return
	}
	text, err := c.client().get(ctx, "/_cacheproxy/requests?n=1000")
	var page struct {
		Requests []struct {
			Model  string
			Tokens struct{ Evaluated *int }
			Answer int     `json:"generated_tokens"`
			Prompt float64 `json:"prompt_eval_ms"`
			Eval   float64 `json:"eval_ms"`
		}
	}
	if err != nil || json.Unmarshal(text, &page) != nil {
		return
	}
	models := map[string]bool{}
	for model := range p.Survey.Models {
		r := request{model: model}
		models[r.runner()] = true
	}
	var evaluated, answered, n int
	var prompt, eval float64
	for _, e := range page.Requests {
		r := request{model: e.Model}
		if !models[r.runner()] || e.Tokens.Evaluated == nil || e.Prompt <= 0 || e.Eval <= 0 {
			continue
		}
		n++
		evaluated, prompt = evaluated+*e.Tokens.Evaluated, prompt+e.Prompt
		answered, eval = answered+e.Answer, eval+e.Eval
	}
	if n > 0 {
		ms := float64(time.Millisecond)
		p.Rates = Rates{per(evaluated, time.Duration(prompt*ms)), per(answered, time.Duration(eval*ms)), float64(answered) / float64(n), fmt.Sprintf("the proxy's last %d requests to these models", n)}
	}
}

func per(tokens int, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return float64(tokens) / d.Seconds()
}

// journalCounts adds up the counts of a journal.
func journalCounts(path string) (Counts, error) {
	f, err := os.Open(path)
	if err != nil {
		return Counts{}, err
	}
	defer f.Close()
	var head journalHead
	in := bufio.NewReader(f)
	for first := true; ; first = false {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return head.Counts, nil // a torn line, or the end
		}
		var e journalEntry
		if first {
			err = json.Unmarshal(line, &head)
		} else if err = json.Unmarshal(line, &e); err == nil && e.Counts != nil {
			head.Counts.add(*e.Counts)
		}
		if err != nil {
			return head.Counts, err
		}
	}
}

// texts returns the texts of a prompt, in the order in which they are rendered.
func texts(r *request) []string {
	var body struct {
		System, Prompt string
		Messages       []struct{ Content json.RawMessage }
	}
	if json.Unmarshal(r.body, &body) != nil {
		return nil // a prompt that is a list: it has no advice
	}
	var all []string
	for _, text := range []string{body.System, body.Prompt} {
		if text != "" {
			all = append(all, text)
		}
	}
	for _, m := range body.Messages {
		var text string
		var parts []struct{ Text string }
		if json.Unmarshal(m.Content, &text) != nil && json.Unmarshal(m.Content, &parts) == nil {
			for _, part := range parts {
				text += part.Text
			}
		}
		all = append(all, text)
	}
	return all
}

// piece is some of the template's own text within the prompt, and the field that follows it.
type piece struct {
	own   int    // bytes of text
	field string // "": none, at the end
}

// pieces returns the template's text and fields in the order of the prompt, which it finds in a
// prompt whose fields are marks. It returns nil if a field is where only certain values are
// allowed, such as in the url.
func (t *Template) pieces() ([]piece, error) {
	marks := map[string]json.RawMessage{}
	for _, name := range t.Fields {
		marks[name] = quoted("\x01" + name + "\x02")
	}
	body, err := t.Fill(marks)
	if err != nil {
		return nil, err
	}
	r, err := parseRequest(body)
	if err != nil {
		return nil, nil
	}
	var pieces []piece
	for text := strings.Join(texts(&r), ""); ; {
		own, rest, found := strings.Cut(text, "\x01")
		name, rest, _ := strings.Cut(rest, "\x02")
		pieces = append(pieces, piece{len(own), name})
		if text = rest; !found {
			return pieces, nil
		}
	}
}

// fields examines what each row repeats of the template.
func (p *Plan) fields(c *Config) error {
	pieces, err := c.Source.Template.pieces()
	if err != nil {
		return err
	}
	own := 0
	for _, piece := range pieces {
		own += piece.own
	}
	before := 0
	var fields []Field
	for _, piece := range pieces {
		before += piece.own
		same := func(f Field) bool { return f.Name == piece.field }
		if piece.field != "" && !slices.ContainsFunc(fields, same) {
			fields = append(fields, Field{Name: piece.field, After: own - before})
		}
	}
	if len(fields) == 0 {
		return nil
	}
	rows, err := c.firstRows(fields)
	if err != nil || len(rows) == 0 {
		return err
	}
	for i := range fields {
		f, different, bytes := &fields[i], map[string]bool{}, 0
		for _, row := range rows {
			different[row[f.Name]] = true
			bytes += len(row[f.Name])
		}
		f.Values, f.Bytes = len(different), float64(bytes)/float64(len(rows))
	}
	order := slices.Clone(fields)
	slices.SortStableFunc(order, func(a, b Field) int {
		return cmp.Or(cmp.Compare(a.Values, b.Values), cmp.Compare(b.Bytes, a.Bytes))
	})
	p.Fields, p.Layout = fields, &Layout{Rows: len(rows)}
	then := []piece{{own: own}}
	for _, f := range order {
		p.Layout.Order = append(p.Layout.Order, f.Name)
		then[len(then)-1].field = f.Name
		then = append(then, piece{})
	}
	p.Layout.Now, p.Layout.Then = toEvaluate(pieces, rows), toEvaluate(then, rows)
	return nil
}

// firstRows returns the values of the fields in the first valid rows, up to a window.
func (c *Config) firstRows(fields []Field) (rows []map[string]string, err error) {
	for it, err := range c.Source.items() {
		if err != nil {
			return nil, fmt.Errorf("reading the input: %w", err)
		}
		if len(rows) == c.Window {
			break
		}
		text, err := c.Source.raw(it)
		if err != nil {
			return nil, err
		}
		row, err := c.Source.row(text)
		if it.bad != nil || err != nil {
			continue
		}
		values := map[string]string{}
		for _, f := range fields {
			values[f.Name] = plain(row[f.Name])
		}
		rows = append(rows, values)
	}
	return rows, nil
}

// toEvaluate returns how many bytes of the rows' prompts no other prompt has at the same place
// after the same beginning.
func toEvaluate(layout []piece, rows []map[string]string) (bytes int64) {
	seen := map[uint64]bool{}
	seed := maphash.MakeSeed()
	bytes = int64(layout[0].own)
	for _, row := range rows {
		var key maphash.Hash
		key.SetSeed(seed)
		for i, piece := range layout {
			key.WriteString(row[piece.field])
			key.WriteByte(0)
			if sum := key.Sum64(); !seen[sum] {
				seen[sum] = true
				bytes += int64(len(row[piece.field]))
				if i+1 < len(layout) {
					bytes += int64(layout[i+1].own)
				}
			}
		}
	}
	return bytes
}

// plain is a row's value as it is within a text.
func plain(raw json.RawMessage) string {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text
	}
	return string(raw)
}

// early looks for prompts that part although much of what follows is the same.
func (p *Plan) early(c *Config) error {
	type place struct{ message, offset int }
	found := map[place]int{}
	most := map[place]int{} // bytes after
	var last []string
	compared := 0
	step := max(1, p.Survey.Requests/earlyPairs)
	for it, err := range c.Source.items() {
		if err != nil {
			return fmt.Errorf("reading the input: %w", err)
		}
		near := it.index % step
		if step > 1 && near > 1 {
			continue
		}
		r, err := c.Source.request(it)
		if err != nil {
			var line *lineError
			if last = nil; errors.As(err, &line) {
				continue
			}
			return err
		}
		now := texts(&r)
		if last != nil && (step == 1 || near == 1) {
			compared++
			if message, offset, after := parted(last, now); after >= worthwhile {
				at := place{message, offset}
				found[at]++
				most[at] = max(most[at], after)
			}
		}
		last = now
	}
	places := make([]place, 0, len(found))
	for at := range found {
		places = append(places, at)
	}
	slices.SortFunc(places, func(a, b place) int {
		return cmp.Or(cmp.Compare(found[b], found[a]), cmp.Compare(a.message, b.message), cmp.Compare(a.offset, b.offset))
	})
	const few = 3
	for _, at := range places[:min(few, len(places))] {
		p.Early = append(p.Early, fmt.Sprintf("%d of %d neighbours differ at byte %d of text %d, and up to %d bytes right after that are the same again: if what differs there (a time, a number?) came behind them, they would be shared",
			found[at], compared, at.offset, at.message+1, most[at]))
	}
	return nil
}

// parted returns where two prompts part, and how many bytes after the difference are the same in
// both.
func parted(a, b []string) (text, offset, after int) {
	for text < len(a) && text < len(b) && a[text] == b[text] {
		text++
	}
	if text == len(a) || text == len(b) {
		return 0, 0, 0
	}
	x, y := a[text], b[text]
	offset = common(x, y)
	x, y = x[offset:], y[offset:]
	if x == "" || y == "" { // one continues where the other ends
		return text, offset, 0
	}
	for _, ends := range []string{" ", "\n"} { // after a word, or after the line
		_, x, ok1 := strings.Cut(x, ends)
		_, y, ok2 := strings.Cut(y, ends)
		if ok1 && ok2 {
			after = max(after, common(x, y))
		}
	}
	n := 0
	for n < len(x) && n < len(y) && x[len(x)-1-n] == y[len(y)-1-n] {
		n++
	}
	return text, offset, max(after, n)
}

// common returns how many leading bytes two texts share.
func common(a, b string) (n int) {
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// Print writes the plan as text.
func (p *Plan) Print(w io.Writer) error {
	v := p.Survey
	tokens := func(bytes int64) int64 { return int64(float64(bytes) / p.TokenBytes) }
	share := func(part int64) float64 { return 100 * float64(part) / float64(v.Text) }
	text := fmt.Sprintf("requests               %12d  %d of them are wrong, and would be recorded as errors\n", v.Requests, v.Bad)
	if v.Text == 0 {
		_, err := io.WriteString(w, text+"no prompts that could share a prefix are among them\n")
		return err
	}
	text += fmt.Sprintf("prompt tokens          %12d  estimated, at %.2f bytes a token\n", tokens(v.Text), p.TokenBytes)
	text += fmt.Sprintf("  in the input's order %12d  to evaluate (%.1f %%), one after the other\n", tokens(p.AsItIs), share(p.AsItIs))
	text += fmt.Sprintf("  as they will be sent %12d  to evaluate (%.1f %%): the least possible, within the window\n", tokens(p.Ordered), share(p.Ordered))
	text += fmt.Sprintf("prefixes               %12d  groups share at least half of their prompts; the largest has %d requests\n", p.Groups, p.Largest)
	text += fmt.Sprintf("  all prompts share    %12d  bytes at their beginning\n", p.Everywhere)
	text += fmt.Sprintf("models and options     %12d  runs of requests with the same\n", p.Runners)
	if v.Long > 0 {
		text += fmt.Sprintf("num_ctx                %12d  prompts are probably longer than the num_ctx that they state: lines %s\n", v.Long, lines(v.LongLines, v.Long))
	}
	if r := p.Rates; r.Prompt > 0 && r.Answer > 0 {
		seconds := func(bytes int64) time.Duration {
			s := float64(bytes)/p.TokenBytes/r.Prompt + float64(v.Requests-v.Bad)*r.Length/r.Answer
			return time.Duration(s * float64(time.Second)).Round(time.Second)
		}
		text += fmt.Sprintf("expected time          %12v  estimated, one request at a time; %v if every prompt were evaluated in full\n", seconds(p.Ordered), seconds(v.Text))
		text += fmt.Sprintf("  at rates measured in %s: %.0f prompt tokens and %.1f answer tokens a second, %.0f tokens an answer\n", r.From, r.Prompt, r.Answer, r.Length)
	} else {
		text += fmt.Sprintf("expected time          %12s  no rates were measured yet: run a part of the batch, or a few requests through the proxy\n", "unknown")
	}
	text += p.advice()
	_, err := io.WriteString(w, text)
	return err
}

// advice returns what would help.
func (p *Plan) advice() string {
	text := ""
	if l := p.Layout; l != nil {
		text += fmt.Sprintf("\nfields, in the first %d rows\n", l.Rows)
		for _, f := range p.Fields {
			text += fmt.Sprintf("  {{%s}}: %d values, each in %.0f rows on average; %.0f bytes; %d bytes of the template's own text come after it\n", f.Name, f.Values, float64(l.Rows)/float64(f.Values), f.Bytes, f.After)
		}
		if saved := l.Now - l.Then; saved >= worthwhile && saved*20 >= l.Now {
			text += fmt.Sprintf("\nwhat would help: the template's own text first, then {{%s}}. Of these rows %d tokens would be evaluated instead of %d (%.0f %% less, estimated)\n",
				strings.Join(l.Order, "}}, {{"), int64(float64(l.Then)/p.TokenBytes), int64(float64(l.Now)/p.TokenBytes), 100*float64(saved)/float64(l.Now))
		}
	}
	for _, e := range p.Early {
		text += "\nwhat would help: " + e + "\n"
	}
	return text
}
