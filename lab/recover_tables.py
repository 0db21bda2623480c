"""The recovery experiment's lines -> tables, goals and curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import KINDS
from lab.recover_arms import GOALS_FOR, Arm, arm_named
from lab.recover_experiment import Experiment, Line
from revox.evaluation.report import EvaluationReport, markdown
from revox.evaluation.tables import Column, Table, make_row
from revox.speech.files import replace_file, replacing

CURVES_FILE = "curves.png"

CODEC = (
    Column("mel", "mel distance (nats)", "less", 3),
    Column("stft", "STFT distance", "less"),
    Column("similarity", "speaker similarity", "more"),
    Column("rank", "rank", "less", 1),
    Column("word_errors", "word errors (%)", "less", 1, "ratio", "words"),
)
CODES = (
    Column("semantic_agreement", "same semantic code", "more", 3),
    Column("acoustic_exact_share", "same level", "more", 3),
    Column("acoustic_level_error", "level error (of 20)", "less"),
    Column("row_cosine", "cosine of voice embeddings, mean removed", "more", 3),
    Column("row_cosine_others", "the same between different speakers", digits=3),
    Column("saturated_share", "saturated levels", "less", 3),
)
USE = (
    Column("codes_used", "semantic codes in use", digits=0),
    Column("perplexity", "perplexity", digits=1),
)
CLONING = (
    Column("cloned_similarity", "speaker similarity", "more"),
    Column("cloned_rank", "rank", "less", 1),
    Column("cloned_word_errors", "word errors (%)", "less", 1, "ratio", "cloned_words"),
    Column("cloned_missing", "did not end", "less", statistic="mean"),
    Column("cloned_nll", "semantic NLL (nats a frame)", "less"),
    Column("cloned_flow", "flow-matching error", "less", 3),
    Column("clip_nll", "NLL of the clip's own codes", "less"),
)
CURVES = (*CODEC[:1], CODEC[2], CODES[0], CODES[2], CODES[3])


Shared = float | dict[str, float]
"""One figure, or one for each kind of speakers."""


def _of(value: Any, kind: str) -> Any:
    return value[kind] if isinstance(value, dict) else value


@dataclass(frozen=True)
class Goal:
    """A bound of the score `key`: `factor` times a score of the arm `of`, `plus` a difference.

    `of` is "original" or "ceiling". With `more` the score should be at least that, and at least `frequent`
    times that of always answering the most frequent semantic code; else at most.
    """

    key: str
    title: str
    more: bool
    of: str = "original"
    factor: Shared = 1.0
    plus: Shared = 0.0
    frequent: Shared = 0.0

    def bound(self, kind: str, references: Mapping[str, float]) -> float | None:
        """The bound for a kind of speakers, given the score's value in each reference that there is."""
        reference = references.get(self.of)
        if reference is None:
            return None
        bound = float(reference * _of(self.factor, kind) + _of(self.plus, kind))
        least = _of(self.frequent, kind) * references.get("frequent", 0.0)
        return max(bound, least) if self.more else bound

    def reached(self, value: float, bound: float | None) -> bool | None:
        """Whether `value` reaches the goal; None if there is no bound."""
        if bound is None:
            return None
        return value >= bound if self.more else value <= bound


GOALS = (
    Goal("row_cosine", "cosine of voice embeddings at least 0.88 (synthetic), 0.82 (human) of the ceiling's",
         True, "ceiling", {"synthetic": 0.88, "human": 0.82}),
    Goal("semantic_agreement", "semantic agreement at least 0.54 of the ceiling's, and (human) twice that of "
         "always answering the most frequent code", True, "ceiling", 0.54,
         frequent={"synthetic": 0.0, "human": 2.0}),
    Goal("acoustic_level_error", "level error at most 0.3 (synthetic), 0.55 (human) above the ceiling's",
         False, "ceiling", plus={"synthetic": 0.3, "human": 0.55}),
    Goal("clip_nll", "likelihood of a clip's codes within 1 nat of the original's", False, plus=1.0),
    Goal("word_errors", "words of decoded speech within 5 points of the original's", False, plus=5.0),
    Goal("mel", "mel distance within 5 % of the original's", False, factor=1.05),
    Goal("similarity", "similarity of decoded speech within 0.03 of the original's", True, plus=-0.03),
    Goal("cloned_similarity", "cloned speech within 0.03 similarity of the original's", True, plus=-0.03),
    Goal("cloned_word_errors", "cloned speech within 3 points of word error of the original's", False,
         plus=3.0),
)  # fmt: skip
"""Goals of the arm `GOALS_FOR`, after an hour of one core."""

Figures = dict[tuple[str, str, str], float]
"""(arm, kind, column's key) -> value."""


