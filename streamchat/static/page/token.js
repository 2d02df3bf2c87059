// @ts-check
/** The token that the server asks for: typed once, kept for this tab and not longer. */

const KEY = "streamchat.token";

export class TokenPrompt {
  /** @param {HTMLDialogElement} dialog */
  constructor(dialog) {
    this.dialog = dialog;
    this.form = /** @type {HTMLFormElement} */ (dialog.querySelector("form"));
    this.input = /** @type {HTMLInputElement} */ (dialog.querySelector("input"));
    this.refused = /** @type {HTMLElement} */ (dialog.querySelector(".refused"));
    dialog.querySelector(".cancel")?.addEventListener("click", () => dialog.close());
  }

  /** @returns {Record<string, string>} */
  get headers() {
    const token = sessionStorage.getItem(KEY);
    return token ? {Authorization: `Bearer ${token}`} : {};
  }

  /**
   * Asks for a token; one that is kept was refused. Resolves to whether one was given.
   *
   * @returns {Promise<boolean>}
   */
  ask() {
    this.refused.hidden = sessionStorage.getItem(KEY) === null;
    sessionStorage.removeItem(KEY);
    this.form.reset();
    this.dialog.showModal();
    return new Promise((resolve) => {
      const ended = new AbortController();
      const options = {signal: ended.signal};
      const take = (/** @type {Event} */ event) => {
        event.preventDefault();
        sessionStorage.setItem(KEY, this.input.value.trim());
        this.dialog.close();
      };
      const leave = () => {
        ended.abort();
        resolve(sessionStorage.getItem(KEY) !== null);
      };
      this.form.addEventListener("submit", take, options);
      this.dialog.addEventListener("close", leave, options);
    });
  }
}
