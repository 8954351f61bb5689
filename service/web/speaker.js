// Announces an answer to screen readers sentence by sentence: an element that changes with each
// token would be read from its start again and again.

const SENTENCE = /[.!?:\n]["')\]]*(?=\s)/g;

export class Speaker {
  #area;
  #spoken = 0;

  constructor(area) {
    this.#area = area;
  }

  /** Starts a new answer, whose first `spoken` characters are skipped. */
  begin(spoken) {
    this.#area.replaceChildren();
    this.#spoken = spoken;
  }

  update({ text, state }) {
    let end = state === "running" ? this.#spoken : text.length;
    if (state === "running") {
      SENTENCE.lastIndex = this.#spoken;
      for (let found; (found = SENTENCE.exec(text)); ) end = found.index + found[0].length;
    }
    const sentence = text.slice(this.#spoken, end).trim();
    this.#spoken = end;
    if (!sentence) return;
    const line = document.createElement("p");
    line.textContent = sentence;
    this.#area.append(line);
  }
}
