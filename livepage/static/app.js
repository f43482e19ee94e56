// The page: the proxy's events (feed.js), rendered by Preact. All text goes into text nodes.

import {h, render} from "./vendor/preact.js";
import htm from "./vendor/htm.js";
import {chart} from "./chart.js";
import {change, follow, key} from "./feed.js";
import {ago, bytes, caches, clock, duration, failed, number, outcomes, percent, plural, price, reasons, short} from "./format.js";
import {colour, describe, draw, find, hue, rowsOf, stepNames, steps, summary} from "./lanes.js";

const html = htm.bind(h);
const still = matchMedia("(prefers-reduced-motion: reduce)");

// The data that is shown, and the choices of the person at the page.
const state = {
  link: "connecting", message: "", parts: {}, log: [], offset: 0, at: 0,
  paused: false, minutes: 5, hour: false, only: "all", shown: 25, open: 0, chosen: 0, tip: null, sure: "", sureAt: 0, said: "",
};
// The proxy's latest data. It is shown except while the page is paused.
const live = {parts: {}, log: []};
let again = () => {};
let boxes = [];

const now = () => state.paused || Date.now() + state.offset;
const value = (n, text) => html`<data value=${n}>${text === undefined ? number(n) : text}</data>`;
const time = (ms, text) => html`<time datetime=${new Date(ms).toISOString()} title=${new Date(ms).toLocaleString()}>${text || clock(ms)}</time>`;

function told({state: link, message, data}) {
  state.link = link;
  state.message = message || "";
  if (data) {
    state.at = data.at;
    state.offset = data.at - Date.now();
    if (data.whole) live.log = [];
    for (const r of data.log) live.log.push(r);
    const most = live.parts.proxy ? live.parts.proxy.remembered : 2000;
    if (live.log.length > most) live.log.splice(0, live.log.length - most);
    for (const r of data.log) if (r.group) hue(r.group); // colours follow the order of arrival
    Object.assign(live.parts, data.parts);
    if (!state.paused) Object.assign(state, live);
    document.documentElement.dataset.at = data.at;
  }
  paint();
}

let painting = false;
function paint(force) {
  if (painting || state.paused && !force || document.hidden) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    render(html`<${Page} />`, document.getElementById("app"));
    redraw();
  });
}

// set changes choices, and shows them at once.
function set(change) {
  Object.assign(state, change);
  paint(true);
}

// pause freezes the data that is shown, whatever arrives or is chosen meanwhile, or resumes.
function pause() {
  set(state.paused ? {paused: false, ...live} : {paused: now(), parts: {...live.parts}, log: live.log.slice()});
}

function Page() {
  if (state.link === "denied") return html`<${Gate} />`;
  if (!state.parts.upstreams) return html`<${Bar} /><main><p class="empty">${state.message || "Waiting for the proxy …"}</p></main>`;
  return html`
    <a class="skip" href="#main">To the figures</a>
    <${Bar} />
    <main id="main">
      <${Problems} />
      <${Figures} />
      <${Lanes} />
      <${Waiting} />
      <${Tokens} />
      <${Models} />
      <${Upstreams} />
      <${Fleet} />
      <${Prefixes} />
      <${Answers} />
      <${Contexts} />
      <${Requests} />
    </main>
    <footer>
      <span>Since ${time(state.parts.proxy.started, new Date(state.parts.proxy.started).toLocaleString())}</span>
      ${!state.parts.proxy.keys && html`<a href="../metrics">metrics</a> <a href="requests">requests</a> <a href="queue">queue</a> <a href="upstreams">upstreams</a>${state.parts.fleet && html` <a href="fleet">fleet</a>`}`}
      <span>No prompt text is shown here. Colours stand for how prompts begin.</span>
    </footer>`;
}

function Gate() {
  const enter = event => {
    event.preventDefault();
    key.set(event.target.elements.key.value.trim());
    state.link = "connecting";
    again();
    paint(true);
  };
  return html`<main class="gate">
    <h1>ollama-cacheproxy</h1>
    <form onSubmit=${enter}>
      <label class="hidden" for="key">API key</label>
      <input id="key" name="key" type="password" autocomplete="off" spellcheck="false" placeholder="API key" required />
      <button type="submit">Show</button>
    </form>
    <p role="alert" class="fail">${state.message}</p>
    <p class="soft">This proxy asks for an API key (--api-keys-file). It is kept in this tab alone, until that is closed.</p>
  </main>`;
}

function Bar() {
  const {proxy, queue, running, you} = state.parts;
  const link = {live: ["good", "live"], connecting: ["warn", "connecting …"], lost: ["bad", "not connected"], many: ["bad", "too many pages"]}[state.link] || ["warn", state.link];
  return html`<header>
    <h1>ollama-cacheproxy</h1>
    ${proxy && html`<span class="soft">${proxy.version}</span>`}
    <div class="state">
      ${running && html`<span>${value(running.length)} running · ${value(queue.waiting)} waiting</span>`}
      ${you && you.name && html`<span class="soft">${you.name}${you.admin ? ", admin" : ""}</span>`}
      <span role="status"><span class="dot ${state.paused ? "" : link[0]}"></span>${state.paused ? "paused" : link[1]}</span>
      ${proxy && html`<button aria-pressed=${!!state.paused} onClick=${pause}>${state.paused ? "Go on" : "Pause"}</button>`}
      ${key.get() && html`<button onClick=${() => { key.set(""); location.reload(); }}>Forget key</button>`}
    </div>
  </header>`;
}

