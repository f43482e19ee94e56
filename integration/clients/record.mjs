// Names the results of a client's calls and prints them as one JSON document, as record.py does.

export const baseURL = process.env.CLIENT_BASE_URL;
export const model = "smollm2";
export const tiny = "gen-llama-tiny";
export const embedder = "gen-llama-embed";
export const unknown = "no-such-model";
export const prompt = "Why is the sky blue?";
export const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: prompt }];
export const weather = {
  type: "object",
  properties: { city: { type: "string", description: "A city." } },
  required: ["city"],
};
export const weatherTool = {
  type: "function",
  function: { name: "weather", description: "The weather in a city.", parameters: weather },
};

const volatile = new Set([
  "id", "item_id", "call_id", "tool_call_id", "response_id", "created", "created_at", "completed_at", "expires_at",
  "modified_at", "system_fingerprint",
]);
const results = {};

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value)
      .filter(([k]) => !volatile.has(k) && !k.endsWith("_duration"))
      .map(([k, v]) => [k, plain(v)]));
  }
  if (typeof value === "string") {
    return value.replaceAll(baseURL, "BASE_URL").replaceAll(baseURL.replace("http://", ""), "BASE_ADDR")
      .replaceAll(/\(ref: [^)]*\)|req_[0-9a-f]+/g, "(id)");
  }
  return value;
}

function refusal(e) {
  return { error: e.name, status: e.status ?? e.status_code ?? e.statusCode ?? null, message: plain(e.message) };
}

function record(name, result) {
  if (name in results) throw new Error(`two results are named ${name}`);
  results[name] = result ?? null;
}

/** Collects a stream; a call that returns one is awaited first. */
export async function collect(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(structuredClone(part));
  return parts;
}

/** Records what the call returns; it must not fail. */
export async function ok(name, call) {
  try {
    record(name, plain(JSON.parse(JSON.stringify((await call()) ?? null))));
  } catch (e) {
    throw new Error(`${name} failed`, { cause: e });
  }
}

/** Records how the call is refused; it must not succeed. */
export async function refused(name, call) {
  let result;
  try {
    result = await call();
  } catch (e) {
    record(name, refusal(e));
    return;
  }
  throw new Error(`${name} should have been refused, and returned ${JSON.stringify(result)}`);
}

/** Records the outcome: an answer or a refusal. */
export async function either(name, call) {
  try {
    record(name, plain(JSON.parse(JSON.stringify((await call()) ?? null))));
  } catch (e) {
    record(name, refusal(e));
  }
}

export function done() {
  process.stdout.write(JSON.stringify(results) + "\n");
}
