package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/metrics"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	defaultPort      = "11435"
	defaultKeepAlive = "24h"
	defaultUpstream  = "http://127.0.0.1:11434"
	maxUpstreams     = 256

	headerTimeout = 30 * time.Second  // for the arrival of a request's header
	idleTimeout   = 120 * time.Second // after which a client's idle connection is closed
	maxHeader     = 64 << 10          // bytes of a request's header
	headerSlack   = 4096              // net/http reads this many bytes more than its limit

	cutOff              = 2 * time.Second // for interrupted requests to end
	defaultStoreBytes   = 256 << 20
	defaultContextBytes = 20 << 30
	defaultAnswersBytes = 256 << 20
	rememberRequests    = 1000 // on /_cacheproxy/requests
)

type serveCmd struct {
	Config string `group:"everyday" type:"path" default:"" placeholder:"FILE" help:"Read settings from this YAML file: the flags' names without dashes, lists for flags that can be repeated, maps for NAME=VALUE (docs/settings.md). Flags override the environment, and the environment overrides the file. It is read again when it changes, and at SIGHUP. Default: none."`

	Listen   string   `group:"everyday" default:"127.0.0.1:11435" placeholder:"ADDR" help:"Address to listen on: host:port, :port (all interfaces) or a host. Default: 127.0.0.1:11435."`
	Upstream []string `group:"everyday" placeholder:"[NAME=]ADDR" help:"An Ollama server, in any form that OLLAMA_HOST takes (host, host:port or a URL), or sim: for a simulated one, or dns:HOST:PORT or srv:_name._proto.HOST for all that DNS lists, looked up every few seconds (docs/upstreams.md). NAME identifies it in logs, metrics and answers. Repeatable: requests go to a server that has their model, preferably where their prefix is warm. Default: http://127.0.0.1:11434."`

	KeepAlive       []string `group:"everyday" placeholder:"[MODEL=]TIME" help:"How long models stay loaded after a request without a keep_alive: a duration (24h), seconds, -1 (for ever), or off to leave that to Ollama. MODEL=TIME sets it for one model. Repeatable. Default: 24h."`
	KeepAlivePolicy string   `default:"if-absent" enum:"if-absent,at-least,force" help:"How to treat a keep_alive that a client sends: if-absent keeps it, at-least raises a shorter one, force replaces it. 0 (unload) is always kept. Default: if-absent."`
	Touch           bool     `default:"true" negatable:"" help:"For models used through /v1 and /v1/messages, where requests cannot carry a keep_alive, set it with one empty request per load."`
	NumCtxPolicy    []string `placeholder:"[MODEL=]POLICY" help:"How to treat the num_ctx of requests to /api/…, since Ollama loads a model again for each different one: keep leaves it alone, pin replaces it with the loaded one if that is at least as large, raise replaces it with the largest that was requested so far (docs/heads.md). A larger context takes more memory. MODEL=POLICY sets it for one model. Repeatable. Default: keep."`
	StableHeads     []string `placeholder:"RULE" help:"Edit prompts so that their beginnings stay the same: claude-billing replaces the checksums in Claude Code's line x-anthropic-billing-header with zeros, total-tokens removes its system messages that count the tokens left (docs/heads.md). Repeatable. Default: off."`
	MaxBody         int64    `default:"${maxbody}" placeholder:"BYTES" help:"Longest request body to read; longer ones are forwarded unread, one at a time. Default: 67108864 (64 MiB)."`

	Memory      int64         `placeholder:"BYTES" help:"Memory for the bodies of all waiting requests together; bodies that do not fit wait unread. In a fleet (--peers), as much again for those that other proxies have passed on. Default: a quarter of the memory of the machine, or of the container (cgroup)."`
	BodyTimeout time.Duration `default:"60s" placeholder:"TIME" help:"Answer 408 to a request whose body makes no progress for this long; 0 means never. Default: 60s."`

	Slots   []string      `group:"everyday" placeholder:"[NAME=]N" help:"Slots per loaded model (the server's OLLAMA_NUM_PARALLEL): a number, auto to learn it, or off to send requests as they come. Requests wait for a slot, and each slot gets the request that best fits what it holds. NAME=N sets it for one upstream. auto starts from OLLAMA_NUM_PARALLEL if that is set here and the server is on this machine. Repeatable. Default: auto."`
	Queue   int           `default:"10000" placeholder:"N" help:"How many requests may wait for a slot, or for an upstream that is away. Beyond that the least urgent get 503, and among these the newest of the client with the most waiting requests. Default: 10000."`
	MaxWait time.Duration `placeholder:"TIME" help:"How long a request may be passed over: after this time it goes before all others, whatever that costs. Default: never."`

	Heartbeat time.Duration `placeholder:"TIME" help:"Begin the answer of a stream under /v1 that has waited this long, and send a comment at this interval until the real answer comes, so that clients with a first-byte timeout stay. Errors then arrive as events of the stream, since status 200 has been sent (docs/waiting.md). At least 1s. Default: never."`

	TryDuration     time.Duration `default:"60s" placeholder:"TIME" help:"How long requests wait for an upstream that is away, counted from when it was last seen; then they get 503. 0 means not at all. Default: 60s."`
	UpstreamSilence time.Duration `placeholder:"TIME" help:"Abort any request, with 504, when its upstream has sent nothing for this long. Beware: a model that loads or thinks sends nothing either, nor does a pull that verifies. Default: never."`

	StoreEntries   int           `default:"1000000" placeholder:"N" help:"How many links of prefixes to remember; a prompt has about one per 256 bytes. Default: 1000000."`
	StoreBytes     int64         `default:"${storebytes}" placeholder:"BYTES" help:"Memory for remembered prefixes. Default: 268435456 (256 MiB)."`
	Contexts       string        `group:"everyday" placeholder:"HOME" type:"path" default:"" help:"Keep the state of evaluated prompts on disk, below this folder, and give it back to Ollama after a load, a restart or an eviction. Needs Ollama 0.30 or later on this machine, linked with 'ollama-cacheproxy engine link --to HOME' (docs/contexts.md). Default: off."`
	ContextBytes   int64         `default:"${contextbytes}" placeholder:"BYTES" help:"Disk space for stored contexts; 2 GiB of the disk always stay free. Default: 21474836480 (20 GiB)."`
	ContextTTL     time.Duration `default:"720h" placeholder:"TIME" help:"How long to keep a stored context that is not used; 0 means for ever. Default: 720h (30 days)."`
	Prewarm        string        `placeholder:"FILE" type:"path" default:"" help:"A file of requests whose prompts should be warm before anyone asks: one JSON object per line, as a client would send it, with \"path\" if that is not /api/chat (docs/contexts.md). They are sent at the start, which loads their models, and after each load of their model, while no client asks for anything; a client's request interrupts them. The file is read again when it changes, and at SIGHUP. Default: none."`
	ContextsShared bool          `help:"Also attach contexts stored for one API key to the prompts of others. A client could then find out from an answer's timing whether someone else has sent a prompt."`
	Batches        string        `group:"everyday" placeholder:"DIR" type:"path" default:"" help:"Serve OpenAI's Files and Batch API (/v1/files and /v1/batches), with files and batches in this folder; a batch survives restarts, and its requests have the priority batch (docs/batches.md). Default: off, which forwards these paths."`
	BatchesBytes   int64         `default:"${batchesbytes}" placeholder:"BYTES" help:"Disk space for the files of --batches, with the results that are being written. Default: 10737418240 (10 GiB)."`
	BatchesRunning int           `default:"2" placeholder:"N" help:"How many batches run at once; further ones wait for their turn. Default: 2."`
	BatchesTTL     time.Duration `name:"batches-ttl" default:"720h" placeholder:"TIME" help:"How long to keep a file of --batches, and a batch after its end; 0 means for ever. Default: 720h (30 days)."`
	ShowPrompts    bool          `help:"Show the beginning and the end of request bodies on /_cacheproxy/requests. Without this, no prompt text is kept."`

	CacheAnswers    []string      `group:"everyday" placeholder:"[MODEL=]MODE" help:"Which answers of chats and generations to keep, so that a request that was answered before is answered at once: deterministic (those with temperature 0 or a seed, and without tools that reach outside), all, or off. Equal requests that come at the same time are computed once. A request's Cache-Control header (no-store, no-cache, max-age, only-if-cached) is honoured (docs/answers.md). Kept answers are text. MODEL=MODE sets it for one model. Repeatable. Default: off."`
	CacheEmbeddings []string      `placeholder:"[MODEL=]MODE" help:"Whether to keep the vectors of embedded inputs, so that an input is embedded once, whatever array it comes in: auto (once the model was seen to give the same vectors again) or off (docs/answers.md). Vectors are kept without their text. MODEL=MODE sets it for one model. Repeatable. Default: auto."`
	AnswersStore    string        `placeholder:"STORE" default:"memory" help:"Where answers and vectors are kept: memory, a folder, or valkey://HOST:PORT/DB (or redis://…), which several proxies can share (docs/answers.md). 'ollama-cacheproxy answers wipe STORE' empties it. Default: memory."`
	AnswersBytes    int64         `default:"${answersbytes}" placeholder:"BYTES" help:"Room for kept answers and vectors. Default: 268435456 (256 MiB)."`
	AnswersTTL      time.Duration `name:"answers-ttl" default:"720h" placeholder:"TIME" help:"How long to keep an answer or a vector; 0 means for ever. Default: 720h (30 days)."`
	AnswersShared   bool          `help:"Give clients with different API keys each other's kept answers and vectors. A client could then find out from the time of an answer whether someone has asked the same. Where it is not this proxy but a gateway behind it that asks for keys, whoever reaches the proxy gets them, without a key, too."`
	AnswersPaced    bool          `help:"Replay a kept stream at the pace at which it came from Ollama. Default: at once."`

	Shared string `placeholder:"URL" default:"" help:"Share with other proxies which prefixes are warm where, and the limits of API keys (rate and max-waiting), through a Valkey or Redis server: valkey://HOST:PORT/DB (or redis://…, or with TLS valkeys:// and rediss://). Without it, or while it is gone, each proxy goes on with what it knows itself (docs/shared.md). No text is shared. Default: nothing is shared."`

	Price       float64  `placeholder:"NUMBER" help:"What a million evaluated prompt tokens would cost elsewhere, in any currency. The page at /_cacheproxy/, bench and batch then show what the reused tokens are worth. Default: 0, which shows no prices."`
	AllowHost   []string `placeholder:"NAME" help:"Also accept this Host name on loopback connections (* for any). Repeatable."`
	AllowOrigin []string `placeholder:"ORIGIN" help:"Accept requests from web pages of this origin, such as https://chat.example.com; one * matches anything. Repeatable. Origins in OLLAMA_ORIGINS are accepted, too."`
	APIKeysFile string   `group:"everyday" name:"api-keys-file" type:"path" default:"" placeholder:"FILE" help:"Require one of the API keys in this file. A line is KEY, or NAME KEY followed by any of weight=2 (its share relative to other clients that wait), class=batch (the most urgent priority that it may ask for, and its priority if it asks for none: interactive, normal or batch), max-waiting=50 (further requests that would have to wait get 429), rate=10/s (or /m, /h; further requests get 429) and admin (it may pull, create, copy, push and delete models, and drain upstreams; other keys may not). It is read again when it changes, and at SIGHUP."`

	fleetFlags

	TLSCert    string `name:"tls-cert" group:"everyday" type:"path" default:"" placeholder:"FILE" help:"Serve https (HTTP/1.1 and HTTP/2) with this certificate: PEM, followed by those of its issuers. The certificate and its key are read again when they change, and at SIGHUP. Default: plain http."`
	TLSKey     string `name:"tls-key" group:"everyday" type:"path" default:"" placeholder:"FILE" help:"The private key of --tls-cert, in PEM."`
	UpstreamCA string `name:"upstream-ca" type:"path" default:"" placeholder:"FILE" help:"Certificate authorities to trust for https upstreams, in addition to the system's: PEM. They are trusted for nothing else. Default: none."`

	TrustedProxy []string `placeholder:"CIDR" help:"Trust a reverse proxy at this address or network (nginx, Open WebUI) to say which client is asking: by X-Forwarded-For or Forwarded, else X-OpenWebUI-User-Id. Each such client then counts separately for fairness, and for nothing else. Repeatable. Default: nobody."`

	LogLevel   slog.Level    `group:"everyday" default:"info" help:"debug, info, warn or error. Default: info."`
	LogFormat  string        `default:"auto" enum:"auto,text,json" help:"text, json, or auto: text on a terminal. Default: auto."`
	Drain      time.Duration `default:"30s" help:"How long running and waiting requests may take to finish after SIGTERM or Ctrl-C. Default: 30s."`
	DrainDelay time.Duration `placeholder:"TIME" help:"How long requests are still taken after SIGTERM or Ctrl-C, before --drain begins. /_cacheproxy/ready says 503 from the start of it, so that load balancers send requests elsewhere before connections are refused; give them time for a few checks (docs/failure.md). Default: not at all."`
	Check      bool          `group:"everyday" help:"Check the settings, print them with their meaning and where each comes from, test whether the upstreams answer, and exit: 0 if all is well, 1 if an upstream does not answer or the address is taken, 2 if a setting is wrong."`

	file    *configFile               // nil without --config
	inForce []setting                 // all flags, with the source of each
	again   func() (*serveCmd, error) // parses all settings again; nil: they never change

	listening func(net.Addr)       // if non-nil, called once the proxy listens
	done      func(proxy.Exchange) // if non-nil, called after each request
}

