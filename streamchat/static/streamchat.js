// @ts-check
/**
 * streamchat's client: one question in, the events of its answer out. An ES module without dependencies or build.
 *
 *     import {stream} from "/api/assets/streamchat.js";
 *
 *     for await (const event of stream("/api/get-response", {message: "Hello!"})) {
 *       if (event.type === "text") output.textContent += event.text;
 *     }
 *
 * The loop ends by itself only after `finish`: whatever else ends an answer is thrown as a StreamError.
 */

/**
 * @typedef {{type: "start", seq: number, id: string, model: string, created_at: number}} StartEvent
 * @typedef {{type: "text", seq: number, text: string}} TextEvent
 * @typedef {{type: "reasoning", seq: number, text: string}} ReasoningEvent
 * @typedef {{type: "refusal", seq: number, text: string}} RefusalEvent
 * @typedef {{type: "tool_call", seq: number, index: number, id: ?string, name: ?string, arguments: string}} ToolCallEvent
 * @typedef {{type: "warning", code: string, message: string}} WarningEvent
 * @typedef {{input_tokens: number, output_tokens: number, total_tokens: number, estimated: boolean}} Usage
 * @typedef {{type: "finish", seq: number, finish_reason: string, usage: ?Usage}} FinishEvent
 * @typedef {StartEvent | TextEvent | ReasoningEvent | RefusalEvent | ToolCallEvent | WarningEvent | FinishEvent} Event
 */

/**
 * @typedef {{type: "error", seq: number, code: string, message: string, retryable: boolean}} FailureEvent
 * @typedef {{type: "heartbeat"}} HeartbeatEvent
 */

/**
 * @typedef {object} Question
 * @property {string} [message] one question; or `messages`
 * @property {{role: "user" | "assistant", content: string}[]} [messages] a conversation, the question last
 * @property {object} [context] your own: an object of at most 4 KB that never reaches the model
 * @property {Record<string, string>} [headers] such as `{"X-CSRFToken": ...}` or `{Authorization: "Bearer ..."}`
 * @property {RequestCredentials} [credentials] as fetch has it: "same-origin" (default), "include", "omit"
 * @property {AbortSignal} [signal] stops the answer, and with it the model; the loop throws the signal's reason
 * @property {string} [model] only where the server's settings let callers choose
 * @property {number} [temperature] the same
 * @property {number} [top_p] the same
 * @property {number} [max_output_tokens] the same
 */

/** Why an answer could not be had, or is not whole. */
export class StreamError extends Error {
  /**
   * @param {string} message
   * @param {{code: string, status?: number, retryAfter?: ?number, retryable?: boolean, requestId?: ?string,
   *   cause?: unknown}} facts
   */
  constructor(message, {code, status = 0, retryAfter = null, retryable = false, requestId = null, cause}) {
    super(message, {cause});
    this.name = "StreamError";
    /** The server's code, or one of ours: network_error, connection_lost, incomplete, malformed, not_a_stream. */
    this.code = code;
    /** The answer's HTTP status; 0 where there was none. */
    this.status = status;
    /** Seconds after which the server wants to be asked again, or null. */
    this.retryAfter = retryAfter;
    /** Whether the same question may succeed later. */
    this.retryable = retryable;
    /** X-Response-Id: by it the server's log is searched. */
    this.requestId = requestId;
  }
}

const NDJSON = "application/x-ndjson";
const SSE = "text/event-stream";
// Seconds before each attempt to take a broken answer up again; only where the server keeps it.
const RECONNECTS = [0, 0.5, 1, 2, 4, 8];

/**
 * Asks, and yields the events of the answer as they come.
 *
 * Leaving the loop early closes the connection, which stops the model unless the server keeps the answer.
 *
 * @param {string | URL} url of `get-response`
 * @param {Question} question
 * @returns {AsyncGenerator<Event, void, void>}
 */
export async function* stream(url, {headers, credentials = "same-origin", signal, ...question}) {
  const asked = {Accept: `${NDJSON}, ${SSE};q=0.9`, ...headers};
  /** @type {RequestInit} */
  const shared = {credentials, signal, cache: "no-store", headers: asked};
  /** @type {RequestInit} */
  let request = {
    ...shared, method: "POST", body: JSON.stringify(question),
    headers: {"Content-Type": "application/json", ...asked},
  };
  let [address, base, kept, id, seq, attempt] = [url, "", false, "", -1, 0];
  try {
    for (;;) {
      try {
        const response = await open(address, request);
        base ||= response.url;
        kept ||= response.headers.get("X-Stream-Resumable") === "?1";
        id ||= response.headers.get("X-Response-Id") ?? "";
        for await (const event of eventsOf(response)) {
          if (event.type === "start") id = event.id;
          if ("seq" in event) seq = event.seq;
          attempt = 0;
          signal?.throwIfAborted();
          yield event;
          if (event.type === "finish") return;
        }
        throw failure("incomplete", "The answer ended before it was whole.", response);
      } catch (error) {
        signal?.throwIfAborted();
        if (!kept || !id || !isBroken(error, request === shared) || attempt >= RECONNECTS.length) throw error;
      }
      await pause(RECONNECTS[attempt++], signal);
      address = new URL(`responses/${id}/stream?after=${seq}`, base);
      request = shared;
    }
  } finally {
    // A kept answer goes on without its reader: only a word of ours stops it.
    if (signal?.aborted && kept && id) cancel(new URL(`responses/${id}/cancel`, base), credentials, asked);
  }
}

