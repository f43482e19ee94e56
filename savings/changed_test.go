package savings

import (
	"strings"
	"testing"
)

// TestKindOf: the changing range is between ‹ and ›, and the expected place is at [.
func TestKindOf(t *testing.T) {
	for _, c := range []struct {
		text string
		kind Kind
	}{
		{`x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint‹=cli; cch=[36e›e5;`, KindChecksum},
		{`x-anthropic-billing-header: cc_version=2.1.177; cch‹=[00012;›\nYou are`, KindChecksum},
		{`commit ‹[1f3a9c07›be21`, KindChecksum},
		{`sha256:‹[9f86d081884c7d6›59a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08`, KindChecksum},
		{`session ‹[123e4567-e89b-›12d3-a456-426614174000 is open`, KindUUID},
		{`id: ‹[req_01Ab2ao5vuTfiRRjD2K5wyxT›`, KindUUID},
		{`It is ‹[10:42:07 now,›`, KindClock},
		{`It is ‹[9:05 PM›.`, KindClock},
		{`at 2026-11-28T‹[10:00:01Z›`, KindClock},
		{`now = ‹[1795860000›.25`, KindClock},
		{`Today's date: ‹[2026-11-28›\nYou are`, KindDate},
		{`Today is ‹Saturday,› the rest`, KindDate},
		{`It is ‹[November 28, 2026›.`, KindDate},
		{`It is ‹[28. November 2026›.`, KindDate},
		{`Turn ‹[17› of many`, KindCounter},
		{`Issue #‹[9123›`, KindCounter},
		{`<total_tokens>‹[14999841 tokens› left`, KindCounter},
		{`The price is ‹[1,250.75› euros`, KindNumber},
		{`‹[3› apples`, KindNumber},

		// Lookalikes.
		{`a ‹facade› of decades`, KindText},
		{`the colour ‹#a[1b2c3›`, KindNumber},
		{`on port ‹[8080:443›`, KindNumber},
		{`main.go:‹[12:34:5›`, KindNumber},
		{`::ffff:‹[10:20:30:40›`, KindNumber},
		{`John ‹[3:16:2 in›`, KindNumber},
		{`llama3.2:‹[70b›`, KindNumber},
		{`you may ‹[5› times`, KindNumber},
		{`an ‹internationalisation› of`, KindText},
		{`DO_NOT_‹CALL_THIS_FUNCTION›`, KindText},
		{`two ‹words here› that`, KindText},
		{`‹›`, KindText},
	} {
		from := strings.Index(c.text, "‹")
		text := strings.Replace(c.text, "‹", "", 1)
		to := strings.Index(text, "›")
		text = strings.Replace(text, "›", "", 1)
		at := strings.Index(text, "[")
		if text = strings.Replace(text, "[", "", 1); at >= 0 && at < from {
			from--
		}
		if at >= 0 {
			to--
		} else {
			at = from
		}
		if kind, n := KindOf([]byte(text), from, to); kind != c.kind || n != at {
			t.Errorf("%s: %s at %d, want %s at %d (%q)", c.text, kind, n, c.kind, at, text[from:to])
		}
	}
}

func TestChangedSentence(t *testing.T) {
	for want, c := range map[string]Changed{
		"a checksum at byte 61 of the system prompt, 24,900 tokens a turn":                                       {Place: "system prompt", Byte: 61, Kind: KindChecksum, Tokens: 24900},
		"text that differs at byte 64 to 79 of message 3, 1,234,567 tokens a turn":                               {Place: "message 3", Byte: 64, Within: 16, Kind: KindText, Tokens: 1234567},
		"a counter in message 8, a system message that the template puts at the prompt's head, 50 tokens a turn": {Place: "message 8", Kind: KindCounter, Hoisted: true, Tokens: 50},
		"the tools differ, 900 tokens a turn":                                                                    {Place: "tools", Kind: KindText, Tokens: 900},
		"a random id at byte 40960 to 41215 of the system prompt, 12 tokens a turn":                              {Place: "system prompt", Byte: 40960, Within: 256, Kind: KindUUID, Tokens: 12},
	} {
		if got := c.Sentence(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// FuzzKindOf: the result is within the text, and either overlaps the range or is its start.
func FuzzKindOf(f *testing.F) {
	f.Add([]byte(`cch=36ee5; at 10:42 on 2026-11-28 #7 123e4567-e89b-12d3-a456-426614174000`), 4, 20)
	f.Add([]byte(`\u0031\n\`), 0, 100)
	f.Fuzz(func(t *testing.T, text []byte, from, to int) {
		before := string(text)
		kind, at := KindOf(text, from, to)
		if words[kind] == "" || at < 0 || at > len(text) || string(text) != before {
			t.Fatalf("%q, %d to %d: %s at %d", text, from, to, kind, at)
		}
		if kind != KindText && at >= to {
			t.Fatalf("%q, %d to %d: %s at %d", text, from, to, kind, at)
		}
	})
}
