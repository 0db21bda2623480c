"""Whole turns against chunks: what does each sentence of a turn by itself cost, and how does it sound?

    python benchmarks/turns.py --out benchmarks/results/DATE-turns.json [--turns 12] [--sentences 3]
    python benchmarks/turns.py --time-only --checkpoint FULL_SIZE --frames 25 --out ...

Turns of the lab's domain are spoken whole (one take), as chunks one after another (one take a sentence), and
as chunks together (as long texts are, eight at a time). Times are processor time with one thread. Words are
recognized by pocketsphinx with the lab's grammar, any number of sentences. With --time-only every sentence
has a fixed number of frames, so that random weights of the release's sizes do
(`python -c "from lab.fullsize import write_fullsize; write_fullsize('FULL_SIZE')"` writes them).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lab.sentences import jsgf, sentences
from revox import Revox, load
from revox.demo import checkpoint_folder
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_errors
from revox.metrics.naturalness import NaturalnessModel, can_score_naturalness
from revox.speech import Audio
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prefix_cache import PrefixCache
from revox.synthesis.prompt import make_prompt
from revox.synthesis.takes import TakeWarning

VOICES = 4
WAYS = ("whole", "chunks, one by one", "chunks, together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(checkpoint_folder()))
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--sentences", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, action="append", help="else all; added to what --out has")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--frames", type=int, default=25, help="of a sentence, with --time-only")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tts = load(arguments.checkpoint, device="cpu", weights=arguments.weights)
    stream = sentences("heldout", 31)
    turns = [
        [next(stream).capitalize() + "." for _ in range(arguments.sentences)] for _ in range(arguments.turns)
    ]
    before = json.loads(arguments.out.read_text()) if arguments.way and arguments.out.exists() else {}
    if arguments.time_only:
        measure = time_only(tts, turns, arguments.frames)
    else:
        measure = spoken(tts, turns, arguments.way or list(WAYS))
    facts = {"checkpoint": tts.folder.name, "weights": tts.weights, "turns": len(turns)}
    result = {**facts, "sentences a turn": arguments.sentences, **before, **measure}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def spoken(tts: Revox, turns: list[list[str]], chosen: list[str]) -> dict:
    """Time, words and naturalness of each way of speaking the turns."""
    grammar = jsgf().replace("public <sentence>", "<sentence>") + "public <turn> = <sentence>+;\n"
    recognizer = PocketsphinxRecognizer(grammar, reject=False)
    naturalness = NaturalnessModel() if can_score_naturalness() else None
    voices = tts.voices()[:VOICES]
    for voice in voices:  # what is read once is read before
        tts.speak(turns[0][0], voice)

    def whole(turn: list[str], voice: str, warnings: list[TakeWarning]) -> np.ndarray:
        return tts.speak(" ".join(turn), voice, max_chars=2000, report=warnings.append).samples

    def one_by_one(turn: list[str], voice: str, warnings: list[TakeWarning]) -> np.ndarray:
        return np.concatenate([tts.speak(one, voice, report=warnings.append).samples for one in turn])

    def together(turn: list[str], voice: str, warnings: list[TakeWarning]) -> np.ndarray:
        longest = max(20, *map(len, turn))
        return tts.speak(" ".join(turn), voice, max_chars=longest, report=warnings.append).samples

    results = {}
    ways = dict(zip(WAYS, (whole, one_by_one, together), strict=True))
    for name in chosen:
        speak = ways[name]
        warnings: list[TakeWarning] = []
        sounds, began = [], time.process_time()
        for number, turn in enumerate(turns):
            sounds.append(speak(turn, voices[number % len(voices)], warnings))
        took = time.process_time() - began
        seconds = sum(map(len, sounds)) / tts.sampling_rate
        counts = [
            word_errors(" ".join(turn), recognizer.transcribe(Audio(samples, tts.sampling_rate)))
            for turn, samples in zip(turns, sounds, strict=True)
        ]
        results[name] = {
            "processor seconds": round(took, 2),
            "seconds of speech": round(seconds, 1),
            "processor seconds a second of speech": round(took / seconds, 4),
            "word errors (%)": round(100 * sum(e for e, _ in counts) / sum(n for _, n in counts), 1),
            "warnings": len(warnings),
        }
        if naturalness is not None:
            scores = [naturalness.score(Audio(samples, tts.sampling_rate)) for samples in sounds]
            results[name]["naturalness"] = round(float(np.mean(scores)), 2)
        print(name, results[name], flush=True)
    return results


def time_only(tts: Revox, turns: list[list[str]], frames: int) -> dict:
    """Time of as many frames for each sentence, whatever is said."""
    model, voice = tts.model, tts.voice(tts.voices()[0])

    def request(text: str, count: int) -> Request:
        prompt = make_prompt(model, tts.prompter, text, voice)
        return Request(prompt.embeddings, 0, count, min_frames=count, prefix=prompt.voice_positions)

    def run(batches: Callable[[list[str]], list[list[Request]]], shared: bool) -> float:
        began = time.process_time()
        for turn in turns:
            prefixes = PrefixCache()
            for batch in batches(turn):
                Engine(model, None, prefixes if shared else PrefixCache()).generate_batch(batch)
        return time.process_time() - began

    def each(turn: list[str]) -> list[list[Request]]:
        return [[request(one, frames)] for one in turn]

    ways: dict[str, tuple[Callable[[list[str]], list[list[Request]]], bool]] = {
        "whole": (lambda turn: [[request(" ".join(turn), frames * len(turn))]], True),
        "chunks, one by one, the voice read for each": (each, False),
        "chunks, one by one": (each, True),
        "chunks, together": (lambda turn: [[request(one, frames) for one in turn]], True),
    }
    results: dict = {"frames a sentence": frames}
    for name, (batches, shared) in ways.items():
        seconds = run(batches, shared)
        results[name] = {"processor seconds": round(seconds, 2)}
        print(name, results[name], flush=True)
    return results


if __name__ == "__main__":
    main()
