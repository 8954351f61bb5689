// The engine's live state, asked for once a second while the page can be seen.

const EVERY = 1000;
const KEPT = 60;

export class LiveView {
  #speeds = [];
  #timer = 0;
  #silence = "unreachable";  // what it means that there is no status
  #headers;
  #told;

  /** `told(status)` gets each answer of the server, and null where there was none. */
  constructor({ headers, told }) {
    this.#headers = headers;
    this.#told = told;
    document.addEventListener("visibilitychange", () => this.#tick());
    this.#tick();
  }

  async #tick() {
    clearTimeout(this.#timer);
    if (document.visibilityState === "hidden") return;
    const status = await this.#ask();
    this.#draw(status);
    this.#told(status);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#tick(), EVERY);
  }

  async #ask() {
    try {
      const signal = AbortSignal.timeout(5000);
      const response = await fetch("/status", { headers: this.#headers(), signal, cache: "no-store" });
      this.#silence = response.status === 401 ? "key needed" : "unreachable";
      return response.ok ? await response.json() : null;
    } catch {
      this.#silence = "unreachable";
      return null;
    }
  }

  #draw(status) {
    const engines = status?.engines ?? [];
    const sum = (field) => engines.reduce((total, engine) => total + engine[field], 0);
    const state = status ? stateOf(status) : this.#silence;
    const badge = document.getElementById("engine-state");
    badge.textContent = state;
    badge.classList.toggle("good", state === "ready");
    const speed = sum("tokens_per_second");
    const running = Math.max(0, sum("running") - sum("waiting"));  // an engine counts both as its own
    this.#speeds = [...this.#speeds, speed].slice(-KEPT);
    const figures = {
      speed: speed >= 100 ? speed.toFixed(0) : speed.toFixed(1),
      running: status ? running : "–",
      waiting: status ? sum("waiting") : "–",
      queued: status?.queue?.queued_requests ?? "–",
      engines: status ? engines.length : "–",
      pulse: status ? `${speed.toFixed(0)} tokens/s` : this.#silence,
    };
    for (const [id, value] of Object.entries(figures)) document.getElementById(id).textContent = value;
    this.#drawHistory();
    drawBlocks(sum("blocks_used"), sum("blocks_cached"), sum("blocks_free"));
  }

  #drawHistory() {
    const top = Math.max(10, ...this.#speeds) * 1.1;
    const first = KEPT - this.#speeds.length;
    const points = this.#speeds.map((speed, index) => {
      const x = ((first + index) * 240) / (KEPT - 1);
      return `${x.toFixed(1)} ${(47 - (46 * speed) / top).toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    const start = ((first * 240) / (KEPT - 1)).toFixed(1);
    document.querySelector("#history .line").setAttribute("d", line);
    document.querySelector("#history .area").setAttribute("d", `${line}L240 48L${start} 48Z`);
  }
}

function stateOf(status) {
  if (status.draining) return "shutting down";
  if (!status.queue) return "queue away";
  return status.engines.length ? "ready" : "no engine";
}

function drawBlocks(used, cached, free) {
  const all = used + cached + free;
  document.getElementById("memory").hidden = !all;
  if (!all) return;
  document.getElementById("blocks").textContent = `${used} of ${all} blocks`;
  document.getElementById("blocks-used").style.width = `${(100 * used) / all}%`;
  document.getElementById("blocks-cached").style.width = `${(100 * cached) / all}%`;
}
