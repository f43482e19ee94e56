"""The Python client ollama, sync and async."""

import asyncio
import base64

import ollama

from record import (
    BASE_URL, COLOUR_SCHEMA, EMBED, MODEL, PROMPT, TINY, UNKNOWN, WEATHER_TOOL, done, either, ok, refused,
)

OPTIONS = {"temperature": 0, "seed": 1, "num_predict": 8}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

client = ollama.Client(host=BASE_URL)

# Equally old models are in no particular order.
ok("list", lambda: sorted(client.list().models, key=lambda m: m.model))
ok("show", lambda: client.show(TINY))
for model in (MODEL, TINY):
    ok(f"generate {model}", lambda: client.generate(model, PROMPT, options=OPTIONS))
    ok(f"chat {model}", lambda: client.chat(model, MESSAGES, options=OPTIONS))
ok("generate stream", lambda: list(client.generate(TINY, PROMPT, stream=True, options=OPTIONS)))
ok("chat stream", lambda: list(client.chat(TINY, MESSAGES, stream=True, options=OPTIONS)))
ok("generate raw", lambda: client.generate(TINY, "Once upon a time", raw=True, options=OPTIONS))
ok("generate context", lambda: client.generate(TINY, "And then?", context=[1, 2, 3], options=OPTIONS))
ok("generate keep_alive", lambda: client.generate(TINY, PROMPT, keep_alive="10m", options=OPTIONS))
ok("generate without prompt", lambda: client.generate(TINY))
ok("generate num_ctx", lambda: client.generate(TINY, PROMPT, options={**OPTIONS, "num_ctx": 512}))
ok("chat logprobs", lambda: client.chat(TINY, MESSAGES, options=OPTIONS, logprobs=True, top_logprobs=2))
ok("chat schema", lambda: client.chat(MODEL, MESSAGES, format=COLOUR_SCHEMA, options={**OPTIONS, "num_predict": 16}))
ok("chat tools", lambda: client.chat(MODEL, MESSAGES, tools=[WEATHER_TOOL], options=OPTIONS))
ok("chat tools stream", lambda: list(client.chat(TINY, MESSAGES, tools=[WEATHER_TOOL], stream=True, options=OPTIONS)))
ok("embed", lambda: client.embed(EMBED, PROMPT))
ok("embed two", lambda: client.embed(EMBED, ["the sky", "the sea"]))
ok("embeddings", lambda: client.embeddings(EMBED, PROMPT))
either("embed with a chat model", lambda: client.embed(TINY, PROMPT))
either("chat with an embedding model", lambda: client.chat(EMBED, MESSAGES))
either("generate image", lambda: client.generate(TINY, PROMPT, images=[PIXEL], options=OPTIONS))
either("generate suffix", lambda: client.generate(TINY, "def f(", suffix="return 1", options=OPTIONS))
either("chat think", lambda: client.chat(TINY, MESSAGES, think=True, options=OPTIONS))

refused("generate unknown", lambda: client.generate(UNKNOWN, PROMPT))
refused("generate stream unknown", lambda: list(client.generate(UNKNOWN, PROMPT, stream=True)))
refused("chat unknown", lambda: client.chat(UNKNOWN, MESSAGES))
refused("embed unknown", lambda: client.embed(UNKNOWN, PROMPT))
refused("show unknown", lambda: client.show(UNKNOWN))
refused("delete unknown", lambda: client.delete(UNKNOWN))
refused("bad option", lambda: client.generate(TINY, PROMPT, options={"num_predict": "many"}))
refused("bad keep_alive", lambda: client.generate(TINY, PROMPT, keep_alive="soon"))
refused("pull without network", lambda: client.pull(UNKNOWN))

ok("create", lambda: client.create("python-made", from_=TINY, system="Be brief.", parameters=OPTIONS))
ok("create stream", lambda: list(client.create("python-made", from_=TINY, parameters=OPTIONS, stream=True)))
ok("chat created", lambda: client.chat("python-made", MESSAGES))
ok("copy", lambda: client.copy("python-made", "python-copied"))
ok("delete copy", lambda: client.delete("python-copied"))
ok("unload", lambda: client.generate("python-made", keep_alive=0))
ok("delete", lambda: client.delete("python-made"))


async def asynchronous():
    client = ollama.AsyncClient(host=BASE_URL)

    async def collect(stream):
        return [part async for part in await stream]

    results = {
        "generate": await client.generate(TINY, PROMPT, options=OPTIONS),
        "generate stream": await collect(client.generate(TINY, PROMPT, stream=True, options=OPTIONS)),
        "chat": await client.chat(TINY, MESSAGES, options=OPTIONS),
        "chat stream": await collect(client.chat(TINY, MESSAGES, stream=True, options=OPTIONS)),
        "embed": await client.embed(EMBED, PROMPT),
        # Ollama sorts by expiry, which the proxy changes on purpose.
        "ps": sorted((await client.ps()).models, key=lambda m: m.model),
    }
    # Concurrent requests are answered in any order, but each gets its own answer.
    results["at once"] = await asyncio.gather(
        *(client.generate(TINY, f"Count from {n}.", raw=True, options=OPTIONS) for n in range(4))
    )
    return results


ok("async", lambda: asyncio.run(asynchronous()))


async def asynchronous_unknown():
    await ollama.AsyncClient(host=BASE_URL).chat(UNKNOWN, MESSAGES)


refused("async unknown", lambda: asyncio.run(asynchronous_unknown()))
done()
