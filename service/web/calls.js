// The tool calls of an answer: names and arguments, as they stream, and fields for the results.

import { indented } from "./json.js";
import { codeBlock, element } from "./view.js";

export class CallList {
  element = element("div", { class: "calls", role: "group", "aria-label": "Tool calls" });
  #codes = [];
  #form = null;
  #send;

  /** `send(results)`: receives a message {role, call, name, text} for each call. */
  constructor(send) {
    this.#send = send;
  }

  /** `open`: whether results may be sent now. */
  draw(calls, { open }) {
    this.element.hidden = !calls.length;
    calls.forEach(({ type, name, input }, at) => {
      this.#codes[at] ??= this.#add(name);
      const text = type === "custom" ? input : indented(input);
      if (this.#codes[at].textContent !== text) this.#codes[at].textContent = text;
    });
    if (!open || !calls.length) {
      this.#form?.remove();
      this.#form = null;
    } else if (!this.#form) {
      this.#form = this.#ask(calls);
      this.element.append(this.#form);
    }
  }

  #add(name) {
    const code = element("code");
    this.element.append(codeBlock(name, code, `Arguments of ${name}`));
    return code;
  }

  #ask(calls) {
    const fields = calls.map(() => element("textarea", { rows: "1", required: "" }));
    const labels = calls.map(({ name }, at) => element("label", {}, `Result of ${name}`, fields[at]));
    const button = element("button", { type: "submit", class: "quiet" }, "Send results");
    const form = element("form", { class: "results", autocomplete: "off" }, ...labels, button);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(calls.map(({ id, name }, at) => ({ role: "tool", call: id, name, text: fields[at].value })));
    });
    return form;
  }
}