const levels = {error: "Wrong", warning: "Check", note: "Note"};

function Problems() {
  const list = state.parts.problems.slice();
  if (state.link === "lost" || state.link === "many") {
    list.unshift({kind: "link", level: "error", what: state.message, do: "What is below is from " + clock(state.at) + "; this page tries again by itself."});
  }
  return html`<section aria-labelledby="h-now">
    <h2 id="h-now" class="hidden">Now</h2>
    <p class="hidden" role="status">${list.length ? plural(list.length, "problem") + ": " + list.map(p => levels[p.level] + " " + p.kind).join(", ") : "Nothing is wrong."}</p>
    ${list.length === 0 ? html`<p class="fine">✓ Nothing is wrong.</p>` : html`<ul class="problems">
      ${list.map(p => html`<li key=${p.kind + p.what.slice(0, 20)} class=${p.level} data-kind=${p.kind}>
        <span class="level">${levels[p.level]}</span> <b>${p.what}</b> ${p.do}
      </li>`)}
    </ul>`}
  </section>`;
}

function Figures() {
  const {totals: t, proxy} = state.parts;
  const reused = t.reused + t.estimated_reused, evaluated = t.evaluated + t.estimated_evaluated;
  const guess = t.estimated_reused + t.estimated_evaluated > 0 ? ", partly estimated" : "";
  const wrong = t.requests - (t.outcomes.ok || 0) - (t.outcomes.client_gone || 0);
  const saved = t.saved_evaluation_s + t.saved_loading_s;
  const figure = (id, name, shown, small) => html`<div><dt>${name}</dt><dd id=${id}>${shown}<small>${small}</small></dd></div>`;
  return html`<section aria-labelledby="h-sum">
    <h2 id="h-sum" class="hidden">Since the start</h2>
    <dl class="figures">
      ${figure("f-requests", "Requests", value(t.requests), wrong > 0 ? html`<data value=${wrong}>${number(wrong)}</data> not answered` : t.requests ? "all answered" : "none yet")}
      ${figure("f-reused", "Tokens reused", value(reused, short(reused)), percent(reused, reused + evaluated) + guess)}
      ${figure("f-evaluated", "Evaluated", value(evaluated, short(evaluated)), t.unknown ? html`and ${value(t.unknown, short(t.unknown))} not known` : html`${value(t.verdicts.cold || 0)} cold ${t.verdicts.cold === 1 ? "prompt" : "prompts"}`)}
      ${figure("f-generated", "Generated", value(t.generated, short(t.generated)), "tokens")}
      ${figure("f-loads", "Model loads", value(t.loads + t.estimated_loads), t.estimated_loads ? html`${value(t.estimated_loads)} of them inferred` : "as reported by Ollama")}
      ${figure("f-saved", "Time saved", html`<data value=${saved}>${duration(1000 * saved)}</data>`, "estimated")}
      ${proxy.price > 0 && figure("f-worth", "Worth of reused", html`<data value=${reused * proxy.price / 1e6}>${price(reused * proxy.price / 1e6)}</data>`,
        `at ${proxy.price} a million`)}
    </dl>
  </section>`;
}

const Choice = ({label, options, chosen, choose}) => html`<span class="choice" role="group" aria-label=${label}>
  ${options.map(([name, option]) => html`<button aria-pressed=${chosen === option} onClick=${() => choose(option)}>${name}</button>`)}
</span>`;

const drawing = () => {
  const to = now(), from = to - state.minutes * 60_000;
  const requests = state.log.concat(state.parts.running.filter(r => !r.number));
  return {from, now: to, requests, groups: rowsOf(requests, state.parts.upstreams, from, to)};
};

let canvas, tokens;

