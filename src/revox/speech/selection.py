"""Choose the stretch of a recording that a voice is best cloned from, and say why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from revox.speech.activity import HOP, SpeechActivity, runs, speech_activity
from revox.speech.audio import Audio
from revox.speech.errors import AudioError

MIN_SECONDS, MAX_SECONDS = 3.0, 30.0
_MARGIN = 0.1  # seconds kept around the speech, where the recording has them
# The release's presets are 67 to 218 frames long, 5 to 17 s: past 10 s more speech is worth little.
_USEFUL_SECONDS = 5.0
_GOOD_SNR, _POOR_SNR = 30.0, 15.0  # dB
_QUIET, _RAISED = 0.1, 0.5  # peaks: a recording below the first is brought to the second
_CLIPPED = 0.985  # of the largest magnitude: a run of such samples has hit the ceiling


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen stretch: `samples` `[n]` at `rate` Hz, from `start` to `end` seconds of the recording.

    `gain_db`: by how much a quiet recording was raised. `speech_seconds`, `snr` (dB), `clipped` (share of
    samples at the ceiling), `pitch` (median, Hz, nan when unvoiced) and `bandwidth` (Hz) describe it;
    `reasons` is why it was chosen, `warnings` what may spoil the voice: each entry is a sentence.
    """

    start: float
    end: float
    samples: np.ndarray
    rate: int
    speech_seconds: float
    snr: float
    clipped: float
    pitch: float
    bandwidth: float
    gain_db: float = 0.0
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate

    @property
    def audio(self) -> Audio:
        """The stretch as Audio."""
        return Audio(self.samples, self.rate)


def select_reference(
    audio: Audio,
    min_seconds: float = MIN_SECONDS,
    max_seconds: float = MAX_SECONDS,
    rate: int | None = None,
    whole: bool = False,
    others: np.ndarray | None = None,
) -> Selection:
    """The best contiguous stretch of `min_seconds` to `max_seconds`, cut at pauses, silence trimmed off.

    Each stretch between two pauses is weighed: more speech is better with falling returns, then the share of
    speech, the signal-to-noise ratio, and no clipping. The samples are mono at `rate` Hz (the audio's own
    when None), their level untouched where the recording's peak is over -20 dBFS and raised to -6 dBFS where
    not: speech is told from noise by the recording's own levels. `whole` takes everything from the first
    speech to the last, for whom every word matters. `others` (bool, a frame each 10 ms) is where other people
    speak: no stretch goes over it. Raises AudioError when there is no speech, less than `min_seconds` of it,
    or more than `max_seconds` to be taken whole.
    """
    peak = float(np.abs(audio.samples).max(initial=0.0))
    gain = _RAISED / peak if 0 < peak < _QUIET else 1.0
    if gain != 1:
        audio = replace(audio, samples=audio.samples * np.float32(gain))
    activity = speech_activity(audio.samples, audio.rate)
    if others is not None:
        activity.active[: len(others)] &= ~others[: len(activity.active)]
    if not activity.active.any():
        raise AudioError(
            "No speech was found in the recording; give a clip in which one person speaks clearly."
        )
    if activity.seconds < min_seconds:
        raise AudioError(
            f"Only {activity.seconds:.1f} s of speech were found in {audio.seconds:.1f} s; "
            f"give a clip with at least {min_seconds:g} s of one person speaking."
        )
    clipping = clipped_frames(audio.samples, audio.rate, len(activity.active))
    if whole:
        speaking = np.flatnonzero(activity.active)
        first, last = int(speaking[0]), int(speaking[-1]) + 1
        if (last - first) * HOP > max_seconds:
            raise AudioError(
                f"The speech lasts {(last - first) * HOP:.0f} s, too long to be used whole; "
                f"cut the recording to {max_seconds:g} s."
            )
    else:
        first, last = _best_span(activity, clipping, min_seconds, max_seconds, others)

    margin = round(_MARGIN / HOP)
    room = max(0, int(max_seconds / HOP) - (last - first)) // 2  # the margins may not pass max_seconds
    begin = int(max(0, first - min(margin, room)) * HOP * audio.rate)
    end = min(len(audio.samples), int((last + min(margin, room)) * HOP * audio.rate))
    samples = audio.samples[begin:end]
    inside = activity.active[first:last]
    span_pitch = activity.pitch.f0[first:last]
    voiced = span_pitch[np.isfinite(span_pitch)]
    selection = Selection(
        start=begin / audio.rate,
        end=end / audio.rate,
        samples=Audio(samples, audio.rate).at(rate or audio.rate).samples,
        rate=rate or audio.rate,
        speech_seconds=float(inside.sum() * HOP),
        snr=_snr(activity, first, last),
        clipped=float(clipping[first:last].mean()),
        pitch=float(np.median(voiced)) if voiced.size else math.nan,
        bandwidth=bandwidth(samples, audio.rate),
        gain_db=20 * math.log10(gain),
    )
    selection.reasons.append(_reason(selection, audio))
    selection.warnings.extend(_warnings(selection, audio, min_seconds))
    return selection


