// Says an answer to screen readers sentence by sentence: an element that changes with each token
// would be read from its start again and again.

const SENTENCE = /[.!?:\n]["')\]]*(?=\s)/g;

export class Speaker {
  #area;
  #said = 0;

  constructor(area) {
    this.#area = area;
  }

  /** A new answer, of which so much need not be said. */
  begin(said) {
    this.#area.replaceChildren();
    this.#said = said;
  }

  hear({ text, state }) {
    let end = state === "running" ? this.#said : text.length;
    if (state === "running") {
      SENTENCE.lastIndex = this.#said;
      for (let found; (found = SENTENCE.exec(text)); ) end = found.index + found[0].length;
    }
    const sentence = text.slice(this.#said, end).trim();
    this.#said = end;
    if (!sentence) return;
    const line = document.createElement("p");
    line.textContent = sentence;
    this.#area.append(line);
  }
}
