"""A user's script: a few questions to a model, through the unmodified ollama package."""

import json
import sys

import ollama

client = ollama.Client()  # for the server in OLLAMA_HOST
for question in sys.argv[2:]:
    answer = client.chat(
        model=sys.argv[1],
        messages=[{"role": "user", "content": question}],
        options={"temperature": 0, "seed": 1, "num_predict": 24},
    )
    print(json.dumps({"text": answer.message.content, "load_seconds": answer.load_duration / 1e9}))
