// The engine's live state, polled once per second while the page is visible.

const INTERVAL = 1000;  // ms
const HISTORY = 60;  // readings

export class LiveView {
  #speeds = [];
  #timer = 0;
  #absence = "unreachable";  // the state if there is no status
  #headers;
  #onStatus;

  /** `onStatus(status)` receives each status, or null if there was none. */
  constructor({ headers, onStatus }) {
    this.#headers = headers;
    this.#onStatus = onStatus;
    document.addEventListener("visibilitychange", () => this.#tick());
    this.#tick();
  }

  async #tick() {
    clearTimeout(this.#timer);
    if (document.visibilityState === "hidden") return;
    const status = await this.#ask();
    this.#draw(status);
    this.#onStatus(status);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#tick(), INTERVAL);
  }

  async #ask() {
    try {
      const signal = AbortSignal.timeout(5000);
      const response = await fetch("/status", { headers: this.#headers(), signal, cache: "no-store" });
      this.#absence = response.status === 401 ? "key needed" : "unreachable";
      return response.ok ? await response.json() : null;
    } catch {
      this.#absence = "unreachable";
      return null;
    }
  }

  #draw(status) {
    const engines = status?.engines ?? [];
    const sum = (field) => engines.reduce((total, engine) => total + engine[field], 0);
    const state = status ? stateOf(status) : this.#absence;
    const badge = document.getElementById("engine-state");
    badge.textContent = state;
    badge.classList.toggle("good", state === "ready");
    const speed = sum("tokens_per_second");
    const running = Math.max(0, sum("running") - sum("waiting"));  // an engine's running includes its waiting
    this.#speeds = [...this.#speeds, speed].slice(-HISTORY);
    const figures = {
      speed: speed >= 100 ? speed.toFixed(0) : speed.toFixed(1),
      running: status ? running : "–",
      waiting: status ? sum("waiting") : "–",
      queued: status?.queue?.queued_requests ?? "–",
      engines: status ? engines.length : "–",
      pulse: status ? `${speed.toFixed(0)} tokens/s` : this.#absence,
    };
    for (const [id, value] of Object.entries(figures)) document.getElementById(id).textContent = value;
    this.#drawHistory();
    drawBlocks(sum("blocks_used"), sum("blocks_cached"), sum("blocks_free"));
  }

  #drawHistory() {
    const top = Math.max(10, ...this.#speeds) * 1.1;
    const first = HISTORY - this.#speeds.length;
    const points = this.#speeds.map((speed, index) => {
      const x = ((first + index) * 240) / (HISTORY - 1);
      return `${x.toFixed(1)} ${(47 - (46 * speed) / top).toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    const start = ((first * 240) / (HISTORY - 1)).toFixed(1);
    document.querySelector("#history .line").setAttribute("d", line);
    document.querySelector("#history .area").setAttribute("d", `${line}L240 48L${start} 48Z`);
  }
}

function stateOf(status) {
  if (status.draining) return "shutting down";
  if (!status.queue) return "queue unreachable";
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
