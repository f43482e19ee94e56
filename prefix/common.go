package prefix

import "cmp"

// Shared is the common beginning of two prompts.
type Shared struct {
	Links int // equal leading links
	// Bytes is the number of equal bytes of text. If the prompts differ within a block, it counts
	// whole sixteenths of the block, so it is too small by less than one sixteenth. (In 1 of 256
	// cases two different sixteenths look equal, and it may be too large by one.)
	Bytes int
	// Part, Message and Offset say where the prompts diverge: the kind of the first link that
	// differs, its message, and the byte in that message's text. If all of a prompt's links are
	// common, they point to its end.
	Part    Part
	Message int
	Offset  int
}

// Common compares two prompts.
func Common(a, other []Link) Shared {
	// Links are cumulative: if two are equal, all before them are.
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

// At returns what a prompt shares with one of which only the number of common links, n, is known.
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

// text reports whether the link contains text of a message.
func (l *Link) text() bool { return l.Part == Block || l.Part == Tail }

// Next returns the first link of a that is not in common, if it contains text.
func (s Shared) Next(a []Link) (Link, bool) {
	if s.Links >= len(a) || !a[s.Links].text() {
		return Link{}, false
	}
	return a[s.Links], true
}

// BlockPart returns how many bytes of text each part of l.Fine covers, which is the resolution of
// Shared.Bytes there.
func BlockPart(l Link) int { return blockSize(l.Offset) / Fines }

const (
	// shiftMost is the largest difference in length, in bytes, between messages that are taken for
	// the same one, and shiftLeast is the length from which they may be.
	shiftMost, shiftLeast = 16, 2 << 10
)

// Alike returns how many bytes of text two prompts have in common after the place s where they
// diverge (Common), in the same places of the same messages, by the blocks' sixteenths. If the
// message in which they diverge is a few bytes longer in one prompt, everything after that has
// moved. Its rest then counts as alike if the two beginnings are equal and the message is long.
// Alike detects prompts that would continue each other but for a few bytes at the head.
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

// moved returns how many bytes are alike in a message that has become a few bytes longer or
// shorter.
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

// messageEnd returns the length of the text of the message with the link at i.
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
