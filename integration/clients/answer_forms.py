"""What Python's clients collect from streams that a server has recorded, by path and name."""

import json
import urllib.request

import anthropic
import ollama
import openai

from record import BASE_URL, PROMPT, done, ok, plain

MESSAGES = [{"role": "user", "content": PROMPT}]
native = ollama.Client(host=BASE_URL)
ai = openai.OpenAI(base_url=BASE_URL + "/v1", api_key="unused", max_retries=0)
messages = anthropic.Anthropic(base_url=BASE_URL, api_key="unused", max_retries=0)


def joined(parts, *path):
    """Puts together the texts or lists that the parts have at a path."""
    result = None
    for part in parts:
        for step in path:
            part = part.get(step) if isinstance(part, dict) else None
        if part:
            result = part if result is None else result + part
    return result


def chat(name):
    parts = [plain(p) for p in native.chat(name, MESSAGES, stream=True)]
    end = {k: v for k, v in parts[-1].items() if k not in ("message", "logprobs")}
    return [end, joined(parts, "logprobs")] + [
        joined(parts, "message", member) for member in ("content", "thinking", "tool_calls")]


def generate(name):
    parts = [plain(p) for p in native.generate(name, PROMPT, stream=True)]
    end = {k: v for k, v in parts[-1].items() if k not in ("response", "thinking", "logprobs")}
    return [end] + [joined(parts, member) for member in ("response", "thinking", "logprobs")]


def chats(name):
    with ai.chat.completions.stream(model=name, messages=MESSAGES, stream_options={"include_usage": True}) as stream:
        stream.until_done()
        final = plain(stream.current_completion_snapshot)  # get_final_completion refuses those cut off
    for choice in final["choices"]:  # Ollama before 0.33 has the role in each chunk; the client joins them
        choice["message"]["role"] = choice["message"]["role"][:len("assistant")]
    return final


def completions(name):
    parts = [plain(p) for p in ai.completions.create(
        model=name, prompt=PROMPT, stream=True, stream_options={"include_usage": True})]
    texts = [c for p in parts for c in p["choices"]]
    return [parts[-1], texts[-1]["finish_reason"], joined(texts, "text")]


def responses(name):
    events = list(ai.responses.create(model=name, input=PROMPT, stream=True))
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    try:
        with ai.responses.stream(model=name, input=PROMPT) as stream:
            helper = plain(stream.get_final_response())
    except RuntimeError:  # of two calls at one index, in Ollama's own streams before 0.33
        helper = None
    return {"final": plain(events[-1].response), "deltas": deltas, "helper": helper}


def message(name):
    with messages.messages.stream(model=name, messages=MESSAGES, max_tokens=9) as stream:
        texts = "".join(stream.text_stream)
        return {"final": plain(stream.get_final_message()), "texts": texts}


BY_PATH = {
    "/api/chat": chat, "/api/generate": generate, "/v1/chat/completions": chats,
    "/v1/completions": completions, "/v1/responses": responses, "/v1/messages": message,
}

with urllib.request.urlopen(BASE_URL + "/forms") as answer:
    forms = json.load(answer)
for path, name in forms:
    ok(name, lambda: BY_PATH[path](name))
done()