function Lanes() {
  const d = drawing();
  const any = d.groups.some(g => g.rows.length);
  const chosen = state.log.find(r => r.number === state.chosen);
  const point = (event, act) => {
    const box = canvas.getBoundingClientRect();
    act(find(boxes, event.clientX - box.left, event.clientY - box.top), event.clientX - box.left, event.clientY - box.top, box.width);
  };
  const over = event => point(event, (hit, x, y, width) => {
    if (hit || state.tip) set({tip: hit ? {r: hit.r, x: Math.min(x + 14, Math.max(0, width - 320)), y: hit.y + hit.height + 6} : null});
  });
  const press = event => point(event, hit => set({chosen: hit && hit.r.number || 0, tip: null}));
  return html`<section aria-labelledby="h-lanes">
    <div class="head">
      <h2 id="h-lanes">Lanes</h2>
      <span class="soft">each lane is a slot of a model; prompts that begin alike share a colour</span>
      <div class="tools"><${Choice} label="Minutes shown" options=${[["1 min", 1], ["5 min", 5], ["10 min", 10]]} chosen=${state.minutes} choose=${minutes => set({minutes})} /></div>
    </div>
    ${!any && html`<p class="empty">No lane has had a request in the last ${plural(state.minutes, "minute")}.</p>`}
    <div class="drawing" hidden=${!any}>
      <canvas id="lanes" role="img" aria-label=${describe(d.groups, d.requests, d.from, d.now)} ref=${e => { canvas = e; }}
        onMouseMove=${over} onMouseLeave=${() => state.tip && set({tip: null})} onClick=${press}></canvas>
      ${state.tip && html`<div class="tip" style=${{left: state.tip.x + "px", top: state.tip.y + "px"}}><${Brief} r=${state.tip.r} /></div>`}
    </div>
    ${any && html`<p class="legend" aria-hidden="true">
      <span><i class="load"></i>load</span><span><i class="slot"></i>waited in Ollama</span><span><i></i>prompt</span><span><i class="answer"></i>answer</span>
      <span><i class="warm"></i>reused</span><span><i class="cold"></i>evaluated</span><span><i class="failed"></i>failed</span><span>◤ interactive</span>
    </p>`}
    ${chosen && html`<div class="chosen" role="region" aria-label="The request that was chosen">
      <p class="top"><b>${chosen.model}</b> <span class="soft">${clock(chosen.at)}</span> <button onClick=${() => set({chosen: 0})}>Close</button></p>
      <${Detail} r=${chosen} />
    </div>`}
    ${any && html`<details>
      <summary>The lanes as a table</summary>
      <div class="scroll"><table id="lane-table">
        <thead><tr><th scope="col">Model</th><th scope="col" class="num">Lane</th><th scope="col" class="num">Requests</th><th scope="col" class="num">Busy</th><th scope="col" class="num">Reused</th>
          <th scope="col" class="num">Evaluated</th><th scope="col" class="num">Generated</th><th scope="col" class="num">Loads</th><th scope="col" class="num">Changes of prefix</th><th scope="col">Now</th></tr></thead>
        <tbody>${summary(d.groups, d.from, d.now).map(l => html`<tr>
          <th scope="row">${l.title}</th><td class="num">${l.lane}</td><td class="num">${value(l.requests)}</td><td class="num">${percent(l.busy, 1)}</td><td class="num">${value(l.reused)}</td>
          <td class="num">${value(l.evaluated)}</td><td class="num">${value(l.generated)}</td><td class="num">${value(l.loads)}</td><td class="num">${value(l.switches)}</td><td>${l.runs ? "busy" : "free"}</td></tr>`)}
        </tbody></table></div>
    </details>`}
  </section>`;
}

const warmth = r => r.reused === undefined ? r.total ? `${number(r.total)} tokens, not known how many reused` : "" :
  `${number(r.total)} tokens: ${number(r.reused)} reused, ${number(r.evaluated)} evaluated${r.basis === "estimated" ? " (estimated)" : ""}`;

function Brief({r}) {
  return html`
    <p><b>${r.model || r.endpoint}</b> <span class="soft">${clock(r.at)}${r.priority ? ", " + r.priority : ""}</span></p>
    <p>${r.outcome ? `${outcomes[r.outcome]} after ${duration(r.duration)}` : "under way for " + duration(now() - r.at)}${r.sent > 5 ? `, of that ${duration(r.sent)} waited` : ""}</p>
    <p>${warmth(r)}</p>
    ${r.cache && html`<p class="soft">${caches[r.cache]}</p>`}
    ${r.reason && html`<p class="soft">${reasons[r.reason] || r.reason}</p>`}`;
}

// Track is a request's time line.
function Track({r, whole, tall}) {
  const list = steps(r, now());
  const total = list.reduce((n, s) => n + s[1], 0);
  return html`<span class="track ${tall ? "tall" : ""}" aria-hidden="true" style=${tall ? {} : {width: Math.max(1.5, 100 * Math.min(1, total / whole)) + "%"}}>
    ${list.filter(s => s[1] > 0).map(([kind, ms]) => html`<i class="${kind} ${r.verdict || ""}" style=${{width: 100 * ms / total + "%"}}></i>`)}
  </span>`;
}

