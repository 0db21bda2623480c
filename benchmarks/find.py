"""Does `revox find` find the right speaker, and nobody else, in made conversations whose truth is known?

    python benchmarks/find.py --speech ../shared/speech --out benchmarks/results/DATE-find.json

benchmarks/find-recipes.json holds the 20 recipes and the thresholds, drawn and written down before the first
run (`--draw SEED` draws others). Each is built, written in its own format, and searched as the command does,
with its subtitles and without. Beside it stand rankings by one thing only, of the same subtitles' monologues
(cues clustered over gaps of 1 s, cut to 40 s): by the number of words; by the pitch that is nearest to the
middle of the band, or to that of the clips given; by the similarity to those clips, or to whoever speaks
most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from conversations import RATE, Speech, Spoken, build, clip, draw
from revox.find import FindRequest, find_references
from revox.find.listen import Track
from revox.find.subtitles import read_monologues
from revox.metrics.speaker import SpeakerVerifier
from revox.metrics.turns import Turn, mean_voice
from revox.speech import FORMATS, Audio, pitch_track, read_audio, write_audio
from revox.speech.write import AudioEncoder

RECIPES = Path(__file__).with_name("find-recipes.json")
LONGEST = 40.0  # seconds
RANKINGS = ("find", "find, no subtitles", "words only", "pitch only", "embedding only")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, default=Path("../shared/speech"))
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--out", type=Path, help="JSON; a table in Markdown is written beside it")
    parser.add_argument("--keep", type=Path, help="a folder for the conversations' sound and subtitles")
    parser.add_argument("--draw", type=int, metavar="SEED", help="only draw recipes, into --recipes")
    parser.add_argument("--hours", type=float, help="only search one recording of so many hours, for memory")
    parser.add_argument("--half", type=int, default=1, help="which speakers to draw: 0 to develop with")
    args = parser.parse_args()
    if args.draw is not None:
        return draw_all(args.speech, args.recipes, args.draw, args.half)
    given = json.loads(args.recipes.read_text())
    if args.hours:
        result = search_long(args.speech, given["recipes"], args.hours)
        print(json.dumps(result, indent=1))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        return
    rows = []
    for recipe in given["recipes"]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(args.speech, recipe, args.keep or Path(folder)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "thresholds": given["thresholds"],
        "totals": totals(rows, given["thresholds"]),
        "conversations": rows,
    }
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))
    if not result["totals"]["passed"]:
        sys.exit(1)


def draw_all(folder: Path, path: Path, seed: int, half: int) -> None:
    speech = Speech(folder, half)
    recipes: list[dict[str, Any]] = []
    for kind in ("pitch", "like"):
        used: set[str] = set()
        for number in range(10):
            recipes.append(draw(speech, kind, number, seed, used))
            used.add(recipes[-1]["target"])
    thresholds = {
        "right_speaker_first_of_20": 19,
        "seconds_of_others_in_the_winner": 0.2,
        "processor_share": 0.1,
    }
    path.write_text(json.dumps({"thresholds": thresholds, "recipes": recipes}, indent=1) + "\n")


def search_long(speech: Path, recipes: list[dict[str, Any]], hours: float) -> dict[str, float]:
    """All conversations, one after the other and over again, as one recording: what a search of it takes."""
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "long.wav"
        with open(media, "wb") as file, AudioEncoder(file, FORMATS["wav"], RATE) as encoder:
            for recipe in itertools.cycle(recipes):
                if file.tell() > hours * 3600 * RATE * 2:
                    break
                encoder.write(build(speech, recipe)[0])
        clip.cache_clear()
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        found = find_references(FindRequest((media,), pitch=(160, 260)))
        seconds = found.tracks[0].seconds
        return {
            "hours": round(seconds / 3600, 3),
            "processor_share": round((time.process_time() - began) / seconds, 4),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
            "peak_memory_before_gb": round(before / 1e6, 3),
            "turns": len(found.turns),
            "speakers": len(found.speakers),
            "candidates": len(found.candidates),
        }


def measure(speech: Path, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    samples, spoken, subtitles = build(speech, recipe)
    media = folder / f"{recipe['name']}.{recipe['format']}"
    write_audio(media, Audio(samples, RATE))
    cues = folder / f"{recipe['name']}.srt"
    cues.write_text(subtitles)
    like = None
    if recipe["like"]:
        like = folder / f"{recipe['name']}-like.flac"
        clips = [read_audio(speech / file, RATE).samples for file in recipe["like"]]
        write_audio(like, Audio(np.concatenate(clips), RATE))
    pitch = tuple(recipe["pitch_hz"]) if recipe["pitch_hz"] else None
    spans: dict[str, tuple[float, float] | None] = {}
    seconds: dict[str, float] = {}
    for name, given in (("find", (cues,)), ("find, no subtitles", ())):
        began = time.process_time()
        found = find_references(FindRequest((media,), given, like, pitch))
        seconds[name] = time.process_time() - began
        spans[name] = (found.candidates[0].start, found.candidates[0].end)
    monologues = [(one.start, min(one.end, one.start + LONGEST), one.words) for one in read_monologues(cues)]
    spans |= one_thing_only(monologues, found.tracks[0], found.turns, recipe, like)
    length = len(samples) / RATE
    row: dict[str, Any] = {
        "name": recipe["name"],
        "seconds": round(length, 1),
        "target": recipe["target"],
        "speakers": len({one.speaker for one in spoken}),
        "background": (recipe["background"] or {}).get("kind", ""),
        "processor_share": {name: round(value / length, 4) for name, value in seconds.items()},
    }
    for name in RANKINGS:
        row[name] = verdict(spoken, recipe["target"], spans[name])
    return row


def one_thing_only(
    monologues: list[tuple[float, float, int]],
    track: Track,
    turns: list[Turn],
    recipe: dict[str, Any],
    like: Path | None,
) -> dict[str, tuple[float, float]]:
    """The monologue that each of the simple rankings puts first."""

    def f0(start: float, end: float) -> float:
        voiced = track.f0[round(start * 100) : round(end * 100)]
        return float(np.median(voiced[np.isfinite(voiced)])) if np.isfinite(voiced).any() else 0.0

    def voice(start: float, end: float) -> np.ndarray:
        inside = [turn for turn in turns if start < (turn.first + turn.last) / 200 < end]
        return mean_voice(inside) if inside else np.zeros(256)

    if like is None:
        low, high = recipe["pitch_hz"]
        hz, likeness = (low + high) / 2, mean_voice([turn for turn in turns if turn.speaker == 0])
    else:
        audio = read_audio(like)
        hz, likeness = pitch_track(audio.samples, audio.rate).median, SpeakerVerifier().embed(audio)
    spans = [(start, end) for start, end, _ in monologues]
    return {
        "words only": max(monologues, key=lambda one: one[2])[:2],
        "pitch only": min(spans, key=lambda span: abs(np.log(max(f0(*span), 1.0) / hz))),
        "embedding only": max(spans, key=lambda span: float(voice(*span) @ likeness)),
    }


def verdict(spoken: list[Spoken], target: str, span: tuple[float, float]) -> dict[str, Any]:
    """Whether most of the speech in a span is the target's, and seconds of others in it."""
    seconds: dict[str, float] = {}
    for one in spoken:
        inside = min(span[1], one.end) - max(span[0], one.start)
        if inside > 0:
            seconds[one.speaker] = seconds.get(one.speaker, 0.0) + inside
    most = max(seconds, key=lambda name: seconds[name]) if seconds else ""
    others = sum(value for name, value in seconds.items() if name != target)
    return {
        "start_s": round(span[0], 2),
        "end_s": round(span[1], 2),
        "right": most == target,
        "others_s": round(others, 2),
    }


