"""Cloning with the weights as released: the published recipe and ours against time, on the lab.

    revox train student src/revox/demo/checkpoint --texts SENTENCES
    python benchmarks/inversion.py --data RUN/data [--clips 5] [--seeds 3] [--part 0/2]
    python benchmarks/inversion_report.py

For each held-out clip and method, after several spans of time: the speech cloned with the codes (similarity
to the whole recording, the recording's rank among the held-out speakers, words, ends), and the codes (mel
distance of what they decode to; agreement with the encoder put aside). Ceiling: the true encoder's codes.
Floor: a preset's. Every result is a line of OUT/inversion.jsonl; a run that was interrupted goes on. Seconds
are of the processor, not of the clock: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inversion_recipe import recipe
from lab.data import RATE, SpeechSet
from lab.sentences import jsgf
from revox import load
from revox.api import Revox
from revox.checkpoint.voices import Voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.losses.spectral import mel_distance
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio
from stamps import origin, rows_of

RECIPE_STEPS = [25, 50, 100, 200, 400]  # on the first two clips up to 1600: it does not come back
OUR_STEPS = (10, 40, 160)
TEXTS = (
    "see you on monday the ninth",
    "my number is four two seven one nine",
    "the film starts at half past ten",
)

Timed = tuple[str, float, Tensor]  # method and steps, seconds, codes


def long_clips(speech: SpeechSet, limit: float = 8.0) -> dict[str, np.ndarray]:
    """Up to `limit` seconds of every speaker without a preset's name, utterances laid end to end."""
    found = {}
    for speaker in speech.speakers:
        mine = [i for i in speech.of(speaker) if speech.utterances[i].preset is None]
        if mine:
            joined = np.concatenate([speech.waveform(i) for i in mine])
            found[speaker] = joined[: int(limit * RATE)]
    return found


def ours(coder: Coder, target: Tensor, method: str, text: str | None, seed: int, name: str):
    """Our inversion at several lengths, each from the start (its schedule depends on its length)."""
    for steps in OUR_STEPS:
        length = {"refine" if method == "student" else "steps": steps}
        settings = CodingSettings(method, seed=seed, **length)
        began = time.process_time()
        found = find_codes(coder, target, settings, transcript=text)
        yield f"{name} {steps}", time.process_time() - began, found.codes


def methods(
    tts: Revox,
    truth: Tensor,
    target: Tensor,
    text: str | None,
    clip: int,
    seed: int,
) -> Iterator[Timed]:
    """Codes of `target` by every method, one after another; `truth` are the true encoder's."""
    coder = tts.coder
    yield "true encoder", 0.0, truth
    presets = coder.preset_codes()
    yield "a preset's codes", 0.0, _as_long(presets[(7 * clip + seed) % len(presets)], truth.shape[1])
    began = time.process_time()
    alone = find_codes(coder, target, CodingSettings("student"))
    yield "student encoder alone", time.process_time() - began, alone.codes
    yield from ours(coder, target, "inversion", None, seed, "inversion")
    yield from ours(coder, target, "student", None, seed, "student + inversion")
    if text is not None:
        yield from ours(coder, target, "student", text, seed, "student + words")
    for found in recipe(coder.codec, target, RECIPE_STEPS, seed=seed):
        yield f"recipe {found.steps}", found.seconds, found.codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inversion"))
    parser.add_argument("--clips", type=int, default=5, help="of each kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--part", default="0/1", help="take only every M-th clip, from the N-th: N/M")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "inversion.jsonl"
    folder = checkpoint_folder()
    made_of = origin(folder)
    done = {(row["kind"], row["clip"], row["seed"], row["method"]) for row in rows_of(log, made_of)}
    tts = load(folder, device="cpu", dtype=torch.float32)
    codec = tts.model.audio_tokenizer
    if tts.coder.student is None:
        parser.error("no student is trained for the lab: run the first line of this script's description")
    original, judge = Coder(original_codec(folder, arguments.encoder)), SpeakerVerifier()
    recognizer = PocketsphinxRecognizer(jsgf())

    def score(codes: Tensor, target: Tensor, truth: Tensor, voices: list, own: int, seed: int) -> dict:
        rows = tts.model.mm_audio_embeddings.voice_embedding(codes)
        voice = Voice(name="clone", codes=codes, embedding=rows, provenance={})
        said = [tts.synthesize(text, voice, seed=seed, max_seconds=6.0).audio for text in TEXTS]
        whole = Audio(np.concatenate([s.samples for s in said]), RATE)
        embedded = judge.embed(whole) if len(whole.samples) > RATE else None
        with torch.no_grad():
            decoded = codec.decode(codes[None])[0][: len(target)]
        scores = [] if embedded is None else [judge.similarity(embedded, voice) for voice in voices]
        return {
            "similarity": scores[own] if scores else None,
            "rank": 1 + sum(score > scores[own] for score in scores) if scores else len(voices),
            "word_errors": word_error_rate(list(TEXTS), [recognizer.transcribe(s) for s in said]),
            "ended": sum(not s.truncated for s in said) / len(said),
            "decoded_similarity": judge.similarity(Audio(decoded.numpy(), RATE), voices[own]),
            "mel": float(mel_distance(decoded[None], target[None], RATE)),
            "semantic_agreement": float((codes[0] == truth[0]).float().mean()),
            "level_error": float((codes[1:] - truth[1:]).abs().float().mean()),
        }

    for seed in range(arguments.seeds):
        for kind in ("synthetic", "human"):
            speech = SpeechSet(arguments.data, "heldout", kind)
            clips = long_clips(speech)
            names, voices = list(clips), [judge.embed(Audio(c, RATE)) for c in clips.values()]
            chosen = list(range(0, len(names), max(1, len(names) // arguments.clips)))[: arguments.clips]
            part, parts = map(int, arguments.part.split("/"))
            for i in chosen[part::parts]:
                if kind == "synthetic":  # one utterance, whose text is known
                    mine = [u for u in speech.of(names[i]) if speech.utterances[u].preset is None]
                    best = max(mine[:4], key=lambda u: speech.utterances[u].samples)
                    wave, text = speech.waveform(best), speech.utterances[best].text
                else:
                    wave, text = clips[names[i]][: int(arguments.seconds * RATE)], None
                wave = wave[: len(wave) // codec.samples_per_frame * codec.samples_per_frame]
                target = torch.from_numpy(wave.copy())
                truth = find_codes(original, target, CodingSettings("encoder")).codes
                if (kind, names[i], seed, f"recipe {RECIPE_STEPS[-1]}") in done:
                    continue
                for method, seconds, codes in methods(tts, truth, target, text, i, seed):
                    if (kind, names[i], seed, method) in done:
                        continue
                    row = {"kind": kind, "clip": names[i], "seed": seed, "method": method, "seconds": seconds}
                    row |= score(codes, target, truth, voices, i, seed) | made_of
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(
                        kind,
                        names[i],
                        method,
                        f"{seconds:.1f} s",
                        f"{row['similarity'] or 0:.3f}",
                        flush=True,
                    )


def _as_long(codes: Tensor, frames: int) -> Tensor:
    return codes.repeat(1, -(-frames // codes.shape[1]))[:, :frames]


if __name__ == "__main__":
    main()
