package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// report is --check: it writes each setting with its source, and the verdict, which is an error if
// the proxy could not start or an upstream does not answer.
func (s *serveCmd) report(
	ctx context.Context, c *console, set settings, ups []*upstream.Server, transport *http.Transport,
	logger *slog.Logger,
) error {
	resolved, found, silent := set.resolve(ctx)
	set.upstreams = slices.Concat(set.upstreams, found)
	ups = append(ups, s.servers(found, transport, logger)...)
	pollAll(ctx, ups)
	listen, cannot := set.checkListen(ctx)
	peers, cannotPeers := s.aboutFleet(ctx, set, listen != "" && cannot == nil)
	text := fmt.Sprintf("listen      %s://%s%s\n%s", set.scheme(), set.listen, listen, resolved)
	for i, up := range ups {
		line, answers := set.aboutUpstream(i, up)
		if text += line; !answers {
			silent = append(silent, strings.TrimPrefix(fmt.Sprintf("%s = %s", set.shownName(i), up.URL), " = "))
		}
	}
	keys := "none asked for"
	if set.guard.Keys != nil {
		keys = fmt.Sprintf("%d, %d of them may change models and upstreams", set.guard.Keys.Len(), set.guard.Keys.Admins())
	}
	text += fmt.Sprintf("keep-alive  %v, %s\nnum_ctx     %v\nheads       %v\nmemory      %d MiB for the bodies of requests that wait\nAPI keys    %s\ntrusted     %v\ncontexts    %s\nanswers     %s\nfleet       %s\n",
		set.keepAlive, s.KeepAlivePolicy, set.numCtx, set.heads, set.memory>>20, keys, set.trusted, s.aboutContexts(), s.aboutAnswers(set), peers)
	text += "\nall settings, and where each comes from:\n" + s.listSettings(set)
	var down error
	if len(silent) > 0 {
		down = fmt.Errorf("the settings are right, but no Ollama answers at %s: start it there, or say where it is with --upstream", strings.Join(silent, " and "))
	}
	failed := errors.Join(cannot, cannotPeers, down)
	if failed == nil {
		text = "the settings are right\n" + text
	}
	if _, err := fmt.Fprint(c.stdout, text); err != nil {
		return err
	}
	return failed
}

// checkListen reports whether the proxy could listen. An address that a running proxy has is noted,
// but is no failure: whoever checks settings for that proxy will restart it.
func (set settings) checkListen(ctx context.Context) (note string, err error) {
	ln, by, err := set.tryListen(ctx)
	switch {
	case err == nil:
		ln.Close()
		return "", nil
	case by == aProxy:
		return " (a running ollama-cacheproxy has this address: stop that before another one is started)", nil
	}
	return " (taken)", fmt.Errorf("the proxy could not start: %w", err)
}

// shownName is an upstream's name, if there are several.
func (set settings) shownName(i int) string {
	if !set.several() {
		return ""
	}
	return set.upstreams[i].name
}

// aboutUpstream describes an upstream in one line, and what may be wrong with it in a second one.
func (set settings) aboutUpstream(i int, up *upstream.Server) (text string, answers bool) {
	st, name := up.State(), set.shownName(i)
	if name != "" {
		name += " = "
	}
	what := fmt.Sprintf("Ollama %s, %d models: %s", st.Version, len(st.Models), names(st.Models))
	if !st.Up {
		what = fmt.Sprintf("does not answer: %v", st.Err)
	}
	slots := "slots off"
	switch n, expected := set.upstreams[i].slots, set.upstreams[i].expected; {
	case expected > 0:
		slots = fmt.Sprintf("slots learned, %d by OLLAMA_NUM_PARALLEL at first", expected)
	case n == 0:
		slots = "slots learned"
	case n > 0:
		slots = fmt.Sprintf("slots %d", n)
	}
	text = fmt.Sprintf("upstream    %s%s (%s; %s)\n", name, up.URL, what, slots)
	if hint := set.absent(up.URL); !st.Up && hint != "" {
		text += "            " + hint + "\n"
	}
	return text, st.Up
}

// listSettings lists the flags by name. No value is a secret: for keys it has the file or their
// names.
func (s *serveCmd) listSettings(set settings) string {
	// unsaid explains what an empty setting means.
	unsaid := map[string]string{
		"upstream": defaultUpstream, "keep-alive": defaultKeepAlive, "slots": "auto",
		"num-ctx-policy": "keep", "stable-heads": "off", "cache-answers": "off", "cache-embeddings": "auto",
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, x := range s.inForce {
		value := x.String()
		switch {
		case x.name == "check":
			continue
		case x.name == "answers-store" || x.name == "shared":
			value = valkeyconn.Redacted(value)
		case x.name == "memory":
			value = strconv.FormatInt(set.memory, 10)
		case value == noValue && unsaid[x.name] != "":
			value = unsaid[x.name]
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\n", x.name, value, x.source)
	}
	if s.file != nil && s.file.keys.line > 0 {
		fmt.Fprintf(w, "  %s\t%s\t%s:%d\n", settingAPIKeys, strings.Join(set.keys.keys.Names(), ", "), s.file.path, s.file.keys.line)
	}
	w.Flush()
	return b.String()
}
