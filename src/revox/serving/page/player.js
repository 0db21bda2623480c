// Speech is played while it is made: raw samples from a stream, one WebAudio buffer after another.

import { request } from "./api.js";

export const RATE = 24000; // Hz, the model's own
const LEAD = 0.06; // seconds before the first sound
const REST = 0.4; // seconds gathered after the stream ran dry

let context = null;
let current = null;

export function stop() {
  current?.abort.abort();
}

// Speak `fields` of POST /v1/audio/speech and play it as it is generated; one at a time, the latest request.
// on.first(seconds) when the first audio is here. Resolves when all was heard:
// {firstAudio, took, spoken: seconds, pauses}. Stopping is an AbortError.
export async function speak(fields, on = {}) {
  stop();
  const mine = (current = { abort: new AbortController(), nodes: new Set() });
  const { signal } = mine.abort;
  const silence = () => mine.nodes.forEach((node) => node.stop());
  signal.addEventListener("abort", silence);
  const began = performance.now();
  try {
    // In the click itself: browsers let no page sound before one.
    context ??= new AudioContext({ sampleRate: RATE });
    const awake = context.state === "running" ? null : context.resume();
    const response = await request("/v1/audio/speech", {
      method: "POST",
      json: { ...fields, response_format: "pcm", sample_rate: RATE, stream_format: "audio" },
      signal,
    });
    await awake;
    const reader = response.body.getReader();
    const line = new Line(mine.nodes);
    let firstAudio = null;
    let left = new Uint8Array(0);
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError" || signal.aborted) throw error;
        throw new Error("The stream ended early; the speech is incomplete. Try again.");
      }
      if (piece.done) break;
      // A sample is two bytes, and a piece may end between them.
      const bytes = new Uint8Array(left.length + piece.value.length);
      bytes.set(left);
      bytes.set(piece.value, left.length);
      const whole = bytes.length & ~1;
      left = bytes.slice(whole);
      if (!whole) continue;
      if (firstAudio === null) {
        firstAudio = (performance.now() - began) / 1000;
        on.first?.(firstAudio);
      }
      line.add(samples(bytes, whole));
    }
    const took = (performance.now() - began) / 1000;
    await line.end(signal);
    return { firstAudio, took, spoken: line.seconds, pauses: line.pauses };
  } catch (error) {
    silence();
    throw error;
  } finally {
    signal.removeEventListener("abort", silence);
    if (current === mine) current = null;
  }
}

function samples(bytes, length) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, length);
  const floats = new Float32Array(length / 2);
  for (let i = 0; i < floats.length; i++) floats[i] = view.getInt16(2 * i, true) / 32768;
  return floats;
}

// Buffers in a row. What comes in pieces too small to schedule by themselves is gathered.
class Line {
  constructor(nodes) {
    this.nodes = nodes;
    this.next = 0;
    this.seconds = 0;
    this.pauses = 0;
    this.waiting = [];
    this.last = null;
  }

  add(floats) {
    this.seconds += floats.length / RATE;
    this.waiting.push(floats);
    const late = this.next < context.currentTime;
    const gathered = this.waiting.reduce((sum, one) => sum + one.length, 0) / RATE;
    if (this.last && late && gathered < REST) return;
    this.flush();
  }

  flush() {
    if (!this.waiting.length) return;
    const length = this.waiting.reduce((sum, one) => sum + one.length, 0);
    const buffer = context.createBuffer(1, length, RATE);
    let at = 0;
    for (const one of this.waiting) {
      buffer.copyToChannel(one, 0, at);
      at += one.length;
    }
    this.waiting = [];
    if (this.next < context.currentTime) {
      if (this.last) this.pauses += 1;
      this.next = context.currentTime + LEAD;
    }
    const node = context.createBufferSource();
    node.buffer = buffer;
    node.connect(context.destination);
    node.start(this.next);
    this.next += buffer.duration;
    this.nodes.add(node);
    node.onended = () => this.nodes.delete(node);
    this.last = node;
  }

  // When all was heard.
  end(signal) {
    this.flush();
    return new Promise((resolve, reject) => {
      const stopped = () => reject(new DOMException("Stopped", "AbortError"));
      if (signal.aborted) return stopped();
      signal.addEventListener("abort", stopped);
      if (!this.last || !this.nodes.has(this.last)) resolve();
      else this.last.addEventListener("ended", resolve);
    });
  }
}
