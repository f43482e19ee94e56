package prefix

import "github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"

// Excerpt is a piece of a message's text in JSON with the fewest escapes.
type Excerpt struct {
	System bool   // from a system message
	Offset int    // in bytes of the message's text; see Link.Offset
	Text   []byte // empty if the message has no text there
}

// Look parses a body again, as ReadMembers does, for the text of one message (Link.Message) between
// two offsets.
func (r *Reader) Look(
	e Endpoint, body []byte, members []jsonscan.Member, long []byte, message, from, to int,
) Excerpt {
	l := look{message: int32(message), from: max(0, from), to: to}
	r.read(e, "", body, members, long, &l)
	return Excerpt{System: l.system, Offset: l.from, Text: l.text}
}

// look collects text of one message. The nil look collects nothing.
type look struct {
	message  int32
	from, to int // offsets in its text
	text     []byte
	system   bool
}

func (l *look) role(message int32, system bool) {
	if l != nil && l.message == message {
		l.system = system
	}
}

// see processes text of a message that begins at an offset.
func (l *look) see(message int32, at int, text []byte) {
	if l == nil || l.message != message {
		return
	}
	from, to := max(l.from, at), min(l.to, at+len(text))
	if from < to {
		l.text = append(l.text, text[from-at:to-at]...)
	}
}
