"""litellm, with Ollama's own API and with the one for OpenAI's clients."""

import asyncio

import litellm

from record import BASE_URL, EMBED, MODEL, PROMPT, TINY, UNKNOWN, WEATHER_TOOL, done, ok, refused

litellm.suppress_debug_info = True  # which would go to standard output
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
FIXED = {"messages": MESSAGES, "temperature": 0, "seed": 1, "max_tokens": 8, "num_retries": 0}
PROVIDERS = {
    "ollama_chat": {"api_base": BASE_URL},
    "ollama": {"api_base": BASE_URL},
    "openai": {"api_base": BASE_URL + "/v1", "api_key": "unused"},
}

for provider, where in PROVIDERS.items():

    def complete(model=TINY, **more):
        return litellm.completion(model=f"{provider}/{model}", **where, **FIXED, **more)

    async def astream():
        answer = await litellm.acompletion(model=f"{provider}/{TINY}", stream=True, **where, **FIXED)
        return [part async for part in answer]

    ok(f"{provider} completion", complete)
    ok(f"{provider} stream", lambda: list(complete(stream=True)))
    ok(f"{provider} async stream", lambda: asyncio.run(astream()))
    refused(f"{provider} unknown", lambda: complete(UNKNOWN))

ok("tools", lambda: litellm.completion(
    model="openai/" + MODEL, tools=[WEATHER_TOOL], **PROVIDERS["openai"], **FIXED))
ok("ollama embedding", lambda: litellm.embedding(model="ollama/" + EMBED, input=["the sky"], **PROVIDERS["ollama"]))
ok("openai embedding", lambda: litellm.embedding(
    model="openai/" + EMBED, input=["the sky"], encoding_format="float", **PROVIDERS["openai"]))
done()