/**
 * Tells the server to stop an answer that it keeps; whether it hears changes nothing for the caller, who has left.
 *
 * @param {URL} url
 * @param {RequestCredentials} credentials
 * @param {Record<string, string>} headers
 */
function cancel(url, credentials, headers) {
  fetch(url, {method: "POST", credentials, headers, keepalive: true}).catch(() => {});
}

/** @param {unknown} error @param {boolean} readsOn: who does meets servers that are just starting anew, too */
function isBroken(error, readsOn) {
  const {code = "", status = 0} = error instanceof StreamError ? error : {};
  return ["network_error", "connection_lost", "incomplete"].includes(code) || (readsOn && [502, 503, 504].includes(status));
}

/**
 * @param {number} seconds
 * @param {AbortSignal} [signal]
 */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, {once: true});
  });
}

/**
 * A response that is a stream of events; throws for every other.
 *
 * @param {string | URL} url
 * @param {RequestInit} init
 */
async function open(url, init) {
  let response;
  try {
    response = await fetch(url, init);
  } catch (error) {
    throw new StreamError("Network error: the server cannot be reached.", {
      code: "network_error", retryable: true, cause: error,
    });
  }
  if (!response.ok) throw await problem(response);
  if (![NDJSON, SSE].includes(kindOf(response))) {
    await response.body?.cancel(); // such as the login page that a redirect led to
    throw failure("not_a_stream", "The server sent something that is not an answer.", response, false);
  }
  return response;
}

/** @param {Response} response */
function kindOf(response) {
  return (response.headers.get("Content-Type") ?? "").split(";")[0].trim().toLowerCase();
}

/**
 * The error of a refused question: a problem document, or whatever a server in between says.
 *
 * @param {Response} response
 */
async function problem(response) {
  const document = await response.json().catch(() => null);
  const {status} = response;
  return new StreamError(document?.detail ?? `The server answered with status ${status}.`, {
    code: document?.code ?? `http_${status}`,
    status,
    retryAfter: secondsOf(response.headers.get("Retry-After")),
    retryable: status === 429 || status >= 500,
    requestId: response.headers.get("X-Response-Id"),
  });
}

/**
 * Retry-After: seconds, or a date (RFC 9110, 10.2.3).
 *
 * @param {?string} value
 */
function secondsOf(value) {
  if (value === null) return null;
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isNaN(seconds) ? null : Math.max(0, Math.ceil(seconds));
}

/**
 * @param {string} code
 * @param {string} message
 * @param {Response} response
 * @param {boolean} [retryable]
 * @param {unknown} [cause]
 */
function failure(code, message, response, retryable = true, cause = undefined) {
  const requestId = response.headers.get("X-Response-Id");
  return new StreamError(message, {code, status: response.status, retryable, requestId, cause});
}

/**
 * The events of one response up to its end, whole or not.
 *
 * @param {Response} response
 * @returns {AsyncGenerator<Event, void, void>}
 */
async function* eventsOf(response) {
  const records = kindOf(response) === SSE ? sseRecords : ndjsonRecords;
  for await (const record of records(linesOf(response))) {
    const event = parse(record, response);
    if (event.type === "error") {
      throw failure(event.code, event.message, response, event.retryable);
    }
    if (event.type !== "heartbeat") yield event;
  }
}

/**
 * @param {string} record
 * @param {Response} response
 * @returns {Event | FailureEvent | HeartbeatEvent}
 */
function parse(record, response) {
  try {
    return JSON.parse(record);
  } catch (error) {
    throw failure("malformed", "The server sent something that is not an event.", response, true, error);
  }
}

/** @param {AsyncIterable<string>} lines */
async function* ndjsonRecords(lines) {
  for await (const line of lines) {
    if (line) yield line;
  }
}

/**
 * The data of each event (WHATWG HTML, 9.2.6); comments, names and ids are left out: the data has them all.
 *
 * @param {AsyncIterable<string>} lines
 */
async function* sseRecords(lines) {
  /** @type {string[]} */
  let data = [];
  for await (const line of lines) {
    if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

/**
 * The whole lines of a body. A character whose bytes come in two reads is one character; a line that the end cuts
 * off is none.
 *
 * @param {Response} response
 */
async function* linesOf(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const {done, value} = await reader.read().catch((error) => {
        throw failure("connection_lost", "The connection broke before the answer was whole.", response, true, error);
      });
      if (done) return;
      const lines = (rest + decoder.decode(value, {stream: true})).split("\n");
      rest = /** @type {string} */ (lines.pop());
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves the loop early closes the connection
  }
}
