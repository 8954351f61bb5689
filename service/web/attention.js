// Attention: shows a text as tokens. Pointer, touch or arrow keys choose one; the tokens that it
// attends to (earlier ones or, in an encoder, all) are coloured by its weights, and the largest weights
// are listed, which a screen reader announces, too.
//
//   chosen layer and head --POST /v1/attention--> rows[token][attended token]     null: mean of all

import { share, visible } from "./tokens.js";
import { bar, element } from "./view.js";

const LISTED = 5;
const TRIES = 20;  // the server reads one map at a time
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

let made = 0;

export class AttentionView {
  #input;
  #limit;
  #headers;
  #texts = [];
  #tokens = [];  // their elements
  #rows = null;
  #chosen;
  #stale = false;
  #reading = false;
  #closed = false;

  /** `input`: {model} and {tokens}, ids, or {prompt}, a text. `chosen`: the first token to show. */
  constructor(input, { headers, chosen, limit = Infinity, label = "Attention" }) {
    this.#input = input;
    this.#limit = limit;
    this.#headers = headers;
    this.#chosen = chosen;
    made += 1;
    this.id = `attention-${made}`;
    this.layer = choice(`${this.id}-layer`, "Layer");
    this.head = choice(`${this.id}-head`, "Head");
    this.note = element("p", { class: "heat-note", role: "status" });
    this.list = element("div", { class: "attended", "aria-live": "polite", "aria-atomic": "true" });
    this.heat = element("div", {
      class: "heat", role: "listbox", tabindex: "0", hidden: "", "aria-orientation": "horizontal",
      "aria-label": "Tokens; choose one to see what it attends to",
    });
    const menus = element("div", { class: "heat-bar" }, ...this.layer.parts, ...this.head.parts);
    this.element = element("div", { class: "attention", id: this.id, role: "group", "aria-label": label },
      menus, this.note, this.list, this.heat);
    for (const { select } of [this.layer, this.head]) select.addEventListener("change", () => this.#read());
    this.heat.addEventListener("click", (event) => {
      const index = this.#tokens.indexOf(event.target.closest("[role=option]"));
      if (index >= 0) this.#choose(index);
    });
    this.heat.addEventListener("keydown", (event) => this.#walk(event));
    this.#read();
  }

  /** Ignores a reply that has not arrived yet. */
  close() {
    this.#closed = true;
    this.element.remove();
  }

  /** One request at a time; the latest choice made meanwhile is requested next, and drawn. */
  async #read() {
    this.#stale = true;
    if (this.#reading) return;
    const count = this.#input.tokens?.length ?? 0;
    if (count > this.#limit) {
      this.note.textContent = `Attention is shown for up to ${this.#limit} tokens; here are ${count}.`;
      return;
    }
    this.#reading = true;
    this.note.textContent = "Reading the network …";
    this.element.setAttribute("aria-busy", "true");
    let reply = {};
    while (this.#stale && !this.#closed) {
      this.#stale = false;
      const body = { ...this.#input, layer: this.layer.index, head: this.head.index, return_token_strs: true };
      reply = await ask(body, this.#headers(), () => this.#closed);
    }
    this.#reading = false;
    this.element.setAttribute("aria-busy", "false");
    this.note.textContent = reply.error ?? "";
    if (reply.map) this.#draw(reply.map);
  }

  #draw(map) {
    this.layer.offer(map.num_layers);
    this.head.offer(map.num_heads);
    this.#rows = map.rows.map(({ weights }) => weights);
    const first = !this.#tokens.length;
    if (first) {
      this.#texts = map.token_strs;
      this.#tokens = map.token_strs.map((text, index) => {
        const id = `${this.id}-${index}`;
        return element("span", { role: "option", id }, text.replaceAll("\n", "⏎\n") || "∅");
      });
      this.heat.append(...this.#tokens);
      this.heat.hidden = false;
    }
    this.#choose(this.#chosen);
    if (first) this.element.scrollIntoView({ block: "nearest" });
  }

  #walk(event) {
    const step = STEPS[event.key];
    if (!step || !this.#rows || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#choose(Math.min(this.#tokens.length - 1, Math.max(0, this.#chosen + step)));
    this.#tokens[this.#chosen].scrollIntoView({ block: "nearest" });
  }

  #choose(index) {
    this.#chosen = index;
    const weights = this.#rows[index];
    // Heads without a target attend to the first token or, in an encoder, to the last (attention
    // sinks): they would outshine the rest.
    const both = this.#rows[0].length > 1;
    const top = Math.max(...weights.slice(1, both ? -1 : undefined), 0.001);
    this.#tokens.forEach((token, at) => {
      const weight = weights[at] ?? 0;
      token.style.setProperty("--heat", Math.min(1, Math.sqrt(weight / top)).toFixed(3));
      token.setAttribute("aria-selected", String(at === index));
      token.title = at in weights ? share(weight) : "";
    });
    this.heat.setAttribute("aria-activedescendant", this.#tokens[index].id);
    const largest = weights.map((weight, at) => ({ weight, at })).sort((a, b) => b.weight - a.weight);
    this.list.replaceChildren(
      element("p", {}, element("code", {}, visible(this.#texts[index])), " attends to"),
      element("ol", {}, ...largest.slice(0, LISTED).map(({ weight, at }) => this.#entry(weight, at, index))),
    );
  }

  #entry(weight, at, chosen) {
    const place = at === chosen ? "itself" : at === 0 ? "the first" : at < chosen ? `${chosen - at} before` : `${at - chosen} after`;
    return element("li", {}, bar(weight), element("code", {}, visible(this.#texts[at])), element("small", {}, place),
      element("span", {}, share(weight)));
  }
}

/** A menu: the mean of all, or one of `count`. */
function choice(id, name) {
  const select = element("select", { id }, element("option", { value: "" }, "all, mean"));
  return {
    select,
    parts: [element("label", { for: id }, name), select],
    get index() {
      return select.value === "" ? null : Number(select.value);
    },
    offer(count) {
      for (let index = select.length - 1; index < count; index += 1) {
        select.append(element("option", { value: index }, String(index)));
      }
    },
  };
}

/** Returns {map} or {error}; retries while the server is busy. */
async function ask(body, headers, cancelled) {
  const call = { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let tries = 1; ; tries += 1) {
    try {
      const response = await fetch("/v1/attention", call);
      const reply = await response.json();
      if (response.ok) return { map: reply };
      if (response.status !== 503 || tries === TRIES || cancelled()) return { error: reply.error.message };
      await new Promise((resolve) => setTimeout(resolve, 1000 * Number(response.headers.get("retry-after") ?? 1)));
    } catch {
      return { error: "The server is unreachable." };
    }
  }
}
