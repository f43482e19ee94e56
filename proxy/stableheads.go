package proxy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// StableHeads are the rules that neutralize text in prompts which differs from request to request
// and means nothing to a model, so that Ollama can reuse what follows it. The zero value has no
// rules and edits nothing.
//
// Each edit is made in place and keeps the body's length: digits become zeros, and removed text
// becomes spaces between JSON values. Text that does not match a rule exactly is left as it is.
type StableHeads struct{ rules []stableRule }

type stableRule struct {
	name string
	// edit applies the rule, and returns the number of edits.
	edit func(b promptBody) int
}

// stableRules are all rules, in the order of application.
var stableRules = []stableRule{
	{"claude-billing", steadyBilling},
	{"total-tokens", removeCountdowns},
}

// HeadEdits counts the edits of one rule of StableHeads in a request.
type HeadEdits struct {
	Rule  string
	Edits int // at least 1
}

// ParseStableHeads parses a list of rule names, or "off".
func ParseStableHeads(names []string) (StableHeads, error) {
	var s StableHeads
	if len(names) == 1 && names[0] == s.String() {
		return s, nil
	}
	var known []string
	for _, rule := range stableRules {
		known = append(known, rule.name)
		if slices.Contains(names, rule.name) {
			s.rules = append(s.rules, rule)
		}
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return StableHeads{}, fmt.Errorf("there is no rule %q: want off, or one or several of %s", name, strings.Join(known, ", "))
		}
	}
	return s, nil
}

// String lists the rules in the form that ParseStableHeads reads; "off" if there are none.
func (s StableHeads) String() string {
	if len(s.rules) == 0 {
		return "off"
	}
	var names []string
	for _, rule := range s.rules {
		names = append(names, rule.name)
	}
	return strings.Join(names, ", ")
}

// apply edits a body, whose members are known, in place, and returns the edits by rule.
func (s StableHeads) apply(e prefix.Endpoint, body []byte, members []jsonscan.Member, long []byte) (done []HeadEdits) {
	if len(s.rules) == 0 || e != prefix.Chat && e != prefix.ChatCompletions && e != prefix.Messages {
		return nil
	}
	b := promptBody{long: long}
	for _, m := range members {
		key, value := body[m.Key:m.KeyEnd], body[m.Value:m.ValueEnd]
		switch {
		case jsonscan.KeyIs(key, []byte("messages")):
			b.messages.add(value)
		case e == prefix.Messages && jsonscan.KeyIs(key, []byte("system")):
			b.system.add(value)
		}
	}
	for _, rule := range s.rules {
		if n := rule.edit(b); n > 0 {
			done = append(done, HeadEdits{rule.name, n})
		}
	}
	return done
}

// member is the value of a member of an object, as a slice of the body.
type member struct {
	value []byte // nil if absent or repeated: only Ollama knows which one counts
	n     int
}

func (m *member) add(value []byte) {
	if m.n++; m.n > 1 {
		value = nil
	}
	m.value = value
}

// isList reports whether the value is present and an array.
func (m member) isList() bool { return len(m.value) > 0 && m.value[0] == '[' }

// promptBody is a body with messages. Its values are slices of the body, so the rules write to the
// body through them.
type promptBody struct {
	system, messages member // system: of /v1/messages
	long             []byte // a string whose end is already known: jsonscan.Object.Long
}

// object finds the members with these names; n is the number of all members. Keys fold case, as for
// most objects that Ollama reads; where they do not, a member that only folding finds is not
// rendered into the prompt. A value that is not an object has no members.
func (b promptBody) object(raw []byte, names ...string) (found []member, n int) {
	found = make([]member, len(names))
	if len(raw) == 0 || raw[0] != '{' {
		return found, 0
	}
	c := jsonscan.NewCursor(raw, 0)
	c.Know(b.long)
	for c.Enter(); c.More(); n++ {
		key := c.Key()
		value := c.Value()
		for i, name := range names {
			if jsonscan.KeyIs(key, []byte(name)) {
				found[i].add(value)
			}
		}
	}
	return found, n
}

// isText reports whether raw is the JSON string for text.
func isText(raw []byte, text string) bool {
	s, ok := jsonscan.Unquote(raw)
	return ok && s == text
}

// maxShort is the longest text, in bytes of JSON, that a rule examines as a whole.
const maxShort = 512

// systemText returns the first raw string of the system prompt, or nil.
func (b promptBody) systemText() []byte {
	content := b.system.value
	if b.system.n == 0 {
		if !b.messages.isList() {
			return nil
		}
		c := jsonscan.NewCursor(b.messages.value, 0)
		c.Know(b.long)
		if c.Enter(); !c.More() || c.Kind() != '{' {
			return nil
		}
		first, _ := b.object(c.Value(), "role", "content")
		if !isText(first[0].value, "system") {
			return nil
		}
		content = first[1].value
	}
	if len(content) > 0 && content[0] == '[' {
		c := jsonscan.NewCursor(content, 0)
		c.Know(b.long)
		if c.Enter(); !c.More() {
			return nil
		}
		block, _ := b.object(c.Value(), "type", "text")
		if !isText(block[0].value, "text") {
			return nil
		}
		content = block[1].value
	}
	if len(content) < 2 || content[0] != '"' {
		return nil
	}
	return content
}

