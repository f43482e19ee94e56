package bench

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
)

// Workloads returns the names that Config.Workload may have.
func Workloads() []string {
	return []string{"same", "interleaved", "closed-loops", "models", "num-ctx", "user-message-prefix", "chat-turns"}
}

const (
	manyPrefixes = 8  // of the workload "interleaved"
	turns        = 10 // of a chat
	minNumCtx    = 4096
)

// request is a client's request. Its prompt is a prefix, which others share, and a unique tail.
type request struct {
	prefix int
	model  string
	numCtx int
	system string // if "", the prefix is in the user's message
	user   string
	begins bool // in a chat: earlier turns are dropped
}

// workload has the requests of all clients.
type workload struct {
	// depth clients take requests from each queue, each when it has its last answer.
	queues [][]request
	depth  int
	chat   bool // answers become messages of the next request
}

// clients returns the default number of clients, as the workload's name implies.
func clients(name string) int {
	switch name {
	case "same", "user-message-prefix":
		return 1
	case "interleaved":
		return 4 * manyPrefixes // lanes need a choice of waiting requests
	default:
		return 4
	}
}

// scale says how long texts must be for a model to make a number of tokens of them.
type scale struct {
	tokensPerWord float64
	overhead      float64 // tokens that the template adds to a system and a user message
}

func (s scale) words(tokens float64) int { return max(1, int(tokens/s.tokensPerWord+0.5)) }

// workload generates a workload. Other seeds generate other texts of the same shape.
func (c *Config) workload(seed uint64, scales []scale) workload {
	n := c.Clients
	w := workload{depth: n, chat: c.Workload == "chat-turns"}
	// The largest prompt and answer, and a margin, since words differ in tokens.
	need := c.PrefixTokens + c.TailTokens + c.OutputTokens
	if w.chat {
		need = c.PrefixTokens + turns*(c.TailTokens+c.OutputTokens+16)
	}
	numCtx := max(minNumCtx, (need*5/4+256+1023)/1024*1024)
	prefixes := map[int]string{}
	make := func(i, prefix, model int) request {
		s := scales[model]
		if prefixes[prefix] == "" {
			prefixes[prefix] = text.Words(seed<<32+uint64(prefix), s.words(float64(c.PrefixTokens)-s.overhead))
		}
		// The number comes first, where a script has a name, so that no two tails begin alike.
		tail := fmt.Sprintf("%d %s", i, text.Words(seed<<32+1<<31+uint64(i), s.words(float64(c.TailTokens)-2)))
		q := request{prefix: prefix, model: c.Models[model], numCtx: numCtx, system: prefixes[prefix], user: tail}
		if c.Workload == "user-message-prefix" {
			q.system, q.user = "", q.system+" "+tail
		}
		return q
	}
	add := func(queue int, q request) {
		for len(w.queues) <= queue {
			w.queues = append(w.queues, nil)
		}
		w.queues[queue] = append(w.queues[queue], q)
	}
	for i := range c.Requests {
		switch c.Workload {
		case "interleaved":
			add(0, make(i, i%manyPrefixes, 0))
		case "closed-loops":
			w.depth = 1
			add(i%n, make(i, i%n, 0))
		case "models":
			add(0, make(i, i%len(c.Models), i%len(c.Models)))
		case "num-ctx":
			q := make(i, 0, 0)
			q.numCtx *= 1 + i%2
			add(0, q)
		case "chat-turns":
			w.depth = 1
			q := make(i, 0, 0)
			q.begins = i/n%turns == 0
			add(i%n, q)
		default:
			add(0, make(i, 0, 0))
		}
	}
	return w
}

// messages returns a request's messages after those of earlier turns.
func (q request) messages(history []api.Message) []api.Message {
	var list []api.Message
	if len(history) > 0 && !q.begins {
		list = slices.Clone(history)
	} else if q.system != "" {
		list = []api.Message{{Role: "system", Content: q.system}}
	}
	return append(list, api.Message{Role: "user", Content: strings.TrimSpace(q.user)})
}
