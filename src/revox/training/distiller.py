"""Whisper's states of a run's recordings, computed once and kept; and the loss that they teach.

Training sees another crop of a clip each time, so states of crops would never be met again. What is kept are
the states of the whole clip: its transcript is that of the whole clip, so that Whisper need not write one,
and each token is predicted from all words before it. A crop is taught the tokens that Whisper places in it
(`revox.training.distill.targets_of_crop`); a clip that is used whole is taught what it was without a cache.
Of recordings longer than Whisper's 30 s, windows of 30 s are kept that overlap by a crop.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from revox.speech.files import load_stamped, save_stamped, stamp_of
from revox.training.data import ClipBatch
from revox.training.data.loading import decode_cut
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_source
from revox.training.distill import (
    LONGEST,
    AsrDistillation,
    DistillTargets,
    TokenStates,
    WhisperTeacher,
    targets_of_crop,
)

if TYPE_CHECKING:
    from lhotse.cut import MonoCut


class StatesCache:
    """States in the folder `folder`, a file each, of at most `limit` bytes together.

    What comes when it is full is not kept: a clip that is there will be drawn as often as one that is not.
    `share` processes fill it at once.
    """

    def __init__(self, folder: Path, limit: float, share: int = 1) -> None:
        self.folder, self.limit, self.share = folder, limit, share
        self.used = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    def read(self, stamp: str) -> TokenStates | None:
        """The states that are kept for `stamp`."""
        content = load_stamped(self._path(stamp), stamp)
        if content is None:
            return None
        tensors = load(content)
        return TokenStates(tensors["hidden"].float(), tensors["attention"].float())

    def write(self, stamp: str, states: TokenStates) -> None:
        """Keep `states`, in float16, if there is room."""
        tensors = {"hidden": states.hidden.half().cpu(), "attention": states.attention.half().cpu()}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self.used += len(content) * self.share
        if self.used <= self.limit:
            save_stamped(self._path(stamp), stamp, content)

    def _path(self, stamp: str) -> Path:
        return self.folder / stamp[:2] / f"{stamp[:24]}.safetensors"


class Distiller(nn.Module):
    """Whisper's targets for a step's recordings, and the loss with its learned projection."""

    def __init__(
        self, teacher: WhisperTeacher, distillation: AsrDistillation, rate: int, cache: StatesCache
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self._teacher, self._rate = [teacher], rate  # in a list: it is not part of what is trained
        self._cache = cache

    def forward(self, semantic: Tensor, recordings: ClipBatch) -> Tensor:
        """The loss of latents `[clips, frames, dim]`."""
        found = [self._targets(recordings, i) for i in range(len(semantic))]
        targets = DistillTargets([one for one, _ in found], [other for _, other in found])
        loss: Tensor = self.distillation(semantic, targets)
        return loss

    def _targets(self, recordings: ClipBatch, i: int) -> tuple[Tensor, Tensor]:
        samples = int(recordings.lengths[i])
        wave = recordings.waveforms[i, :samples]
        language = recordings.languages[i] if recordings.languages else None
        cut = recordings.cuts[i] if recordings.cuts else None
        if cut is None or not cut.recording.duration:  # it cannot be found again
            text = recordings.transcripts[i] if recordings.transcripts else None
            return targets_of_crop(self._computed(wave, text, language), 0, samples, self._rate)
        known, at = float(cut.recording.duration), recordings.starts[i]
        longest = recordings.waveforms.shape[1] / self._rate
        start = min(at // (LONGEST - longest) * (LONGEST - longest), max(0.0, known - LONGEST))
        text = cut.supervisions[0].text if known <= LONGEST else None
        about = cut.id, (cut.custom or {}).get("stamp"), known, text, language
        stamp = stamp_of(self._teacher[0].name, self._rate, *about, round(start, 3))
        states = self._cache.read(stamp)
        if states is None:
            whole = wave if recordings.whole[i] else self._window(cut, start, known)
            states = self._computed(whole, text, language)
            self._cache.write(stamp, states)
        return targets_of_crop(states, round((at - start) * self._rate), samples, self._rate)

    def _window(self, cut: MonoCut, start: float, known: float) -> Tensor:
        """Whisper's 30 s of the recording of `cut` from `start` (seconds) on, leveled as its crops are."""
        place = start / (known - LONGEST) if start else 0.0
        source = audio_source(cut_source(cut))
        return torch.from_numpy(decode_cut(source, place, known, float(LONGEST), self._rate).samples)

    def _computed(self, wave: Tensor, text: str | None, language: str | None) -> TokenStates:
        """Of one clip alone, so that its states do not depend on which others are kept; in float16's values,
        so that the first time is as the next."""
        lengths = torch.tensor([len(wave)])
        [states] = self._teacher[0].states(wave[None], self._rate, lengths, [text], [language])
        return TokenStates(states.hidden.half().float(), states.attention.half().float())
