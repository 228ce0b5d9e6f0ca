// A chat over /v1/responses with the subprotocol ryzanstein.v1. The conversation is kept in this
// browser; an answer that a reload or a drop cut off is read on from where it was, and asked for again
// if the server has forgotten it.
const $ = (id) => document.getElementById(id);
const KEPT = "ryzanstein.conversation";
const RETRY_MS = [250, 500, 1000, 2000, 4000];

export class Chat {
  constructor(open, show) {
    this.open = open;
    this.show = show;
    this.messages = JSON.parse(localStorage.getItem(KEPT) || "[]");
    this.failures = 0;
    this.dirty = new Set();
    for (const message of this.messages) this.draw(message);
    $("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    $("input").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        this.ask();
      }
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    $("stop").addEventListener("click", () => this.stop());
    $("clear").addEventListener("click", () => this.clear());
    addEventListener("pagehide", () => this.keep());
    this.connect();
  }

  get pending() {
    const last = this.messages.at(-1);
    return last && last.role === "assistant" && !last.done ? last : null;
  }

  connect() {
    this.socket = this.open("/v1/responses", "ryzanstein.v1");
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    this.socket.onclose = () => {
      this.show("offline");
      const wait = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
      setTimeout(() => this.connect(), wait);
    };
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  ask() {
    const text = $("input").value.trim();
    if (!text || this.pending) return;
    $("input").value = "";
    this.add({ role: "user", text });
    const asked = { temperature: Number($("temperature").value), tokens: Number($("tokens").value) };
    this.add({ role: "assistant", text: "", seq: -1, done: false, asked, stats: "" });
    this.request();
  }

  // Ask for the answer that is missing, with all that was said before it.
  request() {
    const answer = this.pending;
    Object.assign(answer, { id: null, text: "", seq: -1, begun: performance.now(), first: null });
    const said = this.messages.slice(0, -1).filter((m) => m.text);
    this.send({
      type: "response.create",
      input: said.map(({ role, text }) => ({ role, content: text })),
      temperature: answer.asked.temperature,
      max_output_tokens: answer.asked.tokens,
    });
    this.draw(answer);
    this.buttons();
  }

  stop() {
    const answer = this.pending;
    if (answer?.id) this.send({ type: "response.cancel", response_id: answer.id });
  }

  clear() {
    this.stop();
    this.messages = [];
    $("messages").replaceChildren();
    this.keep();
    this.buttons();
  }

  take(event) {
    const answer = this.pending;
    if (event.type === "session.created") {
      this.failures = 0;
      this.show("ok");
      if (answer?.id) {
        answer.begun = null;
        this.send({ type: "response.resume", response_id: answer.id, starting_after: answer.seq });
      } else if (answer) this.request();
      return;
    }
    if (!answer) return;
    if ("sequence_number" in event) {
      if (event.sequence_number <= answer.seq) return;
      answer.seq = event.sequence_number;
    }
    if (event.type === "response.created") answer.id = event.response.id;
    else if (event.type === "response.queued.progress") answer.stats = `${event.position + 1}. in the queue: ${event.reason}`;
    else if (event.type === "response.output_text.delta") {
      answer.first ??= performance.now();
      answer.text += event.delta;
    } else if (/^response\.(completed|incomplete|failed)$/.test(event.type)) this.end(answer, event.response);
    else if (event.type === "error") {
      // What the server does not know any more is asked for again.
      if (answer.id && event.status === 404) return this.request();
      answer.done = true;
      answer.error = event.error.message;
    } else return;
    this.draw(answer);
    if (answer.done || event.type === "response.created") this.keep();
    this.buttons();
  }

  end(answer, response) {
    answer.done = true;
    if (response.status === "failed") answer.error = response.error?.message || "the answer failed";
    const tokens = response.usage?.output_tokens ?? 0;
    const parts = [`${tokens} tokens`];
    if (answer.begun && answer.first) {
      const seconds = (performance.now() - answer.first) / 1000;
      parts.push(`first after ${Math.round(answer.first - answer.begun)} ms`);
      if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (response.status === "cancelled" || response.incomplete_details?.reason === "cancelled") parts.push("stopped");
    else if (response.status === "incomplete") parts.push("cut at its length");
    answer.stats = parts.join(" · ");
  }

  add(message) {
    this.messages.push(message);
    this.draw(message);
    this.keep();
  }

  keep() {
    localStorage.setItem(KEPT, JSON.stringify(this.messages));
  }

  buttons() {
    $("stop").hidden = !this.pending;
    $("send").hidden = Boolean(this.pending);
  }

  // At most once a frame, however fast tokens come.
  draw(message) {
    if (!this.dirty.size) requestAnimationFrame(() => this.paint());
    this.dirty.add(message);
  }

  paint() {
    const list = $("messages");
    const below = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    for (const message of this.dirty) {
      const number = this.messages.indexOf(message);
      if (number < 0) continue;
      let item = list.children[number];
      if (!item) {
        item = list.appendChild(document.createElement("li"));
        item.className = message.role;
        for (const name of ["text", "error", "stats"]) {
          item.appendChild(document.createElement("span")).className = name;
        }
      }
      for (const name of ["text", "error", "stats"]) {
        item.querySelector(`.${name}`).textContent = message[name] || "";
      }
    }
    this.dirty.clear();
    if (below) list.scrollTop = list.scrollHeight;
    this.buttons();
  }
}
