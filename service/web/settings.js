// The settings form. Settings are stored in this browser; the API key only in this tab.

import { loadKey, loadSettings, saveKey, saveSettings } from "./store.js";

const ALTERNATIVES = 5;
const SEEDS = 2 ** 31;
const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, max_tokens: "", seed: "" };

export class SettingsForm {
  #form = document.getElementById("settings");
  #context = 0;

  constructor() {
    this.#fill({ ...DEFAULTS, ...loadSettings() });
    this.#form.key.value = loadKey();
    this.#form.key.closest("p").hidden = !loadKey();
    this.#form.addEventListener("input", () => this.#changed());
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.#fill(DEFAULTS);
      this.#changed();
    });
  }

  /** Headers of every request. */
  headers() {
    const key = this.#form.key.value.trim();
    return key ? { Authorization: `Bearer ${key}` } : {};
  }

  /** The request body for an answer to the messages. The seed is drawn here, to show it. */
  body(messages) {
    const { system, temperature, top_p: topP, seed } = this.#form;
    const chosen = seed.value === "" ? Math.floor(Math.random() * SEEDS) : Number(seed.value);
    const turns = messages.filter(({ text }) => text);  // an answer that failed may be empty
    const opening = system.value.trim() ? [{ role: "system", content: system.value }] : [];
    const body = {
      messages: [...opening, ...turns.map(({ role, text }) => ({ role, content: text }))],
      temperature: Number(temperature.value), top_p: Number(topP.value), seed: chosen,
      stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: ALTERNATIVES, return_token_ids: true,
    };
    const limit = this.#limit();
    if (limit) body.max_tokens = limit;
    return body;
  }

  setSeed(seed) {
    this.#form.seed.value = seed;
    this.#changed();
  }

  /** The model's context length limits max_tokens. */
  setContext(length) {
    this.#context = length;
    this.#form.max_tokens.max = length;
    this.#form.max_tokens.placeholder = String(this.#limit(""));
  }

  askForKey() {
    this.#form.key.closest("p").hidden = false;
    this.#form.key.focus();
  }

  #limit(value = this.#form.max_tokens.value) {
    if (value !== "") return Math.max(1, Math.floor(Number(value)));
    return this.#context ? Math.min(1024, Math.floor(this.#context / 2)) : 0;
  }

  #fill(values) {
    for (const name of Object.keys(DEFAULTS)) this.#form[name].value = values[name];
    this.#show();
  }

  #changed() {
    this.#show();
    const values = Object.keys(DEFAULTS).map((name) => [name, this.#form[name].value]);
    saveSettings(Object.fromEntries(values));
    saveKey(this.#form.key.value.trim());
  }

  #show() {
    for (const output of this.#form.querySelectorAll("output")) {
      output.value = Number(this.#form[output.htmlFor.value].value).toFixed(2);
    }
  }
}
