package answers

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// The paths of Ollama's embeddings.
const (
	pathEmbed      = "/api/embed"
	pathEmbeddings = "/api/embeddings" // the older one: one text, and a vector as the model gives it
	pathOpenAI     = "/v1/embeddings"
)

// EmbedRequest is a request for the vectors of some texts, all of whose members are understood.
type EmbedRequest struct {
	Path       string
	Model      string   // as it is written
	Inputs     []string // at least one; none is empty
	Whole      bool     // truncate is false: a text that is too long is an error
	Dimensions int      // 0: all
	Options    string   // canonical JSON; "" for none
	Base64     bool     // vectors are asked for in this form

	// At and End delimit the value of the input in the body.
	At, End int
}

// embedMembers are the members that are understood, by path. Those with false make no difference to
// the vectors.
var embedMembers = map[string]map[string]bool{
	pathEmbed: {
		"model": true, "input": true, "truncate": true, "dimensions": true, "options": true,
		"keep_alive": false,
	},
	pathEmbeddings: {"model": true, "prompt": true, "options": true, "keep_alive": false},
	pathOpenAI: {
		"model": true, "input": true, "dimensions": true, "encoding_format": true, "user": false,
	},
}

// ParseEmbed reads a request's body, an object that jsonscan has validated, with all its members. It
// returns false for every request that has members which it does not understand, whose input is
// anything but a text or a list of texts, or that Ollama refuses: these are not for a cache.
func ParseEmbed(path string, data []byte, members []jsonscan.Member) (r EmbedRequest, ok bool) {
	known := embedMembers[path]
	if known == nil {
		return r, false
	}
	r.Path = path
	seen := map[string]bool{}
	for _, m := range members {
		name := string(fold(data[m.Key:m.KeyEnd]))
		matters, ok := known[name]
		if !ok || seen[name] { // of two members, Ollama may take parts of both
			return r, false
		}
		seen[name] = true
		if matters && !r.member(name, data, m) {
			return r, false
		}
	}
	return r, r.Model != "" && len(r.Inputs) > 0
}

// member reads one member.
func (r *EmbedRequest) member(name string, data []byte, m jsonscan.Member) (ok bool) {
	value := data[m.Value:m.ValueEnd]
	if name == "input" || name == "prompt" {
		r.At, r.End = m.Value, m.ValueEnd
		r.Inputs, ok = inputs(value, name == "input")
		return ok
	}
	if value[0] == 'n' { // null is like nothing
		return true
	}
	switch name {
	case "model":
		r.Model, ok = jsonscan.Unquote(value)
	case "truncate":
		r.Whole, ok = value[0] == 'f', value[0] == 'f' || value[0] == 't'
	case "dimensions":
		n, err := strconv.Atoi(string(value))
		r.Dimensions, ok = max(0, n), err == nil
	case "options":
		r.Options, ok = canonicalOptions(value)
	case "encoding_format":
		var s string
		s, ok = jsonscan.Unquote(value)
		r.Base64 = strings.EqualFold(s, "base64")
		ok = ok && (r.Base64 || s == "" || strings.EqualFold(s, "float"))
	}
	return ok
}

// inputs reads a text or, where lists are allowed, a list of texts.
func inputs(value []byte, lists bool) (texts []string, ok bool) {
	if value[0] == '"' {
		s, ok := jsonscan.Unquote(value)
		return []string{s}, ok && s != ""
	}
	if value[0] != '[' || !lists {
		return nil, false
	}
	c := jsonscan.NewCursor(value, 0)
	for c.Enter(); c.More(); {
		s, ok := jsonscan.Unquote(c.Value())
		if !ok || s == "" {
			return nil, false
		}
		texts = append(texts, s)
	}
	return texts, true
}

// canonicalOptions returns options as Ollama decodes them: in no order, with numbers as float64.
func canonicalOptions(value []byte) (string, bool) {
	var options map[string]any
	if err := json.Unmarshal(value, &options); err != nil {
		return "", false
	}
	if len(options) == 0 {
		return "", true
	}
	text, err := json.Marshal(options)
	return string(text), err == nil
}

