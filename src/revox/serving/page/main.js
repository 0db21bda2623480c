// The page: which part is shown, who may ask, and the voices that all parts share.

import { get, setKey, voices } from "./api.js";
import { startClone } from "./clone.js";
import { startCompare } from "./compare.js";
import { $, tell } from "./dom.js";
import { stop } from "./player.js";
import { startSpeak } from "./speak.js";
import { startVoices } from "./voices.js";

const PARTS = ["voices", "clone", "speak", "compare"];
const shared = {
  voices: [],
  // Ask for the voices again, and show them everywhere.
  async refresh() {
    const listed = await voices();
    this.voices = listed.voices;
    for (const part of parts) part.listed(listed);
  },
  // Go to Speak with a voice.
  speakWith(name) {
    $("speak-voice").value = name;
    location.hash = "#speak";
  },
};
const parts = [startVoices(shared), startClone(shared), startSpeak(shared), startCompare(shared)];

function show(focus) {
  const asked = location.hash.slice(1);
  if (asked === "main") return;
  const part = PARTS.includes(asked) ? asked : PARTS[0];
  stop();
  for (const name of PARTS) {
    $(name).hidden = name !== part;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === part) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = $(`${part}-title`);
  document.title = `${title.textContent} · revox`;
  if (focus) {
    title.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

async function begin() {
  tell($("problem"));
  try {
    const models = await get("/v1/models");
    $("model").textContent = models.data?.[0]?.id ?? "";
    await shared.refresh();
  } catch (error) {
    // The form of the key shows this error.
    if (error.status !== 401) tell($("problem"), error);
  }
}

const asking = new Map(); // server -> why it asks for a key
let asked = null; // the server whose key the form takes
function showKeyForm() {
  // This server first: without its key the page is empty.
  asked = asking.has("") ? "" : (asking.keys().next().value ?? null);
  $("key-form").hidden = asked === null;
  $("key").value = "";
  if (asked === null) return;
  $("key-title").textContent = asked ? `${asked} requires an API key` : "An API key is required";
  $("key-why").textContent = asking.get(asked);
  $("key").focus();
}
document.addEventListener("revox:key", ({ detail: { server, message } }) => {
  asking.set(server, message);
  // A key that is being typed is for the server that is shown.
  if (!$("key").value) showKeyForm();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!key || !/^[\x21-\x7e]+$/.test(key)) {
    $("key-why").textContent = "A key consists of letters, digits and symbols, without spaces.";
    return;
  }
  const server = asked;
  setKey(server, key);
  asking.delete(server);
  showKeyForm();
  if (server) document.dispatchEvent(new CustomEvent("revox:other"));
  else begin();
});
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});

addEventListener("hashchange", () => show(true));
show(false);
begin();
