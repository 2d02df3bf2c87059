// @ts-check
/** One answer on the page: its text, its state in words, and the buttons that belong to the state. */

import {Markdown} from "./markdown.js";

/**
 * What the reader is told. States without words of their own get those of the error.
 *
 * @type {Record<string, string>}
 */
const WORDS = {
  waiting: "Waiting for the first words",
  thinking: "Thinking",
  writing: "Writing",
  done: "",
  stopped: "Stopped",
  cut: "Cut off: this answer is not complete.",
};
// What a whole answer says of its end; "stop" needs no words.
/** @type {Record<string, string>} */
const REASONS = {
  length: "The answer has reached its longest length.",
  content_filter: "A filter of the model's provider ended the answer.",
};

export class AnswerView {
  #frame = 0;
  #ticker = 0;
  #over = () => {};

  /**
   * @param {HTMLTemplateElement} template
   * @param {() => void} onGrown
   */
  constructor(template, onGrown) {
    const part = (/** @type {string} */ selector) =>
      /** @type {HTMLElement} */ (this.element.querySelector(selector));
    const fragment = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
    this.element = /** @type {HTMLElement} */ (fragment.firstElementChild);
    this.onGrown = onGrown;
    this.words = part(".words");
    this.seconds = part(".seconds");
    this.retry = part(".retry");
    this.copy = part(".copy");
    this.reasoning = part(".reasoning");
    this.markdown = new Markdown(part(".frozen"), part(".tail"));
    this.text = "";
    this.show("waiting");
  }

  /** @param {string} text */
  append(text) {
    this.text += text;
    this.show("writing");
    this.markdown.append(text);
    this.#draw();
  }

  /** @param {string} text */
  think(text) {
    this.reasoning.hidden = false;
    /** @type {HTMLElement} */ (this.reasoning.lastElementChild).append(text);
    if (!this.text) this.show("thinking");
    this.onGrown();
  }

  /**
   * The text is complete, or will never be.
   *
   * @param {{state: string, words?: string, seconds?: ?number, retry?: boolean}} end
   */
  end({state, words, seconds = null, retry = false}) {
    this.markdown.end();
    this.#draw(() => {
      this.show(state, words);
      this.retry.hidden = !retry;
      this.copy.hidden = this.text === "";
      if (seconds !== null) this.#countDown(seconds);
      this.onGrown();
    });
  }

  /** @param {string} reason of a whole answer's finish event */
  finish(reason) {
    this.end({state: "done", words: REASONS[reason]});
  }

  /** Nothing but the newest answer can be asked again. */
  settle() {
    this.retry.hidden = true;
    clearInterval(this.#ticker);
    this.seconds.textContent = "";
  }

  /**
   * @param {string} state
   * @param {string} [words]
   */
  show(state, words = WORDS[state]) {
    if (this.element.dataset.state === state) return;
    this.element.dataset.state = state;
    this.words.textContent = words;
  }

  /** @param {number} seconds */
  #countDown(seconds) {
    const until = performance.now() + seconds * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      this.seconds.textContent = left > 0 ? `, try again in ${left} s` : ", try again now";
      if (left <= 0) clearInterval(this.#ticker);
    };
    this.#ticker = window.setInterval(tick, 250);
    tick();
  }

  /** Draws once a frame, as long as there is something to draw; `over` is called when all is drawn. */
  #draw(over = this.#over) {
    this.#over = over;
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const all = this.markdown.render();
      this.onGrown();
      if (!all) this.#draw();
      else this.#over();
    });
  }
}