func (s *serveCmd) Help() string {
	return `Point OLLAMA_HOST, or a client's base URL, at the proxy instead of at Ollama. Every flag can also be set by an environment variable; separate the values of a repeated one with commas.

Examples:

  ollama-cacheproxy
      listen on 127.0.0.1:11435, forward to 127.0.0.1:11434
  OLLAMA_HOST=127.0.0.1:11435 ollama run llama3
      use it
  ollama-cacheproxy --keep-alive 24h --keep-alive llama3=1h --keep-alive-policy at-least
      hold every model for a day, llama3 for an hour, whatever shorter time clients ask for
  ollama-cacheproxy --listen 0.0.0.0:11435 --api-keys-file keys.txt
      serve other machines, which must send a key
  ollama-cacheproxy --trusted-proxy 127.0.0.1 --trusted-proxy 172.18.0.0/16
      distinguish the people behind an nginx on this machine, and behind an Open WebUI in a container
  printf 'alice %s class=interactive\nnightly %s weight=0.5 class=batch max-waiting=50 rate=600/m\n' "$ALICE_KEY" "$NIGHTLY_KEY" > keys.txt
      give each key a name for logs and metrics, a share, and limits
  ollama-cacheproxy --slots 1
      set one slot per model instead of learning the number
  ollama-cacheproxy --upstream big=10.0.0.7 --upstream small=10.0.0.8 --slots big=4
      spread requests over two servers; the first, where models are pulled, has four slots per model
  ollama-cacheproxy --upstream dns:ollama.default.svc:11434
      spread requests over all servers of a name in DNS, such as a headless service's, as they come and go
  ollama-cacheproxy --upstream 'sim:?model=llama3&slots=2'
      try it without a model: the answers and figures of a simulated Ollama are made up, and labelled so
  ollama-cacheproxy --heartbeat 15s
      keep clients that disconnect after half a minute without a byte: begin the answers of streams under /v1 that wait
  ollama-cacheproxy engine link --to ~/.ollama-cacheproxy && ollama-cacheproxy --contexts ~/.ollama-cacheproxy
      keep evaluated prompts on disk until the model is loaded again (start ~/.ollama-cacheproxy/bin/ollama serve)
  ollama-cacheproxy --cache-answers deterministic --answers-store ~/.cache/answers
      keep the answers of requests with temperature 0 or a seed on disk, as well as vectors
  ollama-cacheproxy --batches ~/.ollama-cacheproxy/batches
      serve OpenAI's Files and Batch API, too
  ollama-cacheproxy --check --upstream gpu-box:11434
      check these settings, and exit

The proxy's own pages: /_cacheproxy/ (for people, live), /metrics (Prometheus), /_cacheproxy/requests (the last requests, and why their prompts were warm or cold), /_cacheproxy/queue (waiting requests, and when each is expected to begin), /_cacheproxy/upstreams, /_cacheproxy/health, /_cacheproxy/ready.
POST /_cacheproxy/upstreams/NAME/drain stops new requests to an upstream and lets running ones finish, at all proxies of a fleet; …/resume ends that. …/hold?model=M&for=24h keeps a model in its memory; …/unload?model=M unloads it.

With several upstreams, requests that change models (pull, create, copy, push, delete, blobs) go to the first one. The request header X-Cacheproxy-Upstream: NAME sends any request to that upstream; in answers it names the one that answered.

Other verbs: answers (what serve --cache-answers has kept), batch (a file of requests), bench (what the proxy is worth), completion (for a shell), contexts and engine (stored contexts), doctor (what is wrong), health, version. Each has --help.`
}