function Detail({r}) {
  const list = steps(r, now()).filter(s => s[1] >= .05 && (s[0] !== "rest" || s[1] > 50));
  const fact = (name, shown) => shown && html`<dt>${name}</dt><dd>${shown}</dd>`;
  return html`<div class="detail">
    <${Track} r=${r} tall=${true} />
    <ul class="steps">${list.map(([kind, ms]) => html`<li><i class="${kind} ${r.verdict || ""}"></i>${stepNames[kind]} ${duration(ms)}</li>`)}</ul>
    <dl class="facts">
      ${fact("Why", (r.said || r.detail || reasons[r.reason]) && html`${r.said || r.detail || reasons[r.reason]}${r.reason && html` <span class="soft">(${r.reason})</span>`}`)}
      ${fact("Cache", r.cache && `${caches[r.cache]}${r.parts > 1 ? `: ${number(r.kept)} of ${number(r.parts)} inputs` : ""}${r.saved ? `, which took ${duration(r.saved)} when it was computed` : ""}${r.kept_prompt ? `, a prompt of ${plural(r.kept_prompt, "token")}` : ""}${r.kept_generated ? ` and ${number(r.kept_generated)} generated` : ""}`)}
      ${fact("Prompt", warmth(r))}
      ${fact("Answer", r.generated ? plural(r.generated, "token") + (r.eval > 0 ? `, ${(1000 * r.generated / r.eval).toFixed(1)} a second` : "") : "")}
      ${fact("Outcome", r.outcome ? `${outcomes[r.outcome]}${r.status ? ", status " + r.status : ""}${r.truncated ? "; Ollama has probably cut the prompt" : ""}${r.broken ? "; the answer did not come to its end" : ""}` : "under way")}
      ${fact("Where", [r.endpoint, r.upstream, r.lane !== undefined ? `lane ${r.lane + 1}` : "", r.num_ctx ? `num_ctx ${number(r.num_ctx)}` : ""].filter(Boolean).join(" · "))}
      ${fact("Who", [r.name, r.priority, r.prewarm ? "the proxy itself, to keep a prompt warm: " + r.prewarm : ""].filter(Boolean).join(", "))}
      ${r.prefix && html`<dt>Fingerprint</dt><dd><span class="swatch" style=${{background: colour(r)}}></span><code>${r.prefix}</code>${r.entry ? html` <span class="soft">number ${r.entry} in the ledger</span>` : ""}</dd>`}
    </dl>
  </div>`;
}

const until = ms => {
  const left = ms - now();
  return left < 1000 ? "now" : "in " + duration(left);
};

function Waiting() {
  const {queue, upstreams} = state.parts;
  const many = upstreams.length > 1;
  return html`<section aria-labelledby="h-wait">
    <div class="head"><h2 id="h-wait">Waiting <span class="soft">${value(queue.waiting)}</span></h2></div>
    ${queue.requests.length === 0 ? html`<p class="soft">${queue.waiting ? "They wait for memory, or for a server that is away." : "Nobody is waiting."}</p>` : html`<div class="scroll"><table id="waiting">
      <thead><tr><th scope="col" class="num wide">Place</th><th scope="col">Who</th><th scope="col">For</th><th scope="col">Priority</th><th scope="col" class="num wide">Prompt tokens</th><th scope="col" class="num">Since</th><th scope="col" class="num">Expected</th></tr></thead>
      <tbody>${queue.requests.slice(0, 12).map(w => html`<tr key=${w.since + w.client + w.place}>
        <td class="num wide">${value(w.place)}</td><td>${w.name || html`<code>${w.client.slice(0, 8)}</code>`}</td>
        <td class="break">${w.model}${w.num_ctx ? html` <span class="soft">num_ctx ${number(w.num_ctx)}</span>` : ""}${many ? html` <span class="soft">${w.upstream}</span>` : ""}</td>
        <td>${w.priority}</td><td class="num wide">about ${value(w.tokens)}</td><td class="num">${duration(Math.max(0, now() - w.since))}</td><td class="num">${w.start ? until(w.start) : html`<span class="soft">not known</span>`}</td></tr>`)}
      </tbody></table></div>
      ${queue.queued > 12 && html`<p class="soft">and ${number(queue.queued - 12)} more</p>`}`}
  </section>`;
}

function Tokens() {
  const {series, proxy} = state.parts;
  const to = now() / 1000, from = to - (state.hour ? 3600 : 600);
  const seen = series.filter(b => b[0] + proxy.bin_s >= from);
  const sum = i => seen.reduce((n, b) => n + b[i], 0);
  return html`<section aria-labelledby="h-tokens">
    <div class="head">
      <h2 id="h-tokens">Prompt tokens over time</h2>
      <span class="soft">${short(sum(2))} reused, ${short(sum(3))} evaluated, ${plural(sum(6), "model load")} in the last ${state.hour ? "hour" : "10 minutes"}</span>
      <div class="tools"><${Choice} label="Time shown" options=${[["10 min", false], ["1 h", true]]} chosen=${state.hour} choose=${hour => set({hour})} /></div>
    </div>
    <div class="chart" role="img" aria-label=${`Prompt tokens in steps of ${proxy.bin_s} seconds: ${number(sum(2))} reused, ${number(sum(3))} evaluated.`} ref=${e => { tokens = e; }}></div>
    <p class="legend" aria-hidden="true"><span><i class="warm"></i>reused</span><span><i class="cold"></i>evaluated</span><span><i class="unknown"></i>not known</span><span>▾ model load</span></p>
    <details><summary>As a table</summary><div class="scroll"><table>
      <thead><tr><th scope="col">From</th><th scope="col" class="num">Requests</th><th scope="col" class="num">Reused</th><th scope="col" class="num">Evaluated</th><th scope="col" class="num">Not known</th><th scope="col" class="num">Generated</th><th scope="col" class="num">Loads</th></tr></thead>
      <tbody>${seen.slice(-60).reverse().map(b => html`<tr><th scope="row">${clock(1000 * b[0])}</th>${b.slice(1).map(n => html`<td class="num">${value(n)}</td>`)}</tr>`)}</tbody>
    </table></div></details>
  </section>`;
}

