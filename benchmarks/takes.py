"""How many of the faults of takes are noticed, how many good takes are rejected, and what a long text costs.

    python benchmarks/takes.py --out benchmarks/results/DATE-takes.json [--checkpoint DIR] [--pieces 300]
        [--recognizer WHISPER]

Sentences of the lab's domain are spoken, each one take. Faults are put into copies of their codes: an end
within the first quarter, a loop, a silence. Then a model is made to end at its first frame. Last, 10,000
characters are spoken as one text. With --recognizer (a Whisper of CTranslate2) only takes whose words it
hears count as good, and the words of the long text are compared with those of its sentences spoken one by
one, laid end to end.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import torch

from lab.sentences import sentences
from revox import Revox, load
from revox.demo import checkpoint_folder
from revox.metrics.intelligibility import Recognizer, normalize_text, word_error_rate
from revox.metrics.whisper import WhisperRecognizer
from revox.model.config import END_AUDIO_ID
from revox.speech import Audio
from revox.synthesis.engine import Engine, Generation, Request
from revox.synthesis.longform import Line, SpeechSettings
from revox.synthesis.prompt import make_prompt
from revox.synthesis.takes import TakeCheck

BATCH = 50
RIGHT_BELOW = 0.25  # word errors of a take that counts as good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(checkpoint_folder()))
    parser.add_argument("--pieces", type=int, default=300)
    parser.add_argument("--characters", type=int, default=10_000)
    parser.add_argument("--recognizer", help="minutes of processor time")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tts = load(arguments.checkpoint, device="cpu", dtype=torch.float32)
    stream = sentences("heldout", 21)
    texts = [next(stream) for _ in range(arguments.pieces)]
    recognizer = WhisperRecognizer(arguments.recognizer) if arguments.recognizer else None
    result: dict = {"checkpoint": Path(arguments.checkpoint).resolve().name}
    for name, stage in {
        "pieces": lambda: judged(tts, texts, recognizer),
        "end at the first frame": lambda: end_at_once(tts, texts[:20]),
        "long text": lambda: long_text(tts, arguments.characters, recognizer),
    }.items():
        result[name] = stage()
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: result[name]}, indent=1), flush=True)


def judged(tts: Revox, texts: list[str], recognizer: Recognizer | None) -> dict:
    """Every sentence spoken once, and each fault put into it."""
    chance, voices = np.random.default_rng(0), tts.voices()
    names = [voices[i % len(voices)] for i in range(len(texts))]
    counts = {"takes": len(texts), "good": 0, "good rejected": 0, "not good": 0, "not good noticed": 0}
    noticed = {"end": 0, "loop": 0, "silence": 0}
    for start in range(0, len(texts), BATCH):
        part = range(start, min(start + BATCH, len(texts)))
        for i, one in zip(part, spoken(tts, [texts[i] for i in part], [names[i] for i in part]), strict=True):
            codes, samples = one.codes(), decoded(tts, one.codes())
            fault = judge(tts, texts[i], codes, samples, one.ended)
            good = recognizer is None or errors(recognizer, texts[i], samples) < RIGHT_BELOW
            counts["good" if good else "not good"] += 1
            counts["good rejected" if good else "not good noticed"] += fault is not None
            for name, (other, wave) in injured(tts, codes, samples, chance).items():
                noticed[name] += judge(tts, texts[i], other, wave, True) is not None
    return {**counts, "noticed of as many injected": noticed}


def errors(recognizer: Recognizer, text: str, samples: np.ndarray) -> float:
    return word_error_rate(text, recognizer.transcribe(Audio(samples, 24_000)) if len(samples) else "")


def spoken(tts: Revox, texts: list[str], names: list[str]) -> list[Generation]:
    """Takes as a text's first ones are asked for."""
    requests = []
    for seed, (text, name) in enumerate(zip(texts, names, strict=True)):
        check = TakeCheck(text, tts.model.config.codec)
        prompt = make_prompt(tts.model, tts.prompter, text, tts.voice(name)).embeddings
        requests.append(Request(prompt, seed, check.max_frames, min_frames=check.min_frames))
    return Engine(tts.model).generate_batch(requests)


