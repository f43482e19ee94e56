"""The Python client anthropic against /v1/messages."""

import anthropic

from record import BASE_URL, MODEL, PROMPT, TINY, UNKNOWN, WEATHER_PARAMETERS, done, either, ok, refused

client = anthropic.Anthropic(base_url=BASE_URL, api_key="unused", max_retries=0)
MESSAGES = [{"role": "user", "content": PROMPT}]
# This version of the client has no parameter for the temperature.
FIXED = {"max_tokens": 8, "extra_body": {"temperature": 0}}
TOOL = {"name": "weather", "description": "The weather in a city.", "input_schema": WEATHER_PARAMETERS}


def stream(**more):
    with client.messages.stream(model=TINY, messages=MESSAGES, **FIXED, **more) as events:
        return list(events)


for model in (MODEL, TINY):
    ok(f"messages {model}", lambda: client.messages.create(model=model, messages=MESSAGES, **FIXED))
ok("messages system", lambda: client.messages.create(model=TINY, messages=MESSAGES, system="Be brief.", **FIXED))
ok("messages blocks", lambda: client.messages.create(model=TINY, messages=[
    {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
    *MESSAGES,
], **FIXED))
ok("messages tools", lambda: client.messages.create(model=MODEL, messages=MESSAGES, tools=[TOOL], **FIXED))
ok("stream helper", stream)
ok("stream helper tools", lambda: stream(tools=[TOOL]))
ok("stream", lambda: list(client.messages.create(model=TINY, messages=MESSAGES, stream=True, **FIXED)))
either("count tokens", lambda: client.messages.count_tokens(model=TINY, messages=MESSAGES))
either("models", lambda: sorted(m.id for m in client.models.list()))
refused("unknown", lambda: client.messages.create(model=UNKNOWN, messages=MESSAGES, **FIXED))
refused("stream unknown", lambda: list(client.messages.create(model=UNKNOWN, messages=MESSAGES, stream=True, **FIXED)))
refused("without messages", lambda: client.messages.create(model=TINY, messages=[], **FIXED))
done()
