package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// defaultPrewarmPath is the endpoint of a line without a path.
const defaultPrewarmPath = "/api/chat"

// Prewarm is the list of requests whose prompts should be warm before anyone asks. Create it with
// ParsePrewarm. Its methods are safe for concurrent use; the nil *Prewarm has no requests.
type Prewarm struct {
	requests atomic.Pointer[[]prewarmRequest]
	replaced atomic.Pointer[func()] // if not nil, called after Replace
}

// prewarmRequest is one line of the list.
type prewarmRequest struct {
	path  string
	key   string // upstream.ModelKey of its model
	body  string // as it is sent, limited to an answer of one token
	chain *prefix.Chain
}

// same reports whether two requests send the same.
func (r prewarmRequest) same(other prewarmRequest) bool {
	return r.path == other.path && r.body == other.body
}

// ParsePrewarm reads requests in the form that Replace reads.
func ParsePrewarm(text string) (*Prewarm, error) {
	p := &Prewarm{}
	if err := p.Replace(text); err != nil {
		return nil, err
	}
	return p, nil
}

// Replace reads one request per line, in JSON as a client would send it, with the endpoint as its
// member "path" if that is not /api/chat, or as {"path": …, "body": …}. Blank lines are skipped. On
// an error, which names the line, the previous requests stay.
func (p *Prewarm) Replace(text string) error {
	list := []prewarmRequest{}
	reader := prefix.NewReader()
	for i, line := range strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n") {
		if strings.TrimSpace(line) == "" {
			continue
		}
		r, err := parsePrewarm(reader, []byte(line))
		if err != nil {
			return fmt.Errorf("line %d: %w", i+1, err)
		}
		if !slices.ContainsFunc(list, r.same) {
			list = append(list, r)
		}
	}
	if len(list) == 0 {
		return errors.New("no request in it: write one a line, in JSON")
	}
	p.requests.Store(&list)
	if told := p.replaced.Load(); told != nil {
		(*told)()
	}
	return nil
}

// Len returns the number of requests.
func (p *Prewarm) Len() int { return len(p.list()) }

func (p *Prewarm) list() []prewarmRequest {
	if p == nil {
		return nil
	}
	return *p.requests.Load()
}

// parsePrewarm parses one line.
func parsePrewarm(reader *prefix.Reader, line []byte) (r prewarmRequest, err error) {
	path, members, err := addressed(line)
	if err != nil {
		return r, err
	}
	body, err := answeredShortly(path, members)
	if err != nil {
		return r, err
	}
	r.path = path
	f, err := scan(body, nil)
	if err != nil {
		return r, err
	}
	switch r.key = upstream.ModelKey(f.model); {
	case r.key == "":
		return r, fmt.Errorf(`"model": %q is not the name of one`, f.model)
	case upstream.IsCloud(f.model):
		return r, fmt.Errorf("model %q runs elsewhere, and is not kept warm from here", f.model)
	case f.keepAlive == keepAliveInvalid:
		return r, errors.New(`"keep_alive": want a duration such as "1h", or a number of seconds`)
	case f.keepAlive == keepAliveSet && f.duration == 0:
		return r, errors.New(`"keep_alive": 0 would unload the model at once`)
	}
	chain := reader.ReadMembers(routes[path].prompt, r.key, body, f.members, f.long)
	if !chain.HasPrompt() {
		return r, fmt.Errorf("a request to %s without a prompt", r.path)
	}
	r.body, r.chain = string(body), &chain
	return r, nil
}

// addressed splits a line into its path and its body's members.
func addressed(line []byte) (path string, members map[string]json.RawMessage, err error) {
	if err := json.Unmarshal(line, &members); err != nil {
		return "", nil, fmt.Errorf("want a request, as one JSON object: %w", err)
	}
	path = defaultPrewarmPath
	if text, ok := members["path"]; ok {
		delete(members, "path")
		if json.Unmarshal(text, &path) != nil {
			return "", nil, fmt.Errorf(`"path": %s is no string`, text)
		}
		if body, ok := members["body"]; ok && len(members) == 1 {
			members = nil
			if err := json.Unmarshal(body, &members); err != nil {
				return "", nil, fmt.Errorf(`"body": want a JSON object: %w`, err)
			}
		}
	}
	if members == nil {
		return "", nil, errors.New("want a request, as one JSON object, and not null")
	}
	if rt := routes[path]; rt.prompt == prefix.None || rt.embed {
		return "", nil, fmt.Errorf("path %q: want one of %s", path, strings.Join(prewarmPaths(), ", "))
	}
	return path, members, nil
}

// prewarmPaths lists the endpoints that a line may use.
func prewarmPaths() []string {
	paths := slices.Collect(maps.Keys(routes))
	paths = slices.DeleteFunc(paths, func(path string) bool {
		return routes[path].prompt == prefix.None || routes[path].embed
	})
	slices.Sort(paths)
	return paths
}

// answeredShortly returns the body, changed to ask for an answer of one token that is not streamed.
// Zero tokens would mean no limit to some servers.
func answeredShortly(path string, members map[string]json.RawMessage) ([]byte, error) {
	one := json.RawMessage("1")
	set(members, "stream", json.RawMessage("false"))
	switch path {
	case "/api/chat", "/api/generate":
		options := map[string]json.RawMessage{}
		for key, value := range members {
			if strings.EqualFold(key, "options") && json.Unmarshal(value, &options) != nil {
				return nil, errors.New(`"options": want a JSON object`)
			}
		}
		if options == nil {
			options = map[string]json.RawMessage{}
		}
		options["num_predict"] = one
		text, err := unescaped(options)
		if err != nil {
			return nil, err
		}
		set(members, "options", text)
	case "/v1/responses":
		set(members, "max_output_tokens", one)
	default:
		set(members, "max_tokens", one)
		set(members, "max_completion_tokens", nil)
		set(members, "stream_options", nil)
	}
	return unescaped(members)
}

// set sets a member, whatever the case of its name, as Ollama reads it; nil removes it.
func set(members map[string]json.RawMessage, name string, value json.RawMessage) {
	maps.DeleteFunc(members, func(key string, _ json.RawMessage) bool {
		return strings.EqualFold(key, name)
	})
	if value != nil {
		members[name] = value
	}
}

// unescaped writes a JSON object without changing its values, since prompts have to stay the same.
func unescaped(members map[string]json.RawMessage) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(members)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}
