"""The lab's backbone and acoustic transformer, trained on its codec's codes.

Each sequence is the release's prompt followed by speech: a reference (the preset's fixed one, or another
utterance of the same speaker), the text, and the target frames. The semantic code of the next frame is
learned by cross-entropy and its acoustic codes by flow matching (Lipman et al., arXiv 2210.02747: v = x1 - x0
on a straight line), with the hidden state dropped at times for classifier-free guidance. Part of the guidance
is learned (Tang et al., arXiv 2502.12154), because so small a model needs more than the 1.2 that engines
apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from revox.model.backbone import BackboneAttention
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES, VoxtralConfig
from revox.model.layers import rotate_interleaved
from revox.model.voxtral import Voxtral
from revox.training.average import moving_average
from revox.training.run import Run


@dataclass(frozen=True)
class LanguageTraining:
    """Settings of one run. The defaults are for two CPU cores."""

    steps: int = 6000
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 200
    decay_steps: int = 3000
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    reference_frames: tuple[int, int] = (25, 62)
    acoustic_frames: int = 256
    drop_hidden: float = 0.1
    flow: float = 1.0
    flow_draws: int = 3
    guidance: float = 0.5
    own_share: float = 0.5
    own_from: int = 0
    """The step from which the model is fed its own past; until then a step costs a third less."""
    own_steps: int = 4
    alignment: float = 0.0
    """Weight of guided attention: the first head of `aligned_layers` is to look, at each frame, where in the
    text it is (Tachibana et al., arXiv 1710.08969, with -log of the attention that is there)."""
    aligned_layers: tuple[int, ...] = (1, 3)
    alignment_width: float = 0.08
    """Deviation of where in the text the speech is from the diagonal, of the whole text."""
    token_noise: float = 0.05
    preset_share: float = 0.3
    human_share: float = 0.3
    average: float = 0.0
    """Decay of the moving average of the weights (`revox.training.average`), which is validated and shipped.
    0 is none. If a resumed state has no average, it starts at that step."""
    seed: int = 0
    save_every: int = 500
    report_every: int = 50
    validate_every: int = 500


@dataclass(frozen=True)
class TokenizedUtterance:
    """One utterance: `codes` int16 `[37, frames]`, tokens of each form of its text, speaker and preset."""

    codes: np.ndarray
    texts: tuple[tuple[int, ...], ...]
    speaker: str
    preset: str | None
    human: bool = False


@dataclass(frozen=True)
class PromptTokens:
    """Ids of the prompt's special tokens, from the tokenizer."""

    bos: int
    audio: int
    begin_audio: int
    next_audio_text: int
    repeat_audio_text: int


class LanguageData:
    """Random batches of prompts and the frames that follow them."""

    def __init__(
        self,
        utterances: list[TokenizedUtterance],
        references: dict[str, np.ndarray],
        tokens: PromptTokens,
        settings: LanguageTraining,
    ) -> None:
        self.utterances, self.references, self.tokens, self.settings = (
            utterances,
            references,
            tokens,
            settings,
        )
        self.by_speaker: dict[str, list[int]] = {}
        for i, utterance in enumerate(utterances):
            self.by_speaker.setdefault(utterance.speaker, []).append(i)
        self.of_presets = [i for i, u in enumerate(utterances) if u.preset is not None]
        several = [
            i for i, u in enumerate(utterances) if u.preset is None and len(self.by_speaker[u.speaker]) > 1
        ]
        self.humans = [i for i in several if utterances[i].human]
        self.others = [i for i in several if not utterances[i].human]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[int], np.ndarray]:
        """A reference `[37, n]`, prompt tokens, and the target codes `[37, frames]`."""
        at = rng.random()
        pool = self.others
        if at < self.settings.preset_share:
            pool = self.of_presets
        elif at < self.settings.preset_share + self.settings.human_share:
            pool = self.humans
        pool = pool or self.others or self.of_presets or self.humans
        chosen = int(pool[rng.integers(len(pool))])
        return self.item(chosen, rng)

    def item(self, chosen: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int], np.ndarray]:
        """As `draw`, for one utterance."""
        utterance = self.utterances[chosen]
        if utterance.preset is not None and (
            rng.random() < 0.7 or len(self.by_speaker[utterance.speaker]) < 2
        ):
            reference = self.references[utterance.preset]
        else:
            reference = self._other(utterance, chosen, rng)
        text = utterance.texts[rng.integers(len(utterance.texts))]
        tokens = self.tokens
        prompt = [
            tokens.bos, tokens.begin_audio, *[tokens.audio] * (reference.shape[1] + 1),
            tokens.next_audio_text, *text, tokens.repeat_audio_text, tokens.begin_audio,
        ]  # fmt: skip
        return reference, prompt, utterance.codes

    def _other(self, utterance: TokenizedUtterance, chosen: int, rng: np.random.Generator) -> np.ndarray:
        low, high = self.settings.reference_frames
        wanted = int(rng.integers(low, high + 1))
        mine = [i for i in self.by_speaker[utterance.speaker] if i != chosen]
        parts: list[np.ndarray] = []
        total = 0
        for i in rng.permutation(mine):
            parts.append(self.utterances[i].codes)
            total += parts[-1].shape[1]
            if total >= wanted:
                break
        return np.concatenate(parts, axis=1)[:, :wanted]

    def batch(self, size: int, rng: np.random.Generator) -> list[tuple[np.ndarray, list[int], np.ndarray]]:
        """`size` draws of about one length, since a batch costs what its longest sequence costs."""
        drawn = sorted((self.draw(rng) for _ in range(4 * size)), key=lambda i: len(i[1]) + i[2].shape[1])
        first = size * int(rng.integers(4))
        return drawn[first : first + size]


