// Similarity: embeds two texts with the first model that compares texts, and shows how close they are.

const $ = (id) => document.getElementById(id);

export class SimilarityForm {
  #headers;
  #model = null;

  constructor({ headers }) {
    this.#headers = headers;
    $("similarity").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#compare();
    });
  }

  /** Shows the form if a model compares texts. */
  offer(models) {
    const found = models.find(({ kind, served }) => served && (kind === "embed" || kind === "score"));
    this.#model = found?.id ?? null;
    $("similarity").hidden = !found;
    $("similarity-model").textContent = this.#model ?? "";
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
        body: JSON.stringify({ model: this.#model, text_1, text_2 }),
      });
      const body = await response.json();
      return response.ok ? body.data[0].score.toFixed(3) : body.error.message;
    } catch {
      return "The server cannot be reached.";
    }
  }
}
