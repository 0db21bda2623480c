// Text to speech: played as it is generated, and as a marked file.

import { speech } from "./api.js";
import { $, number, options, save, seconds, tell } from "./dom.js";
import { speak, stop } from "./player.js";

export function startSpeak(shared) {
  const status = $("speak-status");
  let latest = null;

  function fields() {
    if (!$("text").value.trim()) {
      $("text").focus();
      throw new Error("There is no text; write at least one word.");
    }
    return {
      input: $("text").value,
      voice: $("speak-voice").value,
      speed: number($("speed"), "The speed"),
      seed: number($("seed"), "The seed", true),
    };
  }

  async function play() {
    tell($("speak-error"));
    let asked;
    try {
      asked = fields();
    } catch (error) {
      tell($("speak-error"), error);
      return;
    }
    const mine = (latest = {});
    $("speak-stop").disabled = false;
    try {
      status.textContent = "Waiting for the first audio.";
      const result = await speak(asked, {
        first: (after) => (status.textContent = `First audio after ${seconds(after)}.`),
      });
      const pauses = result.pauses ? ` It paused ${result.pauses} times: the server is slower than the playback.` : "";
      status.textContent =
        `First audio after ${seconds(result.firstAudio ?? 0)}. ${seconds(result.spoken)} of speech ` +
        `came in ${seconds(result.took)}.${pauses}`;
    } catch (error) {
      if (mine !== latest) return;
      status.textContent = error.name === "AbortError" ? "Stopped." : "";
      tell($("speak-error"), error);
    } finally {
      if (mine === latest) $("speak-stop").disabled = true;
    }
  }

  async function download() {
    tell($("speak-error"));
    $("download").disabled = true;
    try {
      const asked = { ...fields(), response_format: $("format").value };
      status.textContent = "Generating the file.";
      const { blob, faults } = await speech(asked);
      save(blob, `${asked.voice}-${asked.seed}.${asked.response_format}`);
      status.textContent = `The file is saved (${Math.ceil(blob.size / 1024)} kB).`;
      if (faults) tell($("speak-error"), `Listen to it before you use it: ${faults}`);
    } catch (error) {
      status.textContent = "";
      tell($("speak-error"), error);
    } finally {
      $("download").disabled = false;
    }
  }

  $("speak-form").addEventListener("submit", (event) => {
    event.preventDefault();
    play();
  });
  $("speak-stop").addEventListener("click", stop);
  $("download").addEventListener("click", download);
  $("new-seed").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    play();
  });
  $("format").addEventListener("change", () => {
    $("format-hint").textContent =
      $("format").value === "pcm"
        ? "Raw samples (16 bit, 24 kHz, mono) cannot carry a mark; use another format to share the file."
        : "The file is generated again with the same seed and marked as synthetic (unless the operator turned marking off).";
  });

  return {
    listed: ({ voices }) => options($("speak-voice"), voices.map((voice) => voice.name), $("speak-voice").value),
  };
}
