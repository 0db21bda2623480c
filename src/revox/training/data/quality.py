"""How much speech there is, of whom, and up to which frequency it is real."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.locate import audio_source
from revox.training.data.manifest import Manifest, cut_source
from revox.training.data.sources import SpeechSource
from revox.workers import in_order

FULL_RATE = 24_000  # Hz, the codec's
EDGES = (8_000, 10_000, 11_000)  # Hz
_NEAR = 100.0  # Hz by which an edge may be missed: a filter is not a wall
_SECONDS = 15.0  # of a clip that are measured


@dataclass(frozen=True)
class SourceReport:
    """What the sources hold. Hours count clips whose length is known; shares are of the clips.

    `below_full_rate`: those sampled below 24 kHz. `ends_below`: of `measured` clips, drawn at random, those
    whose spectrum ends at or below 8, 10 and 11 kHz, whatever their rate claims. `sources` are those given,
    without what was refused. `sentences` are all of it for people, with what it means.
    """

    clips: int
    hours: float
    speakers: int
    languages: dict[str, float]
    below_full_rate: float
    ends_below: dict[int, float]
    measured: int
    sources: list[SpeechSource]
    sentences: list[str]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def report(
    sources: Sequence[SpeechSource],
    *,
    refuse_below: int | None = None,
    sample: int = 200,
    workers: int | None = None,
) -> SourceReport:
    """Count `sources`, and measure on `sample` random clips where their spectrum ends.

    `refuse_below` (Hz) leaves out the clips whose sampling rate is lower, or unknown; the report and
    its `sources` are about the rest. Raises DataError when nothing is left.
    """
    low = [source.cuts.rows["rate"] < (refuse_below or 0) for source in sources]
    refused = sum(int(one.sum()) for one in low)
    refused_seconds = sum(
        float(source.cuts.rows["seconds"][one].sum()) for source, one in zip(sources, low, strict=True)
    )
    remaining = [
        replace(source, cuts=source.cuts.take(~one))
        for source, one in zip(sources, low, strict=True)
        if not one.all()
    ]
    if not remaining:
        raise DataError(
            f"no clip is left: all {refused} are below {refuse_below} Hz; add speech recorded at 24 kHz "
            "or more, or refuse less"
        )
    manifests = [source.cuts for source in remaining]
    clips = sum(map(len, manifests))
    ends = _measured(manifests, sample, workers)
    ends_below = {edge: float((ends <= edge + _NEAR).mean()) if len(ends) else 0.0 for edge in EDGES}
    languages, speakers, low_rates = Counter[str](), set[str](), 0
    for cuts in manifests:
        low_rates += int(((cuts.rows["rate"] > 0) & (cuts.rows["rate"] < FULL_RATE)).sum())
        speakers.update(cuts.speakers[i] for i in np.unique(cuts.rows["speaker"]))
        for number in np.unique(cuts.rows["language"]):
            seconds = cuts.rows["seconds"][cuts.rows["language"] == number].sum(dtype=np.float64)
            languages[cuts.languages[number] if number >= 0 else "unknown"] += seconds / 3600
    hours, below_full_rate = sum(languages.values()), low_rates / clips
    by_language = ", ".join(f"{name} {spoken:.1f} h" for name, spoken in languages.most_common())
    sentences = [f"{hours:.1f} hours of speech: {clips} clips of {len(speakers)} speakers ({by_language})."]
    if broken := sum(len(source.broken) for source in sources):
        sentences.append(f"{broken} files cannot be used.")
    if refuse_below is not None:
        sentences.append(
            f"{refused} clips ({refused_seconds / 3600:.1f} hours) below {refuse_below} Hz were left out."
        )
    narrow, middle, wide = ends_below.values()
    if below_full_rate or narrow:
        sentences.append(
            f"{_percent(below_full_rate)} of the clips were sampled below 24 kHz, and the spectrum of "
            f"{_percent(narrow)} of {len(ends)} measured ones ends at or below 8 kHz "
            f"({_percent(middle)} at 10 kHz, {_percent(wide)} at 11 kHz)."
        )
        sentences.append(
            "Much of a voice's timbre is between 8 and 12 kHz: an encoder trained on clips without that "
            "band learns to leave it empty. Resampling does not bring it back; refuse such sources or "
            "keep their share small."
        )
    return SourceReport(
        clips, hours, len(speakers), dict(languages.most_common()), below_full_rate, ends_below, len(ends),
        remaining, sentences,
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0, 1) or share >= 0.1 else 1}f} %"


def _measured(manifests: Sequence[Manifest], sample: int, workers: int | None) -> np.ndarray:
    """Where the spectrum ends (Hz) of up to `sample` random clips that can be decoded, `[measured]`."""
    starts = np.cumsum([0, *map(len, manifests)])
    chosen = np.sort(np.random.default_rng(0).permutation(starts[-1])[:sample])
    which = np.searchsorted(starts, chosen, side="right") - 1
    addresses = [cut_source(manifests[m][int(row - starts[m])]) for m, row in zip(which, chosen, strict=True)]
    ends = in_order(spectrum_end, addresses, 0 if len(addresses) < 32 else workers)
    return np.array([end for end in ends if math.isfinite(end)])


def spectrum_end(address: str) -> float:
    """Hz above which a clip holds next to nothing (`speech.selection.bandwidth`); nan if undecodable."""
    from revox.speech import AudioError, read_span
    from revox.speech.selection import bandwidth

    try:
        audio = read_span(audio_source(address), 0.0, _SECONDS)
    except (AudioError, DataError, OSError):
        return math.nan
    return bandwidth(audio.samples, audio.rate)
