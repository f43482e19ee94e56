package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// This file is the fourth part: a long system prompt, and a server that is restarted.

const libraryPrompt = `You are the assistant of the public library in Brook Lane. You answer
visitors' questions in one short and friendly sentence, by the rules below and by nothing else.
If the rules do not say it, tell the visitor to ask at the desk.
The library is open from Tuesday to Friday from 10 to 19 o'clock and on Saturday from 10 to 14
o'clock. It is closed on Sunday, on Monday and on public holidays. In August it closes at 17
o'clock. The reading room opens an hour earlier, and is entered from the yard.
Everybody who lives in the town gets a card at no charge. Who lives elsewhere pays twelve a year,
and pupils and students pay nothing. For a card an identity card is needed, for children under
fourteen the signature of a parent. A lost card is replaced for three.
Books are lent for four weeks, films, games and magazines for one week, and tools such as the
drill and the sewing machine for three days. Loans are extended twice unless somebody else has
reserved the item. Who is late pays twenty cents a day for each item, children nothing. Lost
items are paid for at the price of a new one. At most thirty items can be on loan at once, of
which five may be films and one may be a tool.
A reservation costs nothing. The item is kept at the desk for seven days. What the library does
not have is ordered from others for two, and takes about ten days.
There are eight computers on the first floor. They can be used for an hour a day with a card, and
for half an hour without. A printed page costs ten cents, in colour forty. The wireless network
needs no password. Calls are made outside of the reading room. Dogs stay in the yard, bottles
with a lid are welcome, other food and drink are not.
Stories are read to children on Wednesday at 16 o'clock, in the summer in the garden. The chess
club meets on Thursday at 17 o'clock, and the repair café on the first Saturday of each month.`

var libraryQuestions = []string{
	"Are you open on Sunday?",
	"For how long can I keep a book?",
	"What does a printed page cost?", // after the restart
}

const (
	cold = iota // the first of the questions, by how much of its prompt the server has cached
	warm
	restarted
)

// fastEvaluation is the time to evaluate the system prompt below which its state may not be worth
// storing, for instance with a large accelerator.
const fastEvaluation = 250 * time.Millisecond

// visit is the result of one question.
type visit struct {
	chat.Answer
	evaluated int
}

// library has the results of the questions in one way.
type library struct {
	visits []visit
	// bytes is how much was stored before the restart; zero without the proxy.
	bytes int64
	// unbroken is the answer to the last question by a server that was not restarted; only asked
	// for without the proxy.
	unbroken string
}