// Family tells vectors that Ollama has scaled to length 1 ("unit") from those as the model gives them
// ("raw").
func (r *EmbedRequest) Family() string {
	if r.Path == pathEmbeddings {
		return "raw"
	}
	return "unit"
}

// Sum identifies what, besides the text and the model, decides on a vector. /v1/embeddings is
// /api/embed without options in all versions of Ollama (its middleware writes such a request), so
// both have one sum.
func (r *EmbedRequest) Sum() string {
	return r.Family() + " " + strconv.FormatBool(r.Whole) + " " + strconv.Itoa(r.Dimensions) + " " + r.Options
}

// ContentType is that of the answer.
func (r *EmbedRequest) ContentType() string {
	if r.Path == pathOpenAI {
		return "application/json"
	}
	return "application/json; charset=utf-8"
}

// With returns the body with another input, which is JSON.
func (r *EmbedRequest) With(data, input []byte) []byte {
	return bytes.Join([][]byte{data[:r.At], input, data[r.End:]}, nil)
}

// Embedding is the vector of one text.
type Embedding struct {
	Values []float32
	Tokens int // of the text; 0 where Ollama does not say
	// Context is the context length of the model when the vector was made, in tokens: Ollama cuts
	// longer texts. 0: unknown.
	Context int
	// Cost is the text's share of the time that it took to compute what it was computed with, and
	// Load is its share of the time for loading the model, as the answer counts it: in nanoseconds.
	Cost, Load time.Duration
}

// embeddingFormat is increased with every change of Encode.
const embeddingFormat = 1

// Encode returns the Data of an Entry: no text, and the values as they are.
func (e *Embedding) Encode() []byte {
	b := make([]byte, 0, 32+4*len(e.Values))
	b = append(b, embeddingFormat)
	for _, n := range []int64{int64(e.Tokens), int64(e.Context), int64(e.Cost), int64(e.Load)} {
		b = binary.AppendUvarint(b, uint64(max(0, n)))
	}
	for _, v := range e.Values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return b
}

var errEmbedding = errors.New("not an embedding of this format")

// DecodeEmbedding is the inverse of Encode.
func DecodeEmbedding(data []byte) (e Embedding, err error) {
	if len(data) == 0 || data[0] != embeddingFormat {
		return e, errEmbedding
	}
	data = data[1:]
	var numbers [4]int64
	for i := range numbers {
		n, size := binary.Uvarint(data)
		if size <= 0 || n > math.MaxInt64 {
			return e, errEmbedding
		}
		numbers[i], data = int64(n), data[size:]
	}
	if len(data) == 0 || len(data)%4 != 0 || numbers[0] > math.MaxInt32 || numbers[1] > math.MaxInt32 {
		return e, errEmbedding
	}
	e.Tokens, e.Context = int(numbers[0]), int(numbers[1])
	e.Cost, e.Load = time.Duration(numbers[2]), time.Duration(numbers[3])
	e.Values = make([]float32, len(data)/4)
	for i := range e.Values {
		v := math.Float32frombits(binary.LittleEndian.Uint32(data[4*i:]))
		if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
			return Embedding{}, errEmbedding
		}
		e.Values[i] = v
	}
	return e, nil
}

// leastContext is the shortest default of Ollama's for the context of a model, in tokens. (A model that
// can do with less has the same in all settings.)
const leastContext = 2048

// Holds reports whether the vector is still right if the model is loaded with a context of so many
// tokens: if its text fits into both contexts, or they are the same. 0 is an unknown length, of which
// no less than Ollama's shortest default is expected. The text has most tokens at most; that counts
// where Ollama does not say how many it has.
func (e *Embedding) Holds(context, most int) bool {
	const markers = 2 // tokens that Ollama keeps free at most
	if context != 0 && context == e.Context {
		return true
	}
	tokens := cmp.Or(e.Tokens, most)
	return tokens+markers < min(cmp.Or(context, leastContext), cmp.Or(e.Context, leastContext))
}

