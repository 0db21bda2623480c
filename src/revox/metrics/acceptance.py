"""Would the model itself say this? The frozen language model's score of codes, and of a voice's rows.

Codes are scored as speech, teacher-forced: the prompt (voice and transcript) and all frames before one are
given. The semantic code of each frame costs its negative log-likelihood; its acoustic codes cost the
flow-matching error, the squared distance between the velocity that the acoustic transformer predicts at a
noisy point and the one that leads from the noise to the codes (Lipman et al., arXiv 2210.02747: at
x_t = (1 - t) x_0 + t x_1 the goal is x_1 - x_0). Both need a transcript: the acoustic transformer sees
nothing but the backbone's state, which has read the text. Without one, only the rows of a voice can be judged
(`PresetRows`).

Neither number means much alone: they stand beside the same for the model's own speech (ceiling) and for the
same codes with another text or for random codes (floor).

`soft_acceptance` is the same for codes that are not decided yet: probabilities of semantic codes and acoustic
values between levels. It is differentiable in both, and equal to `acceptance` where they are hard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.metrics.codes import codebook_use
from revox.metrics.errors import MetricError
from revox.model.config import EMPTY_AUDIO_ID, END_AUDIO_ID, N_SPECIAL_CODES
from revox.model.voxtral import Voxtral

DRAWS = 8
"""Draws of noise and time for each frame; on 30 frames of the lab they leave a standard error of 2 to 5 %."""

NEAR_ZERO = 0.1  # of a dimension's root mean square over the presets' rows


@dataclass(frozen=True)
class Acceptance:
    """The model's score of one utterance; less is better.

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
def acceptance(
    model: Voxtral, prompt: Tensor, codes: Tensor, *, draws: int = DRAWS, seed: int = 0
) -> Acceptance:
    """The score of `codes` `[37, frames]` (from 0) as what follows `prompt` `[time, dim]`.

    The prompt is `Voxtral.embed_prompt` of the transcript and the voice's rows. `draws` are of noise and
    time, the same for one `seed`, number of draws and frame's place. Only the conditional branch is scored:
    guidance is a matter of speaking. Raises MetricError when there are no frames, or codes are out of range.
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
    hidden = _hidden(model, prompt, rows)
    log_likelihood = _log_likelihood(model, hidden)
    targets = torch.cat((codes[0] + N_SPECIAL_CODES, codes.new_tensor([END_AUDIO_ID])))
    semantic = -log_likelihood.gather(1, targets[:, None])[:, 0]
    values = model.audio_tokenizer.quantizer.acoustic_codebook.decode(codes[1:])
    return Acceptance(semantic, _flow_error(model, hidden[:-1], values, draws, seed))


def soft_acceptance(
    model: Voxtral,
    prompt: Tensor,
    semantic: Tensor,
    acoustic: Tensor,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Acceptance:
    """`acceptance` of undecided codes, differentiable in `semantic`, `acoustic` and `prompt`.

    `semantic` are probabilities `[frames, size]`, `acoustic` values in [-1, 1] `[36, frames]`. What is read
    of the past are expected rows (`soft_rows`); a frame's semantic cost is the expected cross-entropy
    -sum_c p_c log P(c), its acoustic goal the values themselves. With one-hot probabilities and values on
    levels it is `acceptance`, up to the order of sums. For a prompt that takes part in the gradient, embed
    rows of `soft_voice_embedding`. Raises MetricError when the shapes do not fit.
    """
    rows = soft_rows(model, semantic, acoustic)
    hidden = _hidden(model, prompt, rows)
    log_likelihood = _log_likelihood(model, hidden)
    spoken = log_likelihood[:-1, N_SPECIAL_CODES : N_SPECIAL_CODES + semantic.shape[1]]
    cost = -(semantic.to(spoken) * spoken).sum(dim=1)
    end = -log_likelihood[-1:, END_AUDIO_ID]
    flow = _flow_error(model, hidden[:-1], acoustic.to(model.device), draws, seed)
    return Acceptance(torch.cat((cost, end)), flow)


def soft_rows(model: Voxtral, semantic: Tensor, acoustic: Tensor) -> Tensor:
    """Expected rows `[frames, dim]` of probabilities `[frames, size]` and acoustic values `[36, frames]`.

    A semantic row is the mean of the table's rows under the probabilities. An acoustic row is interpolated
    linearly between those of the two neighbouring levels; exactly on a level, where straight-through values
    always are, its slope is the mean of both sides'. Raises MetricError when the shapes do not fit.
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
    """`soft_rows` with a voice's end frame appended: `[frames + 1, dim]`, as `Embeddings.voice_embedding`."""
    rows = soft_rows(model, semantic, acoustic)
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


def _hidden(model: Voxtral, prompt: Tensor, rows: Tensor) -> Tensor:
    """Hidden states `[frames + 1, dim]` from which each frame, and after the last the end, is read."""
    inputs = torch.cat((prompt.to(model.device, model.dtype), rows.to(model.dtype)))
    return model.backbone(inputs[None])[0, len(prompt) - 1 :]


