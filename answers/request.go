package answers

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math"
	"slices"
	"strconv"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Form is how an answer is written.
type Form uint8

// The forms of answers.
const (
	Whole       Form = 1 + iota // one JSON object
	Stream                      // lines, or events
	StreamUsage                 // events, of which the last one tells the usage: stream_options of /v1
)

// Identity is what two requests must have in common to have one answer.
//
// Two requests with one Sum are decoded by Ollama into equal requests, but for stream,
// stream_options and keep_alive. The opposite is not promised: a request that is spelled in an
// unusual way may have a Sum of its own, which costs a computation and never a wrong answer.
//
// A request does not determine its answer alone. These belong into a Key as well: the path, the
// model's digest, Ollama's version, and, where Clock or ClockOf says so, the Day. What no key has
// is the server's own settings (OLLAMA_CONTEXT_LENGTH, OLLAMA_KV_CACHE_TYPE and the like).
type Identity struct {
	// Sum is the SHA-256 of the parsed request and its endpoint.
	Sum  [sha256.Size]byte
	Form Form
	// Deterministic: the temperature is 0 or a seed is set, in the request or in the Modelfile, and
	// nothing outside of the model has a say, such as a web search.
	Deterministic bool
	// Prompt: there is something to evaluate. Otherwise the request only loads or unloads a model,
	// is refused by Ollama, or is one of which Ollama does not read every member in the same way,
	// such as with two members of one name. It must not be answered from a store.
	Prompt bool
	// Tools: the request has tools, see forms.Whole.
	Tools bool
	// Clock: what the request's own template writes into the prompt. See ClockOf for the model's.
	Clock Clock
}

// Defaults are the parameters of a Modelfile that a request may leave out, from /api/show. The zero
// value means that it sets none.
type Defaults struct {
	Temperature *float64
	Seed        *int64
}

// Identify reads a request's body, an object that jsonscan has validated. The members are all of
// those that jsonscan.Object returned for it, in order, and long is its Long; if members is nil,
// the body is scanned again. Of endpoints without generated text (None, Embed) the zero Identity is
// returned.
//
// What makes no difference: the order of members at the top level and in options, the case of keys
// at the top level, space between values, escapes in strings, how a floating-point number is
// written, and a member that states what Ollama takes if it is absent (see absent).
func Identify(
	e prefix.Endpoint, data []byte, members []jsonscan.Member, long []byte, defaults Defaults,
) Identity {
	if known(e) == nil {
		return Identity{}
	}
	if members == nil {
		o := jsonscan.NewObject(data)
		for m, ok := o.Next(); ok; m, ok = o.Next() {
			members = append(members, m)
		}
		long = o.Long()
	}
	r := readers.Get().(*reader)
	r.endpoint, r.data, r.long = e, data, long
	r.take(members)
	id := r.identity(defaults)
	r.release()
	return id
}

// reader reads one body.
type reader struct {
	canon
	endpoint prefix.Endpoint
	data     []byte
	members  []named // sorted by name
	options  []named // scratch memory
	twice    bool    // two members have one name, or may have
}

// named is a member with its name, as Ollama compares names.
type named struct {
	name  []byte
	value []byte
}

var readers = sync.Pool{New: func() any { return &reader{canon: canon{hash: sha256.New()}} }}

// release gives the reader back, without what it knows of the body.
func (r *reader) release() {
	clear(r.members)
	clear(r.options)
	r.members, r.options = r.members[:0], r.options[:0]
	r.data, r.long, r.twice = nil, nil, false
	r.reset()
	readers.Put(r)
}

// take keeps the members, sorted.
func (r *reader) take(members []jsonscan.Member) {
	unusual := false
	for _, m := range members {
		key, value := r.data[m.Key:m.KeyEnd], r.data[m.Value:m.ValueEnd]
		name := fold(key)
		unusual = unusual || !bytes.Equal(name, jsonscan.Name(key))
		r.members = append(r.members, named{name, value})
	}
	r.twice = order(r.members)
	if unusual && r.endpoint == prefix.Responses {
		r.twice = true // part of Ollama reads these bodies with, and part without regard to case
	}
}

// order sorts the members by name unless two of them have one name, and reports whether they do:
// then their order matters, and they stay as they are.
func order(members []named) bool {
	for i := range members {
		for j := range i {
			if bytes.Equal(members[i].name, members[j].name) {
				return true
			}
		}
		if i > mostSorted {
			return true // as if two were equal, which is safe; comparing all of them is not cheap
		}
	}
	slices.SortFunc(members, func(a, b named) int { return bytes.Compare(a.name, b.name) })
	return false
}

// mostSorted is more members than any request has.
const mostSorted = 200

