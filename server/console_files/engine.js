// A live view of the engine, from snapshots that /v1/console sends a few times a second.
const $ = (id) => document.getElementById(id);
const COLUMN = 3; // pixels a snapshot
const LANE = 10;
const NUMBERS = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const CELL = 6;
const CACHED = [140, 150, 146, 110];
const FIGURES = ["tokens/s", "running", "waiting", "step, ms", "next token, ms"];

// A colour of the wheel, as red, green, blue and opacity.
function hue(degrees) {
  const part = (offset) => Math.round(255 * (0.52 - 0.28 * Math.cos(((degrees + offset) * Math.PI) / 180)));
  return [part(180), part(60), part(300), 255];
}

export class Engine {
  constructor(open, headers) {
    this.open = open;
    this.headers = headers;
    this.past = [];
    this.fresh = 0; // snapshots that the lanes do not show yet
    this.slots = 8;
    this.small = document.createElement("canvas");
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
    this.socket = this.open("v1/console", "ryzanstein.console");
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
    this.fresh++;
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
      box.querySelector("b").textContent = NUMBERS.format(values.at(-1));
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

  // A canvas of whole pixels of the screen; whether it had another size, and so is empty now.
  surface(canvas, height) {
    const scale = devicePixelRatio || 1, width = canvas.clientWidth;
    const resized = canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale);
    if (resized) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    return { context, width, scale, resized };
  }

  spark(canvas, values) {
    const { context, width } = this.surface(canvas, 28);
    context.clearRect(0, 0, width, 28);
    const most = Math.max(...values, 1e-9);
    context.strokeStyle = this.colour("accent");
    context.lineWidth = 1.5;
    context.beginPath();
    values.forEach((value, n) => context.lineTo((n / 119) * width, 26 - (value / most) * 24));
    context.stroke();
  }

  // Lanes are slots: a sequence keeps its own while it runs. What is there moves to the left, and only
  // what is new is drawn.
  lanes() {
    const canvas = $("lanes");
    this.slots = Math.min(64, Math.max(this.slots, ...this.latest.running.map((r) => r.slot + 1)));
    const { context, width, scale, resized } = this.surface(canvas, this.slots * LANE);
    const fresh = Math.min(resized ? Infinity : this.fresh, this.past.length);
    if (!resized) {
      context.save();
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.globalCompositeOperation = "copy";
      context.drawImage(canvas, -Math.round(fresh * COLUMN * scale), 0);
      context.restore();
    }
    const colours = { prefill: this.colour("prefill"), decode: this.colour("decode"), preempt: this.colour("preempt") };
    this.past.slice(-fresh).forEach((snapshot, n) => {
      const x = width - (fresh - n) * COLUMN;
      for (const kind of ["prefill", "decode"]) {
        context.fillStyle = colours[kind];
        for (const r of snapshot.running) {
          if (r.kind === kind) context.fillRect(x, r.slot * LANE + 1, COLUMN, LANE - 2);
        }
      }
      if (snapshot.preempted) {
        context.fillStyle = colours.preempt;
        context.fillRect(x, 0, COLUMN, this.slots * LANE);
      }
    });
    this.fresh = 0;
  }

  // A pixel for each cell, then enlarged as a whole.
  grid() {
    const cells = atob(this.latest.pages.cells);
    const across = Math.max(1, Math.floor($("grid").clientWidth / CELL)), down = Math.ceil(cells.length / across);
    Object.assign(this.small, { width: across, height: down });
    const small = this.small.getContext("2d"), image = small.createImageData(across, down);
    for (let n = 0; n < cells.length; n++) {
      const owner = cells.charCodeAt(n);
      if (owner) image.data.set(owner === 1 ? CACHED : hue((owner * 47) % 360), 4 * n);
    }
    small.putImageData(image, 0, 0);
    const { context, width } = this.surface($("grid"), down * CELL);
    context.clearRect(0, 0, width, down * CELL);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small, 0, 0, across * CELL, down * CELL);
  }

  async pick(event) {
    const box = $("lanes").getBoundingClientRect();
    const column = this.past.length - Math.ceil((box.right - event.clientX) / COLUMN);
    const slot = Math.floor((event.clientY - box.top) / LANE);
    const found = this.past[column]?.running.find((r) => r.slot === slot);
    if (!found) return;
    const answer = await fetch(`v1/requests/${encodeURIComponent(found.id)}/timeline`, { headers: this.headers() });
    if (answer.ok) this.timeline((await answer.json()).requests[0], found.index);
  }

  // Each choice's time, the one of the lane that was clicked first.
  timeline(request, picked) {
    const section = $("timeline");
    section.replaceChildren();
    section.hidden = false;
    const title = section.appendChild(document.createElement("h2"));
    title.textContent = `${request.id}: ${request.state}, ${request.total_ms.toFixed(0)} ms`;
    const choices = request.choices.toSorted((a, b) => (b.index === picked) - (a.index === picked));
    for (const choice of choices) {
      const name = section.appendChild(document.createElement("h3"));
      const many = choices.length > 1 ? `choice ${choice.index}: ` : "";
      name.textContent = `${many}${(100 * choice.explained).toFixed(1)}% of ${choice.total_ms.toFixed(0)} ms explained`;
      this.segments(section, request.segments.filter(({ index }) => index === choice.index));
    }
    section.scrollIntoView({ block: "nearest" });
  }

  segments(section, segments) {
    const bar = section.appendChild(document.createElement("div"));
    bar.className = "bar";
    const table = section.appendChild(document.createElement("table"));
    for (const { what, why, ms, tokens } of segments) {
      const piece = bar.appendChild(document.createElement("i"));
      piece.dataset.kind = what;
      piece.style.flex = `${ms} 0 0`;
      const row = table.insertRow();
      for (const text of [what, why || "", tokens ? `${tokens} tokens` : "", `${ms.toFixed(1)} ms`]) {
        row.insertCell().textContent = text;
      }
    }
  }
}
