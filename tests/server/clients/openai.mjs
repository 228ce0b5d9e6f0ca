// OpenAI's JavaScript client against a running server; prints what it got.
import OpenAI from "openai";
import { ResponsesWS } from "openai/resources/responses/ws";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const limits = { model: "mock", max_tokens: 8 };
const found = {};

const whole = await client.chat.completions.create({ ...limits, messages });
found.chat = whole.choices[0].message.content;

found.stream = "";
for await (const chunk of await client.chat.completions.create({
  ...limits,
  messages,
  stream: true,
  stream_options: { include_usage: true },
})) {
  found.stream += chunk.choices[0]?.delta?.content ?? "";
  found.tokens = chunk.usage?.completion_tokens;
}

const plain = await client.completions.create({ ...limits, prompt: "ab" });
found.plain = plain.choices[0].text;

const response = await client.responses.create({ model: "mock", input: "hi", max_output_tokens: 8 });
found.response = response.output_text;

found.responseStream = "";
for await (const event of await client.responses.create({
  model: "mock",
  input: "hi",
  max_output_tokens: 8,
  stream: true,
})) {
  if (event.type === "response.output_text.delta") found.responseStream += event.delta;
}

try {
  await client.chat.completions.create({ ...limits, model: "other", messages });
} catch (error) {
  found.error = `${error.constructor.name} ${error.code}`;
}

found.socket = await new Promise((resolve, reject) => {
  let text = "";
  const socket = new ResponsesWS(client);
  socket.on("error", reject);
  socket.on("response.output_text.delta", (event) => (text += event.delta));
  socket.on("response.incomplete", () => {
    socket.close();
    resolve(text);
  });
  const event = { type: "response.create", model: "mock", input: "hi", max_output_tokens: 8 };
  if (socket.socket.readyState === 1) socket.send(event);
  else socket.socket.on("open", () => socket.send(event));
});

console.log(JSON.stringify(found));