// get returns the value of a member, or nil if it is absent or null.
func (r *reader) get(name string) []byte {
	for _, m := range r.members {
		if string(m.name) == name && m.value[0] != 'n' {
			return m.value
		}
	}
	return nil
}

// identity reads what take has kept.
func (r *reader) identity(defaults Defaults) Identity {
	id := Identity{Form: r.form(), Tools: !empty(r.get("tools"))}
	if r.twice {
		r.put('D') // so that it differs from every request without duplicates
	} else {
		id.Prompt = r.prompt()
		id.Deterministic = r.fixed(defaults) && !r.outside()
	}
	if t, ok := jsonscan.Unquote(r.get("template")); ok && r.endpoint == prefix.Generate {
		id.Clock = ClockOf("", t)
	}
	r.put(byte(r.endpoint))
	rules := known(r.endpoint)
	for _, m := range r.members {
		rule := rules[string(m.name)]
		if rule.ignored != nil && rule.ignored(m.value) || !r.twice && rule.absent(m.value) {
			continue
		}
		r.text(m.name)
		r.member(rule, m.value)
	}
	r.put('.')
	r.sum(&id.Sum)
	return id
}

// member writes the value of a member.
func (r *reader) member(rule rule, value []byte) {
	switch {
	case rule.options && value[0] == '{':
		r.optionsObject(value)
	case rule.copied:
		r.sized('c', value)
	case rule.float && numeric(value):
		r.float(value)
	default:
		r.raw = rule.raw
		r.valueOf(value)
		r.raw = false
	}
}

// valueOf writes a value.
func (r *reader) valueOf(value []byte) {
	c := jsonscan.NewCursor(value, 0)
	c.Know(r.long)
	r.value(&c)
}

// optionsObject writes native options. Ollama decodes them into a map, so their order and the
// spelling of their numbers is lost. A null is not nothing: some settings look at whether it is
// there.
func (r *reader) optionsObject(object []byte) {
	r.readOptions(object)
	if order(r.options) {
		r.put('D')
	}
	r.put('o')
	for _, m := range r.options {
		r.text(m.name)
		if numeric(m.value) {
			r.float(m.value)
		} else {
			r.valueOf(m.value)
		}
	}
	r.put('}')
}

// readOptions lists the members of an object, by their exact names.
func (r *reader) readOptions(object []byte) {
	r.options = r.options[:0]
	c := jsonscan.NewCursor(object, 0)
	c.Know(r.long)
	for c.Enter(); c.More(); {
		name := decoded(c.Key())
		r.options = append(r.options, named{name, c.Value()})
	}
}

// form returns the form that is asked for.
func (r *reader) form() Form {
	native := r.endpoint == prefix.Chat || r.endpoint == prefix.Generate
	stream, usage := native, false
	for _, m := range r.members {
		null := m.value[0] == 'n'
		switch string(m.name) {
		case "stream":
			switch {
			case !null:
				stream = m.value[0] == 't'
			case native, r.endpoint == prefix.Responses: // it is decoded into a pointer
				stream = native
			}
		case "stream_options":
			if null {
				usage = false
			} else if v := lastMember(m.value, "include_usage"); v != nil {
				usage = v[0] == 't'
			}
		}
	}
	switch {
	case !stream:
		return Whole
	case usage && (r.endpoint == prefix.ChatCompletions || r.endpoint == prefix.Completions):
		return StreamUsage
	}
	return Stream
}

// prompt reports whether there is something to evaluate.
func (r *reader) prompt() bool {
	filled := func(name string) bool { return !empty(r.get(name)) }
	switch r.endpoint {
	case prefix.Generate, prefix.Completions:
		return filled("prompt")
	case prefix.Responses:
		return filled("input") || filled("instructions")
	}
	return filled("messages")
}

// empty reports whether a value is absent, an empty string, or an empty array.
func empty(value []byte) bool {
	if len(value) == 0 {
		return true
	}
	if value[0] == '[' {
		c := jsonscan.NewCursor(value, 0)
		c.Enter()
		return !c.More()
	}
	return string(value) == `""`
}

// fixed reports whether the sampling leaves nothing to chance.
//
// What a request does not state is, in Ollama's code: of the native endpoints and of /v1/messages,
// the Modelfile's; of the other endpoints under /v1, a temperature of 1 and the Modelfile's seed.
func (r *reader) fixed(defaults Defaults) bool {
	temperature, seed, ok := r.sampling()
	switch {
	case !ok:
		return false
	case temperature != nil:
		if v, ok := number(temperature); ok && greedy(v) {
			return true
		}
	case defaults.Temperature != nil && r.inherits() && greedy(*defaults.Temperature):
		return true
	}
	if seed != nil {
		v, ok := number(seed)
		return ok && math.Abs(v) < 1<<53 && reproducible(int64(v))
	}
	return defaults.Seed != nil && reproducible(*defaults.Seed)
}

