package forms

import "bytes"

// The members of an answer of /v1/chat/completions, and of each chunk of its stream.
const (
	aiID = iota
	aiObject
	aiCreated
	aiModel
	aiFingerprint
	aiChoices
	aiUsage
	aiMembers
)

var aiAnswer = layout{
	"id", "object", "created", "model", "system_fingerprint", "choices", "usage",
}

// The members of a choice; those of a chunk have a delta in place of the message.
const (
	choiceIndex = iota
	choiceMessage
	choiceReason
	choiceLogprobs
	choiceMembers
)

var (
	aiChoice      = layout{"index", "message", "finish_reason", "logprobs"}
	aiChunkChoice = layout{"index", "delta", "finish_reason", "logprobs"}
	aiMessage     = layout{"role", "content", "reasoning", "tool_calls"} // as msgRole …
	aiLogprobs    = layout{"content"}
)

// In /v1/completions, chunks have the model behind the choices, and the choices a text.
var (
	textChunk = layout{
		"id", "object", "created", "choices", "model", "system_fingerprint", "usage",
	}
	textChoice = layout{"text", "index", "finish_reason"}
)

// The places in textChoice.
const (
	textText = iota
	textIndex
	textReason
	textMembers
)

// chunkLayout is the layout of a dialect's chunks.
type chunkLayout struct {
	layout layout
	place  [aiMembers]int // in layout, by that in aiAnswer
	object []byte
}

var (
	chatChunks = chunkLayout{
		aiAnswer,
		[aiMembers]int{aiID, aiObject, aiCreated, aiModel, aiFingerprint, aiChoices, aiUsage},
		[]byte(`"chat.completion.chunk"`),
	}
	textChunks = chunkLayout{
		textChunk,
		[aiMembers]int{
			aiID: 0, aiObject: 1, aiCreated: 2, aiChoices: 3, aiModel: 4, aiFingerprint: 5, aiUsage: 6,
		},
		objectText,
	}
)

// read reads the data of a chunk; v has the places of aiAnswer.
func (l *chunkLayout) read(data []byte, v *[aiMembers][]byte) bool {
	var c [aiMembers][]byte
	if !l.layout.read(data, c[:]) {
		return false
	}
	for i, place := range l.place {
		v[i] = c[place]
	}
	return bytes.Equal(v[aiObject], l.object)
}

// append writes a chunk.
func (l *chunkLayout) append(b []byte, v *[aiMembers][]byte) []byte {
	var c [aiMembers][]byte
	for i, place := range l.place {
		c[place] = v[i]
	}
	return l.layout.append(b, c[:])
}

// appendEvent writes a chunk as an event.
func (l *chunkLayout) appendEvent(b []byte, v *[aiMembers][]byte) []byte {
	b = append(b, dataBegin...)
	return append(l.append(b, v), eventEnd...)
}

var (
	objectChat = []byte(`"chat.completion"`)
	objectText = []byte(`"text_completion"`)

	dataBegin = []byte("data: ")
	dataDone  = []byte("data: [DONE]\n\n")
	noUsage   = []byte(`{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}`)
)

// chunkData returns the data of an event that has nothing else, and it on one line.
func chunkData(unit []byte) ([]byte, bool) {
	data, ok := bytes.CutPrefix(unit, dataBegin)
	if !ok {
		return nil, false
	}
	data, ok = bytes.CutSuffix(data, eventEnd)
	return data, ok && bytes.IndexByte(data, '\n') < 0
}

// onlyElement returns the element of an array that has one; nil, true if the array is empty.
func onlyElement(raw []byte) ([]byte, bool) {
	if len(raw) < 2 || raw[0] != '[' {
		return nil, false
	}
	if len(raw) == 2 {
		return nil, true
	}
	return raw[1 : len(raw)-1], true // what it is, the next layout says
}

// isFinished reports whether a finish_reason says that the choice ended. ok is false if it says
// that something else than a generation did.
func isFinished(reason []byte) (is, ok bool) {
	if string(reason) == "null" {
		return false, true
	}
	r, ok := word(reason)
	return true, ok && r != "load" && r != "unload"
}

// chunkReader reads a stream of chunks: some with one choice each, one with the usage, and the mark
// of the end.
type chunkReader struct {
	*chunkLayout
	choices choiceReader
	last    [aiMembers][]byte // the last chunk with a choice, and the stream's usage
	ended   bool              // the choice has
	same    shape             // of the last chunk that was parsed
}

// choiceReader reads the choices of chunks.
type choiceReader interface {
	// read reads a choice. It returns whether that has ended; or else, in like, the choice with a
	// hole in place of its text, if the next can be like this.
	read(choice []byte) (ended bool, like []byte, ok bool)
	// add adds the text of a choice that is like the last one that was read.
	add(text []byte) bool
}

