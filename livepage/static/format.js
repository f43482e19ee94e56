// Numbers and times as people read them.

const grouped = new Intl.NumberFormat("en", {maximumFractionDigits: 0});

export const number = n => grouped.format(n);

export function short(n) {
  if (n < 10_000) return number(n);
  if (n < 1_000_000) return (n / 1000).toFixed(n < 100_000 ? 1 : 0) + "k";
  return (n / 1e6).toFixed(n < 1e7 ? 2 : 1) + "M";
}

export function bytes(n) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (n < 1024) return (n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)) + " " + unit;
    n /= 1024;
  }
  return n.toFixed(1) + " GiB";
}

// duration formats milliseconds.
export function duration(ms) {
  if (ms < 1) return ms > 0 ? "<1 ms" : "0";
  if (ms < 1000) return Math.round(ms) + " ms";
  const s = ms / 1000;
  if (s < 10) return s.toFixed(1) + " s";
  if (s < 90) return Math.round(s) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  if (s < 129600) return Math.round(s / 3600) + " h";
  return Math.round(s / 86400) + " days";
}

export const percent = (part, all) => all > 0 ? (100 * part / all).toFixed(part / all > .9995 || part === 0 ? 0 : 1) + " %" : "–";

// price formats an amount in whichever currency.
export const price = n => n.toFixed(n >= 10 || n === 0 ? 2 : n >= .1 ? 3 : 5);

const pad = n => String(n).padStart(2, "0");

export function clock(ms, seconds = true) {
  const d = new Date(ms);
  return pad(d.getHours()) + ":" + pad(d.getMinutes()) + (seconds ? ":" + pad(d.getSeconds()) : "");
}

export function ago(ms, now) {
  const d = now - ms;
  return d < 1500 ? "now" : duration(d) + " ago";
}

export const plural = (n, one, many = one + "s") => number(n) + " " + (n === 1 ? one : many);

export const reasons = {
  first_seen: "first seen", diverged: "differs early", slot_taken: "slot taken by another prompt", reloaded: "model loaded with other options",
  evicted: "model was unloaded", restarted: "server restarted", concurrent: "same prefix was being evaluated", sliding_window: "sliding window",
};

export const outcomes = {
  ok: "answered", client_error: "error of the client", upstream_error: "error of Ollama", unreachable: "Ollama not reached", aborted: "broke off",
  client_gone: "client left", drained: "cut off while stopping", refused: "refused by the proxy",
};

export const caches = {
  hit: "kept answer", partial: "partly kept", miss: "computed, not kept before", joined: "computed once, with another request", bypass: "not looked for",
};

export const failed = r => ["upstream_error", "unreachable", "aborted", "refused", "client_error"].includes(r.outcome);