// sampling returns the temperature and the seed that the request states, or false if it states
// something twice.
func (r *reader) sampling() (temperature, seed []byte, ok bool) {
	switch r.endpoint {
	case prefix.Messages, prefix.Responses:
		return r.get("temperature"), nil, true // there is no seed
	case prefix.ChatCompletions, prefix.Completions:
		return r.get("temperature"), r.get("seed"), true
	}
	o := r.get("options")
	if o == nil || o[0] != '{' {
		return nil, nil, true
	}
	r.readOptions(o)
	for _, m := range r.options {
		switch {
		case m.value[0] == 'n':
		case string(m.name) == "temperature":
			temperature = m.value
		case string(m.name) == "seed":
			seed = m.value
		}
	}
	return temperature, seed, !order(r.options)
}

// inherits reports whether the Modelfile's temperature is used if the request states none.
func (r *reader) inherits() bool {
	return r.endpoint == prefix.Chat || r.endpoint == prefix.Generate || r.endpoint == prefix.Messages
}

// greedy reports whether a temperature is 0 in the engine, which has floats of 32 bits.
func greedy(temperature float64) bool { return float32(temperature) == 0 }

// reproducible reports whether a seed is one: -1 asks for a new one each time, and the engine has
// 32 bits of it.
func reproducible(seed int64) bool { return uint32(seed) != math.MaxUint32 }

// numeric reports whether a value is a number.
func numeric(value []byte) bool { return value[0] == '-' || '0' <= value[0] && value[0] <= '9' }

// number parses a JSON number.
func number(value []byte) (float64, bool) {
	if !numeric(value) {
		return 0, false
	}
	v, err := strconv.ParseFloat(string(value), 64)
	return v, err == nil
}

// outside reports whether the answer may depend on something outside of the model and the request:
// a tool that the server runs, or a conversation that it remembers.
func (r *reader) outside() bool {
	if r.get("previous_response_id") != nil || r.get("conversation") != nil {
		return true
	}
	tools := r.get("tools")
	if tools == nil || tools[0] != '[' {
		return false
	}
	c := jsonscan.NewCursor(tools, 0)
	c.Know(r.long)
	for c.Enter(); c.More(); {
		if c.Kind() != '{' {
			c.Value()
			continue
		}
		for c.Enter(); c.More(); {
			key, value := c.Key(), c.Value()
			if jsonscan.KeyIs(key, []byte("type")) && !harmless(value) {
				return true
			}
		}
	}
	return false
}

// harmless reports whether a tool's type is one that the client runs.
func harmless(kind []byte) bool {
	switch s, _ := jsonscan.Unquote(kind); s {
	case "function", "custom":
		return true
	}
	return kind[0] == 'n' || string(kind) == `""`
}

// lastMember returns the last member of that name that is not null, or nil if it is no object.
func lastMember(object []byte, name string) (value []byte) {
	if object[0] != '{' {
		return nil
	}
	c := jsonscan.NewCursor(object, 0)
	for c.Enter(); c.More(); {
		key, v := c.Key(), c.Value()
		if v[0] != 'n' && jsonscan.KeyIs(key, []byte(name)) {
			value = v
		}
	}
	return value
}

// fold returns a raw key in the form that is equal for two keys that encoding/json takes for one.
func fold(key []byte) []byte {
	name := key[1 : len(key)-1]
	plain := true
	for _, b := range name {
		if b >= utf8.RuneSelf || b == '\\' || 'A' <= b && b <= 'Z' {
			plain = false
			break
		}
	}
	if plain {
		return name
	}
	var out []byte
	for _, c := range string(decoded(key)) {
		out = utf8.AppendRune(out, foldRune(c))
	}
	return out
}

// foldRune returns the smallest of the runes that are one under simple folding, in lower case if it
// is ASCII.
func foldRune(c rune) rune {
	least := c
	for f := unicode.SimpleFold(c); f != c; f = unicode.SimpleFold(f) {
		least = min(least, f)
	}
	if 'A' <= least && least <= 'Z' {
		least += 'a' - 'A'
	}
	return least
}

// decoded returns the text of a raw string.
func decoded(raw []byte) []byte {
	if name := jsonscan.Name(raw); name != nil && utf8.Valid(name) {
		return name
	}
	s, _ := jsonscan.Unquote(raw)
	return []byte(s)
}

// canon writes values so that two of them are equal if, and only if, their text is equal but for
// space and the escapes in strings. What it writes can be read in one way only.
type canon struct {
	hash hash.Hash
	buf  []byte
	long []byte // jsonscan.Object.Long
	raw  bool   // strings are to be kept as they are written
}

const flushAt = 16 << 10

