package prefix

import "cmp"

// Shared is what two prompts have in common from their start on.
type Shared struct {
	Links int // leading links that are equal
	// Bytes is how many bytes of text are equal, by the blocks' sixteenths where the prompts differ within a block: it
	// falls short of the truth by less than a sixteenth of that block. (In 1 of 256 cases two different sixteenths are taken
	// for equal, and it may exceed it by one.)
	Bytes int
	// Part, Message and Offset say where they part: what the first link is that differs, in which message, and at which byte
	// of that message's text. Of a prompt that has all of its links in common, its end.
	Part    Part
	Message int
	Offset  int
}

// Common compares a prompt with another one.
func Common(a, other []Link) Shared {
	// Links are cumulative: where two are equal, all before them are.
	n, end := 0, min(len(a), len(other))
	for n < end {
		if middle := (n + end) / 2; a[middle].Hash == other[middle].Hash {
			n = middle + 1
		} else {
			end = middle
		}
	}
	s := At(a, n)
	if n == len(a) || n == len(other) || n == 0 {
		return s
	}
	x, y := &a[n], &other[n]
	if !x.text() || !y.text() || x.Message != y.Message || x.Offset != y.Offset {
		return s
	}
	part := blockSize(x.Offset) / Fines
	for i := 0; i < int(min(x.Length, y.Length))/part && x.Fine[i] == y.Fine[i]; i++ {
		s.Bytes += part
		s.Offset += part
	}
	return s
}

// At returns what a prompt shares with one that has its first n links in common with it and no more is known of.
func At(a []Link, n int) Shared {
	s := Shared{Links: n}
	if n > 0 {
		s.Bytes = a[n-1].Bytes
	}
	switch {
	case n < len(a):
		s.Part, s.Message, s.Offset = a[n].Part, int(a[n].Message), a[n].Offset
	case n > 0:
		last := &a[n-1]
		s.Part, s.Message, s.Offset = last.Part, int(last.Message), last.Offset+int(last.Length)
	}
	return s
}

// text reports whether the link has text of a message.
func (l *Link) text() bool { return l.Part == Block || l.Part == Tail }

// Next returns the first link of a that is not in common, where that is one with text.
func (s Shared) Next(a []Link) (Link, bool) {
	if s.Links >= len(a) || !a[s.Links].text() {
		return Link{}, false
	}
	return a[s.Links], true
}

// BlockPart returns how many bytes of text each part of l.Fine stands for: how exact Shared.Bytes is there.
func BlockPart(l Link) int { return blockSize(l.Offset) / Fines }

const (
	// shiftMost is by how many bytes a message may be longer than another that is taken for the
	// same, and shiftLeast how long they must be for that.
	shiftMost, shiftLeast = 16, 2 << 10
)

// Alike returns how many bytes of text two prompts have alike behind the place s where they part
// (Common): in the same places of the same messages, by the blocks' sixteenths. Where the message
// in which they part is longer in one of them by a few bytes, so that all that follows in it has
// moved, its rest is taken to be alike if they have the beginning in common and it is long. It is
// for prompts that one should have continued, but for a few bytes at their head.
func Alike(a, other []Link, s Shared) int {
	bytes := moved(a, other, s)
	for i, j := s.Links, s.Links; i < len(a) && j < len(other); {
		x, y := &a[i], &other[j]
		order := cmp.Or(cmp.Compare(x.Message, y.Message), cmp.Compare(x.Offset, y.Offset))
		switch {
		case !x.text() || y.text() && order < 0:
			i++
		case !y.text() || order > 0:
			j++
		default:
			if x.Length == y.Length && x.Fine == y.Fine && x.Fine != [Fines]uint8{} {
				bytes += int(x.Length)
			}
			i, j = i+1, j+1
		}
	}
	return bytes
}

// moved returns how many bytes are alike of a message that has become longer or shorter by a few.
func moved(a, other []Link, s Shared) int {
	if s.Bytes == 0 || s.Links >= min(len(a), len(other)) || !a[s.Links].text() || !other[s.Links].text() {
		return 0
	}
	x, y := messageEnd(a, s.Links), messageEnd(other, s.Links)
	if d := max(x-y, y-x); d == 0 || d > shiftMost || min(x, y) < shiftLeast {
		return 0
	}
	return max(0, min(x, y)-s.Offset)
}

// messageEnd returns how many bytes of text the message of the link at i has.
func messageEnd(a []Link, i int) int {
	last := a[i]
	for _, l := range a[i+1:] {
		if l.Message != last.Message || !l.text() {
			break
		}
		last = l
	}
	return last.Offset + int(last.Length)
}
