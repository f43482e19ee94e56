package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

type answersCmd struct {
	Wipe  answersWipe  `cmd:"" help:"Forget all kept answers and vectors."`
	Stats answersStats `cmd:"" help:"Say how much is kept; of a running proxy also what that has spared."`
}

func (answersCmd) Help() string {
	return `Answers and vectors are what serve --cache-answers and --cache-embeddings keep (docs/answers.md).
STORE is what --answers-store is given: a folder, or valkey://HOST:PORT/DB (or redis://…).
PROXY is the URL of a running proxy, such as http://127.0.0.1:11435: the only way to one that keeps
them in its memory, or has the folder open.

Examples:

  ollama-cacheproxy answers stats http://127.0.0.1:11435
  ollama-cacheproxy answers wipe http://127.0.0.1:11435 --api-key "$ADMIN_KEY"
  ollama-cacheproxy answers wipe /var/lib/ollama-cacheproxy/answers
      while no proxy runs that has it open
  ollama-cacheproxy answers wipe valkey://cache.lan:6379/0
      whether or not proxies run`
}

// answersPlace is where these verbs look.
type answersPlace struct {
	Where  string `arg:"" name:"store" help:"What serve --answers-store is given, or the URL of a running proxy."`
	APIKey string `name:"api-key" placeholder:"KEY" help:"The key that the proxy asks for; to wipe, one with the admin right."`
	CA     string `name:"ca" type:"path" default:"" placeholder:"FILE" help:"Believe certificates of https proxies that are issued by one of these authorities, too: PEM."`
}

const answersTimeout = 30 * time.Second // for asking a proxy, or a server

// storeFigures are a store's figures; nil: unknown.
type storeFigures struct {
	Entries *int64 `json:"entries"`
	Bytes   *int64 `json:"bytes"`
}

// keptStats is what stats writes as JSON. Of a store that no proxy was asked for, the rest is absent.
type keptStats struct {
	Where string       `json:"where"`
	Store storeFigures `json:"store"`
	*runningStats
}

// runningStats is what only a running proxy knows: see the content of /_cacheproxy/answers.
type runningStats struct {
	Modes   string               `json:"cache_answers"`
	Vectors string               `json:"cache_embeddings"`
	Since   time.Time            `json:"since"` // … which the figures below count
	Kinds   map[string]keptKinds `json:"kinds"`
}

// keptKinds is what was looked for among answers, or among vectors.
type keptKinds struct {
	Requests  map[string]int `json:"requests"`
	Hits      int            `json:"hits"`
	Misses    int            `json:"misses"`
	Joined    int            `json:"joined"`
	Bytes     int64          `json:"bytes"`
	Prompt    int            `json:"prompt_tokens"`
	Generated int            `json:"generated_tokens"`
	Seconds   float64        `json:"seconds"`
}

// proxyAnswers is a proxy's page of answers.
type proxyAnswers struct {
	Store *storeFigures `json:"store"`
	Wiped *storeFigures `json:"wiped"`
	runningStats
}

// isProxy reports whether a proxy is to be asked.
func (p *answersPlace) isProxy() bool {
	return strings.HasPrefix(p.Where, "http://") || strings.HasPrefix(p.Where, "https://")
}

// ask asks a running proxy.
func (p *answersPlace) ask(ctx context.Context, method string) (page proxyAnswers, err error) {
	u, err := url.Parse(p.Where)
	if err != nil || u.Host == "" || u.User != nil {
		return page, exitError{statusUsage, fmt.Errorf(
			"%s: want the URL of a proxy, such as http://127.0.0.1:%s", valkeyconn.Redacted(p.Where), defaultPort)}
	}
	if u.Port() == "" && u.Scheme == "http" {
		u.Host += ":" + defaultPort
	}
	transport, err := newTransport(p.CA)
	if err != nil {
		return page, exitError{statusUsage, err}
	}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, answersTimeout)
	defer cancel()
	ask := &asking{base: u, key: p.APIKey, transport: transport}
	err = ask.page(ctx, method, "answers", nil, &page)
	return page, err
}

// open opens a store that no proxy is asked for. Nothing in it is dropped for room or age.
func (p *answersPlace) open(c *console, verb string) (answers.Store, error) {
	switch {
	case p.Where == "memory" || p.Where == "":
		return nil, exitError{statusUsage, fmt.Errorf("what a proxy keeps in memory, only it can reach: "+
			"ollama-cacheproxy answers %s http://127.0.0.1:%s", verb, defaultPort)}
	case strings.Contains(p.Where, "://"):
	default:
		if err := stored(p.Where); err != nil {
			return nil, err
		}
	}
	limits := answers.Limits{Bytes: math.MaxInt64 / 2}
	store, err := answers.Open(p.Where, limits, newLogger(c.stderr, "text", slog.LevelWarn))
	switch {
	case errors.Is(err, answers.ErrInUse):
		return nil, fmt.Errorf("%s: a running proxy has it open; ask that: ollama-cacheproxy answers %s "+
			"http://127.0.0.1:%s (or where it listens), or stop it first", p.Where, verb, defaultPort)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", valkeyconn.Redacted(p.Where), err)
	}
	if store.Stats().Down {
		return nil, errors.Join(fmt.Errorf(
			"%s cannot be used now: start the server there, or correct the URL", valkeyconn.Redacted(p.Where),
		), store.Close())
	}
	return store, nil
}

