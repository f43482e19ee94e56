package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/ollama/ollama/anthropic"
	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// templateWords is how many bytes a template may write between the parts that a chain has links
// for.
const templateWords = 100

// prefixRow is the table's row for one kind of change: the number of pairs of prompts, and the most
// bytes by which a chain was over and under.
type prefixRow struct{ pairs, over, under int }

const (
	pastFlat        = "past 16 KiB"
	otherSpelling   = "another spelling"
	throughAnother  = "the same chain through another endpoint"
	prefixTableHead = "by what differs, the pairs of prompts, and the most bytes that a chain said too many and too few"
)

// TestPrefix compares chains with the prompts that real servers render: two prompts share what
// their chains share, to within a sixteenth of a block and the template's words, and equal chains
// have equal prompts.
func TestPrefix(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny, "gen-qwen3-tiny"}, MaxLoaded: len(prefixModels), Env: []string{"OLLAMA_CONTEXT_LENGTH=32768"}})
			rows := map[string]*prefixRow{}
			for i, m := range prefixModels {
				if m.template != "" {
					mustPost(t, server.URL()+"/api/create", fmt.Sprintf(`{"model":%q,"from":%q,"template":%q,"stream":false}`, m.name, m.from, m.template))
				}
				prompts := map[uint64]seenPrompt{}
				for _, d := range dialects {
					c := prefixCheck{T: t, base: server.URL(), model: m, endpoint: d.endpoint, write: d.body, rows: rows, prompts: prompts, reader: prefix.NewReader()}
					// Every endpoint gets the same conversations, and some additional ones.
					c.run(rand.New(rand.NewPCG(uint64(i), 0)))
					c.run(rand.New(rand.NewPCG(uint64(i), 1+uint64(d.endpoint))))
					c.long(rand.New(rand.NewPCG(uint64(i), uint64(d.endpoint))))
				}
			}
			var table strings.Builder
			names := []string{pastFlat, otherSpelling, throughAnother}
			for _, change := range prefixChanges {
				names = append(names, change.name)
			}
			for _, name := range names {
				row := rows[name]
				if row == nil {
					t.Fatalf("no pair of prompts for %q", name)
				}
				fmt.Fprintf(&table, "%-40s %5d %6d %6d\n", name, row.pairs, row.over, row.under)
			}
			t.Logf("ollama %s: %s\n%s", version, prefixTableHead, table.String())
		})
	}
}

// prefixCheck compares pairs of prompts of one model through one endpoint.
type prefixCheck struct {
	*testing.T
	base     string
	model    prefixModel
	endpoint prefix.Endpoint
	write    func(conversation) map[string]any
	reader   *prefix.Reader
	rows     map[string]*prefixRow
	prompts  map[uint64]seenPrompt // by the chain's leaf
}

type seenPrompt struct {
	text string
	from prefix.Endpoint
}

// prefixPrompt is a body, its chain and its prompt.
type prefixPrompt struct {
	body     []byte
	chain    prefix.Chain
	text     string
	messages []api.Message
}

func (c *prefixCheck) run(r *rand.Rand) {
	// A separate source: how bodies are written must not change their content.
	spelling := rand.New(rand.NewPCG(r.Uint64(), 0))
	for _, change := range prefixChanges {
		from := newConversation(r, c.model)
		to := from.clone()
		beyond, ok := change.make(r, c.model, &to)
		a := c.read(c.body(from))
		if body := c.body(to); ok && !bytes.Equal(a.body, body) {
			c.compare(change.name, a, c.read(body), beyond)
		}
		if spelling.IntN(4) == 0 {
			c.respelled(spelling, a)
		}
	}
}

// long compares prompts that differ only after 16 KiB of a message, where blocks are longer.
func (c *prefixCheck) long(r *rand.Rand) {
	long := newConversation(r, c.model)
	last := len(long.messages) - 1
	long.messages[last].Content = prefixText(r, 19<<10)
	changed := long.clone()
	changed.messages[last].Content = edited(r, long.messages[last].Content, 17<<10+r.IntN(2<<10))
	c.compare(pastFlat, c.read(c.body(long)), c.read(c.body(changed)), 0)
}

