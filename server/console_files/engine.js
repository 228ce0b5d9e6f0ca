// A live view of the engine, from snapshots that /v1/console sends a few times a second.
const $ = (id) => document.getElementById(id);
const COLUMN = 3; // pixels a snapshot
const LANE = 10;
const FIGURES = ["tokens/s", "running", "waiting", "step, ms", "next token, ms"];

export class Engine {
  constructor(open, headers) {
    this.open = open;
    this.headers = headers;
    this.past = [];
    this.figures = FIGURES.map((name) => {
      const box = document.createElement("div");
      box.innerHTML = "<small></small><b>–</b><canvas height=28></canvas>";
      box.querySelector("small").textContent = name;
      document.querySelector(".figures").appendChild(box);
      return { box, values: [] };
    });
    $("lanes").addEventListener("click", (event) => this.pick(event));
  }

  start() {
    if (this.socket) return;
    this.socket = this.open("/v1/console", "ryzanstein.console");
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    this.socket.onclose = ({ code }) => {
      this.socket = null;
      if (code === 1008) $("pages").textContent = "only the operator's key shows this";
      else if (!$("engine").hidden) setTimeout(() => !$("engine").hidden && this.start(), 1000);
    };
  }

  stop() {
    this.socket?.close();
    this.socket = null;
  }

  take(snapshot) {
    this.past.push(snapshot);
    const most = Math.floor(($("lanes").clientWidth || 600) / COLUMN);
    if (this.past.length > most) this.past.splice(0, this.past.length - most);
    const values = [
      snapshot.tokens_per_second, snapshot.running.length, snapshot.waiting, snapshot.step_ms, snapshot.next_token_ms,
    ];
    this.figures.forEach((figure, n) => {
      figure.values.push(values[n]);
      if (figure.values.length > 120) figure.values.shift();
    });
    this.latest = snapshot;
    if (!this.scheduled) {
      this.scheduled = true;
      requestAnimationFrame(() => this.paint());
    }
  }

  paint() {
    this.scheduled = false;
    const style = getComputedStyle(document.documentElement);
    this.colour = (name) => style.getPropertyValue(`--${name}`);
    for (const { box, values } of this.figures) {
      box.querySelector("b").textContent = values.at(-1).toLocaleString("en", { maximumFractionDigits: 1 });
      this.spark(box.querySelector("canvas"), values);
    }
    this.lanes();
    this.grid();
    const { pages, queue } = this.latest;
    $("pages").textContent = `${pages.used} of ${pages.total} in use, ${pages.cached} cached`;
    $("queue").replaceChildren(...(queue.length ? queue : [{ tenant: "", waiting: 0 }]).map(({ tenant, waiting }) => {
      const item = document.createElement("li");
      item.textContent = `${tenant || "everybody"}: ${waiting} waiting`;
      return item;
    }));
  }

  surface(canvas, height) {
    const scale = devicePixelRatio || 1, width = canvas.clientWidth;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    return [context, width];
  }

  spark(canvas, values) {
    const [context, width] = this.surface(canvas, 28);
    const most = Math.max(...values, 1e-9);
    context.strokeStyle = this.colour("accent");
    context.lineWidth = 1.5;
    context.beginPath();
    values.forEach((value, n) => context.lineTo((n / 119) * width, 26 - (value / most) * 24));
    context.stroke();
  }

  // Lanes are slots: a sequence keeps its own while it runs.
  lanes() {
    const slots = Math.min(64, Math.max(8, ...this.past.map((s) => Math.max(0, ...s.running.map((r) => r.slot + 1)))));
    const [context, width] = this.surface($("lanes"), slots * LANE);
    const colours = { prefill: this.colour("prefill"), decode: this.colour("decode"), preempt: this.colour("preempt") };
    this.past.forEach((snapshot, n) => {
      const x = width - (this.past.length - n) * COLUMN;
      for (const { slot, kind } of snapshot.running) {
        context.fillStyle = colours[kind];
        context.fillRect(x, slot * LANE + 1, COLUMN, LANE - 2);
      }
      context.fillStyle = colours.preempt;
      for (let p = 0; p < snapshot.preempted; p++) context.fillRect(x, 0, COLUMN, slots * LANE);
    });
  }

  grid() {
    const cells = atob(this.latest.pages.cells), size = 6;
    const across = Math.max(1, Math.floor($("grid").clientWidth / size));
    const [context] = this.surface($("grid"), Math.max(1, Math.ceil(cells.length / across)) * size);
    for (let n = 0; n < cells.length; n++) {
      const owner = cells.charCodeAt(n);
      if (!owner) continue;
      context.fillStyle = owner === 1 ? this.colour("cached") : `hsl(${(owner * 47) % 360} 55% 50%)`;
      context.fillRect((n % across) * size, Math.floor(n / across) * size, size - 1, size - 1);
    }
  }

  async pick(event) {
    const box = $("lanes").getBoundingClientRect();
    const column = this.past.length - Math.ceil((box.right - event.clientX) / COLUMN);
    const slot = Math.floor((event.clientY - box.top) / LANE);
    const found = this.past[column]?.running.find((r) => r.slot === slot);
    if (!found) return;
    const answer = await fetch(`/v1/requests/${encodeURIComponent(found.id)}/timeline`, { headers: this.headers() });
    if (answer.ok) this.timeline((await answer.json()).requests[0]);
  }

  timeline(request) {
    const section = $("timeline");
    section.replaceChildren();
    section.hidden = false;
    const title = section.appendChild(document.createElement("h2"));
    title.textContent = `${request.id}: ${request.state}, ${request.total_ms.toFixed(0)} ms`;
    const bar = section.appendChild(document.createElement("div"));
    bar.className = "bar";
    const table = section.appendChild(document.createElement("table"));
    for (const { what, why, ms, tokens } of request.segments) {
      const piece = bar.appendChild(document.createElement("i"));
      piece.dataset.kind = what;
      piece.style.flex = `${ms} 0 0`;
      const row = table.insertRow();
      for (const text of [what, why || "", tokens ? `${tokens} tokens` : "", `${ms.toFixed(1)} ms`]) {
        row.insertCell().textContent = text;
      }
    }
    section.scrollIntoView({ block: "nearest" });
  }
}
