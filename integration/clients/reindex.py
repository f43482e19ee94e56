"""Embeds a corpus with langchain-ollama and openai, and again, three times, when 1 in 100 of its
chunks has changed.

Prints the seconds that it took at first, and then at least: the machine may have more to do in one
of the runs.
"""

import json
import os
import sys
import time

from langchain_ollama import OllamaEmbeddings
from openai import OpenAI

from record import BASE_URL, EMBED

chunks = json.load(open(os.environ["CLIENT_CHUNKS"]))
langchain = OllamaEmbeddings(model=EMBED, base_url=BASE_URL)
openai = OpenAI(base_url=BASE_URL + "/v1", api_key="none")


def with_langchain(texts):
    return langchain.embed_documents(texts)


def with_openai(texts):
    vectors = []
    for i in range(0, len(texts), 500):
        answer = openai.embeddings.create(model=EMBED, input=texts[i : i + 500])
        vectors += [d.embedding for d in answer.data]
    return vectors


seconds = []
for embed in (with_langchain, with_openai):
    took = []
    for changed in range(4):
        mark = "changed " * changed
        texts = [f"{embed.__name__} {'' if i % 100 else mark}{c}" for i, c in enumerate(chunks)]
        start = time.monotonic()
        vectors = embed(texts)
        took.append(time.monotonic() - start)
        if len(vectors) != len(texts):
            sys.exit(f"{len(vectors)} vectors for {len(texts)} texts")
    seconds += [took[0], min(took[1:])]
json.dump(seconds, sys.stdout)
