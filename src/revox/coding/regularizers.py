"""What a search pays for besides the distance: prior, initial posterior and language-model guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from revox.coding.prior import CodePrior
from revox.model.codec import Codec

LIKELIHOOD_FLOOR = -6.0  # nats a code costs at most: an encoder may be overconfident

Guidance = Callable[[Tensor, Tensor], Tensor]
"""The language model's loss of soft codes (probabilities `[frames, size]`, values `[36, frames]`): a
differentiable scalar."""


class Posterior(NamedTuple):
    """An encoder's answer, at which a search starts: log probabilities of semantic codes `[frames, size]`,
    acoustic values in [-1, 1] `[36, frames]`."""

    log_probabilities: Tensor
    values: Tensor

    def codes(self, levels: int) -> Tensor:
        """The likeliest codes `[37, frames]`, acoustic ones of so many `levels`."""
        half = (levels - 1) / 2
        acoustic = (self.values * half + half).round().clamp(0, levels - 1).long()
        return torch.cat((self.log_probabilities.argmax(dim=1)[None], acoustic))

    def cost(self, probabilities: Tensor, values: Tensor, levels: int) -> Tensor:
        """How far soft codes are from the posterior, a scalar: nats a semantic code (`probabilities`
        `[frames, size]`), spread over a frame's codes, and squared deviations of two of the `levels` an
        acoustic value (`values` `[36, frames]`)."""
        surprise = -(probabilities * self.log_probabilities.clamp_min(LIKELIHOOD_FLOOR)).sum(dim=1).mean()
        return surprise / values.shape[0] + self._strayed(values, levels)

    def cost_of_codes(self, semantic: Tensor, values: Tensor, levels: int) -> Tensor:
        """The same `[batch]` of hard codes: `semantic` `[batch, frames]`, `values` `[batch, 36, frames]`."""
        likelihood = self.log_probabilities.clamp_min(LIKELIHOOD_FLOOR)
        surprise = -likelihood.gather(1, semantic.T).mean(dim=0)
        return surprise / values.shape[1] + self._strayed(values, levels)

    def _strayed(self, values: Tensor, levels: int) -> Tensor:
        step = 2 / (levels - 1)
        return 0.5 * ((values - self.values) / (2 * step)).square().mean(dim=(-2, -1))


@dataclass(frozen=True)
class Regularizers:
    """The terms of a search's objective besides the distance; None leaves a term out."""

    prior: CodePrior | None = None
    posterior: Posterior | None = None
    guidance: Guidance | None = None

    def to(self, device: torch.device) -> Regularizers:
        """The same on another device (the language model stays where it is)."""
        prior, posterior = self.prior, self.posterior
        return Regularizers(
            None if prior is None else prior.to(device),
            None if posterior is None else Posterior(*(part.to(device) for part in posterior)),
            self.guidance,
        )

    def of_frames(self, first: int, last: int, total: int) -> Regularizers:
        """The same for the frames `first` to `last` of `total`: guidance needs the whole clip."""
        posterior = self.posterior
        if posterior is not None:
            posterior = Posterior(posterior.log_probabilities[first:last], posterior.values[:, first:last])
        return Regularizers(self.prior, posterior, self.guidance if last - first == total else None)


def guidance_of_codes(guidance: Guidance, codec: Codec, codes: Tensor) -> float:
    """The guidance loss of hard `codes` `[37, frames]`, as soft codes that are certain."""
    certain = functional.one_hot(codes[0], codec.config.semantic_codebook_size).float()
    return float(guidance(certain, codec.quantizer.acoustic_codebook.decode(codes[None, 1:])[0]))
