package answers

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// parseEmbed is ParseEmbed for a body as it comes.
func parseEmbed(path, body string) (EmbedRequest, bool) {
	o := jsonscan.NewObject([]byte(body))
	var members []jsonscan.Member
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		members = append(members, m)
	}
	if o.Err() != nil {
		return EmbedRequest{}, false
	}
	return ParseEmbed(path, []byte(body), members)
}

func TestParseEmbed(t *testing.T) {
	for _, tc := range []struct {
		path, body string
		want       EmbedRequest // without its offsets
	}{
		{pathEmbed, `{"model":"m","input":"a"}`, EmbedRequest{Model: "m", Inputs: []string{"a"}}},
		{pathEmbed, ` {"Model" : "m", "INPUT":[ "a" , "\u00e9" ],"keep_alive":-1, "truncate":null}x`,
			EmbedRequest{Model: "m", Inputs: []string{"a", "é"}}},
		{pathEmbed, `{"model":"m","input":"a","truncate":true,"dimensions":-2,"options":{}}`,
			EmbedRequest{Model: "m", Inputs: []string{"a"}}},
		{pathEmbed, `{"model":"m","input":"a","truncate":false,"dimensions":8,"options":{"num_ctx":64.0,"a":null}}`,
			EmbedRequest{Model: "m", Inputs: []string{"a"}, Whole: true, Dimensions: 8, Options: `{"a":null,"num_ctx":64}`}},
		{pathEmbeddings, `{"prompt":"a","model":"m"}`, EmbedRequest{Model: "m", Inputs: []string{"a"}}},
		{pathOpenAI, `{"model":"m","input":["a"],"encoding_format":"Base64","user":"u","dimensions":3}`,
			EmbedRequest{Model: "m", Inputs: []string{"a"}, Dimensions: 3, Base64: true}},
	} {
		r, ok := parseEmbed(tc.path, tc.body)
		tc.want.Path, tc.want.At, tc.want.End = tc.path, r.At, r.End
		if !ok || !reflect.DeepEqual(r, tc.want) {
			t.Errorf("%s: %+v %v, want %+v", tc.body, r, ok, tc.want)
		}
		if again, ok := parseEmbed(tc.path, string(r.With([]byte(tc.body), []byte(`"other"`)))); !ok || again.Inputs[0] != "other" || again.Sum() != r.Sum() {
			t.Errorf("%s: with another input %+v %v", tc.body, again, ok)
		}
	}
	for _, body := range []string{
		`{}`, `[]`, `{"model":"m"}`, `{"input":"a"}`, `{"model":"m","input":""}`, `{"model":"m","input":["a",""]}`,
		`{"model":"m","input":[]}`, `{"model":"m","input":null}`, `{"model":"m","input":1}`, `{"model":"m","input":[1,2]}`,
		`{"model":"m","input":[["a"]]}`, `{"model":"m","input":["a",null]}`, `{"model":"m","input":"a","Input":"b"}`,
		`{"model":"m","input":"a","what":1}`, `{"model":1,"input":"a"}`, `{"model":"m","input":"a","truncate":1}`,
		`{"model":"m","input":"a","dimensions":1.5}`, `{"model":"m","input":"a","dimensions":"8"}`,
		`{"model":"m","input":"a","options":[]}`, `{"model":"m","input":"a"`, `{"model":"m","prompt":"a"}`,
	} {
		if r, ok := parseEmbed(pathEmbed, body); ok {
			t.Errorf("%s was understood: %+v", body, r)
		}
	}
	for _, body := range []string{`{"model":"m","prompt":["a"]}`, `{"model":"m","input":"a"}`} {
		if _, ok := parseEmbed(pathEmbeddings, body); ok {
			t.Errorf("%s was understood as a request of the older form", body)
		}
	}
	if _, ok := parseEmbed(pathOpenAI, `{"model":"m","input":"a","encoding_format":"int8"}`); ok {
		t.Error("an unknown form of vectors was understood")
	}
	a, _ := parseEmbed(pathEmbed, `{"model":"m","input":"a"}`)
	b, _ := parseEmbed(pathOpenAI, `{"model":"m","input":"a","encoding_format":"base64"}`)
	c, _ := parseEmbed(pathEmbeddings, `{"model":"m","prompt":"a"}`)
	if a.Sum() != b.Sum() || a.Sum() == c.Sum() {
		t.Errorf("sums %q, %q and %q: want the first two to be equal", a.Sum(), b.Sum(), c.Sum())
	}
}

