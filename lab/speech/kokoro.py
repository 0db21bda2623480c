"""Speak the plan with Kokoro-82M: `python -m lab.speech.kokoro --kokoro MODEL --voices FILE --out DIR`.

Writes `audio/NNNNN.opus` (24 kHz mono, peak 0.7) and a line of `index.jsonl` for each utterance. A run that
was stopped resumes: utterances in the index are skipped. Needs onnxruntime, phonemizer-fork, soundfile and
the espeak-ng library; see README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.speech.plan import PlannedUtterance, Speaker, read_plan, read_speakers

RATE = 24_000  # Hz
PEAK = 0.7
_COMPRESSION = 0.75  # libsndfile's scale for Opus; about 68 kbit/s
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Spoken:
    """What the synthesizer made of an utterance: samples (24 kHz mono float32) and the phonemes it read."""

    samples: np.ndarray
    phonemes: str


class Kokoro:
    """The synthesizer, on one thread.

    model: the ONNX file of Kokoro-82M. vocabulary: JSON with the token of each phoneme under "vocab".
    voices: an .npz of style vectors [510, 256], row n - 1 for n tokens.
    """

    def __init__(self, model: Path, vocabulary: Path, voices: Path):
        import onnxruntime
        from phonemizer.backend import EspeakBackend

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._tokens: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]
        with np.load(voices) as arrays:
            self._voices = {name: arrays[name].astype(np.float32) for name in arrays.files}
        self._mean = np.mean(list(self._voices.values()), axis=0)
        self._phonemizers = {
            language: EspeakBackend(language, preserve_punctuation=True, with_stress=True)
            for language in ("en-us", "en-gb")
        }

    def phonemes(self, written: str, language: str) -> str:
        """IPA with stress and punctuation, by espeak-ng. The trailing space is part of what is read."""
        return self._phonemizers[language].phonemize([written])[0]

    def style(self, speaker: Speaker) -> np.ndarray:
        """The speaker's style vectors [510, 256]."""
        mixture = sum(weight * self._voices[voice] for voice, weight in speaker.mix.items())
        return self._mean + speaker.spread * (mixture - self._mean)

    def inputs(self, speaker: Speaker, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """The network's inputs for the symbols `tokens` in the speaker's voice."""
        return {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": self.style(speaker)[len(tokens) - 1][None].astype(np.float32),
            "speed": np.array([speaker.speed], np.float32),
        }

    def __call__(self, speaker: Speaker, written: str) -> Spoken:
        """The sentence in the speaker's voice."""
        phonemes = self.phonemes(written, speaker.language)
        tokens = [self._tokens[symbol] for symbol in phonemes if symbol in self._tokens]
        samples = self._session.run(None, self.inputs(speaker, tokens))[0].ravel()
        return Spoken(samples * (PEAK / np.abs(samples).max()), phonemes)


def write_opus(path: Path, samples: np.ndarray) -> None:
    """Write 24 kHz mono Ogg Opus to a temporary path and rename it."""
    import soundfile

    temporary = path.with_suffix(".part")
    soundfile.write(temporary, samples, RATE, format="OGG", subtype="OPUS", compression_level=_COMPRESSION)
    os.replace(temporary, path)


def read_index(folder: Path) -> dict[int, dict]:
    """The lines of a folder's index by utterance number. A last line that is cut off is left out.

    The generator may be writing that line, so the file is only read.
    """
    path = folder / "index.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in _whole_lines(path).decode("utf-8").splitlines()]
    return {int(line["file"].split(".")[0]): line for line in lines}


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def is_same(line: dict, item: PlannedUtterance) -> bool:
    """Whether an index line is this utterance of the plan."""
    return (line["speaker"], line["written"]) == (item.speaker, item.written)


def remaining(
    plan: Iterable[PlannedUtterance], indices: Sequence[dict[int, dict]], out: Path
) -> list[PlannedUtterance]:
    """The utterances of the plan that no index lists.

    Raises ValueError where an index has another sentence or speaker under a number of the plan.
    """
    left = []
    for item in plan:
        found = [index[item.number] for index in indices if item.number in index]
        for line in found:
            if not is_same(line, item):
                raise ValueError(
                    f"utterance {item.number} is {item.written!r} by {item.speaker} in the plan and "
                    f"{line['written']!r} by {line['speaker']} in an index: use another folder than {out}"
                )
        if not found:
            left.append(item)
    return left


def generate(
    items: Iterable[PlannedUtterance],
    speakers: dict[str, Speaker],
    speak: Callable[[Speaker, str], Spoken],
    write: Callable[[Path, np.ndarray], None],
    out: Path,
) -> Iterator[float]:
    """Speak the utterances into `out`; yields the seconds of each once its line stands in the index."""
    (out / "audio").mkdir(parents=True, exist_ok=True)
    path = out / "index.jsonl"
    if path.exists():  # a run that was killed may have left part of a line
        os.truncate(path, len(_whole_lines(path)))
    with path.open("a", encoding="utf-8") as index:
        for item in items:
            spoken = speak(speakers[item.speaker], item.written)
            write(out / "audio" / item.file, spoken.samples)
            seconds = len(spoken.samples) / RATE
            line = {
                "file": item.file,
                "speaker": item.speaker,
                "text": item.text,
                "written": item.written,
                "phonemes": spoken.phonemes,
                "seconds": round(seconds, 4),
                "kind": item.kind,
            }
            index.write(json.dumps(line, ensure_ascii=False) + "\n")
            index.flush()
            yield seconds


def main() -> None:
    """Parse the options, say what is left, and speak it."""
    parser = argparse.ArgumentParser(prog="python -m lab.speech.kokoro", description=__doc__)
    parser.add_argument("--plan", type=Path, default=_HERE / "plan.tsv")
    parser.add_argument("--speakers", type=Path, default=_HERE / "speakers.json")
    parser.add_argument("--kokoro", type=Path, required=True, help="Kokoro-82M's ONNX file")
    parser.add_argument("--vocabulary", type=Path, help="default: vocab.json beside the ONNX file")
    parser.add_argument("--voices", type=Path, required=True, help="voices.npz with the style vectors")
    parser.add_argument(
        "--have",
        type=Path,
        action="append",
        default=[],
        help="a folder whose index lists speech already made",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="stop after this many new utterances")
    args = parser.parse_args()

    plan, speakers = read_plan(args.plan), read_speakers(args.speakers)
    args.out.mkdir(parents=True, exist_ok=True)
    left = remaining(plan, [read_index(folder) for folder in (args.out, *args.have)], args.out)
    print(f"{len(plan)} utterances in the plan, {len(left)} to make", flush=True)
    left = left[: args.limit]
    speak = Kokoro(args.kokoro, args.vocabulary or args.kokoro.parent / "vocab.json", args.voices)
    start, total = time.monotonic(), 0.0
    for done, seconds in enumerate(generate(left, speakers, speak, write_opus, args.out), 1):
        total += seconds
        if done % 50 == 0 or done == len(left):
            spent = time.monotonic() - start
            print(
                f"{done}/{len(left)}: {total / 60:.1f} min of speech in {spent / 60:.1f} min, "
                f"{spent / done * (len(left) - done) / 60:.0f} min left",
                flush=True,
            )


if __name__ == "__main__":
    main()
