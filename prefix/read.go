package prefix

import (
	"bytes"
	"cmp"
	"encoding/json"
	"math/bits"
	"strconv"
	"strings"
	"sync"

	"github.com/cespare/xxhash/v2"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// Endpoint is the format of a body.
type Endpoint uint8

const (
	None            Endpoint = iota // without a rendered prompt
	Chat                            // /api/chat
	Generate                        // /api/generate
	ChatCompletions                 // /v1/chat/completions
	Completions                     // /v1/completions
	Responses                       // /v1/responses
	Messages                        // /v1/messages
	Embed                           // /api/embed, /api/embeddings: the runner and its options only
)

// Reader reads chains. Its methods are safe for concurrent use.
type Reader struct {
	// canonical caches the fingerprints of lists of tools and tool calls by the fingerprint of
	// their JSON. An agent sends the same ones with every request, and parsing them costs more than
	// the rest.
	canonical *lru.Cache[uint64, []canonical]
	parsers   sync.Pool
}

// canonical is a tool, or a message's tool calls, in the form that a prompt has, however the
// request spelled it. The zero value means none.
type canonical struct {
	hash  uint64
	bytes int // of text
}

const canonicalKept = 4096 // at 16 bytes per tool or call, plus the LRU's own

// NewReader returns a reader.
func NewReader() *Reader {
	c, err := lru.New[uint64, []canonical](canonicalKept)
	if err != nil {
		panic(err) // the size is positive
	}
	return &Reader{canonical: c, parsers: sync.Pool{New: func() any { return &parser{writer: writer{buf: new([cell]byte)}} }}}
}

// Read returns the chain of a request for the model (upstream.ModelKey). The body must be an object
// that jsonscan has validated; a body that Ollama would refuse gets a chain as well. A request
// without a prompt, which only loads or unloads a model, has just the links of its runner and its
// settings.
func (r *Reader) Read(e Endpoint, model string, body []byte) Chain {
	return r.ReadMembers(e, model, body, nil, nil)
}

// ReadMembers is Read for a body whose members are known: everything that jsonscan.Object returned
// for it, in order, and its Long. It saves a second scan of a long body.
func (r *Reader) ReadMembers(e Endpoint, model string, body []byte, members []jsonscan.Member, long []byte) Chain {
	return r.read(e, model, body, members, long, nil)
}

func (r *Reader) read(e Endpoint, model string, body []byte, members []jsonscan.Member, long []byte, seen *look) Chain {
	p := r.parsers.Get().(*parser)
	defer func() {
		*p = parser{writer: writer{buf: p.buf}} // otherwise it would retain the body
		r.parsers.Put(p)
	}()
	p.reader, p.endpoint, p.long = r, e, long
	p.links, p.message, p.look = make([]Link, 0, capacity(len(body))), -1, seen
	p.digest.Reset()
	if members == nil {
		p.body.read(body)
	} else {
		p.body.take(body, members)
	}
	p.tools = p.body.raw[fTools]
	c := Chain{Runner: Options{Model: model}}
	if e == Chat || e == Generate || e == Embed { // bodies of /v1 cannot state options
		c.Runner = p.body.runner
		c.Runner.Model = model
	}
	p.loads(c.Runner)
	p.settings(e, &p.body)
	p.message = 0
	p.prompt()
	if len(p.links) == maxLinks {
		p.links[maxLinks-1].Hash, p.links[maxLinks-1].Bytes = p.sum(), p.bytes
	}
	c.Links, c.Messages, c.Images = p.links, int(p.message), p.pictures
	c.Leading, c.Inserted = int(p.leading), int(p.inserted)
	c.Opening = xxhash.Sum64String(model) ^ cmp.Or(p.opening[0]*3, p.opening[1])
	c.Conversation = xxhash.Sum64String(model) ^ p.opening[0]*3 ^ p.opening[1]
	return c
}

// capacity estimates the number of links of a body of n bytes, as if it were one long message.
func capacity(n int) int {
	const others = 8
	if n <= blockFlat {
		return n/blockMin + others
	}
	return blockFlat/blockMin + bits.Len(uint(n/blockFlat))*(blockFlat/blockMin/2) + others
}

// The members of bodies and messages that reach the prompt.
const (
	fOther = iota
	fOptions
	fShift
	fTemplate
	fSystem
	fPrompt
	fSuffix
	fRaw
	fContext
	fThink
	fTools
	fImages
	fMessages
	fRole
	fContent
	fThinking
	fToolCalls
	fToolName
	fToolCallID
	fName
	fReasoning
	fReasoningEffort
	fInstructions
	fInput
	fOutputConfig
	fType
	fCallID
	fOutput
	fArguments
	fEncrypted
	numFields
)

var fieldNames = [numFields]string{
	fOptions: "options", fShift: "shift", fTemplate: "template", fSystem: "system", fPrompt: "prompt", fSuffix: "suffix",
	fRaw: "raw", fContext: "context", fThink: "think", fTools: "tools", fImages: "images", fMessages: "messages",
	fRole: "role", fContent: "content", fThinking: "thinking", fToolCalls: "tool_calls", fToolName: "tool_name",
	fToolCallID: "tool_call_id", fName: "name", fReasoning: "reasoning", fReasoningEffort: "reasoning_effort",
	fInstructions: "instructions", fInput: "input", fOutputConfig: "output_config", fType: "type", fCallID: "call_id",
	fOutput: "output", fArguments: "arguments", fEncrypted: "encrypted_content",
}

var fieldsByName = func() map[string]uint8 {
	m := map[string]uint8{}
	for i, name := range fieldNames {
		if name != "" {
			m[name] = uint8(i)
		}
	}
	return m
}()

// fieldOf returns the member that a raw key names, matched as encoding/json does.
func fieldOf(key []byte) uint8 {
	if name := jsonscan.Name(key); name != nil {
		if f, ok := fieldsByName[string(name)]; ok {
			return f
		}
		if lower(name) {
			return fOther
		}
	}
	for f := fOther + 1; f < numFields; f++ {
		if jsonscan.KeyIs(key, []byte(fieldNames[f])) {
			return uint8(f)
		}
	}
	return fOther
}

// lower reports whether case folding leaves name unchanged.
func lower(name []byte) bool {
	for _, c := range name {
		if c >= 0x80 || 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return true
}

// fields are the raw values of an object's members; nil if absent or null.
type fields struct {
	raw    [numFields][]byte
	runner Options
	text   bool // the content must be a string
}

func (f *fields) read(object []byte) {
	c := jsonscan.NewCursor(object, 0)
	f.readAt(&c)
}

func (f *fields) readAt(c *jsonscan.Cursor) {
	for c.Enter(); c.More(); {
		f.set(c.Key(), c.Value())
	}
	f.complete()
}

func (f *fields) take(object []byte, members []jsonscan.Member) {
	for _, m := range members {
		f.set(object[m.Key:m.KeyEnd], object[m.Value:m.ValueEnd])
	}
	f.complete()
}

// set processes a member.
func (f *fields) set(key, value []byte) {
	if len(value) == 0 {
		return
	}
	switch field := fieldOf(key); {
	case field == fOptions: // encoding/json merges two objects into one
		f.runner.read(value)
	case value[0] != 'n':
		f.raw[field] = value
	case !keptByNull[field] && (field != fContent || !f.text):
		f.raw[field] = nil
	}
}

// complete runs after the last member.
func (f *fields) complete() {
	if s := f.raw[fShift]; len(s) > 0 && s[0] == 'f' {
		f.runner.put(shift, 0)
	}
}

// keptByNull are the members that Ollama decodes into Go strings and bools, which null leaves
// unchanged.
var keptByNull = [numFields]bool{
	fTemplate: true, fSystem: true, fPrompt: true, fSuffix: true, fRaw: true, fRole: true, fThinking: true, fToolName: true,
	fToolCallID: true, fName: true, fInstructions: true, fType: true, fCallID: true,
}

// read parses an options object. Its keys are matched exactly, as in Ollama; a negative num_gpu
// counts as not stated.
func (o *Options) read(object []byte) {
	if object[0] != '{' {
		*o = Options{} // null
		return
	}
	c := jsonscan.NewCursor(object, 0)
	for c.Enter(); c.More(); {
		key, value := c.Key(), c.Value()
		switch i := option(string(unquoted(key))); {
		case i < 0:
		case string(value) == "null":
			o.drop(i)
		default:
			o.parse(i, string(value)) // an invalid value counts as absent
		}
	}
}

// loads writes the model to load, and its options.
func (w *writer) loads(o Options) {
	w.put('R', []byte(o.Model))
	w.runner = o.hash()
	w.add(Link{Part: Runner, Message: -1})
}

// settings writes the settings that change how the whole prompt is rendered.
func (w *writer) settings(e Endpoint, f *fields) {
	switch e {
	case Chat:
		w.value('k', f.raw[fThink])
	case Generate:
		w.string('t', f.raw[fTemplate])
		w.string('s', f.raw[fSuffix])
		if string(f.raw[fRaw]) == "true" {
			w.put('r')
		}
		w.value('k', f.raw[fThink])
		w.value('c', f.raw[fContext])
	case Completions:
		w.string('s', f.raw[fSuffix])
	case ChatCompletions:
		effort := f.raw[fReasoningEffort]
		if o := f.raw[fReasoning]; o != nil && o[0] == '{' {
			effort = member(o, "effort")
		}
		w.effort(e, effort)
	case Responses:
		if f.raw[fThink] != nil {
			w.value('k', f.raw[fThink])
		} else if o := f.raw[fReasoning]; o != nil {
			w.effort(e, member(o, "effort"))
		}
	case Messages:
		kind, _ := jsonscan.Unquote(member(f.raw[fThinking], "type"))
		switch effort := member(f.raw[fOutputConfig], "effort"); {
		case kind == "enabled":
			w.value('k', []byte("true"))
		case kind == "disabled":
			w.value('k', []byte("false"))
		default:
			w.effort(e, effort)
		}
	}
	w.add(Link{Part: Settings, Message: -1})
}

// effort writes a reasoning effort as the think value that Ollama derives from it.
func (w *writer) effort(e Endpoint, raw []byte) {
	s, _ := jsonscan.Unquote(raw)
	if e == Messages { // Anthropic's effort has other names
		switch s = strings.ToLower(strings.TrimSpace(s)); s {
		case "low", "medium", "high", "max":
		case "xhigh":
			s = "high"
		default:
			return
		}
	}
	switch s {
	case "":
		return
	case "none":
		w.value('k', []byte("false"))
		return
	case "minimal":
		s = "low"
	case "xhigh", "ultra":
		s = "max"
	}
	w.value('k', []byte(strconv.Quote(s)))
}

// string writes a string unless it is empty.
func (w *writer) string(tag byte, raw []byte) {
	if s, _ := jsonscan.Unquote(raw); s != "" {
		w.put(tag, []byte(s))
	}
}

// value writes a JSON value, if present, in a canonical form.
func (w *writer) value(tag byte, raw []byte) {
	if raw != nil {
		w.put(tag, compact(raw))
	}
}

// compact returns the value without spaces and with canonical escapes. The order of keys stays.
func compact(raw []byte) []byte {
	var b bytes.Buffer
	c := jsonscan.NewCursor(raw, 0)
	compactTo(&b, &c, 0)
	return b.Bytes()
}

func compactTo(b *bytes.Buffer, c *jsonscan.Cursor, depth int) {
	kind := c.Kind()
	if kind != '{' && kind != '[' || depth > 100 {
		raw := c.Value()
		if s, ok := jsonscan.Unquote(raw); ok {
			raw, _ = json.Marshal(s)
		}
		b.Write(raw)
		return
	}
	b.WriteByte(kind)
	for c.Enter(); c.More(); {
		if kind == '{' {
			s, _ := jsonscan.Unquote(c.Key())
			key, _ := json.Marshal(s)
			b.Write(key)
			b.WriteByte(':')
		}
		compactTo(b, c, depth+1)
		b.WriteByte(',')
	}
	b.WriteByte(kind + 2) // } and ] are two code points after { and [
}

// member returns the raw value of a member of an object that Ollama decodes into a Go struct; nil
// if absent. Keys fold case, and null changes nothing.
func member(object []byte, name string) []byte {
	return last(object, func(key, value []byte) bool {
		return jsonscan.KeyIs(key, []byte(name)) && !bytes.Equal(value, []byte("null"))
	})
}

// entry is member for an object that Ollama decodes into a map: keys do not fold case, and null is a value.
func entry(object []byte, name string) []byte {
	return last(object, func(key, _ []byte) bool { return string(unquoted(key)) == name })
}

// last returns the raw value of the last member that counts; nil if there is none, or no object.
func last(object []byte, counts func(key, value []byte) bool) []byte {
	if len(object) == 0 || object[0] != '{' {
		return nil
	}
	var found []byte
	c := jsonscan.NewCursor(object, 0)
	for c.Enter(); c.More(); {
		key := c.Key()
		if value := c.Value(); counts(key, value) {
			found = value
		}
	}
	return found
}
