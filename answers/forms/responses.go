package forms

import (
	"bytes"
	"strconv"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// In /v1/responses, Ollama writes an answer in one piece from structs, in the order of reAnswer and
// so on, and the events of a stream from maps, in the order of the alphabet. Its last event has the
// whole answer.

// twoOrders are the two layouts of an object: as it is in a whole answer, and in an event.
type twoOrders struct {
	whole, event layout
	place        []int // in event, by the place in whole
}

func inTwoOrders(whole, event layout) twoOrders {
	o := twoOrders{whole: whole, event: event, place: make([]int, len(whole))}
	for i, name := range whole {
		for j, other := range event {
			if other == name {
				o.place[i] = j
			}
		}
	}
	return o
}

// readEvent reads an object of an event; v is in the order of a whole answer.
func (o *twoOrders) readEvent(text []byte, v [][]byte) bool {
	var c [len(reMembers{})][]byte
	if !o.event.read(text, c[:]) {
		return false
	}
	for i, place := range o.place {
		v[i] = c[place]
	}
	return true
}

// appendEvent writes an object of an event; v is in the order of a whole answer.
func (o *twoOrders) appendEvent(b []byte, v [][]byte) []byte {
	var c [len(reMembers{})][]byte
	for i, place := range o.place {
		c[place] = v[i]
	}
	return o.event.append(b, c[:])
}

// reMembers has as many places as the largest of the objects has members.
type reMembers [31][]byte

// The places that matter in an answer.
const (
	reID        = 0
	reCompleted = 3
	reStatus    = 4
	reOutput    = 9
	reTools     = 11
	reText      = 15
	reReasoning = 21
	reUsage     = 22
)

var reAnswer = inTwoOrders(layout{
	"id", "object", "created_at", "completed_at", "status", "incomplete_details", "model",
	"previous_response_id", "instructions", "output", "error", "tools", "tool_choice", "truncation",
	"parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs",
	"temperature", "reasoning", "usage", "max_output_tokens", "max_tool_calls", "store",
	"background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}, layout{
	"background", "completed_at", "created_at", "error", "frequency_penalty", "id",
	"incomplete_details", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "model",
	"object", "output", "parallel_tool_calls", "presence_penalty", "previous_response_id",
	"prompt_cache_key", "reasoning", "safety_identifier", "service_tier", "status", "store",
	"temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "usage",
})

var (
	reFormat = inTwoOrders(
		layout{"type", "name", "schema", "strict"},
		layout{"name", "schema", "strict", "type"})
	reCounts = inTwoOrders(layout{
		"input_tokens", "output_tokens", "total_tokens", "input_tokens_details",
		"output_tokens_details",
	}, layout{
		"input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details",
		"total_tokens",
	})
	reMessage = inTwoOrders(
		layout{"id", "type", "status", "role", "content"},
		layout{"content", "id", "role", "status", "type"})
	reContent = inTwoOrders(
		layout{"type", "text", "annotations", "logprobs"},
		layout{"annotations", "logprobs", "text", "type"})
	reCall = inTwoOrders(
		layout{"id", "type", "status", "call_id", "name", "namespace", "arguments"},
		layout{"arguments", "call_id", "id", "name", "namespace", "status", "type"})
	reThought = inTwoOrders(
		layout{"id", "type", "summary", "encrypted_content"},
		layout{"encrypted_content", "id", "summary", "type"})
	reTool = inTwoOrders(
		layout{"type", "name", "description", "strict", "parameters"},
		layout{"description", "name", "parameters", "strict", "type"})
	reSummary = inTwoOrders(layout{"type", "text"}, layout{"text", "type"})

	reFormats = layout{"format"}            // of text
	reEffort  = layout{"effort", "summary"} // of reasoning
)

// The places in reMessage, reContent, reCall, reThought and reSummary.
const (
	itemID      = 0
	itemType    = 1
	itemStatus  = 2
	callID      = 3
	callName    = 4
	callArgs    = 6
	messageList = 4
	contentText = 1
	thoughtList = 2
	thoughtText = 3
)

var (
	typeReasoning = []byte(`"reasoning"`)
	typeCall      = []byte(`"function_call"`)
	typeOutput    = []byte(`"output_text"`)
	typeSummary   = []byte(`"summary_text"`)
	inProgress    = []byte(`"in_progress"`)
)

// item is one thing in the output of an answer, in either form.
type item struct {
	kind []byte    // typeReasoning, typeCall or typeMessage
	v    reMembers // in the order of a whole answer; of thoughts and messages without the list
	text []byte    // of thoughts and messages
}

// orders returns the layouts of an item.
func (t *item) orders() *twoOrders {
	switch {
	case bytes.Equal(t.kind, typeReasoning):
		return &reThought
	case bytes.Equal(t.kind, typeCall):
		return &reCall
	}
	return &reMessage
}

// reader reads one of two forms of an object.
type reader func(o *twoOrders, text []byte, v [][]byte) bool

// writer writes one of two forms of an object.
type writer func(o *twoOrders, b []byte, v [][]byte) []byte

func readWholeForm(o *twoOrders, text []byte, v [][]byte) bool { return o.whole.read(text, v) }
func readEventForm(o *twoOrders, text []byte, v [][]byte) bool { return o.readEvent(text, v) }
func writeWhole(o *twoOrders, b []byte, v [][]byte) []byte     { return o.whole.append(b, v) }
func writeEvent(o *twoOrders, b []byte, v [][]byte) []byte     { return o.appendEvent(b, v) }

// read reads the item; it returns false if it is none of those that Ollama makes of a generation
// (but a call of web_search or tool_search).
func (t *item) read(text []byte, read reader) bool {
	t.kind = member(text, "type")
	o := t.orders()
	if !read(o, text, t.v[:]) {
		return false
	}
	switch o {
	case &reCall:
		return all(t.v[itemID], t.v[callID], t.v[callName]) && isText(t.v[callArgs]) &&
			string(t.v[itemStatus]) == `"completed"`
	case &reThought:
		if !all(t.v[:thoughtText+1]...) || !t.readText(&reSummary, t.v[thoughtList], read) {
			return false
		}
		return bytes.Equal(t.text, t.v[thoughtText]) // which is not encrypted
	}
	return bytes.Equal(t.kind, typeMessage) && all(t.v[:messageList+1]...) &&
		string(t.v[itemStatus]) == `"completed"` &&
		t.readText(&reContent, t.v[messageList], read)
}

// readText reads the only element of a list, which has the text.
func (t *item) readText(o *twoOrders, array []byte, read reader) bool {
	var v reMembers
	element, ok := onlyElement(array)
	if !ok || element == nil || !read(o, element, v[:]) || !all(v[:len(o.whole)]...) {
		return false
	}
	t.text = v[contentText]
	want := typeSummary
	if o == &reContent {
		want = typeOutput
		if string(v[2]) != "[]" || string(v[3]) != "[]" {
			return false
		}
	}
	return bytes.Equal(v[0], want) && isText(t.text)
}

// appendTo writes the item.
func (t *item) appendTo(b []byte, write writer) []byte {
	v := t.v
	switch o := t.orders(); o {
	case &reThought:
		v[thoughtList] = listOf(write(&reSummary, nil, [][]byte{typeSummary, t.text}))
	case &reMessage:
		content := [][]byte{typeOutput, t.text, emptyList, emptyList}
		v[messageList] = listOf(write(&reContent, nil, content))
	}
	return write(t.orders(), b, v[:])
}

// listOf returns an array with one element.
func listOf(element []byte) []byte {
	b := make([]byte, 0, len(element)+2)
	return append(append(append(b, '['), element...), ']')
}

// elements yields the elements of an array. It stops early at white space, or if it is no array; ok
// says whether it did not.
func elements(array []byte, f func(element []byte) bool) (ok bool) {
	c := jsonscan.NewCursor(array, 0)
	if c.Kind() != '[' {
		return false
	}
	end := 0
	c.Enter()
	for c.More() {
		if c.Pos() != end+1 {
			return false
		}
		value := c.Value()
		end = c.Pos()
		if !f(value) {
			return false
		}
	}
	return end+1 == len(array) || len(array) == 2
}

// output is what an answer has to say: thoughts, and then calls or a message.
type output struct {
	id      []byte // of the answer, with its quotes
	items   []item
	calls   int
	message int // 1 if there is one
}

// add reads an item. Thoughts come first and at most once, and the message comes last.
func (o *output) add(text []byte, read reader) bool {
	var t item
	if len(o.items) == 1024 || !t.read(text, read) {
		return false
	}
	switch t.orders() {
	case &reThought:
		if len(o.items) > 0 {
			return false
		}
	case &reCall:
		o.calls++
	default:
		if o.message++; o.message > 1 {
			return false
		}
	}
	o.items = append(o.items, t)
	return o.message == 0 || t.orders() == &reMessage
}

// itemName returns the id that an item has in a whole answer: that of the answer, and for a call
// its number. A message's id is its own.
func (o *output) itemName(t *item, call int) []byte {
	id := o.id[1 : len(o.id)-1]
	switch t.orders() {
	case &reThought:
		return append(append([]byte(`"rs_`), id...), '"')
	case &reCall:
		b := append(append([]byte(`"fc_`), id...), '_')
		return append(strconv.AppendInt(b, int64(call), 10), '"')
	}
	return t.v[itemID]
}

// wholeResponses makes the answer that ToResponse in openai/responses.go makes from the last event
// of a stream, in which everything is that the others told.
func wholeResponses(stream []byte, tools bool) ([]byte, bool) {
	text, ok := lastResponse(stream)
	if !ok {
		return nil, false
	}
	var v reMembers
	if !reAnswer.readEvent(text, v[:]) || !all(v[:]...) || !isResponse(&v) {
		return nil, false
	}
	out := output{id: v[reID]}
	if !elements(v[reOutput], func(text []byte) bool { return out.add(text, readEventForm) }) ||
		out.calls > 0 && !tools || out.calls+out.message == 0 {
		return nil, false // an empty message, whose id only the whole answer has
	}
	v[reReasoning], ok = effort(v[reReasoning], true)
	if !ok || !others(&v, readEventForm, writeWhole) {
		return nil, false
	}
	v[reOutput] = out.whole()
	b := make([]byte, 0, sizeOf(v[:])+1024)
	return append(reAnswer.whole.append(b, v[:]), '\n'), true
}

// lastResponse returns the answer that the last event has.
func lastResponse(stream []byte) ([]byte, bool) {
	var data, name []byte
	for unit := range split(stream, eventEnd) {
		if string(name) == "response.completed" {
			return nil, false // something follows the end
		}
		var ok bool
		if name, data, ok = namedEvent(unit); !ok || isFailure(name) || !isObject(data) {
			return nil, false
		}
	}
	var v [3][]byte
	ok := string(name) == "response.completed" && reEnd.read(data, v[:]) && isQuoted(v[2], name)
	return v[0], ok
}

// reEnd is the last event.
var reEnd = layout{"response", "sequence_number", "type"}

// isResponse reports whether an answer has ended, and is of a generation.
func isResponse(v *reMembers) bool {
	return string(v[reStatus]) == `"completed"` && someTokens(v[reUsage]) && isName(v[reID]) &&
		v[reCompleted] != nil
}

// appendTool writes a tool as a whole answer has it. Since Ollama 0.34, that is how it is in events
// too; before, they had it from a map, without the tools of a namespace.
func appendTool(b, tool []byte) ([]byte, bool) {
	if bytes.HasPrefix(tool, []byte(`{"type":`)) {
		return append(b, tool...), true
	}
	var v reMembers
	if !reTool.readEvent(tool, v[:]) || !all(v[:len(reTool.whole)]...) ||
		string(v[0]) != `"function"` {
		return nil, false
	}
	return reTool.whole.append(b, v[:]), true
}

// others turns those members of an answer from one form into the other, besides its output, that
// are objects.
func others(v *reMembers, read reader, write writer) bool {
	var format, counts reMembers
	var text [1][]byte
	if !reFormats.read(v[reText], text[:]) || text[0] == nil || !read(&reFormat, text[0], format[:]) ||
		!read(&reCounts, v[reUsage], counts[:]) || !all(counts[:len(reCounts.whole)]...) {
		return false
	}
	v[reText] = reFormats.append(nil, [][]byte{write(&reFormat, nil, format[:])})
	v[reUsage] = write(&reCounts, nil, counts[:])
	tools := []byte("[")
	if !elements(v[reTools], func(tool []byte) bool {
		if len(tools) > 1 {
			tools = append(tools, ',')
		}
		var ok bool
		tools, ok = appendTool(tools, tool)
		return ok
	}) {
		return false
	}
	v[reTools] = append(tools, ']')
	return true
}

// effort turns the member reasoning from one form into the other: in a whole answer what is null is
// left out.
func effort(raw []byte, toWhole bool) ([]byte, bool) {
	var v [2][]byte
	if string(raw) == "null" {
		return raw, true
	}
	if !reEffort.read(raw, v[:]) || toWhole && !all(v[:]...) {
		return nil, false
	}
	set := 0
	for i := range v {
		isNull := string(v[i]) == "null"
		switch {
		case toWhole && isNull:
			v[i] = nil
		case !toWhole && isNull:
			return nil, false
		case v[i] == nil:
			v[i] = nullValue
		default:
			set++
		}
	}
	return reEffort.append(nil, v[:]), set > 0
}

// whole writes the output of a whole answer: if there are calls, without the text before them.
func (o *output) whole() []byte {
	b := []byte("[")
	call := 0
	for i := range o.items {
		t := &o.items[i]
		kind := t.orders()
		if kind == &reMessage && o.calls > 0 {
			continue
		}
		t.v[itemID] = o.itemName(t, call)
		if kind == &reCall {
			call++
		}
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = t.appendTo(b, writeWhole)
	}
	return append(b, ']')
}

// The members of the events, and their places in reEvent.
const (
	evArguments = iota
	evContentIndex
	evDelta
	evItem
	evItemID
	evLogprobs
	evOutputIndex
	evPart
	evResponse
	evNumber
	evSummaryIndex
	evText
	evType
	evMembers
)

var reEvent = layout{
	"arguments", "content_index", "delta", "item", "item_id", "logprobs", "output_index", "part",
	"response", "sequence_number", "summary_index", "text", "type",
}

// event has the members of one event.
type event [evMembers][]byte

// reStream is a stream of /v1/responses as it is written.
type reStream struct {
	b      []byte
	events int
	items  int
}

// write adds an event.
func (s *reStream) write(name string, e event) {
	e[evNumber] = strconv.AppendInt(nil, int64(s.events), 10)
	e[evType] = quoted(name)
	s.events++
	s.b = append(s.b, "event: "...)
	s.b = append(s.b, name...)
	s.b = append(s.b, "\ndata: "...)
	s.b = append(reEvent.append(s.b, e[:]), eventEnd...)
}

// streamResponses writes the events that ResponsesStreamConverter makes, with one delta for each
// text and for the arguments of each call.
func streamResponses(whole []byte) ([]byte, bool) {
	var v reMembers
	whole, ok := bytes.CutSuffix(whole, lineEnd)
	if !ok || !reAnswer.whole.read(whole, v[:]) || !all(v[:]...) || !isResponse(&v) {
		return nil, false
	}
	out := output{id: v[reID]}
	if !elements(v[reOutput], func(text []byte) bool { return out.add(text, readWholeForm) }) ||
		!out.isWhole() {
		return nil, false
	}
	v[reReasoning], ok = effort(v[reReasoning], false)
	if !ok || !others(&v, readWholeForm, writeEvent) {
		return nil, false
	}
	s := reStream{b: make([]byte, 0, 6*len(whole)+2048)}
	begin := v
	begin[reStatus], begin[reOutput] = inProgress, emptyList
	begin[reUsage], begin[reCompleted] = nullValue, nullValue
	object := reAnswer.appendEvent(nil, begin[:])
	s.write("response.created", event{evResponse: object})
	s.write("response.in_progress", event{evResponse: object})
	list := []byte("[")
	for i := range out.items {
		if i > 0 {
			list = append(list, ',')
		}
		list = append(list, s.item(&out.items[i])...)
	}
	v[reOutput] = append(list, ']')
	s.write("response.completed", event{evResponse: reAnswer.appendEvent(nil, v[:])})
	return s.b, true
}

// isWhole reports whether this is the output of a whole answer: calls or a message, and ids of
// their own. One with an empty message has no such stream: there the message is missing.
func (o *output) isWhole() bool {
	if (o.calls == 0) != (o.message == 1) {
		return false
	}
	call := 0
	for i := range o.items {
		t := &o.items[i]
		if !bytes.Equal(t.v[itemID], o.itemName(t, call)) {
			return false
		}
		switch t.orders() {
		case &reCall:
			call++
		case &reMessage:
			if isEmptyText(t.text) {
				return false
			}
		}
	}
	return true
}

// item writes the events of an item, and returns the item as the last of them has it.
func (s *reStream) item(t *item) []byte {
	index := strconv.AppendInt(nil, int64(s.items), 10)
	s.items++
	done := t.appendTo(nil, writeEvent)
	at := event{evItemID: t.v[itemID], evOutputIndex: index}
	switch t.orders() {
	case &reThought:
		begin := [][]byte{t.v[itemID], typeReasoning, emptyList, nil}
		s.begin(index, reThought.appendEvent(nil, begin))
		at[evSummaryIndex] = zero
		s.write("response.reasoning_summary_text.delta", at.with(evDelta, t.text))
		s.write("response.reasoning_summary_text.done", at.with(evText, t.text))
	case &reCall:
		begin := t.v
		begin[itemStatus], begin[callArgs] = inProgress, emptyText
		s.begin(index, reCall.appendEvent(nil, begin[:]))
		s.write("response.function_call_arguments.delta", at.with(evDelta, t.v[callArgs]))
		s.write("response.function_call_arguments.done", at.with(evArguments, t.v[callArgs]))
	default:
		begin := t.v
		begin[itemStatus], begin[messageList] = inProgress, emptyList
		s.begin(index, reMessage.appendEvent(nil, begin[:]))
		at[evContentIndex] = zero
		s.write("response.content_part.added", at.with(evPart, contentPart(emptyText)))
		text := at.with(evLogprobs, emptyList)
		s.write("response.output_text.delta", text.with(evDelta, t.text))
		s.write("response.output_text.done", text.with(evText, t.text))
		s.write("response.content_part.done", at.with(evPart, contentPart(t.text)))
	}
	s.write("response.output_item.done", event{evItem: done, evOutputIndex: index})
	return done
}

// begin writes the event that an item begins with.
func (s *reStream) begin(index, item []byte) {
	s.write("response.output_item.added", event{evItem: item, evOutputIndex: index})
}

// with returns the event with one more member.
func (e event) with(place int, value []byte) event {
	e[place] = value
	return e
}

// contentPart returns the part of a message that has its text.
func contentPart(text []byte) []byte {
	return reContent.appendEvent(nil, [][]byte{typeOutput, text, emptyList, emptyList})
}
