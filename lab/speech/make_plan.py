"""Make the committed plan: `python -m lab.speech.make_plan --kokoro DIR --librispeech DIR... --books DIR`.

Run once; what it wrote (`plan.tsv`, `speakers.json`, `heldout.json`) is committed and is the truth.
`--kokoro` is the folder of the first set of speech (plan of grammar sentences, index, speakers);
`--librispeech` holds the human clips' transcripts, `--books` Project Gutenberg's plain texts as NUMBER.txt.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab.speech.plan import (
    FIRST_FREE,
    PlannedUtterance,
    Speaker,
    assemble,
    plain_words,
    write_plan,
    write_speakers,
)
from lab.speech.sentences import (
    body_of_book,
    by_coverage,
    is_plain,
    runs,
    sentences_of,
    without_rare_words,
    without_unknown_names,
)

SEED = 19
# Project Gutenberg's numbers; README.md has the titles.
BOOKS = (11, 12, 35, 36, 45, 55, 108, 113, 120, 157, 271, 289, 514, 558, 778, 844, 1450, 1661, 1874, 3536)
RAREST = 3  # a word of the books in fewer sentences rules a sentence out
TRAINING, VALIDATION, HELDOUT = 7400, 200, 230  # free sentences
EVALUATED = 30  # of the grammar and as many free, spoken by the presets when the lab is evaluated
_HERE = Path(__file__).parent


def transcript_words(folder: Path, files: set[str] | None = None) -> list[list[str]]:
    """The words of each transcript of `folder/transcripts.jsonl`, of the listed files only if any are."""
    lines = [json.loads(line) for line in (folder / "transcripts.jsonl").open(encoding="utf-8")]
    return [
        plain_words(" ".join(word[2] for word in line["words"])).split()
        for line in lines
        if files is None or line["file"] in files
    ]


def book_sentences(books: Path, judging: list[list[str]]) -> list[str]:
    """The books' plain sentences; none shares five words in a row with the transcripts `judging`."""
    forbidden = set().union(*(runs(words) for words in judging))
    found: list[str] = []
    for number in BOOKS:
        text = (books / f"{number}.txt").read_text(encoding="utf-8")
        found += [sentence for sentence in sentences_of(body_of_book(text)) if is_plain(sentence)]
    return [s for s in without_unknown_names(found) if not runs(plain_words(s).split()) & forbidden]


def split_sentences(
    prose: Sequence[str], everyday: Sequence[str], known: set[str], seed: int
) -> dict[str, list[str]]:
    """Free sentences of each split. Words of the grammar (`known`) and of the everyday phrases may be rare.

    Validation and held-out sentences are drawn at random among those of five words or more whose words
    are all in the grammar or in four sentences or more. A training sentence shares no five words in a row
    with them.
    """
    unique = {plain_words(sentence): sentence for sentence in [*prose, *everyday]}
    everyday_words = {word for sentence in everyday for word in plain_words(sentence).split()}
    pool = without_rare_words(unique.values(), RAREST, known | everyday_words)
    common = [s for s in without_rare_words(pool, 4, known) if len(plain_words(s).split()) >= 5]
    order = np.random.default_rng(seed).permutation(len(common))[: VALIDATION + HELDOUT]
    held_out = [common[i] for i in order]
    forbidden = set().union(*(runs(plain_words(sentence).split()) for sentence in held_out))
    training = [sentence for sentence in pool if not runs(plain_words(sentence).split()) & forbidden]
    return {
        "train": by_coverage(training, TRAINING, seed),
        "validation": held_out[:VALIDATION],
        "heldout": held_out[VALIDATION:],
    }


def main() -> None:
    """Write the three files beside this one."""
    parser = argparse.ArgumentParser(prog="python -m lab.speech.make_plan", description=__doc__)
    parser.add_argument("--kokoro", type=Path, required=True)
    parser.add_argument("--librispeech", type=Path, required=True)
    parser.add_argument("--librispeech-multi", type=Path, required=True)
    parser.add_argument(
        "--clips", type=Path, required=True, help="CSV with the split of each LibriSpeech file"
    )
    parser.add_argument("--books", type=Path, required=True)
    args = parser.parse_args()

    speakers = [Speaker(**fields) for fields in json.loads((args.kokoro / "speakers.json").read_text())]
    lines = [json.loads(line) for line in (args.kokoro / "plan.jsonl").open(encoding="utf-8")]
    grammar = [PlannedUtterance(line["n"], line["speaker"], line["written"]) for line in lines]
    lines = [json.loads(line) for line in (args.kokoro / "index.jsonl").open(encoding="utf-8")]
    made = [PlannedUtterance(int(line["file"][:5]), line["speaker"], line["written"]) for line in lines]
    with args.clips.open(encoding="utf-8", newline="") as file:
        judging = {row["file"] for row in csv.DictReader(file) if row["split"] != "train"}
    transcripts = transcript_words(args.librispeech, judging) + transcript_words(args.librispeech_multi)
    everyday = (_HERE / "everyday.txt").read_text(encoding="utf-8").splitlines()
    known = {word for item in grammar for word in item.text.split()}
    sentences = split_sentences(book_sentences(args.books, transcripts), everyday, known, SEED)
    write_speakers(_HERE / "speakers.json", speakers)
    write_plan(_HERE / "plan.tsv", assemble(speakers, grammar, made, sentences, SEED))

    heldout = {speaker.name for speaker in speakers if speaker.split == "heldout"}
    unseen = [item.written for item in grammar if item.speaker in heldout and item.number < FIRST_FREE]
    evaluated = {"grammar": unseen[:EVALUATED], "free": sentences["heldout"][:EVALUATED]}
    (_HERE / "heldout.json").write_text(json.dumps(evaluated, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