// read reads a whole stream.
func (r *chunkReader) read(stream []byte) bool {
	done := false
	for unit := range split(stream, eventEnd) {
		if done {
			return false
		}
		if done = bytes.Equal(unit, dataDone); done {
			continue
		}
		data, ok := chunkData(unit)
		if !ok || !r.chunk(data) {
			return false
		}
	}
	return done && r.ended && r.last[aiUsage] != nil
}

// chunk reads the data of one chunk.
func (r *chunkReader) chunk(data []byte) bool {
	var text [1][]byte
	if r.same.match(data, text[:]) {
		return r.choices.add(text[0])
	}
	var v [aiMembers][]byte
	if !r.chunkLayout.read(data, &v) || !all(v[:aiUsage]...) {
		return false
	}
	choice, ok := onlyElement(v[aiChoices])
	if !ok || r.ended != (choice == nil) {
		return false
	}
	if r.ended {
		ok = r.last[aiUsage] == nil
		r.last[aiUsage] = v[aiUsage]
		return ok
	}
	if v[aiUsage] != nil && !bytes.Equal(v[aiUsage], noUsage) {
		return false
	}
	r.last = v
	r.last[aiUsage] = nil
	var like []byte
	if r.ended, like, ok = r.choices.read(choice); !ok {
		return false
	}
	if r.same = nil; like != nil && !r.ended {
		v[aiChoices] = like
		r.same = newShape(r.append(nil, &v))
	}
	return true
}

// chatChoices are those of /v1/chat/completions.
type chatChoices struct {
	gathered
	tools               bool
	role, index, reason []byte
	thinking            bool // the last one that was read is of thoughts
}

func (c *chatChoices) read(text []byte) (ended bool, like []byte, ok bool) {
	var v [choiceMembers][]byte
	var m [msgMembers][]byte
	if !aiChunkChoice.read(text, v[:]) || !aiMessage.read(v[choiceMessage], m[:]) {
		return false, nil, false
	}
	probs, ok := readLogprobs(v[choiceLogprobs])
	if m[msgContent] == nil {
		m[msgContent] = emptyText // in the last chunk, and in one with thoughts
	}
	if !ok || m[msgCalls] != nil && !c.tools ||
		!c.gathered.add(m[msgContent], m[msgThinking], m[msgCalls], probs) {
		return false, nil, false
	}
	if c.role == nil {
		c.role, c.index = m[msgRole], v[choiceIndex]
	}
	c.reason = v[choiceReason]
	c.thinking = m[msgThinking] != nil
	ended, ok = isFinished(c.reason)
	if !ok || m[msgCalls] != nil || probs != nil || c.thinking && !isEmptyText(m[msgContent]) {
		return ended, nil, ok
	}
	place := msgContent
	if c.thinking {
		place = msgThinking
	}
	m[place] = hole
	v[choiceMessage] = aiMessage.append(nil, m[:])
	return ended, oneChoice(aiChunkChoice, v[:]), true
}

func (c *chatChoices) add(text []byte) bool { return c.text(c.thinking).add(text) }

// readLogprobs returns the array in the object with the log probabilities; nil has none.
func readLogprobs(raw []byte) (array []byte, ok bool) {
	var v [1][]byte
	if raw == nil {
		return nil, true
	}
	ok = aiLogprobs.read(raw, v[:])
	return v[0], ok && v[0] != nil
}

// wholeChats does what ToChatCompletion in openai/openai.go does with the answer that wholeChat
// describes.
func wholeChats(stream []byte, tools bool) ([]byte, bool) {
	c := chatChoices{tools: tools}
	r := chunkReader{chunkLayout: &chatChunks, choices: &c}
	if !r.read(stream) || !all(c.role, c.index) {
		return nil, false
	}
	message := aiMessage.append(nil, [][]byte{
		msgRole: c.role, msgContent: c.content.textOrEmpty(), msgThinking: c.gathered.thinking.text(),
		msgCalls: c.calls.array(),
	})
	v := &r.last
	v[aiObject] = objectChat
	v[aiChoices] = oneChoice(aiChoice, [][]byte{
		choiceIndex: c.index, choiceMessage: message, choiceReason: c.reason,
		choiceLogprobs: logprobs(c.logprobs.array()),
	})
	return append(aiAnswer.append(make([]byte, 0, sizeOf(v[:])+256), v[:]), '\n'), true
}

// oneChoice returns an array with one choice.
func oneChoice(l layout, v [][]byte) []byte {
	b := make([]byte, 1, sizeOf(v)+128)
	b[0] = '['
	return append(l.append(b, v), ']')
}

// logprobs returns the object with the log probabilities; nil if there are none.
func logprobs(array []byte) []byte {
	if array == nil {
		return nil
	}
	return aiLogprobs.append(nil, [][]byte{array})
}

// textChoices are those of /v1/completions.
type textChoices struct {
	text          joined
	index, reason []byte
}

