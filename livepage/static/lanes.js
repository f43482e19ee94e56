// The drawing of lanes: which requests each lane had, and the phases of each.

import {clock, duration, failed, number} from "./format.js";

const rowHeight = 20, rowGap = 3, headHeight = 20, waitTop = 16, waitHeight = 40, axisHeight = 20, gutter = 26;
const hues = [235, 55, 150, 320, 85, 275, 195, 20, 115, 350]; // consecutive ones are far apart

const places = new Map(); // of groups among the hues, in the order of their first requests

// hue returns the hue of a group: prompts that begin alike.
export function hue(group) {
  if (!places.has(group)) places.set(group, places.size);
  const place = places.get(group);
  return hues[place % hues.length] + 12 * Math.floor(place / hues.length);
}

// shade distinguishes conversations that begin alike.
const shade = talk => talk ? (parseInt(talk.slice(-4), 16) % 3 - 1) * .055 : 0;

const dark = matchMedia("(prefers-color-scheme: dark)");

export function colour(r, alpha = 1) {
  const light = (dark.matches ? .68 : .62) + shade(r.conversation);
  return r.group ? `oklch(${light} .115 ${hue(r.group)} / ${alpha})` : `oklch(${light} .01 240 / ${alpha})`;
}

// steps returns the phases of a request, in order: [kind, ms] of waited, load, slot, prompt, answer
// and rest. If Ollama reports no times, the first byte of the answer ends the phases before it.
// What was not sent to Ollama, since its answer was kept, has one phase: stored, or together.
export function steps(r, now) {
  const whole = r.duration || now - r.at;
  if (r.cache === "hit" || r.cache === "joined") return [[r.cache === "hit" ? "stored" : "together", whole]];
  if (r.cache && !r.sent && r.outcome === "ok") { // its inputs were sent one by one
    const waited = Math.min(r.waited || 0, whole);
    return [["waited", waited], ["prompt", whole - waited]];
  }
  const list = [["waited", Math.min(r.sent || (r.outcome ? whole : r.waited || 0), whole)]];
  let left = whole - list[0][1];
  const add = (kind, ms) => {
    ms = Math.min(ms, left);
    if (ms > 0) list.push([kind, ms]);
    left -= Math.max(ms, 0);
  };
  if (r.prompt || r.eval || r.load) {
    if (r.loaded) add("load", r.load || 0);
    // Even a loaded model takes Ollama a moment to find.
    add("slot", (r.queue || 0) + (r.loaded ? 0 : r.load || 0));
    add("prompt", r.prompt || 0);
    add("answer", r.eval || 0);
    add("rest", left);
  } else if (r.first > r.sent) {
    add("prompt", r.first - r.sent);
    add("answer", left);
  } else {
    add(r.outcome && !failed(r) && r.total ? "rest" : "prompt", left);
  }
  return list;
}

export const stepNames = {
  waited: "waited in the proxy", load: "model load", slot: "inside Ollama before that", prompt: "prompt", answer: "answer", rest: "the rest",
  stored: "from the store", together: "with the answer that another request got",
};

// rowsOf assigns requests to rows: one for each lane that had any, and as many as needed for
// requests without a lane.
export function rowsOf(requests, upstreams, from, now) {
  const groups = new Map();
  const group = (upstream, model, ctx, runner) => {
    const laned = runner !== undefined;
    const key = [upstream, runner || model].join("\n");
    if (!groups.has(key)) {
      let title = model || "no model";
      if (ctx) title += ` · num_ctx ${number(ctx)}`;
      if (!laned) title += " · without lanes";
      if (upstreams.length > 1) title = `${upstream || "not sent"} · ${title}`;
      groups.set(key, {title, upstream, laned, rows: new Map()});
    }
    return groups.get(key);
  };
  for (const u of upstreams) {
    for (const s of u.slots) {
      if (!s.loaded && !s.busy) continue;
      const g = group(u.name, s.model, s.num_ctx, s.runner);
      for (let i = 0; i < s.lanes; i++) g.rows.set(i, []);
    }
  }
  for (const r of requests) {
    const end = r.duration ? r.at + r.duration : now;
    if (end < from || !r.upstream || r.lane === undefined && failed(r)) continue;
    const g = group(r.upstream, r.model, r.num_ctx, r.runner);
    let lane = r.lane;
    if (lane === undefined) {
      for (lane = 0; ; lane++) {
        const row = g.rows.get(lane);
        const last = row && row[row.length - 1];
        if (!last || last.at + (last.duration || now - last.at) <= r.at + (r.sent || 0)) break;
      }
    }
    if (!g.rows.has(lane)) g.rows.set(lane, []);
    g.rows.get(lane).push(r);
  }
  const list = [...groups.values()];
  for (const g of list) g.rows = [...g.rows].sort((a, b) => a[0] - b[0]);
  return list;
}

