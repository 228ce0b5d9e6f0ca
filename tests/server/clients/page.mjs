// Runs the web page of docs/websocket.md with what a browser would give it; prints the answer.
import { readFileSync } from "node:fs";
import WebSocket from "ws";

const text = readFileSync("../../../docs/websocket.md", "utf8");
const page = text.match(/```html\n(.*?)```/s)[1];
const script = page.match(/<script>(.*?)<\/script>/s)[1];
const elements = Object.fromEntries(
  [...page.matchAll(/id="(\w+)"/g)].map(([, id]) => [id, { textContent: "" }]),
);
const document = { getElementById: (id) => elements[id] };
const url = process.argv[2].replace("http://", "");
new Function("document", "WebSocket", script.replaceAll("127.0.0.1:8000", url))(document, WebSocket);
const started = Date.now();
const timer = setInterval(() => {
  if (elements.answer.textContent.length < 40 && Date.now() - started < 20_000) return;
  clearInterval(timer);
  elements.stop.onclick();
  setTimeout(() => {
    console.log(JSON.stringify({ text: elements.answer.textContent }));
    process.exit(0);
  }, 300);
}, 5);