// ollamaEmbeds is the answer as Ollama itself writes it.
func ollamaEmbeds(t testing.TB, r EmbedRequest, list []Embedding, total, load time.Duration) []byte {
	t.Helper()
	answer := api.EmbedResponse{Model: r.Model, TotalDuration: total, LoadDuration: load, Embeddings: [][]float32{}}
	for _, e := range list {
		answer.Embeddings = append(answer.Embeddings, e.Values)
		answer.PromptEvalCount += e.Tokens
	}
	var text []byte
	var err error
	switch r.Path {
	case pathEmbed:
		text, err = json.Marshal(answer)
	case pathEmbeddings:
		old := api.EmbeddingResponse{}
		for _, v := range list[0].Values {
			old.Embedding = append(old.Embedding, float64(v))
		}
		text, err = json.Marshal(old)
	default:
		format := ""
		if r.Base64 {
			format = "base64"
		}
		var b bytes.Buffer
		err = json.NewEncoder(&b).Encode(openai.ToEmbeddingList(r.Model, answer, format))
		text = b.Bytes()
	}
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// FuzzCompose compares what is composed with what Ollama's own types write, and reads it again.
func FuzzCompose(f *testing.F) {
	f.Add([]byte("\x00\x00\x80?\x00\x00\x00\x80\x01\x00\x00\x00\xff\xff\x7f\x7f"), "m<&>é", uint8(0), 7, int64(12), int64(3))
	f.Add([]byte("\x00\x00\x80?\xbd7\x865\xbe7\x865\xce\xccL="), "m", uint8(5), 0, int64(0), int64(0))
	f.Fuzz(func(t *testing.T, bits []byte, model string, kind uint8, tokens int, total, load int64) {
		var values []float32
		for ; len(bits) >= 4; bits = bits[4:] {
			v := math.Float32frombits(uint32(bits[0]) | uint32(bits[1])<<8 | uint32(bits[2])<<16 | uint32(bits[3])<<24)
			if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
				return
			}
			values = append(values, v)
		}
		if len(values) == 0 || model == "" || tokens < 0 || tokens > math.MaxInt32 || total < 0 || load < 0 {
			return
		}
		r := EmbedRequest{Path: []string{pathEmbed, pathEmbeddings, pathOpenAI}[kind%3], Model: model, Base64: kind%2 == 1}
		one := Embedding{Values: values, Tokens: tokens, Cost: time.Duration(total), Load: time.Duration(load)}
		if r.Path != pathEmbed {
			one.Cost, one.Load = 0, 0
		}
		if r.Path == pathEmbeddings {
			one.Tokens = 0
		}
		want := ollamaEmbeds(t, r, []Embedding{one}, one.Cost, one.Load)
		if got := r.Compose([]Embedding{one}, one.Cost, one.Load); !bytes.Equal(got, want) {
			t.Fatalf("composed %s\nOllama's  %s", got, want)
		}
		read, ok := r.ParseAnswer(want)
		if !ok || !sameBits(read.Values, values) || read.Tokens != one.Tokens || read.Cost != one.Cost {
			t.Fatalf("%s was read as %+v, %v", want, read, ok)
		}
		again, err := DecodeEmbedding(one.Encode())
		if err != nil || !sameBits(again.Values, values) || again.Tokens != one.Tokens || again.Cost != one.Cost || again.Load != one.Load {
			t.Fatalf("%+v was kept as %+v, %v", one, again, err)
		}
		if r.Path != pathEmbeddings {
			three := []Embedding{one, {Values: values[:1], Tokens: 1}, one}
			if got, want := r.Compose(three, one.Cost, one.Load), ollamaEmbeds(t, r, three, one.Cost, one.Load); !bytes.Equal(got, want) {
				t.Fatalf("composed %s\nOllama's  %s", got, want)
			}
		}
	})
}

