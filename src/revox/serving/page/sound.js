// Files of sound, decoded by the browser, and pictures of them: mel spectrograms on a canvas.

import { RATE } from "./player.js";

const SIZE = 1024; // samples of an analysis window
const HOP = 240; // samples, 10 ms
const BANDS = 96;
const FLOOR = -60; // dB about the loud parts
const CEILING = 5;
const LONGEST = 30; // seconds that are drawn
const MARKS = [500, 1000, 2000, 4000, 8000]; // Hz

// The samples of a file as mono at 24 kHz. An Error, when this browser cannot read it.
export async function decode(blob) {
  const context = new OfflineAudioContext(1, 1, RATE);
  let audio;
  try {
    audio = await context.decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error("This browser cannot decode the recording, so its spectrogram is missing.");
  }
  const mono = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel++) {
    const one = audio.getChannelData(channel);
    for (let i = 0; i < mono.length; i++) mono[i] += one[i] / audio.numberOfChannels;
  }
  return mono;
}

const hzToMel = (hz) => (hz < 1000 ? (hz * 3) / 200 : 15 + (Math.log(hz / 1000) * 27) / Math.log(6.4));
const melToHz = (mel) => (mel < 15 ? (mel * 200) / 3 : 1000 * Math.exp((Math.log(6.4) / 27) * (mel - 15)));

function filters(bands, size, rate) {
  const top = hzToMel(rate / 2);
  const edges = Array.from({ length: bands + 2 }, (_, i) => melToHz((top * i) / (bands + 1)));
  return Array.from({ length: bands }, (_, band) => {
    const [low, centre, high] = edges.slice(band, band + 3);
    const weights = [];
    for (let bin = 0; bin <= size / 2; bin++) {
      const hz = (bin * rate) / size;
      const height = Math.min((hz - low) / (centre - low), (high - hz) / (high - centre));
      if (height > 0) weights.push([bin, (height * 2) / (high - low)]);
    }
    return weights;
  });
}

// In place; the length is a power of two (Cooley and Tukey, 1965).
function transform(real, imaginary) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let length = 2; length <= n; length *= 2) {
    const half = length / 2;
    for (let k = 0; k < half; k++) {
      const angle = (-2 * Math.PI * k) / length;
      const c = Math.cos(angle);
      const s = Math.sin(angle);
      for (let a = k; a < n; a += length) {
        const b = a + half;
        const re = real[b] * c - imaginary[b] * s;
        const im = real[b] * s + imaginary[b] * c;
        real[b] = real[a] - re;
        imaginary[b] = imaginary[a] - im;
        real[a] += re;
        imaginary[a] += im;
      }
    }
  }
}

// Magnitudes [frame][band]: Hann windows, centred with reflection, Slaney's filters, as
// revox.metrics.spectral.mel_spectrogram.
export function melSpectrogram(samples, { size = SIZE, hop = HOP, bands = BANDS, rate = RATE } = {}) {
  const bank = filters(bands, size, rate);
  const hann = Float64Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size));
  const count = Math.floor(samples.length / hop) + 1;
  const last = samples.length - 1;
  const frames = [];
  for (let frame = 0; frame < count; frame++) {
    const real = new Float64Array(size);
    const imaginary = new Float64Array(size);
    for (let i = 0; i < size; i++) {
      let at = frame * hop + i - size / 2;
      if (at < 0) at = -at;
      if (at > last) at = 2 * last - at;
      real[i] = (samples[at] ?? 0) * hann[i];
    }
    transform(real, imaginary);
    const power = Float64Array.from({ length: size / 2 + 1 }, (_, i) => Math.hypot(real[i], imaginary[i]));
    frames.push(bank.map((weights) => weights.reduce((sum, [bin, weight]) => sum + weight * power[bin], 0)));
  }
  return frames;
}

// Dark to bright with even steps of lightness (points of matplotlib's magma).
const COLORS = [
  [0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122],
  [229, 80, 100], [251, 135, 97], [254, 194, 135], [252, 253, 191],
];

function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLORS.length - 1);
  const low = Math.min(Math.floor(at), COLORS.length - 2);
  return COLORS[low].map((value, i) => value + (COLORS[low + 1][i] - value) * (at - low));
}

function levels(samples) {
  const mel = melSpectrogram(samples.subarray(0, LONGEST * RATE));
  // Half of the filters' norm is taken back, which would hide what is high.
  const tilt = Array.from({ length: BANDS }, (_, band) => {
    const hz = melToHz((hzToMel(RATE / 2) * (band + 1)) / (BANDS + 1));
    return Math.sqrt(Math.max(hz, 1000) / 1000);
  });
  const flat = mel.map((frame) => frame.map((value, band) => value * tilt[band]));
  const sorted = flat.flat().sort((a, b) => a - b);
  const loud = Math.max(sorted[Math.floor(sorted.length * 0.99)], 1e-9);
  return flat.map((frame) => frame.map((value) => 20 * Math.log10(Math.max(value / loud, 1e-5))));
}

// Draw samples; `span` seconds are the picture's width, so that two can be compared.
export function draw(canvas, samples, span, title) {
  const frames = levels(samples);
  const shown = Math.min(span, LONGEST);
  const width = Math.max(2, Math.round((shown * RATE) / HOP));
  canvas.width = width;
  canvas.height = BANDS * 2;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, canvas.height);
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < canvas.height; y++) {
      const level = frames[x]?.[BANDS - 1 - (y >> 1)] ?? FLOOR - 1;
      const [r, g, b] = color((level - FLOOR) / (CEILING - FLOOR));
      image.data.set([r, g, b, 255], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.setAttribute("role", "img");
  const long = (samples.length / RATE).toFixed(1);
  canvas.setAttribute("aria-label", `${title}: mel spectrogram, ${long} s, 0 to 12 kHz`);
}

// The marks of the frequency axis: [Hz, share of the height from below].
export const axis = MARKS.map((hz) => [hz, hzToMel(hz) / hzToMel(RATE / 2)]);
