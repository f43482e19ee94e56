package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

func (f *Facts) fewSlots(m *Model) (Finding, bool) {
	l := m.Lanes
	// The finding needs enough requests that waited, for about as long as one takes, while all
	// slots were in use.
	if l.Slots == 0 || l.Waited < fewPrompts || 5*l.Waited < l.Requests || l.Busy < l.Slots ||
		l.Wanted <= l.Slots || 2*l.Seconds < l.Service {
		return Finding{}, false
	}
	slots := min(mostWorthSlots, l.Wanted)
	if slots <= l.Slots {
		return Finding{}, false
	}
	found := Finding{
		ID: IDFewSlots, Title: fmt.Sprintf("%s has too few slots for what waits", m.Name),
		Evidence: []string{
			fmt.Sprintf("%d of %s waited for a second or longer: %s together, while those that ran took %s.",
				l.Waited, plural(l.Requests, "request"), duration(l.Seconds), duration(l.Service)),
			fmt.Sprintf("Up to %d were here at a time, for %s%s. Requests of the priority batch are not counted.",
				l.Wanted, plural(l.Slots, "slot"), learned(l)),
		},
		Advice: []Advice{
			{Do: "Let more of them run side by side. Each answer comes a little slower, and each slot takes a context's memory" + m.slotMemory() + ".",
				Where: InOllama, Set: fmt.Sprintf("OLLAMA_NUM_PARALLEL=%d", slots)},
			{Do: "Or have scripts say that they can wait.", Where: InClient, Set: "X-Cacheproxy-Priority: batch"},
		},
		Cost: Waste{Seconds: l.Seconds}, Doc: "doctor.md#too-few-slots-or-too-many",
	}
	return found, true
}

func learned(l Lanes) string {
	if l.Learned {
		return " (learned)"
	}
	return ""
}

// slotMemory says how much memory a slot takes; "" if that is not known.
func (m *Model) slotMemory() string {
	if m.TokenBytes == 0 || m.Context == 0 {
		return ""
	}
	return fmt.Sprintf(": about %s MiB for %s tokens, an estimate", number(m.TokenBytes*m.Context>>20), number(m.Context))
}

// manySlots needs a day's worth of requests: a slot that is free for a while proves nothing.
func (f *Facts) manySlots(m *Model) (Finding, bool) {
	const enough = 50
	l := m.Lanes
	if l.Slots < 2 || l.Learned || l.Requests < enough || 2*l.Busy > l.Slots {
		return Finding{}, false
	}
	return Finding{
		ID: IDManySlots, Severity: Low, Title: fmt.Sprintf("%s has slots that nobody uses", m.Name),
		Evidence: []string{fmt.Sprintf("Of %d slots, at most %d served a request at a time, over %s.", l.Slots, l.Busy, plural(l.Requests, "request"))},
		Advice: []Advice{{Do: "Give the memory back, to a longer context or to another model" + m.slotMemory() + ".",
			Where: InOllama, Set: fmt.Sprintf("OLLAMA_NUM_PARALLEL=%d", max(1, l.Busy))}},
		Doc: "doctor.md#too-few-slots-or-too-many",
	}, true
}

// upstream returns the findings about a server, rather than about one of its models.
func (f *Facts) upstream(u *Upstream) (list []Finding) {
	for _, check := range []func(*Upstream) (Finding, bool){f.away, f.evict, f.bypass, f.link} {
		if found, ok := check(u); ok {
			found.Upstream = u.Name
			list = append(list, found)
		}
	}
	for _, l := range f.Loaded[u.Name] {
		if found, ok := cpu(l); ok {
			found.Upstream, found.Model = u.Name, l.Name
			list = append(list, found)
		}
	}
	return list
}

func (f *Facts) away(u *Upstream) (Finding, bool) {
	if u.Up {
		return Finding{}, false
	}
	severity, evidence := High, []string{"It says: " + u.Error}
	if others := f.reachedBy(u.Name); len(others) > 0 {
		severity = Medium
		evidence = append(evidence, fmt.Sprintf("%s reaches it, so that its requests go there meanwhile.", others[0]))
	}
	return Finding{
		ID: IDUnreachable, Severity: severity, Title: fmt.Sprintf("The proxy gets no answer from Ollama at %s", u.URL),
		Evidence: evidence,
		Advice:   []Advice{{Do: "Start Ollama there, or say where it is with --upstream. In a container 127.0.0.1 is the container itself.", Where: InProxy, Set: "--upstream http://host.docker.internal:11434"}},
		Doc:      "failure.md",
	}, true
}

// answers finds a store of kept answers that cannot be used.
func (f *Facts) answers() (Finding, bool) {
	if !f.Answers.Down {
		return Finding{}, false
	}
	return Finding{
		ID: IDAnswers, Severity: Medium,
		Title: "The store of kept answers cannot be used, and everything is computed",
		Evidence: []string{fmt.Sprintf("%s of it failed since the proxy was started.",
			plural(int(f.Answers.Errors), "call"))},
		Advice: []Advice{
			{Do: "Read the proxy's log, which says why: make room on the disk, or start the Valkey or Redis server. " +
				"It is tried again by itself."},
			{Do: "Or keep answers elsewhere.", Where: InProxy, Set: "--answers-store memory"},
		},
		Doc: "doctor.md#a-store-of-answers-that-is-away",
	}, true
}