func sameBits(a, b []float32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if math.Float32bits(a[i]) != math.Float32bits(b[i]) {
			return false
		}
	}
	return true
}

// FuzzParseEmbed compares with how Ollama decodes the same body: what is understood means the same
// there, and so does the body with a single text in it.
func FuzzParseEmbed(f *testing.F) {
	f.Add(uint8(0), `{"model":"m","input":["a","b"],"truncate":false,"dimensions":4,"options":{"num_ctx":1e2}}`)
	f.Add(uint8(1), `{"model":"m","prompt":"a","options":{"a":{"b":[1]}}}`)
	f.Add(uint8(2), `{"model":"m","input":"\ud800\n","encoding_format":"base64","user":7}`)
	f.Add(uint8(0), `{"\u006dodel":"m","\u017ftream":1,"inpuT":"a"} trailing`)
	f.Fuzz(func(t *testing.T, kind uint8, body string) {
		path := []string{pathEmbed, pathEmbeddings, pathOpenAI}[kind%3]
		r, ok := parseEmbed(path, body)
		if !ok {
			return
		}
		if got, err := decodeEmbed(path, []byte(body)); err != nil || !reflect.DeepEqual(got, meaning(r)) {
			t.Fatalf("%s was understood as %+v; Ollama: %+v, %v", body, meaning(r), got, err)
		}
		for _, text := range r.Inputs {
			input, _ := json.Marshal(text)
			one := r
			one.Inputs = []string{text}
			if got, err := decodeEmbed(path, r.With([]byte(body), input)); err != nil || !reflect.DeepEqual(got, meaning(one)) {
				t.Fatalf("%s with one input: %+v; Ollama: %+v, %v", body, meaning(one), got, err)
			}
		}
	})
}

// embedMeaning is a request as Ollama decodes it.
type embedMeaning struct {
	Model, Options string
	Inputs         []string
	Whole, Base64  bool
	Dimensions     int
}

func meaning(r EmbedRequest) embedMeaning {
	return embedMeaning{r.Model, r.Options, r.Inputs, r.Whole, r.Base64, r.Dimensions}
}

func decodeEmbed(path string, body []byte) (m embedMeaning, err error) {
	d := json.NewDecoder(bytes.NewReader(body))
	var input any
	var options map[string]any
	switch path {
	case pathEmbed:
		var q api.EmbedRequest
		err = d.Decode(&q)
		m.Model, input, options, m.Dimensions = q.Model, q.Input, q.Options, max(0, q.Dimensions)
		m.Whole = q.Truncate != nil && !*q.Truncate
	case pathEmbeddings:
		var q api.EmbeddingRequest
		err = d.Decode(&q)
		m.Model, input, options = q.Model, q.Prompt, q.Options
	default:
		var q openai.EmbedRequest
		err = d.Decode(&q)
		m.Model, input, m.Dimensions = q.Model, q.Input, max(0, q.Dimensions)
		m.Base64 = len(q.EncodingFormat) == len("base64")
	}
	if len(options) > 0 {
		text, _ := json.Marshal(options)
		m.Options = string(text)
	}
	switch v := input.(type) {
	case string:
		m.Inputs = []string{v}
	case []any:
		for _, text := range v {
			s, _ := text.(string)
			m.Inputs = append(m.Inputs, s)
		}
	}
	return m, err
}

