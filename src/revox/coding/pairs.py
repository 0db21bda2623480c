"""Pairs of codes and audio: the decoder's output for codes near those of its presets.

The right codes of what the decoder makes are known, so such pairs train an encoder. The codes are strung
together from stretches of the presets' own, interpolated between voices and jittered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.model.codec import Codec


@dataclass(frozen=True)
class PairSettings:
    """How far codes are taken from the presets' own.

    Stretches of `shortest` to `longest` frames are strung together. `mixed` is the share of items whose
    acoustic values lie between two voices'. In units of each codebook's deviation over the presets, values
    are moved by `offset` for a whole item and `jitter` for a frame. `replace` is the share of semantic codes
    drawn anew, with the presets' frequencies.
    """

    shortest: int = 4
    longest: int = 16
    mixed: float = 0.5
    offset: float = 0.6
    jitter: float = 0.25
    replace: float = 0.1


class PresetPairs:
    """Endless pairs from `preset_codes`, each `[37, frames]`. Raises ValueError without any."""

    def __init__(
        self, codec: Codec, preset_codes: Sequence[Tensor], settings: PairSettings | None = None
    ) -> None:
        self.codec, self.settings = codec, settings or PairSettings()
        self.preset_codes = [codes.long().cpu() for codes in preset_codes if codes.shape[1]]
        if not self.preset_codes:
            raise ValueError("pairs need the codes of at least one preset")
        frames = torch.cat(self.preset_codes, dim=1)
        self.levels = codec.config.acoustic_codebook_size
        self.deviation = frames[1:].float().std(dim=1, correction=0).clamp_min(0.5)
        self.counts = torch.bincount(frames[0], minlength=codec.config.semantic_codebook_size).float() + 0.05

    def draw_codes(self, batch: int, frames: int, rng: torch.Generator) -> Tensor:
        """Codes `[batch, 37, frames]`, from 0."""
        settings, items = self.settings, []
        for _ in range(batch):
            one = self._strung(frames, rng)
            levels = one[1:].float()
            if float(torch.rand((), generator=rng)) < settings.mixed:
                share = float(torch.rand((), generator=rng))
                levels = levels + share * (self._strung(frames, rng)[1:].float() - levels)
            offset = torch.randn((len(levels), 1), generator=rng) * settings.offset
            jitter = torch.randn(levels.shape, generator=rng) * settings.jitter
            levels = levels + (offset + jitter) * self.deviation[:, None]
            replaced = torch.rand(frames, generator=rng) < settings.replace
            drawn = torch.multinomial(self.counts, frames, replacement=True, generator=rng)
            semantic = torch.where(replaced, drawn, one[0])
            acoustic = levels.round().clamp(0, self.levels - 1).long()
            items.append(torch.cat((semantic[None], acoustic)))
        return torch.stack(items)

    def _strung(self, frames: int, rng: torch.Generator) -> Tensor:
        parts: list[Tensor] = []
        left = frames
        while left > 0:
            voice = self.preset_codes[int(torch.randint(len(self.preset_codes), (), generator=rng))]
            low, high = self.settings.shortest, self.settings.longest
            length = min(int(torch.randint(low, high + 1, (), generator=rng)), left, voice.shape[1])
            start = int(torch.randint(voice.shape[1] - length + 1, (), generator=rng))
            parts.append(voice[:, start : start + length])
            left -= length
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def draw(self, batch: int, frames: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Codes `[batch, 37, frames]` and the audio that the decoder makes of them, `[batch, samples]`."""
        codes = self.draw_codes(batch, frames, rng).to(self.codec.output_proj.conv.weight.device)
        return codes, self.codec.decode(codes).float()