def totals(rows: list[dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """Of all conversations, judged by the thresholds `limits` of their recipes."""
    found: dict[str, Any] = {}
    for name in RANKINGS:
        right = [row[name]["others_s"] for row in rows if row[name]["right"]]
        found[name] = {
            "right_speaker_first": len(right),
            "right_but_with_others": sum(one > limits["seconds_of_others_in_the_winner"] for one in right),
            "most_seconds_of_others_in_right_ones": max(right, default=0.0),
        }
    share = max(max(row["processor_share"].values()) for row in rows)
    found["most_processor_share"] = share
    found["passed"] = (
        all(
            found[name]["right_speaker_first"] >= limits["right_speaker_first_of_20"]
            and not found[name]["right_but_with_others"]
            for name in RANKINGS[:2]
        )
        and share < limits["processor_share"]
    )
    return found


def table(result: dict[str, Any]) -> str:
    rows, sums = result["conversations"], result["totals"]
    lines = [
        f"| conversation | seconds | speakers | under it | {' | '.join(RANKINGS)} | processor share |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in RANKINGS)} | --- |",
    ]
    for row in rows:
        cells = [
            f"{'right' if row[name]['right'] else 'wrong'}, {row[name]['others_s']:.2f} s"
            for name in RANKINGS
        ]
        lines.append(
            f"| {row['name']} | {row['seconds']:.0f} | {row['speakers']} | {row['background']} | "
            f"{' | '.join(cells)} | {max(row['processor_share'].values()):.3f} |"
        )
    cells = [f"{sums[name]['right_speaker_first']} of {len(rows)}" for name in RANKINGS]
    lines.append(f"| right speaker first | | | | {' | '.join(cells)} | |")
    cells = [f"{sums[name]['right_but_with_others']}" for name in RANKINGS]
    most = result["thresholds"]["seconds_of_others_in_the_winner"]
    lines.append(f"| right, but over {most:g} s of others | | | | {' | '.join(cells)} | |")
    verdict = "met" if sums["passed"] else "missed"
    return "\n".join(
        [*lines, "", f"Seconds are of other speakers inside the winner. Thresholds {verdict}.", ""]
    )


if __name__ == "__main__":
    main()
