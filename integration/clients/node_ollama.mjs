// The npm client ollama.

import { Ollama } from "ollama";
import { baseURL, collect, done, either, embedder, messages, model, ok, prompt, refused, tiny, unknown, weatherTool } from "./record.mjs";

const client = new Ollama({ host: baseURL });
const byName = (models) => models.sort((a, b) => (a.name < b.name ? -1 : 1));
const options = { temperature: 0, seed: 1, num_predict: 8 };

await ok("version", () => client.version());
// Equally old models are in no particular order.
await ok("list", async () => byName((await client.list()).models));
await ok("show", () => client.show({ model: tiny }));
await ok("generate", () => client.generate({ model, prompt, options }));
await ok("generate stream", () => collect(client.generate({ model: tiny, prompt, options, stream: true })));
await ok("chat", () => client.chat({ model: tiny, messages, options }));
await ok("chat stream", () => collect(client.chat({ model: tiny, messages, options, stream: true })));
await ok("chat tools", () => client.chat({ model, messages, options, tools: [weatherTool] }));
await ok("chat json", () => client.chat({ model: tiny, messages, options, format: "json" }));
await ok("chat keep_alive", () => client.chat({ model: tiny, messages, options, keep_alive: 600 }));
await ok("embed", () => client.embed({ model: embedder, input: ["the sky", "the sea"] }));
await ok("embeddings", () => client.embeddings({ model: embedder, prompt }));
await either("image", () => client.generate({ model: tiny, prompt, options, images: ["iVBORw0KGgo="] }));
await ok("create", () => client.create({ model: "node-made", from: tiny, parameters: options }));
await ok("copy", () => client.copy({ source: "node-made", destination: "node-copied" }));
await ok("delete copy", () => client.delete({ model: "node-copied" }));
await ok("delete", () => client.delete({ model: "node-made" }));
await ok("generate last", () => client.generate({ model: tiny, prompt, options }));
// Ollama sorts by expiry, which the proxy changes on purpose.
await ok("ps", async () => byName((await client.ps()).models));
await refused("generate unknown", () => client.generate({ model: unknown, prompt }));
await refused("chat stream unknown", () => client.chat({ model: unknown, messages, stream: true }));
await refused("show unknown", () => client.show({ model: unknown }));
done();
