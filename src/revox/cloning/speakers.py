"""Several people in one recording: who speaks most, and where the others do.

Of 60 clips of LibriSpeech, one speaker each, none has several by these limits; of 20 pairs, a whole clip and
6 s of another speaker's, 19 do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.metrics.errors import MetricError
from revox.metrics.speaker import SpeakerVerifier
from revox.metrics.turns import Turn, find_turns
from revox.speech import Audio
from revox.speech.activity import HOP, speech_activity

_RATE = 16000
_LEAST_SECONDS = 2.0  # of speech in all, without which nobody is another speaker
_VAGUE = 50  # frames
_DIFFERENT = 0.72  # cosine with the one who speaks most, under which somebody is another


@dataclass(frozen=True, eq=False)
class SeveralSpeakers:
    """`count` people, of whom one speaks for `most` of `seconds` of speech.

    `others` is where the others speak: bool, a frame each 10 ms.
    """

    count: int
    most: float
    seconds: float
    others: np.ndarray


def several_speakers(audio: Audio) -> SeveralSpeakers | None:
    """Who speaks in `audio` beside the one who speaks most; None for nobody.

    None too where the speaker-verification model is not installed (the extra `eval`).
    """
    try:
        verifier = SpeakerVerifier()
    except MetricError:
        return None
    samples = audio.at(_RATE).samples
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak:
        return None
    samples = samples * np.float32(0.5 / peak)
    frames = verifier.frames(samples)
    turns, voices = find_turns(
        verifier, [(frames, speech_activity(samples, _RATE).active[: len(frames.power)])]
    )
    if len(voices) < 2:
        return None
    by_speaker: list[list[Turn]] = [[turn for turn in turns if turn.speaker == k] for k in range(len(voices))]
    seconds = [sum(turn.seconds for turn in own) for own in by_speaker]
    apart = voices @ voices[0] < _DIFFERENT
    found = [k for k in range(1, len(voices)) if apart[k] and seconds[k] >= _LEAST_SECONDS]
    if not found:
        return None
    count = 1 + len(found)
    found = [k for k in range(1, len(voices)) if apart[k]]  # then shorter ones count as well
    others = np.zeros(len(frames.power), dtype=bool)
    edges = {turn.first for turn in turns} & {turn.last for turn in turns}
    for k in found:
        for turn in by_speaker[k]:
            # Without a pause the place of the change is known to half a second only.
            lead, tail = (_VAGUE if at in edges else 0 for at in (turn.first, turn.last))
            others[max(0, turn.first - lead) : turn.last + tail] = True
    whole = round(sum(seconds), 2)
    return SeveralSpeakers(count, whole - others.sum() * HOP, whole, others)
