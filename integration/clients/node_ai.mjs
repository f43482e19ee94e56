// The AI SDK (ai) with ollama-ai-provider-v2.

import { embed, embedMany, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { createOllama } from "ollama-ai-provider-v2";
import { baseURL, collect, done, embedder, model, ok, prompt, refused, tiny, unknown, weather } from "./record.mjs";

const ollama = createOllama({ baseURL: baseURL + "/api" });
// The provider sends the SDK's own settings where Ollama does not read them.
const providerOptions = { ollama: { options: { temperature: 0, seed: 1, num_predict: 8 } } };
const fixed = { prompt, instructions: "Be brief.", providerOptions, maxRetries: 0 };
const tools = { weather: tool({ description: "The weather in a city.", inputSchema: jsonSchema(weather) }) };

// The SDK's result for an answer, without the request and its times.
const parts = ({ text, finishReason, usage, toolCalls }) => ({ text, finishReason, usage, toolCalls });

await ok("text", async () => parts(await generateText({ model: ollama(model), ...fixed })));
await ok("text tiny", async () => parts(await generateText({ model: ollama(tiny), ...fixed })));
await ok("text tools", async () =>
  parts(await generateText({ model: ollama(tiny), tools, stopWhen: stepCountIs(1), ...fixed })));
await ok("stream", () => collect(streamText({ model: ollama(tiny), ...fixed }).textStream));
await ok("embed", async () => (await embed({ model: ollama.embedding(embedder), value: prompt })).embedding);
await ok("embed many", async () =>
  (await embedMany({ model: ollama.embedding(embedder), values: ["the sky", "the sea"] })).embeddings);
await refused("text unknown", () => generateText({ model: ollama(unknown), ...fixed }));
await refused("embed unknown", () => embed({ model: ollama.embedding(unknown), value: prompt, maxRetries: 0 }));
done();
