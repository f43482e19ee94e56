"""What a user's script does: a few questions to a model, through the ollama package as it is."""

import json
import sys

import ollama

client = ollama.Client()  # the server is the one that OLLAMA_HOST names
for question in sys.argv[2:]:
    answer = client.chat(
        model=sys.argv[1],
        messages=[{"role": "user", "content": question}],
        options={"temperature": 0, "seed": 1, "num_predict": 24},
    )
    print(json.dumps({"text": answer.message.content, "load_seconds": answer.load_duration / 1e9}))
