package proxy

import (
	"fmt"
	"hash/maphash"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/realclientip/realclientip-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// Open WebUI names its users and their chats in these headers, if it is told to
// (ENABLE_FORWARD_USER_INFO_HEADERS).
const (
	headerUser = "X-OpenWebUI-User-Id"
	headerChat = "X-OpenWebUI-Chat-Id"
)

// TrustedProxies are the fronts, such as nginx, that are believed when they say who asks. The nil
// *TrustedProxies believes nobody. Only fairness depends on it: what a client may do is judged by its
// connection and its key.
type TrustedProxies struct {
	ranges []net.IPNet
	// forwarded holds one strategy for each header in which a front names its client.
	forwarded map[string]realclientip.RightmostTrustedRangeStrategy
}

// ParseTrustedProxies reads networks such as 10.0.0.0/8 and fd00::/8, and single addresses. None
// gives nil.
func ParseTrustedProxies(list []string) (*TrustedProxies, error) {
	if len(list) == 0 {
		return nil, nil
	}
	t := &TrustedProxies{forwarded: map[string]realclientip.RightmostTrustedRangeStrategy{}}
	for _, text := range list {
		cidr := strings.TrimSpace(text)
		if addr, err := netip.ParseAddr(cidr); err == nil {
			cidr = netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()).String()
		}
		_, network, err := net.ParseCIDR(cidr)
		if err != nil {
			return nil, fmt.Errorf("%q: want a network such as 10.0.0.0/8, or an address such as"+
				" 127.0.0.1", text)
		}
		if ones, _ := network.Mask.Size(); ones == 0 {
			return nil, fmt.Errorf("%q has every address in it, the clients' too: give the front's"+
				" own address, such as 127.0.0.1", text)
		}
		t.ranges = append(t.ranges, *network)
	}
	for _, header := range []string{"X-Forwarded-For", "Forwarded"} {
		s, err := realclientip.NewRightmostTrustedRangeStrategy(header, t.ranges)
		if err != nil {
			return nil, err
		}
		t.forwarded[header] = s
	}
	return t, nil
}

// String lists the networks.
func (t *TrustedProxies) String() string {
	if t == nil {
		return "none"
	}
	var all []string
	for i := range t.ranges {
		all = append(all, t.ranges[i].String())
	}
	return strings.Join(all, ", ")
}

// trusts reports whether a peer's address is one of a front.
func (t *TrustedProxies) trusts(peer string) bool {
	if t == nil {
		return false
	}
	addr, _, _ := strings.Cut(peer, "%") // the zone of a link-local address, which no network has
	ip := net.ParseIP(addr)
	for i := range t.ranges {
		if t.ranges[i].Contains(ip) {
			return true
		}
	}
	return false
}

// clientOf says to whom the scheduler is to be fair: the key that was checked, else the user or the
// address that a trusted front names, else the address of the connection.
func (t *TrustedProxies) clientOf(r *http.Request, key string) string {
	if key != "" {
		return key
	}
	peer, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		peer = r.RemoteAddr
	}
	if !t.trusts(peer) {
		return peer
	}
	// A front may pass on, of the two headers, the one that it does not write itself as its client
	// sent it. So if both are there they must agree.
	found := ""
	for header, strategy := range t.forwarded {
		if len(r.Header[header]) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(strategy.ClientIP(r.Header, ""))
		if err != nil { // malformed, or all of them are fronts
			return peer
		}
		name := addr.Unmap().WithZone("").String()
		if found != "" && name != found {
			return peer
		}
		found = name
	}
	if found != "" {
		return found
	}
	// Nobody stands behind the front, so what is said of a user is the front's own word.
	if user := r.Header.Get(headerUser); user != "" {
		return "user " + hashed(user)
	}
	return peer
}

// clientShown is the client as logs and pages show it; "" for the proxy itself.
func (h *Handler) clientShown(r *http.Request, ex *exchange) string {
	if ex.warming != nil {
		return ""
	}
	return hashed(h.Trusted.clientOf(r, ex.holder.client()))
}

// seed is of the hashes by which users, programs and flows are told apart. No name is kept.
var seed = maphash.MakeSeed()

// hashed stands for who a client is, and what it works on: the same for as long as the proxy runs,
// and not to be undone.
func hashed[T comparable](name T) string {
	return fmt.Sprintf("%016x", maphash.Comparable(seed, name))
}

// names are what a body says of who asks, and in which conversation, as hashes; 0: nothing.
type names struct {
	user         [3]uint64 // one for each member that may name a user
	conversation uint64
}

// Members of a body that name a user (of OpenAI's and Anthropic's APIs), and a conversation.
var (
	keyUser             = []byte("user")
	keySafetyIdentifier = []byte("safety_identifier")
	keyMetadata         = []byte("metadata")
	keyUserID           = []byte("user_id")
	keyPromptCacheKey   = []byte("prompt_cache_key")
)

// metadataMost is how many bytes of metadata are looked at for a user; longer ones name nobody.
const metadataMost = 4096

// read takes in a member of the body.
func (n *names) read(key, value []byte) {
	switch {
	case jsonscan.KeyIs(key, keyUser):
		n.user[0] = nameOf(value)
	case jsonscan.KeyIs(key, keySafetyIdentifier):
		n.user[1] = nameOf(value)
	case jsonscan.KeyIs(key, keyMetadata):
		n.user[2] = 0
		if value[0] != '{' || len(value) > metadataMost {
			return
		}
		c := jsonscan.NewCursor(value, 0)
		for c.Enter(); c.More(); {
			key := c.Key()
			if value := c.Value(); jsonscan.KeyIs(key, keyUserID) {
				n.user[2] = nameOf(value)
			}
		}
	case jsonscan.KeyIs(key, keyPromptCacheKey):
		n.conversation = nameOf(value)
	}
}

// nameOf hashes a string as it is written; 0 for an empty one, and for what is no string.
func nameOf(value []byte) uint64 {
	if len(value) <= len(`""`) || value[0] != '"' {
		return 0
	}
	return max(1, maphash.Bytes(seed, value))
}

// program is what tells the programs of one client apart without their help.
type program struct {
	agent, user, endpoint string
	stream                byte
}

// programOf says which of its client's programs a request comes from: a person's chat and a script
// come from one address, but not from one program, or not in one form.
func programOf(r *http.Request, ex *exchange) uint64 {
	p := program{r.UserAgent(), r.Header.Get(headerUser), ex.Endpoint, ex.fields.stream}
	return max(1, maphash.Comparable(seed, p))
}

// flow is what tells apart what a program works on.
type flow struct {
	names  names
	begins uint64
}

// flowOf says what its program works on: conversations, or what has the same system prompt, for the
// users that the body names. Names are believed from anyone, since they only divide what a client has;
// and they make no programs, of which each may go first, since a script may have one for each request.
func flowOf(r *http.Request, ex *exchange) uint64 {
	if id := r.Header.Get(headerChat); id != "" {
		return maphash.String(seed, id)
	}
	f := flow{ex.fields.names, ex.chain.Opening}
	// Some programs have one key for all that they ask: it makes conversations, and does not join them.
	if ex.chain.Messages > 2 && f.names.conversation == 0 { // it goes on
		f.begins = ex.chain.Conversation
	}
	return maphash.Comparable(seed, f)
}
