// @ts-check
/** The view follows what grows at its end, until the reader scrolls up, and again once the reader is back at the end. */

const NEAR = 40; // pixels from the end that count as the end

export class Follow {
  #following = true;
  #top = 0;

  /** @param {(following: boolean) => void} onChange */
  constructor(onChange) {
    this.onChange = onChange;
    this.page = /** @type {Element} */ (document.scrollingElement);
    document.addEventListener("scroll", () => this.#scrolled(), {passive: true});
  }

  /** After the page has grown. */
  grown() {
    if (this.#following) this.page.scrollTop = this.page.scrollHeight;
  }

  /** Back to the end. */
  resume() {
    this.#set(true);
    this.grown();
  }

  #scrolled() {
    const {scrollTop, scrollHeight, clientHeight} = this.page;
    const atEnd = scrollHeight - clientHeight - scrollTop < NEAR;
    if (atEnd) this.#set(true);
    // Only the reader scrolls up; when the page grows the distance to the end does, too, and means nothing.
    else if (scrollTop < this.#top) this.#set(false);
    this.#top = scrollTop;
  }

  /** @param {boolean} following */
  #set(following) {
    if (following === this.#following) return;
    this.#following = following;
    this.onChange(following);
  }
}
