package proxy

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// TestChanged: an agent's turns differ in one place at their head, and the ledger reports the
// place, the kind and the cost of the change.
func TestChanged(t *testing.T) {
	head := func(line string) string { return line + "\nYou are an agent. " + prose(6000) }
	for _, c := range []struct {
		name   string
		system func(turn int) string
		place  string
		at     int
		within int
		kind   savings.Kind
	}{
		{"a checksum", func(turn int) string {
			return head(fmt.Sprintf("x-anthropic-billing-header: cc_version=2.1.177; cc_entrypoint=cli; cch=%05x;", 0x36ee5+turn*0x1357))
		}, "system prompt", 71, 0, savings.KindChecksum},
		{"a clock", func(turn int) string { return head(fmt.Sprintf("Now: 2026-11-28T10:00:%02dZ.", 10+turn)) }, "system prompt", 16, 0, savings.KindClock},
		{"a counter that grows longer", func(turn int) string {
			return head(fmt.Sprintf("For your information: this is turn %d of this.", 98+turn))
		}, "system prompt", 35, 0, savings.KindCounter},
		{"an id in the middle", func(turn int) string {
			return prose(1000) + fmt.Sprintf(" session 123e4567-e89b-42d3-a456-4266141740%02d. ", turn) + prose(6000)
		}, "system prompt", 1009, 0, savings.KindUUID},
		{"text", func(turn int) string {
			return head([]string{"The sky is clear.", "A sea is stormy..", "No wind at all to", "Rain on the roofs"}[turn])
		}, "system prompt", 0, 16, savings.KindText},
	} {
		f := warmFake(t)
		rg := newRig(t, f.URL, &Handler{})
		var last savings.Entry
		for turn := range 4 {
			var user string
			for i := range turn + 1 {
				user += fmt.Sprintf("Question %d. ", i)
			}
			last = ask(t, rg, f, chatWith(c.system(turn), user, ""))
			if turn == 0 && last.Changed != nil {
				t.Errorf("%s: the first turn: %+v", c.name, last.Changed)
			}
		}
		x := last.Changed
		if x == nil || x.Place != c.place || x.Byte != c.at || x.Within != c.within || x.Kind != c.kind {
			t.Errorf("%s: %+v of %+v", c.name, x, last)
			continue
		}
		if want := last.Tokens.Evaluated; x.Tokens > want || x.Tokens < want*9/10 {
			t.Errorf("%s: costs %d tokens, %d were evaluated", c.name, x.Tokens, want)
		}
		if last.Detail != x.Sentence() || last.Verdict == savings.Hit || last.Reason != savings.ReasonDiverged {
			t.Errorf("%s: %q, %s, %s", c.name, last.Detail, last.Verdict, last.Reason)
		}
		var shown struct {
			Requests []struct {
				Changed struct {
					Place, Kind  string
					Byte, Tokens int
				}
			}
		}
		if err := json.Unmarshal([]byte(page(t, rg)), &shown); err != nil {
			t.Fatal(err)
		}
		if got := shown.Requests[0].Changed; got.Place != x.Place || got.Kind != string(x.Kind) || got.Byte != x.Byte || got.Tokens != x.Tokens {
			t.Errorf("%s: the page tells %+v", c.name, got)
		}
	}
}

// TestNotChanged: no change is reported for a prompt that continues another one, or is unrelated.
func TestNotChanged(t *testing.T) {
	for name, prompts := range map[string][2]string{
		"continued":           {chatWith(prose(6000), "One.", ""), chatWith(prose(6000), "One. Two.", "")},
		"another user's text": {chatWith(prose(6000), "One.", ""), chatWith(prose(6000), "Another question.", "")},
		"another prompt":      {chatWith(prose(6000), "One.", ""), chatWith(strings.ToUpper(prose(6000)), "One.", "")},
		"a shorter one":       {chatWith(prose(6000), "One.", ""), chatWith("Be brief."+prose(900), "One.", "")},
		"other options":       {chatWith(prose(6000), "One.", ""), chatWith("#"+prose(6000)[1:], "One.", `,"options":{"num_ctx":2048}`)},
	} {
		f := warmFake(t)
		rg := newRig(t, f.URL, &Handler{})
		ask(t, rg, f, prompts[0])
		if e := ask(t, rg, f, prompts[1]); e.Changed != nil {
			t.Errorf("%s: %+v, %s", name, e.Changed, e.Detail)
		}
	}
}

// TestChangedUnread: for a compressed prompt the place is known, but not the kind.
func TestChangedUnread(t *testing.T) {
	f := newFake(t, func(received) string {
		return answer(200, "application/json", `{"usage":{"prompt_tokens":3000,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":10}}}`)
	})
	rg := newRig(t, f.URL, &Handler{})
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var ex Exchange
	for i := range 2 {
		body := chatWith(fmt.Sprintf("It is 10:00:%02d. ", 10+i)+prose(6000), "Go.", "")
		rg.post("/v1/chat/completions", string(encoder.EncodeAll([]byte(body), nil)), "Content-Encoding: zstd")
		f.next()
		ex = rg.ended()
	}
	if ex.Savings == nil || ex.Savings.Changed != nil {
		t.Errorf("%+v", ex.Savings)
	}
}

// TestHoisted: a system message that each turn adds is evaluated at the head of the prompt, along
// with everything after it. The ledger reports that if the template does so, and only then.
func TestHoisted(t *testing.T) {
	for _, hoists := range []bool{true, false} {
		var last string
		f := newFake(t, func(r received) string {
			var body struct {
				Messages []struct{ Role, Content string }
			}
			if err := json.Unmarshal(r.body, &body); err != nil {
				return answer(400, "application/json", `{"error":"not JSON"}`)
			}
			head, text := "", ""
			for _, m := range body.Messages {
				if m.Role == "system" && hoists {
					head += m.Content + "|"
				} else {
					text += m.Content + "|"
				}
			}
			text = head + text
			n := 0
			for n < min(len(last), len(text)-1) && last[n] == text[n] {
				n++
			}
			last = text
			return answer(200, "application/json", fmt.Sprintf(`{"usage":{"prompt_tokens":%d,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":%d}}}`, len(text), n))
		})
		rg := newRig(t, f.URL, &Handler{})
		var ex Exchange
		for turn := range 4 {
			messages := []map[string]string{{"role": "system", "content": prose(3000)}}
			for i := range turn + 1 {
				messages = append(messages,
					map[string]string{"role": "user", "content": fmt.Sprintf("Question %d. ", i) + prose(1500)},
					map[string]string{"role": "system", "content": fmt.Sprintf("<total_tokens>%d tokens left</total_tokens>", 15000000-1234*i)})
			}
			body, err := json.Marshal(map[string]any{"model": "m", "messages": messages})
			if err != nil {
				t.Fatal(err)
			}
			rg.post("/v1/chat/completions", string(body))
			f.next()
			ex = rg.ended()
		}
		e := ex.Savings
		switch c := e.Changed; {
		case !hoists && c != nil:
			t.Errorf("where it is evaluated: %+v", c)
		case !hoists:
		case c == nil || !c.Hoisted || c.Place != "message 8" || c.Kind != savings.KindCounter || c.Tokens < 4400 || c.Tokens > 4700:
			t.Errorf("at the head: %+v, %+v", c, e)
		case e.Detail != c.Sentence() || !strings.HasPrefix(e.Detail, "a counter in message 8, a system message that the template puts at the prompt's head, 4,"):
			t.Errorf("at the head: %q, %s", e.Detail, e.Reason)
		}
	}
}