// settings are the evaluated flags.
type settings struct {
	contexts  *contexts.Manager // if nil, no contexts are stored or attached
	listen    string            // for net.Listen
	upstreams []target
	sources   []target // of more upstreams
	keepAlive proxy.KeepAlive
	numCtx    proxy.NumCtx
	heads     proxy.StableHeads
	cached    proxy.CacheAnswers
	vectors   proxy.CacheEmbeddings
	guard     proxy.Guard
	keys      *keysFile    // guard.Keys has the keys read from it; nil: clients need no key
	prewarm   *prewarmFile // nil without --prewarm
	cert      *certFile    // nil: clients are served without TLS

	fleet fleetSettings

	upstreamTLS *tls.Config // nil: the defaults of net/http
	trusted     *proxy.TrustedProxies
	lanes       bool  // requests wait for slots, or are distributed over upstreams
	memory      int64 // bytes
}

func (s *serveCmd) settings() (settings, error) {
	var set settings
	var err error
	if set.listen, err = listenAddr(s.Listen); err != nil {
		return set, fmt.Errorf("--listen: %w", err)
	}
	if set.upstreams, set.sources, err = s.targets(set.listen); err != nil {
		return set, err
	}
	if s.Contexts != "" && unlimited(set.upstreams, set.sources) {
		return set, errors.New("--contexts needs lanes, to know which slots are free: leave out --slots off")
	}
	set.lanes = set.several() || !unlimited(set.upstreams)
	if err = set.edits(s); err != nil {
		return set, err
	}
	if set.memory, err = s.limits(); err != nil {
		return set, err
	}
	set.guard = proxy.Guard{AllowHosts: s.AllowHost, AllowOrigins: s.AllowOrigin}
	if origins := os.Getenv("OLLAMA_ORIGINS"); origins != "" {
		set.guard.AllowOrigins = append(set.guard.AllowOrigins, strings.Split(origins, ",")...)
	}
	if set.trusted, err = proxy.ParseTrustedProxies(s.TrustedProxy); err != nil {
		return set, fmt.Errorf("--trusted-proxy: %w", err)
	}
	if set.fleet, err = s.fleetFlags.settings(set.listen, set.upstreams); err != nil {
		return set, err
	}
	err = cmp.Or(s.checkBatches(), s.checkAnswers(), s.checkShared(), s.readFiles(&set))
	return set, err
}

