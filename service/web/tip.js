// A token's tooltip: its probability and the alternatives. Opened by pointer, touch, or arrow keys
// while an answer has the focus; then a screen reader announces it, too.

import { percent, visible } from "./tokens.js";
import { bar, element } from "./view.js";

export class TokenTip {
  #tip = document.getElementById("tip");
  #announced = document.getElementById("token-said");
  #marked = [];
  #pinned = false;
  #find;

  /** `find(element)` returns the tokens of the answer that contains an element. */
  constructor(area, find) {
    this.#find = find;
    area.addEventListener("pointerover", (event) => {
      if (event.pointerType === "touch" || this.#pinned) return;
      const token = event.target.closest("[data-token]");
      if (token) this.#show(token);
      else this.hide();
    });
    area.addEventListener("pointerleave", () => this.#pinned || this.hide());
    area.addEventListener("click", (event) => {
      const token = event.target.closest("[data-token]");
      const again = token && this.#pinned && this.#marked.includes(token);
      this.hide();
      if (!token || again || getSelection().toString()) return;
      this.#show(token);
      this.#pinned = true;
    });
    area.addEventListener("keydown", (event) => this.#walk(event));
    area.addEventListener("focusout", () => this.#pinned || this.hide());
    area.addEventListener("scroll", () => this.hide(), { passive: true });
    window.addEventListener("resize", () => this.hide());
  }

  get visible() {
    return !this.#tip.hidden;
  }

  hide() {
    this.#tip.hidden = true;
    this.#pinned = false;
    for (const token of this.#marked) token.classList.remove("here");
    this.#marked = [];
  }

  #walk(event) {
    const answer = event.target.closest(".answer");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target !== answer || event.ctrlKey || event.metaKey || event.altKey) return;
    const shown = [...answer.querySelectorAll("[data-token]")];
    const here = shown.indexOf(step > 0 ? this.#marked.at(-1) : this.#marked[0]);
    const next = shown[here < 0 ? (step > 0 ? 0 : shown.length - 1) : here + step];
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest" });
    this.#show(next);
    const token = this.#find(next)[Number(next.dataset.token)];
    const others = token.top.slice(0, 3).map(([text, logprob]) => `${text} ${percent(logprob)}`);
    this.#announced.textContent = `${token.token}: ${percent(token.logprob)}. Most likely: ${others.join(", ")}`;
  }

  #show(target) {
    this.hide();
    const index = Number(target.dataset.token);
    const token = this.#find(target)?.[index];
    if (!token) return;
    this.#marked = [...target.closest(".answer").querySelectorAll(`[data-token="${index}"]`)];
    for (const part of this.#marked) part.classList.add("here");
    this.#tip.replaceChildren(...contents(token));
    this.#tip.hidden = false;
    this.#put(target.getClientRects()[0]);
  }

  /** Above the token, or below if there is no room; never beyond the window's edge. */
  #put(where) {
    const { width, height } = this.#tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, where.left - 12), document.documentElement.clientWidth - width - 8);
    const above = where.top - height - 8;
    this.#tip.style.left = `${left}px`;
    this.#tip.style.top = `${above > 8 ? above : where.bottom + 8}px`;
  }
}

function contents(token) {
  const head = element("p", { class: "tip-head" },
    element("code", {}, visible(token.token)), element("b", {}, percent(token.logprob)));
  const rows = token.top.map(([text, logprob]) => {
    const row = element("li", {}, bar(Math.exp(logprob)), element("code", {}, visible(text)), element("span", {}, percent(logprob)));
    if (text === token.token) row.classList.add("chosen");
    return row;
  });
  return [head, element("ul", {}, ...rows)];
}
