"""Do weights in fewer bits change words and voice? The same sentences in float32 and in other formats.

    python benchmarks/weights_words.py speak --out SPOKEN [--weights float32,int8] [--sentences 80]
    PYTHONPATH=src:. JUDGES/bin/python benchmarks/weights_words.py judge SPOKEN --whisper WHISPER_CT2

Sentences of the lab's grammar in the lab's presets, one take each with the same noise. `judge` needs the
recognizers' environment (lab/speech/README.md): words by Whisper, compared as `lab.quality.words` does; the
voice by Resemblyzer, as the similarity to the mean of the same preset's other sentences in the first format.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("speak")
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--weights", default="float32,int8")
    first.add_argument("--sentences", type=int, default=80)
    second = parts.add_parser("judge")
    second.add_argument("out", type=Path)
    second.add_argument("--whisper", type=Path, required=True)
    asked = parser.parse_args()
    if asked.part == "speak":
        speak(asked.out, asked.weights.split(","), asked.sentences)
    else:
        print(json.dumps(judge(asked.out, asked.whisper), indent=1))


def speak(out: Path, formats: list[str], count: int) -> None:
    import torch

    import revox
    from lab.sentences import sentences
    from revox.demo import checkpoint_folder
    from revox.speech import write_audio

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    texts, items = list(islice(sentences("heldout", 7), count)), []
    for weights in formats:
        tts = revox.load(checkpoint_folder(), device="cpu", weights=weights)
        voices = tts.voices()
        for i, text in enumerate(texts):
            speech = tts.synthesize(text, voices[i % len(voices)], seed=i, max_seconds=15.0)
            write_audio(out / f"{weights}-{i}.wav", speech.audio)
            items.append({"weights": weights, "sentence": i, "voice": voices[i % len(voices)], "text": text})
    (out / "items.json").write_text(json.dumps(items, indent=1))


def judge(out: Path, whisper: Path) -> dict[str, dict[str, float]]:
    from faster_whisper import WhisperModel

    from lab.quality.words import words_wrong
    from revox.metrics.speaker import SpeakerVerifier
    from revox.speech import read_audio

    items = json.loads((out / "items.json").read_text())
    model = WhisperModel(str(whisper), device="cpu", compute_type="int8", cpu_threads=1)
    verifier = SpeakerVerifier()
    for item in items:
        audio = read_audio(out / f"{item['weights']}-{item['sentence']}.wav", rate=16_000)
        segments, _ = model.transcribe(
            audio.samples, language="en", beam_size=5, temperature=0.0, condition_on_previous_text=False,
            without_timestamps=True,
        )  # fmt: skip
        item["words"] = " ".join(segment.text.strip() for segment in segments)
        item["embedding"] = verifier.embed(audio)
    found = {}
    for weights in dict.fromkeys(item["weights"] for item in items):
        mine, similarities = [item for item in items if item["weights"] == weights], []
        for item in mine:
            others = [
                other["embedding"]
                for other in items
                if other["weights"] == items[0]["weights"]
                and other["voice"] == item["voice"]
                and other["sentence"] != item["sentence"]
            ]
            mean = np.mean(others, axis=0)
            similarities.append(float(item["embedding"] @ mean / np.linalg.norm(mean)))
        wrong = words_wrong([item["text"] for item in mine], [item["words"] for item in mine])
        found[weights] = {
            "words wrong": round(wrong, 4),
            "similarity": round(float(np.mean(similarities)), 4),
        }
    return found


if __name__ == "__main__":
    main()
