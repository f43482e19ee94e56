"""Names the results of a client's calls and prints them as one JSON document.

What differs from run to run (ids, times, durations, the server's address) is left out.
"""

import json
import os
import re

BASE_URL = os.environ["CLIENT_BASE_URL"]
MODEL = "smollm2"
TINY = "gen-llama-tiny"
EMBED = "gen-llama-embed"
UNKNOWN = "no-such-model"
PROMPT = "Why is the sky blue?"

WEATHER_PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "A city."}},
    "required": ["city"],
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": WEATHER_PARAMETERS},
}
COLOUR_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}

VOLATILE = {
    "id", "item_id", "call_id", "tool_call_id", "response_id", "run_id", "created", "created_at", "completed_at",
    "expires_at", "modified_at", "request_id", "_request_id", "original_response_id", "x_request_id", "system_fingerprint",
}

_results = {}


def plain(value):
    """Turns a client's answer into JSON without what differs from run to run."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json", warnings=False)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in VOLATILE and not k.endswith("_duration")}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, str):
        value = value.replace(BASE_URL, "BASE_URL").replace(BASE_URL.removeprefix("http://"), "BASE_ADDR")
        return re.sub(r"\(ref: [^)]*\)|req_[0-9a-f]+", "(id)", value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def error(e):
    status = getattr(e, "status_code", None)
    return {"error": type(e).__name__, "status": status, "message": plain(str(e))}


def _record(name, result):
    if name in _results:
        raise KeyError(f"two results are named {name}")
    _results[name] = result


def ok(name, call):
    """Records what the call returns; it must not fail."""
    try:
        _record(name, plain(call()))
    except Exception as e:
        raise RuntimeError(f"{name} failed") from e


def refused(name, call):
    """Records how the call is refused; it must not succeed."""
    try:
        result = call()
    except Exception as e:
        _record(name, error(e))
        return
    raise RuntimeError(f"{name} should have been refused, and returned {result!r}")


def either(name, call):
    """Records the outcome: an answer or a refusal."""
    try:
        result = plain(call())
    except Exception as e:
        result = error(e)
    _record(name, result)


def done():
    print(json.dumps(_results))