// nativeEmbed, oldEmbed and openAIEmbed are Ollama's answers.
type nativeEmbed struct {
	Embeddings [][]float32   `json:"embeddings"`
	Total      time.Duration `json:"total_duration"`
	Load       time.Duration `json:"load_duration"`
	Tokens     int           `json:"prompt_eval_count"`
}

type oldEmbed struct {
	Embedding []float32 `json:"embedding"`
}

type openAIEmbed struct {
	Data []struct {
		Embedding json.RawMessage `json:"embedding"`
	} `json:"data"`
	Usage struct {
		Tokens int `json:"prompt_tokens"`
	} `json:"usage"`
}

// Lists reports whether such a request may have several texts.
func (r *EmbedRequest) Lists() bool { return r.Path != pathEmbeddings }

// ParseAnswer reads Ollama's answer to a request for one text. It returns false if the answer is
// anything that Compose would not write in the same way, byte by byte.
func (r *EmbedRequest) ParseAnswer(body []byte) (e Embedding, ok bool) {
	var list [][]float32
	if list, e, ok = r.read(body); !ok || len(list) != 1 || len(list[0]) == 0 {
		return Embedding{}, false
	}
	e.Values = list[0]
	return e, bytes.Equal(body, r.Compose([]Embedding{e}, e.Cost, e.Load))
}

// Vectors reads the vectors of an answer for n texts.
func (r *EmbedRequest) Vectors(body []byte, n int) ([][]float32, bool) {
	list, _, ok := r.read(body)
	return list, ok && len(list) == n
}

// read reads an answer: the vectors, and the rest of it.
func (r *EmbedRequest) read(body []byte) (list [][]float32, e Embedding, ok bool) {
	switch r.Path {
	case pathEmbed:
		var a nativeEmbed
		ok = json.Unmarshal(body, &a) == nil
		return a.Embeddings, Embedding{Tokens: a.Tokens, Cost: a.Total, Load: a.Load}, ok
	case pathEmbeddings:
		var a oldEmbed
		ok = json.Unmarshal(body, &a) == nil
		return [][]float32{a.Embedding}, e, ok
	}
	var a openAIEmbed
	if json.Unmarshal(body, &a) != nil {
		return nil, e, false
	}
	for i := range a.Data {
		values, ok := r.values(a.Data[i].Embedding)
		if !ok {
			return nil, e, false
		}
		list = append(list, values)
	}
	return list, Embedding{Tokens: a.Usage.Tokens}, true
}

// values reads a vector in either form.
func (r *EmbedRequest) values(raw json.RawMessage) (values []float32, ok bool) {
	if !r.Base64 {
		return values, json.Unmarshal(raw, &values) == nil
	}
	var data []byte
	if json.Unmarshal(raw, &data) != nil || len(data)%4 != 0 {
		return nil, false
	}
	values = make([]float32, len(data)/4)
	for i := range values {
		values[i] = math.Float32frombits(binary.LittleEndian.Uint32(data[4*i:]))
	}
	return values, true
}

// Compose writes the answer with these vectors, as Ollama writes it: one for each input, in order.
// Total and load are the answer's durations, where it has some.
func (r *EmbedRequest) Compose(list []Embedding, total, load time.Duration) []byte {
	tokens, size := 0, 0
	for i := range list {
		tokens += list[i].Tokens
		size += 14*len(list[i].Values) + 60
	}
	b := make([]byte, 0, size+300)
	model, _ := json.Marshal(r.Model) // cannot fail: it is a string
	switch r.Path {
	case pathEmbed:
		b = append(append(append(b, `{"model":`...), model...), `,"embeddings":[`...)
		for i := range list {
			b = appendVector(comma(b, i), list[i].Values, 32)
		}
		b = append(b, ']')
		b = positive(b, "total_duration", int64(total))
		b = positive(b, "load_duration", int64(load))
		b = positive(b, "prompt_eval_count", int64(tokens))
		return append(b, '}')
	case pathEmbeddings:
		return append(appendVector(append(b, `{"embedding":`...), list[0].Values, 64), '}')
	}
	b = append(b, `{"object":"list","data":[`...)
	for i := range list {
		b = append(comma(b, i), `{"object":"embedding","embedding":`...)
		if r.Base64 {
			b = appendBase64(b, list[i].Values)
		} else {
			b = appendVector(b, list[i].Values, 32)
		}
		b = append(strconv.AppendInt(append(b, `,"index":`...), int64(i), 10), '}')
	}
	b = append(append(append(b, `],"model":`...), model...), `,"usage":{"prompt_tokens":`...)
	b = append(strconv.AppendInt(b, int64(tokens), 10), `,"total_tokens":`...)
	return append(strconv.AppendInt(b, int64(tokens), 10), "}}\n"...)
}

