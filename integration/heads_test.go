package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// agentTurns is how many requests an agent sends in one conversation.
const agentTurns = 6

// agent is a conversation as a coding agent sends it: its system prompt begins with a line that the
// client adds.
type agent struct {
	path      string
	billing   func(turn int) string // that line
	countdown bool                  // system messages count the tokens
}

// turn returns the body of a request of the conversation.
func (a agent) turn(t *testing.T, turn int) string {
	system := a.billing(turn) + "\nYou are an agent. " + words(7, 160)
	var messages []map[string]any
	say := func(role, content string) {
		messages = append(messages, map[string]any{"role": role, "content": content})
	}
	for i := range turn + 1 {
		say("user", words(uint64(100+i), 5))
		if a.countdown {
			say("system", fmt.Sprintf("<total_tokens>%d tokens left</total_tokens>", 15000000-1234*i))
		}
		if i < turn {
			say("assistant", words(uint64(200+i), 3))
		}
	}
	body := map[string]any{"model": "gen-llama-tiny", "stream": false, "messages": messages}
	switch a.path {
	case "/v1/messages":
		body["max_tokens"] = 1
		body["system"] = []map[string]any{{"type": "text", "text": a.billing(turn)}, {"type": "text", "text": strings.TrimPrefix(system, a.billing(turn))}}
	default:
		body["messages"] = append([]map[string]any{{"role": "system", "content": system}}, messages...)
		body["options"], body["max_tokens"] = map[string]any{"num_predict": 1}, 1
	}
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// evaluated sends the conversation, and returns how many tokens were evaluated according to the
// server's log.
func (a agent) evaluated(t *testing.T, server *realollama.Server, url string) int {
	t.Helper()
	mark := server.Mark()
	for turn := range agentTurns {
		mustPost(t, url+a.path, a.turn(t, turn))
	}
	_, evaluated := evaluations(t, server, mark, agentTurns)
	return evaluated
}

// TestHeads: if a line at the head of an agent's prompt changes with each request, the whole prompt
// is evaluated again. The ledger reports the change and its cost, and with --stable-heads there is
// none.
func TestHeads(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{"gen-llama-tiny"}})
	plain := startProxy(t, server.URL())
	ruled := startProxy(t, server.URL(), "--stable-heads", "claude-billing,total-tokens")
	run := 0
	// Each conversation has another version in its line, so that it shares nothing with the
	// previous ones.
	conversation := func(path string, changes bool) agent {
		run++
		version := 100 + run
		return agent{path: path, billing: func(turn int) string {
			if !changes {
				turn = 0
			}
			return fmt.Sprintf("x-anthropic-billing-header: cc_version=2.%d.0; cc_entrypoint=cli; cch=%05x;", version, (0xfa690+turn*0x1357)&0xfffff)
		}}
	}
	for _, path := range []string{"/v1/messages", "/v1/chat/completions", "/api/chat"} {
		fixed := conversation(path, false).evaluated(t, server, plain.URL)
		changing := conversation(path, true).evaluated(t, server, plain.URL)
		plain.idle(t) // by then it is in the ledger
		entry := lastEntry(t, plain)
		steady := conversation(path, true).evaluated(t, server, ruled.URL)
		t.Logf("%s: evaluated tokens of %d turns: a fixed line %d, one that changes %d (%.2f times), with the rule %d (%.2f times); the last turn: %s",
			path, agentTurns, fixed, changing, float64(changing)/float64(fixed), steady, float64(steady)/float64(fixed), entry.Detail)
		if 10*changing < 35*fixed {
			t.Errorf("%s: a line that changes costs %d tokens, a fixed one %d: nothing is shown", path, changing, fixed)
		}
		if 100*steady > 105*fixed {
			t.Errorf("%s: with the rule %d tokens, with a fixed line %d", path, steady, fixed)
		}
		c := entry.Changed
		if c == nil || c.Place != "system prompt" || c.Kind != "checksum" || c.Byte != 71 || 10*c.Tokens < 7*entry.Tokens.Evaluated || c.Tokens > entry.Tokens.Evaluated {
			t.Errorf("%s: the ledger tells %+v of %+v", path, c, entry)
		}
	}
	ruled.counts(t, `ollama_cacheproxy_stable_heads_edits_total{rule="claude-billing"}`, 3*agentTurns)

	// Countdowns are only known from Claude Code.
	none, counted, removed := conversation("/v1/messages", false), conversation("/v1/messages", false), conversation("/v1/messages", false)
	counted.countdown, removed.countdown = true, true
	without := none.evaluated(t, server, plain.URL)
	with := counted.evaluated(t, server, plain.URL)
	ruledOut := removed.evaluated(t, server, ruled.URL)
	t.Logf("evaluated tokens of %d turns: no countdown %d, one in each turn %d (%.2f times), with the rule %d (%.2f times)",
		agentTurns, without, with, float64(with)/float64(without), ruledOut, float64(ruledOut)/float64(without))
	if 10*with < 15*without {
		t.Errorf("countdowns cost %d tokens, none %d: nothing is shown", with, without)
	}
	if 100*ruledOut > 105*without {
		t.Errorf("with the rule %d tokens, without countdowns %d", ruledOut, without)
	}
}