// several reports whether there is more than one upstream, or may be later.
func (set settings) several() bool { return len(set.upstreams) > 1 || len(set.sources) > 0 }

// apiKeys reads the keys that clients must send; nil if they need none.
func (s *serveCmd) apiKeys() (*keysFile, error) {
	inline := s.file != nil && s.file.keys.line > 0
	switch {
	case inline && s.APIKeysFile != "":
		return nil, fmt.Errorf("--api-keys-file is given, and %s in %s: give one of them", settingAPIKeys, s.file.path)
	case inline:
		return inlineKeysFile(s.file)
	case s.APIKeysFile != "":
		return readKeys(s.APIKeysFile)
	}
	return nil, nil
}

// readFiles reads the files that settings name.
func (s *serveCmd) readFiles(set *settings) (err error) {
	if set.keys, err = s.apiKeys(); err != nil {
		return err
	}
	if set.keys != nil {
		set.guard.Keys = set.keys.keys
	}
	if s.Prewarm != "" {
		if set.prewarm, err = readPrewarm(s.Prewarm); err != nil {
			return err
		}
	}
	if set.cert, err = readCert("--tls-cert", s.TLSCert, "--tls-key", s.TLSKey); err != nil {
		return err
	}
	set.upstreamTLS, err = certificates("--upstream-ca", s.UpstreamCA)
	return err
}