def write_tables(path: Path, arms: Sequence[Arm], lines: Sequence[Line], experiment: Experiment) -> Path:
    """Write tables of `lines` to `path` (Markdown), and the curves next to it."""
    tables, figures = _tables(arms, lines)
    drawn = draw_curves(path.with_name(CURVES_FILE), arms, lines)
    report = EvaluationReport("The lab's encoder, restored", _facts(arms, lines, experiment), tables, [], [])
    text = markdown(report)
    text += "\n" + goals_table(arms, figures) + "\n" + _times(arms, lines)
    if drawn:
        text += (
            f"\n## Against time\n\n![Scores against minutes of training]({CURVES_FILE})\n\n"
            "On the first few clips of each kind; dashed: the original encoder.\n"
        )
    caveats = [f"- {arm.title}: {caveat}" for arm in arms for caveat in arm.caveats]
    if caveats:
        text += "\n## Caveats\n\n" + "\n".join(caveats) + "\n"
    replace_file(path, text)
    return path


def _facts(arms: Sequence[Arm], lines: Sequence[Line], experiment: Experiment) -> dict[str, str]:
    speakers: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for line in lines:
        if line["what"] == "score":
            speakers[line["kind"]].add(line["clip"])
    done = {(line["arm"], line["seed"]) for line in lines if line["what"] == "score"}
    counts = sorted(Counter(arm for arm, _ in done).values()) or [0]
    seeds = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    wanted = sum(max(experiment.seeds, sum(arm == one.name for arm, _ in done)) for one in arms)
    confined = {line["confined"] for line in lines if line["what"] == "trained"}
    guard = "the kernel and an audit hook" if confined == {True} else "an audit hook"
    return {
        "training": f"{experiment.minutes:g} minutes an arm and seed ({experiment.clock.replace('_', ' ')})",
        "clips": ", ".join(f"{len(names)} held-out {kind} speakers" for kind, names in speakers.items()),
        "seeds": f"{seeds}; arms and seeds begun: {len(done)} of {wanted}",
        "restoring was confined by": guard if confined else "nothing was trained yet",
    }


def _scores(lines: Sequence[Line], arm: str, kind: str) -> list[list[dict[str, Any]]]:
    """The scores of an arm: for each clip, those of its seeds."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["what"] == "score" and line["arm"] == arm and line["kind"] == kind:
            clips.setdefault(line["clip"], []).append(line["scores"])
    return list(clips.values())


def _tables(arms: Sequence[Arm], lines: Sequence[Line]) -> tuple[list[Table], Figures]:
    tables: list[Table] = []
    figures: Figures = {}
    for title, columns in (("Codec", CODEC), ("Codes", CODES), ("Cloning", CLONING)):
        for kind in KINDS:
            scored = {
                key
                for line in lines
                if line["what"] == "score" and line["kind"] == kind
                for key in line["scores"]
            }
            # Without a recognizer of all words, those of humans are not known.
            shown = [c for c in columns if c.key not in ("word_errors", "clip_nll") or c.key in scored]
            table = Table(f"{title}: {kind} speakers", shown, [])
            for arm in arms:
                scores = _scores(lines, arm.name, kind)
                if not scores:
                    continue
                made = make_row(arm.title, arm.kind, scores, shown)
                if title == "Codes":
                    made.cells |= make_row(arm.title, arm.kind, [_use(scores)], USE).cells
                table.rows.append(made)
                figures |= {(arm.name, kind, key): cell.value for key, cell in made.cells.items()}
            if title == "Codes":
                table.columns += USE
                table.notes.append(
                    "Compared with the original encoder's codes. Codes in use and perplexity are of all "
                    "clips of a seed together, and grow with their number."
                )
                originals = [arm.name for arm in arms if arm.by == "original"]
                truth = [scores for name in originals for scores in _scores(lines, name, kind)]
                if truth:
                    figures["frequent", kind, "semantic_agreement"] = _commonest(truth)
                    table.notes.append(
                        "Always predicting the original's most common semantic code would be right in "
                        f"{_commonest(truth):.3f} of the frames."
                    )
            if table.rows:
                tables.append(table)
    return tables, figures


def _commonest(clips: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The share of frames, median over clips, that have the most common code of all clips."""
    codes, count = np.unique(np.concatenate([one[0]["semantic"] for one in clips]), return_counts=True)
    most_common = codes[count.argmax()]
    return float(np.median([np.mean(np.array(one[0]["semantic"]) == most_common) for one in clips]))


