"""The Python client openai and its Files and Batch API: every step that its guide to batches has.

CLIENT_API_KEY is the client's key, CLIENT_OTHER_KEY that of somebody else. With CLIENT_INTERRUPTED
it sends only one batch of chats, of which it prints the id first, and waits through restarts.
"""

import json
import os
import sys
import time

import openai

BASE_URL = os.environ["CLIENT_BASE_URL"] + "/v1"
TINY, EMBED = "gen-llama-tiny", "gen-llama-embed"
client = openai.OpenAI(base_url=BASE_URL, api_key=os.environ["CLIENT_API_KEY"], max_retries=0)
other = openai.OpenAI(base_url=BASE_URL, api_key=os.environ["CLIENT_OTHER_KEY"], max_retries=0)
ENDED = ("completed", "failed", "cancelled", "expired")


def line(i, endpoint, body):
    return {"custom_id": f"request-{i}", "method": "POST", "url": endpoint, "body": body}


def chat(i, **more):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {i}, and why."}]
    return line(i, "/v1/chat/completions", {
        "model": TINY, "messages": messages, "max_tokens": 8, "temperature": 0, "seed": 1, **more})


def start(endpoint, lines):
    text = "".join(json.dumps(one) + "\n" for one in lines)
    file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"for": "a test"})


def end(batch):
    """Waits for the end of a batch, whatever happens to the proxy meanwhile."""
    while batch.status not in ENDED:
        try:
            batch = client.batches.retrieve(batch.id)
        except openai.APIConnectionError:
            pass
        time.sleep(0.02)
    return batch


def results(file_id):
    if not file_id:
        return []
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def described(batch):
    return {
        "status": batch.status, "counts": batch.request_counts.model_dump(), "metadata": batch.metadata,
        "errors": [e.model_dump() for e in (batch.errors.data if batch.errors else [])],
        "output": results(batch.output_file_id), "failed": results(batch.error_file_id),
    }


def refused(call):
    try:
        call()
    except openai.APIStatusError as e:
        return [type(e).__name__, e.status_code]
    return ["nothing", 0]


def interrupted(n):
    batch = start("/v1/chat/completions", [chat(i) for i in range(n)])
    print(batch.id, file=sys.stderr, flush=True)
    return {"chat": described(end(batch))}


def everything():
    found = {}
    lines = [chat(i) for i in range(12)]
    lines += [chat("refused", temperature="hot"), chat("with tools", tools=[{
        "type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}])]
    batch = end(start("/v1/chat/completions", lines))
    found["chat"] = described(batch)
    found["completions"] = described(end(start("/v1/completions", [
        line(i, "/v1/completions", {"model": TINY, "prompt": f"Once {i}", "max_tokens": 4, "temperature": 0})
        for i in range(4)])))
    found["embeddings"] = described(end(start("/v1/embeddings", [
        line(i, "/v1/embeddings", {"model": EMBED, "input": [f"text {i}", "another"]}) for i in range(4)])))
    found["direct"] = client.embeddings.create(
        model=EMBED, input=["text 0", "another"], encoding_format="float").model_dump(mode="json")
    found["invalid"] = described(end(start("/v1/chat/completions", [
        chat(0), chat(0), line(1, "/v1/embeddings", {"model": EMBED}), {"custom_id": "x"}])))
    cancelled = start("/v1/chat/completions", [chat(i, max_tokens=64) for i in range(2000)])
    while client.batches.retrieve(cancelled.id).request_counts.completed < 3:
        time.sleep(0.02)
    found["cancelling"] = client.batches.cancel(cancelled.id).status
    found["cancelled"] = described(end(cancelled))

    files = [f.id for f in client.files.list(limit=3)]  # follows the pages
    found["files"] = len(files)
    found["outputs"] = len(list(client.files.list(purpose="batch_output")))
    found["batches"] = [b.status for b in client.batches.list(limit=2)]
    found["file"] = client.files.retrieve(batch.input_file_id).model_dump(mode="json")
    found["others"] = [
        len(list(other.files.list())), len(list(other.batches.list())),
        refused(lambda: other.files.retrieve(batch.output_file_id)),
        refused(lambda: other.files.content(batch.output_file_id)),
        refused(lambda: other.files.delete(batch.input_file_id)),
        refused(lambda: other.batches.retrieve(batch.id)),
        refused(lambda: other.batches.cancel(batch.id)),
        refused(lambda: other.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h")),
    ]
    found["deleted"] = client.files.delete(batch.output_file_id).deleted
    found["gone"] = refused(lambda: client.files.content(batch.output_file_id))
    found["wrong purpose"] = refused(lambda: client.files.create(file=("x", b"x"), purpose="vision"))
    return found


n = int(os.environ.get("CLIENT_INTERRUPTED", "0"))
print(json.dumps(interrupted(n) if n else everything()))