// Act is a button that changes something. If that may do harm, it needs a second press.
function Act({id, name, path, hurts, label}) {
  if (!state.parts.you || !state.parts.you.admin) return "";
  const asked = state.sure === id;
  const press = async () => {
    if (hurts && state.sure !== id) {
      set({sure: id, sureAt: Date.now()});
      setTimeout(() => state.sure === id && set({sure: ""}), 5000);
      return;
    }
    if (hurts && Date.now() - state.sureAt < 400) return; // a double click is one press
    set({sure: "", sureAt: 0, said: name + " …"});
    const said = await change(path);
    set({said: `${name}: ${said}`});
  };
  return html`<button class=${asked ? "sure" : ""} aria-label=${asked ? label + " now?" : label} onClick=${press}>${asked ? name + " now?" : name}</button> `;
}

const verbs = (u, verb, query = "") => `upstreams/${encodeURIComponent(u)}/${verb}${query}`;

function Models() {
  const rows = state.parts.upstreams.flatMap(u => u.loads.map(m => ({u, m})));
  const holders = {proxy: "the proxy", client: "a client", others: "Ollama's own rule, or others"};
  const many = state.parts.upstreams.length > 1;
  const admin = state.parts.you && state.parts.you.admin;
  return html`<section aria-labelledby="h-models">
    <div class="head"><h2 id="h-models">Models in memory</h2><span role="status" class="soft">${state.said}</span></div>
    ${rows.length === 0 ? html`<p class="soft">None was loaded when Ollama was last asked.</p>` : html`<div class="scroll"><table id="models">
      <thead><tr><th scope="col">Model</th>${many && html`<th scope="col">Server</th>`}<th scope="col" class="num">Memory</th><th scope="col" class="num wide">of it GPU</th><th scope="col" class="num wide">Context</th>
        <th scope="col">Held by</th><th scope="col" class="num">Until</th>${admin && html`<th scope="col"><span class="hidden">What can be done</span></th>`}</tr></thead>
      <tbody>${rows.map(({u, m}) => html`<tr key=${u.name + m.model}>
        <th scope="row">${m.model}${m.running > 0 && html` <span class="soft">${value(m.running)} running</span>`}</th>${many && html`<td>${u.name}</td>`}
        <td class="num">${value(m.size, bytes(m.size))}</td><td class="num wide">${m.gpu === 0 ? "none" : percent(m.gpu, m.size)}</td><td class="num wide">${value(m.context)}</td>
        <td>${holders[m.holder]}${m.for ? html` <span class="soft">for ${m.for.replace(/(?<=[hm])0[ms](0s)?$/, "")}</span>` : ""}</td>
        <td class="num">${m.expires ? m.running > 0 ? "in use" : time(m.expires, until(m.expires)) : "for ever"}</td>
        ${admin && html`<td class="right nowrap"><${Act} id=${"hold" + u.name + m.model} name="Hold 24 h" label=${"Hold " + m.model + " for 24 hours"} path=${verbs(u.name, "hold", "?for=24h&model=" + encodeURIComponent(m.model))} />
          <${Act} id=${"unload" + u.name + m.model} name="Unload" label=${"Unload " + m.model} hurts=${true} path=${verbs(u.name, "unload", "?model=" + encodeURIComponent(m.model))} /></td>`}
      </tr>`)}</tbody></table></div>`}
  </section>`;
}

function health(u) {
  if (u.loops) return ["bad", "leads back to this proxy"];
  if (u.draining) return ["warn", u.in_flight ? `draining, ${plural(u.in_flight, "request")} left` : "drained"];
  if (u.up) return ["good", "up"];
  return ["bad", u.seen ? "away since " + clock(u.seen) : "does not answer"];
}

const sources = {learned: "learned", given: "given", told: "reported by the engine", none: "no limit"};

