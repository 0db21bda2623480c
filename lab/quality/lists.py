"""What the lab is scored on: speakers, stretches of their recordings, sentences, and the goals.

`lab/lists/judged.json` is the truth; `python -m lab.quality.lists --data RUN/data` made it, once. It has a
list for the held-out speakers and sentences and one of the validation ones, for use during development.

A voice is a speaker's stream: utterances laid end to end. Its first `reference` seconds are what is cloned,
the rest is another stretch of the same speaker. The whole stream is the clip that goes through the codec.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "lists" / "judged.json"
SEED = 19
SENTENCES = 30  # of the grammar, and as many free ones
STREAM, REFERENCE, SHORTEST_REFERENCE, OTHER = 13.0, 8.0, 5.0, 5.0  # seconds
SHORTEST_STREAM = 7.5  # seconds; a speaker with less has nothing to be compared with
LENGTHS = (3.0, 5.0, 8.0)  # seconds of reference
BUNDLED = ("5867-48852", "248-130644", "1926-143879", "4680-16026", "1034-121119", "2159-179154")

# "least" or "most" of each score; of a count also "of" how many.
GOALS: dict[str, dict[str, float]] = {
    "preset.grammar.words_wrong": {"most": 0.05},
    "preset.free.words_wrong": {"most": 0.12},
    "preset.ended": {"least": 58, "of": 60},
    "preset.naturalness": {"least": 3.0},
    "clips.synthetic.naturalness": {"least": 3.3},
    "clips.human.naturalness": {"least": 3.2},
    "clips.synthetic.similarity": {"least": 0.95},
    "clips.human.similarity": {"least": 0.85},
    "voices.synthetic.encoder.first": {"least": 16, "of": 20},
    "voices.synthetic.encoder.below_decoded": {"most": 0.08},
    "voices.human.encoder.first": {"least": 12, "of": 20},
    "voices.human.encoder.similarity": {"least": 0.70},
    "voices.human.inversion.first": {"least": 10, "of": 20},
    "voices.human.inversion.similarity": {"least": 0.67},
    "bundled.first": {"least": 5, "of": 6},
    "folder.megabytes": {"most": 50},
    "folder.times_real_time": {"least": 3},
}


def read_lists(path: Path = FILE) -> dict[str, Any]:
    """The committed lists: "goals"; under "heldout" and "validation" sentences, voices, bundled clips."""
    return json.loads(path.read_text(encoding="utf-8"))


def shorter(lists: Mapping[str, Any], every: int, limit: int | None = None) -> dict[str, Any]:
    """The lists with every so-maniest item spoken, at most `limit` of each.

    All voices and bundled clips stay in them, because the others of a ranking are always the same: `spoken`
    marks those that speak.
    """

    def marked(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        spoken = range(0, len(items), every)[:limit]
        return [{**item, "spoken": n in spoken} for n, item in enumerate(items)]

    kinds = ("grammar", "free")
    sentences = [[s for s in lists["sentences"] if s["kind"] == kind][::every][:limit] for kind in kinds]
    return {
        "sentences": [sentence for of_kind in sentences for sentence in of_kind],
        "voices": {kind: marked(found) for kind, found in lists["voices"].items()},
        "bundled": marked(lists["bundled"]),
    }


def reference_seconds(stream: float) -> float:
    """How much of a stream of so many seconds is the reference: 5 to 8 s, leaving 5 s where it can."""
    return round(min(REFERENCE, max(SHORTEST_REFERENCE, stream - OTHER)) - 0.05, 1)


def make_voices(
    utterances: Mapping[str, Sequence[tuple[str | None, float]]],
    sentences: Sequence[Mapping[str, Any]],
    most: float | None,
) -> list[dict[str, Any]]:
    """A voice of each speaker; `utterances` has text and seconds of each, in order.

    `most`: with how many seconds a stream is long enough, its utterances then drawn at random; None takes all
    there are, in order. A speaker never says a sentence that is in the stream. Speakers of too little speech
    are left out.
    """
    rng = np.random.default_rng(SEED)
    by_kind = [[s["text"] for s in sentences if s["kind"] == kind] for kind in ("grammar", "free")]
    voices: list[dict[str, Any]] = []
    for speaker in sorted(utterances):
        mine, n = utterances[speaker], len(voices)
        third = by_kind[n % 2][(20 + n // 2) % len(by_kind[0])]
        texts = [by_kind[0][n % SENTENCES], by_kind[1][n % SENTENCES], third]
        order = range(len(mine)) if most is None else rng.permutation(len(mine))
        pieces: list[int] = []
        seconds = 0.0
        for i in map(int, order):
            if mine[i][0] not in texts and (most is None or seconds < most):
                pieces.append(i)
                seconds += mine[i][1]
        if seconds < SHORTEST_STREAM:
            continue
        known = [mine[i][0] for i in pieces]
        voices.append(
            {
                "speaker": speaker,
                "utterances": pieces,
                "text": None if None in known else " ".join(map(str, known)),
                "reference": reference_seconds(seconds),
                "sentences": texts,
            }
        )
    return voices


def make_lists(data: Path) -> dict[str, Any]:
    """The lists from a build's speech and the committed plan; the same seed gives the same lists."""
    from lab.data import RATE, SpeechSet
    from lab.sizes import PRESETS
    from lab.sources import SPEECH
    from lab.speech.plan import read_plan, read_speakers

    lists: dict[str, Any] = {"seed": SEED, "goals": GOALS}
    split_of = {s.name: s.split for s in read_speakers(SPEECH / "speakers.json").values()}
    for split in ("heldout", "validation"):
        sets = {kind: SpeechSet(data, split, kind) for kind in ("synthetic", "human")}
        if split == "heldout":
            texts = json.loads((SPEECH / "heldout.json").read_text(encoding="utf-8"))
        else:
            rng = np.random.default_rng(SEED)
            made = {u.text for u in sets["synthetic"].utterances}
            texts = {}
            for kind, name in (("plan", "grammar"), ("free", "free")):
                found = [
                    item.written
                    for item in read_plan(SPEECH / "plan.tsv")
                    if item.kind == kind and split_of[item.speaker] == split and item.written in made
                ]
                distinct = list(dict.fromkeys(found))
                texts[name] = [distinct[i] for i in rng.choice(len(distinct), SENTENCES, replace=False)]
        sentences = [
            {"text": text, "kind": kind, "preset": PRESETS[(n + shift) % len(PRESETS)]}
            for kind, shift in (("grammar", 0), ("free", SENTENCES))
            for n, text in enumerate(texts[kind])
        ]
        voices = {}
        for kind, speech in sets.items():
            spoken = {
                speaker: [
                    (speech.utterances[i].text, speech.utterances[i].samples / RATE)
                    for i in speech.of(speaker)
                ]
                for speaker in speech.speakers
            }
            voices[kind] = make_voices(spoken, sentences, STREAM if kind == "synthetic" else None)
        bundled = [
            {"file": f"{name}-0000.flac", "sentences": voices["human"][n]["sentences"]}
            for n, name in enumerate(BUNDLED if split == "heldout" else ())
        ]
        lists[split] = {"sentences": sentences, "voices": voices, "bundled": bundled}
    return lists


def main() -> None:
    """Write the lists."""
    from revox.speech.files import replace_file

    parser = argparse.ArgumentParser(prog="python -m lab.quality.lists", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="where a build put its speech")
    parser.add_argument("-o", "--output", type=Path, default=FILE)
    asked = parser.parse_args()
    replace_file(asked.output, json.dumps(make_lists(asked.data), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
