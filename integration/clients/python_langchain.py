"""langchain-ollama."""

import asyncio

from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

from record import BASE_URL, COLOUR_SCHEMA, EMBED, MODEL, PROMPT, TINY, UNKNOWN, WEATHER_TOOL, done, ok, refused

FIXED = {"base_url": BASE_URL, "temperature": 0, "seed": 1, "num_predict": 8}
MESSAGES = [("system", "Be brief."), ("human", PROMPT)]
chat = ChatOllama(model=TINY, **FIXED)
llm = OllamaLLM(model=TINY, **FIXED)
embeddings = OllamaEmbeddings(model=EMBED, base_url=BASE_URL)


async def asynchronous():
    return {
        "invoke": await chat.ainvoke(MESSAGES),
        "stream": [part async for part in chat.astream(MESSAGES)],
        "embed": await embeddings.aembed_query(PROMPT),
    }


def validate_unknown():
    try:
        ChatOllama(model=UNKNOWN, validate_model_on_init=True, base_url=BASE_URL)
    except ValueError as e:
        # The message continues with the available models, in any order.
        return str(e).partition("Available local models")[0]
    raise RuntimeError("it should have been refused")


ok("chat", lambda: ChatOllama(model=MODEL, **FIXED).invoke(MESSAGES))
ok("chat validated", lambda: ChatOllama(model=TINY, validate_model_on_init=True, **FIXED).invoke(MESSAGES))
ok("chat stream", lambda: list(chat.stream(MESSAGES)))
ok("async", lambda: asyncio.run(asynchronous()))
ok("chat tools", lambda: chat.bind_tools([WEATHER_TOOL]).invoke(MESSAGES))
ok("chat schema", lambda: ChatOllama(model=MODEL, format=COLOUR_SCHEMA, **{**FIXED, "num_predict": 16}).invoke(MESSAGES))
ok("chat keep_alive", lambda: ChatOllama(model=TINY, keep_alive="1h", **FIXED).invoke(MESSAGES))
ok("llm", lambda: llm.invoke(PROMPT))
ok("llm stream", lambda: list(llm.stream(PROMPT)))
ok("embed", lambda: embeddings.embed_documents(["the sky", "the sea"]))
refused("chat unknown", lambda: ChatOllama(model=UNKNOWN, **FIXED).invoke(MESSAGES))
refused("llm unknown", lambda: OllamaLLM(model=UNKNOWN, **FIXED).invoke(PROMPT))
ok("validate unknown", validate_unknown)
done()
