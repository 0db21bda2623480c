"""How much speech there is, of whom, and up to which frequency it is real."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.locate import audio_source
from revox.training.data.manifest import Manifest, cut_source
from revox.training.data.pool import in_order
from revox.training.data.sources import SpeechSource

FULL_RATE = 24_000  # Hz, the codec's
EDGES = (8_000, 10_000, 11_000)  # Hz
_NEAR = 100.0  # Hz by which an edge may be missed: a filter is not a wall
_SECONDS = 15.0  # of a clip that are measured


@dataclass(frozen=True)
class SourceReport:
    """What the sources hold. Hours count clips whose length is known; shares are of the clips.

    `below_full_rate`: those sampled below 24 kHz. `ends_below`: of `measured` clips, drawn at random, those
    whose spectrum ends at or below 8, 10 and 11 kHz, whatever their rate claims. `sources`
    are those given, without what was refused (`refused` clips, `refused_hours`).
    """

    clips: int
    hours: float
    speakers: int
    languages: dict[str, float]
    below_full_rate: float
    ends_below: dict[int, float]
    measured: int
    broken: int
    streams: list[str]
    sources: list[SpeechSource] = field(default_factory=list, repr=False)
    refused: int = 0
    refused_hours: float = 0.0
    refuse_below: int | None = None

    @property
    def sentences(self) -> list[str]:
        """The report for people, with what it means."""
        sentences = []
        if self.clips:
            by_language = ", ".join(f"{name} {hours:.1f} h" for name, hours in self.languages.items())
            sentences.append(
                f"{self.hours:.1f} hours of speech: {self.clips} clips of {self.speakers} speakers "
                f"({by_language})."
            )
        if self.broken:
            sentences.append(f"{self.broken} files cannot be used.")
        if self.streams:
            sentences.append(f"Streamed, so not measured: {', '.join(self.streams)}.")
        if self.refuse_below is not None:
            sentences.append(
                f"{self.refused} clips ({self.refused_hours:.1f} hours) below {self.refuse_below} Hz "
                "were left out."
            )
        low, (narrow, middle, wide) = self.below_full_rate, (self.ends_below[edge] for edge in EDGES)
        if low or narrow:
            sentences.append(
                f"{_percent(low)} of the clips were sampled below 24 kHz, and the spectrum of "
                f"{_percent(narrow)} of {self.measured} measured ones ends at or below 8 kHz "
                f"({_percent(middle)} at 10 kHz, {_percent(wide)} at 11 kHz)."
            )
            sentences.append(
                "Much of a voice's timbre is between 8 and 12 kHz: an encoder trained on clips without that "
                "band learns to leave it empty. Resampling does not bring it back; refuse such sources or "
                "keep their share small."
            )
        return sentences

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
    its `sources` are about the rest. Streams stay and are not counted. Raises DataError when nothing is left.
    """
    remaining: list[SpeechSource] = []
    manifests: list[Manifest] = []
    refused, refused_seconds = 0, 0.0
    for source in sources:
        cuts = source.cuts
        if isinstance(cuts, Manifest):
            low = cuts.rows["rate"] < (refuse_below or 0)
            refused += int(low.sum())
            refused_seconds += float(cuts.rows["seconds"][low].sum())
            if low.all():
                continue
            cuts = cuts.take(~low)
            manifests.append(cuts)
        remaining.append(replace(source, cuts=cuts))
    if not remaining:
        raise DataError(
            f"no clip is left: all {refused} are below {refuse_below} Hz; add speech recorded at 24 kHz "
            "or more, or refuse less"
        )
    clips = sum(map(len, manifests))
    ends = _measured(manifests, sample, workers)
    languages, speakers, low_rates = Counter[str](), set[str](), 0
    for cuts in manifests:
        low_rates += int(((cuts.rows["rate"] > 0) & (cuts.rows["rate"] < FULL_RATE)).sum())
        speakers.update(cuts.speakers[i] for i in np.unique(cuts.rows["speaker"]))
        for number in np.unique(cuts.rows["language"]):
            seconds = cuts.rows["seconds"][cuts.rows["language"] == number].sum(dtype=np.float64)
            languages[cuts.languages[number] if number >= 0 else "unknown"] += seconds / 3600
    return SourceReport(
        clips=clips,
        hours=sum(languages.values()),
        speakers=len(speakers),
        languages=dict(languages.most_common()),
        below_full_rate=low_rates / max(1, clips),
        ends_below={edge: float((ends <= edge + _NEAR).mean()) if len(ends) else 0.0 for edge in EDGES},
        measured=len(ends),
        broken=sum(len(source.broken) for source in sources),
        streams=[source.name for source in remaining if not isinstance(source.cuts, Manifest)],
        sources=remaining,
        refused=refused,
        refused_hours=refused_seconds / 3600,
        refuse_below=refuse_below,
    )


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


def spectrum_end(address: str | bytes) -> float:
    """Hz above which a clip holds next to nothing (`speech.selection.bandwidth`); nan if undecodable."""
    from revox.speech import AudioError, read_span
    from revox.speech.selection import bandwidth

    try:
        audio = read_span(audio_source(address), 0.0, _SECONDS)
    except (AudioError, DataError, OSError):
        return math.nan
    return bandwidth(audio.samples, audio.rate)