// cpu finds a model that is only partly in a GPU's memory. A model of which nothing is there runs
// on a machine without a GPU.
func cpu(l Resident) (Finding, bool) {
	if l.SizeVRAM <= 0 || l.SizeVRAM >= l.Size {
		return Finding{}, false
	}
	percent := 100 * (l.Size - l.SizeVRAM) / l.Size
	found := Finding{
		ID: IDCPU, Severity: High, Title: fmt.Sprintf("%d %% of %s runs on the processor", max(1, percent), l.Name),
		Evidence: []string{fmt.Sprintf("Of its %s MiB only %s MiB are in GPU memory, with a context of %s tokens. Each token waits for the slower part.",
			number(int(l.Size>>20)), number(int(l.SizeVRAM>>20)), number(l.ContextLength))},
		Doc: "doctor.md#part-of-a-model-on-the-processor",
	}
	if smaller := l.ContextLength / 2; smaller >= 2048 {
		found.Advice = append(found.Advice, Advice{Do: "Load it with a shorter context, if that is enough.", Where: InOllama,
			Set: fmt.Sprintf("OLLAMA_CONTEXT_LENGTH=%d", smaller)})
	}
	found.Advice = append(found.Advice,
		Advice{Do: "Store the context in half the memory.", Where: InOllama, Set: "OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0"},
		Advice{Do: "Have fewer slots, each of which takes a context's memory.", Where: InOllama, Set: "OLLAMA_NUM_PARALLEL=1"},
		Advice{Do: "Or hold no other model beside it, or take a smaller quantization."})
	return found, true
}

// evict finds models that are loaded in place of each other.
func (f *Facts) evict(u *Upstream) (Finding, bool) {
	var w Waste
	var evidence []string
	var models []string
	for i := range f.Models {
		m := &f.Models[i]
		if m.Upstream != u.Name {
			continue
		}
		loads := m.loaded(CauseEvicted)
		cost := m.waste(loads...)
		w.add(cost)
		for _, l := range loads {
			evidence = append(evidence, fmt.Sprintf("%s was loaded again %s after %s had been loaded: %s%s.",
				m.Name, times(l.Count), l.By, duration(l.Seconds), again(Waste{Tokens: l.Tokens}, m)))
			for _, name := range []string{m.Name, l.By} {
				if !slices.Contains(models, name) {
					models = append(models, name)
				}
			}
		}
	}
	if w.Loads < fewLoads {
		return Finding{}, false
	}
	slices.Sort(models)
	size, known := 0, 0
	for _, l := range f.Loaded[u.Name] {
		if slices.Contains(models, l.Name) {
			size, known = size+int(l.Size>>20), known+1
		}
	}
	if known > 0 {
		evidence = append(evidence, fmt.Sprintf("Now %d of the %d are loaded, with %s MiB.", known, len(models), number(size)))
	}
	found := Finding{
		ID: IDEvict, Title: fmt.Sprintf("%s are loaded in place of each other", join(models)), Evidence: evidence,
		Advice: []Advice{
			{Do: "If they fit in memory together, let Ollama hold them all (its default is three for each GPU).", Where: InOllama,
				Set: fmt.Sprintf("OLLAMA_MAX_LOADED_MODELS=%d", max(len(models), 2))},
			{Do: "If they do not, ask for shorter contexts or take a smaller quantization until they do."},
		},
		Cost: w, Doc: "doctor.md#models-that-evict-each-other",
	}
	return found, true
}

// bypass finds use of a server past the proxy.
func (f *Facts) bypass(u *Upstream) (Finding, bool) {
	var evidence []string
	var w Waste
	seen, title := false, fmt.Sprintf("Models on %s are unloaded by something that does not come through the proxy", u.URL)
	for _, o := range f.Outside {
		if o.Upstream != u.Name {
			continue
		}
		seen, title = true, fmt.Sprintf("Clients use %s past the proxy", u.URL)
		said := map[OutsideKind]string{
			OutsideOptions: "was found loaded with another context length than requests here had asked for",
			OutsideUsed:    "was used while no request here did",
			OutsideLoaded:  "was found loaded although no request here had asked for it",
		}[o.Kind]
		evidence = append(evidence, fmt.Sprintf("%s %s, %s, last at %s.", o.Model, said, times(o.Count), o.Last.Local().Format("15:04")))
	}
	for i := range f.Models {
		m := &f.Models[i]
		if loads := m.loaded(CauseUnknown); m.Upstream == u.Name && len(loads) > 0 {
			cost := m.waste(loads...)
			w.add(cost)
			evidence = append(evidence, fmt.Sprintf("%s was loaded again %s for no reason that is known here: %s%s.",
				m.Name, times(cost.Loads), duration(loads[0].Seconds), again(cost, m)))
			seen = seen || cost.Loads >= fewLoads
		}
	}
	if !seen {
		return Finding{}, false
	}
	severity := f.severity(w)
	if severity == Low {
		severity = Medium // neither the extent of the use nor its cost is known
	}
	return Finding{
		ID: IDBypass, Severity: severity, Title: title,
		Evidence: append(evidence, "All of this is inferred from what Ollama lists as loaded. Their requests take slots and loads that the proxy cannot put in order."),
		Advice: []Advice{
			{Do: "Point them at the proxy: look for programs, services and containers whose settings name the address above.",
				Where: InClient, Set: "OLLAMA_HOST=" + f.Proxy},
			{Do: "Or have the two swap their ports, so that no client has to be changed: Ollama moves to another one,",
				Where: InOllama, Set: "OLLAMA_HOST=127.0.0.1:11436"},
			{Do: "and the proxy listens where clients look for Ollama.", Where: InProxy,
				Set: "--listen 127.0.0.1:11434 --upstream 127.0.0.1:11436"},
		},
		Cost: w, Doc: "doctor.md#clients-that-bypass-the-proxy",
	}, true
}

