// The proxy's server-sent events, read with fetch, so that an API key can be sent.

const keyName = "ollama-cacheproxy key"; // in sessionStorage

export const key = {
  get: () => sessionStorage.getItem(keyName) || "",
  set: value => value ? sessionStorage.setItem(keyName, value) : sessionStorage.removeItem(keyName),
};

const headers = () => key.get() ? {Authorization: "Bearer " + key.get()} : {};

// ms without any data, not even a comment, after which the connection is closed
const silence = 40_000;

// follow reads events for as long as the page is open, and passes {state, message, data} to told:
// state is connecting, live, lost, denied or many.
export async function follow(told) {
  let pause = 500, stop;
  let wake = () => {};
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    wake();
  });
  const again = () => {
    wake();
    if (stop) stop.abort();
  };
  (async () => {
    for (;;) {
      stop = new AbortController();
      let watch;
      const alive = () => {
        clearTimeout(watch);
        watch = setTimeout(() => stop.abort(), silence);
      };
      alive();
      let denied = false;
      try {
        told({state: "connecting"});
        const res = await fetch("events", {headers: headers(), signal: stop.signal, cache: "no-store"});
        if (res.status === 401) {
          denied = true;
          told({state: "denied", message: key.get() ? "The proxy does not know this key." : ""});
        } else if (!res.ok) {
          const text = await res.json().then(body => body.error, () => "");
          told({state: res.status === 503 ? "many" : "lost", message: String(text || res.status)});
        } else {
          pause = 500;
          const reader = res.body.pipeThrough(new TextDecoderStream()).getReader();
          let rest = "";
          for (;;) {
            const {done, value} = await reader.read();
            if (done) break;
            alive();
            rest += value;
            const events = rest.split("\n\n");
            rest = events.pop();
            for (const e of events) {
              if (e.startsWith("data: ")) told({state: "live", data: JSON.parse(e.slice(6))});
            }
          }
          told({state: "lost", message: "The proxy has ended the connection."});
        }
      } catch (err) {
        told({state: "lost", message: "The proxy does not answer."});
      }
      clearTimeout(watch);
      await new Promise(done => {
        wake = done;
        if (!denied) setTimeout(done, pause);
      });
      pause = Math.min(pause * 2, 10_000);
    }
  })();
  return again;
}

// change asks the proxy to change something, and returns what is to be said of it: the reason if it
// refuses, or which proxies of a fleet may not have heard of it.
export async function change(path) {
  try {
    const res = await fetch(path, {method: "POST", headers: headers()});
    if (res.ok) {
      const {unheard} = await res.json();
      return unheard ? `done, but not yet at ${unheard.join(", ")}.` : "done.";
    }
    return await res.json().then(body => String(body.error), () => "status " + res.status);
  } catch {
    return "The proxy does not answer.";
  }
}
