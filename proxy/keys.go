package proxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/time/rate"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Keys are the API keys that clients must show, as digests, with each client's rights and limits.
// They can be replaced while requests are served.
//
//	sk-proxy-3f9a
//	alice sk-proxy-77d1 class=interactive
//	nightly sk-proxy-b0c4 weight=0.5 class=batch max-waiting=50 rate=600/m
//	ops sk-proxy-91ce admin
type Keys struct {
	holders   atomic.Pointer[[]*keyHolder]
	replacing sync.Mutex // held by Replace, so that two calls never inherit from the same holders
}

// keyHolder is the owner of a key.
type keyHolder struct {
	sum    [sha256.Size]byte // of the key
	name   string            // "" if the file has none
	weight float64           // its share when clients compete, relative to the others' weights
	share  float64           // weight divided by the greatest weight in the file

	// classed reports whether a class is set: the most urgent priority that this client may ask
	// for, and its default.
	classed bool
	class   schedule.Priority

	admin bool // the right to change models and upstreams: see exchange.admin

	maxWaiting int // limit of waiting requests; 0: no limit
	limiter    *rate.Limiter

	// elsewhere is how many of its requests wait at other proxies, as of its last request here.
	elsewhere atomic.Int64

	// waiting is shared with the holder of the same name in the previous file, so that a reload
	// neither drops nor doubles the count of waiting requests.
	waiting *atomic.Int64
}

// keySettings lists the settings that may follow a name and a key, for error messages and for the
// check that no setting stands in the key's place.
var keySettings = []struct{ name, form string }{
	{"weight", "weight=2 (a number from 0.1 to 10)"},
	{"class", "class=interactive, class=normal or class=batch"},
	{"max-waiting", "max-waiting=50 (a whole number from 1 on)"},
	{"rate", "rate=10/s, rate=600/m or rate=1000/h (a whole number from 1 on)"},
	{settingAdmin, "admin, admin=yes or admin=no"},
}

const (
	keyLine = "want KEY, or NAME KEY and then any of weight=2 class=interactive|normal|batch " +
		"max-waiting=50 rate=10/s admin"
	settingAdmin   = "admin" // the only setting without a value
	longestKeyName = 64
	// looksLikeKey is how keys of OpenAI's and Anthropic's form begin. Names appear in logs and
	// metrics, so a line with name and key swapped must be refused.
	looksLikeKey = "sk-"
)

// ParseKeys parses keys in the form that Replace describes.
func ParseKeys(text string) (*Keys, error) {
	k := &Keys{}
	if err := k.Replace(text); err != nil {
		return nil, err
	}
	return k, nil
}

// Replace reads one key per line, optionally with a name and settings. It skips blank lines, lines
// that begin with #, and the traces of editors: blanks around a line, byte order marks, carriage
// returns. After an error the old keys stay.
//
// The counters of a key's limits pass to the new key of the same name: its waiting requests still
// count, and its rate goes on where it was.
func (k *Keys) Replace(text string) error {
	k.replacing.Lock()
	defer k.replacing.Unlock()
	var list []*keyHolder
	names, sums := map[string]int{}, map[[sha256.Size]byte]int{}
	lines := strings.Split(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(text), "\n")
	for i, line := range lines {
		line = strings.TrimFunc(
			line,
			func(r rune) bool { return r == '\ufeff' || unicode.IsSpace(r) },
		)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		p, err := parseKey(line)
		if err != nil {
			return fmt.Errorf("line %d: %w", i+1, err)
		}
		before, twice := sums[p.sum]
		switch {
		case twice && p.name == "" && list[before].name == "":
			continue // a key without a name or settings cannot contradict another line
		case twice:
			return fmt.Errorf(
				"line %d: another line has this key, too; give each client a key of its own",
				i+1,
			)
		}
		if first, taken := names[p.name]; taken && p.name != "" {
			return fmt.Errorf(
				"line %d: line %d has the name %q already; give each key a name of its own",
				i+1,
				first,
				p.name,
			)
		}
		names[p.name], sums[p.sum] = i+1, len(list)
		list = append(list, p)
	}
	if len(list) == 0 {
		return errors.New("no API key in it: write one key a line")
	}
	heaviest := slices.MaxFunc(
		list,
		func(a, b *keyHolder) int { return cmp.Compare(a.weight, b.weight) },
	)
	for _, p := range list {
		p.share = p.weight / heaviest.weight
	}
	k.inherit(list)
	k.holders.Store(&list)
	return nil
}

