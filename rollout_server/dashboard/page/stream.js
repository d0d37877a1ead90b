// The event stream, and getting it back when it is lost. EventSource cannot send a key, so it is
// read with fetch.

import { ApiError, request } from "./api.js";

const FIRST_WAIT_S = 1;
const LONGEST_WAIT_S = 10;
const SILENT_AFTER_INTERVALS = 5;
const SILENT_AT_LEAST_S = 6;

/**
 * Connects for as long as the page lives.
 *
 * onEvent(name, data) gets every event; onState(state, detail) gets "connecting", "live",
 * "waiting" (detail: {reason, seconds}) and "refused" (detail: the ApiError about the key), after
 * which nothing happens until `connectNow`.
 */
export class EventStream {
  #path;
  #onEvent;
  #onState;
  #wait_s = FIRST_WAIT_S;
  #timer = null;
  #watchdog = null;
  #abort = null;
  interval_s = 1;

  constructor(path, onEvent, onState) {
    this.#path = path;
    this.#onEvent = onEvent;
    this.#onState = onState;
  }

  /** Drops what there is and starts over (a new key, the person's wish). */
  connectNow() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#run();
  }

  async #run() {
    const abort = new AbortController();
    this.#abort = abort;
    this.#onState("connecting");
    let reason = "the connection was lost";
    try {
      const response = await request("GET", this.#path, {
        signal: abort.signal, accept: "text/event-stream",
      });
      reason = (await this.#read(response, abort)) ?? reason;
    } catch (error) {
      if (abort !== this.#abort) return; // connectNow started another one
      if (error instanceof ApiError) {
        if (error.isAboutKey) return this.#onState("refused", error);
        reason = error.message;
        this.#wait_s = Math.max(this.#wait_s, error.retryAfter_s ?? 0);
      } else if (error.name === "AbortError") {
        reason = "nothing came any more";
      }
    } finally {
      clearTimeout(this.#watchdog);
    }
    if (abort === this.#abort) this.#later(reason);
  }

  #later(reason) {
    const seconds = this.#wait_s;
    this.#wait_s = Math.min(LONGEST_WAIT_S, 2 * this.#wait_s);
    this.#onState("waiting", { reason, seconds });
    this.#timer = setTimeout(() => this.#run(), 1000 * seconds);
  }

  /** The reason the server gave for the end, if it did. */
  async #read(response, abort) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let reason = null;
    this.#expectMore(abort);
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return reason;
      this.#expectMore(abort);
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const { name, data } = parse(block);
        if (name === "end") reason = data.reason;
        else this.#take(name, data);
      }
    }
  }

  #take(name, data) {
    if (name === "snapshot") {
      this.#wait_s = FIRST_WAIT_S;
      this.interval_s = data.server.interval_s;
      this.#onState("live");
    }
    this.#onEvent(name, data);
  }

  #expectMore(abort) {
    clearTimeout(this.#watchdog);
    const limit_s = Math.max(SILENT_AT_LEAST_S, SILENT_AFTER_INTERVALS * this.interval_s);
    this.#watchdog = setTimeout(() => abort.abort(), 1000 * limit_s);
  }
}

function parse(block) {
  let name = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return { name, data: data ? JSON.parse(data) : null };
}