let hatch;
function hatching(c, ink) {
  if (hatch && hatch.ink === ink) return hatch.pattern;
  const tile = Object.assign(document.createElement("canvas"), {width: 6, height: 6});
  const t = tile.getContext("2d");
  t.strokeStyle = ink;
  t.lineWidth = 1.4;
  for (const d of [-6, 0, 6]) {
    t.beginPath();
    t.moveTo(d, 6);
    t.lineTo(d + 6, 0);
    t.stroke();
  }
  hatch = {ink, pattern: c.createPattern(tile, "repeat")};
  return hatch.pattern;
}

// draw draws the last minutes and returns the place of each request, for find.
export function draw(canvas, state) {
  const {groups, requests, waiting, from, now, chosen} = state;
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, faint, warm, cold, none, bad, paper, accent] =
    ["ink", "soft", "line", "faint", "warm", "cold", "none", "bad", "paper", "accent"].map(n => style.getPropertyValue("--" + n).trim());
  const lanes = groups.reduce((n, g) => n + g.rows.length, 0);
  const height = lanes > 40 ? 9 : lanes > 20 ? 13 : rowHeight;
  const tall = waitHeight + 8 + groups.length * headHeight + lanes * (height + rowGap) + axisHeight;
  const width = canvas.parentElement.clientWidth, scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(tall * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
    canvas.style.height = tall + "px";
  }
  const c = canvas.getContext("2d");
  c.setTransform(scale, 0, 0, scale, 0, 0);
  c.clearRect(0, 0, width, tall);
  const plain = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
  c.font = plain;
  c.textBaseline = "middle";
  const x = t => gutter + (t - from) / (now - from) * (width - gutter - 1);
  const bottom = tall - axisHeight;

  // The axis of time, with labels at full steps.
  const span = now - from, step = [5, 10, 15, 30, 60, 120].map(s => s * 1000).find(s => span / s <= width / 84) || 300_000;
  c.textAlign = "center";
  for (let t = Math.ceil(from / step) * step; t <= now; t += step) {
    c.fillStyle = line;
    c.fillRect(Math.round(x(t)), 0, 1, bottom);
    if (x(t) > gutter + 22 && x(t) < width - 26) {
      c.fillStyle = soft;
      c.fillText(clock(t, step < 60_000), x(t), bottom + axisHeight / 2 + 2);
    }
  }

  // How many were waiting: finished, running and still waiting requests.
  const edges = [];
  const waits = (a, b) => {
    if (b > from && b - a >= 1) edges.push([Math.max(a, from), 1], [b, -1]);
  };
  for (const r of requests) {
    const waited = r.sent || (r.outcome ? r.duration : 0);
    if (r.priority || r.waited) waits(r.at, r.at + waited);
  }
  for (const w of waiting) waits(w.since, now);
  edges.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let most = 0, count = 0;
  for (const e of edges) most = Math.max(most, count += e[1]);
  if (most > 0) {
    const y = n => waitHeight - n / most * (waitHeight - waitTop - 2);
    c.beginPath();
    c.moveTo(x(from), waitHeight);
    count = 0;
    for (const [t, d] of edges) {
      const at = Math.min(x(t), x(now));
      c.lineTo(at, y(count));
      c.lineTo(at, y(count += d));
    }
    c.lineTo(x(now), y(count));
    c.lineTo(x(now), waitHeight);
    c.closePath();
    c.globalAlpha = .22;
    c.fillStyle = soft;
    c.fill();
    c.globalAlpha = .7;
    c.strokeStyle = soft;
    c.lineWidth = 1;
    c.stroke();
    c.globalAlpha = 1;
  }
  c.fillStyle = line;
  c.fillRect(gutter, waitHeight, width - gutter, 1);
  c.textAlign = "left";
  c.fillStyle = paper; // over the lines of the axis
  const waitText = most > 0 ? `waiting, ${number(most)} at most` : "waiting";
  c.fillRect(0, 0, c.measureText(waitText).width + 4, waitTop);
  c.fillStyle = soft;
  c.fillText(waitText, 0, 8);

  const boxes = [];
  let y = waitHeight + 8;
  for (const g of groups) {
    c.fillStyle = ink;
    c.font = "600 " + plain;
    c.fillText(g.title, 0, y + headHeight / 2, width);
    c.font = plain;
    y += headHeight;
    for (const [lane, list] of g.rows) {
      c.fillStyle = faint;
      c.fillRect(gutter, y, width - gutter, height);
      if (height >= 13) {
        c.fillStyle = soft;
        c.textAlign = "right";
        c.fillText(g.laned ? lane + 1 : "", gutter - 9, y + height / 2 + 1);
        c.textAlign = "left";
      }
      for (const r of list) drawOne(r, y);
      y += height + rowGap;
    }
  }

  function drawOne(r, y) {
    const begins = r.at + (r.sent || 0), ends = r.duration ? r.at + r.duration : now;
    const a = Math.max(x(begins), gutter), b = Math.min(x(ends), width - 1), w = Math.max(b - a, 1.5);
    if (b < gutter) return;
    boxes.push({r, a, b: a + w, y, height});
    let t = r.at;
    for (const [kind, ms] of steps(r, now)) {
      const left = Math.max(x(t), a), right = Math.min(x(t + ms), a + w);
      t += ms;
      if (kind === "waited" || right <= left) continue;
      c.fillStyle = kind === "load" ? hatching(c, soft) : colour(r, kind === "prompt" ? 1 : kind === "answer" ? .42 : .16);
      c.fillRect(left, y, Math.max(right - left, .75), height);
    }
    // The reused part of the prompt, along the foot of the bar.
    if (height >= 13 && w > 2) {
      const foot = 3;
      c.fillStyle = paper;
      c.fillRect(a, y + height - foot - 1, w, 1);
      if (r.reused !== undefined && r.total > 0) {
        const part = w * r.reused / r.total;
        c.fillStyle = warm;
        c.fillRect(a, y + height - foot, part, foot);
        c.fillStyle = cold;
        c.fillRect(a + part, y + height - foot, w - part, foot);
      } else {
        c.fillStyle = none;
        c.fillRect(a, y + height - foot, w, foot);
      }
    }
    if (w > 3) { // a gap between two requests
      c.fillStyle = paper;
      c.fillRect(a, y, .75, height);
    }
    if (r.priority === "interactive") {
      c.fillStyle = ink;
      c.beginPath();
      c.moveTo(a, y);
      c.lineTo(a + 7, y);
      c.lineTo(a, y + 7);
      c.fill();
    }
    if (failed(r) || r.broken) {
      c.strokeStyle = bad;
      c.lineWidth = 2;
      c.strokeRect(a + 1, y + 1, Math.max(w - 2, 1), height - 2);
    }
    if (r.number && r.number === chosen) {
      c.strokeStyle = ink;
      c.lineWidth = 1.5;
      c.strokeRect(a - .5, y - 1, w + 1, height + 2);
      c.fillStyle = accent;
      c.fillRect(Math.max(x(r.at), gutter), y + height / 2 - 1, Math.max(0, a - Math.max(x(r.at), gutter)), 2);
    }
  }
  return boxes;
}