// billing matches the line that begins Claude Code's system prompt, in its JSON form:
//
//	x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;
//
// The last part of the version and cch are checksums, of the first message and of the whole
// request.
var (
	billing = regexp.MustCompile(`^x-anthropic-billing-header:(?: [a-z_]+=[A-Za-z0-9._-]+;)+ ?(?:\\n|")`)
	checks  = regexp.MustCompile(` (?:cch=|cc_version=[0-9]+\.[0-9]+\.[0-9]+\.)([0-9a-f]{3,64});`)
)

// steadyBilling is the rule claude-billing: it replaces the digits of the checksums by zeros.
func steadyBilling(b promptBody) (edits int) {
	text := b.systemText()
	if text == nil {
		return 0
	}
	text = text[1:min(len(text), maxShort)] // including the closing quote if the text is that short
	line := billing.Find(text)
	for _, at := range checks.FindAllSubmatchIndex(line, -1) {
		for i := at[2]; i < at[3]; i++ {
			line[i] = '0' // even if it is zero already: the next request's digit differs
		}
		edits++
	}
	return edits
}

// countdown matches Claude Code's system message about the remaining tokens.
var countdown = regexp.MustCompile(`^\s*(?:` +
	`<total_tokens>[0-9]+ tokens left</total_tokens>|` +
	`<system-reminder>\s*<total_tokens>[0-9]+ tokens left</total_tokens>\s*</system-reminder>)\s*$`)

// removeCountdowns is the rule total-tokens: it removes system messages that contain only a
// countdown. Most templates move system messages to the start of the prompt, so each one more would
// shift everything after it.
func removeCountdowns(b promptBody) (edits int) {
	if !b.messages.isList() {
		return 0
	}
	type span struct {
		start, end int
		countdown  bool
	}
	var list []span
	text := b.messages.value
	c := jsonscan.NewCursor(text, 0)
	c.Know(b.long)
	for c.Enter(); c.More(); {
		start := c.Pos()
		value := c.Value()
		s := span{start, start + len(value), b.isCountdown(value)}
		if list = append(list, s); s.countdown {
			edits++
		}
	}
	said := len(list) - 1 // the last message that is not a countdown
	for said >= 0 && list[said].countdown {
		said--
	}
	if said < 0 {
		return 0 // without messages the request would mean something else
	}
	if last := len(list) - 1; said < last {
		if m, _ := b.object(text[list[said].start:list[said].end], "role"); isText(m[0].value, "assistant") {
			list[last].countdown = false // keep it: a final assistant message would be continued
			edits--
		}
	}
	kept := -1 // the last message that is kept
	for i, s := range list {
		next := len(text)
		if i+1 < len(list) {
			next = list[i+1].start
		}
		switch {
		case !s.countdown:
			kept = i
		case i+1 < len(list):
			blank(text[s.start:next])
		default: // with the comma before it
			blank(text[list[kept].end:s.end])
		}
	}
	return edits
}

// blank overwrites JSON text with spaces.
func blank(text []byte) {
	for i := range text {
		text[i] = ' '
	}
}

// isCountdown reports whether a message has exactly a role and a content, and is a countdown.
func (b promptBody) isCountdown(raw []byte) bool {
	if len(raw) == 0 || raw[0] != '{' || len(raw) > maxShort {
		return false
	}
	m, n := b.object(raw, "role", "content")
	if n != 2 || !isText(m[0].value, "system") {
		return false
	}
	if content := m[1]; !content.isList() {
		return isCountdownText(content.value)
	}
	blocks := 0
	c := jsonscan.NewCursor(m[1].value, 0)
	for c.Enter(); c.More(); blocks++ {
		block, _ := b.object(c.Value(), "type", "text")
		if !isText(block[0].value, "text") || !isCountdownText(block[1].value) {
			return false
		}
	}
	return blocks > 0
}

func isCountdownText(raw []byte) bool {
	s, ok := jsonscan.Unquote(raw)
	return ok && countdown.MatchString(s)
}

// steady applies the rules to a body that is about to be sent.
func (h *Handler) steady(ex *exchange, data []byte) {
	if ex.runsHere() {
		ex.Heads = h.StableHeads.apply(ex.prompt, data, ex.fields.members, ex.fields.long)
	}
}

// steadyText reports whether the rules would have edited a compressed body, given its decompressed
// text.
func (h *Handler) steadyText(ex *exchange, text []byte) {
	if ex.runsHere() && h.StableHeads.apply(ex.prompt, text, ex.fields.members, ex.fields.long) != nil {
		ex.Unedited = UneditedEncoded
	}
}

// edited describes the changes to the request other than keep_alive, for the ledger's detail; "" if
// there are none.
func (ex *exchange) edited() string {
	var list []string
	if ex.fit.made {
		list = append(list, ex.fit.String())
	}
	if ex.Heads != nil {
		list = append(list, "edited by --stable-heads "+ex.headsEdited())
	}
	return strings.Join(list, "; ")
}

// headsEdited lists the rules that edited the request; "" if none did.
func (ex *exchange) headsEdited() string {
	var names []string
	for _, done := range ex.Heads {
		names = append(names, done.Rule)
	}
	return strings.Join(names, ",")
}