def _log_likelihood(model: Voxtral, hidden: Tensor) -> Tensor:
    return model.acoustic_transformer.semantic_logits(hidden).log_softmax(dim=-1)


def _flow_error(model: Voxtral, hidden: Tensor, values: Tensor, draws: int, seed: int) -> Tensor:
    """Mean squared error of the velocity `[frames]`, given `hidden` `[frames, dim]` and `values`
    `[36, frames]`."""
    goal = values.T.float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    total = torch.zeros(len(goal), device=goal.device)
    for draw in range(draws):
        # Times are stratified: every frame is asked once in each of `draws` parts of [0, 1].
        noise = torch.randn(goal.shape, generator=generator).to(goal.device)
        times = ((draw + torch.rand(len(goal), generator=generator)) / draws).to(goal.device)
        point = noise + (goal - noise) * times[:, None]
        velocity = model.acoustic_transformer.velocity(
            point.to(model.dtype), times.to(model.dtype), hidden.to(model.dtype)
        )
        total = total + (velocity.float() - (goal - noise)).square().mean(dim=1)
    return total / draws


class PresetRows:
    """What rows of the model's own voices look like, and how far a voice's are from that.

    `rows` are the presets' `[N, dim]` each, without or with the end frame (the same in all; `end` says
    whether the last row is one). Raises MetricError with fewer than two presets.
    """

    def __init__(self, rows: Sequence[Tensor], end: bool = True) -> None:
        voices = [(r[:-1] if end else r).detach().cpu().double() for r in rows]
        voices = [v for v in voices if len(v)]
        if len(voices) < 2:
            raise MetricError(
                "a voice's rows are judged beside the presets', and this checkpoint has fewer than two; "
                "take a checkpoint with its voice_embedding folder"
            )
        self.voices = voices

    def score(self, rows: Tensor, end: bool = True) -> dict[str, float]:
        """Figures of a voice's `rows` `[N, dim]` (the last one left out when `end`), beside all presets.

        row_norm: mean length of a row. mean_row_cosine: of the voice's mean row and the presets' (0.94 and
        more between any two voices). offset: length of the mean row less the presets' mean row.
        nearest_preset: the largest cosine, after that subtraction, with a preset's mean row. spread:
        geometric mean over dimensions of the deviation over time, as a ratio to the presets'.
        spread_mismatch: mean |natural log| of the single ratios. sparsity: share of values under a tenth
        of their dimension's root mean square over the presets. sparsity_mismatch: mean
        absolute difference of that share from the presets', dimension by dimension.
        """
        return _row_figures(rows[:-1] if end else rows, self.voices)

    def score_presets(self) -> list[dict[str, float]]:
        """The same of every preset, beside the others."""
        return [
            _row_figures(own, self.voices[:i] + self.voices[i + 1 :]) for i, own in enumerate(self.voices)
        ]


def _row_figures(rows: Tensor, voices: Sequence[Tensor]) -> dict[str, float]:
    own = rows.detach().cpu().double()
    if own.dim() != 2 or not len(own) or own.shape[1] != voices[0].shape[1]:
        raise MetricError(
            f"rows {list(rows.shape)} cannot be judged; give [N, {voices[0].shape[1]}], one row or more"
        )
    everything = torch.cat(list(voices))
    common, mean = everything.mean(dim=0), own.mean(dim=0)
    offsets = torch.stack([v.mean(dim=0) for v in voices]) - common
    rms = everything.square().mean(dim=0).sqrt().clamp_min(1e-12)

    def spread(x: Tensor) -> Tensor:
        return x.std(dim=0, correction=0).clamp_min(1e-12)

    def near_zero(x: Tensor) -> Tensor:
        return (x.abs() < NEAR_ZERO * rms).double().mean(dim=0)

    # Within voices: what lies between voices is in the offset.
    ratio = (spread(own) / torch.stack([spread(v) for v in voices]).square().mean(dim=0).sqrt()).log()
    sparse = near_zero(own)
    expected = torch.stack([near_zero(v) for v in voices]).mean(dim=0)
    return {
        "row_norm": own.norm(dim=1).mean().item(),
        "mean_row_cosine": torch.cosine_similarity(mean, common, dim=0).item(),
        "offset": (mean - common).norm().item(),
        "nearest_preset": torch.cosine_similarity((mean - common)[None], offsets).max().item(),
        "spread": ratio.mean().exp().item(),
        "spread_mismatch": ratio.abs().mean().item(),
        "sparsity": sparse.mean().item(),
        "sparsity_mismatch": (sparse - expected).abs().mean().item(),
    }


def semantic_variety(codes: Tensor) -> float:
    """Different semantic codes of an utterance's `codes` `[37, frames]`, as a share of its frames."""
    return codebook_use(codes) / max(1, codes.shape[-1])