def _use(clips: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Semantic codes in use and their perplexity over all clips, for each seed that all clips have."""
    found = []
    for seed in range(min(map(len, clips))):
        codes = np.concatenate([scores[seed]["semantic"] for scores in clips])
        share = np.unique(codes, return_counts=True)[1] / len(codes)
        entropy = -float((share * np.log(share)).sum())
        found.append({"codes_used": float(len(share)), "perplexity": float(np.exp(entropy))})
    return found


def goals_table(arms: Sequence[Arm], figures: Figures) -> str:
    """The goals as Markdown: the scores of each restored arm, and whether they reach the goals."""
    shown = [arm for arm in arms if arm.by in ("encoder", "refinement", "student")]
    names = {arm.by: arm.name for arm in arms if arm.by in ("original", "ceiling")} | {"frequent": "frequent"}
    lines = [
        "## Goals",
        "",
        f'They are set for the arm "{arm_named(GOALS_FOR).title}" and its successors; other arms are for '
        "comparison.",
        "",
    ]
    lines.append("| goal | speakers | bound |" + "".join(f" {arm.title} |" for arm in shown))
    lines.append("| --- | --- | --- |" + " --- |" * len(shown))
    for goal in GOALS:
        for kind in KINDS:
            places = {by: (name, kind, goal.key) for by, name in names.items()}
            bound = goal.bound(kind, {by: figures[at] for by, at in places.items() if at in figures})
            cells = []
            for arm in shown:
                value = figures.get((arm.name, kind, goal.key))
                reached = None if value is None else goal.reached(value, bound)
                verdict = {True: "reached", False: "not reached", None: "nothing to compare with"}[reached]
                cells.append("–" if value is None else f"{value:.3f}, {verdict}")
            limit = "–" if bound is None else f"{'≥' if goal.more else '≤'} {bound:.3f}"
            lines.append(f"| {goal.title} | {kind} | {limit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _times(arms: Sequence[Arm], lines: Sequence[Line]) -> str:
    """The time of each arm: training, and seconds for the codes of a clip."""
    out = [
        "## Time", "",
        "| | seed | steps | seconds of training (budget) | elapsed seconds | a step (s), before and after "
        "discriminators start | codes of a clip (s, median) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for arm in arms:
        trained = {line["seed"]: line for line in lines if line["what"] == "trained"
                   and line["arm"] == (arm.name if arm.trains else arm.of)}  # fmt: skip
        seconds_of: dict[int, list[float]] = {}
        for line in lines:
            if line["what"] == "score" and line["arm"] == arm.name:
                seconds_of.setdefault(line["seed"], []).append(line["scores"]["coding_seconds"])
        for seed in sorted(seconds_of):
            cells = ["–"] * 4
            if seed in trained:
                one = trained[seed]
                cells = [
                    str(one["steps"]), f"{one[one['clock']]:.0f} ({one['budget']:.0f})",
                    f"{one['seconds']:.0f}", f"{one['step_before']:.3f}, {one['step_after']:.3f}",
                ]  # fmt: skip
            seconds = f"{np.median(seconds_of[seed]):.2f}"
            out.append(f"| {arm.title} | {seed} | {' | '.join(cells)} | {seconds} |")
    note = (
        "Time is that of the steps, without timing a step beforehand, speaking the sentences for pairs (once "
        "for all arms of a seed), evaluations and saving."
    )
    return "\n".join([*out, "", note]) + "\n"


def curve(lines: Sequence[Line], arm: str, kind: str, key: str) -> list[tuple[float, float]]:
    """(minutes, median over clips of the mean over seeds) at every evaluation of an arm, in order of time."""
    evaluations: dict[int, dict[str, list[dict[str, Any]]]] = {}
    seconds: dict[int, list[float]] = {}
    for line in lines:
        if line["what"] == "evaluation" and line["arm"] == arm and line["kind"] == kind:
            at = line["step"]
            evaluations.setdefault(at, {}).setdefault(line["clip"], []).append(line["scores"])
            seconds.setdefault(at, []).append(line["seconds"])
    points = []
    for at, clips in evaluations.items():
        values = [np.mean([scores[key] for scores in seeds]) for seeds in clips.values()]
        points.append((float(np.mean(seconds[at])) / 60, float(np.median(values))))
    return sorted(points)


def draw_curves(path: Path, arms: Sequence[Arm], lines: Sequence[Line]) -> bool:
    """Draw scores against minutes of training, one line per arm; False if nothing has been evaluated yet."""
    trained = [arm for arm in arms if any(curve(lines, arm.name, kind, "mel") for kind in KINDS)]
    if not trained:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(KINDS), len(CURVES), figsize=(3.6 * len(CURVES), 6.4), constrained_layout=True, squeeze=False
    )
    colors = plt.get_cmap("tab10" if len(trained) <= 10 else "tab20")
    for kind, line_of_axes in zip(KINDS, axes, strict=True):
        evaluated = {line["clip"] for line in lines if line["what"] == "evaluation" and line["kind"] == kind}
        for column, axis in zip(CURVES, line_of_axes, strict=True):
            for i, arm in enumerate(trained):
                points = curve(lines, arm.name, kind, column.key)
                axis.plot(*zip(*points, strict=True), marker=".", color=colors(i), label=arm.title)
            original = [
                line["scores"][column.key]
                for line in lines
                if line["what"] == "score" and line["kind"] == kind and line["clip"] in evaluated
                and _by(arms, line["arm"]) == "original"
            ]  # fmt: skip
            if original:
                axis.axhline(float(np.median(original)), color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{kind}: {column.title}", fontsize=9)
            axis.set_xlabel("minutes of training", fontsize=8)
            axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    plt.close(figure)
    return True


def _by(arms: Sequence[Arm], name: str) -> str:
    return next((arm.by for arm in arms if arm.name == name), "")
