"""Teacher-forced likelihood: how likely does the frozen model find given codes as given words?

The prompt (voice and transcript) and all frames before one are given. The semantic code of each frame costs
its negative log-likelihood (NLL). Its acoustic codes cost the flow-matching error, the squared distance of
the velocity that the acoustic transformer predicts at a noisy point from the one that leads from the noise to
the codes (Lipman et al., arXiv 2210.02747: at x_t = (1 - t) x_0 + t x_1 the target is x_1 - x_0). Both need a
transcript: the acoustic transformer sees only the backbone's state, which has read the text. Without one,
only the embedding of a voice can be scored (`revox.metrics.voice_embeddings`).

Neither number means much alone: compare it with the same for the model's own speech (ceiling), and for the
same codes with another text or for random codes (floor).

`soft_likelihood` takes codes that are not decided yet: probabilities of semantic codes and acoustic values
between levels. It is differentiable in both, and equals `likelihood` where they are hard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.metrics.errors import MetricError
from revox.model.backbone import KVCache
from revox.model.config import EMPTY_AUDIO_ID, END_AUDIO_ID, N_SPECIAL_CODES
from revox.model.voxtral import Voxtral

DRAWS = 8
"""Draws of noise and time for each frame; on 30 frames of the lab they leave a standard error of 2 to 5 %."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of one utterance as costs; less is better.

    `semantic` `[frames + 1]`: negative log-likelihood of each semantic code and, last, of the end, in nats.
    `flow` `[frames]`: mean squared error of the velocity, per acoustic codebook, over the draws.
    """

    semantic: Tensor
    flow: Tensor

    @property
    def semantic_nll(self) -> Tensor:
        """Nats a frame, the end included (a scalar)."""
        return self.semantic.mean()

    @property
    def flow_error(self) -> Tensor:
        """Mean squared error of the velocity (a scalar)."""
        return self.flow.mean()

    @property
    def end_nll(self) -> Tensor:
        """Negative log-likelihood of ending where the codes end, in nats (a scalar)."""
        return self.semantic[-1]


@torch.no_grad()
def likelihood(
    model: Voxtral, prompt: Tensor, codes: Tensor, *, draws: int = DRAWS, seed: int = 0
) -> Likelihood:
    """`prompt_likelihood` without a gradient."""
    return prompt_likelihood(model, prompt, codes, draws=draws, seed=seed)


def prompt_likelihood(
    model: Voxtral, prompt: Tensor, codes: Tensor, *, draws: int = DRAWS, seed: int = 0
) -> Likelihood:
    """The likelihood of `codes` `[37, frames]` (from 0) after `prompt` `[time, dim]`; differentiable in it.

    The prompt is `Voxtral.embed_prompt` of the transcript and the voice embedding. `draws` are of noise and
    time, the same for one `seed`, number of draws and number of frames; without any there is no flow error.
    Only the conditional branch is scored: guidance belongs to speaking. Raises MetricError when there are no
    frames, or codes are out of range.
    """
    sizes = torch.tensor(model.config.codebook_rows, device=codes.device)[:, None] - N_SPECIAL_CODES
    if codes.dim() != 2 or codes.shape[0] != len(sizes) or codes.shape[1] == 0:
        raise MetricError(
            f"codes {list(codes.shape)} cannot be scored; give [{len(sizes)}, frames], one frame or more"
        )
    if bool(((codes < 0) | (codes >= sizes)).any()):
        raise MetricError("the codes are outside the codebooks of this checkpoint; encode the clip with it")
    codes = codes.to(model.device)
    rows = model.mm_audio_embeddings.frames((codes + N_SPECIAL_CODES)[None])[0]
    hidden, log_likelihood = _hidden(model, prompt, rows)
    targets = torch.cat((codes[0] + N_SPECIAL_CODES, codes.new_tensor([END_AUDIO_ID])))
    semantic = -log_likelihood.gather(1, targets[:, None])[:, 0]
    values = model.audio_tokenizer.quantizer.acoustic_codebook.decode(codes[1:])
    return Likelihood(semantic, _flow_error(model, hidden[:-1], values, draws, seed))


class Continuations:
    """Log-likelihoods of the next semantic code after each of several continuations of one prompt.

    As `likelihood` scores them, with a cache, so that a search that extends them a frame at a time reads each
    frame once. `prompt` is `[time, dim]`, `frames` the most that may follow it.
    """

    @torch.no_grad()
    def __init__(self, model: Voxtral, prompt: Tensor, frames: int) -> None:
        self.model = model
        room = len(prompt) + frames
        self.cache = KVCache.empty(model.config.backbone, 1, room, model.dtype, model.device)
        self.scores = self._read(prompt.to(model.device, model.dtype)[None])
        """Of codes from 0, `[continuations, size]`: at first of the prompt alone, `[1, size]`."""

    @torch.no_grad()
    def extend(self, parents: Tensor, codes: Tensor) -> None:
        """Go on with the continuations `parents` `[n]`, each by a frame of `codes` `[n, 37]` from 0."""
        cache = self.cache
        parents = parents.to(self.model.device)
        cache.keys, cache.values = cache.keys[:, parents], cache.values[:, parents]
        cache.lengths = cache.lengths[parents.cpu()]
        ids = codes.to(self.model.device)[:, :, None] + N_SPECIAL_CODES
        self.scores = self._read(self.model.mm_audio_embeddings.frames(ids))

    def _read(self, embeddings: Tensor) -> Tensor:
        hidden = self.model.backbone(embeddings, self.cache)[:, -1]
        scores = self.model.acoustic_transformer.semantic_logits(hidden).log_softmax(dim=-1)
        size = self.model.config.codec.semantic_codebook_size
        return scores[:, N_SPECIAL_CODES : N_SPECIAL_CODES + size]


def soft_likelihood(
    model: Voxtral,
    prompt: Tensor,
    semantic: Tensor,
    acoustic: Tensor,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Likelihood:
    """`likelihood` of undecided codes, differentiable in `semantic`, `acoustic` and `prompt`.

    `semantic` are probabilities `[frames, size]`, `acoustic` values in [-1, 1] `[36, frames]`. Past frames
    are read as expected embeddings (`soft_embedding`); a frame's semantic cost is the expected cross-entropy
    -sum_c p_c log P(c), its acoustic target the values themselves. With one-hot probabilities and values on
    levels it equals `likelihood`, up to the order of sums. For a prompt that takes part in the gradient, use
    `soft_voice_embedding`. Raises MetricError when the shapes do not fit.
    """
    rows = soft_embedding(model, semantic, acoustic)
    hidden, log_likelihood = _hidden(model, prompt, rows)
    spoken = log_likelihood[:-1, N_SPECIAL_CODES : N_SPECIAL_CODES + semantic.shape[1]]
    cost = -(semantic.to(spoken) * spoken).sum(dim=1)
    end = -log_likelihood[-1:, END_AUDIO_ID]
    flow = _flow_error(model, hidden[:-1], acoustic.to(model.device), draws, seed)
    return Likelihood(torch.cat((cost, end)), flow)


def soft_embedding(model: Voxtral, semantic: Tensor, acoustic: Tensor) -> Tensor:
    """Expected embeddings `[frames, dim]` of probabilities `[frames, size]` and values `[36, frames]`.

    A semantic embedding is the mean of the table under the probabilities. An acoustic one is interpolated
    linearly between the two neighboring levels; exactly on a level, where straight-through values always are,
    its slope is the mean of both sides'. Raises MetricError when the shapes do not fit.
    """
    config = model.config.codec
    size, levels = config.semantic_codebook_size, config.acoustic_codebook_size
    frames = semantic.shape[0]
    if semantic.shape != (frames, size) or acoustic.shape != (config.acoustic_dim, frames) or not frames:
        raise MetricError(
            f"soft codes {list(semantic.shape)} and {list(acoustic.shape)} cannot be scored; give "
            f"probabilities [frames, {size}] and values [{config.acoustic_dim}, frames]"
        )
    embeddings = model.mm_audio_embeddings.audio_codebook_embeddings
    table, device = embeddings.embeddings.weight, model.device
    books = table[: sum(model.config.codebook_rows)].float().split(model.config.codebook_rows)
    semantic_part = semantic.to(device, torch.float32) @ books[0][N_SPECIAL_CODES:]
    weights = _level_weights(acoustic.to(device, torch.float32), levels)
    acoustic_books = torch.stack([book[N_SPECIAL_CODES:] for book in books[1:]])
    acoustic_part = weights.permute(1, 0, 2).flatten(1) @ acoustic_books.flatten(0, 1)
    return (semantic_part + acoustic_part).to(table.dtype)


def soft_voice_embedding(model: Voxtral, semantic: Tensor, acoustic: Tensor) -> Tensor:
    """`soft_embedding` with the end frame, as `Embeddings.voice_embedding`: `[frames + 1, dim]`."""
    rows = soft_embedding(model, semantic, acoustic)
    end = torch.full((model.config.codec.n_codebooks, 1), EMPTY_AUDIO_ID, device=rows.device)
    end[0] = END_AUDIO_ID
    return torch.cat((rows, model.mm_audio_embeddings.frames(end[None])[0]))


def _level_weights(values: Tensor, levels: int) -> Tensor:
    """Weights of the levels, `[36, frames, levels]`, that add up to one; of `values` `[36, frames]`."""
    place = ((values + 1) / 2 * (levels - 1)).clamp(0, levels - 1)
    with torch.no_grad():
        nearest = place.round()
        on_level = (place - nearest).abs() < 1e-4
        below = torch.where(on_level, nearest, place.floor())
        lower = torch.where(on_level, nearest - 1, below).clamp_min(0).long()
        upper = torch.where(on_level, nearest + 1, below + 1).clamp_max(levels - 1).long()
        one_hot = torch.eye(levels, device=values.device)
        slope = (one_hot[upper] - one_hot[lower]) / (upper - lower).clamp_min(1)[..., None]
        base = one_hot[below.long()]
    return base + (place - below)[..., None] * slope


def _hidden(model: Voxtral, prompt: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states `[frames + 1, dim]` from which each frame, and after the last the end, is read.

    And the log-likelihoods `[frames + 1, size]` of the semantic codes there.
    """
    inputs = torch.cat((prompt.to(model.device, model.dtype), rows.to(model.dtype)))
    hidden = model.teacher_forced([inputs])[0, len(prompt) - 1 :]
    return hidden, model.acoustic_transformer.semantic_logits(hidden).log_softmax(dim=-1)


def _flow_error(model: Voxtral, hidden: Tensor, values: Tensor, draws: int, seed: int) -> Tensor:
    """Mean squared error of the velocity `[frames]`, given `hidden` `[frames, dim]` and `values`
    `[36, frames]`; nan without draws."""
    target = values.T.float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    total = torch.zeros(len(target), device=target.device)
    for draw in range(draws):
        # Times are stratified: every frame is asked once in each of `draws` parts of [0, 1].
        noise = torch.randn(target.shape, generator=generator).to(target.device)
        times = ((draw + torch.rand(len(target), generator=generator)) / draws).to(target.device)
        point = noise + (target - noise) * times[:, None]
        velocity = model.acoustic_transformer.velocity(
            point.to(model.dtype), times.to(model.dtype), hidden.to(model.dtype)
        )
        total = total + (velocity.float() - (target - noise)).square().mean(dim=1)
    return total / draws if draws else torch.full_like(total, math.nan)
