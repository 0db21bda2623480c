"""From scores to the tables of the lab's goals: medians, counts, ranks, with ceilings and floors.

Plain functions of the manifest that `lab.quality.speak` wrote and of scores by file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lab.quality.words import words_wrong

RECOGNIZERS = ("base", "tiny.en")
METHODS = ("encoder", "inversion")


class Wanted(NamedTuple):
    """A score ("words base", "words tiny.en", "naturalness", "embedding") of items laid end to end."""

    measure: str
    names: tuple[str, ...]


Scores = Mapping[Wanted, Any]


def rank(own: float, others: Sequence[float]) -> int:
    """The place of `own` among itself and `others`: 1 if all are lower. Silence, like nobody, is last."""
    return 1 + sum(other >= own for other in others)


def clone_places(items: Mapping[str, Any], group: str) -> list[str]:
    """The folders of clones under `group`: each has `decoded` and new speech `0`, `1`, ..."""
    found = (name.removesuffix("/decoded") for name in items if name.startswith(group))
    return [place for place in found if place.rpartition("/")[2].split("-")[0] in METHODS]


def spoken_names(items: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The new sentences of a clone, in order."""
    numbers = (name.removeprefix(f"{place}/") for name in items if name.startswith(f"{place}/"))
    return tuple(f"{place}/{number}" for number in sorted(n for n in numbers if n.isdecimal()))


def _voice_place(kind: str, voice: Mapping[str, Any], method: str) -> str:
    return f"voice/{kind}/{voice['speaker']}/{method}-{voice['reference']:g}"


def wanted(manifest: Mapping[str, Any]) -> list[Wanted]:
    """Every score that the tables need, those of one model together."""
    items, voices = manifest["items"], manifest["lists"]["voices"]
    embedded: list[tuple[str, ...]] = []
    embedded += [(name,) for name in items if name.startswith("voice/") and not name[-1].isdecimal()]
    embedded += [(name,) for name in items if name.startswith("bundled/") and not name[-1].isdecimal()]
    clones = clone_places(items, "voice/") + clone_places(items, "bundled/")
    embedded += [spoken_names(items, place) for place in clones]
    main = [
        _voice_place(kind, voice, method)
        for kind, found in voices.items()
        for voice in found
        for method in METHODS
    ]
    listened = [name for name in items if name.startswith("preset")]
    listened += [name for name in items if name.endswith(("/stream", "/decoded-stream"))]
    listened = [
        n for n in listened if not n.endswith("/stream") or n.replace("/stream", "/decoded-stream") in items
    ]
    for place in (*main, *clone_places(items, "bundled/")):
        listened += spoken_names(items, place)
    words = [name for name in listened if items[name].get("text")]
    requests = [Wanted(f"words {model}", (name,)) for model in RECOGNIZERS for name in words]
    requests += [Wanted("naturalness", (name,)) for name in listened]
    return requests + [Wanted("embedding", names) for names in dict.fromkeys(embedded)]


