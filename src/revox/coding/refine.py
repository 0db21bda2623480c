"""Refinement: a few steps of inversion from the encoder's codes; and which of several codes are best.

**The score.** Codes are compared by one number, less is better: how far their sound is from the clip, plus
how unlikely the model finds them, each part weighted as in the search (`InversionConfig`):

    score = reconstruction + prior_weight * presets + posterior_weight * encoder
            + guidance_weight * language_model

`reconstruction` is the spectral distance that inversion descends (`SpectralTarget`). The rest estimates how
likely the model finds the codes: `presets`, nats a code under the statistics of the presets' codes
(`CodePrior`); `encoder`, how far the codes are from the encoder's posterior (nats a semantic code, squared
deviations of two levels an acoustic one); `language_model`, the loss of the codes as speech of the
transcript, where there is one. Reconstruction alone would always choose the search: the decoder makes good
sound of codes that the language model does not accept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.coding.encode import Encoded
from revox.coding.invert import InversionConfig
from revox.coding.objective import SpectralTarget
from revox.coding.regularizers import Posterior, Regularizers, guidance_of_codes
from revox.losses.codes import semantic_log_probabilities, sharpness_of
from revox.model.codec import Codec

RATE = 0.1  # of a refinement's steps, for both kinds of codes (`InversionConfig`)


@dataclass(frozen=True)
class Score:
    """How good codes are, less is better: the parts of the module's formula, weighted already; a part that
    could not be measured is 0."""

    reconstruction: float
    presets: float = 0.0
    encoder: float = 0.0
    language_model: float = 0.0

    @property
    def regularization(self) -> float:
        """All but the reconstruction: how unlikely the model finds the codes."""
        return self.presets + self.encoder + self.language_model

    @property
    def total(self) -> float:
        """What codes are compared by."""
        return self.reconstruction + self.regularization

    def to_json(self) -> dict[str, float]:
        """The parts and the sum, rounded."""
        return {k: round(v, 6) for k, v in {**dataclasses.asdict(self), "total": self.total}.items()}


class Scorer:
    """Scores codes of one clip: its `target` `[samples]`, a whole number of frames at the codec's rate.

    The codec's weights must be float32. The posterior among the `regularizers` is the encoder's
    (`posterior_of`).
    """

    def __init__(
        self, codec: Codec, target: Tensor, config: InversionConfig, regularizers: Regularizers
    ) -> None:
        self.codec, self.config = codec, config
        self.device = codec.output_proj.conv.weight.device
        # As in the search, guidance applies to a clip in one piece only.
        whole = target.numel() <= config.chunk_frames * codec.samples_per_frame
        guidance = regularizers.guidance if whole else None
        self.terms = dataclasses.replace(regularizers, guidance=guidance).to(self.device)
        self.target = SpectralTarget(
            target.to(self.device, torch.float32),
            codec.config.sampling_rate,
            config.scales,
            config.stft_weight,
        )

    @torch.no_grad()
    def score(self, codes: Tensor) -> Score:
        """The score of `codes` `[37, frames]`, from 0."""
        codes, config, terms = codes.to(self.device), self.config, self.terms
        values = self.codec.quantizer.acoustic_codebook.decode(codes[None, 1:])[0]
        sound = self.codec.decode(codes[None])
        parts = {"reconstruction": float(self.target.distance(sound)[0])}
        if terms.prior is not None:
            cost = terms.prior.cost_of_codes(codes[None, 0], values[None])[0]
            parts["presets"] = config.prior_weight * float(cost)
        if terms.posterior is not None:
            levels = self.codec.config.acoustic_codebook_size
            far = terms.posterior.cost_of_codes(codes[None, 0], values[None], levels)[0]
            parts["encoder"] = config.posterior_weight * float(far)
        if terms.guidance is not None:
            loss = guidance_of_codes(terms.guidance, self.codec, codes)
            parts["language_model"] = config.guidance_weight * loss
        return Score(**parts)

    def best_of(self, candidates: Mapping[str, Tensor]) -> tuple[str, dict[str, Score]]:
        """The name of the best of `candidates` (name -> codes), the first of equals; and all their scores."""
        scores = {name: self.score(codes) for name, codes in candidates.items()}
        return min(scores, key=lambda name: scores[name].total), scores


def refinement(steps: int, base: InversionConfig | None = None) -> InversionConfig:
    """Settings of a search that starts at an encoder's codes and takes so many `steps`.

    The steps are smaller than inversion's, and on hard codes from the first: noise and big steps suit a
    search that starts far away. From good codes they lose more in five steps than later ones regain.
    """
    settings = (base or InversionConfig()).with_steps(steps)
    return dataclasses.replace(settings, soft_share=0.0, acoustic_rate=RATE, semantic_rate=RATE)


def posterior_of(codec: Codec, encoded: Encoded) -> Posterior:
    """The encoder's answer as the posterior of a search, which starts at exactly its codes.

    Probabilities are a softmax of minus squared distances to the codebook's rows; acoustic values are those
    before rounding. bf16 decides ties differently from float32, so both are held where the codes are the
    likeliest.
    """
    codes, latents = encoded.codes, encoded.latents
    dim, levels = codec.config.semantic_dim, codec.config.acoustic_codebook_size
    table = codec.quantizer.semantic_codebook.embedding.detach().float()
    log_probabilities = semantic_log_probabilities(latents[:dim].T, table, sharpness_of(table))
    likeliest = log_probabilities.max(dim=1, keepdim=True).values + 1e-3
    log_probabilities = log_probabilities.scatter(1, codes[0, :, None], likeliest).log_softmax(dim=1)
    middle = codec.quantizer.acoustic_codebook.decode(codes[None, 1:])[0]
    cell = 0.49 * 2 / (levels - 1)
    return Posterior(log_probabilities, torch.tanh(latents[dim:]).clamp(middle - cell, middle + cell))