// edits evaluates the flags that change requests.
func (set *settings) edits(s *serveCmd) (err error) {
	if set.keepAlive, err = proxy.ParseKeepAlive(proxy.KeepAlivePolicy(s.KeepAlivePolicy), append([]string{defaultKeepAlive}, s.KeepAlive...)); err != nil {
		return fmt.Errorf("--keep-alive: %w", err)
	}
	if set.numCtx, err = proxy.ParseNumCtx(s.NumCtxPolicy); err != nil {
		return fmt.Errorf("--num-ctx-policy: %w", err)
	}
	if set.heads, err = proxy.ParseStableHeads(s.StableHeads); err != nil {
		return fmt.Errorf("--stable-heads: %w", err)
	}
	if set.vectors, err = proxy.ParseCacheEmbeddings(s.CacheEmbeddings); err != nil {
		return fmt.Errorf("--cache-embeddings: %w", err)
	}
	if set.cached, err = proxy.ParseCacheAnswers(s.CacheAnswers); err != nil {
		return fmt.Errorf("--cache-answers: %w", err)
	}
	return nil
}

// limits checks the flags that are numbers and durations, and returns the memory budget for bodies.
func (s *serveCmd) limits() (int64, error) {
	if s.MaxBody < 1 {
		return 0, fmt.Errorf("--max-body %d: want a positive number of bytes", s.MaxBody)
	}
	memory := s.Memory
	if memory == 0 {
		memory = defaultMemory(memlimit.FromSystem, memlimit.FromCgroup)
	}
	if memory < proxy.MemoryLeast {
		return 0, fmt.Errorf("--memory %d: want at least %d bytes (%d MiB)", s.Memory, proxy.MemoryLeast, proxy.MemoryLeast>>20)
	}
	if s.BodyTimeout < 0 {
		return 0, fmt.Errorf("--body-timeout %v: want 0 (for ever) or more", s.BodyTimeout)
	}
	if s.Queue < 1 || s.MaxWait < 0 {
		return 0, fmt.Errorf("--queue %d, --max-wait %v: want at least 1, and a time that is not negative", s.Queue, s.MaxWait)
	}
	if !isPrice(s.Price) {
		return 0, fmt.Errorf("--price %v: want 0 (no prices) or more", s.Price)
	}
	if s.Drain < 0 {
		return 0, fmt.Errorf("--drain %v: want 0 or more", s.Drain)
	}
	if s.DrainDelay < 0 {
		return 0, fmt.Errorf("--drain-delay %v: want 0 (stop taking requests at once) or more", s.DrainDelay)
	}
	if s.TryDuration < 0 || s.UpstreamSilence < 0 {
		return 0, fmt.Errorf("--try-duration %v, --upstream-silence %v: want times that are not negative", s.TryDuration, s.UpstreamSilence)
	}
	if s.Heartbeat != 0 && s.Heartbeat < time.Second {
		return 0, fmt.Errorf("--heartbeat %v: want at least 1s, such as 15s, or 0 for none", s.Heartbeat)
	}
	return memory, s.storeLimits()
}

// storeLimits checks the flags that bound what is remembered.
func (s *serveCmd) storeLimits() error {
	if s.StoreEntries < 0 || s.StoreBytes < 0 {
		return fmt.Errorf("--store-entries %d, --store-bytes %d: want 0 (remember no prefixes but the last prompts') or more", s.StoreEntries, s.StoreBytes)
	}
	if s.AnswersBytes < 0 || s.AnswersTTL < 0 {
		return fmt.Errorf("--answers-bytes %d, --answers-ttl %v: want 0 (keep no answers; for ever) or more", s.AnswersBytes, s.AnswersTTL)
	}
	return nil
}

// isPrice reports whether a number can be the price of tokens: flags accept NaN and infinity as
// numbers, but JSON cannot represent them.
func isPrice(price float64) bool { return price >= 0 && !math.IsInf(price, 1) }