class _Table:
    """Scores of one manifest by name."""

    def __init__(self, manifest: Mapping[str, Any], scores: Scores) -> None:
        self.items, self.lists, self._scores = manifest["items"], manifest["lists"], scores

    def words_wrong(self, names: Sequence[str]) -> dict[str, float] | None:
        """The word error rate of each recognizer over items whose text is known."""
        known = [name for name in names if self.items[name].get("text")]
        if not known:
            return None
        texts = [self.items[name]["text"] for name in known]
        return {
            model: words_wrong(texts, [self._scores[Wanted(f"words {model}", (name,))] for name in known])
            for model in RECOGNIZERS
        }

    def naturalness(self, names: Sequence[str]) -> float | None:
        """The median."""
        return median([self._scores[Wanted("naturalness", (name,))] for name in names])

    def embedding(self, *names: str) -> np.ndarray:
        """Of the items laid end to end, [256]."""
        return np.array(self._scores[Wanted("embedding", names)])

    def presets(self) -> dict[str, Any]:
        """Preset speech, the same sentences by natural speakers, and those through the codec."""
        found: dict[str, Any] = {}
        for group, title in (
            ("preset", "preset"),
            ("preset-source", "source"),
            ("preset-decoded", "decoded"),
        ):
            names = [name for name in self.items if name.startswith(f"{group}/")]
            part: dict[str, Any] = {"naturalness": self.naturalness(names), "sentences": len(names)}
            for kind in ("grammar", "free"):
                of_kind = [name for name in names if self.items[name]["kind"] == kind]
                part[kind] = {"words_wrong": self.words_wrong(of_kind), "sentences": len(of_kind)}
            found[title] = part
        found["preset"]["ended"] = self._ended([n for n in self.items if n.startswith("preset/")])
        return found

    def clips(self, kind: str) -> dict[str, Any]:
        """Recordings through the codec, beside the recordings."""
        voices = self.lists["voices"][kind]
        streams = {v["speaker"]: f"voice/{kind}/{v['speaker']}/stream" for v in voices}
        sources = {speaker: self.embedding(name) for speaker, name in streams.items()}
        made = {s: n.replace("/stream", "/decoded-stream") for s, n in streams.items()}
        made = {speaker: name for speaker, name in made.items() if name in self.items}
        own, places, wrong = [], [], []
        for speaker, name in made.items():
            decoded = self.embedding(name)
            others = [float(decoded @ source) for s, source in sources.items() if s != speaker]
            own.append(float(decoded @ sources[speaker]))
            places.append(rank(own[-1], others))
            wrong += others
        return {
            "naturalness": self.naturalness(list(made.values())),
            "naturalness_source": self.naturalness([streams[speaker] for speaker in made]),
            "similarity": median(own),
            "similarity_wrong_speaker": median(wrong),
            "first": places.count(1),
            "words_wrong": self.words_wrong(list(made.values())),
            "words_wrong_source": self.words_wrong([streams[speaker] for speaker in made]),
            "clips": len(made),
            "speakers": len(sources),
        }

    def voices(self, kind: str, method: str, seconds: float | None = None) -> dict[str, Any] | None:
        """New speech in the voices, from references of so many seconds (None: as long as each has).

        Raises KeyError if a score is missing.
        """
        voices = self.lists["voices"][kind]
        place_of = f"voice/{kind}/{{}}/{{}}".format
        references = {v["speaker"]: self.embedding(place_of(v["speaker"], "reference")) for v in voices}
        others = {v["speaker"]: self.embedding(place_of(v["speaker"], "other")) for v in voices}
        rows: dict[str, list[float]] = {name: [] for name in _VOICE_SCORES}
        speech: list[str] = []
        for voice in voices:
            speaker = voice["speaker"]
            place = place_of(speaker, f"{method}-{voice['reference'] if seconds is None else seconds:g}")
            if f"{place}/decoded" not in self.items:
                continue
            names = spoken_names(self.items, place)
            new, decoded = self.embedding(*names), self.embedding(f"{place}/decoded")
            own, other = references[speaker], others[speaker]
            wrong = [v for s, v in others.items() if s != speaker]
            wrong_references = [v for s, v in references.items() if s != speaker]
            row = {
                "place": rank(float(new @ other), [float(new @ v) for v in wrong]),
                "place_by_reference": rank(float(new @ own), [float(new @ v) for v in wrong_references]),
                "place_of_decoded": rank(float(decoded @ other), [float(decoded @ v) for v in wrong]),
                "place_of_reference": rank(float(own @ other), [float(own @ v) for v in wrong]),
                "similarity": float(new @ other),
                "to_reference": float(new @ own),
                "to_decoded": float(new @ decoded),
                "decoded_to_reference": float(decoded @ own),
                "decoded_to_other": float(decoded @ other),
                "reference_to_other": float(own @ other),
                "to_wrong_speaker": float(np.median([new @ v for v in wrong])),
            }
            for name, value in row.items():
                rows[name].append(value)
            speech += names
        if not speech:
            return None
        found: dict[str, Any] = {name: median(rows[name]) for name in _VOICE_SCORES[4:]}
        found |= {name.replace("place", "first"): rows[name].count(1) for name in _VOICE_SCORES[:4]}
        found["below_decoded"] = found["decoded_to_reference"] - found["to_reference"]
        found["median_place"] = median(rows["place"])
        found |= {"voices": len(rows["place"]), "speakers": len(voices)}
        if seconds is None:
            found["words_wrong"] = self.words_wrong(speech)
            found["naturalness"] = self.naturalness(speech)
            found["ended"] = self._ended(speech)
            found["sentences"] = len(speech)
        return found

    def bundled(self, method: str) -> dict[str, Any] | None:
        """Each bundled clip among all of them, by new speech in its voice and by its decoded codes."""
        speakers = [clip["file"].split("-")[0] for clip in self.lists["bundled"]]
        clips: dict[str, dict[str, float]] = {}
        for speaker in speakers:
            place = f"bundled/{speaker}/{method}"
            if f"{place}/decoded" not in self.items:
                continue
            row: dict[str, float] = {}
            new, decoded = (
                self.embedding(*spoken_names(self.items, place)),
                self.embedding(f"{place}/decoded"),
            )
            for name, voice in (("new", new), ("decoded", decoded)):
                score = {s: float(voice @ self.embedding(f"bundled/{s}/source")) for s in speakers}
                own = score.pop(speaker)
                row |= {f"{name}_place": rank(own, list(score.values())), f"{name}_similarity": own}
                row[f"{name}_highest_other"] = max(score.values(), default=0.0)
            clips[speaker] = row
        if not clips:
            return None
        first = sum(row["new_place"] == 1 for row in clips.values())
        return {"first": first, "clips": len(clips), "by_speaker": clips}

    def times_real_time(self) -> float:
        """Seconds of preset speech for a second of processor time."""
        made = [item for name, item in self.items.items() if name.startswith("preset/")]
        return sum(item["seconds"] for item in made) / max(1e-9, sum(item["cpu_seconds"] for item in made))

    def _ended(self, names: Sequence[str]) -> int:
        return sum(self.items[name]["ended"] for name in names)