func comma(b []byte, i int) []byte {
	if i > 0 {
		b = append(b, ',')
	}
	return b
}

// positive appends a member that is left out if it is 0.
func positive(b []byte, name string, n int64) []byte {
	if n == 0 {
		return b
	}
	b = append(append(append(b, `,"`...), name...), `":`...)
	return strconv.AppendInt(b, n, 10)
}

func appendVector(b []byte, values []float32, bits int) []byte {
	b = append(b, '[')
	for i, v := range values {
		b = appendFloat(comma(b, i), float64(v), bits)
	}
	return append(b, ']')
}

// appendFloat writes a number as encoding/json does for a float32 or float64.
func appendFloat(b []byte, f float64, bits int) []byte {
	abs, format := math.Abs(f), byte('f')
	if abs != 0 && (bits == 64 && (abs < 1e-6 || abs >= 1e21) ||
		bits == 32 && (float32(abs) < 1e-6 || float32(abs) >= 1e21)) {
		format = 'e'
	}
	b = strconv.AppendFloat(b, f, format, -1, bits)
	if n := len(b); format == 'e' && n >= 4 && b[n-4] == 'e' && (b[n-3] == '-' || b[n-3] == '+') && b[n-2] == '0' {
		b[n-2] = b[n-1]
		b = b[:n-1]
	}
	return b
}

func appendBase64(b []byte, values []float32) []byte {
	raw := make([]byte, 0, 4*len(values))
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(v))
	}
	return append(base64.StdEncoding.AppendEncode(append(b, '"'), raw), '"')
}

// Repeats is what was found out about a model's vectors, by asking for the same ones again.
type Repeats struct {
	Same    bool    `json:"same"`    // the same request gives the same vectors, to the bit
	Batches bool    `json:"batches"` // … and so does an array of several inputs, in any order
	Cosine  float64 `json:"cosine"`  // the largest distance between two vectors of one input: 1 - cosine
	Largest float64 `json:"largest"` // the largest difference of a component
}

// mostCosine is how far the vectors of one text may be apart that one array gives and another. The
// sums of half precision differ by about 1e-6 to 1e-5 if they are added in another order, and no
// search ranks by less: two texts that differ in a word are some 1e-2 apart.
const mostCosine = 1e-4

// Serves reports whether kept vectors may be served.
func (r Repeats) Serves() bool { return r.Same && (r.Batches || r.Cosine < mostCosine) }

// Compare notes that b was computed for the text of a, in the same request again, or in another
// array.
func (r *Repeats) Compare(a, b []float32, again bool) {
	same := len(a) == len(b)
	var dot, aa, bb float64
	for i := 0; i < min(len(a), len(b)); i++ {
		x, y := float64(a[i]), float64(b[i])
		dot, aa, bb = dot+x*y, aa+x*x, bb+y*y
		r.Largest = max(r.Largest, math.Abs(x-y))
		same = same && math.Float32bits(a[i]) == math.Float32bits(b[i])
	}
	switch {
	case same:
		return
	case len(a) != len(b) || aa == 0 || bb == 0:
		r.Cosine = 2
	default:
		r.Cosine = max(r.Cosine, 1-dot/math.Sqrt(aa*bb))
	}
	if r.Batches = false; again {
		r.Same = false
	}
}