// listenAddr reads an address for net.Listen; a missing port is defaultPort.
func listenAddr(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.Trim(s, "[]"), defaultPort
	}
	if _, nerr := strconv.Atoi(s); nerr == nil {
		return "", fmt.Errorf("address %q: this would be a host; did you mean :%s (all interfaces) or 127.0.0.1:%s?", s, s, s)
	}
	if strings.ContainsAny(s, "/ ") || err != nil && strings.Contains(host, ":") && net.ParseIP(host) == nil {
		return "", fmt.Errorf("address %q: want host:port, :port or a host", s)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return "", fmt.Errorf("address %q: port %q is not a number from 0 to 65535", s, port)
	}
	return net.JoinHostPort(host, port), nil
}

func (s *serveCmd) Run(ctx context.Context, c *console) error {
	hangup := make(chan os.Signal, 1)
	if s.listening == nil { // within another verb, SIGHUP ends the program as it does by default
		signal.Notify(hangup, syscall.SIGHUP)
		defer signal.Stop(hangup)
	}
	set, err := s.settings()
	if err != nil {
		return exitError{2, s.locate(err)}
	}
	level := new(slog.LevelVar)
	level.Set(s.LogLevel)
	logger := newLogger(c.stderr, s.LogFormat, level)
	// Near a container's limit garbage is collected sooner. An error means that there is no limit.
	memlimit.Set()
	transport := proxy.NewTransport()
	transport.TLSClientConfig = set.upstreamTLS
	defer transport.CloseIdleConnections()
	stop, err := simulate(set.upstreams, logger)
	if err != nil {
		return err
	}
	defer stop()
	ups := s.servers(set.upstreams, transport, logger)
	if s.Check {
		return s.report(ctx, c, set, ups, transport, logger)
	}
	kept, with, closeStores, err := s.openStores(&set, logger)
	if err != nil {
		return err
	}
	defer closeStores()
	h, counts := s.handler(set, ups, transport, kept, with, logger)
	ln, stopBatches, err := s.begin(ctx, set, h, logger)
	if err != nil {
		return err
	}
	if s.listening != nil {
		s.listening(ln.Addr())
	}

	// Requests outlive ctx: they have until s.Drain.
	base, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cut(nil)
	srv := newServer(base, h, logger)
	peers, err := set.listenPeers(ctx, base, h, logger)
	if err != nil {
		ln.Close()
		stopBatches()
		return err
	}
	srv.RegisterOnShutdown(h.ClosePages)
	descriptors := proxy.NewDescriptors()
	srv.ConnState, srv.ConnContext = descriptors.ConnState, descriptors.ConnContext
	// Requests that wait for an upstream may do so until the end.
	background, stopBackground := context.WithCancel(base)
	var wg sync.WaitGroup
	served := make(chan error, 1)
	wg.Go(func() { served <- set.serve(srv, descriptors.Listener(ln)) }) // ends with srv.Shutdown or srv.Close
	wg.Go(func() { peers.serve(set) })                                   // ends with peers.close
	wg.Go(func() {                                                       // ends with background
		pollAll(background, ups)
		set.announce(logger, ln.Addr(), ups)
		for _, up := range ups {
			wg.Go(func() { up.Run(background) })
		}
	})
	wg.Go(func() { h.Run(background) })               // ends with background
	wg.Go(func() { with.keepLearned(background, h) }) // ends with background
	found := s.foundServers(set, h, counts, transport, logger)
	wg.Go(func() { found.watch(background) })     // ends with background
	wg.Go(func() { trim(background, transport) }) // ends with background
	wg.Go(func() {                                // ends with background
		watchFiles(background, hangup, logger, append(set.files(), newConfigReload(s, set, h, level)...)...)
	})

	select {
	case err = <-served:
	case <-ctx.Done():
		if err = s.leave(h, served, logger); err == nil {
			err = drain(srv, h, s.Drain, cut, logger)
		}
	}
	peers.close()
	stopBatches()
	stopBackground()
	cut(nil)
	wg.Wait()
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	return nil
}

// openStores opens what is kept of contexts and answers, and what proxies share. Closing writes what is not written yet; what
// could not be written has been logged.
func (s *serveCmd) openStores(
	set *settings, logger *slog.Logger,
) (kept answers.Store, with *together, closeAll func(), err error) {
	files, err := s.storedContexts(set, logger)
	if err != nil {
		return nil, nil, nil, err
	}
	closeFiles := func() {
		if files == nil { // contexts are off
			return
		}
		closing, cancel := context.WithTimeout(context.Background(), cutOff)
		defer cancel()
		files.Close(closing)
	}
	if kept, err = s.openAnswers(logger); err != nil {
		closeFiles()
		return nil, nil, nil, err
	}
	closeKept := func() {
		kept.Close()
		closeFiles()
	}
	if with, err = s.openShared(logger); err != nil {
		closeKept()
		return nil, nil, nil, err
	}
	return kept, with, func() {
		with.close()
		closeKept()
	}, nil
}

// files returns the files that are read again when they change.
func (set settings) files() (list []reloader) {
	if set.keys != nil && !set.keys.inline {
		list = append(list, set.keys)
	}
	if set.prewarm != nil {
		list = append(list, set.prewarm)
	}
	if set.cert != nil {
		list = append(list, set.cert)
	}
	if set.fleet.cert != nil {
		list = append(list, set.fleet.cert)
	}
	return list
}