_VOICE_SCORES = (
    "place", "place_by_reference", "place_of_decoded", "place_of_reference", "similarity", "to_reference",
    "to_decoded", "decoded_to_reference", "decoded_to_other", "reference_to_other", "to_wrong_speaker",
)  # fmt: skip


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return float(np.median(values)) if len(values) else None


def tables(manifest: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    """All results, nested by the names that the goals have."""
    table = _Table(manifest, scores)
    lengths = {
        name.rsplit("-", 1)[1]: None
        for name in clone_places(table.items, "voice/")
        if float(name.rsplit("-", 1)[1]) in (3.0, 5.0, 8.0)
    }
    voices = {}
    for kind in table.lists["voices"]:
        voices[kind] = {method: table.voices(kind, method) for method in METHODS}
        voices[kind]["by_length"] = {
            seconds: table.voices(kind, "encoder", float(seconds)) for seconds in sorted(lengths, key=float)
        }
    return {
        **table.presets(),
        "clips": {kind: table.clips(kind) for kind in table.lists["voices"]},
        "voices": voices,
        "bundled": {method: table.bundled(method) for method in METHODS},
        "folder": {
            "megabytes": manifest["facts"]["megabytes"],
            "times_real_time": table.times_real_time(),
        },
    }


class ScoreLine(NamedTuple):
    """A line of a table: a label, a value (None: not measured), of how many it counts, its goal's name."""

    label: str
    value: float | None
    of: int | None = None
    goal: str | None = None


def is_met(goal: Mapping[str, float], value: float, of: int | None = None) -> bool:
    """Whether a value meets its goal; a count of another number of items, in proportion."""
    share = (of or 1) / goal.get("of", of or 1)
    return value >= goal["least"] * share if "least" in goal else value <= goal["most"]


def _shown(value: float | None, of: int | None, percent: bool) -> str:
    if value is None:
        return "-"
    if of is not None:
        return f"{value:g} of {of}"
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}" if value == int(value) else f"{value:.2f}"


def _goal(goal: Mapping[str, float] | None, percent: bool) -> str:
    if goal is None:
        return ""
    word, bound = ("at least", goal["least"]) if "least" in goal else ("at most", goal["most"])
    if "of" in goal:
        return f"{word} {bound:g} of {goal['of']:g}"
    return f"{word} {100 * bound:g} %" if percent else f"{word} {bound:g}"


def _words_lines(
    label: str, rates: Mapping[str, float] | None, goal: str | None = None
) -> Iterator[ScoreLine]:
    for model in RECOGNIZERS:
        yield ScoreLine(f"words wrong, {label} ({model})", rates[model] if rates else None, None, goal)


def _preset_lines(results: Mapping[str, Any]) -> Iterator[ScoreLine]:
    preset = results["preset"]
    for kind in ("grammar", "free"):
        goal = f"preset.{kind}.words_wrong"
        yield from _words_lines(kind, preset[kind]["words_wrong"], goal)
        yield from _words_lines(f"{kind}, natural speech", results["source"][kind]["words_wrong"])
        yield from _words_lines(f"{kind}, natural decoded", results["decoded"][kind]["words_wrong"])
    yield ScoreLine("ended by itself", preset["ended"], preset["sentences"], "preset.ended")
    yield ScoreLine("naturalness", preset["naturalness"], None, "preset.naturalness")
    yield ScoreLine("naturalness, natural speech", results["source"]["naturalness"])
    yield ScoreLine("naturalness, natural decoded", results["decoded"]["naturalness"])


def _clip_lines(found: Mapping[str, Any], kind: str) -> Iterator[ScoreLine]:
    name = f"clips.{kind}"
    yield ScoreLine("naturalness, decoded", found["naturalness"], None, f"{name}.naturalness")
    yield ScoreLine("naturalness, source", found["naturalness_source"])
    yield ScoreLine("similarity to the source", found["similarity"], None, f"{name}.similarity")
    yield ScoreLine("floor: similarity to a wrong speaker", found["similarity_wrong_speaker"])
    yield ScoreLine(f"own source first of {found['speakers']}", found["first"], found["clips"])
    yield from _words_lines("decoded", found["words_wrong"])
    yield from _words_lines("source", found["words_wrong_source"])


