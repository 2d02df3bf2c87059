// @ts-check
/** The page's hands: the composer asks, an answer is shown while it comes, and the conversation is remembered. */

import {stream, StreamError} from "../streamchat.js";
import {AnswerView} from "./answer.js";
import {Follow} from "./follow.js";
import {TokenPrompt} from "./token.js";

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @returns {T}
 */
function byId(id) {
  return /** @type {T} */ (document.getElementById(id));
}

const endpoint = /** @type {string} */ (document.body.dataset.endpoint);
const form = /** @type {HTMLFormElement} */ (byId("composer"));
const box = /** @type {HTMLTextAreaElement} */ (byId("message"));
const log = byId("log");
const tokens = new TokenPrompt(byId("token"));
const follow = new Follow((following) => {
  byId("latest").hidden = following;
});
// A tick of work this long lets the page paint and listen before it goes on.
const SLICE_MS = 8;
// Errors whose own words are for programmers, or that say when to come back.
/** @type {Record<string, string>} */
const WORDS = {
  unauthorized: "You are not signed in",
  too_many_streams: "Limited",
  budget_exhausted: "Limited",
  overloaded: "The server is busy",
  draining: "The server is restarting",
  upstream_rate_limited: "The model is busy",
};
// Retrying cannot mend these, though their status is one of the server's.
const FINAL = ["upstream_quota", "upstream_auth", "upstream_rejected"];

/** @type {{question: string, view: AnswerView}[]} */
let turns = [];
/** @type {AbortController | null} */
let running = null;

/** @param {string} question */
function ask(question) {
  turns.at(-1)?.view.settle();
  showQuestion(question);
  const view = newAnswer();
  turns.push({question, view});
  document.body.classList.add("talking");
  follow.resume();
  return answer();
}

/** @param {string} question */
function showQuestion(question) {
  const template = /** @type {HTMLTemplateElement} */ (byId("question-template"));
  const element = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
  /** @type {HTMLElement} */ (element.querySelector(".text")).textContent = question;
  log.append(element);
}

function newAnswer() {
  const view = new AnswerView(byId("answer-template"), () => follow.grown());
  view.retry.addEventListener("click", retry);
  log.append(view.element);
  return view;
}

function retry() {
  const turn = turns[turns.length - 1];
  turn.view.settle();
  turn.view.element.remove();
  turn.view = newAnswer();
  box.focus();
  follow.resume();
  void answer();
}

/** The answer of the last turn. */
async function answer() {
  const {view} = turns[turns.length - 1];
  running = new AbortController();
  document.body.classList.add("answering");
  try {
    await read(view, running.signal);
  } catch (error) {
    if (error instanceof StreamError && error.status === 401 && "asksToken" in document.body.dataset) {
      if (await tokens.ask()) {
        await answer();
        return;
      }
    }
    view.end(endOf(error, view));
  } finally {
    running = null;
    document.body.classList.remove("answering");
  }
}

/**
 * @param {AnswerView} view
 * @param {AbortSignal} signal
 */
async function read(view, signal) {
  let since = performance.now();
  const csrf = document.querySelector("meta[name=csrf-token]")?.getAttribute("content");
  const headers = {...tokens.headers, ...(csrf ? {"X-CSRFToken": csrf} : {})};
  for await (const event of stream(endpoint, {messages: conversation(), headers, signal})) {
    if (event.type === "text" || event.type === "refusal") view.append(event.text);
    else if (event.type === "reasoning") view.think(event.text);
    else if (event.type === "finish") view.finish(event.finish_reason);
    if (performance.now() - since > SLICE_MS) {
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
  }
}

/** What has been said, the open question last. A question that was never answered is not asked again. */
function conversation() {
  const answered = turns.slice(0, -1).filter(({view}) => view.text.trim());
  const said = answered.flatMap(({question, view}) => [
    {role: /** @type {const} */ ("user"), content: question},
    {role: /** @type {const} */ ("assistant"), content: view.text},
  ]);
  return [...said, {role: /** @type {const} */ ("user"), content: turns[turns.length - 1].question}];
}

/**
 * How an answer that is not whole is shown.
 *
 * @param {unknown} error
 * @param {AnswerView} view
 */
function endOf(error, view) {
  if (running?.signal.aborted) return {state: "stopped", retry: true};
  if (!(error instanceof StreamError)) throw error;
  const {code, message, retryAfter, status} = error;
  const retry = (error.retryable && !FINAL.includes(code)) || status === 401;
  // Without words of its own, the state says it already.
  if (view.text) return {state: "cut", words: code.endsWith("incomplete") ? undefined : `Cut off. ${message}`, retry};
  const words = WORDS[code] ?? (status === 429 ? "Limited" : message);
  const state = status === 429 || retryAfter !== null ? "limited" : "failed";
  return {state, words, seconds: retryAfter, retry};
}

function stop() {
  running?.abort();
  box.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = box.value.trim();
  if (!question || running) return;
  box.value = "";
  fit();
  box.focus();
  void ask(question);
});

box.addEventListener("keydown", (event) => {
  // While an input method composes, Enter chooses a word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});

/** The box grows with its text where the browser does not do it by `field-sizing`. */
function fit() {
  if (CSS.supports("field-sizing", "content")) return;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

box.addEventListener("input", fit);
byId("stop").addEventListener("click", stop);
byId("latest").addEventListener("click", () => follow.resume());
byId("new").addEventListener("click", () => {
  stop();
  turns = [];
  log.replaceChildren();
  document.body.classList.remove("talking");
});

log.addEventListener("click", (event) => {
  const button = /** @type {HTMLElement} */ (event.target).closest("button");
  const turn = turns.find(({view}) => view.copy === button);
  if (turn) void copy(turn.view.copy, turn.view.text);
  const figure = button?.closest("figure");
  if (button && figure) void copy(button, codeOf(figure));
});

/**
 * The code of a block, also where it was cut into several figures.
 *
 * @param {Element | null | undefined} figure
 * @returns {string}
 */
function codeOf(figure) {
  if (!figure) return "";
  const code = figure.querySelector("code")?.textContent ?? "";
  if (!figure.classList.contains("goes-on")) return code;
  const next = figure.nextElementSibling ?? figure.parentElement?.nextElementSibling?.firstElementChild;
  return code + codeOf(next);
}

/**
 * @param {HTMLElement} button says so for a moment
 * @param {string} text
 */
async function copy(button, text) {
  const label = /** @type {HTMLElement} */ (button.querySelector("span") ?? button);
  const before = label.textContent;
  if (before === "Copied") return;
  await toClipboard(text);
  label.textContent = "Copied";
  setTimeout(() => {
    label.textContent = before;
  }, 1500);
}

/**
 * @param {string} text
 * @returns {Promise<void>}
 */
async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Plain http on another machine than one's own has no clipboard of its own.
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}
