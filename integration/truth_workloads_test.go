package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// workload is what some users send to one model. The same workload always sends the same, except
// for parts that repeat the model's answers.
type workload struct {
	name  string
	model string
	run   func(u *user) error
}

// place is a server, and the workloads that are sent to it in order.
type place struct {
	name      string
	config    realollama.Config
	workloads []workload
}

const (
	llama   = "gen-llama-costly"
	qwen    = "gen-qwen3-costly"
	sliding = "gen-gemma3-costly"
)

// places returns the places for a version.
func places(version string) []place {
	all := []place{
		{name: "one-slot", config: realollama.Config{Models: []string{llama, qwen, sliding, "smollm2"}}, workloads: []workload{
			{"same-prefix-chat", llama, samePrefixChat(20)},
			{"same-prefix-generate", llama, samePrefixGenerate},
			{"same-prefix-v1", llama, samePrefixV1},
			{"interleaved", llama, interleaved(4, 3)},
			{"chats", llama, chats},
			{"documents", qwen, documents},
			{"completion-raw", qwen, completionRaw},
			{"num-ctx", qwen, numCtx},
			{"sliding-window", sliding, slidingWindow},
			{"real-model", "smollm2", samePrefixChat(5)},
		}},
		{name: "four-slots", config: realollama.Config{Models: []string{llama}, Parallel: 4}, workloads: []workload{
			{"concurrent", llama, concurrent},
		}},
	}
	if version != realollama.EraA { // era A has no host cache
		// 12 MiB hold two of these prompts, and to save one the engine drops the oldest before it
		// looks for the one it needs.
		all = append(all, place{name: "tiny-host-cache", config: realollama.Config{Models: []string{llama}, CacheRAMMiB: new(12)}, workloads: []workload{
			{"interleaved", llama, interleaved(3, 4)},
		}})
	}
	for i := range all {
		all[i].config.Version = version
	}
	return all
}

// samePrefixChat is a judge: one rubric as the system message, one candidate a request.
func samePrefixChat(requests int) func(u *user) error {
	return func(u *user) error {
		rubric, candidate := u.rubric(1000), ""
		for i := range requests {
			if i == 0 || i%8 != 0 { // otherwise it is a retry of a client
				candidate = u.ticket()
			}
			if _, err := u.chat(i%2 == 0, message{"system", rubric}, message{"user", candidate}); err != nil {
				return err
			}
		}
		return nil
	}
}

// samePrefixGenerate has the rubric at the head of the only message, as scripts do.
func samePrefixGenerate(u *user) error {
	rubric := u.rubric(600) + "\n\nExamples:\n" + u.csv(350)
	for i := range 20 {
		if _, err := u.generate(i%2 == 0, map[string]any{"prompt": rubric + "\n\nText to grade:\n" + u.ticket()}); err != nil {
			return err
		}
	}
	return nil
}

func samePrefixV1(u *user) error {
	system := u.prose(500) + "\n" + u.json(350)
	for i := range 20 {
		if _, err := u.v1(i%2 == 0, message{"system", system}, message{"user", u.ticket()}); err != nil {
			return err
		}
	}
	return nil
}

