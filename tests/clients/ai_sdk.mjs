// The AI SDK's own chat, without React: what its user sees of a conversation, by each of its versions.

import * as ai5 from "ai5";
import * as ai6 from "ai6";
import * as ai7 from "ai7";

const SDKS = { ai5, ai6, ai7 };

// What React's state would hold, and every status that it held.
class State {
  #status = "ready";
  #onChange = () => {};
  error = undefined;
  messages = [];
  statuses = [];

  get status() {
    return this.#status;
  }

  set status(status) {
    this.#status = status;
    this.statuses.push(status);
    this.#onChange();
  }

  pushMessage = (message) => {
    this.messages = [...this.messages, message];
    this.#onChange();
  };

  popMessage = () => {
    this.messages = this.messages.slice(0, -1);
    this.#onChange();
  };

  replaceMessage = (index, message) => {
    this.messages = this.messages.map((each, place) => (place === index ? structuredClone(message) : each));
    this.#onChange();
  };

  snapshot = (value) => structuredClone(value);

  when(condition) {
    return new Promise((resolve) => {
      this.#onChange = () => condition(this) && resolve();
      this.#onChange();
    });
  }
}

// A fetch whose connection can be cut, as a lost network does it.
class Line {
  #cut = new AbortController();

  fetch = (url, init) => {
    this.#cut = new AbortController();
    return fetch(url, { ...init, signal: AbortSignal.any([this.#cut.signal, ...(init.signal ? [init.signal] : [])]) });
  };

  cut() {
    this.#cut.abort(new TypeError("network error"));
  }
}

function chatOf(sdk, transport, messages) {
  const state = new State();
  state.messages = messages;
  class Chat extends sdk.AbstractChat {
    constructor() {
      super({ id: "chat-1", state, transport, onFinish: (finish) => (this.finish = finish) });
    }
  }
  return { chat: new Chat(), state };
}

function transportOf(sdk, { url, transport = "ui", headers = {}, body, fetch }) {
  if (transport === "text") {
    return new sdk.TextStreamChatTransport({ api: url, headers: { Accept: "text/plain", ...headers }, body, fetch });
  }
  return new sdk.DefaultChatTransport({ api: url, headers, body, fetch });
}

export function textOf(message) {
  return message.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
}

function told(error) {
  return error ? { name: error.name, message: error.message, status: error.statusCode ?? null } : null;
}

function ask(chat, { say, parts, regenerate, resume }) {
  if (regenerate) return chat.regenerate();
  if (resume) return chat.resumeStream();
  return chat.sendMessage(parts ? { parts } : { text: say });
}

// What else happens in a turn, once that much text of its answer is there.
const EVENTS = {
  stop: ({ chat }) => chat.stop(),
  cut: ({ line }) => line.cut(),
  call: ({ turn }) => fetch(turn.url),
};

// A turn is {say}, {parts}, {regenerate: true} or {resume: true}, and perhaps one of the events: {stop: "Hello"}.
async function take(chat, state, line, turn) {
  chat.finish = undefined;
  state.statuses = [];
  const asked = ask(chat, turn);
  for (const [name, happen] of Object.entries(EVENTS)) {
    if (turn[name] === undefined) continue;
    await state.when(({ messages, statuses }) => {
      const last = messages.at(-1);
      const begun = !turn.resume || statuses.includes("streaming"); // a resumed text may be there from before
      return begun && last?.role === "assistant" && textOf(last).includes(turn[name]);
    });
    await happen({ chat, line, turn });
  }
  await asked;
  const { isAbort, isDisconnect, isError } = chat.finish ?? {};
  const finish = chat.finish ? { isAbort, isDisconnect, isError } : null;
  return { status: chat.status, statuses: state.statuses, error: told(chat.error), finish, messages: chat.messages };
}

export async function talk({ version, turns, messages = [], ...options }) {
  const sdk = SDKS[version];
  const line = new Line();
  const { chat, state } = chatOf(sdk, transportOf(sdk, { ...options, fetch: line.fetch }), messages);
  const seen = [];
  for (const turn of turns) {
    seen.push(structuredClone(await take(chat, state, line, turn)));
  }
  return seen;
}

async function readMessages(sdk, stream) {
  const errors = [];
  let message = null;
  for await (message of sdk.readUIMessageStream({ stream, onError: (error) => errors.push(told(error)) }));
  return { message, errors };
}

async function readChunks(stream) {
  const chunks = [];
  try {
    for await (const chunk of stream) chunks.push(chunk);
    return { chunks, broken: null };
  } catch (error) {
    return { chunks, broken: told(error) };
  }
}

// The transport by itself: every chunk that it lets through, and the message that they make.
export async function read({ version, say, bytes, ...options }) {
  const sdk = SDKS[version];
  const fetch = bytes === undefined ? undefined : async () => new Response(Buffer.from(bytes, "base64"));
  const transport = transportOf(sdk, { ...options, fetch });
  const messages = [{ id: "message-1", role: "user", parts: [{ type: "text", text: say }] }];
  const stream = await transport.sendMessages({ chatId: "chat-1", trigger: "submit-message", messages });
  const [first, second] = stream.tee();
  const [chunks, read] = await Promise.all([readChunks(first), readMessages(sdk, second)]);
  return { ...chunks, ...read };
}

export async function reconnect({ version, chatId = "chat-1", ...options }) {
  const sdk = SDKS[version];
  const stream = await transportOf(sdk, options).reconnectToStream({ chatId });
  return { stream: stream === null ? null : "a stream" };
}
