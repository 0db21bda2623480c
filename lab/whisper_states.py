"""Whisper's states of the lab's speech, computed once and kept: what the semantic codes are distilled from.

Utterances are laid one after the other in windows of at most 29 s, since Whisper's encoder takes the time of
30 s for any clip. The targets of a window (`revox.training.distill`) are cut into those of its utterances.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab.arrays import Arrays, npz_bytes, read_npz
from lab.data import RATE, SpeechSet
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, save_stamped, stamp_of
from revox.training.distill import DistillTargets, WhisperTeacher

WINDOW = 29.0  # seconds
GAP_FRAMES = 5  # of silence between utterances
WINDOWS_A_PART = 10
POSITIONS_A_FRAME = 4  # of Whisper's encoder, 50 a second


@dataclass(frozen=True)
class WhisperStates:
    """Targets of the utterances of a set: of those that have words, by their index in the set.

    `hidden[i]` float16 `[tokens, width]`, `alignment[i]` float16 `[tokens, frames]` with rows that sum to 1;
    `encoded[i]` float16 `[frames, width]`, the encoder's states, the mean of each frame.
    """

    hidden: dict[int, np.ndarray]
    alignment: dict[int, np.ndarray]
    encoded: dict[int, np.ndarray]

    @property
    def width(self) -> int:
        """Channels of the states."""
        return int(next(iter(self.encoded.values())).shape[1])

    def batch(self, chosen: list[int]) -> DistillTargets:
        """Targets of the utterances `chosen`."""
        return DistillTargets(
            [torch.from_numpy(self.hidden[i].astype(np.float32)) for i in chosen],
            [torch.from_numpy(self.alignment[i].astype(np.float32)) for i in chosen],
        )


def windows(speech: SpeechSet, per_frame: int) -> Iterator[list[tuple[int, int]]]:
    """Groups of (utterance, its first frame) that share a window; an utterance without text has none."""
    group: list[tuple[int, int]] = []
    at = 0
    for i, one in enumerate(speech.utterances):
        frames = -(-one.samples // per_frame)
        if one.text is None or frames * per_frame > WINDOW * RATE:
            continue
        if (at + frames) * per_frame > WINDOW * RATE:
            yield group
            group, at = [], 0
        group.append((i, at))
        at += frames + GAP_FRAMES
    if group:
        yield group


def _of_window(
    teacher: WhisperTeacher, speech: SpeechSet, group: list[tuple[int, int]], per_frame: int
) -> Iterator[tuple[int, Arrays]]:
    last, at = group[-1]
    wave = np.zeros(at * per_frame + speech.utterances[last].samples, np.float32)
    for i, first in group:
        samples = speech.waveform(i)
        wave[first * per_frame : first * per_frame + len(samples)] = samples
    encoded: list[torch.Tensor] = []
    hook = teacher.encoder.register_forward_hook(lambda _module, _given, out: encoded.append(out[0]))
    texts = [str(speech.utterances[i].text).strip() for i, _ in group]
    # As the teacher does for a transcript in capitals only, so that the first words' tokens are those of all.
    texts = [text.lower() if text.isupper() else text for text in texts]
    found = teacher.targets(
        torch.from_numpy(wave)[None], RATE, torch.tensor([len(wave)]), [" ".join(texts)], ["en"]
    )
    hook.remove()
    means = encoded[0][0].unfold(0, POSITIONS_A_FRAME, POSITIONS_A_FRAME).mean(-1).half().numpy()
    hidden, alignment = found.hidden[0].half().numpy(), found.alignment[0].numpy()
    end = 0
    for n, (i, first) in enumerate(group, 1):
        tokens = slice(end, len(teacher.text_tokens(" ".join(texts[:n]))))
        end = tokens.stop
        frames = -(-speech.utterances[i].samples // per_frame)
        own = alignment[tokens, first : first + frames]
        share = own.sum(axis=1, keepdims=True)
        # A token whose attention lies mostly outside of its utterance is not timed.
        timed = (share > 0.5)[:, 0]
        yield (
            i,
            {
                "hidden": hidden[tokens][timed],
                "alignment": (own / np.maximum(share, 1e-6))[timed].astype(np.float16),
                "encoded": means[first : first + frames],
            },
        )


def whisper_states(
    teacher_folder: Path,
    speech: SpeechSet,
    per_frame: int,
    cache: Path,
    most: int,
    progress: ProgressCallback = ignore_progress,
) -> WhisperStates:
    """The states of the first `most` windows of `speech` by the Whisper in `teacher_folder`, kept in `cache`.

    An interrupted run goes on after the last part it finished.
    """
    cache.mkdir(parents=True, exist_ok=True)
    groups = list(itertools.islice(windows(speech, per_frame), most))
    teacher: WhisperTeacher | None = None
    states = WhisperStates({}, {}, {})
    for start in range(0, len(groups), WINDOWS_A_PART):
        part = groups[start : start + WINDOWS_A_PART]
        chosen = [i for group in part for i, _ in group]
        utterances = [(i, speech.utterances[i].text, speech.utterances[i].samples) for i in chosen]
        path = cache / f"{start:05d}.cache"
        stamp = stamp_of(utterances, teacher_folder.name)
        cached = load_stamped(path, stamp)
        if cached is None:
            teacher = teacher or WhisperTeacher.load(str(teacher_folder))
            arrays: Arrays = {}
            for group in part:
                for i, found in _of_window(teacher, speech, group, per_frame):
                    arrays |= {f"{name}-{i}": array for name, array in found.items()}
            cached = npz_bytes(arrays)
            save_stamped(path, stamp, cached)
        for name, array in read_npz(cached).items():
            kind, _, index = name.partition("-")
            getattr(states, kind)[int(index)] = array
        done = min(len(groups), start + WINDOWS_A_PART)
        progress(Progress(f"Whisper's states of {speech.name}", done, len(groups)))
    return states
