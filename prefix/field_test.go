package prefix

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestFieldTimeInPrompt: the time in the first lines of a system prompt makes every prompt a new
// one; late in it, it hardly matters. Either way the chain shows where the prompts diverge.
func TestFieldTimeInPrompt(t *testing.T) {
	text := strings.Repeat("You answer questions about the house, and switch what you are asked to. ", 113)[:8000]
	with := func(at int, c byte) []byte {
		system := []byte(text)
		system[at] = c
		return fmt.Appendf(nil, `{"messages":[{"role":"system","content":%q},{"role":"user","content":"Is it dark?"}]}`, system)
	}
	for at, most := range map[int][2]float64{90: {0.005, 0.02}, 7900: {0.97, 0.99}} {
		a, b := read(t, Chat, with(at, '1')), read(t, Chat, with(at, '2'))
		s := Common(a.Links, b.Links)
		if share := float64(s.Bytes) / float64(a.Bytes()); share < most[0] || share > most[1] {
			t.Errorf("character %d differs: %.3f of the prompt is shared, want between %v", at, share, most)
		}
		if s.Message != 0 || s.Offset > at || s.Offset <= at-BlockPart(a.Links[s.Links]) {
			t.Errorf("character %d differs: told %+v", at, s)
		}
	}
}

// TestFieldToolOrder: the same tools in another order are another prompt of the same conversation;
// with the keys of one in another order they are the same prompt.
func TestFieldToolOrder(t *testing.T) {
	var tools []string
	for i := range 8 {
		tools = append(tools, fmt.Sprintf(`{"type":"function","function":{"name":"tool_%d","description":"the tool %d","parameters":{"type":"object","required":["city"],"properties":{"city":{"type":"string","description":"where"},"days":{"type":"integer"}}}}}`, i, i))
	}
	with := func(e Endpoint, tools []string) Chain {
		return read(t, e, fmt.Appendf(nil, `{"messages":[{"role":"system","content":"You use tools."},{"role":"user","content":"Will it rain?"}],"tools":[%s]}`, strings.Join(tools, ",")))
	}
	reversed := slices.Clone(tools)
	slices.Reverse(reversed)
	keys := slices.Clone(tools)
	keys[3] = `{"function":{"parameters":{"properties":{"city":{"description":"where","type":"string"},"days":{"type":"integer"}},"required":["city"],"type":"object"},"description":"the tool 3","name":"tool_3"},"type":"function"}`
	added := append(slices.Clone(tools), strings.ReplaceAll(tools[0], "tool_0", "tool_8"))
	for _, e := range []Endpoint{Chat, ChatCompletions} {
		a := with(e, tools)
		for name, same := range map[string]Chain{"again": with(e, tools), "keys": with(e, keys)} {
			if !equal(a, same) {
				t.Errorf("endpoint %d, %s: differs at %+v", e, name, Common(a.Links, same.Links))
			}
		}
		b := with(e, reversed)
		if s := Common(a.Links, b.Links); s.Part != Tools || s.Message != 1 || s.Bytes != len("You use tools.") || s.Part.String() != "tools" {
			t.Errorf("endpoint %d, reversed: told %+v", e, s)
		}
		if a.Conversation != b.Conversation || a.Leaf() == b.Leaf() {
			t.Errorf("endpoint %d, reversed: not another prompt of the same conversation", e)
		}
		// A tool that is added at the end leaves the ones before it unchanged.
		if s := Common(a.Links, with(e, added).Links); s.Part != Head || a.Links[s.Links-1].Part != Tools || s.Bytes < 8*200 {
			t.Errorf("endpoint %d, added: told %+v", e, s)
		}
	}
}

// TestFieldNumCtx: requests that load a model with other options have no link in common, and the
// chain shows which option differs.
func TestFieldNumCtx(t *testing.T) {
	with := func(options string) Chain {
		return read(t, Chat, fmt.Appendf(nil, `{"messages":[{"role":"user","content":"Hi"}],"options":{%s"temperature":0}}`, options))
	}
	large, absent, small := with(`"num_ctx":32768,`), with(""), with(`"num_ctx":8192,`)
	for _, pair := range []struct {
		from, to Chain
		want     string
	}{
		{large, absent, "[num_ctx from 32768 to default]"},
		{absent, small, "[num_ctx from default to 8192]"},
		{small, large, "[num_ctx from 8192 to 32768]"},
	} {
		if s := Common(pair.from.Links, pair.to.Links); s.Links != 0 || s.Part != Runner || s.Message != -1 {
			t.Errorf("%s: told %+v", pair.want, s)
		}
		if got := fmt.Sprint(pair.to.Runner.Changes(pair.from.Runner)); got != pair.want {
			t.Errorf("changes %s, want %s", got, pair.want)
		}
	}
	if !equal(large, with(`"num_ctx":32768,"seed":7,`)) {
		t.Error("a seed changes the chain")
	}
}

// TestFine: the chain shows in which sixteenth two blocks diverge, and in 1 of 256 cases one
// sixteenth late.
func TestFine(t *testing.T) {
	for size, step := range map[int]int{600: 1, 40 << 10: 211} {
		text := make([]byte, size)
		for i := range text {
			text[i] = 'a' + byte(i*i%23)
		}
		chain := func() Chain {
			body, err := json.Marshal(map[string]string{"prompt": string(text)})
			if err != nil {
				t.Fatal(err)
			}
			return read(t, Generate, body)
		}
		whole := chain()
		late, all := 0, 0
		for at := 0; at < size; at += step {
			was, part := text[at], BlockPart(Link{Offset: at})
			for _, text[at] = range []byte("AZ") {
				offset := Common(chain().Links, whole.Links).Offset
				sixteenths := offset/part - at/part
				if sixteenths < 0 || sixteenths > 1 {
					t.Fatalf("byte %d of %d differs, told %d", at, size, offset)
				}
				late += sixteenths
				all++
			}
			text[at] = was
		}
		if late > 2+all/100 {
			t.Errorf("%d of %d told late", late, all)
		}
	}
}
