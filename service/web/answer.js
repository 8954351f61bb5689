// One answer: asked for, followed to its end over as many connections as it takes, or stopped.
//
//   asked --POST--> following --connection lost--> reconnecting --GET /v1/streams/{id}--> following
//                       |                              | (gave up)
//                       v end, error                   v
//                     ended                           cut: `follow` goes on from there
//
// `record` is plain data and goes to storage as it is. What was shown (`text`, `tokens`) and where
// that is in the stream (`position`) change together, so a page that loads it again goes on exactly
// there. The request's key makes a repeated POST find the first one's answer.

import { readEvents } from "./sse.js";
import { place } from "./tokens.js";

const SILENCE = 35_000;  // ms without a byte; the server sends a comment at least every 15 s
const PATIENCE = 120_000;  // ms of trying to reconnect
const STOP_PATIENCE = 3_000;  // ms from a stop to the end that the server tells
const LOST = new Set(["backend_unavailable", "shutting_down"]);
const RETRIED = new Set([429, 502, 503, 504]);

export function newRecord(body) {
  return {
    role: "assistant", state: "running", key: randomKey(), body, seed: body.seed, call: null,
    position: null, prompt: null, text: "", tokens: [], reason: null, error: null, usage: null,
    sent: Date.now(), first: null, last: null, resumed: 0,
  };
}

class Refused extends Error {
  constructor(status, message, wait) {
    super(message);
    this.status = status;
    this.wait = wait;  // ms to wait before another try; null where there is no use in one
  }
}

class Failed extends Error {}

export class Answer {
  #headers;
  #changed;
  #connection = null;
  #stopped = false;
  #wake = () => {};

  /** `headers()` gives those of each call; `changed(answer)` is called whenever it shows more. */
  constructor(record, { headers, changed }) {
    this.record = record;
    this.link = record.call ? "reconnecting" : "asking";
    this.wait = 0;
    this.#headers = headers;
    this.#changed = changed;
  }

  /** Goes on until it ends, fails, or nothing can be reached for long. Never throws. */
  async follow() {
    this.record.state = "running";
    let tries = 0;
    let since = Date.now();
    while (this.record.state === "running") {
      try {
        const heard = () => {
          tries = 0;
          since = Date.now();
        };
        if (await this.#read(await this.#open(), heard)) this.#end("done");
      } catch (error) {
        if (error instanceof Failed) this.#fail(error.message);
        else if (error instanceof Refused && error.wait === null) this.#refused(error);
        else if (error instanceof Refused) await this.#pause(error.wait, "busy");
      }
      if (this.record.state !== "running") break;
      if (this.#stopped) this.#end("done", "cancelled");
      else if (Date.now() - since > PATIENCE) this.#end("cut");
      else if (this.link !== "busy") await this.#pause(Math.min(5000, 250 * 2 ** tries++), "reconnecting");
      else this.link = "reconnecting";
    }
  }

  /** Ends it on the server; what was generated until then is still shown. */
  async stop() {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#wake();
    const { call } = this.record;
    if (call === null) {
      this.#connection?.abort();
      return;
    }
    setTimeout(() => this.#connection?.abort(), STOP_PATIENCE);
    try {
      await fetch(`/v1/streams/${call}`, { method: "DELETE", headers: this.#headers() });
    } catch {
      this.#connection?.abort();  // unreachable: there it ends when nobody came back for it
    }
  }

  /** Tries again at once: the network is back. */
  hurry() {
    this.#wake();
  }

  /** Lets the connection go without a word; the record stays as it is. */
  leave() {
    this.record = { ...this.record };
    this.#changed = () => {};
    this.#stopped = true;
    this.#connection?.abort();
    this.#wake();
  }

  async #open() {
    const { call, position, body, key } = this.record;
    this.#connection = new AbortController();
    const options = { headers: this.#headers(), signal: this.#connection.signal, cache: "no-store" };
    let response;
    if (call === null) {
      Object.assign(options.headers, {
        "Content-Type": "application/json", "Idempotency-Key": key, "X-Quire-Event-Ids": "1",
      });
      response = await fetch("/v1/chat/completions", {
        ...options, method: "POST", body: JSON.stringify(body),
      });
    } else {
      if (position !== null) options.headers["Last-Event-ID"] = position;
      response = await fetch(`/v1/streams/${call}`, options);
    }
    if (!response.ok) throw await refusal(response);
    if (call !== null) {
      this.record.resumed += 1;
      this.link = "resumed";
    } else {
      this.link = "following";
    }
    this.record.call = response.headers.get("x-request-id");
    this.#changed(this);
    return response;
  }

  /** Whether the stream came to its end. */
  async #read(response, heard) {
    const connection = this.#connection;
    let alarm;
    const listen = () => {
      clearTimeout(alarm);
      alarm = setTimeout(() => connection.abort(), SILENCE);
    };
    const watched = response.body.pipeThrough(new TransformStream({
      transform(bytes, controller) {
        listen();
        controller.enqueue(bytes);
      },
    }));
    try {
      listen();
      for await (const { id, data } of readEvents(watched)) {
        if (data === "[DONE]") return true;
        heard();
        this.#take(JSON.parse(data), id);
      }
      return false;
    } finally {
      clearTimeout(alarm);
    }
  }

  #take(chunk, id) {
    if (chunk.error) {
      // The journal is out of reach or this replica ends: as good as a lost connection.
      if (LOST.has(chunk.error.code)) throw new Error(chunk.error.message);
      throw new Failed(chunk.error.message);
    }
    const { record } = this;
    if (chunk.usage) record.usage = chunk.usage;
    record.prompt ??= chunk.prompt_token_ids ?? null;
    const [choice] = chunk.choices;
    if (choice) {
      const text = choice.delta.content ?? "";
      const scored = choice.logprobs?.content ?? [];
      if (scored.length || text) {
        record.first ??= Date.now();
        record.last = Date.now();
      }
      record.tokens.push(...place(record.text.length, text, scored, choice.token_ids));
      record.text += text;
      record.position = id ?? record.position;
      record.reason = choice.finish_reason ?? record.reason;
    }
    record.model = chunk.model;
    this.#changed(this);
  }

  async #pause(milliseconds, link) {
    this.link = link;
    this.wait = milliseconds;
    this.#changed(this);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
      if (this.#stopped) this.#wake();
    });
  }

  #refused(error) {
    const gone = this.record.call !== null && [404, 410].includes(error.status);
    this.#fail(gone ? "The server no longer keeps the rest of this answer." : error.message);
    this.unauthorised = error.status === 401;
  }

  #fail(message) {
    this.record.error = message;
    this.#end("failed");
  }

  #end(state, reason = this.record.reason) {
    Object.assign(this.record, { state, reason });
    if (state !== "cut") {
      this.record.body = null;
      this.record.key = null;
    }
    this.link = state;
    this.#changed(this);
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `the server answered with status ${response.status}`;
  const worth = RETRIED.has(response.status) && response.headers.get("x-should-retry") !== "false";
  const seconds = Number(response.headers.get("retry-after") ?? 1);
  const text = message[0].toUpperCase() + message.slice(1);
  return new Refused(response.status, text, worth ? Math.min(60, seconds || 1) * 1000 : null);
}

// crypto.randomUUID is for secure origins alone; a server on the local network is none.
function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