def _voice_lines(found: Mapping[str, Any], name: str) -> Iterator[ScoreLine]:
    count, speakers = found["voices"], found["speakers"]
    yield ScoreLine(f"first of {speakers} (another stretch)", found["first"], count, f"{name}.first")
    yield ScoreLine(f"first of {speakers} (the references)", found["first_by_reference"], count)
    yield ScoreLine(f"ceiling: decoded reference first of {speakers}", found["first_of_decoded"], count)
    yield ScoreLine(f"ceiling: reference first of {speakers}", found["first_of_reference"], count)
    yield ScoreLine("median place", found["median_place"])
    yield ScoreLine("similarity to another stretch", found["similarity"], None, f"{name}.similarity")
    yield ScoreLine("ceiling: reference to another stretch", found["reference_to_other"])
    yield ScoreLine("ceiling: decoded reference to another stretch", found["decoded_to_other"])
    yield ScoreLine("floor: new speech to a wrong speaker", found["to_wrong_speaker"])
    yield ScoreLine("similarity to the decoded reference", found["to_decoded"])
    yield ScoreLine("similarity to the reference", found["to_reference"])
    yield ScoreLine("the decoded reference's own", found["decoded_to_reference"])
    yield ScoreLine("new speech below decoded", found["below_decoded"], None, f"{name}.below_decoded")
    yield from _words_lines("new speech", found["words_wrong"])
    yield ScoreLine("naturalness, new speech", found["naturalness"])
    yield ScoreLine("ended by itself", found["ended"], found["sentences"])


def _sections(results: Mapping[str, Any]) -> Iterator[tuple[str, list[ScoreLine]]]:
    yield "Preset speech", list(_preset_lines(results))
    for kind, found in results["clips"].items():
        yield f"Recordings through the codec, {kind}", list(_clip_lines(found, kind))
    for kind, methods in results["voices"].items():
        for method in METHODS:
            if methods[method]:
                title = f"New sentences in {kind} voices, codes by {method}"
                yield title, list(_voice_lines(methods[method], f"voices.{kind}.{method}"))
    for method, found in results["bundled"].items():
        if found:
            rows = [ScoreLine("new speech: own clip first", found["first"], found["clips"], "bundled.first")]
            for speaker, row in found["by_speaker"].items():
                rows.append(ScoreLine(f"{speaker}: place of the own clip, new speech", row["new_place"]))
                rows.append(ScoreLine(f"{speaker}: similarity, new speech", row["new_similarity"]))
                rows.append(ScoreLine(f"{speaker}: of the most similar other", row["new_highest_other"]))
                rows.append(ScoreLine(f"{speaker}: ceiling, decoded reference", row["decoded_similarity"]))
            yield f"Bundled clips, codes by {method}", rows
    folder = results["folder"]
    yield (
        "Folder",
        [
            ScoreLine("megabytes", folder["megabytes"], None, "folder.megabytes"),
            ScoreLine("times real time, one core", folder["times_real_time"], None, "folder.times_real_time"),
        ],
    )


_LENGTH_COLUMNS = {
    "new speech to another stretch": "similarity",
    "ceiling: decoded to it": "decoded_to_other",
    "ceiling: reference to it": "reference_to_other",
    "floor: wrong speaker": "to_wrong_speaker",
    "new speech to the reference": "to_reference",
    "ceiling: decoded to that": "decoded_to_reference",
}


def _length_lines(voices: Mapping[str, Any]) -> Iterator[str]:
    titles = ("voices", "reference", "first", "median place", *_LENGTH_COLUMNS)
    yield f"| {' | '.join(titles)} |"
    yield "| --- " * len(titles) + "|"
    for kind, methods in voices.items():
        for seconds, found in methods["by_length"].items():
            if found:
                cells = [kind, f"{seconds} s", f"{found['first']} of {found['voices']}"]
                cells.append(f"{found['median_place']:g}")
                cells += [f"{found[name]:.2f}" for name in _LENGTH_COLUMNS.values()]
                yield f"| {' | '.join(cells)} |"


def markdown(results: Mapping[str, Any], goals: Mapping[str, Any], split: str) -> str:
    """The tables, each value with its goal."""
    lines = [f"# The lab, {split} speakers and sentences", ""]
    for title, rows in _sections(results):
        lines += [f"## {title}", "", "| | value | goal | met |", "| --- | --- | --- | --- |"]
        for row in rows:
            goal = goals.get(row.goal) if row.goal else None
            percent = row.label.startswith("words wrong")
            met = (
                ""
                if goal is None or row.value is None
                else ("yes" if is_met(goal, row.value, row.of) else "NO")
            )
            lines.append(
                f"| {row.label} | {_shown(row.value, row.of, percent)} | {_goal(goal, percent)} | {met} |"
            )
        lines.append("")
    lines += ["## By length of reference, codes by encoder", "", *_length_lines(results["voices"]), ""]
    return "\n".join(lines)
