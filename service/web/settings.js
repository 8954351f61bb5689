// The settings form. Settings are stored in this browser; the API key only in this tab.

import { toApi } from "./conversation.js";
import { loadKey, loadSettings, parsed, saveKey, saveSettings } from "./store.js";

const ALTERNATIVES = 5;
const SEEDS = 2 ** 31;
const OWN = new Set(["model", "messages", "n", "stream", "stream_options", "logprobs", "top_logprobs"]);
const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, max_tokens: "", seed: "", extra: "" };

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

  /** {system, fields}: what an answer depends on besides the messages. Draws the seed, to show it. */
  request() {
    const { system, temperature, top_p: topP, seed } = this.#form;
    const fields = {
      ...this.#extra(), temperature: Number(temperature.value), top_p: Number(topP.value),
      seed: seed.value === "" ? Math.floor(Math.random() * SEEDS) : Number(seed.value),
    };
    const limit = this.#limit();
    if (limit) fields.max_tokens = limit;
    return { system: system.value.trim() ? system.value : "", fields };
  }

  /** The request body for a streamed answer to the messages. */
  body(messages, { system, fields }) {
    return {
      ...fields, n: 1, messages: toApi(messages, system),
      stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: ALTERNATIVES, return_token_ids: true,
    };
  }

  /** Returns whether the settings can be sent; if not, shows why. */
  check() {
    const { extra } = this.#form;
    if (this.#extra()) return true;
    document.getElementById("extra-error").value = "This must be one JSON object.";
    if (!extra.checkVisibility()) document.getElementById("panel-switch").click();
    extra.focus();
    return false;
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

  /** The further fields of a request; null if they are not a JSON object. */
  #extra() {
    const text = this.#form.extra.value;
    const fields = text.trim() ? parsed(text) : {};
    if (!fields || typeof fields !== "object" || Array.isArray(fields)) return null;
    return Object.fromEntries(Object.entries(fields).filter(([name]) => !OWN.has(name)));
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
    const bad = this.#extra() === null;
    this.#form.extra.setAttribute("aria-invalid", String(bad));
    if (!bad) document.getElementById("extra-error").value = "";
    for (const output of this.#form.querySelectorAll("output:not(.bad)")) {
      output.value = Number(this.#form[output.htmlFor.value].value).toFixed(2);
    }
  }
}