func (c *prefixCheck) body(from conversation) []byte {
	members := c.write(from)
	members["model"], members["stream"] = c.model.name, false
	text, err := json.Marshal(members)
	if err != nil {
		c.Fatal(err)
	}
	return text
}

// read returns a body's chain and prompt. Equal chains must have equal prompts.
func (c *prefixCheck) read(body []byte) prefixPrompt {
	p := prefixPrompt{body: body, chain: c.reader.Read(c.endpoint, c.model.name, body)}
	p.text, p.messages = rendered(c, c.base, c.endpoint, body)
	before, ok := c.prompts[p.chain.Leaf()]
	if ok && before.text != p.text {
		c.Errorf("%s: the same chain for two prompts, of which one is for %.3000s", c.model.name, body)
	}
	if ok && before.from != c.endpoint {
		c.row(throughAnother).pairs++
	}
	c.prompts[p.chain.Leaf()] = seenPrompt{p.text, c.endpoint}
	return p
}

// respelled checks that the same request, written differently, has the same chain and the same
// prompt.
func (c *prefixCheck) respelled(r *rand.Rand, a prefixPrompt) {
	b := c.read(respell(r, a.body))
	if a.text != b.text {
		c.Fatalf("%s: the test's other spelling means something else\n%.3000s\n%.3000s", c.model.name, a.body, b.body)
	}
	if !slices.Equal(a.chain.Links, b.chain.Links) || a.chain.Conversation != b.chain.Conversation {
		c.Errorf("%s: other links in another spelling: %+v\n%.3000s\n%.3000s", c.model.name, prefix.Common(a.chain.Links, b.chain.Links), a.body, b.body)
	}
	c.row(otherSpelling).pairs++
}

func (c *prefixCheck) row(name string) *prefixRow {
	if c.rows[name] == nil {
		c.rows[name] = &prefixRow{}
	}
	return c.rows[name]
}

// compare checks that the prompts share what the chain says, and no more than beyond and the
// template's words in addition. Within a text, both hold to within a sixteenth of a block.
func (c *prefixCheck) compare(name string, a, b prefixPrompt, beyond int) {
	shared := prefix.Common(a.chain.Links, b.chain.Links)
	told, truth := where(c, a, shared), commonBytes(a.text, b.text)
	exact := 0
	if shared.Links < len(a.chain.Links) {
		if l := a.chain.Links[shared.Links]; l.Part == prefix.Block || l.Part == prefix.Tail {
			exact = prefix.BlockPart(l)
		}
	}
	row := c.row(name)
	row.pairs++
	row.over = max(row.over, told-truth)
	if beyond != anyLength {
		row.under = max(row.under, truth-told)
	}
	if told > truth+exact || truth > told+exact+beyond+templateWords {
		c.Errorf("%s: %s: the prompts share %d bytes, of which the chain says %d: %+v\n%.2000s\n%.2000s\n…%q\n…%q", c.model.name, name, truth, told, shared, a.body, b.body,
			a.text[max(0, truth-60):min(len(a.text), truth+60)], b.text[max(0, truth-60):min(len(b.text), truth+60)])
	}
}

// where returns the place in the prompt at which, by its chain, it begins to differ from another
// one.
func where(t testing.TB, p prefixPrompt, s prefix.Shared) int {
	t.Helper()
	prompt, messages := p.text, p.messages
	find := func(text string) int {
		i := strings.Index(prompt, text)
		if i < 0 {
			t.Fatalf("%.200q is not in the prompt %.1000q", text, prompt)
		}
		return i
	}
	// Of the rendering of the first messages, up to the last byte of their own text.
	end := func(message int) int {
		last := 0
		tools := toolWord.FindAllStringIndex(prompt, -1)
		for _, l := range p.chain.Links[:s.Links] {
			if l.Part == prefix.Tools {
				last, tools = tools[0][1], tools[1:]
			}
		}
		for _, m := range messages[:message] {
			if m.Content != "" {
				last = max(last, find(m.Content)+len(m.Content))
			}
			for _, call := range m.ToolCalls {
				if city, ok := call.Function.Arguments.Get("city"); ok && strings.Contains(prompt, city.(string)) {
					last = max(last, find(city.(string))+len(city.(string)))
				}
			}
		}
		return last
	}
	switch {
	case s.Message < 0:
		return 0
	case s.Part == prefix.Head || s.Part == prefix.Tools || s.Message >= len(messages) || messages[s.Message].Content == "":
		return end(min(s.Message, len(messages)))
	}
	content := messages[s.Message].Content
	return find(content) + unspelled(content, s.Offset)
}

