/**
 * Server-sent events over fetch(): EventSource cannot send an Authorization header, and hides the reason of a refusal.
 */

const SILENCE_MS = 25_000; // the service sends an event at least every 10 s
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;

/** An error response instead of events. */
class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/**
 * Follows /events until `stop()`, and reconnects whenever the connection is lost.
 *
 * `event(name, data)` receives each event. `lost(why, retryAt)` is called for each lost connection, with the time of
 * the next attempt on the clock of performance.now(). `refused(status, detail)` is called last, if the token is missing
 * or wrong.
 */
export class Stream {
  constructor({ token, event, lost, refused }) {
    this.token = token;
    this.handlers = { event, lost, refused };
    this.stopped = false;
    this.failures = 0;
    this.#run();
  }

  stop() {
    this.stopped = true;
    this.controller?.abort();
    this.retryNow();
  }

  /** Ends the pause before the next attempt, if there is one. */
  retryNow() {
    this.wake?.();
  }

  async #run() {
    while (!this.stopped) {
      let why = "it was closed";
      try {
        await this.#once();
      } catch (error) {
        if (error instanceof Refused && [401, 403].includes(error.status)) {
          if (!this.stopped) this.handlers.refused(error.status, error.message);
          return;
        }
        why = error instanceof Refused ? error.message : this.silent ? "it went silent" : "it cannot be reached";
      }
      if (this.stopped) return;
      // Half of the pause is random (jitter), so that a hundred pages do not reconnect at the same time.
      const most = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this.failures);
      const pause = most / 2 + (Math.random() * most) / 2;
      this.failures += 1;
      this.handlers.lost(why, performance.now() + pause);
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, pause);
      });
      this.wake = null;
    }
  }

  async #once() {
    this.controller = new AbortController();
    this.silent = false;
    let watchdog;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => {
        this.silent = true;
        this.controller.abort();
      }, SILENCE_MS);
    };
    try {
      alive();
      const headers = { Accept: "text/event-stream" };
      if (this.token) headers.Authorization = `Bearer ${this.token}`;
      const response = await fetch("events", { headers, cache: "no-store", signal: this.controller.signal });
      if (!response.ok) throw new Refused(response.status, await detailOf(response));
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        alive();
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) this.#take(block);
      }
    } finally {
      clearTimeout(watchdog);
      this.controller.abort();
    }
  }

  #take(block) {
    let name = "message";
    const data = [];
    for (const line of block.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    if (!data.length || this.stopped) return;
    this.failures = 0;
    this.handlers.event(name, JSON.parse(data.join("\n")));
  }
}

/** Sends a request; returns the JSON of the response, or throws an Error with the response's detail. */
export async function ask(path, { token, method = "GET" } = {}) {
  const headers = { Accept: "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { method, headers, cache: "no-store" });
  } catch {
    throw new Error("the service cannot be reached");
  }
  if (!response.ok) throw new Refused(response.status, await detailOf(response));
  return response.json();
}

async function detailOf(response) {
  try {
    return (await response.json()).detail ?? `the response has status ${response.status}`;
  } catch {
    return `the response has status ${response.status}`;
  }
}