// interleaved is several teams with different prompts: each once, then all in any order, round by
// round.
func interleaved(prefixes, rounds int) func(u *user) error {
	return func(u *user) error {
		var heads []string
		for i := range prefixes {
			n := 750 + u.IntN(350)
			heads = append(heads, []string{u.rubric(n), u.csv(n * 3 / 4), u.json(n * 3 / 4), u.german(n)}[i])
		}
		for round := range rounds {
			order := u.Perm(prefixes)
			for i := range prefixes {
				if round > 0 {
					i = order[i]
				}
				var err error
				switch i % 3 {
				case 0:
					_, err = u.chat(true, message{"system", heads[i]}, message{"user", u.ticket()})
				case 1:
					_, err = u.generate(false, map[string]any{"system": heads[i], "prompt": u.ticket()})
				case 2:
					_, err = u.v1(false, message{"system", heads[i]}, message{"user", u.ticket()})
				}
				if err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// chats is three people talking to the same assistant, in turn.
func chats(u *user) error {
	u.options = map[string]any{"num_predict": 12}
	system := u.prose(400)
	var talks [3][]message
	for range 5 {
		for i, talk := range talks {
			if talk == nil {
				talk = []message{{"system", system}}
			}
			said := u.ticket()
			if u.IntN(3) == 0 {
				said += "\n\n" + u.logs(100)
			}
			talk = append(talk, message{"user", said})
			answer, err := u.chat(true, talk...)
			if err != nil {
				return err
			}
			talks[i] = append(talk, message{"assistant", answer})
		}
	}
	return nil
}

// documents has short instructions, then one document after the other and two questions on each.
func documents(u *user) error {
	system := u.prose(300)
	for i := range 3 {
		document := []string{u.prose(700), u.csv(450), u.json(450)}[i]
		for range 2 {
			if _, err := u.generate(true, map[string]any{"system": system, "prompt": document + "\n\n" + u.ticket()}); err != nil {
				return err
			}
		}
	}
	return nil
}

// completionRaw is an editor that asks how a file continues while somebody types.
func completionRaw(u *user) error {
	file := u.code(600)
	for i := range 6 {
		if i == 3 {
			// The previous line is edited, and so is the text after it.
			file = file[:strings.LastIndexByte(file[:len(file)*2/3], '\n')+1]
		}
		file += u.code(60)
		if _, err := u.generate(false, map[string]any{"prompt": "<|im_start|>user\nGo on:\n" + file + "<|im_end|>\n<|im_start|>assistant\n", "raw": true}); err != nil {
			return err
		}
	}
	return nil
}

// numCtx is two programs that disagree on the size of the context.
func numCtx(u *user) error {
	system := u.rubric(700)
	for _, n := range []int{2048, 4096, 4096, 2048, 2048, 4096} {
		// Other options end the engine, which loses what it has not yet written to the log: on a
		// busy machine it answers first and writes later.
		if err := u.logged(len(u.asked)); err != nil {
			return err
		}
		u.options = map[string]any{"num_ctx": n}
		if _, err := u.chat(false, message{"system", system}, message{"user", u.ticket()}); err != nil {
			return err
		}
	}
	return nil
}

// slidingWindow has prompts longer than the window of 512 tokens, and some shorter ones.
func slidingWindow(u *user) error {
	long, short := u.rubric(1000), u.prose(400)
	for i := range 8 {
		head := long
		if i > 3 && i%3 == 0 {
			head = short
		}
		if _, err := u.chat(true, message{"system", head}, message{"user", u.ticket()}); err != nil {
			return err
		}
	}
	return nil
}

// concurrent is four clients at the same time, each with its own prompt; one of them changes it
// half-way. Their prompts have different lengths, since only these identify them in the server's
// log.
func concurrent(u *user) error {
	return u.together(4, func(i int, u *user) error {
		head := []string{u.rubric(650), u.csv(430), u.json(600), u.prose(1150)}[i]
		for n := range 4 {
			if i == 3 && n == 2 {
				head = u.german(950)
			}
			if _, err := u.chat(n%2 == 0, message{"system", head}, message{"user", u.ticket()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// user sends requests, one at a time, and keeps the results.
type user struct {
	author
	client  int
	ctx     context.Context
	base    string
	model   string
	options map[string]any // in addition to or instead of the usual ones; native only
	asked   []asked
	logged  func(n int) error // waits until the server's log has n prompts
}

// asked is a request that was answered.
type asked struct {
	client   int // number of the user; each sends one request at a time
	endpoint string
	total    int // the prompt's tokens, as the answer reports them
}

func newUser(ctx context.Context, base string, w workload, logged func(n int) error) *user {
	return &user{author: newAuthor(w.name, 0), ctx: ctx, base: base, model: w.model, logged: logged}
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// together runs users concurrently.
func (u *user) together(n int, run func(i int, u *user) error) error {
	users, errs := make([]*user, n), make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		users[i] = &user{author: newAuthor(u.name, uint64(i)), client: i, ctx: u.ctx, base: u.base, model: u.model, options: u.options, logged: u.logged}
		group.Go(func() { errs[i] = run(i, users[i]) })
	}
	group.Wait()
	for _, other := range users {
		u.asked = append(u.asked, other.asked...)
	}
	return errors.Join(errs...)
}

const answerTokens = 4

func (u *user) chat(stream bool, messages ...message) (string, error) {
	return u.ask("/api/chat", stream, map[string]any{"messages": messages, "options": u.nativeOptions()})
}

func (u *user) generate(stream bool, members map[string]any) (string, error) {
	members["options"] = u.nativeOptions()
	return u.ask("/api/generate", stream, members)
}

func (u *user) nativeOptions() map[string]any {
	options := map[string]any{"num_predict": answerTokens, "temperature": 0}
	for k, v := range u.options {
		options[k] = v
	}
	return options
}

func (u *user) v1(stream bool, messages ...message) (string, error) {
	members := map[string]any{"messages": messages, "max_tokens": answerTokens, "temperature": 0}
	if stream {
		members["stream_options"] = map[string]any{"include_usage": true}
	}
	return u.ask("/v1/chat/completions", stream, members)
}

// ask returns the answer's text.
func (u *user) ask(endpoint string, stream bool, members map[string]any) (string, error) {
	members["model"], members["stream"] = u.model, stream
	body, err := json.Marshal(members)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(u.ctx, http.MethodPost, u.base+endpoint, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return "", fmt.Errorf("reading the answer of %s: %w", endpoint, err)
	}
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answered %d %s", endpoint, res.StatusCode, answer)
	}
	text, total, err := readAnswer(string(answer))
	if err != nil || total == 0 {
		return "", fmt.Errorf("%s answered %s: %d tokens, %w", endpoint, answer, total, err)
	}
	u.asked = append(u.asked, asked{client: u.client, endpoint: endpoint, total: total})
	return text, nil
}

// readAnswer returns the text of an answer, streamed or not, and the number of its prompt's tokens.
func readAnswer(answer string) (text string, total int, err error) {
	for line := range strings.Lines(answer) {
		line = strings.TrimSpace(strings.TrimPrefix(line, "data: "))
		if line == "" || line == "[DONE]" {
			continue
		}
		var part struct {
			Response string
			Message  message
			Choices  []struct{ Message, Delta message }
			Count    int `json:"prompt_eval_count"`
			Usage    struct {
				Count int `json:"prompt_tokens"`
			}
			Error any
		}
		if err := json.Unmarshal([]byte(line), &part); err != nil {
			return "", 0, err
		}
		if part.Error != nil {
			return "", 0, fmt.Errorf("an error: %v", part.Error)
		}
		text += part.Response + part.Message.Content
		for _, choice := range part.Choices {
			text += choice.Message.Content + choice.Delta.Content
		}
		total = max(total, part.Count, part.Usage.Count)
	}
	return text, total, nil
}

// author writes the texts of prompts. The same name and number always give the same texts.
type author struct {
	*rand.Rand
	name string
}

func newAuthor(name string, number uint64) author {
	seed := number
	for _, c := range name {
		seed = seed*31 + uint64(c)
	}
	return author{rand.New(rand.NewPCG(1, seed)), name}
}

// pick returns one of the choices in text, separated by |.
func (a author) pick(text string) string {
	choices := strings.Split(text, "|")
	return choices[a.IntN(len(choices))]
}

// repeat writes parts until they have n bytes.
func repeat(n int, part func() string) string {
	var text strings.Builder
	for text.Len() < n {
		text.WriteString(part())
	}
	return text.String()
}

func (a author) sentence() string {
	s := a.pick("the customer|the night shift|our supplier|the second reviewer|a tenant on the third floor|the attending physician|the release manager|"+
		"the warehouse in Leeds|the committee|an anonymous caller|Ms Okafor|the insurer|a passenger|the harbour master|Dr Lindqvist") + " " +
		a.pick("reported|refused|postponed|signed for|returned|questioned|approved|lost|measured|replaced|photographed|described|forwarded|cancelled|paid for") + " " +
		a.pick("the damaged pallet|an invoice for spare parts|the revised schedule|two blood samples|a rental agreement|the firmware update|the missing keys|"+
			"a quote for new windows|the fire door|the minutes of the last meeting|a crate of lemons|the backup tape|three complaints|the pressure valve") + " " +
		a.pick("on Tuesday|before the audit|after a heated phone call|at 06:40|during the storm|without explanation|for the third time this quarter|"+
			"in front of two witnesses|although nobody had asked|because the old one leaked|within 48 hours|by registered letter|despite the warning")
	switch a.IntN(6) {
	case 0:
		s = a.pick("however|according to the file|in short|to our surprise|as agreed|later that week") + ", " + s
	case 1:
		s += fmt.Sprintf(", which cost £%d.%02d", a.IntN(2000), a.IntN(100))
	case 2:
		s += fmt.Sprintf(" (see annex %c, page %d)", 'A'+a.IntN(6), 1+a.IntN(90))
	}
	return strings.ToUpper(s[:1]) + s[1:] + a.pick(".|.|.|;|!|?") + " "
}

func (a author) prose(n int) string { return repeat(n, a.sentence) }

func (a author) german(n int) string {
	return repeat(n, func() string {
		return a.pick("Der Mieter|Die Prüferin|Das Lager in Köln|Der Fahrer|Unsere Zulieferer|Die Behörde|Frau Schröder|Der Ausschuss") + " " +
			a.pick("hat|hatte|habe") + " " +
			a.pick("die Schlüssel|den Prüfbericht|drei Rechnungen|das Ersatzteil|die Kündigung|den Kühlschrank|zwei Proben|die Übergabe") + " " +
			a.pick("am Dienstag|nach der Prüfung|ohne Begründung|trotz Mahnung|gegen Quittung|zum dritten Mal|vor 08:30 Uhr") + " " +
			a.pick("zurückgegeben|abgelehnt|gemeldet|geöffnet|verschoben|bestätigt|fotografiert") + ". "
	})
}

func (a author) csv(n int) string {
	return "date,invoice,customer,region,amount,status\n" + repeat(n, func() string {
		return fmt.Sprintf("2026-%02d-%02d,INV-%06d,%s,%s,%d.%02d,%s\n", 1+a.IntN(12), 1+a.IntN(28), a.IntN(1e6),
			a.pick("Okafor & Sons|Lindqvist AB|Blue Harbour Ltd|Müller GmbH|Sato Trading|Ortega"), a.pick("north|south|EMEA|APAC"),
			a.IntN(9000), a.IntN(100), a.pick("paid|open|overdue|disputed"))
	})
}

func (a author) json(n int) string {
	return "[\n" + repeat(n, func() string {
		return fmt.Sprintf("  {\"id\": %d, \"sku\": %q, \"qty\": %d, \"tags\": [%q, %q], \"note\": %q},\n", a.IntN(1e5),
			fmt.Sprintf("%c%c-%04d", 'A'+a.IntN(26), 'A'+a.IntN(26), a.IntN(1e4)), a.IntN(40),
			a.pick("fragile|bulk|cold|export"), a.pick("new|checked|returned"), a.pick("leave at the door|call first|none|second attempt|gift wrap"))
	}) + "]\n"
}

func (a author) logs(n int) string {
	return repeat(n, func() string {
		return fmt.Sprintf("2026-03-%02dT%02d:%02d:%02d.%03dZ %s [pool-%d] %s order=%d took=%dms\n", 1+a.IntN(28), a.IntN(24), a.IntN(60), a.IntN(60), a.IntN(1000),
			a.pick("INFO|INFO|WARN|ERROR"), a.IntN(9), a.pick("retrying the charge|connection reset by peer|cache miss|batch written|token expired"), a.IntN(1e5), a.IntN(4000))
	})
}

func (a author) code(n int) string {
	return repeat(n, func() string {
		name := a.pick("order|invoice|tenant|sample|batch") + a.pick("Total|Status|Key|Window|Rate")
		return fmt.Sprintf("// %s %s.\nfunc %s(%s []int, limit int) (int, error) {\n\tif len(%[4]s) > %[5]d {\n\t\treturn 0, fmt.Errorf(\"%[1]s: %%d of %%d\", len(%[4]s), limit)\n\t}\n\treturn %[4]s[%[6]d] * %[7]d, nil\n}\n\n",
			name, a.pick("returns what is due|is 0 for an empty list|must not be called twice|rounds down"), name, a.pick("rows|items|parts"), a.IntN(500), a.IntN(9), 2+a.IntN(90))
	})
}

func (a author) rubric(n int) string {
	i := 0
	return "You grade what people wrote. Answer with one JSON object and nothing else, such as {\"score\": 3, \"reason\": \"too vague\", \"criteria\": [1, 4]}.\n" +
		repeat(n, func() string {
			i++
			return fmt.Sprintf("%d. %s (weight %d): %s%s\n", i, a.pick("Accuracy|Tone|Completeness|Evidence|Safety|Brevity|Style"), 1+a.IntN(5),
				a.pick("Take a point off where |Give full marks if |Ignore it when |Quote the line that says that "), a.sentence())
		})
}

// ticket is the part that differs from one request to the next: 30 to 80 tokens.
func (a author) ticket() string {
	n := 40 + a.IntN(60)
	switch a.IntN(5) {
	case 0:
		return fmt.Sprintf("#%d ", a.IntN(1e5)) + a.logs(1)
	case 1:
		return fmt.Sprintf(`{"ticket": %d, "text": %q}`, a.IntN(1e5), cut(a.prose(n), n-20))
	case 2:
		return a.pick("Is it urgent?|Who has to act?|Translate:") + " " + cut(a.german(n), n-15)
	default:
		return cut(a.prose(n), n)
	}
}

// cut shortens text to at most n bytes, at a space.
func cut(text string, n int) string {
	return text[:strings.LastIndexByte(text[:n], ' ')]
}
