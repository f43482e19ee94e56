"""Streams of the Python clients openai and anthropic that wait for a byte beyond the clients' timeout.

All are sent at once. The result of each is "streamed", or the error that the client raised. A
question contains "FAIL" if the server should answer it with an error.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai

from record import BASE_URL, PROMPT, TINY

openai_client = openai.OpenAI(base_url=BASE_URL + "/v1", api_key="unused", max_retries=0, timeout=3)
anthropic_client = anthropic.Anthropic(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=3)


def chat(prompt):
    return openai_client.chat.completions.create(
        model=TINY, messages=[{"role": "user", "content": prompt}], max_tokens=8, stream=True)


def completion(prompt):
    return openai_client.completions.create(model=TINY, prompt=prompt, max_tokens=8, stream=True)


def response(prompt):
    return openai_client.responses.create(model=TINY, input=prompt, max_output_tokens=16, stream=True)


def message(prompt):
    return anthropic_client.messages.create(
        model=TINY, messages=[{"role": "user", "content": prompt}], max_tokens=8, stream=True)


def result(ask, prompt):
    try:
        return "streamed" if list(ask(prompt)) else "nothing"
    except Exception as e:  # the HTTP library's, if it times out within a stream
        return "timeout" if "Timeout" in type(e).__name__ else "error: " + str(e)


ASKED = {"chat": chat, "completion": completion, "response": response, "message": message}
with ThreadPoolExecutor(2 * len(ASKED)) as pool:
    futures = {
        name + ending: pool.submit(result, ask, PROMPT + ending)
        for name, ask in ASKED.items() for ending in ("", " FAIL")
    }
print(json.dumps({name: future.result() for name, future in futures.items()}))