function Upstreams() {
  const admin = state.parts.you && state.parts.you.admin;
  return html`<section aria-labelledby="h-ups">
    <div class="head"><h2 id="h-ups">Servers</h2></div>
    <div class="scroll"><table id="upstreams">
      <thead><tr><th scope="col">Server</th><th scope="col">Health</th><th scope="col" class="wide">Version</th><th scope="col" class="num">Running</th><th scope="col">Slots</th>${admin && html`<th scope="col"><span class="hidden">What can be done</span></th>`}</tr></thead>
      <tbody>${state.parts.upstreams.map(u => {
        const [dot, text] = health(u);
        return html`<tr key=${u.name}>
          <th scope="row">${u.name}<div class="soft break"><code>${u.url}</code></div></th>
          <td><span class="dot ${dot}"></span>${text}${u.error && html`<div class="soft break">${u.error}</div>`}</td>
          <td class="wide nowrap">${u.version || "–"}<div class="soft">${plural(u.models.length, "model")}</div></td>
          <td class="num">${value(u.in_flight)}</td>
          <td>${u.slots.length === 0 ? html`<span class="soft">${state.parts.proxy.lanes ? "none in use yet" : "requests go as they come"}</span>` : html`<ul class="slots">${u.slots.map(s => html`<li>
            ${s.model}${s.num_ctx ? html` <span class="soft">num_ctx ${number(s.num_ctx)}</span>` : ""}: ${value(s.busy)} of ${s.lanes ? value(s.lanes) : "any number"} busy${" "}
            <span class="soft">(${sources[s.source]}${s.loaded ? "" : ", not loaded"}${s.waiting ? `, ${s.waiting} wait` : ""})</span></li>`)}</ul>`}</td>
          ${admin && html`<td class="right"><${Act} id=${"drain" + u.name} name=${u.draining ? "Resume" : "Drain"} hurts=${!u.draining} label=${(u.draining ? "Resume " : "Drain ") + u.name} path=${verbs(u.name, u.draining ? "resume" : "drain")} /></td>`}
        </tr>`;
      })}</tbody></table></div>
  </section>`;
}

// Fleet are the other proxies, and which of them schedules which server; nothing where there are none.
function Fleet() {
  const f = state.parts.fleet;
  if (!f) return "";
  const peer = p => p.up ? p.draining ? ["warn", "is stopping"] : ["good", "up"] : ["bad", "away"];
  return html`<section aria-labelledby="h-fleet">
    <div class="head"><h2 id="h-fleet">Fleet</h2><span class="soft">${plural(f.peers.length + 1, "proxy", "proxies")}; this one is ${f.name}${f.draining ? ", which is stopping" : ""}</span></div>
    <div class="scroll"><table id="peers">
      <thead><tr><th scope="col">Other proxies</th><th scope="col">Health</th><th scope="col" class="num">Since</th></tr></thead>
      <tbody>${f.peers.length === 0 ? html`<tr><td colspan="3" class="soft">None is found yet.</td></tr>` : f.peers.map(p => {
        const [dot, text] = peer(p);
        return html`<tr key=${p.address}>
          <th scope="row">${p.name || html`<span class="soft">not known yet</span>`}<div class="soft break"><code>${p.address}</code></div></th>
          <td><span class="dot ${dot}"></span>${text}${!p.up && p.error && html`<div class="soft break">${p.error}</div>`}</td>
          <td class="num">${time(p.since)}</td></tr>`;
      })}</tbody></table></div>
    <div class="scroll"><table id="owners">
      <thead><tr><th scope="col">Server</th><th scope="col">Scheduled by</th><th scope="col" class="num">Running</th><th scope="col" class="num">Waiting</th><th scope="col" class="num">Expected wait</th><th scope="col" class="num wide">Models</th></tr></thead>
      <tbody>${f.servers.map(s => html`<tr key=${s.server}>
        <th scope="row"><span class="dot ${s.takes ? "good" : "bad"}"></span>${s.server}${!s.takes && html` <span class="soft">${s.away ? "its proxy is away" : "takes no requests"}</span>`}</th>
        <td>${s.owner}${s.here && html` <span class="mark">this one</span>`}</td>
        <td class="num">${value(s.running)}</td><td class="num">${value(s.waiting)}</td><td class="num">${s.takes ? duration(1000 * s.wait_s) : "–"}</td><td class="num wide">${value(s.models)}</td></tr>`)}
      </tbody></table></div>
  </section>`;
}

function Prefixes() {
  const by = new Map();
  for (const r of state.log) {
    if (!r.group || r.prewarm || !r.verdict) continue;
    let p = by.get(r.group);
    if (!p) by.set(r.group, p = {group: r.group, sample: r, model: r.model, requests: 0, reused: 0, evaluated: 0, loads: 0, reasons: {}, last: 0});
    p.requests++;
    p.reused += r.reused || 0;
    p.evaluated += r.evaluated || 0;
    p.loads += r.loaded ? 1 : 0;
    if (r.reason) p.reasons[r.reason] = (p.reasons[r.reason] || 0) + 1;
    p.last = Math.max(p.last, r.at);
  }
  const list = [...by.values()].sort((a, b) => b.evaluated - a.evaluated).slice(0, 8);
  const cost = state.parts.proxy.price;
  return html`<section aria-labelledby="h-pre">
    <div class="head"><h2 id="h-pre">Prefixes that cost most</h2><span class="soft">of the last ${plural(state.log.length, "request")}; prompts that begin with the same text count as one</span></div>
    ${list.length === 0 ? html`<p class="soft">No prompt has been evaluated yet.</p>` : html`<div class="scroll"><table id="prefixes">
      <thead><tr><th scope="col">Begins as</th><th scope="col" class="wide">Model</th><th scope="col" class="num">Requests</th><th scope="col" class="num">Evaluated</th>${cost > 0 && html`<th scope="col" class="num">Cost</th>`}<th scope="col" class="num">Reused</th><th scope="col">Why not warm</th><th scope="col" class="num wide">Last</th></tr></thead>
      <tbody>${list.map(p => html`<tr key=${p.group} data-group=${p.group}>
        <th scope="row" class="nowrap"><span class="swatch" style=${{background: colour({...p.sample, conversation: ""})}}></span><code>${p.group.slice(0, 8)}</code></th><td class="wide break">${p.model}</td>
        <td class="num">${value(p.requests)}</td><td class="num">${value(p.evaluated)}</td>${cost > 0 && html`<td class="num">${price(p.evaluated * cost / 1e6)}</td>`}<td class="num">${percent(p.reused, p.reused + p.evaluated)}</td>
        <td>${Object.entries(p.reasons).sort((a, b) => b[1] - a[1]).map(([r, n]) => `${n} × ${reasons[r] || r}`).join(", ") || html`<span class="soft">${p.reused + p.evaluated > 0 ? "always warm" : "not told"}</span>`}</td><td class="num nowrap wide">${ago(p.last, now())}</td></tr>`)}
      </tbody></table></div>`}
  </section>`;
}

