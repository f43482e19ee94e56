package proxy

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// KeepAlivePolicy decides when the operator's keep_alive replaces a client's. A client's 0 (unload)
// is never changed, nor is a value that Ollama would refuse.
type KeepAlivePolicy string

const (
	IfAbsent KeepAlivePolicy = "if-absent" // only if the client gave none
	AtLeast  KeepAlivePolicy = "at-least"  // also if the client's is shorter
	Force    KeepAlivePolicy = "force"     // always
)

// KeepAlive says how long models stay loaded. The zero value changes nothing.
type KeepAlive struct {
	Policy  KeepAlivePolicy // "" is IfAbsent
	Default Hold
	Models  map[string]Hold // by upstream.ModelKey; overrides Default
}

// Hold is one keep_alive: a duration and its JSON text. The zero Hold means "leave it as it is".
type Hold struct {
	Duration time.Duration
	JSON     string
}

// For returns the setting for a model (upstream.ModelKey).
func (k KeepAlive) For(model string) Hold {
	if h, ok := k.Models[model]; ok {
		return h
	}
	return k.Default
}

// String lists the settings in the form that ParseKeepAlive reads.
func (k KeepAlive) String() string {
	value := func(h Hold) string {
		if h == (Hold{}) {
			return "off"
		}
		return strings.Trim(h.JSON, `"`)
	}
	list := []string{value(k.Default)}
	for _, model := range slices.Sorted(maps.Keys(k.Models)) {
		list = append(list, upstream.DisplayName(model)+"="+value(k.Models[model]))
	}
	return strings.Join(list, ", ")
}

// ParseKeepAlive reads settings of the form "24h" or "llama3=1h". A value is a Go duration, a
// number of seconds, a negative number (for ever), or "off".
func ParseKeepAlive(policy KeepAlivePolicy, settings []string) (KeepAlive, error) {
	k := KeepAlive{Policy: policy, Models: map[string]Hold{}}
	if !slices.Contains([]KeepAlivePolicy{"", IfAbsent, AtLeast, Force}, policy) {
		return k, fmt.Errorf("keep-alive policy %q: want if-absent, at-least or force", policy)
	}
	for _, s := range settings {
		if err := forModel(s, parseHold, &k.Default, k.Models); err != nil {
			return k, fmt.Errorf("keep-alive %q: %w", s, err)
		}
	}
	return k, nil
}

// forModel parses a setting of the form VALUE, for all models, or MODEL=VALUE, for one.
func forModel[V any](setting string, parse func(string) (V, error), all *V, models map[string]V) error {
	model, text, one := strings.Cut(setting, "=")
	if !one {
		text = setting
	}
	value, err := parse(strings.TrimSpace(text))
	if err != nil {
		return err
	}
	if !one {
		*all = value
		return nil
	}
	key := upstream.ModelKey(model)
	if key == "" {
		return fmt.Errorf("%q is not a model name", model)
	}
	models[key] = value
	return nil
}

func parseHold(s string) (Hold, error) {
	if s == "off" {
		return Hold{}, nil
	}
	d, err := time.ParseDuration(s)
	if n, nerr := strconv.ParseInt(s, 10, 32); nerr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	switch {
	case err != nil:
		return Hold{}, fmt.Errorf(`want a duration ("24h"), a number of seconds, -1 (for ever) or off`)
	case d == 0:
		return Hold{}, fmt.Errorf("0 would unload the model after every request; to leave keep_alive alone, say off")
	}
	return holdOf(d), nil
}

// holdOf writes a duration in a form that Ollama reads.
func holdOf(d time.Duration) Hold {
	if d < 0 || d == upstream.Forever {
		return Hold{upstream.Forever, "-1"}
	}
	return Hold{d, `"` + d.String() + `"`}
}

// How a request's keep_alive was treated, in the words of logs and metrics.
const (
	didInject = "injected" // the client gave none
	didHold   = "held"     // the client gave none, and the model is already held
	didSpare  = "spared"   // the client gave none, and another request may wait for room
	didKeep   = "kept"     // the client's own value went upstream
	didRaise  = "raised"   // the client's was shorter: see AtLeast
	didForce  = "forced"   // the client's was different: see Force
)

// clientKeepAlive is what the client wrote.
type clientKeepAlive int

const (
	keepAliveAbsent  clientKeepAlive = iota // no such key, or null
	keepAliveInvalid                        // Ollama will answer 400
	keepAliveSet
)

