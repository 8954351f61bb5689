// One answer: requested, streamed to its end over as many connections as necessary, or stopped.
//
//   asking --POST--> following --connection lost--> reconnecting --GET /v1/streams/{id}--> following
//                       |                              | (timeout)
//                       v end, error                   v
//                     ended                           cut: `follow` resumes from there
//
// `record` is plain data, which is stored unchanged. The content (`text`, `tokens`) and its position
// in the stream (`position`) change together, so a reloaded page resumes exactly there. The
// idempotency key makes a repeated POST return the first one's answer.

import { readEvents } from "./sse.js";
import { place } from "./tokens.js";

const SILENCE = 35_000;  // ms without a byte; the server sends a comment at least every 15 s
const RECONNECT_TIMEOUT = 120_000;  // ms
const STOP_TIMEOUT = 3_000;  // ms from a stop to the server's end of the stream
const LOST = new Set(["backend_unavailable", "shutting_down"]);
const RETRIED = new Set([429, 502, 503, 504]);

/** `request` outlives `body`: the settings of the answer, which an export repeats. */
export function newRecord(body, request) {
  return {
    role: "assistant", state: "running", key: randomKey(), body, request, seed: body.seed, call: null,
    position: null, prompt: null, text: "", thinking: "", calls: [], tokens: [], reason: null, error: null,
    usage: null, sent: Date.now(), first: null, last: null, resumed: 0,
  };
}

class HttpError extends Error {
  constructor(status, message, wait) {
    super(message);
    this.status = status;
    this.wait = wait;  // ms to wait before a retry; null if a retry is useless
  }
}

class StreamError extends Error {}

export class Answer {
  #headers;
  #changed;
  #connection = null;
  #stopped = false;
  #wake = () => {};

  /** `headers()` returns the request headers; `changed(answer)` is called on each change. */
  constructor(record, { headers, changed }) {
    this.record = record;
    this.link = record.call ? "reconnecting" : "asking";
    this.wait = 0;
    this.#headers = headers;
    this.#changed = changed;
  }

  /** Runs until the answer ends, fails, or the server is unreachable for too long. Never throws. */
  async follow() {
    this.record.state = "running";
    let tries = 0;
    let since = Date.now();
    while (this.record.state === "running") {
      try {
        const onEvent = () => {
          tries = 0;
          since = Date.now();
        };
        if (await this.#read(await this.#open(), onEvent)) this.#end("done");
      } catch (error) {
        if (error instanceof StreamError) this.#fail(error.message);
        else if (error instanceof HttpError && error.wait === null) this.#onHttpError(error);
        else if (error instanceof HttpError) await this.#pause(error.wait, "busy");
      }
      if (this.record.state !== "running") break;
      if (this.#stopped) this.#end("done", "cancelled");
      else if (Date.now() - since > RECONNECT_TIMEOUT) this.#end("cut");
      else if (this.link !== "busy") await this.#pause(Math.min(5000, 250 * 2 ** tries++), "reconnecting");
      else this.link = "reconnecting";
    }
  }

  /** Cancels it on the server; the text generated until then stays. */
  async stop() {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#wake();
    const { call } = this.record;
    if (call === null) {
      this.#connection?.abort();
      return;
    }
    setTimeout(() => this.#connection?.abort(), STOP_TIMEOUT);
    try {
      await fetch(`/v1/streams/${call}`, { method: "DELETE", headers: this.#headers() });
    } catch {
      this.#connection?.abort();  // unreachable: the server cancels abandoned streams
    }
  }

  /** Retries at once: the network is back. */
  hurry() {
    this.#wake();
  }

  /** Closes the connection silently; the record stays unchanged. */
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
    if (!response.ok) throw await httpError(response);
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

  /** Returns whether the stream ended. */
  async #read(response, onEvent) {
    const connection = this.#connection;
    let timer;
    const restartTimer = () => {
      clearTimeout(timer);
      timer = setTimeout(() => connection.abort(), SILENCE);
    };
    const watched = response.body.pipeThrough(new TransformStream({
      transform(bytes, controller) {
        restartTimer();
        controller.enqueue(bytes);
      },
    }));
    try {
      restartTimer();
      for await (const { id, data } of readEvents(watched)) {
        if (data === "[DONE]") return true;
        onEvent();
        this.#take(JSON.parse(data), id);
      }
      return false;
    } finally {
      clearTimeout(timer);
    }
  }

  #take(chunk, id) {
    if (chunk.error) {
      // The journal is unreachable or the replica shuts down: handled as a lost connection.
      if (LOST.has(chunk.error.code)) throw new Error(chunk.error.message);
      throw new StreamError(chunk.error.message);
    }
    const { record } = this;
    if (chunk.usage) record.usage = chunk.usage;
    record.prompt ??= chunk.prompt_token_ids ?? null;
    const [choice] = chunk.choices;
    if (choice) {
      const text = choice.delta.content ?? "";
      const thinking = choice.delta.reasoning_content ?? "";
      const calls = choice.delta.tool_calls ?? [];
      const scored = choice.logprobs?.content ?? [];
      if (scored.length || text || thinking || calls.length) {
        record.first ??= Date.now();
        record.last = Date.now();
      }
      record.tokens.push(...place(record.text.length, text, scored, choice.token_ids));
      record.text += text;
      record.thinking = (record.thinking ?? "") + thinking;
      addCalls((record.calls ??= []), calls);
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

  #onHttpError(error) {
    const gone = this.record.call !== null && [404, 410].includes(error.status);
    this.#fail(gone ? "The server no longer has the rest of this answer." : error.message);
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

/** Adds deltas to the tool calls, each {id, type, name, input}. */
function addCalls(calls, deltas) {
  for (const { index, id, type, function: called, custom } of deltas) {
    calls[index] ??= { id, type, name: (called ?? custom).name, input: "" };
    calls[index].input += called?.arguments ?? custom?.input ?? "";
  }
}

async function httpError(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `the server answered with status ${response.status}`;
  const retryable = RETRIED.has(response.status) && response.headers.get("x-should-retry") !== "false";
  const seconds = Number(response.headers.get("retry-after") ?? 1);
  const text = message[0].toUpperCase() + message.slice(1);
  return new HttpError(response.status, text, retryable ? Math.min(60, seconds || 1) * 1000 : null);
}

// crypto.randomUUID needs a secure origin, which a server on the local network is not.
function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