def decoded(tts: Revox, codes: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return tts.model.audio_tokenizer.decode(codes[None])[0].numpy()


def judge(tts: Revox, text: str, codes: torch.Tensor, samples: np.ndarray, ended: bool) -> str | None:
    check = TakeCheck(text, tts.model.config.codec)
    if codes.shape[1]:
        check.push(codes[0].numpy(), samples)
    check.finish(ended)
    return check.fault.value if check.fault else None


def injured(tts: Revox, codes: torch.Tensor, samples: np.ndarray, chance: np.random.Generator) -> dict:
    """Copies with one fault each: codes and samples."""
    codec = tts.model.config.codec
    frames, spf, size = codes.shape[1], codec.samples_per_frame, codec.semantic_codebook_size
    early = codes[:, : int(chance.integers(0, max(1, frames // 4)))]
    period = int(chance.integers(3, max(4, min(25, frames // 2))))
    at = int(chance.integers(0, max(1, frames - period)))
    loop = codes[:, at : at + period].repeat(1, 3 + 30 // period)
    other = torch.from_numpy(chance.random(loop.shape[1]) < 0.1)
    loop[0, other] = torch.from_numpy(chance.integers(0, size, int(other.sum())))  # repeats are not exact
    looped = torch.cat((codes[:, :at], loop, codes[:, at + period :]), dim=1)
    pause = int(chance.integers(20, 60))
    quiet = 1e-4 * chance.standard_normal(pause * spf).astype(np.float32)
    return {
        "end": (early, decoded(tts, early)),
        "loop": (looped, decoded(tts, looped)),
        "silence": (
            torch.cat((codes[:, :at], codes[:, -1:].repeat(1, pause), codes[:, at:]), dim=1),
            np.concatenate((samples[: at * spf], quiet, samples[at * spf :])),
        ),
    }


def end_at_once(tts: Revox, texts: list[str]) -> dict:
    """Texts spoken by a model whose end is by far the likeliest code of the first frame: how many are heard
    with one take, and as usual."""
    head, first = tts.model.acoustic_transformer, tts.model.acoustic_transformer.semantic_logits
    spoken_with = {}
    for takes in (1, 3):
        heard = 0
        for text in texts:
            calls = iter(range(1 << 20))

            def forced(hidden: torch.Tensor, calls=calls) -> torch.Tensor:
                logits = first(hidden)
                if next(calls) == 0:
                    logits[..., END_AUDIO_ID] = 1e4
                return logits

            head.semantic_logits = forced
            parts = list(tts.speak_parts(text, tts.voices()[0], takes=takes, report=lambda _: None))
            heard += sum(part.seconds for part in parts) > 0.3
        spoken_with[f"spoken with {takes} takes"] = heard
    del head.semantic_logits
    return {"texts": len(texts), **spoken_with}


def long_text(tts: Revox, characters: int, recognizer: Recognizer | None) -> dict:
    """One text in pieces of a sentence: time, memory and words."""
    stream, parts = sentences("heldout", 22), []
    while sum(map(len, parts)) < characters:
        parts.append(next(stream).capitalize() + ".")
    text, voice = " ".join(parts), tts.voices()[0]
    settings = SpeechSettings(max_chars=max(map(len, parts)))
    warnings: list = []
    memory: list[float] = []
    heard: list[np.ndarray] = []
    began, seconds = time.process_time(), 0.0
    for part in tts.speak_parts(text, voice, settings, report=warnings.append):
        seconds += part.seconds
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if recognizer is not None:
            heard.append(part.samples)
    took = time.process_time() - began
    facts = {
        "characters": len(text),
        "seconds of speech": round(seconds, 1),
        "processor seconds": round(took, 1),
        "warnings": len(warnings),
        "peak memory in MiB after 1/4, 1/2 and all": [
            round(memory[len(memory) * n // 4 - 1]) for n in (1, 2, 4)
        ],
    }
    if recognizer is not None:
        alone = tts.speak_batch(Line(one, voice, SpeechSettings()) for one in parts)
        whole = {
            "as one text": heard,
            "as one text, by sentence": [
                part.samples
                for part in tts.speak_parts(text, voice, replace(settings, by_sentence=True), report=list)
            ],
            "its sentences one by one": [
                one.audio.samples for one in sorted(alone, key=lambda one: one.number)
            ],
        }
        for name, pieces in whole.items():
            words = recognizer.transcribe(Audio(np.concatenate(pieces), 24_000))
            found = jiwer.process_words(normalize_text(text), normalize_text(words))
            count = found.hits + found.substitutions + found.deletions
            wrong = found.substitutions + found.deletions + found.insertions
            facts[name] = {
                "words": count, "wrong, %": round(100 * wrong / count, 2),
                "missing, %": round(100 * found.deletions / count, 2),
            }  # fmt: skip
    return facts


if __name__ == "__main__":
    main()