// find returns the request at a point of the drawing.
export function find(boxes, px, py) {
  let best, far = 5;
  for (const box of boxes) {
    if (py < box.y || py > box.y + box.height) continue;
    const d = px < box.a ? box.a - px : px > box.b ? px - box.b : 0;
    if (d < far) [best, far] = [box, d];
  }
  return best;
}

// summary returns the content of the drawing for a table: a row for each lane.
export function summary(groups, from, now) {
  const list = [];
  for (const g of groups) {
    for (const [lane, requests] of g.rows) {
      let busy = 0, reused = 0, evaluated = 0, loads = 0, switches = 0, generated = 0, last;
      for (const r of requests) {
        const begins = Math.max(r.at + (r.sent || 0), from), ends = r.duration ? r.at + r.duration : now;
        busy += Math.max(0, ends - begins);
        reused += r.reused || 0;
        evaluated += r.evaluated || 0;
        generated += r.generated || 0;
        loads += r.loaded ? 1 : 0;
        if (last !== undefined && r.group !== last) switches++;
        last = r.group;
      }
      const runs = requests.some(r => !r.duration);
      list.push({title: g.title, lane: g.laned ? lane + 1 : "", requests: requests.length, busy: busy / (now - from), reused, evaluated, generated, loads, switches, runs});
    }
  }
  return list;
}

export const describe = (groups, requests, from, now) => {
  const rows = summary(groups, from, now);
  return `Lanes over the last ${duration(now - from)}: ${rows.length} lanes, ` +
    `${rows.reduce((n, r) => n + r.requests, 0)} requests. The table below has the same figures.`;
};