// unspelled returns the byte of a text that is the n-th byte of its JSON spelling.
func unspelled(text string, n int) int {
	for i, c := range text {
		switch {
		case n <= 0:
			return i
		case c == '"' || c == '\\' || c == '\n' || c == '\r' || c == '\t' || c == '\b' || c == '\f':
			n -= 2
		case c < 0x20:
			n -= 6
		default:
			n -= len(string(c))
		}
	}
	return len(text)
}

func commonBytes(a, b string) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// rendered asks a server for the prompt that it renders from a body, and returns also the messages
// that the prompt is made of.
func rendered(t testing.TB, base string, e prefix.Endpoint, body []byte) (string, []api.Message) {
	t.Helper()
	chat, generate := converted(t, e, body)
	var messages []api.Message
	path, request := "/api/chat", any(chat)
	if chat != nil {
		messages = chat.Messages
		chat.DebugRenderOnly, chat.Truncate = true, new(bool)
	} else {
		if generate.System != "" {
			messages = append(messages, api.Message{Role: "system", Content: generate.System})
		}
		messages = append(messages, api.Message{Role: "user", Content: generate.Prompt})
		generate.DebugRenderOnly, generate.Truncate = true, new(bool)
		path, request = "/api/generate", generate
	}
	// The other endpoints of /v1 do not return their prompt.
	if e == prefix.Chat || e == prefix.Generate || e == prefix.ChatCompletions {
		members := `{"_debug_render_only":true,`
		if e == prefix.ChatCompletions {
			path = "/v1/chat/completions"
		} else {
			members += `"truncate":false,`
		}
		request = json.RawMessage(slices.Concat([]byte(members), body[bytes.IndexByte(body, '{')+1:]))
	}
	text, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Info *api.DebugInfo `json:"_debug_info"`
	}
	status, _, reply := post(t, base+path, string(text))
	if err := json.Unmarshal([]byte(reply), &answer); status != http.StatusOK || err != nil || answer.Info == nil {
		t.Fatalf("POST %s %.1000s: %d %s, %v", path, text, status, reply, err)
	}
	return answer.Info.RenderedTemplate, messages
}

// converted returns a body as Ollama's own code converts it to Ollama's native API.
func converted(t testing.TB, e prefix.Endpoint, body []byte) (chat *api.ChatRequest, generate *api.GenerateRequest) {
	t.Helper()
	decode := func(v any) {
		t.Helper()
		if err := json.Unmarshal(body, v); err != nil {
			t.Fatalf("%v: %s", err, body)
		}
	}
	var err error
	switch e {
	case prefix.Chat:
		decode(&chat)
	case prefix.ChatCompletions:
		var r openai.ChatCompletionRequest
		decode(&r)
		chat, err = openai.FromChatRequest(r)
	case prefix.Messages:
		var r anthropic.MessagesRequest
		decode(&r)
		chat, err = anthropic.FromMessagesRequest(r)
	case prefix.Responses:
		var r openai.ResponsesRequest
		decode(&r)
		chat, err = openai.FromResponsesRequest(r)
	case prefix.Completions:
		var r openai.CompletionRequest
		decode(&r)
		var g api.GenerateRequest
		g, err = openai.FromCompleteRequest(r)
		generate = &g
	default:
		decode(&generate)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return chat, generate
}
