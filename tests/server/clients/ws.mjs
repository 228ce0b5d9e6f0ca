// npm's `ws`: a stream is cut after some events, and read on from another connection.
import WebSocket from "ws";

const url = `${process.argv[2].replace("http", "ws")}/v1/responses`;

function connect(first, take) {
  return new Promise((resolve, reject) => {
    const events = [];
    const socket = new WebSocket(url, "ryzanstein.v1");
    socket.on("error", reject);
    socket.on("message", (data) => {
      const event = JSON.parse(data);
      if (event.type === "session.created") return socket.send(JSON.stringify(first));
      if (events.length === take) return;
      events.push(event);
      const over = ["response.completed", "response.incomplete"].includes(event.type);
      if (over || events.length === take) {
        socket.terminate();
        resolve(events);
      }
    });
  });
}

const create = { type: "response.create", input: "hi", max_output_tokens: 8 };
const seen = await connect(create, 6);
const { id } = seen.find((event) => event.type === "response.created").response;
const last = seen.at(-1).sequence_number;
const rest = await connect({ type: "response.resume", response_id: id, starting_after: last }, 1e9);
const events = [...seen, ...rest];
const text = events.map((event) => event.delta ?? "").join("");
console.log(JSON.stringify({ text, numbers: events.map((event) => event.sequence_number) }));