func (w *canon) reset() {
	w.hash.Reset()
	w.buf = w.buf[:0]
	if cap(w.buf) > 4*flushAt {
		w.buf = nil
	}
}

func (w *canon) flush() {
	w.hash.Write(w.buf)
	w.buf = w.buf[:0]
}

func (w *canon) sum(to *[sha256.Size]byte) {
	w.flush()
	w.buf = w.hash.Sum(w.buf)
	copy(to[:], w.buf)
}

func (w *canon) put(b byte) { w.buf = append(w.buf, b) }

func (w *canon) write(b []byte) {
	if len(w.buf)+len(b) <= flushAt {
		w.buf = append(w.buf, b...)
		return
	}
	w.flush()
	if len(b) >= flushAt {
		w.hash.Write(b)
		return
	}
	w.buf = append(w.buf, b...)
}

// sized writes text of any kind.
func (w *canon) sized(tag byte, b []byte) {
	w.put(tag)
	w.buf = binary.BigEndian.AppendUint64(w.buf, uint64(len(b)))
	w.write(b)
}

// text writes a string of valid UTF-8, or one that is to be kept apart from all of them. 0xff is in
// no valid one.
func (w *canon) text(s []byte) {
	if !utf8.Valid(s) {
		w.sized('r', s)
		return
	}
	w.put('s')
	w.write(s)
	w.put(0xff)
}

// value writes the value at the cursor, and steps past it.
func (w *canon) value(c *jsonscan.Cursor) {
	switch kind := c.Kind(); kind {
	case '{', '[':
		w.put(kind)
		for c.Enter(); c.More(); {
			if kind == '{' {
				w.string(c.Key())
			}
			w.value(c)
		}
		w.put(kind + 2) // } and ] come two after { and [
	case '"':
		w.string(c.Value())
	default: // a number, as it is written, or a literal
		w.put('#')
		w.write(c.Value())
		w.put(0xff)
	}
}

// float writes a number that Ollama decodes into floating point. Of long ones it keeps the
// spelling: where 32 bits are meant, two of them may be one in 64 bits and two in 32.
func (w *canon) float(value []byte) {
	const digits = 15
	if v, ok := number(value); ok && len(value) <= digits {
		w.put('f')
		w.buf = binary.BigEndian.AppendUint64(w.buf, math.Float64bits(v))
		return
	}
	w.put('#')
	w.write(value)
	w.put(0xff)
}

// string writes a raw string, quotes included.
func (w *canon) string(raw []byte) {
	s := raw[1 : len(raw)-1]
	if w.raw || !utf8.Valid(s) || len(s) > unchecked && hasControl(s) {
		w.sized('r', s) // what it is decoded to is not told apart from others
		return
	}
	w.put('s')
	for {
		i := bytes.IndexByte(s, '\\')
		if i < 0 || i+1 >= len(s) {
			break
		}
		w.write(s[:i])
		s = s[i+w.escape(s[i:]):]
	}
	w.write(s)
	w.put(0xff)
}

// unchecked is the length of strings up to which jsonscan looks for control characters.
const unchecked = 32 << 10

func hasControl(s []byte) bool {
	for _, b := range s {
		if b < ' ' {
			return true
		}
	}
	return false
}

// simple are the escapes of one letter.
var simple = [256]byte{
	'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t',
}

// escape writes the rune that s begins with the escape of, and returns the length of that. What is
// decoded to something else than it says, such as half of a surrogate pair, is written as it is,
// after 0xfe, which is in no valid text.
func (w *canon) escape(s []byte) int {
	if b := simple[s[1]]; b != 0 {
		w.put(b)
		return 2
	}
	c := hex4(s)
	switch {
	case c < 0:
		w.put(0xfe)
		w.put(s[1])
		return 2
	case c < 0xd800 || c > 0xdfff:
		w.buf = utf8.AppendRune(w.buf, c)
		return 6
	case c < 0xdc00 && len(s) >= 12:
		if low := hex4(s[6:]); 0xdc00 <= low && low <= 0xdfff {
			w.buf = utf8.AppendRune(w.buf, (c-0xd800)<<10+(low-0xdc00)+0x10000)
			return 12
		}
	}
	w.put(0xfe)
	w.put('u')
	w.buf = binary.BigEndian.AppendUint16(w.buf, uint16(c))
	return 6
}

// hex4 reads \u and four digits, or returns -1.
func hex4(s []byte) rune {
	if len(s) < 6 || s[0] != '\\' || s[1] != 'u' {
		return -1
	}
	var c rune
	for _, b := range s[2:6] {
		switch {
		case '0' <= b && b <= '9':
			b -= '0'
		case 'a' <= b|0x20 && b|0x20 <= 'f':
			b = b | 0x20 - 'a' + 10
		default:
			return -1
		}
		c = c<<4 | rune(b)
	}
	return c
}
