// Streams of the npm client openai that wait longer than the client's timeout for an answer's
// header. See heartbeat.py.

import OpenAI from "openai";
import { baseURL, prompt, tiny } from "./record.mjs";

const client = new OpenAI({ baseURL: baseURL + "/v1", apiKey: "unused", maxRetries: 0, timeout: 3000 });

const result = async (ask) => {
  let events = 0;
  try {
    for await (const _ of await ask()) events++;
    return events > 0 ? "streamed" : "nothing";
  } catch (e) {
    return e instanceof OpenAI.APIConnectionTimeoutError ? "timeout" : "error: " + e.message;
  }
};

const asked = {
  chat: (end) => client.chat.completions.create({
    model: tiny, messages: [{ role: "user", content: prompt + end }], max_tokens: 8, stream: true,
  }),
  response: (end) => client.responses.create({ model: tiny, input: prompt + end, max_output_tokens: 16, stream: true }),
};
const results = {};
await Promise.all(Object.entries(asked).flatMap(([name, ask]) => ["", " FAIL"].map(async (end) => {
  results[name + end] = await result(() => ask(end));
})));
console.log(JSON.stringify(results));
