// @ts-check
/**
 * A model's text, growing, becomes DOM: Markdown by marked, half-open markers closed by remend, cleaned by DOMPurify.
 *
 * Blocks that can change no more are rendered once and frozen; each frame renders only the unfinished last one.
 * Nothing here may load anything: HTML in the text is shown as text, images become links.
 */

import {Lexer, Marked} from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import remend from "../vendor/remend.js";

// What one step takes on: a backlog, of a tab that was hidden, must not become one long task. A long block is cut where
// a step is full, and nowhere else: the pieces in which the text came mean nothing.
const STEP_CHARS = 500;
const FRAME_MS = 6;
const SHORT = 2500; // an open block of so many characters is never cut
// No `streamdown:` addresses, no formulas; a single tilde is dealt with below.
const MEND = {linkMode: /** @type {const} */ ("text-only"), katex: false, singleTilde: false};
const CLEAN = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"], // their values are no addresses
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: /** @type {const} */ (true),
};

const purify = DOMPurify(window);
const marked = new Marked({
  gfm: true,
  tokenizer: {
    /**
     * "20~25 and 30~35" crosses nothing out.
     *
     * @param {string} source
     */
    del(source) {
      return source.startsWith("~~") ? false : undefined;
    },
  },
  renderer: {
    /**
     * <br> is what models write into table cells; every other tag is shown as it was written.
     *
     * @param {{text: string}} token
     */
    html({text}) {
      return /^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escaped(text);
    },
    /**
     * h1 and h2 are the page's own.
     *
     * @this {any}
     * @param {{tokens: any[], depth: number}} token
     */
    heading({tokens, depth}) {
      const level = Math.min(6, depth + 2);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    /**
     * Loaded, it would tell a foreign server whatever the model was made to write into its address.
     *
     * @param {{href: string, text: string}} token
     */
    image({href, text}) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    /** @param {{checked: boolean}} token */
    checkbox({checked}) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

/** @param {string} text */
function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/**
 * HTML becomes DOM that runs nothing, loads nothing, and leads nowhere but to http, https and mailto.
 *
 * @param {string} html
 * @returns {DocumentFragment}
 */
export function clean(html) {
  const fragment = purify.sanitize(html, CLEAN);
  for (const link of fragment.querySelectorAll("a")) {
    link.rel = "noopener noreferrer nofollow";
    if (link.protocol !== "mailto:") link.target = "_blank";
  }
  for (const pre of fragment.querySelectorAll("pre")) addCaption(pre);
  for (const table of fragment.querySelectorAll("table")) addScroller(table);
  // The classes that marked wrote have been read, and no others may reach the page's style sheet.
  for (const code of fragment.querySelectorAll("code[class]")) code.removeAttribute("class");
  return fragment;
}

/** @param {HTMLPreElement} pre */
function addCaption(pre) {
  const [figure, caption, button] = ["figure", "figcaption", "button"].map((name) => document.createElement(name));
  const language = /(?:^| )language-(\S+)/.exec(pre.querySelector("code")?.className ?? "");
  caption.append(language ? language[1] : "code", button);
  button.append("Copy code");
  button.setAttribute("type", "button");
  makeScroller(pre, "Code");
  pre.replaceWith(figure);
  figure.append(caption, pre);
}

/** @param {HTMLTableElement} table */
function addScroller(table) {
  const scroller = document.createElement("div");
  makeScroller(scroller, "Table");
  table.replaceWith(scroller);
  scroller.append(table);
}

/**
 * Wide content scrolls by itself, by keyboard too, and not the page.
 *
 * @param {HTMLElement} element
 * @param {string} name
 */
function makeScroller(element, name) {
  element.classList.add("wide");
  element.tabIndex = 0;
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", name);
}

/** What of a block holds its parts, where it is not the block itself. @type {Record<string, string>} */
const INNER = {FIGURE: "code", DIV: "tbody"};
// Chromium lays a paragraph and a table out as a whole: one of so many characters takes no more of its rest.
const WHOLE = ["P", "DIV"];
const JOINED = 20000;

/**
 * @param {Element} beginning
 * @param {Element} rest
 */
function mayJoin(beginning, rest) {
  const isSmall = !WHOLE.includes(rest.tagName) || (beginning.textContent ?? "").length < JOINED;
  return beginning.tagName === rest.tagName && isSmall;
}

/**
 * The rest of a cut block becomes part of its beginning again: a reader, on a screen or of one, meets no seam.
 *
 * @param {Element} beginning
 * @param {Element} rest is used up
 */
function join(beginning, rest) {
  const [into, from] = [beginning, rest].map((each) => each.querySelector(INNER[each.tagName] ?? ":not(*)") ?? each);
  if (beginning.tagName === "P") into.append(" ");
  into.append(...from.childNodes);
  beginning.classList.remove("goes-on");
  rest.remove();
}

const CLOSED_FENCE = /\n {0,3}(?:`{3,}|~{3,})\s*$/;

/**
 * Where an open block of these kinds is cut once it has grown longer than `most` characters, and the lines that its
 * rest needs in front of it to be of the same kind. Without it, each frame would cost as much as the whole block.
 *
 * @typedef {{most: number, place: (token: any) => number, carry?: (token: any) => string}} Cut
 * @type {Record<string, Cut>}
 */
const CUTS = {
  paragraph: {most: SHORT, place: ({raw}) => lastSentence(raw)},
  list: {most: SHORT, place: ({items}) => lengthOf(items.slice(0, -1))}, // marked changes the raw text of an empty last one
  table: {most: 8000, place: ({raw}) => lastLine(raw), carry: ({raw}) => firstLines(raw, 2)},
  code: {
    most: 8000,
    place: ({raw}) => (CLOSED_FENCE.test(raw) ? 0 : lastLine(raw)),
    carry: ({raw, codeBlockStyle}) => (codeBlockStyle === "indented" ? "" : firstLines(raw, 1)),
  },
  blockquote: {most: SHORT, place: ({raw}) => raw.lastIndexOf("\n>") + 1},
};

/** @param {{raw: string}[]} tokens */
function lengthOf(tokens) {
  return tokens.reduce((sum, {raw}) => sum + raw.length, 0);
}

/** @param {string} text */
function lastLine(text) {
  return text.slice(0, -1).lastIndexOf("\n") + 1;
}

/**
 * @param {string} text
 * @param {number} count
 */
function firstLines(text, count) {
  return text.split("\n", count).map((line) => `${line}\n`).join("");
}

/**
 * The place after a sentence that leaves no marker half open, and before words that open no list or heading.
 *
 * @param {string} text
 */
function lastSentence(text) {
  for (const end of [/[.!?:;,]["')\]]* /g, / /g]) {
    const places = Array.from(text.matchAll(end), ({index, 0: found}) => index + found.length);
    const place = places.reverse().slice(1, 50).find((each) => remend(text.slice(0, each).trimEnd(), MEND) ===
      text.slice(0, each).trimEnd() && /^[\p{L}"'(]/u.test(text.slice(each)));
    if (place) return place;
  }
  return 0;
}

/** One answer's text: `append` as it comes, `render` once a frame, `end` when no more will come. */
export class Markdown {
  #pending = "";
  #source = ""; // of the open block, the last
  #room = STEP_CHARS; // what the step that has begun still takes
  #links = {}; // what [1]: https://... lines have named
  #ended = false;
  #continues = false; // the open block is the rest of a cut one

  /**
   * @param {HTMLElement} frozen takes the finished blocks
   * @param {HTMLElement} tail is rewritten in every frame
   */
  constructor(frozen, tail) {
    this.frozen = frozen;
    this.tail = tail;
  }

  /** @param {string} text */
  append(text) {
    this.#pending += text.replaceAll("\r", "");
  }

  end() {
    this.#ended = true;
  }

  /** Shows a frame's worth of what has come. Returns whether all of it is shown. */
  render() {
    const until = performance.now() + FRAME_MS;
    do this.#step();
    while (this.#pending && performance.now() < until);
    if (this.#ended && !this.#pending) {
      this.#freeze(this.#source);
      this.#source = "";
    }
    patch(this.tail, this.#rendered(this.#lexed(remend(this.#source, MEND))));
    return this.#pending === "";
  }

  #step() {
    const taken = this.#pending.slice(0, this.#room);
    this.#pending = this.#pending.slice(taken.length);
    this.#source += taken;
    this.#room -= taken.length;
    if (taken.includes("\n")) this.#freezeFinished();
    if (this.#room) return;
    this.#room = STEP_CHARS;
    if (this.#source.length > SHORT) this.#cutLong();
  }

  /** Only whole lines tell where a block ends: "#" may become a heading, or "#1". */
  #freezeFinished() {
    const whole = this.#source.slice(0, this.#source.lastIndexOf("\n") + 1);
    if (!whole) return;
    const tokens = /** @type {{type: string, raw: string}[]} */ (this.#lexed(whole));
    const open = tokens.findLastIndex((token) => token.type !== "space");
    const finished = tokens.slice(0, Math.max(0, open)).map((token) => token.raw).join("");
    if (!finished) return;
    this.#freeze(finished);
    this.#source = this.#source.slice(finished.length);
  }

  #cutLong() {
    const [token] = this.#lexed(this.#source);
    const cut = CUTS[token?.type];
    const place = cut && token.raw.length > cut.most ? cut.place(token) : 0;
    const carry = cut?.carry?.(token) ?? "";
    if (place <= carry.length) return;
    this.#freeze(this.#source.slice(0, place));
    this.frozen.lastElementChild?.classList.add("goes-on");
    this.#source = carry + this.#source.slice(place);
    this.#continues = true;
  }

  /** @param {string} source */
  #freeze(source) {
    const fragment = this.#rendered(this.#lexed(source, this.#links));
    const [beginning, rest] = [this.frozen.lastElementChild, fragment.firstElementChild];
    if (this.#continues && beginning && rest && mayJoin(beginning, rest)) join(beginning, rest);
    this.frozen.append(fragment);
    this.#continues = false;
  }

  /**
   * @param {string} source
   * @param {object} [links] takes what the source names; what is not finished may still name something else
   */
  #lexed(source, links = {...this.#links}) {
    const lexer = /** @type {any} */ (new Lexer(marked.defaults));
    lexer.tokens.links = links;
    return lexer.lex(source);
  }

  /** @param {any[]} tokens */
  #rendered(tokens) {
    const fragment = clean(marked.parser(tokens));
    if (this.#continues) fragment.firstElementChild?.classList.add("continued");
    return fragment;
  }
}

/**
 * Makes one tree like another with as few changes as it takes: what is already there is not laid out again, and stays
 * selected.
 *
 * @param {Node & ParentNode} target
 * @param {Node & ParentNode} source is used up
 */
function patch(target, source) {
  const old = [...target.childNodes];
  const fresh = [...source.childNodes];
  fresh.forEach((node, index) => patchNode(target, old[index], node));
  old.slice(fresh.length).forEach((node) => node.remove());
}

/**
 * @param {Node} parent
 * @param {ChildNode | undefined} old
 * @param {ChildNode} fresh
 */
function patchNode(parent, old, fresh) {
  if (!old) parent.appendChild(fresh);
  else if (!old.cloneNode().isEqualNode(fresh.cloneNode()) && !(old instanceof Text && fresh instanceof Text)) {
    old.replaceWith(fresh);
  } else if (old instanceof Text && fresh instanceof Text) grow(old, fresh.data);
  else if (old instanceof Element && fresh instanceof Element) patch(old, fresh);
}

/**
 * @param {Text} node
 * @param {string} text
 */
function grow(node, text) {
  if (text.startsWith(node.data)) {
    if (text.length > node.data.length) node.appendData(text.slice(node.data.length));
  } else node.data = text;
}
