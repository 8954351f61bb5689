// The page: a conversation, its settings and the engine's state. answer.js streams an answer,
// view.js draws it.

import { Answer, newRecord } from "./answer.js";
import { lastRequest } from "./conversation.js";
import { ExportDialog } from "./export.js";
import { LiveView } from "./live.js";
import { SettingsForm } from "./settings.js";
import { offerModels, SimilarityForm } from "./similarity.js";
import { loadChat, loadModel, saveChat, saveModel, saveTheme } from "./store.js";
import { Speaker } from "./speaker.js";
import { Transcript } from "./transcript.js";

const IDEAS = ["Explain in three sentences how a bicycle stays upright.", "Write a haiku about autumn rain.", "Name five uses of an empty jar, as a list."];
const SAVE_EVERY = 400;  // ms, while an answer grows

const $ = (id) => document.getElementById(id);

class Page {
  #messages = loadChat();
  #answer = null;
  #drawing = false;
  #saved = 0;
  #model = null;
  #chosen = loadModel("chat");

  constructor() {
    this.settings = new SettingsForm();
    this.speaker = new Speaker($("said"));
    this.transcript = new Transcript({
      again: () => this.#again(), reconnect: () => this.#follow(this.#messages.at(-1)),
      keepSeed: (seed) => this.settings.setSeed(seed), headers: () => this.settings.headers(),
      sendResults: (results) => this.#send(...results),
    });
    this.similarity = new SimilarityForm({ headers: () => this.settings.headers() });
    new ExportDialog({
      request: () => lastRequest(this.#messages, this.#model, this.settings.request()),
      keyed: () => "Authorization" in this.settings.headers(),
    });
    this.live = new LiveView({
      headers: () => this.settings.headers(), onStatus: (status) => this.#showStatus(status),
    });
    this.#listen();
    this.#drawAll();
    const last = this.#messages.at(-1);
    if (last?.state === "running" || last?.state === "cut") this.#follow(last);
  }

  #listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask($("question").value);
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("composer").requestSubmit();
    });
    $("question").addEventListener("input", () => this.#size());
    $("stop").addEventListener("click", () => this.#stop());
    $("new-chat").addEventListener("click", () => this.#clear());
    $("models").addEventListener("change", () => this.#choose($("models").value));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#escape();
    });
    for (const idea of IDEAS) this.transcript.addIdea(idea, () => this.#ask(idea));
    window.addEventListener("pagehide", () => saveChat(this.#messages));
    document.addEventListener("visibilitychange", () => saveChat(this.#messages));
    window.addEventListener("online", () => this.#answer?.hurry());
    listenForTheme();
    listenForPanel();
  }

  #escape() {
    if (this.transcript.tip.visible) this.transcript.tip.hide();
    else if (document.body.classList.contains("panel-open")) $("panel-switch").click();
    else this.#stop();
  }

  #ask(text) {
    if (!text.trim() || !this.#send({ role: "user", text })) return;
    $("question").value = "";
    this.#size();
  }

  /** Adds messages and requests the answer. Returns whether it could. */
  #send(...messages) {
    if (this.#busy || !this.settings.check()) return false;
    this.#messages.push(...messages);
    this.#begin();
    return true;
  }

  /** Requests another answer to the last question, with another seed. */
  #again() {
    if (this.#busy || !this.settings.check()) return;
    if (this.#messages.at(-1)?.role === "assistant") this.#messages.pop();
    this.#begin();
  }

  #begin() {
    const request = this.settings.request();
    const body = this.settings.body(this.#messages, request);
    if (this.#model) body.model = this.#model;
    const record = newRecord(body, request);
    this.#messages.push(record);
    this.#drawAll();
    this.#follow(record);
  }

  async #follow(record) {
    const answer = new Answer(record, {
      headers: () => this.settings.headers(), changed: () => this.#changed(answer),
    });
    this.#answer = answer;
    this.speaker.begin(record.text.length);
    this.#changed(answer);
    saveChat(this.#messages);
    if (record.body && !record.body.model) record.body.model = await this.#findModel();
    await answer.follow();
    if (this.#answer !== answer) return;
    saveChat(this.#messages);
    if (answer.unauthorised) this.settings.askForKey();
  }

  async #findModel() {
    const response = await fetch("/v1/models", { headers: this.settings.headers() }).catch(() => null);
    const list = response?.ok ? await response.json() : null;
    return list?.data[0].id ?? "default";
  }

  get #busy() {
    return this.#answer?.record.state === "running";
  }

  #stop() {
    if (this.#busy) this.#answer.stop();
  }

  #clear() {
    this.#stop();
    this.#answer?.leave();
    this.#answer = null;
    this.#messages = [];
    saveChat(this.#messages);
    this.#drawAll();
    $("question").focus();
  }

  /** Draws at most once per frame, however many tokens arrived. */
  #changed(answer) {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      if (this.#answer !== answer) return;
      this.transcript.drawAnswer(answer);
      this.speaker.update(answer.record);
      this.#drawState();
      if (Date.now() - this.#saved > SAVE_EVERY) {
        this.#saved = Date.now();
        saveChat(this.#messages);
      }
    });
  }

  #drawAll() {
    $("welcome").hidden = this.#messages.length > 0;
    $("export-open").hidden = !this.#messages.length;
    this.transcript.drawAll(this.#messages);
    this.#drawState();
  }

  #drawState() {
    const focused = document.activeElement;
    const swapped = focused === $("send") || focused === $("stop");
    $("stop").hidden = !this.#busy;
    $("send").hidden = this.#busy;
    if (swapped && focused.hidden) $("question").focus();
    $("link").textContent = linkText(this.#answer);
    document.body.dataset.link = this.#busy ? this.#answer.link : "idle";
  }

  #size() {
    const field = $("question");
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
  }

  #showStatus(status) {
    if (!status) return;
    this.similarity.offer(status.models);
    const models = status.models.filter(({ kind }) => kind === "generate");
    if (!models.length) return;
    const model = models.find(({ id }) => id === this.#chosen) ?? models[0];
    this.#model = model.id;
    $("model").textContent = model.id;
    offerModels($("models"), models);
    $("models").value = model.id;
    $("models").hidden = models.length < 2;
    $("model").hidden = !$("models").hidden;
    $("version").textContent = `Quire ${status.version} · ${model.numeric_class}`;
    this.settings.setContext(model.max_model_len);
    document.body.dataset.attention = model.max_attention_tokens ?? "";
  }

  #choose(model) {
    this.#chosen = this.#model = model;
    saveModel("chat", model);
  }
}

function linkText(answer) {
  if (answer?.record.state !== "running") return "";
  const seconds = Math.ceil(answer.wait / 1000);
  return {
    reconnecting: "Connection lost. Reconnecting …",
    busy: `The server is busy. Retrying in ${seconds} s …`,
    resumed: "Resumed. Nothing was lost.",
  }[answer.link] ?? "";
}

function listenForTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => $("theme").setAttribute("aria-pressed", String(dark()));
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    saveTheme(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

function listenForPanel() {
  const button = $("panel-switch");
  button.addEventListener("click", () => {
    const open = document.body.classList.toggle("panel-open");
    button.setAttribute("aria-expanded", String(open));
    if (open) $("panel").focus();
    else button.focus();
  });
}

new Page();