const kindNames = {answer: "Chats and generations", embedding: "Inputs of embeddings"};

// Answers tells what was not computed since its answer was kept: in no other figure of the page.
function Answers() {
  const {answers: a, totals} = state.parts;
  if (!a) return "";
  const s = a.store;
  const rows = Object.entries(kindNames).map(([kind, name]) => ({kind, name, ...totals.cached[kind]}))
    .filter(k => Object.values(k.requests).some(n => n > 0));
  const room = s && html`${s.entries === null ? "an unknown number" : value(s.entries)} kept${s.bytes === null ? "" : html`, which take <data value=${s.bytes}>${bytes(s.bytes)}</data>`} of ${bytes(s.limit_bytes)}`;
  return html`<section aria-labelledby="h-ans">
    <div class="head"><h2 id="h-ans">Answers not computed</h2>${s && html`<span class="soft" id="answers-store">${s.down ? html`<span class="dot bad"></span>the store cannot be used; ` : ""}${room}${s.evicted > 0 && html`; ${value(s.evicted)} dropped for room`}${a.surviving > 0 && html`; ${value(a.surviving)} without their clients, ${bytes(a.surviving_bytes)}`}</span>`}</div>
    ${rows.length === 0 ? html`<p class="soft">None yet. ${a.answers === "off" ? html`With <code>--cache-answers deterministic</code> a question at temperature 0 is computed once.` : ""}</p>` : html`<div class="scroll"><table id="answers">
      <thead><tr><th scope="col">What</th><th scope="col" class="num">From the store</th><th scope="col" class="num">Hit rate</th><th scope="col" class="num">Joined</th><th scope="col" class="num">Computed</th><th scope="col" class="num wide">Bypassed</th>
        <th scope="col" class="num wide">Bytes given</th><th scope="col" class="num">Prompt tokens spared</th><th scope="col" class="num">Generated tokens spared</th><th scope="col" class="num">Time spared</th></tr></thead>
      <tbody>${rows.map(k => html`<tr key=${k.kind} data-kind=${k.kind}>
        <th scope="row">${k.name}</th><td class="num">${value(k.hits)}</td><td class="num">${percent(k.hits, k.hits + k.misses + k.joined)}</td><td class="num">${value(k.joined)}</td><td class="num">${value(k.misses)}</td>
        <td class="num wide">${value(k.requests.bypass)}</td><td class="num wide">${value(k.bytes, bytes(k.bytes))}</td><td class="num">${value(k.prompt_tokens, short(k.prompt_tokens))}</td>
        <td class="num">${k.kind === "embedding" ? "–" : value(k.generated_tokens, short(k.generated_tokens))}</td><td class="num"><data value=${k.seconds}>${duration(1000 * k.seconds)}</data></td></tr>`)}
      </tbody></table></div>
      <p class="soft">Tokens and time are what the kept ones took when they were computed. They are not among the reused ones above.</p>`}
  </section>`;
}

function Contexts() {
  const c = state.parts.contexts;
  return html`<section aria-labelledby="h-con">
    <div class="head"><h2 id="h-con">Stored contexts</h2>${c && html`<span class="soft">${value(c.states)} take <data value=${c.bytes}>${bytes(c.bytes)}</data> of ${bytes(c.limit)}; ${value(c.saved)} saved, ${value(c.attached)} attached, ${value(c.tokens)} tokens not evaluated again (about ${duration(1000 * c.seconds)})</span>`}</div>
    ${!c ? html`<p class="soft">None are kept. With <code>--contexts</code> what was evaluated outlives a load or a restart (Ollama 0.30 or later, on this machine).</p>` :
      c.contexts.length === 0 ? html`<p class="soft">None yet.</p>` : html`<div class="scroll"><table id="contexts">
      <thead><tr><th scope="col">Model</th><th scope="col" class="num">Tokens</th><th scope="col" class="num">Size</th><th scope="col" class="num">Worth</th><th scope="col" class="num">Uses</th><th scope="col" class="num">Last used</th></tr></thead>
      <tbody>${c.contexts.map(x => html`<tr><th scope="row">${x.model}</th><td class="num">${value(x.tokens)}</td><td class="num">${bytes(x.bytes)}</td><td class="num">${duration(1000 * x.cost_s)}</td><td class="num">${value(x.uses)}</td><td class="num">${ago(x.used, now())}</td></tr>`)}</tbody>
      </table></div>${c.not_listed > 0 && html`<p class="soft">and ${plural(c.not_listed, "older one")}</p>`}`}
  </section>`;
}

