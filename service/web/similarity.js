// Similarity: embeds two texts and shows how close they are, and what their tokens attend to.

import { AttentionView } from "./attention.js";
import { loadModel, saveModel } from "./store.js";

const USES = new Set(["embed", "score"]);
const $ = (id) => document.getElementById(id);

export class SimilarityForm {
  #headers;
  #models = [];
  #views = [];
  #chosen = loadModel("similarity");

  constructor({ headers }) {
    this.#headers = headers;
    $("similarity").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#compare();
    });
    $("similarity-model").addEventListener("change", () => {
      this.#chosen = $("similarity-model").value;
      saveModel("similarity", this.#chosen);
      this.#close();
      this.#draw();
    });
    $("similarity-look").addEventListener("click", () => (this.#views.length ? this.#close() : this.#look()));
  }

  /** Shows the form if a model compares texts. */
  offer(models) {
    this.#models = models.filter(({ kind, served }) => served && USES.has(kind));
    $("similarity").hidden = !this.#models.length;
    offerModels($("similarity-model"), this.#models);
    this.#draw();
  }

  get #model() {
    return this.#models.find(({ id }) => id === this.#chosen) ?? this.#models[0];
  }

  #draw() {
    const model = this.#model;
    if (model) $("similarity-model").value = model.id;
    // A model that scores pairs reads both texts as one; the maps are of single texts.
    $("similarity-look").hidden = model?.kind !== "embed" || !model.max_attention_tokens;
  }

  /** Shows the attention in both texts. */
  #look() {
    if (!$("similarity").reportValidity()) return;
    this.#views = ["text-1", "text-2"].map((id) => new AttentionView(
      { model: this.#model.id, prompt: $(id).value },
      { headers: this.#headers, chosen: 1, label: `Attention in: ${$(id).labels[0].textContent}` },
    ));
    $("similarity").append(...this.#views.map(({ element }) => element));
    $("similarity-look").setAttribute("aria-expanded", "true");
  }

  #close() {
    for (const view of this.#views) view.close();
    this.#views = [];
    $("similarity-look").setAttribute("aria-expanded", "false");
  }

  async #compare() {
    const shown = $("similarity-score");
    shown.textContent = "…";
    shown.textContent = await this.#score($("text-1").value, $("text-2").value);
  }

  async #score(text_1, text_2) {
    try {
      const response = await fetch("/v1/score", {
        method: "POST",
        headers: { "content-type": "application/json", ...this.#headers() },
        body: JSON.stringify({ model: this.#model.id, text_1, text_2 }),
      });
      const body = await response.json();
      return response.ok ? body.data[0].score.toFixed(3) : body.error.message;
    } catch {
      return "The server cannot be reached.";
    }
  }
}

/** Makes the models the options of a menu. One without an engine cannot be chosen. */
export function offerModels(field, models) {
  const known = [...field.options].map(({ value }) => value);
  if (known.join("\n") !== models.map(({ id }) => id).join("\n")) {
    field.replaceChildren(...models.map(({ id }) => new Option(id, id)));
  }
  models.forEach(({ served }, at) => { field.options[at].disabled = !served; });
}
