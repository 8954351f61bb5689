// The list of messages: questions, and answers with their buttons and figures.

import { AttentionView } from "./attention.js";
import { CallList } from "./calls.js";
import { TokenTip } from "./tip.js";
import { copyText, element, Json, Prose, TokenStrip } from "./view.js";

const NEAR = 80;  // px from the bottom within which the view follows new text
const ENDS = {
  length: "token limit", cancelled: "stopped", deadline: "deadline", error: "failed",
};

export class Transcript {
  #scroll = document.getElementById("scroll");
  #list = document.getElementById("messages");
  #rows = [];
  #actions;

  /** `actions`: again(), reconnect(), keepSeed(seed), sendResults(results), headers(). */
  constructor(actions) {
    this.#actions = actions;
    this.tip = new TokenTip(this.#scroll, (target) => {
      const item = target.closest("#messages > li");
      return this.#rows[[...this.#list.children].indexOf(item)]?.record.tokens;
    });
    this.#list.addEventListener("click", (event) => {
      if (event.target.matches(".copy")) copy(event.target);
    });
  }

  addIdea(text, ask) {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", ask);
    document.getElementById("ideas").append(element("li", {}, button));
  }

  drawAll(messages) {
    this.tip.hide();
    const old = new Map(this.#rows.map((row) => [row.record, row]));
    this.#rows = messages.map((message) => old.get(message) ?? this.#row(message));
    this.#list.replaceChildren(...this.#rows.map((row) => row.item));
    this.#rows.forEach((row, index) => {
      if (row.prose) drawRow(row, { last: index === messages.length - 1 });
    });
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  /** Draws the additions to the answer that is streaming. */
  drawAnswer(answer) {
    const row = this.#rows.find((each) => each.record === answer.record);
    if (!row) return;
    const { scrollHeight, scrollTop, clientHeight } = this.#scroll;
    const follows = scrollHeight - scrollTop - clientHeight < NEAR;
    drawRow(row, { last: true });
    if (follows) this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  #row(record) {
    const author = { user: "You", tool: `Result of ${record.name}`, assistant: "Answer" }[record.role];
    const item = element("li", { class: record.role }, element("h2", { class: "hidden" }, author));
    if (record.role !== "assistant") {
      item.append(element("p", { class: "question" }, record.text));
      return { record, item };
    }
    const hint = "The answer; left and right arrow keys step through its tokens";
    const answer = element("div", { class: "answer", tabindex: "0", role: "group", "aria-label": hint });
    const row = { record, item, answer, view: null, tokens: false, attention: null };
    row.thought = element("div", { tabindex: "0", role: "group", "aria-label": "Thinking" });
    row.thinking = element("details", { class: "thinking" }, element("summary", {}, "Thinking"), row.thought);
    row.calls = new CallList((results) => this.#actions.sendResults(results));
    row.note = element("p", { class: "error", role: "alert", hidden: "" });
    row.figures = element("span", { class: "figures" });
    row.buttons = this.#buttons(row);
    item.append(row.thinking, answer, row.calls.element, row.note, element("div", { class: "foot" }, row.figures, ...row.buttons.all));
    row.prose = true;
    return row;
  }

  #buttons(row) {
    const make = (label, act) => {
      const button = element("button", { type: "button", class: "quiet" }, label);
      button.addEventListener("click", act);
      return button;
    };
    const tokens = make("Tokens", () => {
      row.tokens = !row.tokens;
      row.view = null;
      tokens.setAttribute("aria-pressed", String(row.tokens));
      this.tip.hide();
      drawRow(row, { last: row.item === this.#list.lastChild });
    });
    tokens.setAttribute("aria-pressed", "false");
    tokens.title = "Show each token, shaded by how unlikely it was";
    const attention = make("Attention", () => this.#toggleAttention(row));
    attention.classList.add("look");
    attention.setAttribute("aria-expanded", "false");
    attention.title = "Show which earlier tokens each token attends to";
    const copyAll = make("Copy", () => copyText(row.record.text, copyAll));
    const seed = make("", () => this.#actions.keepSeed(row.record.seed));
    seed.title = "Keep this seed: the same question gets the same answer";
    const again = make("Again", () => this.#actions.again());
    again.title = "Request another answer, with another seed";
    const reconnect = make("Reconnect", () => this.#actions.reconnect());
    const all = [seed, tokens, attention, copyAll, again, reconnect];
    return { tokens, attention, seed, again, reconnect, all };
  }

  #toggleAttention(row) {
    const open = !row.attention;
    row.buttons.attention.setAttribute("aria-expanded", String(open));
    if (open) {
      row.attention = attentionOf(row.record, this.#actions.headers);
      row.item.append(row.attention.element);
      row.attention.element.scrollIntoView({ block: "nearest" });
    } else {
      row.attention.close();
      row.attention = null;
    }
  }
}

function drawRow(row, { last }) {
  const { record, answer, buttons } = row;
  const running = record.state === "running";
  if (!row.view) {
    answer.replaceChildren();
    const View = row.tokens ? TokenStrip : asksJson(record.request?.fields) ? Json : Prose;
    row.view = new View(answer);
    answer.classList.toggle("strip", row.tokens);
  }
  row.view.draw(record.text, record.tokens);
  drawThinking(row, running && !record.text && !record.calls?.length);
  row.calls.draw(record.calls ?? [], { open: last && !running });
  row.item.classList.toggle("running", running);
  row.item.setAttribute("aria-busy", String(running));
  row.note.hidden = !record.error && record.state !== "cut";
  row.note.textContent = record.error ?? (row.note.hidden ? "" : "The server is unreachable.");
  row.figures.textContent = figures(record);
  buttons.seed.textContent = `seed ${record.seed}`;
  buttons.tokens.hidden = !record.tokens.length;
  buttons.attention.hidden = !record.tokens.length || !record.prompt;
  buttons.again.hidden = !last || running;
  buttons.reconnect.hidden = !last || record.state !== "cut";
}

/** The thinking is open while it streams and folded afterwards; in between, people decide. */
function drawThinking(row, streams) {
  const { thinking, thought, record } = row;
  thinking.hidden = !record.thinking;
  if (thought.textContent !== record.thinking) thought.textContent = record.thinking ?? "";
  if (row.streams !== streams && document.activeElement !== thought) thinking.open = streams;
  row.streams = streams;
  if (streams && document.activeElement !== thought) thought.scrollTop = thought.scrollHeight;
}

function asksJson({ response_format: format, structured_outputs: outputs } = {}) {
  return format?.type?.startsWith("json") || outputs?.json || outputs?.json_object;
}

function attentionOf({ prompt, tokens, model }, headers) {
  const all = [...prompt, ...tokens.map(({ id }) => id)];
  const last = Math.max(0, tokens.findLastIndex(({ start, end }) => end > start));
  return new AttentionView({ model, tokens: all }, {
    headers, chosen: prompt.length + last, limit: Number(document.body.dataset.attention),
  });
}

/** "48.1 tokens/s · first after 0.12 s · 96 tokens · resumed" */
function figures({ state, tokens, first, last, sent, reason, resumed, usage }) {
  const count = usage?.completion_tokens ?? tokens.length;
  const parts = [];
  if (count > 1 && last > first) parts.push(`${((1000 * (count - 1)) / (last - first)).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${((first - sent) / 1000).toFixed(2)} s`);
  if (count) parts.push(`${count} tokens`);
  if (state !== "running" && ENDS[reason]) parts.push(ENDS[reason]);
  if (resumed) parts.push("resumed");
  return parts.join(" · ");
}

function copy(button) {
  copyText(button.closest(".code").querySelector("code").textContent, button);
}