// handler builds the handler of requests: everything but the upstreams and the transport to them.
func (s *serveCmd) handler(
	set settings, ups []*upstream.Server, transport *http.Transport, kept answers.Store,
	with *together, logger *slog.Logger,
) (*proxy.Handler, *metrics.Metrics) {
	h := &proxy.Handler{
		Upstreams: ups, Transport: transport, KeepAlive: set.keepAlive, NoTouch: !s.Touch,
		NumCtx: set.numCtx, StableHeads: set.heads,
		MaxBody: s.MaxBody, Memory: set.memory, BodyTimeout: s.BodyTimeout,
		UpstreamSilence: s.UpstreamSilence, Heartbeat: s.Heartbeat, Queue: s.Queue,
		Guard: set.guard, Trusted: set.trusted, Log: logger,
		Ledger: savings.New(with.seen, rememberRequests), ShowPrompts: s.ShowPrompts,
		Contexts: set.contexts, Version: version(), Price: s.Price,
		Answers: kept, AnswersAge: s.AnswersTTL, AnswersBytes: s.AnswersBytes,
		CacheAnswers: set.cached, CacheEmbeddings: set.vectors, AnswersShared: s.AnswersShared,
		ReplayPaced: s.AnswersPaced, TryDuration: s.TryDuration,
	}
	if set.prewarm != nil {
		h.Prewarm = set.prewarm.requests
	}
	counts := metrics.New(version(), h.InFlight)
	if set.lanes {
		h.Lanes = schedule.NewScheduler(schedule.Config{Limit: s.Queue, MaxWait: s.MaxWait})
		for i, t := range set.upstreams {
			h.Lanes.SetLanes(uint16(i), t.slots)
			if t.expected > 0 {
				h.Lanes.SetExpected(uint16(i), t.expected)
			}
		}
		counts.Lanes(h.UpstreamName, h.LaneStats)
	}
	if set.keys != nil {
		set.keys.warn(logger)
		counts.KeyNames(set.keys.keys.Names())
		set.keys.replaced = counts.KeyNames
	}
	counts.Store(with.seen.Stats)
	if with.conn != nil {
		h.Limiter = with.limits
		counts.Shared(with.stats)
		h.Shared = with.facts
	}
	if set.contexts != nil {
		counts.Contexts(set.contexts.Counts, set.contexts.Files.Stats)
	}
	limits := metrics.Limits{
		Held: set.memory, Queue: s.Queue, StoreEntries: s.StoreEntries, StoreBytes: s.StoreBytes,
		AnswerBytes: s.AnswersBytes,
	}
	if set.contexts != nil {
		limits.ContextBytes = s.ContextBytes
	}
	counts.Limits(limits)
	counts.Draining(h.Draining)
	counts.Held(h.Held)
	counts.Waiting(h.Waiting)
	if kept != nil {
		counts.Answers(kept.Stats, h.Surviving)
	}
	h.Metrics, h.Done, h.Touched, h.Forgotten = counts.Handler(), counts.Done, counts.Touched, counts.Forget
	if s.done != nil {
		h.Done = func(ex proxy.Exchange) {
			counts.Done(ex)
			s.done(ex)
		}
	}
	for _, up := range ups {
		reports(up, h, counts)
	}
	s.join(set, h, counts, logger)
	h.Init()
	with.knows(h)
	return h, counts
}

// reports makes a server pass on the results of its polls.
func reports(up *upstream.Server, h *proxy.Handler, counts *metrics.Metrics) {
	up.Polled = func(st upstream.State) {
		h.Polled(up, st)
		counts.Polled(up.Name, st)
	}
}

// foundServers adds the servers that the sources list to the handler, and removes them.
func (s *serveCmd) foundServers(
	set settings, h *proxy.Handler, counts *metrics.Metrics, transport *http.Transport,
	logger *slog.Logger,
) *foundServers {
	return &foundServers{
		sources: set.sources, given: set.upstreams, listen: set.listen, log: logger,
		add: func(t target) {
			up := s.server(t, transport, logger)
			reports(up, h, counts)
			h.AddUpstream(up, t.slots, t.expected)
		},
		remove: h.RemoveUpstream,
	}
}

// server returns the upstream of a target.
func (s *serveCmd) server(t target, transport *http.Transport, logger *slog.Logger) *upstream.Server {
	up := upstream.NewServer(t.name, t.url, transport, logger)
	up.TryDuration = s.TryDuration
	return up
}

// servers returns the upstreams of targets.
func (s *serveCmd) servers(
	list []target, transport *http.Transport, logger *slog.Logger,
) (ups []*upstream.Server) {
	for _, t := range list {
		ups = append(ups, s.server(t, transport, logger))
	}
	return ups
}

