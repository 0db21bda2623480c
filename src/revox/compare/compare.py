"""Two sides, the same sentences, figures of both, and the verdict of the rule that was stored before."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from revox.compare.errors import CompareError
from revox.compare.figures import Rating, SampleScorer, read_ratings, statistic
from revox.compare.rule import KINDS, Measured, Rule, RuleFigure, RuleVerdict, parse_rule
from revox.compare.samples import TIMES, ComparedSide, Sample, write_index
from revox.marking import Signer, new_record, write_marked
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import append_line, replace_file, stamp_of

RULE_FILE, SAMPLES_FILE, RESULT_FILE = "rule.json", "samples.jsonl", "comparison.json"
FORMAT = "revox compare 1"
SHOWN = ("mean", "p50", "p95")


@dataclass(frozen=True)
class StoredRule:
    """A rule with its hash (SHA-256 of its text) and the time (UTC) when it was stored."""

    rule: Rule
    sha256: str
    stored_at: str

    @property
    def stamp(self) -> dict[str, str]:
        """What every result carries."""
        return {"rule_sha256": self.sha256, "rule_stored_at": self.stored_at}


@dataclass
class ComparisonRun:
    """What was measured: samples of both sides, and ratings. `verdict` is None while ratings are awaited."""

    stored: StoredRule
    facts: dict[str, dict[str, Any]]
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {"A": [], "B": []})
    ratings: list[Rating] = field(default_factory=list)
    verdict: RuleVerdict | None = None

    def measured(self, figure: RuleFigure) -> Measured:
        """A figure of a side with its interval."""
        if figure.name == "rating":
            values = [{"rating": one.a if figure.side == "A" else one.b} for one in self.ratings]
            return statistic(figure, values)
        return statistic(figure, [one.figures for one in self.samples[figure.side]])


def store_rule(text: str, out: Path, resume: bool, plan: Mapping[str, object]) -> StoredRule:
    """Parse a rule and store it in `out`, before any sample; or find it there again.

    `plan` is what the samples and their figures depend on, by the names that a user knows; hashes of it are
    stored with the rule. Raises CompareError when the rule cannot be read, `out` has another, was begun with
    another plan, or has a comparison that is not resumed.
    """
    rule, path = parse_rule(text), out / RULE_FILE
    digest = hashlib.sha256(text.encode()).hexdigest()
    planned = {name: stamp_of(value) for name, value in plan.items()}
    if path.exists():
        found, before = _stored(path)
        if found.sha256 != digest:
            raise CompareError(
                f"{out} was begun with another rule (of {found.stored_at}, SHA-256 {found.sha256[:12]}...), "
                "which is not changed afterwards; compare into another folder"
            )
        if not resume:
            raise CompareError(f"{out} holds a comparison; say --resume to go on, or give another folder")
        if other := [name for name, value in planned.items() if before.get(name, value) != value]:
            raise CompareError(
                f"{out} was begun with another {other[0]}; give the same, or compare into another folder"
            )
        return found
    if out.exists() and any(out.iterdir()):
        raise CompareError(f"{out} is not empty and holds no comparison; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    stored = StoredRule(rule, digest, _now())
    entry = {"format": FORMAT, "rule": text, "sha256": digest, "stored_at": stored.stored_at, "plan": planned}
    replace_file(path, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    return stored


def _stored(path: Path) -> tuple[StoredRule, dict[str, str]]:
    try:
        entry = json.loads(path.read_bytes())
        text, digest, when = entry["rule"], entry["sha256"], entry["stored_at"]
        plan = dict(entry.get("plan", {}))
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CompareError(
            f"{path} was changed or damaged after it was stored; compare into another folder"
        ) from None
    return StoredRule(parse_rule(text), digest, when), plan


def check_measured(rule: Rule, sides: dict[str, ComparedSide], scorer: SampleScorer, rated: bool) -> None:
    """Raises CompareError when the rule names a figure that this comparison does not measure."""
    ways = {
        "similarity": "give --reference CLIP",
        "word_error_rate": "give --recognizer",
        "naturalness": "install distillmos and leave --no-naturalness out",
        "rating": "give --ratings FILE",
    }
    for figure in rule.figures:
        there = figure.name in scorer.figures or (figure.name == "rating" and rated)
        if figure.name in TIMES:
            there = figure.name in sides[figure.side].times
        if not there:
            way = ways.get(
                figure.name, f"{sides[figure.side].name} does not tell it; give an endpoint that streams"
            )
            raise CompareError(f"the rule names {figure}, which is not measured here: {way}")


def compare(
    sides: dict[str, ComparedSide],
    texts: Sequence[str],
    stored: StoredRule,
    scorer: SampleScorer,
    out: Path,
    progress: ProgressCallback = ignore_progress,
    signer: Signer | None = None,
) -> ComparisonRun:
    """Get every sentence of both sides that `out` does not have yet, sounds in OUT/a and OUT/b, and score it.

    Each sample is written as soon as it is scored; interrupted, the same call goes on behind it. signer: of
    the marks of what is spoken here; None marks by tags only. Raises CompareError when `out` was begun with
    other sentences or its samples with another rule.
    """
    found = ComparisonRun(stored, {side: one.facts() for side, one in sides.items()})
    done = _samples(out / SAMPLES_FILE, stored)
    for number, text in enumerate(texts, 1):
        # In turn, so that a busy hour is the same for both.
        for side, source in sides.items():
            sample = done.get((side, number))
            if sample is None:
                sample = take_sample(source, number, text, scorer, out / side.lower(), signer)
                line = {"side": side, **vars(sample), "at": _now(), **stored.stamp}
                append_line(out / SAMPLES_FILE, json.dumps(line, ensure_ascii=False).encode())
            elif sample.text != text:
                raise CompareError(f"{out} was begun with other sentences; give the same, or another folder")
            found.samples[side].append(sample)
            count = sum(map(len, found.samples.values()))
            progress(Progress("samples", count, len(texts) * len(sides)))
    for side in sides:
        write_index(out / side.lower(), found.samples[side], found.facts[side])
    return found


def record_baseline(
    side: ComparedSide,
    texts: Sequence[str],
    scorer: SampleScorer,
    out: Path,
    progress: ProgressCallback = ignore_progress,
    signer: Signer | None = None,
) -> list[Sample]:
    """The samples of one side alone, in a folder that can be a side of a later comparison.

    Interrupted, the folder is a baseline of the sentences so far. signer: as of `compare`. Raises
    CompareError when `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise CompareError(f"{out} is not empty; give another folder")
    samples: list[Sample] = []
    try:
        for number, text in enumerate(texts, 1):
            samples.append(take_sample(side, number, text, scorer, out, signer))
            progress(Progress("samples", number, len(texts)))
    finally:
        if samples:
            write_index(out, samples, side.facts())
    return samples


def take_sample(
    side: ComparedSide, number: int, text: str, scorer: SampleScorer, folder: Path, signer: Signer | None
) -> Sample:
    """One sentence of a side, its sound in `folder`, scored."""
    audio, content, sample = side.sound(number, text)
    if audio is not None and len(audio.samples):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / str(sample.file)
        if content:
            replace_file(path, content)
        else:  # spoken here, or streamed without a container
            record = new_record(str(side.facts().get("model") or side.name)[:200], side.name[:200])
            write_marked(path, audio, "wav", record=record, signer=signer)
    else:
        audio, sample.file = None, None
        sample.problem = sample.problem or "there is no sound in the answer"
    scorer.score(sample, audio)
    return sample


def decide(found: ComparisonRun, ratings: Path | None) -> None:
    """Read the ratings, and let the rule decide; no verdict yet where it names ratings that are not there.

    Raises CompareError for ratings that cannot be read or were given before the rule was stored.
    """
    if ratings is not None and ratings.is_file():
        found.ratings = read_ratings(ratings, (found.facts["A"].get("voice"), found.facts["B"].get("voice")))
        begun = datetime.fromisoformat(found.stored.stored_at)
        early = sum(one.time is not None and one.time < begun for one in found.ratings)
        if early:
            raise CompareError(
                f"{ratings}: {early} ratings were given before the rule was stored "
                f"({found.stored.stored_at}); a rule is written beforehand"
            )
    named = found.stored.rule.figures
    if any(figure.name == "rating" for figure in named) and not found.ratings:
        return
    found.verdict = found.stored.rule.decide({figure: found.measured(figure) for figure in named})


def result_of(found: ComparisonRun) -> dict[str, Any]:
    """Everything as plain JSON values."""
    verdict = found.verdict
    numbers = {str(figure): _measured(found.measured(figure)) for figure in found.stored.rule.figures}
    return {
        "format": FORMAT,
        "rule": found.stored.rule.text,
        **found.stored.stamp,
        "decided_at": _now(),
        "verdict": "waiting for ratings"
        if verdict is None
        else ("refused" if verdict.outcome is None else verdict.outcome),
        "clause": "" if verdict is None else verdict.clause,
        "reason": "" if verdict is None else verdict.reason,
        "numbers": numbers,
        "sides": found.facts,
        "figures": {
            name: {
                side: {key: _measured(found.measured(RuleFigure(key, name, side))) for key in SHOWN}
                for side in "AB"
            }
            for name in KINDS
            if any(found.measured(RuleFigure("n", name, side)).count for side in "AB")
        },
    }


def report_of(found: ComparisonRun) -> str:
    """The same as Markdown: verdict, rule, numbers, and a table of all figures."""
    result = result_of(found)
    lines = ["# Comparison", "", f"**Verdict: {result['verdict']}**", ""]
    lines += [f"Decided by: `{result['clause']}`", ""] if result["clause"] else []
    lines += [f"Reason: {result['reason']}", ""] if result["reason"] else []
    lines += [f"The rule, stored {result['rule_stored_at']}, SHA-256 `{result['rule_sha256']}`:", "", "```"]
    lines += [*found.stored.rule.text.strip().splitlines(), "```", ""]
    lines += ["| figure of the rule | value | interval | n |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {_cells(value)} |" for name, value in result["numbers"].items()]
    lines += ["", "| mean of | A | interval | n | B | interval | n |", f"|{' --- |' * 7}"]
    lines += [
        f"| {name} | {_cells(sides['A']['mean'])} | {_cells(sides['B']['mean'])} |"
        for name, sides in result["figures"].items()
    ]
    facts = (f"- {side}: {json.dumps(known, ensure_ascii=False)}" for side, known in found.facts.items())
    lines += ["", *facts, ""]
    return "\n".join(lines)


def write_result(found: ComparisonRun, out: Path) -> None:
    """Write comparison.json and comparison.md into `out`. Raises OSError."""
    replace_file(out / RESULT_FILE, json.dumps(result_of(found), indent=1, ensure_ascii=False) + "\n")
    replace_file(out / "comparison.md", report_of(found))


def _samples(path: Path, stored: StoredRule) -> dict[tuple[str, int], Sample]:
    """The samples that are there, by side and number; a line that was cut off is taken again."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            sample = Sample(**{key: entry[key] for key in Sample.__dataclass_fields__})
            side, digest = entry["side"], entry["rule_sha256"]
        except (ValueError, TypeError, KeyError):
            continue
        if digest != stored.sha256:
            raise CompareError(f"{path} has samples taken under another rule; compare into another folder")
        found[side, sample.number] = sample
    return found


def _measured(one: Measured) -> dict[str, float | int | None]:
    value, low, high = (round(x, 5) if math.isfinite(x) else None for x in (one.value, one.low, one.high))
    return {"value": value, "low": low, "high": high, "n": one.count}


def _cells(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "| | 0"
    return f"{one['value']:.4g} | {one['low']:.4g} to {one['high']:.4g} | {one['n']}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
