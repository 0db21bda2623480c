"""Better codes than the encoder's, by a few steps of inversion from there; and which of several is best.

**The score.** Codes are compared by one number, less is better: how far their sound is from the clip, plus
how unlikely the model finds them, each part weighted as in the search (`InversionConfig`):

    score = reconstruction + prior_weight * presets + guess_weight * encoder + opinion_weight * opinion

`reconstruction` is the spectral distance that inversion descends (`SpectralTarget`). The rest is acceptance,
as far as it can be judged: `presets`, nats a code under the statistics of the presets' codes (`CodePrior`);
`encoder`, how far the codes are from what the encoder said (nats a semantic code, squared deviations of two
levels an acoustic one); `opinion`, the language model's of the codes as speech of the transcript, where there
is one. Reconstruction alone would always choose the search: a decoder forgives what the language model will
not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.coding.encode import Encoded
from revox.coding.invert import (
    Guess,
    InversionConfig,
    InversionProgress,
    InversionResult,
    Opinion,
    invert,
    opinion_of_codes,
)
from revox.coding.objective import SpectralTarget
from revox.coding.prior import CodePrior
from revox.losses.codes import semantic_log_probabilities, sharpness_of
from revox.model.codec import Codec

RATE = 0.1  # of a refinement's steps, for both kinds of codes (`InversionConfig`)


@dataclass(frozen=True)
class Score:
    """How good codes are, less is better: the parts of the module's formula, weighted already; a part that
    could not be judged is 0."""

    reconstruction: float
    presets: float = 0.0
    encoder: float = 0.0
    opinion: float = 0.0

    @property
    def acceptance(self) -> float:
        """All but the reconstruction."""
        return self.presets + self.encoder + self.opinion

    @property
    def total(self) -> float:
        """What codes are compared by."""
        return self.reconstruction + self.acceptance

    def to_json(self) -> dict[str, float]:
        """The parts and the sum, rounded."""
        return {k: round(v, 6) for k, v in {**dataclasses.asdict(self), "total": self.total}.items()}


class Scorer:
    """Scores codes of one clip: its `target` `[samples]`, a whole number of frames at the codec's rate.

    The codec's weights must be float32. `guess` is the encoder's (`guess_of`).
    """

    def __init__(
        self,
        codec: Codec,
        target: Tensor,
        *,
        config: InversionConfig | None = None,
        prior: CodePrior | None = None,
        guess: Guess | None = None,
        opinion: Opinion | None = None,
    ) -> None:
        self.codec, self.config = codec, config or InversionConfig()
        self.device = codec.output_proj.conv.weight.device
        self.prior = None if prior is None else prior.to(self.device)
        self.guess = None if guess is None else Guess(*(part.to(self.device) for part in guess))
        # The search asks about a clip in one piece only; so does the score that its codes are judged by.
        whole = target.numel() <= self.config.chunk_frames * codec.samples_per_frame
        self.opinion = opinion if whole else None
        self.target = SpectralTarget(
            target.to(self.device, torch.float32),
            codec.config.sampling_rate,
            self.config.scales,
            self.config.stft_weight,
            self.config.waveform_weight,
        )

    @torch.no_grad()
    def score(self, codes: Tensor) -> Score:
        """The score of `codes` `[37, frames]`, from 0."""
        codes, config = codes.to(self.device), self.config
        values = self.codec.quantizer.acoustic_codebook.decode(codes[None, 1:])[0]
        sound = self.codec.decode(codes[None])
        parts = {"reconstruction": float(self.target.distance(sound)[0])}
        if self.prior is not None:
            cost = self.prior.cost_of_codes(codes[None, 0], values[None])[0]
            parts["presets"] = config.prior_weight * float(cost)
        if self.guess is not None:
            levels = self.codec.config.acoustic_codebook_size
            far = self.guess.cost_of_codes(codes[None, 0], values[None], levels)[0]
            parts["encoder"] = config.guess_weight * float(far)
        if self.opinion is not None:
            parts["opinion"] = config.opinion_weight * opinion_of_codes(self.opinion, self.codec, codes)
        return Score(**parts)

    def best_of(self, candidates: Mapping[str, Tensor]) -> tuple[str, dict[str, Score]]:
        """The name of the best of `candidates` (name -> codes), the first of equals; and all their scores."""
        scores = {name: self.score(codes) for name, codes in candidates.items()}
        return min(scores, key=lambda name: scores[name].total), scores


@dataclass(frozen=True)
class Refined:
    """What a refinement ended with: the best `codes` `[37, frames]`, on the CPU, and which they are (`kept`,
    a key of `scores`): "encoder", "refined" or one of the others it was given. `result` is the search's."""

    codes: Tensor
    kept: str
    scores: dict[str, Score]
    result: InversionResult