// inherit lets the holders of a new file take over the counters of the old ones by name.
func (k *Keys) inherit(list []*keyHolder) {
	var before []*keyHolder
	if p := k.holders.Load(); p != nil {
		before = *p
	}
	for _, p := range list {
		if p.name == "" {
			continue
		}
		i := slices.IndexFunc(before, func(q *keyHolder) bool { return q.name == p.name })
		if i < 0 {
			continue
		}
		old := before[i]
		p.waiting = old.waiting
		if old.limiter != nil && p.limiter != nil && old.limiter.Limit() == p.limiter.Limit() &&
			old.limiter.Burst() == p.limiter.Burst() {
			p.limiter = old.limiter
		}
	}
}

// parseKey parses one line.
func parseKey(line string) (*keyHolder, error) {
	if !utf8.ValidString(line) ||
		strings.ContainsFunc(
			line,
			func(r rune) bool { return unicode.IsControl(r) && !unicode.IsSpace(r) },
		) {
		return nil, errors.New("this is no UTF-8 text; save the file as UTF-8")
	}
	words := strings.Fields(line)
	p := &keyHolder{weight: 1, waiting: &atomic.Int64{}}
	if len(words) == 1 {
		p.sum = sha256.Sum256([]byte(words[0]))
		return p, nil
	}
	if p.name = words[0]; !validKeyName(p.name) {
		return nil, fmt.Errorf(
			"the name, which comes before the key, has up to %d letters, digits, dots, "+
				"dashes, underscores and @, and does not begin with %s; %s",
			longestKeyName,
			looksLikeKey,
			keyLine,
		)
	}
	if isKeySetting(words[1]) {
		return nil, fmt.Errorf("a key with settings needs a name before it; %s", keyLine)
	}
	p.sum = sha256.Sum256([]byte(words[1]))
	seen := map[string]bool{}
	for _, word := range words[2:] {
		if !isKeySetting(word) { // the message must not quote it: it may be part of a key
			return nil, fmt.Errorf("a word after the key is no setting; %s", keyLine)
		}
		name, value, valued := strings.Cut(word, "=")
		if !valued {
			value = "yes"
		}
		if seen[name] {
			return nil, fmt.Errorf("%s is given twice; give it once", name)
		}
		seen[name] = true
		if err := p.set(name, value); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func isKeySetting(word string) bool {
	name, _, ok := strings.Cut(word, "=")
	for _, s := range keySettings {
		if s.name == name && (ok || name == settingAdmin) {
			return true
		}
	}
	return false
}

func validKeyName(name string) bool {
	return len(name) <= longestKeyName && !strings.HasPrefix(strings.ToLower(name), looksLikeKey) &&
		!strings.ContainsFunc(name, func(r rune) bool {
			return r >= utf8.RuneSelf ||
				!unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("._-@", r)
		})
}

// set parses one setting.
func (p *keyHolder) set(name, value string) (err error) {
	ok := false
	switch name {
	case "weight":
		p.weight, err = strconv.ParseFloat(value, 64)
		ok = err == nil && p.weight >= 0.1 && p.weight <= 10
	case "class":
		p.class, ok = schedule.ParsePriority(value)
		p.classed = true
	case "max-waiting":
		p.maxWaiting, err = strconv.Atoi(value)
		ok = err == nil && p.maxWaiting >= 1
	case "rate":
		p.limiter, ok = parseRate(value)
	case settingAdmin:
		p.admin, ok = value == "yes", value == "yes" || value == "no"
	}
	if ok {
		return nil
	}
	for _, s := range keySettings {
		if s.name == name {
			return fmt.Errorf("%s=%s: want %s", name, value, s.form)
		}
	}
	panic("a setting that is not in keySettings")
}

// parseRate parses a number of requests and a period. A client may use up the whole number at once.
func parseRate(s string) (*rate.Limiter, bool) {
	number, unit, _ := strings.Cut(s, "/")
	per := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > math.MaxInt32 || per == 0 {
		return nil, false
	}
	return rate.NewLimiter(rate.Limit(float64(n)/per.Seconds()), n), true
}

// Len returns the number of keys.
func (k *Keys) Len() int { return len(*k.holders.Load()) }

// Names returns the names of the named keys.
func (k *Keys) Names() []string {
	var names []string
	for _, p := range *k.holders.Load() {
		if p.name != "" {
			names = append(names, p.name)
		}
	}
	return names
}

// Admins returns how many of the keys may change models and upstreams.
func (k *Keys) Admins() int {
	n := 0
	for _, p := range *k.holders.Load() {
		if p.admin {
			n++
		}
	}
	return n
}

// check compares with every key, in a time that reveals neither which one matches nor how much of
// it. It returns the key's holder, or nil if no key matches.
func (k *Keys) check(key string) *keyHolder {
	sum := sha256.Sum256([]byte(key))
	var found *keyHolder
	for _, p := range *k.holders.Load() {
		if subtle.ConstantTimeCompare(sum[:], p.sum[:]) == 1 {
			found = p
		}
	}
	return found
}

// secret returns the bytes that separate this client's stored contexts from others'; nil without a
// key.
func (p *keyHolder) secret() []byte {
	if p == nil {
		return nil
	}
	return p.sum[:]
}

// client returns the key's digest, which identifies the client; "" for nil.
func (p *keyHolder) client() string {
	if p == nil {
		return ""
	}
	return string(p.sum[:])
}

// holder returns the current holder of the key with this digest, or nil.
func (k *Keys) holder(client string) *keyHolder {
	if k == nil || client == "" {
		return nil
	}
	for _, p := range *k.holders.Load() {
		if string(p.sum[:]) == client {
			return p
		}
	}
	return nil
}

// admin reports whether the request may change models and upstreams: its key has that right, or no
// keys are required, so that anyone who can reach the proxy may do everything.
func (ex *exchange) admin() bool {
	if ex.holder == nil {
		return !ex.stranger
	}
	return ex.holder.admin
}

// notAdmin refuses a request that needs the admin right if its client does not have it.
func (ex *exchange) notAdmin() *refusal {
	if ex.admin() {
		return nil
	}
	who := "this API key"
	if ex.Name != "" {
		who = "the API key named " + ex.Name
	}
	return &refusal{
		http.StatusForbidden,
		who + " may not change models or upstreams, nor wipe kept answers: that takes a key with the " +
			"word admin after it in the file of the API keys, such as 'NAME KEY admin'",
	}
}

// priority returns a request's priority: the one that its client asks for, within the client's
// class.
func (p *keyHolder) priority(r *http.Request) schedule.Priority {
	asked, ok := schedule.ParsePriority(strings.ToLower(r.Header.Get(headerPriority)))
	switch {
	case p == nil || !p.classed:
		return asked // Normal if it asks for none
	case !ok:
		return p.class
	}
	return max(asked, p.class)
}

// tooFast refuses a request that exceeds the client's rate. One that a peer has passed on was counted
// there, but waits here.
func (h *Handler) tooFast(ctx context.Context, ex *exchange) *refusal {
	asks := ex.reads == readsNative || ex.reads == readsForeign || ex.Endpoint == pathAudio
	if ex.holder == nil || !asks {
		return nil
	}
	wait := ex.holder.take(ctx, h.Limiter, ex.passed == nil)
	if wait <= 0 {
		return nil
	}
	ex.header.Set("Retry-After", strconv.FormatFloat(math.Ceil(wait.Seconds()), 'f', -1, 64))
	return &refusal{
		http.StatusTooManyRequests,
		fmt.Sprintf(
			"more requests than the API key named %s may send; the next one may come in %v "+
				"(rate= in the file of the API keys)",
			ex.holder.name,
			wait.Round(time.Millisecond),
		),
	}
}

// mayWait counts a request as waiting, and reports whether its client may have one more. A request
// that was admitted before, and waits again because its server is gone or another one is idle, always
// may.
func (p *keyHolder) mayWait(before bool, shared Limiter) bool {
	n := p.waiting.Add(1)
	if shared != nil && p.maxWaiting > 0 {
		shared.Waiting(p.client(), 1)
	}
	return before || p.maxWaiting == 0 || n+p.elsewhere.Load() <= int64(p.maxWaiting)
}

// waited ends what mayWait has counted.
func (p *keyHolder) waited(shared Limiter) {
	p.waiting.Add(-1)
	if shared != nil && p.maxWaiting > 0 {
		shared.Waiting(p.client(), -1)
	}
}

// waits reports whether the client has reached its limit of waiting requests.
func (p *keyHolder) waits() bool {
	return p != nil && p.maxWaiting > 0 && p.waiting.Load()+p.elsewhere.Load() >= int64(p.maxWaiting)
}

// tooMany refuses a request because its client has reached its limit of waiting requests.
func (ex *exchange) tooMany() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{
		http.StatusTooManyRequests,
		fmt.Sprintf(
			"%d requests with the API key named %s wait already, which is all that may; send this "+
				"one when some of them are answered (max-waiting= in the file of the API keys)",
			ex.holder.maxWaiting,
			ex.holder.name,
		),
	}
}