func (c *textChoices) read(choice []byte) (ended bool, like []byte, ok bool) {
	var v [textMembers][]byte
	if !textChoice.read(choice, v[:]) || !c.text.add(v[textText]) {
		return false, nil, false
	}
	c.index, c.reason = v[textIndex], v[textReason]
	v[textText] = hole
	ended, ok = isFinished(c.reason)
	return ended, oneChoice(textChoice, v[:]), ok
}

func (c *textChoices) add(text []byte) bool { return c.text.add(text) }

// wholeCompletions does what ToCompletion does. Log probabilities and thoughts are not in its
// answers.
func wholeCompletions(stream []byte) ([]byte, bool) {
	var c textChoices
	r := chunkReader{chunkLayout: &textChunks, choices: &c}
	if !r.read(stream) || c.index == nil {
		return nil, false
	}
	v := &r.last
	v[aiChoices] = oneChoice(textChoice, [][]byte{c.text.textOrEmpty(), c.index, c.reason})
	return append(aiAnswer.append(make([]byte, 0, sizeOf(v[:])+256), v[:]), '\n'), true
}

// readWhole reads an answer of /v1/chat/completions or /v1/completions, and returns its choice.
func readWhole(whole, object []byte, v *[aiMembers][]byte) (choice []byte, ok bool) {
	whole, ok = bytes.CutSuffix(whole, lineEnd)
	if !ok || !aiAnswer.read(whole, v[:]) || !all(v[:]...) || !bytes.Equal(v[aiObject], object) {
		return nil, false
	}
	choice, ok = onlyElement(v[aiChoices])
	return choice, ok && choice != nil
}

// streamChats writes a chunk each for the thoughts, the text and the calls, and then the last one,
// as ToStreamChunks and FinishChunk do.
func streamChats(whole []byte, usage bool) ([]byte, bool) {
	var v [aiMembers][]byte
	var c [choiceMembers][]byte
	var m [msgMembers][]byte
	choice, ok := readWhole(whole, objectChat, &v)
	if !ok || !aiChoice.read(choice, c[:]) || !aiMessage.read(c[choiceMessage], m[:]) ||
		!all(c[choiceIndex], m[msgRole]) {
		return nil, false
	}
	probs, ok := readLogprobs(c[choiceLogprobs])
	if is, finished := isFinished(c[choiceReason]); !ok || !is || !finished || !areParts(m[:], probs) {
		return nil, false
	}
	b := make([]byte, 0, len(whole)+2048)
	counts := v[aiUsage]
	v[aiObject], v[aiUsage] = chatChunks.object, nil
	part := [choiceMembers][]byte{choiceIndex: c[choiceIndex], choiceReason: nullValue}
	write := func(delta []byte) {
		part[choiceMessage] = delta
		v[aiChoices] = oneChoice(aiChunkChoice, part[:])
		b = chatChunks.appendEvent(b, &v)
	}
	part[choiceLogprobs] = c[choiceLogprobs]
	begun := false
	for d := range parts(m) {
		if begun {
			d[msgRole] = nil
		}
		write(aiMessage.append(nil, d[:]))
		begun, part[choiceLogprobs] = true, nil
	}
	if !begun {
		write(aiMessage.append(nil, [][]byte{m[msgRole], emptyText, nil, nil}))
	}
	part[choiceReason], part[choiceLogprobs] = c[choiceReason], nil
	write([]byte("{}"))
	if usage {
		v[aiChoices], v[aiUsage] = emptyList, counts
		b = chatChunks.appendEvent(b, &v)
	}
	return append(b, dataDone...), true
}

// streamCompletions writes a chunk with the text, and then an empty one with the reason.
func streamCompletions(whole []byte, usage bool) ([]byte, bool) {
	var v [aiMembers][]byte
	var c [textMembers][]byte
	var text joined
	choice, ok := readWhole(whole, objectText, &v)
	if !ok || !textChoice.read(choice, c[:]) || c[textIndex] == nil || !text.add(c[textText]) {
		return nil, false
	}
	if is, ok := isFinished(c[textReason]); !is || !ok {
		return nil, false
	}
	counts := v[aiUsage]
	v[aiUsage] = nil
	if usage {
		v[aiUsage] = noUsage
	}
	b := make([]byte, 0, len(whole)+1024)
	write := func(choices []byte) {
		v[aiChoices] = choices
		b = textChunks.appendEvent(b, &v)
	}
	if !isEmptyText(c[textText]) {
		write(oneChoice(textChoice, [][]byte{c[textText], c[textIndex], nullValue}))
	}
	write(oneChoice(textChoice, [][]byte{emptyText, c[textIndex], c[textReason]}))
	if usage {
		v[aiUsage] = counts
		write(emptyList)
	}
	return append(b, dataDone...), true
}
