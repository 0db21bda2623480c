"""What a mix of two voices sounds like: where between them a speaker-verification model places its speech.

    python benchmarks/voice_mix.py --out benchmarks/results/DATE-voice-mix.json [--sentences 6]

Pairs of presets, mixed by their codes (`revox voice mix`) and, as people do by hand, by averaging their
embeddings frame by frame. The place is the projection of the speech's voice onto the line from the speech of
the first voice (0) to that of the second (1); the distance is what is left beside that line, of unit vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from lab.sentences import jsgf, sentences
from revox import Revox, load
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voice_mix import mix_codes
from revox.checkpoint.voices import Voice
from revox.demo import checkpoint_folder
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_errors
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio

PAIRS = (
    ("neutral_female", "neutral_male"),
    ("fr_male", "de_female"),
    ("casual_male", "it_male"),
)
WEIGHTS = (0.9, 0.7, 0.6, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(checkpoint_folder()))
    parser.add_argument("--sentences", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tts = load(arguments.checkpoint, device="cpu", dtype=torch.float32)
    stream = sentences("heldout", 5)
    measure = Measure(tts, [next(stream) for _ in range(arguments.sentences)])
    results: list[dict] = []
    for pair in PAIRS:
        ends = [measure(tts.voice(name)) for name in pair]
        line = ends[1][0] - ends[0][0]
        one: dict = {"voices": pair, "similarity": round(float(ends[0][0] @ ends[1][0]), 3)}
        one["word errors (%)"] = [round(errors, 1) for _, errors in ends]
        for weight in WEIGHTS:
            for way, voice in mixes(tts, pair, weight).items():
                place, errors = measure(voice)
                share = float((place - ends[0][0]) @ line / (line @ line))
                distance = float(np.linalg.norm(place - ends[0][0] - share * line))
                one[f"{way}, {weight:g} of the first"] = {
                    "place": round(share, 2),
                    "distance": round(distance, 2),
                    "word errors (%)": round(errors, 1),
                }
        results.append(one)
        arguments.out.write_text(
            json.dumps({"sentences": arguments.sentences, "pairs": results}, indent=1) + "\n"
        )
        print(json.dumps(one), flush=True)


class Measure:
    """The mean voice `[256]` of sentences spoken in a voice, one take each, and their word errors in %."""

    def __init__(self, tts: Revox, texts: list[str]) -> None:
        self.tts, self.texts = tts, texts
        self.verifier, self.recognizer = SpeakerVerifier(), PocketsphinxRecognizer(jsgf(), reject=False)

    def __call__(self, voice: Voice) -> tuple[np.ndarray, float]:
        spoken: list[Audio] = [
            self.tts.speak(text, voice, seed=seed, report=lambda _: None)
            for seed, text in enumerate(self.texts)
        ]
        place = np.mean([self.verifier.embed(audio) for audio in spoken], axis=0)
        counts = [
            word_errors(*pair)
            for pair in zip(self.texts, map(self.recognizer.transcribe, spoken), strict=True)
        ]
        errors = 100 * sum(wrong for wrong, _ in counts) / sum(words for _, words in counts)
        return place / np.linalg.norm(place), errors


def mixes(tts: Revox, pair: tuple[str, str], weight: float) -> dict[str, Voice]:
    """The mix by codes, and the average of the embeddings' frames, as many as both have."""
    embeddings = tts.model.mm_audio_embeddings
    table, config = embeddings.audio_codebook_embeddings.embeddings.weight, tts.model.config
    first, second = (tts.voice(name).embedding.float() for name in pair)
    codes = {name: recover_codes(tts.voice(name).embedding, table, config).codes for name in pair}
    weights = {pair[0]: weight, pair[1]: 1 - weight}
    mixed = mix_codes(codes, weights, config.codec.acoustic_codebook_size)
    frames = min(len(first), len(second)) - 1
    average = torch.cat((weight * first[:frames] + (1 - weight) * second[:frames], first[-1:]))
    return {
        "codes": Voice("mix", mixed, embeddings.voice_embedding(mixed)),
        "embeddings averaged": Voice("average", None, average.to(torch.bfloat16)),
    }


if __name__ == "__main__":
    main()