// FuzzDecodeEmbedding reads what a damaged store may return.
func FuzzDecodeEmbedding(f *testing.F) {
	f.Add((&Embedding{Values: []float32{1, -0.5}, Tokens: 3, Context: 4096, Cost: time.Second}).Encode())
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := DecodeEmbedding(data)
		if err != nil {
			return
		}
		again, err := DecodeEmbedding(e.Encode())
		if err != nil || !reflect.DeepEqual(e, again) {
			t.Fatalf("%+v, encoded again: %+v %v", e, again, err)
		}
	})
}

// TestUnexpectedAnswers: whatever Compose would write in another way is not taken.
func TestUnexpectedAnswers(t *testing.T) {
	for path, list := range map[string][]string{
		pathEmbed: {
			`{"model":"m","embeddings":[[1.0]],"total_duration":1,"prompt_eval_count":2}`,
			`{"model":"m","embeddings":[[1]],"total_duration":1,"prompt_eval_count":2,"more":true}`,
			`{"model":"n","embeddings":[[1]]}`, `{"model":"m","embeddings":[[1]]} `, `{"model":"m","embeddings":[[1],[2]]}`,
			`{"model":"m","embeddings":[[]]}`, `{"model":"m","embeddings":[]}`, `{"error":"no"}`, ``,
			`{"model":"m","embeddings":[[0.12345678901]]}`, `{"model":"m","embeddings":[[1e300]]}`,
		},
		pathEmbeddings: {`{"embedding":[]}`, `{"embedding":[0.1]}`, `{"embedding":null}`},
		pathOpenAI: {
			`{"object":"list","data":[{"object":"embedding","embedding":[1],"index":0}],"model":"m","usage":{"prompt_tokens":2,"total_tokens":3}}` + "\n",
			`{"object":"list","data":[{"object":"embedding","embedding":[1],"index":0}],"model":"m","usage":{"prompt_tokens":2,"total_tokens":2}}`,
		},
	} {
		r := EmbedRequest{Path: path, Model: "m"}
		for _, body := range list {
			if e, ok := r.ParseAnswer([]byte(body)); ok {
				t.Errorf("%s: %s was taken as %+v", path, body, e)
			}
		}
	}
}

func TestRepeats(t *testing.T) {
	a := []float32{0.6, 0.8}
	near, far := []float32{0.6000001, 0.8}, []float32{0.8, 0.6}
	for _, tc := range []struct {
		again, array []float32
		serves, same bool
	}{
		{a, a, true, true}, {a, near, true, true}, {near, a, false, false}, {a, far, false, true}, {a, a[:1], false, true},
	} {
		r := Repeats{Same: true, Batches: true}
		r.Compare(a, tc.again, true)
		r.Compare(a, tc.array, false)
		if r.Serves() != tc.serves || r.Same != tc.same {
			t.Errorf("%v again %v, in an array %v: %+v, served %v", a, tc.again, tc.array, r, r.Serves())
		}
	}
}

func TestHolds(t *testing.T) {
	for _, tc := range []struct {
		tokens, most, made, now int
		want                    bool
	}{
		{10, 50, 64, 64, true}, {64, 300, 64, 64, true}, {10, 50, 64, 4096, true},
		{63, 300, 64, 4096, false}, {100, 500, 4096, 64, false},
		{10, 50, 0, 64, true}, {10, 50, 64, 0, true}, {62, 300, 64, 0, false},
		{0, 300, 64, 128, false}, {0, 50, 64, 128, true}, {0, 300, 0, 0, true}, {0, 300, 64, 64, true},
		{2000, 9000, 0, 0, true}, {2046, 9000, 0, 0, false}, {2046, 9000, 8192, 0, false},
		{4094, 9000, 0, 8192, false}, {0, 9000, 0, 0, false},
	} {
		e := Embedding{Tokens: tc.tokens, Context: tc.made}
		if got := e.Holds(tc.now, tc.most); got != tc.want {
			t.Errorf("%d tokens of at most %d, made with a context of %d, in one of %d: %v",
				tc.tokens, tc.most, tc.made, tc.now, got)
		}
	}
}
