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

// chunkData returns the data of an event that has nothing else.
func chunkData(unit []byte) ([]byte, bool) {
	data, ok := bytes.CutPrefix(unit, dataBegin)
	if !ok {
		return nil, false
	}
	return bytes.CutSuffix(data, eventEnd)
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

// isFinished reports whether a finish_reason says that the choice ended. ok is false if it says that
// something else than a generation did.
func isFinished(reason []byte) (is, ok bool) {
	if string(reason) == "null" {
		return false, true
	}
	r, ok := word(reason)
	return true, ok && r != "load" && r != "unload"
}

// chunks calls f for the choice of each chunk of a stream, and returns the members of the last
// chunk with a choice, with the stream's usage. It returns false if the stream is not one of chunks
// with one choice each, then one with the usage, and then the mark of the end, or if f does. f
// returns whether the choice has ended; or else, in like, the choice with a hole in place of the
// text, with which add is called for the chunks that are like this one.
func chunks(stream []byte, l *chunkLayout, f func(choice []byte) (ended bool, like []byte, ok bool), add func(text []byte) bool) (last [aiMembers][]byte, ok bool) {
	ended := false
	var same shape
	var text [1][]byte
	for {
		n := bytes.Index(stream, eventEnd)
		if n < 0 {
			return last, false
		}
		unit := stream[:n+len(eventEnd)]
		stream = stream[len(unit):]
		if bytes.Equal(unit, dataDone) {
			return last, len(stream) == 0 && ended && last[aiUsage] != nil
		}
		data, ok := chunkData(unit)
		if ok && !ended && same.match(data, text[:]) {
			if !add(text[0]) {
				return last, false
			}
			continue
		}
		var v [aiMembers][]byte
		if !ok || !l.read(data, &v) || !all(v[:aiUsage]...) {
			return last, false
		}
		choice, ok := onlyElement(v[aiChoices])
		switch {
		case !ok || ended != (choice == nil) || ended && last[aiUsage] != nil:
			return last, false
		case ended:
			last[aiUsage] = v[aiUsage]
			continue
		case v[aiUsage] != nil && !bytes.Equal(v[aiUsage], noUsage):
			return last, false
		}
		last = v
		last[aiUsage] = nil
		var like []byte
		if ended, like, ok = f(choice); !ok {
			return last, false
		}
		if same = nil; like != nil {
			v[aiChoices] = like
			same = newShape(l.append(nil, &v))
		}
	}
}

// wholeChats does what ToChatCompletion in openai/openai.go does with the answer that wholeChat
// describes.
func wholeChats(stream []byte, tools bool) ([]byte, bool) {
	var g gathered
	var role, reason, index []byte
	thinking := false // the last chunk that was parsed was of the thoughts
	v, ok := chunks(stream, &chatChunks, func(text []byte) (bool, []byte, bool) {
		var c [choiceMembers][]byte
		var m, p [msgMembers][]byte
		if !aiChunkChoice.read(text, c[:]) || !aiMessage.read(c[choiceMessage], m[:]) {
			return false, nil, false
		}
		if c[choiceLogprobs] != nil && (!aiLogprobs.read(c[choiceLogprobs], p[:1]) || p[0] == nil) {
			return false, nil, false
		}
		if m[msgContent] == nil {
			m[msgContent] = emptyText // in the last chunk, and in one with thoughts
		}
		if role == nil {
			role, index = m[msgRole], c[choiceIndex]
		}
		if m[msgCalls] != nil && !tools ||
			!g.add(m[msgContent], m[msgThinking], m[msgCalls], p[0]) {
			return false, nil, false
		}
		reason = c[choiceReason]
		ended, ok := isFinished(reason)
		if ended || m[msgCalls] != nil || p[0] != nil {
			return ended, nil, ok
		}
		if thinking = m[msgThinking] != nil; thinking {
			if !isEmptyText(m[msgContent]) {
				return false, nil, ok
			}
			m[msgThinking] = hole
		} else {
			m[msgContent] = hole
		}
		c[choiceMessage] = aiMessage.append(nil, m[:])
		return false, oneChoice(aiChunkChoice, c[:]), ok
	}, func(text []byte) bool {
		if thinking {
			return g.thinking.add(text)
		}
		return g.content.add(text)
	})
	if !ok || !all(role, index) {
		return nil, false
	}
	message := aiMessage.append(nil, [][]byte{
		msgRole: role, msgContent: g.content.textOrEmpty(), msgThinking: g.thinking.text(),
		msgCalls: g.calls.array(),
	})
	v[aiObject] = objectChat
	v[aiChoices] = oneChoice(aiChoice, [][]byte{
		choiceIndex: index, choiceMessage: message, choiceReason: reason,
		choiceLogprobs: logprobs(g.logprobs.array()),
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

// wholeCompletions does what ToCompletion does. Log probabilities and thoughts are not in its
// answers.
func wholeCompletions(stream []byte) ([]byte, bool) {
	var text joined
	var index, reason []byte
	v, ok := chunks(stream, &textChunks, func(choice []byte) (bool, []byte, bool) {
		var c [textMembers][]byte
		if !textChoice.read(choice, c[:]) || !text.add(c[textText]) {
			return false, nil, false
		}
		index, reason = c[textIndex], c[textReason]
		c[textText] = hole
		ended, ok := isFinished(reason)
		return ended, oneChoice(textChoice, c[:]), ok
	}, text.add)
	if !ok || index == nil {
		return nil, false
	}
	v[aiChoices] = oneChoice(textChoice, [][]byte{text.textOrEmpty(), index, reason})
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
	var m, p [msgMembers][]byte
	choice, ok := readWhole(whole, objectChat, &v)
	if !ok || !aiChoice.read(choice, c[:]) || !aiMessage.read(c[choiceMessage], m[:]) ||
		!all(c[choiceIndex], m[msgRole]) {
		return nil, false
	}
	if c[choiceLogprobs] != nil && (!aiLogprobs.read(c[choiceLogprobs], p[:1]) || p[0] == nil) {
		return nil, false
	}
	if is, ok := isFinished(c[choiceReason]); !is || !ok || !areParts(m[:], p[0]) {
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
