"""The clips that were found as files, with the reasons: WAV, find.json and a picture."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revox.find.candidates import Candidate
from revox.find.errors import FindError
from revox.find.find import Findings
from revox.find.picture import check_drawing, draw_findings
from revox.speech import Audio, limit_peaks, loudness, read_span, true_peak, write_audio
from revox.speech.files import replace_file
from revox.speech.selection import bandwidth, clipped_frames

RATE = 24000
LUFS, CEILING = -16.0, -1.5  # of the files: loudness, and dBTP that no peak passes
CONSENT = "Clone a voice only if its owner agreed; `revox clone` asks for their consent."
REPORT, PICTURE = "find.json", "find.png"
_MOST_LIMITED = 6.0  # dB that the limiter may take from a peak
_CLOSE = 0.1  # LU
_BRIGHT = 8500.0  # Hz up to which a clip must have sound not to cost
_DULL = 0.1  # cost


@dataclass(frozen=True, eq=False)
class FoundClip:
    """A clip as it was written to `file`, at `lufs`, and why: sentences. `scores` are numbers by name."""

    rank: int
    source: str
    start: float
    end: float
    file: str
    pitch: float
    scores: dict[str, float]
    reasons: list[str]


def write_findings(findings: Findings, out: str | os.PathLike[str]) -> list[FoundClip]:
    """Write the best clips to the folder `out`, as 24 kHz mono WAV at -16 LUFS, with find.json and find.png.

    A clip is leveled by one gain; peaks over -1.5 dBTP meet a look-ahead limiter, of which no more than 6 dB
    is asked: a clip that would need more is left quieter, and says so. What an earlier run wrote there is
    replaced. Raises FindError when the folder holds other things, AudioError, OSError.
    """
    out = Path(out)
    prepare_folder(out)
    chosen = _ranked(findings)
    for old in (*_written_before(out), PICTURE):
        (out / old).unlink(missing_ok=True)
    clips = []
    for rank, (candidate, audio, quality) in enumerate(chosen, 1):
        file = f"clip-{rank}.wav"
        samples, limited = _leveled(audio.at(RATE).samples)
        scores = {**candidate.scores, **quality, "score": candidate.score, "limited_db": limited}
        scores |= {"lufs": loudness(samples, RATE), "true_peak_db": true_peak(samples, RATE)}
        write_audio(out / file, Audio(samples, RATE))
        source = os.fspath(findings.request.media[candidate.source])
        clips.append(
            FoundClip(
                rank, source, candidate.start, candidate.end, file, scores.pop("pitch_hz"), scores,
                _reasons(findings, candidate, scores),
            )
        )  # fmt: skip
    replace_file(out / PICTURE, draw_findings(findings, [candidate for candidate, _, _ in chosen]))
    replace_file(out / REPORT, json.dumps(_report(findings, clips), indent=1, allow_nan=False) + "\n")
    return clips


def prepare_folder(out: Path, inputs: Sequence[str | os.PathLike[str]] = ()) -> None:
    """Make the folder, before the search: what would be missing at its end is said at once.

    Raises FindError when it holds other things than an earlier run's, or one of the `inputs` among what an
    earlier run wrote, which is replaced; when matplotlib is missing; OSError.
    """
    check_drawing()
    if out.exists() and not out.is_dir():
        raise FindError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).is_file():
        raise FindError(f"{out} holds other files and no {REPORT}; give a new folder")
    written = {(out / name).resolve() for name in _written_before(out)}
    if used := [one for one in inputs if Path(one).resolve() in written]:
        raise FindError(f"{used[0]} would be replaced: {out} holds an earlier search; give a new folder")
    out.mkdir(parents=True, exist_ok=True)


def _written_before(out: Path) -> list[str]:
    """The clips that the report in `out` lists."""
    try:
        clips = [str(one["file"]) for one in json.loads((out / REPORT).read_bytes())["candidates"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [name for name in clips if re.fullmatch(r"clip-\d+\.wav", name)]


def _ranked(findings: Findings) -> list[tuple[Candidate, Audio, dict[str, float]]]:
    """The best, by their scores less what only the sound at its own rate tells: clipping and bandwidth."""
    most = findings.request.most
    found = []
    for candidate in findings.candidates[: 2 * most]:
        media = findings.request.media[candidate.source]
        audio = read_span(media, candidate.start, candidate.end - candidate.start)
        clipped = float(clipped_frames(audio.samples, audio.rate, int(audio.seconds * 100) + 1).mean())
        quality = {"clipped": clipped, "bandwidth_hz": bandwidth(audio.samples, audio.rate)}
        cost = min(1.0, 50 * clipped) + (_DULL if quality["bandwidth_hz"] < _BRIGHT else 0.0)
        found.append((candidate.less(cost), audio, quality))
    return sorted(found, key=lambda one: -one[0].score)[:most]


def _leveled(samples: np.ndarray) -> tuple[np.ndarray, float]:
    """Samples `[n]` at 24 kHz as near to -16 LUFS as the ceiling allows, and dB taken from their peaks."""
    measured, peak = loudness(samples, RATE), true_peak(samples, RATE)
    if not math.isfinite(measured):
        return samples, 0.0
    gain = min(LUFS - measured, CEILING + _MOST_LIMITED - peak)
    reached = limit_peaks(samples * np.float32(10 ** (gain / 20)), RATE, CEILING)
    missing = LUFS - loudness(reached, RATE)
    if missing > _CLOSE and peak + gain + missing <= CEILING + _MOST_LIMITED:
        gain += missing
        reached = limit_peaks(samples * np.float32(10 ** (gain / 20)), RATE, CEILING)
    return reached, max(0.0, peak + gain - CEILING)


def _reasons(findings: Findings, candidate: Candidate, scores: dict[str, float]) -> list[str]:
    request, measured = findings.request, candidate.scores
    pitch = (
        f"Median pitch {measured['pitch_hz']:.0f} Hz, give or take {measured['pitch_spread']:.1f} semitones"
    )
    if request.pitch:
        low, high = request.pitch
        pitch += f"; {100 * measured['in_band']:.0f} % of it between {low:g} and {high:g} Hz"
    nearest = f"{Path(request.like).name}" if request.like is not None else "the speaker's mean voice"
    others, share = measured["other_speaker"], measured["share_of_speech"]
    found = [
        f"{measured['seconds_of_speech']:.1f} s of speech, {100 * share:.0f} % of the clip.",
        f"{pitch}.",
        f"Similarity to {nearest} {measured['similarity']:.2f}; "
        + (f"{100 * others:.0f} % is nearer to another speaker." if others else "nobody else speaks."),
        f"Speech about {measured['snr_db']:.0f} dB over what is behind it.",
    ]
    if candidate.end - candidate.start < request.seconds[0]:
        found.append(f"Shorter than {request.seconds[0]:g} s: nothing longer was found.")
    if scores["clipped"] > 1e-3:
        found.append(f"{100 * scores['clipped']:.1f} % of the samples are clipped.")
    if scores["bandwidth_hz"] < _BRIGHT:
        found.append(
            f"Nothing above {scores['bandwidth_hz'] / 1000:.1f} kHz: the voice will lack brightness."
        )
    if scores["limited_db"] >= 0.1:
        found.append(f"The limiter took up to {scores['limited_db']:.1f} dB from its peaks.")
    if abs(scores["lufs"] - LUFS) > 0.5:
        found.append(f"At {scores['lufs']:.1f} LUFS, as its peaks leave no room for {LUFS:g}.")
    return found


def _report(findings: Findings, clips: list[FoundClip]) -> dict[str, Any]:
    sources = [os.fspath(one) for one in findings.request.media]
    speakers = [
        {"speaker": one.number + 1, "seconds": round(one.seconds, 1), "pitch_hz": _number(one.pitch)}
        for one in findings.speakers
    ]
    return {
        "source": sources[0] if len(sources) == 1 else sources,
        "candidates": [
            {
                "rank": clip.rank,
                "source": clip.source,
                "start_s": round(clip.start, 2),
                "end_s": round(clip.end, 2),
                "file": clip.file,
                "pitch_hz": _number(clip.pitch),
                "scores": {name: _number(value) for name, value in clip.scores.items()},
                "reasons": clip.reasons,
            }
            for clip in clips
        ],
        "speaker": findings.chosen + 1,
        "speakers": speakers,
        "notes": findings.notes,
        "consent": CONSENT,
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
