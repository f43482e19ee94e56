"""curl: what HTTP looks like on the wire."""

import gzip
import hashlib
import json
import os
import subprocess

from record import BASE_URL, PROMPT, TINY, UNKNOWN, done, ok, plain

OPTIONS = {"temperature": 0, "seed": 1, "num_predict": 8}
POST_JSON = ("-H", "Content-Type: application/json")


def curl(path, *args, data=None):
    """One request: the statuses, the last headers without Date and the proxy's own, and the body."""
    if data is not None:
        with open("data", "wb") as f:
            f.write(data if isinstance(data, bytes) else json.dumps(data).encode())
        args = (*args, "--data-binary", "@data")
    for name in ("head", "body"):
        with open(name, "wb"):
            pass
    subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "60", "--dump-header", "head", "--output", "body",
         *args, BASE_URL + path],
        check=True, capture_output=True,
    )
    with open("head") as f:
        heads = [h.splitlines() for h in f.read().strip().split("\n\n")]
    with open("body", "rb") as f:
        body = f.read()
    if "--head" in args:
        body = b""  # curl puts the header there
    try:
        body = [plain(json.loads(line)) for line in body.splitlines()]
    except ValueError:
        body = plain(body.decode(errors="replace"))
    # Equally old models are in no particular order.
    for value in body:
        if isinstance(value, dict) and "models" in value:
            value["models"].sort(key=lambda m: m["name"])
    # Answers that contain times differ in length.
    headers = sorted(h for h in heads[-1][1:] if not h.lower().startswith((
        "date:", "content-length:", "x-cacheproxy-", "server-timing:", "cache-status:", "age:")))
    return {
        # The number of interim answers before the last one is undefined (RFC 9110, 15.2): a proxy
        # on a busy machine sends its own 100 and passes on the server's.
        "statuses": [h[0] for h, before in zip(heads, [[None], *heads]) if h[0] != before[0]],
        "headers": [plain(h) for h in headers],
        "has length": any(h.lower().startswith("content-length:") for h in heads[-1]),
        "body": body,
    }


def status(answer):
    """What can be compared if the proxy answers itself, in its own words."""
    return answer["statuses"]


def without_allow(answer):
    """Ollama's router adds a header to preflights that no browser reads."""
    return {**answer, "headers": [h for h in answer["headers"] if not h.startswith("Allow:")]}


def generate(**more):
    return {"model": TINY, "prompt": PROMPT, "options": OPTIONS, **more}


ok("root", lambda: curl("/"))
ok("head root", lambda: curl("/", "--head"))
ok("head tags", lambda: curl("/api/tags", "--head"))
ok("head version", lambda: curl("/api/version", "--head"))
ok("version", lambda: curl("/api/version"))
ok("tags", lambda: curl("/api/tags"))
ok("stream", lambda: curl("/api/generate", data=generate()))
ok("no stream", lambda: curl("/api/generate", *POST_JSON, data=generate(stream=False)))
ok("chunked", lambda: curl("/api/generate", "-H", "Transfer-Encoding: chunked", data=generate()))
ok("chunked no stream", lambda: curl("/api/generate", "-H", "Transfer-Encoding: chunked", data=generate(stream=False)))
ok("http 1.0", lambda: curl("/api/generate", "--http1.0", data=generate()))
ok("http 1.0 no stream", lambda: curl("/api/generate", "--http1.0", data=generate(stream=False)))
# Ollama reads the whole body and ignores what it does not know.
ok("expect", lambda: curl(
    "/api/generate", "-H", "Expect: 100-continue", data=generate(stream=False, padding="x" * (5 << 18))))
ok("expect chunked", lambda: curl(
    "/api/generate", "-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked",
    data=generate(stream=False, padding="x" * (5 << 18))))
ok("query", lambda: curl("/api/generate?a=1;b=%zz", data=generate(stream=False)))
ok("double slash", lambda: curl("//api//version", "--path-as-is"))
ok("dots", lambda: curl("/api/../api/version", "--path-as-is"))
ok("gzip", lambda: curl("/api/generate", "-H", "Content-Encoding: gzip", data=gzip.compress(json.dumps(generate()).encode())))
ok("accept gzip", lambda: curl("/api/tags", "-H", "Accept-Encoding: gzip"))
ok("sse", lambda: len(curl("/v1/chat/completions", *POST_JSON, data={
    "model": TINY, "messages": [{"role": "user", "content": PROMPT}], "stream": True, "max_tokens": 4,
})["headers"]))
ok("template", lambda: curl("/api/generate", data=generate(stream=False, template="{{ .Prompt }}", _debug_render_only=True)))

ok("unknown model", lambda: curl("/api/generate", data=generate(model=UNKNOWN)))
ok("no model", lambda: curl("/api/generate", data={"prompt": PROMPT}))
ok("bad json", lambda: curl("/api/generate", data=b'{"model": '))
ok("empty", lambda: curl("/api/generate", "--request", "POST"))
ok("array", lambda: curl("/api/chat", data=b"[]"))
ok("invalid utf-8", lambda: curl("/api/generate", data=b'{"model": "\xff"}'))
ok("duplicate keys", lambda: curl(
    "/api/generate", data=b'{"model": "none", "stream": false, "MODEL": "%s", "keep_alive": "5x"}' % TINY.encode()))
ok("get generate", lambda: curl("/api/generate"))
ok("put generate", lambda: curl("/api/generate", "--request", "PUT", data=generate()))
ok("unknown path", lambda: curl("/no/such/path"))
ok("unknown path posted", lambda: curl("/no/such/path", data=b"x" * (3 << 20)))
ok("foreign host", lambda: status(curl("/api/version", "-H", "Host: attacker.example")))
ok("foreign origin", lambda: status(curl("/api/version", "-H", "Origin: http://attacker.example")))
ok("local origin", lambda: curl("/api/version", "-H", "Origin: http://localhost:3000"))
ok("preflight", lambda: without_allow(curl(
    "/api/chat", "--request", "OPTIONS", "-H", "Origin: http://localhost:3000",
    "-H", "Access-Control-Request-Method: POST", "-H", "Access-Control-Request-Headers: content-type")))
ok("foreign preflight", lambda: status(curl(
    "/api/chat", "--request", "OPTIONS", "-H", "Origin: http://attacker.example",
    "-H", "Access-Control-Request-Method: POST")))

# A blob that the server does not have: each run has its own, of the same length.
blob = os.urandom(3 << 20)
digest = hashlib.sha256(blob).hexdigest()
path = f"/api/blobs/sha256:{digest}"


def blobs(*args, path=path, data=None):
    text = json.dumps(curl(path, *args, data=data))
    return json.loads(text.replace(digest, "DIGEST"))


ok("blob before", lambda: blobs("--head"))
ok("blob wrong digest", lambda: curl("/api/blobs/sha256:" + "0" * 64, data=b"not that"))
ok("blob bad digest", lambda: curl("/api/blobs/sha256:no", data=b"not that"))
ok("blob upload", lambda: blobs("-H", "Transfer-Encoding: chunked", data=blob))
ok("blob after", lambda: blobs("--head"))
ok("blob again", lambda: blobs(data=blob))
done()