// fields are the members of a body that the proxy needs, found as Ollama finds them: keys fold
// case, the last one wins, and null counts as absent.
type fields struct {
	open   int  // offset just past the opening brace
	empty  bool // the object has no member
	model  string
	stream byte // the first byte of the last value of "stream"; 0 if it is absent

	keepAlive      clientKeepAlive
	duration       time.Duration // if keepAlive is keepAliveSet; Forever for negative values
	keepAliveAt    int           // the last value's offset, if there is one, even null
	keepAliveAtEnd int

	names names

	members []jsonscan.Member // all of them, in order
	long    []byte            // jsonscan.Object.Long
}

var (
	keyModel     = []byte("model")
	keyName      = []byte("name")
	keyStream    = []byte("stream")
	keyKeepAlive = []byte("keep_alive")
)

// scan reads the body's fields; an error means that it is not a JSON object. members is scratch
// memory for the list of them.
func scan(data []byte, members []jsonscan.Member) (fields, error) {
	f := fields{members: members[:0]}
	o := jsonscan.NewObject(data)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		f.members = append(f.members, m)
		key, value := data[m.Key:m.KeyEnd], data[m.Value:m.ValueEnd]
		switch {
		case jsonscan.KeyIs(key, keyStream):
			f.stream = value[0]
		case jsonscan.KeyIs(key, keyModel):
			if s, ok := jsonscan.Unquote(value); ok { // null leaves the earlier value
				f.model = s
			}
		case jsonscan.KeyIs(key, keyKeepAlive):
			f.keepAliveAt, f.keepAliveAtEnd = m.Value, m.ValueEnd
			if f.keepAlive == keepAliveInvalid {
				continue // one bad value fails the request, whatever follows
			}
			f.keepAlive, f.duration = readKeepAlive(value)
		default:
			f.names.read(key, value)
		}
	}
	f.open, f.empty, f.long = o.Open(), o.Len() == 0, o.Long()
	return f, o.Err()
}

// name returns the model in the body's older field.
func (f fields) name(data []byte) (name string) {
	for _, m := range f.members {
		if jsonscan.KeyIs(data[m.Key:m.KeyEnd], keyName) {
			if s, ok := jsonscan.Unquote(data[m.Value:m.ValueEnd]); ok {
				name = s
			}
		}
	}
	return name
}

// readKeepAlive parses a value with Ollama's own type.
func readKeepAlive(value []byte) (clientKeepAlive, time.Duration) {
	if string(value) == "null" {
		return keepAliveAbsent, 0
	}
	var d api.Duration
	if err := json.Unmarshal(value, &d); err != nil {
		return keepAliveInvalid, 0
	}
	return keepAliveSet, d.Duration
}

// floor returns how long to hold a model if the client does not say: the operator's setting, or the
// longest keep_alive that a client has asked for since the load if that is longer. A request
// without a keep_alive must not shorten what another one stated (in Ollama it would not). Under
// AtLeast neither may a request with a shorter one, so that the outcome does not depend on the
// order of requests. Under Force only the operator's setting counts.
func (k KeepAlive) floor(model string, longest time.Duration) Hold {
	want := k.For(model)
	if want == (Hold{}) || k.Policy == Force || longest <= want.Duration {
		return want
	}
	return holdOf(longest)
}

// decide returns how to treat keep_alive, and the hold to send upstream if that is not the client's
// own.
func (k KeepAlive) decide(floor Hold, f fields) (string, Hold) {
	switch {
	case f.keepAlive == keepAliveAbsent && floor == Hold{}:
		return "", Hold{}
	case f.keepAlive == keepAliveAbsent:
		return didInject, floor
	case f.keepAlive == keepAliveInvalid, f.duration == 0, floor == Hold{}:
		return didKeep, Hold{}
	case k.Policy == AtLeast && f.duration < floor.Duration:
		return didRaise, floor
	case k.Policy == Force && f.duration != floor.Duration:
		return didForce, floor
	}
	return didKeep, Hold{}
}

// splice returns the edit that sets the body's keep_alive to h.
func (f fields) splice(h Hold) edit {
	switch {
	case f.keepAliveAtEnd > 0:
		return edit{at: f.keepAliveAt, cut: f.keepAliveAtEnd - f.keepAliveAt, text: []byte(h.JSON)}
	case f.empty:
		return edit{at: f.open, text: []byte(`"keep_alive":` + h.JSON)}
	}
	return edit{at: f.open, text: []byte(`"keep_alive":` + h.JSON + ",")}
}