// link finds an Ollama whose engine could keep contexts, if that would have helped.
func (f *Facts) link(u *Upstream) (Finding, bool) {
	if f.Settings.Contexts || !u.Here || u.Simulated || !upstream.AtLeast(u.Version, 0, 30) {
		return Finding{}, false
	}
	var w Waste
	var of []string
	for i := range f.Models {
		m := &f.Models[i]
		if m.Upstream != u.Name {
			continue
		}
		tokens := 0
		for _, l := range m.Loads { // a cost that can be avoided need not be reduced
			if l.Cause == CauseEvicted || l.Cause == CauseRestarted {
				tokens += l.Tokens
			}
		}
		if m.much(tokens) {
			w.add(m.evaluation(tokens))
			of = append(of, m.Name)
		}
	}
	if len(of) == 0 {
		return Finding{}, false
	}
	return Finding{
		ID: IDLink, Severity: Low, Title: "Stored contexts would save what loads cost in prompts",
		Evidence: []string{
			fmt.Sprintf("After evictions and restarts %s tokens of %s were evaluated again that had been warm.", number(w.Tokens), join(of)),
			fmt.Sprintf("Ollama %s at %s is on the proxy's machine, so its engine can be linked (docs/contexts.md says for which models that is of use, and how much disk it takes).", u.Version, u.URL),
		},
		Advice: []Advice{
			{Do: "Link it, and start the link in place of ollama serve.", Where: InShell,
				Set: "ollama-cacheproxy engine link --to ~/.ollama-linked && ~/.ollama-linked/bin/ollama serve"},
			{Do: "Then start the proxy, as the same user, with", Where: InProxy, Set: "--contexts ~/.ollama-linked"},
		},
		Cost: w, Doc: "contexts.md",
	}, true
}

// heads finds places at the beginning of prompts that keep changing.
func (f *Facts) heads() (list []Finding) {
	const day = 24 * 3600
	for _, c := range f.Changed {
		// People edit their own messages, but not what programs write.
		edited := c.Kind == "text" && strings.HasPrefix(c.Place, "message")
		if c.Count < fewPrompts || c.Tokens < fewTokens || edited {
			continue
		}
		daily := ""
		if span := f.Now.Sub(c.Since).Seconds(); span >= 60 {
			daily = fmt.Sprintf(", or %s a day at this rate", number(int(float64(c.Tokens)/span*day)))
		}
		cost := Waste{Tokens: c.Tokens, Estimated: true}
		for i := range f.Models {
			if m := &f.Models[i]; m.Name == c.Model {
				cost = m.evaluation(c.Tokens)
			}
		}
		place, kind := "the "+c.Place, article(c.Kind)
		if strings.HasPrefix(c.Place, "message") {
			place = c.Place
		}
		title := fmt.Sprintf("%s in %s changes, and all that follows is evaluated again", kind, place)
		where := fmt.Sprintf("at about byte %s of %s, where there is %s", number(c.Byte), place, strings.ToLower(kind))
		advice := fmt.Sprintf("Take it out, or put it behind all that stays the same: into the last message instead of %s.", place)
		if c.Place == "tools" {
			title, where = "The tools change, and all that follows them is evaluated again", "in the tools"
			advice = "Send the same tools each time, in the same order and written in the same way."
		}
		found := Finding{
			ID: IDHead, Model: c.Model, Title: title,
			Evidence: []string{fmt.Sprintf("%s differed from the one before %s: %s tokens were evaluated for that%s.",
				plural(c.Count, "prompt"), where, number(c.Tokens), daily)},
			Advice: []Advice{{Do: advice}},
			Cost:   cost, Doc: "heads.md",
		}
		if c.Kind == "checksum" && c.Place == "system prompt" {
			found.Advice = append(found.Advice, Advice{Do: "If it is Claude Code's billing header, have the proxy put a constant in its place.",
				Where: InProxy, Set: "--stable-heads claude-billing"})
		}
		list = append(list, found)
	}
	return list
}
