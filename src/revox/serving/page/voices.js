// Audition: every voice says the same phrase.

import { request } from "./api.js";
import { $, element, options, tell } from "./dom.js";
import { speak, stop } from "./player.js";

export function startVoices(shared) {
  let all = [];
  let cards = new Map();
  let series = null; // what "Play all" is at
  let playing = null; // {name} of the latest audition

  function shown() {
    const fits = (field, value) => $(field).value === "All" || $(field).value === value;
    return all.filter(
      (voice) =>
        fits("language", voice.language) && fits("sex", voice.sex) && fits("kind", voice.preset ? "preset" : "cloned"),
    );
  }

  function group(voice) {
    return voice.preset ? voice.language : "Cloned";
  }

  function list() {
    const groups = new Map();
    for (const voice of shown()) groups.set(group(voice), [...(groups.get(group(voice)) ?? []), voice]);
    // The cloned ones first.
    const names = [...groups.keys()].sort((a, b) => (b === "Cloned") - (a === "Cloned") || a.localeCompare(b));
    cards = new Map();
    const found = names.flatMap((name) => [
      element("h3", {}, name),
      element("ul", { class: "grid" }, ...groups.get(name).map(card)),
    ]);
    $("voice-groups").replaceChildren(
      ...(found.length ? found : [element("p", { class: "status" }, all.length ? "No voice matches." : "")]),
    );
    if (playing) mark(playing.name, true);
  }

  function card(voice) {
    const { name, uploaded } = voice;
    const play = element("button", { type: "button", "aria-label": `Play ${name}`, onclick: () => toggle(name) }, "Play");
    const use = element("button", { type: "button", "aria-label": `Speak with ${name}`, onclick: () => shared.speakWith(name) }, "Use");
    const facts = [voice.language === "Unknown" ? null : voice.language, voice.sex === "unknown" ? null : voice.sex];
    const about = facts.filter(Boolean).join(", ") || (uploaded ? `cloned by ${uploaded.method ?? "upload"}` : voice.preset ? "preset" : "in the checkpoint");
    const made = element(
      "li",
      { class: "card voice" },
      element("div", { class: "head" }, element("div", { class: "name" }, name, element("small", {}, about)), play, use),
    );
    if (uploaded) {
      if (uploaded.speaker_description) {
        made.append(element("p", { class: "about" }, uploaded.speaker_description));
      }
      const kept = uploaded.sample_kept ? " The recording is kept on the server." : "";
      made.append(element("p", { class: "about" }, `Consent: ${uploaded.consent ?? "unknown"}${kept}`));
      const remove = element("button", { type: "button", "aria-label": `Delete ${name}`, onclick: () => drop(name) }, "Delete");
      made.append(element("div", { class: "buttons" }, remove));
    }
    cards.set(name, { made, play });
    return made;
  }

  function mark(name, on) {
    const found = cards.get(name);
    if (!found) return;
    found.made.classList.toggle("playing", on);
    found.play.textContent = on ? "Stop" : "Play";
    found.play.setAttribute("aria-label", `${on ? "Stop" : "Play"} ${name}`);
  }

  async function audition(name, place = "") {
    const status = $("audition-status");
    tell($("audition-error"));
    if (playing) mark(playing.name, false);
    const mine = (playing = { name });
    mark(name, true);
    $("stop-all").disabled = false;
    status.textContent = `${name}${place}: asked`;
    try {
      const { firstAudio, spoken } = await speak(
        { input: $("phrase").value, voice: name },
        { first: (after) => (status.textContent = `${name}${place}: first audio after ${after.toFixed(2)} s`) },
      );
      status.textContent = `${name}${place}: ${spoken.toFixed(1)} s spoken, first audio after ${firstAudio.toFixed(2)} s`;
    } catch (error) {
      if (mine !== playing) throw error;
      status.textContent = error.name === "AbortError" ? `${name}${place}: stopped` : "";
      tell($("audition-error"), error);
      throw error;
    } finally {
      if (mine === playing) {
        playing = null;
        mark(name, false);
        $("stop-all").disabled = series === null;
      }
    }
  }

  async function toggle(name) {
    series = null;
    if (playing?.name === name) return stop();
    await audition(name).catch(() => {});
  }

  async function playAll() {
    const mine = (series = {});
    const names = shown().map((voice) => voice.name);
    for (const [at, name] of names.entries()) {
      if (series !== mine) return;
      cards.get(name)?.made.scrollIntoView({ block: "nearest" });
      try {
        await audition(name, `, ${at + 1} of ${names.length}`);
      } catch {
        break;
      }
    }
    if (series === mine) {
      series = null;
      $("stop-all").disabled = true;
    }
  }

  async function drop(name) {
    if (!confirm(`Delete the voice ${name}? The log keeps the record of its consent and deletion.`)) return;
    tell($("audition-error"));
    try {
      await request(`/v1/audio/voices/${encodeURIComponent(name)}`, { method: "DELETE" });
      await shared.refresh();
      $("audition-status").textContent = `${name} is deleted.`;
      $("voices-title").focus();
    } catch (error) {
      tell($("audition-error"), error);
    }
  }

  $("audition").addEventListener("submit", (event) => {
    event.preventDefault();
    playAll();
  });
  $("stop-all").addEventListener("click", () => {
    series = null;
    stop();
  });
  for (const field of ["language", "sex", "kind"]) $(field).addEventListener("change", list);

  return {
    listed({ voices }) {
      all = voices;
      const languages = [...new Set(voices.map((voice) => voice.language))].sort();
      options($("language"), ["All", ...languages], $("language").value);
      list();
    },
  };
}