// contexts asks with one long system prompt, restarts Ollama and asks again: directly, and through
// the proxy with stored contexts. It is left out if the Ollama has no engine to link.
func contexts(
	ctx context.Context, ollama realollama.Installed, binary string, out io.Writer,
) error {
	home, err := os.MkdirTemp("", "ollama-cacheproxy-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(home)
	link := engine.LinkOptions{Ollama: ollama.Bin, Home: home, Program: binary}
	if _, err := engine.Link(link); err != nil {
		fmt.Fprintf(out, "\nStored contexts are left out: %v.\n", err)
		return nil
	}
	fmt.Fprint(out, "\nThree questions with one long system prompt, Ollama restarted before "+
		"the third: directly and through the proxy with stored contexts "+
		"(engine link, --contexts) …\n\n")
	o := linked.Options{
		Way: linked.Direct, Program: binary, Home: home,
		Server: realollama.Config{
			Version: ollama.Version, Bin: ollama.Bin, Models: []string{model}, KeepAlive: "10m",
		},
	}
	direct, err := visitLibrary(ctx, o)
	if err != nil {
		return fmt.Errorf("directly: %w", err)
	}
	o.Way = linked.Contexts
	proxied, err := visitLibrary(ctx, o)
	if err != nil {
		return fmt.Errorf("through the proxy: %w", err)
	}
	return conclude(out, direct, proxied)
}

// visitLibrary asks the questions in one way, on a new server.
func visitLibrary(ctx context.Context, o linked.Options) (l library, err error) {
	p, err := linked.Start(ctx, o)
	if err != nil {
		return l, err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	client := chat.ClientFrom("")
	defer client.CloseIdleConnections()
	for i, question := range libraryQuestions {
		if i == restarted {
			if err := l.prepare(ctx, client, p, question); err != nil {
				return l, err
			}
			if err := p.RestartServer(ctx); err != nil {
				return l, err
			}
		}
		v, err := visitOnce(ctx, client, p, question)
		if err != nil {
			return l, err
		}
		l.visits = append(l.visits, v)
	}
	return l, nil
}

// prepare does everything up to the restart of Ollama.
func (l *library) prepare(
	ctx context.Context, client *http.Client, p *linked.Pair, question string,
) (err error) {
	if p.Proxy != nil {
		l.bytes, err = waitStored(ctx, p.StateDir())
		return err
	}
	v, err := visitOnce(ctx, client, p, question)
	l.unbroken = v.Text
	return err
}

func visitOnce(
	ctx context.Context, client *http.Client, p *linked.Pair, question string,
) (v visit, err error) {
	mark := p.Server.Mark()
	v.Answer, err = chat.Send(ctx, client, p.URL(), chat.Request{
		Model: model, Stream: true, Generate: 16,
		Messages: []chat.Message{chat.System(libraryPrompt), chat.User(question)},
	})
	if err != nil {
		return v, fmt.Errorf("asking for an answer: %w", err)
	}
	log, err := p.Server.WaitEvaluations(ctx, mark, 1)
	for _, l := range log {
		v.evaluated += l.Evaluated
	}
	return v, err
}

// waitStored returns how many bytes of contexts are in a folder, as soon as there are any; 0 if
// there are none after a while. The proxy stores them after a second without requests.
func waitStored(ctx context.Context, dir string) (bytes int64, err error) {
	for deadline := time.Now().Add(10 * time.Second); bytes == 0 && time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		// This file is made once the state beside it is complete.
		complete, err := filepath.Glob(filepath.Join(dir, "*.json"))
		if err != nil {
			return 0, err
		}
		for _, name := range complete {
			// A state that was just replaced by a longer one is gone.
			if info, err := os.Stat(strings.TrimSuffix(name, ".json") + ".bin"); err == nil {
				bytes += info.Size()
			}
		}
	}
	return bytes, nil
}

// conclude prints both ways side by side. It fails if the restart was noticeable through the proxy.
func conclude(out io.Writer, direct, proxied library) error {
	answers := []string{direct.visits[cold].Text, direct.visits[warm].Text, direct.unbroken}
	equal := func(l library) (n int) {
		for i, text := range answers {
			if l.visits[i].Text == text {
				n++
			}
		}
		return n
	}
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "\tdirectly\tthrough the proxy\n")
	for i, name := range []string{"first question", "next question", "after the restart"} {
		d, p := direct.visits[i], proxied.visits[i]
		fmt.Fprintf(t, "%s: prompt tokens evaluated (server's log)\t%d\t%d\n",
			name, d.evaluated, p.evaluated)
		fmt.Fprintf(t, "%s: first token after\t%v\t%v\n",
			name, d.First.Round(time.Millisecond), p.First.Round(time.Millisecond))
	}
	fmt.Fprintf(t, "answers, and those without a restart\t%d, %d equal\t%d, %d equal\n",
		len(direct.visits), equal(direct), len(proxied.visits), equal(proxied))
	t.Flush()
	if equal(direct) < len(direct.visits) {
		fmt.Fprintln(out, "(The engine rounds differently when it evaluates a whole prompt "+
			"at once than when it has the beginning.)")
	}

	d, p := direct.visits[restarted], proxied.visits[restarted]
	evaluation := d.First - d.Load - direct.visits[warm].First
	spared := proxied.bytes > 0 &&
		p.evaluated <= proxied.visits[warm].evaluated+20 && p.evaluated < d.evaluated
	switch {
	case spared:
		fmt.Fprintf(out, "\nSaved: %d of %d tokens, and %v of waiting by the one who asks next. "+
			"What is left of that is loading the model. The context takes %.0f MB on the disk.\n",
			d.evaluated-p.evaluated, d.evaluated, (d.First - p.First).Round(time.Millisecond),
			float64(proxied.bytes)/1e6)
	case evaluation < fastEvaluation:
		fmt.Fprintf(out, "\nThis machine evaluates the system prompt in %v, too fast for it to be "+
			"worth storing. Longer prompts of larger models are.\n",
			max(evaluation, 0).Round(time.Millisecond))
	default:
		return errors.New("this is not what the proxy promises: " +
			"after a restart of Ollama only the new question is evaluated")
	}
	return nil
}
