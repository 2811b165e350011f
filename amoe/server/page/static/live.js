// Asks the server for the view, once per second, while somebody can see it.

import { request } from "./server.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 8000;
const SLOWEST_MS = 5000; // between two tries, while the server does not answer

export class Live {
  #onView;
  #onState;
  #timer = 0;
  #failures = 0;
  #asking = false;
  #started = null;

  /**
   * @param onView gets each view, and whether the server is another one than before.
   * @param onState gets "live", "paused", "lost", "guarded" or "refused", and a text.
   */
  constructor(onView, onState) {
    this.#onView = onView;
    this.#onState = onState;
    document.addEventListener("visibilitychange", () => this.#visibility());
    window.addEventListener("online", () => this.now());
    this.now();
  }

  /** Ask now, whatever the timer says. */
  now() {
    clearTimeout(this.#timer);
    this.#ask();
  }

  #visibility() {
    if (document.hidden) {
      clearTimeout(this.#timer);
      this.#onState("paused", "paused");
    } else {
      this.now();
    }
  }

  async #ask() {
    if (this.#asking || document.hidden) return;
    this.#asking = true;
    const wait = await this.#try();
    this.#asking = false;
    if (wait !== null && !document.hidden) this.#timer = setTimeout(() => this.#ask(), wait);
  }

  /** One request. Returns the milliseconds until the next one; null: not before the user does something. */
  async #try() {
    let response, view;
    try {
      response = await request("live", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (response.status === 401) {
        this.#onState("guarded", "locked");
        return null;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      view = await response.json();
    } catch {
      this.#failures += 1;
      this.#onState("lost", "no answer from the server; trying again");
      return Math.min(SLOWEST_MS, PERIOD_MS * this.#failures);
    }
    this.#failures = 0;
    const isOther = this.#started !== null && this.#started !== view.started;
    this.#started = view.started;
    this.#onState("live", "");
    this.#onView(view, isOther);
    return PERIOD_MS;
  }
}