def language_losses(
    model: Voxtral,
    items: list[tuple[np.ndarray, list[int], np.ndarray]],
    audio_token: int,
    settings: LanguageTraining,
    rng: torch.Generator,
    training: bool = True,
) -> dict[str, Tensor]:
    """Losses of a batch of (reference codes, prompt tokens, target codes): `semantic` (nats a frame, the end
    included), `flow` (mean squared error of the velocity) and `accuracy` of the semantic code."""
    device = model.device
    embeddings = model.mm_audio_embeddings
    heads, past, starts, targets = [], [], [], []
    for reference, prompt, codes in items:
        rows = embeddings.voice_embedding(torch.from_numpy(reference.astype(np.int64)).to(device))
        target = torch.from_numpy(codes.astype(np.int64)).to(device)
        tokens = torch.tensor(prompt, device=device)
        heads.append(model.embed_prompt(tokens, audio_token, rows))
        past.append(target + N_SPECIAL_CODES)
        starts.append(len(prompt) - 1)
        targets.append(target)
    if training:
        replaced = [i for i in range(len(items)) if torch.rand((), generator=rng) < settings.own_share]
        for i, own in zip(
            replaced, _own_acoustic_ids(model, heads, past, replaced, settings, rng), strict=True
        ):
            past[i] = torch.cat((past[i][:1], own))
        past = [_corrupted(model, ids, settings.token_noise, rng) for ids in past]
    sequences = [
        torch.cat((head, embeddings.frames(ids[None])[0])) for head, ids in zip(heads, past, strict=True)
    ]
    aligned = settings.aligned_layers if training and settings.alignment else ()
    with _attention_inputs(model, aligned) as seen:
        hidden = model.teacher_forced(sequences)
    states, semantic, acoustic = [], [], []
    for i, target in enumerate(targets):
        states.append(hidden[i, starts[i] : starts[i] + target.shape[1] + 1])
        end = torch.full((1,), END_AUDIO_ID, device=device)
        semantic.append(torch.cat((target[0] + N_SPECIAL_CODES, end)))
        acoustic.append(target[1:])
    state = torch.cat(states)
    wanted = torch.cat(semantic)
    logits = model.acoustic_transformer.semantic_logits(state)
    frames = torch.cat([s[:-1] for s in states])
    points = torch.cat(acoustic, dim=1).T.float()
    levels = model.config.codec.acoustic_codebook_size - 1
    if training and len(points) > settings.acoustic_frames:
        chosen = torch.randperm(len(points), generator=rng)[: settings.acoustic_frames].to(device)
        frames, points = frames[chosen], points[chosen]
    # Several flow times per frame for one pass of the backbone: the acoustic head is where words were lost,
    # and it is cheap. The times of one frame's draws are stratified over [0, 1].
    draws = settings.flow_draws
    frames, points = frames.repeat(draws, 1), points.repeat(draws, 1)
    goal = points * 2 / levels - 1
    noise = torch.randn(goal.shape, generator=rng).to(device)
    times = torch.rand((draws, len(goal) // draws), generator=rng) + torch.arange(draws)[:, None]
    times = (times / draws).flatten().to(device)
    dropped = (torch.rand((len(goal), 1), generator=rng) < settings.drop_hidden).to(device)
    if training:
        frames = frames.masked_fill(dropped, 0.0)
    x = noise + (goal - noise) * times[:, None]
    velocity = model.acoustic_transformer.velocity(x, times, frames)
    wanted_velocity = goal - noise
    if training and settings.guidance > 0:
        # At the fixed point, the velocity is the unconditional one plus 1 / (1 - guidance) times the hidden
        # state's contribution.
        with torch.no_grad():
            blind = model.acoustic_transformer.velocity(x, times, torch.zeros_like(frames))
        further = settings.guidance * (velocity.detach() - blind)
        wanted_velocity = wanted_velocity + further.masked_fill(dropped, 0.0)
    losses = {
        "semantic": functional.cross_entropy(logits, wanted),
        "flow": functional.mse_loss(velocity, wanted_velocity),
        "accuracy": (logits.argmax(-1) == wanted).float().mean(),
    }
    if aligned:
        spans = [
            (reference.shape[1] + 4, start - 1, start, target.shape[1])
            for (reference, _, _), start, target in zip(items, starts, targets, strict=True)
        ]
        losses["alignment"] = _alignment_loss(model, seen, spans, settings.alignment_width)
    return losses


@contextmanager
def _attention_inputs(
    model: Voxtral, layers: Sequence[int]
) -> Iterator[list[tuple[BackboneAttention, Tensor, Tensor]]]:
    """Collects the attention modules of `layers` with their inputs and angles."""
    seen: list[tuple[BackboneAttention, Tensor, Tensor]] = []
    attentions = [cast(BackboneAttention, model.backbone.layers[i].attention) for i in layers]
    hooks = [a.register_forward_pre_hook(lambda m, given: seen.append((m, *given[:2]))) for a in attentions]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _alignment_loss(
    model: Voxtral,
    seen: Sequence[tuple[BackboneAttention, Tensor, Tensor]],
    spans: Sequence[tuple[int, int, int, int]],
    width: float,
) -> Tensor:
    """-log of the share of the first head's attention that is near the place in the text, mean over frames.

    `spans`: of each sequence, where its text begins and ends, where its frames are predicted from, and how
    many they are.
    """
    size = model.config.backbone.head_dim
    losses = []
    for attention, x, angles in seen:
        q = rotate_interleaved(functional.linear(x, attention.wq.weight[:size])[:, :, None], angles)[:, :, 0]
        k = rotate_interleaved(functional.linear(x, attention.wk.weight[:size])[:, :, None], angles)[:, :, 0]
        for i, (first, last, start, frames) in enumerate(spans):
            scores = q[i, start : start + frames + 1] @ k[i, : start + frames + 1].T / size**0.5
            ahead = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).triu(start + 1)
            attended = scores.masked_fill(ahead, -torch.inf).softmax(-1)[:, first:last]
            text = (torch.arange(last - first, device=scores.device) + 0.5) / (last - first)
            time = torch.arange(frames + 1, device=scores.device) / frames
            near = torch.exp(-(((time[:, None] - text) / width) ** 2) / 2)
            losses.append(-((attended * near).sum(-1) + 1e-6).log().mean())
    return torch.stack(losses).mean()


def _corrupted(model: Voxtral, ids: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Ids `[37, frames]` with a share replaced at random, because the model's own past has errors too."""
    if share <= 0:
        return ids
    codec = model.config.codec
    sizes = [codec.semantic_codebook_size] + [codec.acoustic_codebook_size] * (len(ids) - 1)
    wrong = torch.rand(ids.shape, generator=rng) < share
    random = (torch.rand(ids.shape, generator=rng) * torch.tensor(sizes)[:, None]).long() + N_SPECIAL_CODES
    return torch.where(wrong.to(ids.device), random.to(ids.device), ids)


@torch.no_grad()
def _own_acoustic_ids(
    model: Voxtral,
    heads: list[Tensor],
    past: list[Tensor],
    chosen: list[int],
    settings: LanguageTraining,
    rng: torch.Generator,
) -> list[Tensor]:
    """Acoustic ids `[36, frames]` that the model predicts for the items `chosen`, given the true past.

    Fed in place of the true ones, they resemble what the model is fed when it speaks (scheduled sampling in
    two passes: Mihaylova and Martins, arXiv 1906.07651).
    """
    if not chosen:
        return []
    embeddings, flow = model.mm_audio_embeddings, model.acoustic_transformer
    sequences = [torch.cat((heads[i], embeddings.frames(past[i][None])[0])) for i in chosen]
    hidden = model.teacher_forced(sequences)
    lengths = [past[i].shape[1] for i in chosen]
    states = torch.cat(
        [
            hidden[n, len(heads[i]) - 1 :][:length]
            for n, (i, length) in enumerate(zip(chosen, lengths, strict=True))
        ]
    )
    noise = torch.randn((len(states), flow.acoustic_dim), generator=rng).to(states)
    point = flow.flow(states, noise, steps=settings.own_steps).float().clamp(-1, 1)
    levels = ((point + 1) / 2 * (flow.levels - 1)).round().long() + N_SPECIAL_CODES
    return [part.T for part in levels.split(lengths)]


def initialize_language(model: Voxtral, seed: int) -> None:
    """Set normal weights: residual outputs scaled down with depth, the audio table so that 37 rows sum to
    unit scale."""
    rng = torch.Generator().manual_seed(seed)
    depth = 2 * model.config.backbone.n_layers
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("audio_tokenizer.") or p.dim() != 2:
                continue
            std = p.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= depth**0.5
            if "tok_embeddings" in name:
                std = 1.0
            if "audio_codebook_embeddings" in name:
                std = 37**-0.5
            if "codebook_output" in name:
                std *= 0.2
            p.copy_(torch.randn(p.shape, generator=rng) * std)
        # An acoustic level is a number: its rows start on a line, with enough noise that a sum of rows still
        # identifies every code.
        table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
        codec = model.config.codec
        for start in model.mm_audio_embeddings.audio_codebook_embeddings.offsets[1:].tolist():
            slope = torch.randn(table.shape[1], generator=rng) * 37**-0.5
            line = torch.linspace(-1.5, 1.5, codec.acoustic_codebook_size)[:, None] * slope
            first = start + N_SPECIAL_CODES
            rows = slice(first, first + codec.acoustic_codebook_size)
            table[rows] = 0.85 * line + 0.5 * table[rows]


class LanguageTrainer(Run):
    """One run over training data, validated on batches of other data, with log and state in `folder`."""

    def __init__(
        self,
        config: VoxtralConfig,
        settings: LanguageTraining,
        data: tuple[LanguageData, LanguageData | None],
        folder: Path,
        device: str = "cpu",
        autocast: bool = False,
        name: str = "language",
    ) -> None:
        super().__init__(name, settings, folder, device)
        self.settings, self.autocast = settings, autocast
        self.data, self.validation = data
        self.model = Voxtral(config, with_encoder=False)
        initialize_language(self.model, settings.seed)
        self.model.to(device)
        self.model.audio_tokenizer.requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [
            p
            for n, p in self.model.named_parameters()
            if p.requires_grad and p.dim() > 1 and "embeddings" not in n
        ]
        plain = [
            p
            for n, p in self.model.named_parameters()
            if p.requires_grad and (p.dim() <= 1 or "embeddings" in n)
        ]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )

        self.averaged = moving_average(self.model, settings.average) if settings.average else None

    def state(self) -> dict[str, Any]:
        """Everything but the codec, which is not trained here, with its average if there is one, and the
        optimizer."""
        own = {k: v for k, v in self.model.state_dict().items() if not k.startswith("audio_tokenizer.")}
        state = {"model": own, "optimizer": self.optimizer.state_dict()}
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        return state

    def begin(self, state: dict[str, Any]) -> None:
        """Start from the weights, and the optimizer's moments, in the saved state of another run."""
        self.load_state({key: value for key, value in state.items() if key != "averaged"})
        if self.averaged is not None:
            self.averaged = moving_average(self.model, self.settings.average)

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.model.load_state_dict(state["model"], strict=False)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None and "averaged" in state:
            self.averaged.load_state_dict(state["averaged"])

    def take_step(self) -> dict[str, float]:
        """One update; returns the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        items = self.data.batch(settings.batch, self.numpy_rng)
        reading = settings if self.step_count >= settings.own_from else replace(settings, own_share=0.0)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            losses = language_losses(self.model, items, self.data.tokens.audio, reading, self.rng)
        loss = losses["semantic"] + settings.flow * losses["flow"]
        if "alignment" in losses:
            loss = loss + settings.alignment * losses["alignment"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return {k: float(v.detach()) for k, v in losses.items()} | {
            "norm": float(norm),
            "loss": float(loss.detach()),
        }

    @torch.no_grad()
    def validate(self, size: int = 64) -> dict[str, float]:
        """Losses on fixed draws of the validation data, of the average if there is one."""
        if self.validation is None or not self.validation.utterances:
            return {}
        model = self.model if self.averaged is None else cast(Voxtral, self.averaged.module)
        numpy_rng, rng = np.random.default_rng(1), torch.Generator().manual_seed(1)
        items = self.validation.batch(size, numpy_rng)
        sums: dict[str, list[float]] = {}
        for i in range(0, size, 16):
            found = language_losses(
                model, items[i : i + 16], self.data.tokens.audio, self.settings, rng, training=False
            )
            for key, value in found.items():
                sums.setdefault(f"valid_{key}", []).append(float(value))
        return {k: round(float(np.mean(v)), 4) for k, v in sums.items()}
