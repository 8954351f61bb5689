// Elements of a message. Model text goes into text nodes only; it never becomes markup.

import { indented } from "./json.js";
import { blocks, inline } from "./markdown.js";
import { parsed } from "./store.js";
import { firstAfter, surprise, visible } from "./tokens.js";

/** element("p", {class: "note"}, "text", child) */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A bar filled to a share from 0 to 1. */
export function bar(share) {
  const made = element("span", { class: "bar" });
  made.style.setProperty("--share", share);
  return made;
}

/** The text of an answer; as it grows, only blocks that changed are redrawn. */
export class Prose {
  #drawn = [];

  constructor(container) {
    this.container = container;
  }

  draw(text, tokens) {
    const wanted = blocks(text);
    const keys = wanted.map((block) => `${block.kind} ${block.start} ${block.end}`);
    let same = 0;
    while (same < keys.length && this.#drawn[same] === keys[same]) same += 1;
    while (this.container.children.length > same) this.container.lastChild.remove();
    const source = { text, tokens };
    for (const block of wanted.slice(same)) this.container.append(drawBlock(source, block));
    this.#drawn = keys;
  }
}

/** An answer in JSON, indented if it is complete. */
export class Json {
  #code = element("code");

  constructor(container) {
    container.append(codeBlock("json", this.#code));
  }

  draw(text) {
    const shown = parsed(text) === null ? text : indented(text);
    if (this.#code.textContent !== shown) this.#code.textContent = shown;
  }
}

/** Each token separately, shaded by how unlikely it was. It only grows. */
export class TokenStrip {
  #count = 0;

  constructor(container) {
    this.container = container;
  }

  draw(text, tokens) {
    for (; this.#count < tokens.length; this.#count += 1) {
      const token = tokens[this.#count];
      const shown = text.slice(token.start, token.end);
      const made = tokenElement(this.#count, shown ? shown.replaceAll("\n", "⏎\n") : faint(token));
      made.classList.add(`surprise-${surprise(token.logprob)}`);
      if (!shown) made.classList.add("faint");
      this.container.append(made);
    }
  }
}

/** The label of a token that has no text. */
function faint(token) {
  const bytes = (token.bytes ?? []).map((byte) => byte.toString(16).padStart(2, "0"));
  return token.token.includes("\ufffd") ? bytes.join(" ") : visible(token.token);
}

function tokenElement(index, text) {
  return element("span", { class: "token", "data-token": index }, text);
}

function drawBlock(source, block) {
  if (block.kind === "rule") return element("hr");
  if (block.kind === "code") return drawCode(source, block);
  if (block.kind === "list") return drawList(source, block.items);
  if (block.kind === "heading") {
    // The page's own end at level 2. No level is skipped, whichever the text uses.
    return fill(element("h3", { class: block.level > 1 ? "minor" : "major" }), source, block.lines);
  }
  if (block.kind === "quote") {
    return element("blockquote", {}, fill(element("p"), source, block.lines));
  }
  return fill(element("p"), source, block.lines);
}

function drawList(source, items) {
  const ordered = /\d/.test(items[0].mark);
  const list = element(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(items[0].mark, 10);
  for (const item of items) {
    const made = fill(element("li"), source, item.lines);
    if (item.children.length) made.append(drawList(source, item.children));
    list.append(made);
  }
  return list;
}

function drawCode(source, block) {
  const code = element("code");
  block.lines.forEach(([start, end], index) => {
    const last = index === block.lines.length - 1;
    leaf(code, source, start, last ? end : end + 1);
  });
  return codeBlock(block.language || "text", code);
}

/** Code that scrolls, under its title and a button that copies it. */
export function codeBlock(title, code, label = "Code") {
  const copy = element("button", { type: "button", class: "quiet copy" }, "Copy");
  const head = element("div", { class: "code-head" }, element("span", { class: "language" }, title), copy);
  const pre = element("pre", { tabindex: "0", role: "group", "aria-label": label }, code);
  return element("div", { class: "code" }, head, pre);
}

/** Copies text, and says so on the button. The clipboard needs a secure origin. */
export async function copyText(text, button) {
  const label = button.textContent;
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  button.textContent = done ? "Copied" : "Not allowed";
  setTimeout(() => (button.textContent = label), 1500);
}

function fill(parent, source, lines) {
  lines.forEach(([start, end], index) => {
    for (const part of inline(source.text, start, end)) {
      const target = part.style ? element(part.style) : parent;
      leaf(target, source, part.start, part.end);
      if (part.style) parent.append(target);
    }
    if (index < lines.length - 1) parent.append("\n");
  });
  return parent;
}

/** Appends a range of the text, each token's share of it in an element of its own. */
function leaf(parent, { text, tokens }, start, end) {
  let at = start;
  for (let index = firstAfter(tokens, start); at < end && index < tokens.length; index += 1) {
    const until = Math.min(end, tokens[index].end);
    if (until > at) parent.append(tokenElement(index, text.slice(at, until)));
    at = Math.max(at, until);
  }
  if (at < end) parent.append(text.slice(at, end));
}
