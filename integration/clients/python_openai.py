"""The Python client openai against /v1."""

import asyncio

import openai

from record import (
    BASE_URL, COLOUR_SCHEMA, EMBED, MODEL, PROMPT, TINY, UNKNOWN, WEATHER_PARAMETERS, WEATHER_TOOL,
    done, either, ok, refused,
)

client = openai.OpenAI(base_url=BASE_URL + "/v1", api_key="unused", max_retries=0)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
FIXED = {"temperature": 0, "seed": 1, "max_tokens": 8}


def chat(model=TINY, **more):
    return client.chat.completions.create(model=model, messages=MESSAGES, **FIXED, **more)


ok("models", lambda: sorted(m.id for m in client.models.list()))
ok("model", lambda: client.models.retrieve(TINY))
ok("chat", lambda: chat(MODEL))
ok("chat tiny", chat)
ok("chat stream", lambda: list(chat(stream=True, stream_options={"include_usage": True})))
ok("chat stream without usage", lambda: list(chat(MODEL, stream=True)))
ok("chat logprobs", lambda: chat(logprobs=True, top_logprobs=2))
ok("chat tools", lambda: chat(MODEL, tools=[WEATHER_TOOL]))
ok("chat tools stream", lambda: list(chat(tools=[WEATHER_TOOL], stream=True)))
ok("chat schema", lambda: chat(response_format={
    "type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR_SCHEMA, "strict": True},
}))
ok("raw headers", lambda: client.chat.completions.with_raw_response.create(
    model=TINY, messages=MESSAGES, **FIXED).headers["content-type"])
ok("completions", lambda: client.completions.create(model=TINY, prompt=PROMPT, **FIXED))
ok("completions stream", lambda: list(client.completions.create(model=TINY, prompt=PROMPT, stream=True, **FIXED)))
ok("embeddings", lambda: client.embeddings.create(model=EMBED, input=["the sky", "the sea"]))
ok("embeddings float", lambda: client.embeddings.create(model=EMBED, input=PROMPT, encoding_format="float"))
ok("responses", lambda: client.responses.create(
    model=TINY, input=PROMPT, instructions="Be brief.", temperature=0, max_output_tokens=16))
ok("responses stream", lambda: [e for e in client.responses.create(
    model=TINY, input=PROMPT, temperature=0, max_output_tokens=16, stream=True)])
either("responses tools", lambda: client.responses.create(
    model=TINY, input=PROMPT, temperature=0, max_output_tokens=16,
    tools=[{"type": "function", "name": "weather", "parameters": WEATHER_PARAMETERS, "strict": False}]))
either("chat image", lambda: client.chat.completions.create(model=TINY, **FIXED, messages=[{
    "role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
}]))

refused("chat unknown", lambda: chat(UNKNOWN))
refused("chat stream unknown", lambda: list(chat(UNKNOWN, stream=True)))
refused("completions unknown", lambda: client.completions.create(model=UNKNOWN, prompt=PROMPT))
refused("embeddings unknown", lambda: client.embeddings.create(model=UNKNOWN, input=PROMPT))
refused("model unknown", lambda: client.models.retrieve(UNKNOWN))
refused("responses unknown", lambda: client.responses.create(model=UNKNOWN, input=PROMPT))
refused("chat without messages", lambda: client.chat.completions.create(model=TINY, messages=[]))
refused("no such endpoint", lambda: client.moderations.create(input=PROMPT))


async def asynchronous():
    async with openai.AsyncOpenAI(base_url=BASE_URL + "/v1", api_key="unused", max_retries=0) as client:
        answer = await client.chat.completions.create(model=TINY, messages=MESSAGES, **FIXED)
        stream = await client.chat.completions.create(model=TINY, messages=MESSAGES, stream=True, **FIXED)
        return {"chat": answer, "stream": [chunk async for chunk in stream]}


ok("async", lambda: asyncio.run(asynchronous()))
done()
