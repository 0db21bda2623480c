// Cloning: a recording and consent become a voice, at once or as a job; then reference and result together.

import { get, request, speech } from "./api.js";
import { $, element, load, tell } from "./dom.js";
import { axis, decode, draw } from "./sound.js";
import { RATE } from "./player.js";

const POLL = 1000; // ms
const LONGEST_WAIT = 16 * POLL;
const PASSING = new Set([0, 429, 503]); // out of reach, asked too often, busy: the job goes on
const SAID_EVERY = 10; // per cent between two announcements
const LONGEST_RECORDING = 60; // seconds

export function startClone(shared) {
  const recorder = startRecorder({ begins: forget, ends: () => (before = recording()) });
  const watched = new Set();
  let shown = null; // {name, reference: Blob, result: Blob}
  let before = null; // the recording that the statement of consent was written for

  function choose() {
    recorder.forget();
    const [file] = $("file").files;
    load($("recorded"), file ?? null);
    $("recorded").hidden = !file;
    $("record-status").textContent = "";
    forget();
    before = recording();
  }

  // Consent is given for one recording at a time.
  function forget() {
    if (before) $("agreed").checked = false;
    before = null;
  }

  function wrong() {
    const missing = [
      [!recording(), "file", "There is no recording; choose a file, or record one."],
      [!$("agreed").checked, "agreed", "Tick the box that the person agreed; cloning requires consent."],
      [!$("consent").value.trim(), "consent", "Write whose voice it is, and how and when they agreed."],
      [!$("name").value.trim(), "name", "Give the voice a name."],
    ].find(([bad]) => bad);
    if (!missing) return false;
    tell($("clone-error"), missing[2]);
    $(missing[1]).focus();
    return true;
  }

  function recording() {
    return recorder.recorded() ?? $("file").files[0] ?? null;
  }

  async function upload() {
    tell($("clone-error"));
    if (recorder.going()) await recorder.stop();
    if (wrong()) return;
    const reference = recording();
    const name = $("name").value.trim();
    const form = new FormData();
    form.append("audio_sample", reference, reference.name ?? "microphone.webm");
    form.append("consent", $("consent").value.trim());
    form.append("name", name);
    for (const [field, id] of [["subject", "subject"], ["ref_text", "ref-text"], ["speaker_description", "description"]]) {
      if ($(id).value.trim()) form.append(field, $(id).value.trim());
    }
    if ($("keep").checked) form.append("keep_sample", "true");
    $("clone-button").disabled = true;
    $("clone-status").textContent = "Uploading the recording.";
    try {
      const answer = await request("/v1/audio/voices", { method: "POST", form });
      const { job } = await answer.json();
      $("agreed").checked = false;
      $("consent").value = "";
      if (job) await watch(job, reference);
      else await made(name, reference);
    } catch (error) {
      $("clone-status").textContent = "";
      tell($("clone-error"), error);
    } finally {
      $("clone-button").disabled = false;
    }
  }

  // A job until its end, with its progress and a button to end it.
  async function watch(job, reference) {
    if (watched.has(job.id)) return;
    watched.add(job.id);
    const { name } = job;
    const bar = element("progress", { max: 1, value: 0, "aria-label": `Cloning ${name}` });
    const at = element("p", { class: "hint" });
    const failed = element("p", { class: "error", role: "alert", hidden: true });
    const cancel = element("button", { type: "button", "aria-label": `Cancel cloning ${name}` }, "Cancel");
    const card = element("div", { class: "card job" }, element("h2", {}, `Cloning ${name}`), bar, at, failed, cancel);
    cancel.addEventListener("click", () =>
      request(`/v1/audio/voice-jobs/${job.id}`, { method: "DELETE" }).catch((error) => tell(failed, error)),
    );
    $("jobs").append(card);
    let shownPercent = -1;
    let now = job;
    let wait = POLL;
    try {
      while (now.state === "queued" || now.state === "running") {
        if (wait === POLL) {
          bar.value = now.progress;
          at.textContent = describe(now);
          const percent = Math.floor((now.progress * 100) / SAID_EVERY) * SAID_EVERY;
          if (percent !== shownPercent) $("clone-status").textContent = `${name}: ${describe(now)}`;
          shownPercent = percent;
        }
        await new Promise((resolve) => setTimeout(resolve, wait));
        try {
          now = await get(`/v1/audio/voice-jobs/${job.id}`);
          wait = POLL;
        } catch (error) {
          if (!PASSING.has(error.status)) throw error;
          wait = Math.min(2 * wait, LONGEST_WAIT);
          at.textContent = `${error.message} Asked again in ${wait / 1000} s.`;
        }
      }
    } catch (error) {
      at.textContent = "";
      cancel.remove();
      watched.delete(job.id);
      tell(failed, error);
      return;
    }
    if (now.state === "done") {
      card.remove();
      if (reference) await made(name, reference);
      else {
        $("clone-status").textContent = `The voice ${name} is ready.`;
        await shared.refresh();
      }
      return;
    }
    bar.remove();
    cancel.remove();
    at.remove();
    $("clone-status").textContent = "";
    tell(failed, now.error ?? `Cloning ${name} was ${now.state}.`);
    if (now.can_retry) card.append(retry(now, reference, card));
  }

  function retry(job, reference, card) {
    return element("button", {
      type: "button",
      onclick: async () => {
        try {
          const again = await (await request(`/v1/audio/voice-jobs/${job.id}/retry`, { method: "POST" })).json();
          card.remove();
          watch(again.job ?? again, reference);
        } catch (error) {
          tell($("clone-error"), error);
        }
      },
    }, "Try again");
  }

  function describe(job) {
    const percent = `${Math.round(job.progress * 100)} %`;
    if (job.state === "queued") return job.waiting ? `waits for ${job.waiting} before it` : "waits for its turn";
    const left = job.seconds_left == null ? "" : `, about ${Math.ceil(job.seconds_left)} s left`;
    return `${percent}, ${job.phase ?? "running"}${left}`;
  }

  async function made(name, reference) {
    await shared.refresh();
    shown = { name, reference, result: null };
    $("clone-status").textContent = `The voice ${name} is ready.`;
    load($("reference-audio"), reference);
    load($("result-audio"), null);
    ["reference-mel", "result-mel"].forEach(blank);
    $("similarity").textContent = "";
    $("result").hidden = false;
    $("result-title").textContent = `${name}: reference and result`;
    $("result-title").focus();
    await hear(spoken, "Result, spoken in the new voice");
  }

  function spoken() {
    return speech({ input: $("result-text").value, voice: shown.name });
  }

  // Fetch a result, and show it next to the reference.
  async function hear(fetched, caption) {
    if (!shown) return;
    const mine = (shown = { ...shown, result: null }); // an answer to an earlier wish is none
    tell($("result-error"));
    $("similarity").textContent = "";
    $("result-caption").textContent = "Result: generating";
    load($("result-audio"), null);
    blank("result-mel");
    try {
      const { blob, faults } = await fetched();
      if (mine !== shown) return;
      if (faults) tell($("result-error"), `Listen again before you judge: ${faults}`);
      mine.result = blob;
      load($("result-audio"), blob);
      $("result-caption").textContent = caption;
      await pictures(mine);
    } catch (error) {
      if (mine !== shown) return;
      $("result-caption").textContent = "Result";
      tell($("result-error"), error);
    }
  }

  function blank(id) {
    $(id).hidden = true;
    $(id).parentElement.querySelectorAll(".mark, .none").forEach((one) => one.remove());
  }

  async function pictures(mine) {
    const both = [mine.reference, mine.result];
    const sounds = await Promise.all(both.map((blob) => decode(blob).catch((error) => error)));
    if (mine !== shown) return;
    const span = Math.max(...sounds.map((one) => (one instanceof Error ? 0 : one.length / RATE)));
    for (const [at, id, title] of [[0, "reference-mel", "Reference"], [1, "result-mel", "Result"]]) {
      const canvas = $(id);
      const place = canvas.parentElement;
      blank(id);
      canvas.hidden = sounds[at] instanceof Error;
      if (canvas.hidden) {
        place.append(element("p", { class: "none" }, sounds[at].message));
        continue;
      }
      draw(canvas, sounds[at], span, title);
      for (const [hz, share] of axis) {
        const mark = element("span", { class: "mark", "aria-hidden": "true" }, hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`);
        mark.style.bottom = `${share * 100}%`;
        place.append(mark);
      }
    }
  }

  async function judge() {
    if (!shown?.result) return;
    const mine = shown;
    const form = new FormData();
    form.append("reference", mine.reference, "reference");
    form.append("result", mine.result, "result");
    $("judge").disabled = true;
    $("similarity").textContent = "Comparing; the first time takes longer.";
    tell($("result-error"));
    try {
      const answer = await request("/v1/audio/similarity", { method: "POST", form });
      const { similarity, judge } = await answer.json();
      if (mine !== shown) return;
      $("similarity").textContent =
        `Similarity ${similarity.toFixed(2)} (${judge}). In LibriSpeech, two recordings of one person have about 0.87, of two people 0.52.`;
    } catch (error) {
      if (mine !== shown) return;
      $("similarity").textContent = error.status === 501 ? error.message : "";
      if (error.status !== 501) tell($("result-error"), error);
    } finally {
      $("judge").disabled = false;
    }
  }

  $("file").addEventListener("change", choose);
  $("clone-form").addEventListener("submit", (event) => {
    event.preventDefault();
    upload();
  });
  $("again").addEventListener("submit", (event) => {
    event.preventDefault();
    hear(spoken, "Result, spoken in the new voice");
  });
  $("as-codes").addEventListener("click", () =>
    hear(
      async () => ({ blob: await (await request(`/v1/audio/voices/${encodeURIComponent(shown.name)}/preview`)).blob() }),
      "Result: the codes of the recording, decoded",
    ),
  );
  $("judge").addEventListener("click", judge);

  return {
    // Jobs that were begun before this page was opened.
    listed: ({ jobs }) => jobs.forEach((job) => watch(job, null)),
  };
}

// The microphone, as the browser encodes it.
function startRecorder({ begins, ends }) {
  const button = $("record");
  const status = $("record-status");
  let recorder = null;
  let blob = null;
  let timer = null;
  let dropped = false;

  async function begin() {
    blob = null;
    if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
      status.textContent = "This browser allows the microphone on https pages and localhost only; choose a file.";
      return;
    }
    let stream;
    button.disabled = true;
    try {
      // As it sounds: what cleans speech for calls would be cloned too.
      const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
      stream = await navigator.mediaDevices.getUserMedia({ audio });
    } catch (error) {
      const refused = error.name === "NotAllowedError";
      status.textContent = refused
        ? "The microphone is blocked for this page; allow it, or choose a file."
        : error.name === "NotFoundError"
          ? "No microphone was found; choose a file."
          : "The microphone cannot be used now (another program may have it); choose a file.";
      return;
    } finally {
      button.disabled = false;
    }
    if ($("clone").hidden) {
      stream.getTracks().forEach((track) => track.stop());
      return;
    }
    begins();
    const kind = ["audio/webm;codecs=opus", "audio/mp4"].find((one) => MediaRecorder.isTypeSupported(one));
    recorder = new MediaRecorder(stream, { mimeType: kind, audioBitsPerSecond: 128_000 });
    const parts = [];
    recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
    recorder.addEventListener("stop", () => {
      clearInterval(timer);
      stream.getTracks().forEach((track) => track.stop());
      const made = new Blob(parts, { type: recorder.mimeType });
      recorder = null;
      button.textContent = "Record again";
      button.classList.remove("recording");
      if (dropped) return;
      blob = made;
      $("file").value = "";
      load($("recorded"), blob);
      $("recorded").hidden = false;
      status.textContent = "Recorded. Listen to it, or record again.";
      ends();
    });
    dropped = false;
    recorder.start();
    const began = performance.now();
    button.textContent = "Stop recording";
    button.classList.add("recording");
    status.textContent = "Recording. Ten seconds is a good length.";
    timer = setInterval(() => {
      const passed = (performance.now() - began) / 1000;
      button.textContent = `Stop recording (${Math.floor(passed)} s)`;
      if (passed >= LONGEST_RECORDING) stopped();
    }, 250);
  }

  function stopped() {
    if (!recorder) return Promise.resolve();
    const end = new Promise((resolve) => recorder.addEventListener("stop", resolve));
    if (recorder.state !== "inactive") recorder.stop();
    return end;
  }

  button.addEventListener("click", () => (recorder ? stopped() : begin()));
  addEventListener("hashchange", stopped); // no microphone stays open behind another part
  return {
    going: () => recorder !== null,
    recorded: () => blob,
    stop: stopped,
    forget() {
      blob = null;
      dropped = true;
      stopped();
    },
  };
}