// stored returns an error if a folder is none with kept answers.
func stored(dir string) error {
	_, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: there is no such folder: nothing has been kept, "+
			"or this is not what serve --answers-store is given", dir)
	}
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(dir, "answers.*"))
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("%s: no answers were kept in this folder", dir)
	}
	return err
}

func figuresOf(s answers.Stats) (f storeFigures) {
	if s.Entries >= 0 {
		f.Entries = &s.Entries
	}
	if s.Bytes >= 0 {
		f.Bytes = &s.Bytes
	}
	return f
}

// amount returns what there was, for people.
func (f storeFigures) amount() string {
	if f.Entries == nil {
		return "everything that was kept there (the server does not say how much)"
	}
	entries := counted(int(*f.Entries), "answer or vector", "answers and vectors")
	if f.Bytes == nil {
		return entries
	}
	return fmt.Sprintf("%s, %.1f MB", entries, float64(*f.Bytes)/1e6)
}

type answersWipe struct{ answersPlace }

func (answersWipe) Help() string {
	return `Removes all kept answers and vectors, and the secret with which they were told apart. Answers that go on
without their clients stay. A running proxy begins anew.

Examples:

  ollama-cacheproxy answers wipe http://127.0.0.1:11435
  ollama-cacheproxy answers wipe https://gpu-box:11435 --api-key "$ADMIN_KEY"
  ollama-cacheproxy answers wipe /var/lib/ollama-cacheproxy/answers`
}

func (a *answersWipe) Run(ctx context.Context, c *console) error {
	var was storeFigures
	if a.isProxy() {
		page, err := a.ask(ctx, http.MethodDelete)
		if err != nil {
			return err
		}
		if page.Wiped != nil {
			was = *page.Wiped
		}
	} else {
		store, err := a.open(c, "wipe")
		if err != nil {
			return err
		}
		was = figuresOf(store.Stats())
		ctx, cancel := context.WithTimeout(ctx, answersTimeout)
		defer cancel()
		if err := errors.Join(store.Wipe(ctx), store.Close()); err != nil {
			return fmt.Errorf("%s: %w", valkeyconn.Redacted(a.Where), err)
		}
	}
	_, err := fmt.Fprintf(c.stdout, "removed %s\n", was.amount())
	return err
}

type answersStats struct {
	answersPlace
	JSON bool `name:"json" env:"-" help:"Print one JSON object."`
}

func (answersStats) Help() string {
	return `A running proxy also says what was looked for since it was started: how many were kept (HITS), computed
(MISSES) or being computed for another request (JOINED), and the tokens and the time that the kept ones
had taken when they were computed. MB are 1,000,000 bytes.

Examples:

  ollama-cacheproxy answers stats http://127.0.0.1:11435
  ollama-cacheproxy answers stats http://127.0.0.1:11435 --json | jq .kinds.embedding.hits
  ollama-cacheproxy answers stats /var/lib/ollama-cacheproxy/answers`
}

func (a *answersStats) Run(ctx context.Context, c *console) error {
	stats := keptStats{Where: valkeyconn.Redacted(a.Where)}
	if a.isProxy() {
		page, err := a.ask(ctx, http.MethodGet)
		if err != nil {
			return err
		}
		if page.Store != nil {
			stats.Store = *page.Store
		}
		stats.runningStats = &page.runningStats
	} else {
		store, err := a.open(c, "stats")
		if err != nil {
			return err
		}
		stats.Store = figuresOf(store.Stats())
		if err := store.Close(); err != nil {
			return fmt.Errorf("%s: %w", stats.Where, err)
		}
	}
	if a.JSON {
		encoder := json.NewEncoder(c.stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(stats)
	}
	return stats.write(c)
}

// write writes the figures for people.
func (s keptStats) write(c *console) error {
	number := func(n *int64, format func(int64) string) string {
		if n == nil {
			return "not known"
		}
		return format(*n)
	}
	plain := func(n int64) string { return strconv.FormatInt(n, 10) }
	mega := func(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
	table := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "kept\t%s\nroom\t%s\n",
		number(s.Store.Entries, plain), number(s.Store.Bytes, mega))
	if r := s.runningStats; r != nil {
		fmt.Fprintf(table, "answers\t%s\nembeddings\t%s\nsince\t%s\n\n",
			r.Modes, r.Vectors, r.Since.Local().Format(time.DateTime))
		fmt.Fprintln(table, "KIND\tHITS\tMISSES\tJOINED\tMB\tPROMPT TOKENS\tGENERATED\tSECONDS")
		for _, kind := range []string{"answer", "embedding"} {
			k := r.Kinds[kind]
			fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%.1f\t%d\t%d\t%.1f\n", kind, k.Hits, k.Misses, k.Joined,
				float64(k.Bytes)/1e6, k.Prompt, k.Generated, k.Seconds)
		}
	}
	return table.Flush()
}
