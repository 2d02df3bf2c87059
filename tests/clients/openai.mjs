// npm's openai against /v1: what its user gets, or the exception that is thrown.

import OpenAI from "openai";

function clientOf({ url, key = "none" }) {
  return new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0, timeout: 20_000 });
}

function told(error) {
  const kinds = [];
  for (let kind = error.constructor; kind && kind !== Object && kind.name; kind = Object.getPrototypeOf(kind)) {
    kinds.push(kind.name);
  }
  const { message, status = null, code = null, type = null, param = null } = error;
  return { kinds, message, status, code, type, param };
}

// `ask` is what stands in the request besides `stream`.
async function streamed({ ask, ...options }) {
  const chunks = [];
  try {
    for await (const chunk of await clientOf(options).chat.completions.create({ ...ask, stream: true })) {
      chunks.push(chunk);
    }
    return { chunks, error: null };
  } catch (error) {
    return { chunks, error: told(error) };
  }
}

async function whole({ ask, ...options }) {
  try {
    return { completion: await clientOf(options).chat.completions.create(ask), error: null };
  } catch (error) {
    return { completion: null, error: told(error) };
  }
}

async function gathered({ ask, ...options }) {
  const deltas = [];
  try {
    const stream = clientOf(options).chat.completions.stream(ask);
    stream.on("content", (delta) => deltas.push(delta));
    return { deltas, completion: await stream.finalChatCompletion(), error: null };
  } catch (error) {
    return { deltas, completion: null, error: told(error) };
  }
}

async function listed(options) {
  try {
    const models = [];
    for await (const model of clientOf(options).models.list()) models.push(model);
    return { models, error: null };
  } catch (error) {
    return { models: null, error: told(error) };
  }
}

// The user leaves after the first piece of text.
async function left({ ask, ...options }) {
  const stream = await clientOf(options).chat.completions.create({ ...ask, stream: true });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) {
      stream.controller.abort();
      return { content: chunk.choices[0].delta.content };
    }
  }
  return { content: null };
}

export { streamed as openaiStreamed, whole as openaiWhole, gathered as openaiGathered };
export { listed as openaiListed, left as openaiLeft };
