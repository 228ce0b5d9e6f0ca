// A chat over v1/responses with the subprotocol ryzanstein.v1. Each tab keeps its conversation, and a
// new one begins with that which was kept last; an answer that a reload or a drop cut off is read on from where it was, and asked for again
// if the server has forgotten it. Lost connections are tried again by themselves for a while; Resume tries
// at once and from anew, and lets the model go on with an answer that was stopped or failed.
const $ = (id) => document.getElementById(id);
const KEPT = "ryzanstein.conversation", SET = "ryzanstein.settings";

// A list that this tab kept, or the last one that did; none if it cannot be read.
function kept(name) {
  try {
    const list = JSON.parse(sessionStorage.getItem(name) ?? localStorage.getItem(name) ?? "[]");
    return Array.isArray(list) ? list : [];
  } catch {
    return [];
  }
}

function keep(name, list) {
  for (const storage of [sessionStorage, localStorage]) storage.setItem(name, JSON.stringify(list));
}

const RETRY_MS = [250, 500, 1000, 2000, 4000, 4000, 4000, 4000, 4000, 4000];

export class Chat {
  constructor(open, show) {
    this.open = open;
    this.show = show;
    this.messages = kept(KEPT);
    const [warmth, tokens] = kept(SET);
    if (warmth !== undefined) $("temperature").value = warmth;
    if (tokens !== undefined) $("tokens").value = tokens;
    this.failures = 0;
    this.dirty = new Set();
    for (const message of this.messages) this.draw(message);
    $("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    $("input").addEventListener("keydown", (event) => {
      // An Enter that chooses what is being composed (Japanese, Chinese, Korean) sends nothing.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
        event.preventDefault();
        $("compose").requestSubmit();
      }
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    $("stop").addEventListener("click", () => this.stop());
    $("resume").addEventListener("click", () => this.resume());
    addEventListener("online", () => this.reconnect());
    $("clear").addEventListener("click", () => this.clear());
    addEventListener("pagehide", () => this.keep());
    this.connect();
  }

  get pending() {
    const last = this.messages.at(-1);
    return last && last.role === "assistant" && !last.done ? last : null;
  }

  connect() {
    this.greeted = false;
    this.socket = this.open("v1/responses", "ryzanstein.v1");
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    this.socket.onclose = () => {
      const wait = RETRY_MS[this.failures++];
      this.show(wait ? "offline" : "disconnected");
      if (wait) this.retry = setTimeout(() => this.connect(), wait);
      this.buttons();
    };
  }

  get connected() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  // Now, and with all attempts ahead again.
  reconnect() {
    if (this.socket.readyState !== WebSocket.CLOSED) return;
    clearTimeout(this.retry);
    this.failures = 0;
    this.connect();
  }

  // An answer that ended before its end; it is the last thing that was said.
  get broken() {
    const last = this.messages.at(-1);
    if (!last || last.role !== "assistant" || !last.done) return null;
    return last.stopped || last.error || last.limited ? last : null;
  }

  // What is left out of a request is as the model's makers recommend.
  get settings() {
    const warmth = $("temperature").value, tokens = $("tokens").value;
    keep(SET, [warmth, tokens]);
    return { temperature: warmth === "" ? undefined : Number(warmth), tokens: Number(tokens) };
  }

  resume() {
    const answer = this.broken;
    if (answer && $("compose").reportValidity()) {
      const base = answer.text.trimEnd();
      // One that was cut at its length has as much again.
      if (answer.limited) answer.used = 0;
      const again = { done: false, stopped: false, limited: false, error: "", stats: "", id: null };
      Object.assign(answer, again, { base, asked: this.settings });
      this.keep();
      if (this.connected) this.request();
    }
    this.reconnect();
    this.buttons();
  }

  send(message) {
    if (this.connected) this.socket.send(JSON.stringify(message));
  }

  ask() {
    const text = $("input").value.trim();
    if (!text || this.pending) return;
    $("input").value = "";
    this.add({ role: "user", text });
    const asked = this.settings;
    this.add({ role: "assistant", text: "", seq: -1, done: false, asked, used: 0, stats: "" });
    this.request();
    this.reconnect();
  }

  // Ask for the answer that is missing, or for what is missing of it, with all that was said before.
  request() {
    const answer = this.pending, { temperature, tokens } = answer.asked;
    const base = answer.base || "";
    Object.assign(answer, { id: null, text: base, seq: -1, begun: performance.now(), first: null, cut: false, pieces: 0 });
    const said = this.said.map(({ role, text }) => ({ role, content: text }));
    if (base) {
      this.send({
        type: "chat.completion.create",
        request: {
          messages: [...said, { role: "assistant", content: base }],
          continue_final_message: true,
          temperature,
          max_tokens: Math.max(1, tokens - (answer.used || 0)),
        },
      });
    } else {
      this.send({ type: "response.create", input: said, temperature, max_output_tokens: tokens });
    }
    this.draw(answer);
    this.buttons();
  }

  // What the model is told of what was said before its answer: not what it could not answer.
  get said() {
    const before = this.messages.slice(0, -1);
    const unanswered = (m) => m?.role === "assistant" && m.error && !m.text;
    return before.filter((m, number) => m.text && !unanswered(before[number + 1]));
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
      this.greeted = true;
      this.failures = 0;
      this.show("ok");
      if (answer?.id) {
        answer.begun = null;
        this.send({ type: "response.resume", response_id: answer.id, starting_after: answer.seq });
      } else if (answer) this.request();
      return;
    }
    // A server that still loads says so and closes; the answer is asked for when it has loaded.
    if (!answer || !this.greeted) return;
    if ("sequence_number" in event) {
      if (event.sequence_number <= answer.seq) return;
      answer.seq = event.sequence_number;
    }
    if (event.type === "response.created") answer.id = event.response.id;
    else if (event.type === "response.queued.progress") answer.stats = `${event.position + 1}. in the queue: ${event.reason}`;
    else if (event.type === "response.output_text.delta") {
      answer.first ??= performance.now();
      answer.pieces++;
      answer.text += event.delta;
    } else if (event.type === "chat.completion.chunk") {
      const [choice] = event.chunk.choices;
      if (choice?.delta.content) {
        answer.first ??= performance.now();
        answer.pieces++;
      }
      answer.text += choice?.delta.content || "";
      answer.cut ||= choice?.finish_reason === "length";
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
    // One that failed does not say what it took; a token or more came with each piece.
    const tokens = response.usage?.output_tokens ?? response.usage?.completion_tokens ?? answer.pieces;
    answer.used = (answer.used || 0) + tokens;
    answer.stopped = response.status === "cancelled" || response.incomplete_details?.reason === "cancelled";
    const parts = [`${answer.used} tokens`];
    if (answer.begun && answer.first) {
      const seconds = (performance.now() - answer.first) / 1000;
      parts.push(`first after ${Math.round(answer.first - answer.begun)} ms`);
      if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    answer.limited = !answer.stopped && (answer.cut || response.status === "incomplete");
    if (answer.stopped) parts.push("stopped");
    else if (answer.limited) parts.push("cut at its length");
    answer.stats = parts.join(" · ");
  }

  add(message) {
    this.messages.push(message);
    this.draw(message);
    this.keep();
  }

  keep() {
    keep(KEPT, this.messages);
  }

  buttons() {
    const waits = this.socket && this.socket.readyState !== WebSocket.CONNECTING && !this.connected;
    $("stop").hidden = !this.pending || waits;
    $("send").hidden = Boolean(this.pending);
    $("resume").hidden = !(this.pending ? waits : this.broken);
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