// listener listens at the configured address.
func (set settings) listener(ctx context.Context, logger *slog.Logger) (net.Listener, error) {
	ln, _, err := set.tryListen(ctx)
	if err != nil {
		return nil, err
	}
	if set.cert != nil {
		set.cert.warn(logger)
	}
	if addr, ok := ln.Addr().(*net.TCPAddr); ok && !addr.IP.IsLoopback() && set.guard.Keys == nil {
		logger.Warn("listening beyond this machine without API keys: anyone who reaches this address can use, pull and delete models; set --api-keys-file", "listen", ln.Addr().String())
	}
	return ln, nil
}

// newServer returns the server for clients. Its timeouts bound sending headers, and idle
// connections.
func newServer(base context.Context, h http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader - headerSlack,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelError),
	}
}

// leave tells those who ask that the proxy is about to stop, and goes on for --drain-delay. It
// returns early, with an error, if the listener fails.
func (s *serveCmd) leave(h *proxy.Handler, served <-chan error, logger *slog.Logger) error {
	h.Leave()
	if s.DrainDelay == 0 {
		return nil
	}
	logger.Info("stopping soon: not ready any more, but requests are still taken", "for", s.DrainDelay)
	select {
	case err := <-served:
		return err
	case <-time.After(s.DrainDelay):
		return nil
	}
}

// drain lets running and waiting requests finish for as long as limit, then refuses those that
// still wait and cuts off the others.
func drain(srv *http.Server, h *proxy.Handler, limit time.Duration, cut context.CancelCauseFunc, logger *slog.Logger) error {
	logger.Info("stopping: no new requests; those that are here may finish", "in_flight", h.InFlight(), "waiting", h.Waiting(), "limit", limit)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	h.Finish()
	err := srv.Shutdown(ctx)
	if err == nil && !ended(ctx, h.InFlight) { // answers that go on without their clients
		err = ctx.Err()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		waiting := h.Waiting()
		h.Close()
		none(h.Waiting) // each still gets its answer
		logger.Warn("requests refused or cut off after the drain limit", "refused", waiting, "cut_off", h.InFlight(), "limit", limit)
		cut(proxy.ErrDrained)
		h.CutOff()
		err = srv.Close()
		// Shutdown does not wait for handlers whose connections were closed; each has a line to log.
		none(h.InFlight)
	}
	logger.Info("stopped")
	return err
}

// none waits for a short while until nothing is left.
func none(left func() int64) {
	ctx, cancel := context.WithTimeout(context.Background(), cutOff)
	defer cancel()
	ended(ctx, left)
}

// ended waits until nothing is left, and returns false if ctx ends first.
func ended(ctx context.Context, left func() int64) bool {
	for left() > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(time.Millisecond):
		}
	}
	return true
}

// pollAll polls all upstreams at once.
func pollAll(ctx context.Context, ups []*upstream.Server) {
	var wg sync.WaitGroup
	for _, up := range ups {
		wg.Go(func() { up.Poll(ctx) })
	}
	wg.Wait()
}

// announce logs where the proxy listens and where it forwards to: in one line for one upstream.
func (set settings) announce(logger *slog.Logger, addr net.Addr, ups []*upstream.Server) {
	listen := set.scheme() + "://" + addr.String()
	up := 0
	for _, u := range ups {
		st := u.State()
		if st.Polled.IsZero() {
			return // stopped before the first poll was over
		}
		if st.Up {
			up++
		} else if hint := set.absent(u.URL); hint != "" {
			logger.Warn(hint, "upstream", u.Name, "url", u.URL.String())
		}
		switch {
		case set.several() && st.Up:
			logger.Info("upstream answers", "upstream", u.Name, "url", u.URL.String(), "version", st.Version, "models", len(st.Models), "names", names(st.Models))
		case set.several():
			logger.Warn("upstream does not answer yet: start Ollama there or correct --upstream", "upstream", u.Name, "url", u.URL.String(), "err", st.Err)
		case st.Up:
			logger.Info("ready", "listen", listen, "upstream", u.Name, "url", u.URL.String(), "version", st.Version, "models", len(st.Models), "names", names(st.Models))
		default:
			logger.Warn("ready, but the upstream does not answer yet: start Ollama or set --upstream; requests get 502 until then",
				"listen", listen, "upstream", u.Name, "url", u.URL.String(), "err", st.Err)
		}
	}
	if set.several() {
		args := []any{"listen", listen, "upstreams", len(ups), "up", up}
		for _, t := range set.sources {
			args = append(args, "more_by", t.discovered)
		}
		logger.Info("ready", args...)
	}
}

// names lists the first few models.
func names(models []string) string {
	const few = 10
	if len(models) > few {
		return strings.Join(models[:few], ", ") + ", …"
	}
	return strings.Join(models, ", ")
}

// newLogger logs for people on a terminal, and for machines elsewhere.
func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	f, isFile := w.(*os.File)
	terminal := isFile && term.IsTerminal(int(f.Fd()))
	if format == "text" || format == "auto" && terminal {
		return slog.New(tint.NewTextHandler(w, &tint.Options{Level: level, TimeFormat: time.TimeOnly, NoColor: !terminal || os.Getenv("NO_COLOR") != ""}))
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}
