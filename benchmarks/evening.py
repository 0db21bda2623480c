"""From a clip to a voice by a trained student, by inversion and by the encoder, on the lab.

    revox train student src/revox/demo/checkpoint --texts SENTENCES
    python benchmarks/evening.py --data RUN/data [--clips 4] [--spoken 4] [--arms student "student, 20 steps"]

For each held-out clip and arm: the seconds of the processor from the clip's samples to the voice's codes, the
codes against the reference encoder's, and speech in the voice (similarity by Resemblyzer, which is in no
loss; the speaker's rank among all held-out ones; words). Every result is a line of OUT.jsonl, and a run that
was stopped goes on; the table is OUT.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.recover_arms import Arm
from lab.recover_scores import Scoring, evenly
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.student import trained_student
from revox.demo import checkpoint_folder
from stamps import origin, rows_of

ARMS = {
    "the encoder (ceiling)": CodingSettings("encoder"),
    "student": CodingSettings("student"),
    "student, 20 steps": CodingSettings("student", refine=20),
    "student, 160 steps": CodingSettings("student", refine=160),
    "inversion, 160 steps": CodingSettings("inversion"),
    "random codes (floor)": None,
}


class EveningScoring(Scoring):
    """Scores by name of an arm, with the trained student among what finds codes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        student = trained_student(self.checkpoint, self.tts.model.audio_tokenizer)
        if student is None:
            raise SystemExit(
                "no student is trained for the lab: see the first line of this script's docstring"
            )
        self.finder = Coder(self.original, self.coder.preset_codes, student=lambda codec: student)
        self.record = student.record

    def codes(self, arm: Arm, kind: str, i: int, seed: int, restored: Coder | None = None) -> torch.Tensor:
        """Codes `[37, frames]` of a clip by the arm's title."""
        settings = ARMS[arm.title]
        if settings is None:
            return super().codes(arm, kind, i, seed)
        return find_codes(self.finder, self.clips[kind][i].samples, settings).codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evening"))
    parser.add_argument("--clips", type=int, default=4, help="of each kind")
    parser.add_argument("--spoken", type=int, default=4, help="of them, in whose voices sentences are spoken")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of a human clip")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    log = asked.out.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    made_of = origin(checkpoint_folder())
    lines = rows_of(log, made_of)
    done = {(line["kind"], line["clip"], line["arm"]) for line in lines}
    scoring = EveningScoring(checkpoint_folder(), asked.encoder, asked.data, asked.seconds)
    for title in asked.arms:
        for kind in ("human", "synthetic"):
            for place, i in enumerate(evenly(asked.clips, len(scoring.clips[kind]))):
                if (kind, i, title) in done:
                    continue
                arm, whole = Arm(name="arm", title=title, by="random"), place < asked.spoken
                line = {"kind": kind, "clip": i, "arm": title} | scoring.score(arm, kind, i, 0, whole=whole)
                del line["semantic"]
                line |= made_of
                lines.append(line)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(kind, i, title, line["coding_seconds"], line["acoustic_level_error"], flush=True)
    table = "\n\n".join(_table(kind, lines, len(scoring.clips[kind])) for kind in ("human", "synthetic"))
    record = json.dumps(scoring.record)
    asked.out.with_suffix(".md").write_text(f"{__doc__.strip()}\n\nThe student: `{record}`\n\n{table}\n")
    print(table)


def _table(kind: str, lines: list[dict[str, Any]], speakers: int) -> str:
    rows = [
        f"| {kind} speakers | clips (spoken) | one core | similarity | rank of {speakers} | word errors | "
        "decoded codes' similarity | their mel distance | semantic agreement | level error of 20 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title in ARMS:
        mine = [line for line in lines if (line["kind"], line["arm"]) == (kind, title)]
        if not mine:
            continue

        def median(key: str, form: str, mine: list[dict[str, Any]] = mine) -> str:
            found = [line[key] for line in mine if key in line]
            return format(float(np.median(found)), form) if found else "-"

        count = sum(line.get("cloned_words", 0) for line in mine)
        wrong = sum(line.get("cloned_word_errors", 0) for line in mine)
        figures = (
            f"{len(mine)} ({sum('cloned_words' in line for line in mine)})",
            median("coding_seconds", ".2f") + " s",
            median("cloned_similarity", ".2f"), median("cloned_rank", ".1f"),
            f"{wrong / count:.0%}" if count else "-", median("similarity", ".2f"), median("mel", ".2f"),
            median("semantic_agreement", ".0%"), median("acoustic_level_error", ".2f"),
        )  # fmt: skip
        rows.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
