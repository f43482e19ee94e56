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

// Open WebUI sends the names of its users and their chats in these headers, if it is configured to
// (ENABLE_FORWARD_USER_INFO_HEADERS).
const (
	headerUser = "X-OpenWebUI-User-Id"
	headerChat = "X-OpenWebUI-Chat-Id"
)

// TrustedProxies are the reverse proxies, such as nginx, whose headers about the client are
// believed. The nil *TrustedProxies trusts none. Only fairness depends on it: a client's rights
// depend on its connection and its key.
type TrustedProxies struct {
	ranges []net.IPNet
	// forwarded has one strategy for each header in which a reverse proxy names its client.
	forwarded map[string]realclientip.RightmostTrustedRangeStrategy
}

// ParseTrustedProxies parses networks such as 10.0.0.0/8 and fd00::/8, and single addresses. It
// returns nil for an empty list.
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

// trusts reports whether a peer's address belongs to a trusted proxy.
func (t *TrustedProxies) trusts(peer string) bool {
	if t == nil {
		return false
	}
	addr, _, _ := strings.Cut(peer, "%") // a link-local address has a zone, a network none
	ip := net.ParseIP(addr)
	for i := range t.ranges {
		if t.ranges[i].Contains(ip) {
			return true
		}
	}
	return false
}

// clientOf returns the client for the scheduler's fairness: the key that was checked, or else the
// user or address that a trusted proxy names, or else the address of the connection.
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
	// A reverse proxy may write only one of the two headers and pass the other on as its client
	// sent it. So if both are present, they must agree.
	found := ""
	for header, strategy := range t.forwarded {
		if len(r.Header[header]) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(strategy.ClientIP(r.Header, ""))
		if err != nil { // malformed, or only trusted proxies
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
	// A request from the proxy's own host has no client behind it, so the proxy itself vouches for
	// the user.
	if user := r.Header.Get(headerUser); user != "" {
		return "user " + hashed(user)
	}
	return peer
}

// clientShown returns the client as logs and pages show it; "" for the proxy itself.
func (h *Handler) clientShown(r *http.Request, ex *exchange) string {
	if ex.warming != nil {
		return ""
	}
	return hashed(h.client(r, ex))
}

// seed is for the hashes that distinguish users, programs and flows. Their names are not kept.
var seed = maphash.MakeSeed()

// hashed returns a number in place of a client's or flow's name. It stays the same while the proxy
// runs, and the name cannot be recovered from it.
func hashed[T comparable](name T) string {
	return fmt.Sprintf("%016x", maphash.Comparable(seed, name))
}

// names are hashes of the user and the conversation that a body names; 0 if it names none.
type names struct {
	user         [3]uint64 // one for each member that may name a user
	conversation uint64
}

// Members of a body that name a user (in OpenAI's and Anthropic's APIs), and a conversation.
var (
	keyUser             = []byte("user")
	keySafetyIdentifier = []byte("safety_identifier")
	keyMetadata         = []byte("metadata")
	keyUserID           = []byte("user_id")
	keyPromptCacheKey   = []byte("prompt_cache_key")
)

// metadataMost is the longest metadata, in bytes, that is searched for a user.
const metadataMost = 4096

// read handles one member of the body.
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

// nameOf hashes a raw JSON string; 0 if it is empty or not a string.
func nameOf(value []byte) uint64 {
	if len(value) <= len(`""`) || value[0] != '"' {
		return 0
	}
	return max(1, maphash.Bytes(seed, value))
}

// program distinguishes the programs of one client without their help.
type program struct {
	agent, user, endpoint string
	stream                byte
}

// programOf identifies the program of a client that sent the request: a person's chat and a script
// may share an address, but they differ in the program or in the form of their requests.
func programOf(r *http.Request, ex *exchange) uint64 {
	p := program{r.UserAgent(), r.Header.Get(headerUser), ex.Endpoint, ex.fields.stream}
	return max(1, maphash.Comparable(seed, p))
}

// flow distinguishes the tasks of a program.
type flow struct {
	names  names
	begins uint64
}

// flowOf identifies the task that a request belongs to: a conversation, or requests with the same
// system prompt, of the same user if the body names one. Those names need no trust, since they only
// divide one client's share. They do not count as programs, because the first request of each
// program may go ahead, and a script could use a new name for every request.
func flowOf(r *http.Request, ex *exchange) uint64 {
	if id := r.Header.Get(headerChat); id != "" {
		return maphash.String(seed, id)
	}
	f := flow{ex.fields.names, ex.chain.Opening}
	// Some programs use one key for everything. So a key can split conversations, but not join
	// them.
	if ex.chain.Messages > 2 && f.names.conversation == 0 { // a conversation that continues
		f.begins = ex.chain.Conversation
	}
	return maphash.Comparable(seed, f)
}