const kept = r => r.cache === "hit" || r.cache === "joined" || r.cache === "partial";
const kinds = {all: () => true, cold: r => r.reason, kept, failed: r => failed(r) || r.broken};

function Requests() {
  const all = state.log.filter(kinds[state.only]);
  const list = all.slice(-state.shown).reverse();
  const longest = list.map(r => r.duration || 0).sort((a, b) => a - b)[Math.floor(.95 * (list.length - 1))] || 1, scale = Math.max(longest, 50);
  const open = number => set({open: state.open === number ? 0 : number});
  return html`<section aria-labelledby="h-req">
    <div class="head"><h2 id="h-req">Last requests</h2>
      <div class="tools"><${Choice} label="Which requests" options=${[["All", "all"], ["Not warm", "cold"], ["Kept", "kept"], ["Failed", "failed"]]} chosen=${state.only} choose=${only => set({only})} /></div></div>
    ${list.length === 0 ? html`<p class="soft">${state.only === "all" ? "None since the proxy was started. Point OLLAMA_HOST, or a client's base URL, at this address." : "None."}</p>` : html`<div class="scroll"><table id="requests" class="log">
      <thead><tr><th scope="col">At</th><th scope="col">Model</th><th scope="col" class="wide">What</th><th scope="col" class="num">Prompt</th><th scope="col" class="wide">Why not warm</th><th scope="col" class="num wide">Waited</th><th scope="col" class="num">Took</th><th scope="col" class="fall">Time line</th></tr></thead>
      <tbody>${list.map(r => html`
        <tr key=${r.number} class="row ${state.open === r.number ? "open" : ""}" data-number=${r.number} data-entry=${r.entry} onClick=${() => open(r.number)}>
          <td><button class="open" aria-expanded=${state.open === r.number} onClick=${e => { e.stopPropagation(); open(r.number); }}>${clock(r.at)}</button></td>
          <td class="model"><span class="swatch" style=${{background: colour(r)}}></span>${r.model || "–"}${r.name && html` <span class="soft">${r.name}</span>`}</td>
          <td class="wide nowrap">${r.prewarm ? "prewarm" : r.endpoint}${kept(r) && html` <span class="mark" title=${caches[r.cache]}>${r.cache === "partial" ? `${number(r.kept)} of ${number(r.parts)} kept` : r.cache === "hit" ? "kept" : "joined"}</span>`}</td>
          <td class="num">${r.total ? value(r.total, short(r.total)) : ""}<span class="share ${r.reused === undefined ? "" : "known"}" hidden=${!r.total} title=${warmth(r)}>${r.reused !== undefined && html`<i style=${{width: 100 * r.reused / r.total + "%"}}></i>`}</span></td>
          <td class="wide">${failed(r) || r.broken ? html`<span class="fail">${outcomes[r.outcome]}${r.status >= 400 ? " " + r.status : ""}</span>` : r.reason ? reasons[r.reason] || r.reason : r.outcome === "ok" ? "" : outcomes[r.outcome]}</td>
          <td class="num wide">${r.sent >= 1 || r.waited >= 1 ? duration(Math.max(r.waited || 0, r.sent || 0)) : ""}</td>
          <td class="num">${failed(r) ? html`<span class="fail">${duration(r.duration || 0)}</span>` : duration(r.duration || 0)}</td>
          <td class="fall"><${Track} r=${r} whole=${scale} /></td></tr>
        ${state.open === r.number && html`<tr key=${"detail" + r.number} class="open"><td colspan="8"><${Detail} r=${r} /></td></tr>`}`)}
      </tbody></table></div>
      ${all.length > list.length && html`<p><button onClick=${() => set({shown: state.shown + 75})}>Show more</button> <span class="soft">${number(all.length - list.length)} older</span></p>`}
      ${state.only === "failed" && html`<p class="soft">Of requests that failed alike at once, ten in ${state.parts.proxy.bin_s} seconds are listed.</p>`}`}
  </section>`;
}

// redraw draws the parts that depend on the time.
function redraw() {
  if (!state.parts.upstreams || document.hidden || state.link === "denied") return;
  if (canvas && canvas.isConnected && !canvas.parentElement.hidden) {
    boxes = draw(canvas, {...drawing(), waiting: state.parts.queue.requests, chosen: state.chosen});
  }
  if (tokens && tokens.isConnected) {
    const to = now() / 1000;
    chart(tokens, state.parts.series, state.parts.proxy.bin_s, to - (state.hour ? 3600 : 600), to);
  }
}

again = await follow(told);
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(true));
document.addEventListener("visibilitychange", () => paint(true));
setInterval(() => paint(), 1000);
setInterval(() => { if (!state.paused && !still.matches) redraw(); }, 250);