def whole_frames(samples: np.ndarray, samples_per_frame: int, rate: int = 24000) -> np.ndarray:
    """Cut mono `[n]` at `rate` Hz to a whole number of codec frames; less than one is padded with zeros.

    A length is also avoided when mistral-common, which counts `ceil(n / rate * frames_per_second)` in
    floating point, would count one frame more than the encoder makes: at 1920 samples a frame and 24 kHz
    this happens at 34 whole numbers of frames under a minute (7, 14, 28, 55 ...), where up to four more
    frames are cut. Raises AudioError when there are no samples.
    """
    if len(samples) == 0:
        raise AudioError("There are no samples to cut into frames; the audio is empty.")
    count = max(1, len(samples) // samples_per_frame)
    while math.ceil(count * samples_per_frame / rate * (rate / samples_per_frame)) != count:
        count += 1 if count == 1 else -1
    length = count * samples_per_frame
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def bandwidth(samples: np.ndarray, rate: int) -> float:
    """The frequency in Hz above which mono `[n]` holds next to nothing.

    That is the highest one where the mean power spectrum is within 70 dB of its peak: 8 kHz for 16 kHz audio
    that was resampled up, about 3.5 kHz for telephone speech, half the rate for a full-band recording.
    """
    window = 1024
    if len(samples) < window:
        return rate / 2
    views = np.lib.stride_tricks.sliding_window_view(samples, window)[:: window // 2]
    # Blackman-Harris: side lobes at -92 dB, under the 70 looked for (numpy's tapers leak more).
    angles = 2 * np.pi * np.arange(window) / window
    weights = np.array([0.35875, -0.48829, 0.14128, -0.01168])
    taper = (weights @ np.cos(np.outer(np.arange(4), angles))).astype(np.float32)
    power = np.zeros(window // 2 + 1)
    for first in range(0, len(views), 4096):
        power += np.square(np.abs(np.fft.rfft(views[first : first + 4096] * taper))).sum(0)
    if not power.any():
        return rate / 2
    top = int(np.flatnonzero(power > power.max() * 1e-7)[-1])
    if top >= window // 2 - 4:
        return rate / 2
    return max(0, top - 3) * rate / window  # the taper smears an edge over 4 bins


def clipped_frames(samples: np.ndarray, rate: int, frames: int) -> np.ndarray:
    """Share of each 10 ms frame's samples in runs of 3 or more at the recording's ceiling, `[frames]`."""
    out = np.zeros(frames)
    magnitude = np.abs(samples)
    ceiling = float(magnitude.max(initial=0.0))
    if ceiling < 0.1:  # too quiet to have been cut off
        return out
    for sign in (1, -1):  # a wave that was cut off stays on one side
        for a, b in runs(sign * samples >= _CLIPPED * ceiling):
            # A natural peak may graze its own maximum; a flat top is flat.
            if b - a >= 3 and np.ptp(samples[a:b]) <= 2e-3 * ceiling:
                out[min(frames - 1, int(a / rate / HOP))] += (b - a) / (rate * HOP)
    return np.minimum(out, 1.0)


def _boundaries(activity: SpeechActivity, limit: int) -> tuple[list[int], list[int]]:
    """Frames where a stretch may start and where it may end: the edges of speech.

    A segment longer than `limit` frames has no pause to cut at, so its quietest frames, one in each half of
    the limit, serve.
    """
    starts, ends = [], []
    for a, b in runs(activity.active):
        starts.append(a)
        step = max(1, limit // 2)
        for first in range(a + step // 2, b - step // 2, step) if b - a > limit else ():
            quiet = first + int(activity.level[first : min(b, first + step // 2)].argmin())
            starts.append(quiet)
            ends.append(quiet)
        ends.append(b)
    return sorted(starts), sorted(ends)


def _best_span(
    activity: SpeechActivity,
    clipping: np.ndarray,
    min_seconds: float,
    max_seconds: float,
    others: np.ndarray | None,
) -> tuple[int, int]:
    limit = int(max_seconds / HOP)
    starts, ends = _boundaries(activity, limit)
    speech = np.concatenate([[0], np.cumsum(activity.active)])
    clipped = np.concatenate([[0.0], np.cumsum(clipping)])
    foreign = np.zeros(len(speech), dtype=int)
    if others is not None:
        count = min(len(others), len(speech) - 1)
        foreign[1 : count + 1] = np.cumsum(others[:count])
        foreign[count + 1 :] = foreign[count]
    end_frames = np.asarray(ends)
    least = min(min_seconds, activity.seconds) / HOP
    best, best_score = None, -math.inf
    for start in starts:
        candidates = end_frames[(end_frames > start) & (end_frames - start <= limit)]
        candidates = candidates[foreign[candidates] == foreign[start]]
        if not len(candidates):
            continue
        length = candidates - start
        spoken = speech[candidates] - speech[start]
        share = spoken / length
        snr = np.array([_snr(activity, start, int(end)) for end in candidates])
        score = stretch_score(spoken * HOP, share, snr, (clipped[candidates] - clipped[start]) / length)
        # Speech enough, but scattered: only if nothing else is there.
        score = score - np.where(spoken < least, 2.0, 0.0)
        index = int(score.argmax())
        if score[index] > best_score:
            best, best_score = (start, int(candidates[index])), float(score[index])
    assert best is not None  # each segment is itself a candidate
    return best


def stretch_score(spoken: np.ndarray, share: np.ndarray, snr: np.ndarray, clipped: np.ndarray) -> np.ndarray:
    """How good stretches are to clone from, `[n]`, at most 1.

    Of seconds `spoken`, the `share` of speech in a stretch, the signal-to-noise ratio (dB) and the share of
    samples `clipped`, `[n]` each: more speech is better with falling returns, the others cost.
    """
    return (
        1.0
        - np.exp(-spoken / _USEFUL_SECONDS)
        - 0.5 * (1 - share)
        - 0.5 * np.clip((_GOOD_SNR - snr) / _GOOD_SNR, 0, 1)
        - np.minimum(1.0, 50 * clipped)
    )


def speech_over_noise(level: np.ndarray, active: np.ndarray, floor: float = -90.0) -> float:
    """Level of the active frames of a stretch over its quietest 5 % of frames, in dB.

    `level` in dBFS and `active` (bool) are `[frames]`; `floor` is the least level of noise assumed. Only
    frames inside count: silence that was pasted around noisy speech does not make it clean.
    """
    edge = min(10, len(level) // 4)  # the widened edges of the speech may be such silence
    noise = max(float(np.percentile(level[edge : len(level) - edge], 5)), floor)
    power = 10 ** (level[active] / 10)
    return float(10 * np.log10(power.mean()) - noise) if power.size else 0.0


def _snr(activity: SpeechActivity, first: int, last: int) -> float:
    return speech_over_noise(activity.level[first:last], activity.active[first:last], activity.noise)


def _reason(selection: Selection, audio: Audio) -> str:
    share = 100 * min(1.0, selection.speech_seconds / max(selection.seconds, 1e-9))
    quality = f"{share:.0f} % speech, about {selection.snr:.0f} dB over the noise"
    if selection.clipped:
        quality += ", some of it clipped"
    if selection.seconds > audio.seconds - 0.3:
        return f"Uses the whole recording of {audio.seconds:.1f} s: {quality}."
    return (
        f"Uses {selection.start:.1f} to {selection.end:.1f} s ({selection.seconds:.1f} s of "
        f"{audio.seconds:.1f} s), the stretch with the most and cleanest speech: {quality}."
    )


def _warnings(selection: Selection, audio: Audio, min_seconds: float) -> list[str]:
    found = []
    if audio.truncated:
        found.append(f"Only the first {audio.seconds / 60:.0f} minutes of the recording were read.")
    if selection.speech_seconds < min_seconds:
        found.append(
            f"Only {selection.speech_seconds:.1f} s of speech: under {min_seconds:g} s the voice is rarely "
            "faithful."
        )
    if selection.snr < _POOR_SNR:
        found.append(
            f"The speech is only about {selection.snr:.0f} dB over the noise; the voice will carry the noise."
        )
    if selection.clipped > 1e-3:
        found.append(
            f"{100 * selection.clipped:.1f} % of the samples are clipped; record at a lower level for a "
            "cleaner voice."
        )
    if selection.bandwidth < 9000:
        found.append(
            f"There is nothing above {selection.bandwidth / 1000:.1f} kHz in the recording; the voice will "
            "lack brightness that a recording at 24 kHz or more would give it."
        )
    if audio.one_channel:
        found.append("The channels cancel each other (one is inverted); one of them was used.")
    level = 10 * math.log10(float(np.mean(np.square(selection.samples))) + 1e-12) - selection.gain_db
    if level < -45:
        found.append(f"The recording is very quiet ({level:.0f} dBFS); its noise will be raised with it.")
    return found
