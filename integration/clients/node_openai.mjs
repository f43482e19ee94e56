// The npm client openai against /v1.

import OpenAI from "openai";
import { baseURL, collect, done, either, embedder, messages, model, ok, prompt, refused, tiny, unknown, weatherTool } from "./record.mjs";

const client = new OpenAI({ baseURL: baseURL + "/v1", apiKey: "unused", maxRetries: 0 });
const fixed = { temperature: 0, seed: 1, max_tokens: 8 };
const chat = (more) => client.chat.completions.create({ model: tiny, messages, ...fixed, ...more });

await ok("models", async () => (await client.models.list()).data.map((m) => m.id).sort());
await ok("model", () => client.models.retrieve(tiny));
await ok("chat", () => chat({ model }));
await ok("chat stream", () => collect(chat({ stream: true, stream_options: { include_usage: true } })));
await ok("chat tools", () => chat({ model, tools: [weatherTool] }));
await ok("completions", () => client.completions.create({ model: tiny, prompt, ...fixed }));
await ok("embeddings", () => client.embeddings.create({ model: embedder, input: ["the sky", "the sea"] }));
await ok("responses", () => client.responses.create({ model: tiny, input: prompt, temperature: 0, max_output_tokens: 16 }));
await ok("responses stream", () =>
  collect(client.responses.create({ model: tiny, input: prompt, temperature: 0, max_output_tokens: 16, stream: true })));
await either("without messages", () => chat({ messages: [] }));
await refused("chat unknown", () => chat({ model: unknown }));
await refused("embeddings unknown", () => client.embeddings.create({ model: unknown, input: prompt }));
await refused("model unknown", () => client.models.retrieve(unknown));
done();