def refinement(steps: int, base: InversionConfig | None = None) -> InversionConfig:
    """Settings of a search that begins at an encoder's codes and takes so many `steps`.

    Smaller steps than inversion's, and on hard codes from the first: noise and big steps are for a search
    that begins far away, and from good codes they lose in five steps what they began with.
    """
    settings = (base or InversionConfig()).taking(steps)
    return dataclasses.replace(settings, soft_share=0.0, acoustic_rate=RATE, semantic_rate=RATE)


def guess_of(codec: Codec, encoded: Encoded) -> Guess:
    """The encoder's answer as the search takes a guess: it starts at exactly its codes and pays for leaving.

    Probabilities are a softmax of minus squared distances to the codebook's rows; acoustic values are those
    before rounding. bf16 decides ties otherwise than float32, so both are held where the codes are the
    likeliest.
    """
    codes, latents = encoded.codes, encoded.latents
    dim, levels = codec.config.semantic_dim, codec.config.acoustic_codebook_size
    table = codec.quantizer.semantic_codebook.embedding.detach().float()
    said = semantic_log_probabilities(latents[:dim].T, table, sharpness_of(table))
    chosen = codes[0, :, None]
    said = said.scatter(1, chosen, said.max(dim=1, keepdim=True).values + 1e-3).log_softmax(dim=1)
    middle = codec.quantizer.acoustic_codebook.decode(codes[None, 1:])[0]
    cell = 0.49 * 2 / (levels - 1)
    return Guess(said, torch.tanh(latents[dim:]).clamp(middle - cell, middle + cell))


def refine(
    codec: Codec,
    target: Tensor,
    encoded: Encoded,
    steps: int,
    *,
    config: InversionConfig | None = None,
    prior: CodePrior | None = None,
    opinion: Opinion | None = None,
    others: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[InversionProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Refined:
    """`steps` of inversion from the encoder's answer `encoded` (`revox.coding.encode`) for `target`
    `[samples]`, a whole number of frames at the codec's rate; the best of all codes at hand by the module's
    score, so never worse than the encoder's, nor than any of the `others` (name -> codes `[37, frames]`).

    The codec's weights must be float32. `config` is what the search starts from; its number of steps is set
    by `steps`. For the rest see `invert`. Raises ValueError when the target's length and the codes differ.
    """
    if steps < 0 or encoded.codes.shape[1] * codec.samples_per_frame != target.numel():
        shape = list(encoded.codes.shape)
        raise ValueError(f"{steps} steps from codes {shape} for {target.numel()} samples cannot be taken")
    settings = refinement(steps, config)
    guess = guess_of(codec, encoded)
    result = invert(
        codec,
        target,
        config=settings,
        prior=prior,
        guess=guess,
        opinion=opinion,
        seed=seed,
        progress=progress,
        should_stop=should_stop,
    )
    scorer = Scorer(codec, target, config=settings, prior=prior, guess=guess, opinion=opinion)
    # Of equals the encoder's: they are what other runtimes give.
    candidates = {"encoder": encoded.codes, "refined": result.codes, **(others or {})}
    kept, scores = scorer.best_of(candidates)
    return Refined(candidates[kept].cpu(), kept, scores, result)
