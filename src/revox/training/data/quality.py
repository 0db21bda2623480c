"""How much speech there is, of whom, and up to which frequency it is real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.pool import cores, in_order
from revox.training.data.sources import Progress, Source
from revox.training.data.stream import ClipStream
from revox.training.data.table import Clip, ClipTable

FULL_RATE = 24_000  # Hz, the codec's
EDGES = (8_000, 10_000, 11_000)  # Hz
_NEAR = 100.0  # Hz by which an edge may be missed: a filter is not a wall
_SECONDS = 15.0  # of a clip that are measured


@dataclass(frozen=True)
class SourceReport:
    """What the sources hold. Hours count clips whose length is known; shares are of the clips.

    `rates`: share of clips by sampling rate (Hz; 0: unknown). `ends_below`: the share of `measured` clips,
    drawn at random, whose spectrum ends at or below 8, 10 and 11 kHz, whatever their rate claims. `kept` are
    the sources without what was refused (`refused` clips, `refused_hours`).
    """

    clips: int
    hours: float
    speakers: int
    languages: dict[str, float]
    rates: dict[int, float]
    below_full_rate: float
    ends_below: dict[int, float]
    measured: int
    broken: int
    streams: list[str]
    kept: list[Source] = field(default_factory=list, repr=False)
    refused: int = 0
    refused_hours: float = 0.0
    refuse_below: int | None = None

    @property
    def sentences(self) -> list[str]:
        """The report for people, what it means included."""
        said = []
        if self.clips:
            by_language = ", ".join(f"{name} {hours:.1f} h" for name, hours in self.languages.items())
            said.append(
                f"{self.hours:.1f} hours of speech: {self.clips} clips of {self.speakers} speakers "
                f"({by_language})."
            )
        if self.broken:
            said.append(f"{self.broken} files cannot be used.")
        if self.streams:
            said.append(f"Streamed, so not measured: {', '.join(self.streams)}.")
        if self.refuse_below is not None:
            said.append(
                f"{self.refused} clips ({self.refused_hours:.1f} hours) below {self.refuse_below} Hz "
                "were left out."
            )
        low = self.below_full_rate
        narrow = self.ends_below.get(EDGES[0], 0.0)
        if low or narrow:
            said.append(
                f"{_percent(low)} of the clips were sampled below 24 kHz, and the spectrum of "
                f"{_percent(narrow)} of {self.measured} measured ones ends at or below 8 kHz "
                f"({_percent(self.ends_below.get(EDGES[1], 0.0))} at 10 kHz, "
                f"{_percent(self.ends_below.get(EDGES[2], 0.0))} at 11 kHz)."
            )
            said.append(
                "The band from 8 to 12 kHz is where much of a voice's timbre lies: what learns from clips "
                "without it learns to leave it empty. Resampling does not bring it back; refuse such sources "
                "or keep their share small."
            )
        return said

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def report(
    sources: Sequence[Source],
    *,
    refuse_below: int | None = None,
    sample: int = 200,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SourceReport:
    """Count `sources`, and measure on `sample` random clips where their spectrum ends.

    `refuse_below` (Hz) leaves out the clips whose sampling rate is lower, or unknown; what stays is `kept`,
    and the report is about that. Streams are kept and not counted. Raises DataError when nothing stays.
    """
    kept = list(sources)
    refused, refused_seconds = 0, 0.0
    if refuse_below is not None:
        kept = []
        for source in sources:
            if isinstance(source.clips, ClipStream):
                kept.append(source)
                continue
            table = _as_table(source.clips)
            stays = table.rate >= refuse_below
            refused += int((~stays).sum())
            refused_seconds += float(np.nansum(table.seconds[~stays]))
            if stays.all():
                kept.append(source)
            elif stays.any():
                kept.append(replace(source, clips=table.take(np.flatnonzero(stays))))
        if not kept:
            raise DataError(
                f"no clip is left: all {refused} are below {refuse_below} Hz; add speech recorded at 24 kHz "
                "or more, or refuse less"
            )
    tables = [_as_table(s.clips) for s in kept if not isinstance(s.clips, ClipStream)]
    rates, languages, speakers = _counted(tables)
    clips = sum(map(len, tables))
    ends = _measured(tables, sample, seed, workers, progress)
    return SourceReport(
        clips=clips,
        hours=sum(float(np.nansum(t.seconds, dtype=np.float64)) for t in tables) / 3600,
        speakers=speakers,
        languages=languages,
        rates={rate: count / clips for rate, count in sorted(rates.items())},
        below_full_rate=sum(n for rate, n in rates.items() if 0 < rate < FULL_RATE) / max(1, clips),
        ends_below={edge: float((ends <= edge + _NEAR).mean()) if len(ends) else 0.0 for edge in EDGES},
        measured=len(ends),
        broken=sum(len(source.broken) for source in sources),
        streams=[source.name for source in kept if source.streamed],
        kept=kept,
        refused=refused,
        refused_hours=refused_seconds / 3600,
        refuse_below=refuse_below,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0, 1) or share >= 0.1 else 1}f} %"


def _as_table(clips: Sequence[Clip] | ClipStream) -> ClipTable:
    return clips if isinstance(clips, ClipTable) else ClipTable.of(clips)


def _counted(tables: Sequence[ClipTable]) -> tuple[dict[int, int], dict[str, float], int]:
    """Clips by rate, hours by language (the most first), and how many speakers there are."""
    rates: dict[int, int] = {}
    languages: dict[str, float] = {}
    speakers: set[str] = set()
    for table in tables:
        for rate, count in zip(*np.unique(table.rate, return_counts=True), strict=True):
            rates[int(rate)] = rates.get(int(rate), 0) + int(count)
        hours = np.nan_to_num(table.seconds.astype(np.float64)) / 3600
        for number in np.unique(table.language):
            name = table.languages[number] if number >= 0 else "unknown"
            languages[name] = languages.get(name, 0.0) + float(hours[table.language == number].sum())
        speakers.update(table.speakers[int(i)] for i in np.unique(table.speaker))
    return rates, dict(sorted(languages.items(), key=lambda item: -item[1])), len(speakers)


def _measured(
    tables: Sequence[ClipTable], sample: int, seed: int, workers: int | None, progress: Progress | None
) -> np.ndarray:
    """Where the spectrum ends (Hz) of up to `sample` random clips that can be decoded, `[measured]`."""
    starts = np.cumsum([0, *map(len, tables)])
    size = int(starts[-1])
    rows = np.sort(np.random.default_rng(seed).permutation(size)[:sample])
    clips = []
    for row in rows:
        table = int(np.searchsorted(starts, row, side="right")) - 1
        clips.append(tables[table][int(row - starts[table])])
    few = len(clips) < 32
    ends = []
    for done, end in enumerate(in_order(spectrum_end, clips, 0 if few else (workers or cores()))):
        if math.isfinite(end):
            ends.append(end)
        if progress:
            progress("measuring the spectrum", done + 1, len(clips))
    return np.array(ends)


def spectrum_end(clip: Clip) -> float:
    """Hz above which the clip holds next to nothing (`speech.selection.bandwidth`); nan if undecodable."""
    from revox.speech import AudioError, read_span
    from revox.speech.selection import bandwidth
    from revox.training.data.locate import clip_source

    try:
        audio = read_span(clip_source(clip.key), 0.0, _SECONDS)
    except (AudioError, DataError, OSError):
        return math.nan
    return bandwidth(audio.samples, audio.rate)
