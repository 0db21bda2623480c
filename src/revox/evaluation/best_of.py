"""The best of several clones of one recording, by the speech in their voices; for use, never for a table.

Choosing by a score and then reporting that score would flatter every method, so no evaluation does this. The
scores are of a verifier of the user's choice (ECAPA-TDNN or one of their own), never of Resemblyzer, which
measures all results of this project.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from revox.api import Revox
from revox.cloning.clone import ClonedVoice
from revox.evaluation.evaluate import DEFAULT_TEXTS
from revox.metrics.intelligibility import Recognizer, word_error_rate
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.training.speaker import SpeakerLoss

CANDIDATES = "candidate voices spoken and scored"
"""The phase, as `Progress.what` names it."""


@dataclass(frozen=True)
class CandidateScore:
    """A candidate, made with `seed`: the verifier's cosine of its speech with the recording, and the share of
    wrong words (None without a recognizer)."""

    seed: int
    similarity: float
    word_errors: float | None

    @property
    def total(self) -> float:
        """What candidates are compared by: similarity less word errors; more is better."""
        return self.similarity - (self.word_errors or 0.0)


def best_of(
    tts: Revox,
    clone: Callable[[int], ClonedVoice],
    seeds: Sequence[int],
    verifier: SpeakerLoss,
    recognizer: Recognizer | None = None,
    progress: ProgressCallback = ignore_progress,
) -> tuple[ClonedVoice, list[CandidateScore]]:
    """The best of the voices that `clone` makes with `seeds`, and the scores of all.

    Each says the same sentences. The voice's record lists the scores. A search that is stopped (Ctrl-C) is
    the last candidate; one that is stopped or fails while it speaks does not count, or, where it is the
    first, is taken without a score.
    """
    found: list[tuple[CandidateScore, ClonedVoice]] = []
    voice: ClonedVoice | None = None
    for i, seed in enumerate(seeds):
        try:
            voice = clone(seed)
            score = _score(tts, voice, seed, verifier, recognizer)
        except (KeyboardInterrupt, RuntimeError) as error:  # RuntimeError: torch's, such as too little memory
            if voice is None:
                raise
            if isinstance(error, RuntimeError):
                why = (str(error) or type(error).__name__).splitlines()[0]
                warnings.warn(f"the voice of seed {seed} is left out: {why}", stacklevel=2)
            break
        found.append((score, voice))
        facts = {"similarity": score.similarity}
        if score.word_errors is not None:
            facts["word_errors"] = score.word_errors
        progress(Progress(CANDIDATES, i + 1, len(seeds), facts))
        if voice.coding.stopped:
            break
    if not found:
        assert voice is not None
        return voice, []
    scores = [score for score, _ in found]
    best = max(found, key=lambda one: one[0].total)[1]
    best.provenance["best_of"] = [dataclasses.asdict(score) for score in scores]
    return best, scores


def _score(
    tts: Revox, voice: ClonedVoice, seed: int, verifier: SpeakerLoss, recognizer: Recognizer | None
) -> CandidateScore:
    spoken = [tts.speak(text, voice, max_seconds=3 + len(text) / 5) for text in DEFAULT_TEXTS]
    waveform = torch.cat([torch.from_numpy(one.samples) for one in spoken])
    similarity = -1.0
    if len(waveform):
        recording = torch.from_numpy(voice.reference.samples)
        spoken_there, recording_there = (one.float()[None].to(tts.device) for one in (waveform, recording))
        similarity = float(verifier.similarity(spoken_there, recording_there))
    errors = None
    if recognizer is not None:
        errors = word_error_rate(DEFAULT_TEXTS, [recognizer.transcribe(one) for one in spoken])
    return CandidateScore(seed, round(similarity, 4), None if errors is None else round(errors, 4))
