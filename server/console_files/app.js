// The page's frame: tabs, the key, and whether the server is there.
import { Chat } from "./chat.js";
import { Engine } from "./engine.js";

const $ = (id) => document.getElementById(id);

// Of this tab alone: a key is nobody's business once it is closed.
export const key = () => sessionStorage.getItem("key") || "";

export function headers() {
  return key() ? { authorization: `Bearer ${key()}` } : {};
}

export function open(path, protocol) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const protocols = protocol ? [protocol] : [];
  if (key()) protocols.push(`openai-insecure-api-key.${key()}`);
  return new WebSocket(url, protocols);
}

function show(state) {
  $("state").dataset.state = state;
  $("state").textContent = state;
}

async function askForKey() {
  const dialog = $("ask-key");
  $("key").placeholder = key() ? "that one is not valid" : "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  sessionStorage.setItem("key", $("key").value);
  $("key").value = "";
}

async function models() {
  for (;;) {
    try {
      const answer = await fetch("v1/models", { headers: headers() });
      if (answer.status === 401) {
        await askForKey();
        continue;
      }
      if (answer.ok) return (await answer.json()).data[0];
      show(answer.status === 503 ? "loading" : "offline");
    } catch {
      show("offline");
    }
    await new Promise((done) => setTimeout(done, 1000));
  }
}

const tabs = ["chat", "engine"];

function select(name) {
  for (const tab of tabs) {
    const chosen = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", chosen);
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    $(tab).hidden = !chosen;
  }
  name === "engine" ? engine.start() : engine.stop();
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
}

for (const tab of tabs) {
  $(`tab-${tab}`).addEventListener("click", () => select(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    select(other);
    $(`tab-${other}`).focus();
  });
}

const engine = new Engine(open, headers);
const model = await models();
$("model").textContent = model.id;
new Chat(open, show);
select(location.hash === "#engine" ? "engine" : "chat");