// ledgerEntry has the members of an entry of /_cacheproxy/requests that these tests read.
type ledgerEntry struct {
	Reason, Detail string
	Tokens         struct{ Evaluated int }
	Changed        *struct {
		Place, Kind  string
		Byte, Tokens int
	}
}

func lastEntry(t *testing.T, p *proxyProcess) ledgerEntry {
	t.Helper()
	status, _, text := get(t, p.URL+"/_cacheproxy/requests?n=1")
	var page struct{ Requests []ledgerEntry }
	if err := json.Unmarshal([]byte(text), &page); err != nil || status != 200 || len(page.Requests) != 1 {
		t.Fatalf("the last request: %d %v %s", status, err, text)
	}
	return page.Requests[0]
}

// TestNumCtxPolicy: two clients that ask in turn for different contexts cost a load each time. With
// pin, there are no more loads once the larger one is loaded.
func TestNumCtxPolicy(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{tiny}})
	ask := func(url, options string) string {
		t.Helper()
		status, _, text := post(t, url+"/api/generate", fmt.Sprintf(`{"model":%q,"prompt":"one two three","raw":true,"stream":false,"options":{"temperature":0,"num_predict":4%s}}`, tiny, options))
		var answer struct{ Response string }
		if err := json.Unmarshal([]byte(text), &answer); err != nil || status != 200 {
			t.Fatalf("%d %s", status, text)
		}
		return answer.Response
	}
	for _, c := range []struct {
		policy string
		asks   []string
		loads  int
		metric string
		counts int
	}{
		{"keep", []string{"", `,"num_ctx":2048`, `,"num_ctx":1024`, `,"num_ctx":2048`, `,"num_ctx":1024`}, 5, "", 0},
		{"pin", []string{`,"num_ctx":2048`, `,"num_ctx":1024`, `,"num_ctx":2048`, `,"num_ctx":512`}, 1, "pinned", 2},
		{"raise", []string{`,"num_ctx":1024`, `,"num_ctx":2048`, `,"num_ctx":1024`, `,"num_ctx":512`}, 2, "raised", 2},
		// The default of 4096 is larger, once it is known.
		{"raise", []string{"", `,"num_ctx":2048`, ""}, 1, "raised", 1},
	} {
		mustPost(t, server.URL()+"/api/generate", fmt.Sprintf(`{"model":%q,"keep_alive":0}`, tiny))
		eventually(t, "unloaded", func() bool { return len(loaded(t, server.URL())) == 0 })
		p := startProxy(t, server.URL(), "--num-ctx-policy", c.policy)
		mark := server.Mark()
		var first string
		for i, options := range c.asks {
			answer := ask(p.URL, options)
			if i == 0 {
				first = answer
			}
			if answer != first {
				t.Errorf("%s, %s: %q, and before %q", c.policy, options, answer, first)
			}
			eventually(t, "told to the proxy by /api/ps", func() bool {
				return p.Metric(t, "ollama_cacheproxy_upstream_loaded_bytes") > 0
			})
		}
		n := server.Loads(mark)
		t.Logf("%s, %v: %d loads", c.policy, c.asks, n)
		if n != c.loads {
			t.Errorf("%s, %v: %d loads, want %d", c.policy, c.asks, n, c.loads)
		}
		if c.metric != "" {
			p.counts(t, `ollama_cacheproxy_num_ctx_total{action="`+c.metric+`"}`, float64(c.counts))
		}
	}
}
