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
from torch import Tensor, nn
from torch.nn import functional

from lab.language_data import SYMBOLS, LanguageData, TrainingItem
from revox.model.backbone import BackboneAttention
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES, CodecConfig, VoxtralConfig
from revox.model.embedding import voice_ids
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
    """Frames of a batch from which the flow is learned."""
    drop_hidden: float = 0.1
    flow: float = 1.0
    flow_draws: int = 3
    guidance: float = 0.5
    temperature: float = 1.0
    """Part of the acoustic codes' deviation from what is expected (`Readout.acoustic`) that the model learns
    to draw. With less, what it draws is more probable, and the same words sound the same. Below 1 it learns
    the acoustic codes of the semantic code that it will choose, its likeliest, whichever was spoken."""
    own_share: float = 0.5
    own_from: int = 0
    """The step from which the model is fed its own past; until then a step costs a third less."""
    own_steps: int = 4
    own_semantic: float = 0.0
    """Of the frames of its own past, the share whose semantic code is its own too."""
    alignment: float = 0.0
    """Weight of guided attention (Tachibana et al., arXiv 1710.08969, with -log of the attention that is in
    its place): at each frame, in `aligned_layers`, the first head is to look where in the text the speech is,
    and the first of the second half of the heads to where the word ends, whose state has read all of it."""
    aligned_layers: tuple[int, ...] = (1, 3)
    alignment_width: float = 1.5
    """Deviation that is allowed, in tokens."""
    symbols: float = 0.0
    """Weight of the cross-entropy of the synthesizer's phoneme in each frame (`Readout.symbols`)."""
    expected: float = 1.0
    """Weight of the squared error of the acoustic codes that are expected, where there is a `temperature`."""
    spliced: float = 0.0
    """Share of sequences made of several utterances (`LanguageData`)."""
    neighbors: int = 0
    """How many semantic codes around the true one, itself included, are right in part (`code_neighbors`): a
    sound is many codes of a fine codebook, and the likeliest code alone may be of another. 0 is the true one
    alone."""
    token_noise: float = 0.05
    frame_noise: float = 0.0
    """Share of past frames that are replaced by another of the same speech, so that what was said before
    tells less than the text."""
    preset_share: float = 0.3
    human_share: float = 0.3
    speakers: float = 1.0
    """Share of the training speakers that are learned from, beside the presets: for curves."""
    speech: float = 1.0
    """Share of each speaker's utterances that are learned from, two at least: for curves."""
    average: float = 0.0
    """Decay of the moving average of the weights (`revox.training.average`), which is validated and shipped.
    0 is none. If a resumed state has no average, it starts at that step."""
    seed: int = 0
    save_every: int = 500
    report_every: int = 50
    validate_every: int = 500


class Readout(nn.Module):
    """What is read from the hidden state of each frame beside the model, in training only: the synthesizer's
    phoneme (logits `[n, SYMBOLS]`), and the acoustic values that go with a semantic code.

    `book` float `[codes, size]` is the codec's semantic codebook in units of its standard deviation (zeros
    until it is set), not part of the state.
    """

    book: Tensor

    def __init__(self, dim: int, codec: CodecConfig) -> None:
        super().__init__()
        self.symbols = nn.Linear(dim, SYMBOLS)
        self.expected = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, codec.acoustic_dim)
        )
        self.semantic = nn.Linear(codec.semantic_dim, 2 * dim, bias=False)
        nn.init.zeros_(self.semantic.weight)
        book = torch.zeros(codec.semantic_codebook_size, codec.semantic_dim)
        self.register_buffer("book", book, persistent=False)

    def acoustic(self, states: Tensor, codes: Tensor) -> Tensor:
        """Acoustic values `[n, 36]` that are expected of `states` `[n, dim]` in frames of the semantic
        `codes` `[n]`.

        An engine draws the acoustic codes of a state without knowing the semantic code. But it always takes
        the likeliest, which the state settles, so the model can learn what goes with it.
        """
        first, activation, last = self.expected
        return cast(Tensor, last(activation(first(states) + self.semantic(self.book[codes]))))


def code_neighbors(book: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each code of `book` `[codes, size]` the `count` nearest, itself first: codes int64 and shares
    `[codes, count]`.

    Shares fall with the squared distance, to exp(-1/2) at that of the nearest other code (the mean over all
    codes), and sum to 1.
    """
    distances = torch.cat([torch.cdist(part, book) for part in book.split(512)]).square()
    nearest, codes = distances.topk(min(max(count, 2), len(book)), largest=False)
    width = nearest[:, 1:2].mean().clamp_min(1e-9)
    return codes[:, :count], (-nearest[:, :count] / width / 2).softmax(-1)


def _neighborly(logits: Tensor, wanted: Tensor, neighbors: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of ids `wanted` `[n]`, the semantic ones among them with a share of their neighbors'."""
    codes, shares = neighbors
    scores = logits.log_softmax(-1)
    code = wanted - N_SPECIAL_CODES
    special = code < 0
    around = scores.gather(-1, codes[code.clamp_min(0)] + N_SPECIAL_CODES)
    soft = (around * shares[code.clamp_min(0)]).sum(-1)
    return -torch.where(special, scores.gather(-1, wanted[:, None])[:, 0], soft).mean()


def likeliest_codes(logits: Tensor) -> Tensor:
    """Semantic codes `[n]` that an engine takes for frames of `logits` `[n, ids]`."""
    return logits.index_fill(-1, torch.tensor([END_AUDIO_ID]).to(logits.device), -torch.inf).argmax(-1) - (
        N_SPECIAL_CODES
    )


def language_losses(
    model: Voxtral,
    items: list[TrainingItem],
    audio_token: int,
    settings: LanguageTraining,
    rng: torch.Generator,
    training: bool = True,
    readout: Readout | None = None,
    neighbors: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses of a batch: `semantic` (nats a frame, the end included), `flow` (mean squared error of the
    velocity) and `accuracy` of the semantic code; `alignment` if the settings ask for it, with `readout`
    `symbols` and, below a temperature of 1, `expected`, and with `neighbors` (`code_neighbors`) `around`, to
    be learned in place of `semantic`."""
    device = model.device
    embeddings = model.mm_audio_embeddings
    heads, past, starts, targets = [], [], [], []
    # One look-up for all: each would have a gradient of the whole table.
    references = [voice_ids(torch.from_numpy(item.reference.astype(np.int64)).to(device)) for item in items]
    voices = embeddings.frames(torch.cat(references, dim=1)[None])[0].split([r.shape[1] for r in references])
    for item, rows in zip(items, voices, strict=True):
        target = torch.from_numpy(item.codes.astype(np.int64)).to(device)
        tokens = torch.tensor(item.prompt, device=device)
        heads.append(model.embed_prompt(tokens, audio_token, rows))
        past.append(target + N_SPECIAL_CODES)
        starts.append(len(item.prompt) - 1)
        targets.append(target)
    if training:
        replaced = [i for i in range(len(items)) if torch.rand((), generator=rng) < settings.own_share]
        # What the model is fed when it speaks (scheduled sampling in two passes: Mihaylova and Martins,
        # arXiv 1906.07651).
        own = predicted_ids(
            model, [heads[i] for i in replaced], [past[i] for i in replaced], rng, settings, readout
        )
        for i, ids in zip(replaced, own, strict=True):
            past[i] = ids
        past = [_corrupted(model, ids, settings, rng) for ids in past]
    spoken = embeddings.frames(torch.cat(past, dim=1)[None])[0].split([ids.shape[1] for ids in past])
    sequences = [torch.cat(parts) for parts in zip(heads, spoken, strict=True)]
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
    codes = torch.cat([target[0] for target in targets])
    taken = likeliest_codes(
        torch.cat([part[:-1] for part in logits.detach().split([len(s) for s in states])])
    )
    levels = model.config.codec.acoustic_codebook_size - 1
    draws, goal = settings.flow_draws, points * 2 / levels - 1
    losses: dict[str, Tensor] = {}
    if readout is not None and settings.temperature < 1:
        expected = readout.acoustic(frames, codes)
        losses["expected"] = functional.mse_loss(expected, goal)
        with torch.no_grad():
            goal = readout.acoustic(frames, taken) + settings.temperature * (goal - expected)
    if training and len(goal) > settings.acoustic_frames:
        chosen = torch.randperm(len(goal), generator=rng)[: settings.acoustic_frames].to(device)
        frames, goal = frames[chosen], goal[chosen]
    # Several flow times per frame for one pass of the backbone: the acoustic head is where words were lost,
    # and it is cheap. The times of one frame's draws are stratified over [0, 1].
    frames, goal = frames.repeat(draws, 1), goal.repeat(draws, 1)
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
    losses |= {
        "semantic": functional.cross_entropy(logits, wanted),
        "flow": functional.mse_loss(velocity, wanted_velocity),
        "accuracy": (logits.argmax(-1) == wanted).float().mean(),
    }
    if neighbors is not None:
        losses["around"] = _neighborly(logits.float(), wanted, neighbors)
    if aligned:
        losses["alignment"] = _alignment_loss(model, seen, items, settings.alignment_width)
    known = [i for i, item in enumerate(items) if item.symbols is not None]
    if readout is not None and known:
        found = readout.symbols(torch.cat([states[i][:-1] for i in known]))
        symbols = np.concatenate([item.symbols for item in items if item.symbols is not None])
        goals = torch.from_numpy(symbols.astype(np.int64)).to(device)
        losses["symbols"] = functional.cross_entropy(found, goals, ignore_index=0)
    return losses


@contextmanager
def _attention_inputs(
    model: Voxtral, layers: Sequence[int]
) -> Iterator[list[tuple[BackboneAttention, Tensor, Tensor]]]:
    """Collects the attention modules of `layers` with their inputs and rotations."""
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
    items: Sequence[TrainingItem],
    width: float,
) -> Tensor:
    """-log of the share of attention that is near its place, mean over frames and heads.

    The heads are the first of all and the first of the second half, for the rows of `TrainingItem.places`.
    """
    size = model.config.backbone.head_dim
    losses = []
    for attention, x, turn in seen:
        for row, head in enumerate((0, attention.n_heads // 2)):
            shared = head * attention.n_kv_heads // attention.n_heads
            wq = attention.wq.weight[head * size : (head + 1) * size]
            wk = attention.wk.weight[shared * size : (shared + 1) * size]
            q = rotate_interleaved(functional.linear(x, wq)[:, :, None], turn)[:, :, 0]
            k = rotate_interleaved(functional.linear(x, wk)[:, :, None], turn)[:, :, 0]
            for i, item in enumerate(items):
                if item.places is None:
                    continue
                start, stop = len(item.prompt) - 1, item.positions
                scores = (q[i, start:stop] @ k[i, :stop].T / size**0.5).float()
                ahead = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).triu(start + 1)
                attended = scores.masked_fill(ahead, -torch.inf).softmax(-1)
                place = torch.from_numpy(item.places[row]).to(attended)
                near = torch.arange(stop, device=scores.device) - place[:, None]
                near = torch.exp(-((near / width) ** 2) / 2)
                losses.append(-((attended * near).sum(-1) + 1e-6).log().mean())
    return torch.stack(losses).mean() if losses else seen[0][1].new_zeros(())


def _corrupted(model: Voxtral, ids: Tensor, settings: LanguageTraining, rng: torch.Generator) -> Tensor:
    """Ids `[37, frames]` with a share of codes and of frames replaced at random, because the model's own past
    has errors too."""
    codec, frames = model.config.codec, ids.shape[1]
    if settings.frame_noise > 0:
        moved = torch.rand(frames, generator=rng) < settings.frame_noise
        other = torch.randint(frames, (frames,), generator=rng)
        ids = ids[:, torch.where(moved, other, torch.arange(frames)).to(ids.device)]
    if settings.token_noise > 0:
        sizes = [codec.semantic_codebook_size] + [codec.acoustic_codebook_size] * (len(ids) - 1)
        wrong = torch.rand(ids.shape, generator=rng) < settings.token_noise
        random = (
            torch.rand(ids.shape, generator=rng) * torch.tensor(sizes)[:, None]
        ).long() + N_SPECIAL_CODES
        ids = torch.where(wrong.to(ids.device), random.to(ids.device), ids)
    return ids


@torch.no_grad()
def predicted_ids(
    model: Voxtral,
    heads: Sequence[Tensor],
    past: Sequence[Tensor],
    rng: torch.Generator,
    settings: LanguageTraining,
    readout: Readout | None = None,
) -> list[Tensor]:
    """Ids `[37, frames]` that the model predicts of each frame, given the true ones before it.

    heads: embeddings of the prompts. past: the true ids. A share `own_semantic` of the semantic codes is the
    model's own; with `readout` and a temperature below 1, frames of the true ones get the acoustic codes that
    are expected with them.
    """
    if not heads:
        return []
    if settings.temperature >= 1:
        readout = None  # it has not learned what is expected
    embeddings, flow = model.mm_audio_embeddings, model.acoustic_transformer
    spoken = embeddings.frames(torch.cat(list(past), dim=1)[None])[0].split([ids.shape[1] for ids in past])
    sequences = [torch.cat(parts) for parts in zip(heads, spoken, strict=True)]
    hidden = model.teacher_forced(sequences)
    lengths = [ids.shape[1] for ids in past]
    starts = [len(head) - 1 for head in heads]
    states = torch.cat(
        [hidden[i, start : start + n] for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    )
    codes = torch.cat([ids[0] for ids in past]) - N_SPECIAL_CODES
    mine = (torch.rand(len(codes), generator=rng) < settings.own_semantic).to(codes.device)
    points = torch.zeros((len(states), flow.acoustic_dim), device=states.device)
    if readout is not None:
        points = readout.acoustic(states, codes).float()
    drawn = mine if readout is not None else torch.ones_like(mine)
    if drawn.any():
        noise = torch.randn((int(drawn.sum()), flow.acoustic_dim), generator=rng).to(states)
        points[drawn] = flow.flow(states[drawn], noise, steps=settings.own_steps).float()
    levels = ((points.clamp(-1, 1) + 1) / 2 * (flow.levels - 1)).round().long()
    codes = torch.where(mine, likeliest_codes(flow.semantic_logits(states)), codes)
    found = torch.cat((codes[:, None], levels), dim=1) + N_SPECIAL_CODES
    return [part.T for part in found.split(lengths)]


@torch.no_grad()
def predicted_codes(
    model: Voxtral,
    items: Sequence[TrainingItem],
    audio_token: int,
    rng: torch.Generator,
    settings: LanguageTraining,
    readout: Readout | None = None,
) -> list[np.ndarray]:
    """Codes int16 `[37, frames]` of each item's frames: the true semantic ones, and the acoustic ones that
    the model predicts with them, given the true frames before each (ground-truth aligned, as vocoders are
    tuned on them: Shen et al., arXiv 1712.05884)."""
    heads, past = [], []
    for item in items:
        rows = model.mm_audio_embeddings.voice_embedding(torch.from_numpy(item.reference.astype(np.int64)))
        heads.append(model.embed_prompt(torch.tensor(item.prompt), audio_token, rows))
        past.append(torch.from_numpy(item.codes.astype(np.int64)) + N_SPECIAL_CODES)
    found = predicted_ids(model, heads, past, rng, replace(settings, own_semantic=0.0), readout)
    return [(ids - N_SPECIAL_CODES).numpy().astype(np.int16) for ids in found]


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


@torch.no_grad()
def place_semantic_rows(model: Voxtral, book: Tensor, seed: int) -> None:
    """Start the semantic codes' embeddings and output rows as drawn linear maps of the codec's codebook
    `[codes, size]` (in units of its deviation), so that what is learned of a code holds for those like it.

    Their scale is as `initialize_language` sets it; a tenth of that is drawn for each row by itself.
    """
    rng = torch.Generator().manual_seed(seed)
    places = slice(N_SPECIAL_CODES, N_SPECIAL_CODES + len(book))
    tables = (
        model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight,
        model.acoustic_transformer.semantic_codebook_output.weight,
    )
    for table in tables:
        rows = table[places]
        spread = float(rows.std())
        drawn = torch.randn((book.shape[1], rows.shape[1]), generator=rng).to(rows) * book.shape[1] ** -0.5
        table[places] = spread * (book.to(rows) @ drawn) + 0.1 * rows


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
    ) -> None:
        super().__init__("language", settings, folder, device)
        self.settings, self.autocast = settings, autocast
        self.data, self.validation = data
        self.model = Voxtral(config, with_encoder=False)
        initialize_language(self.model, settings.seed)
        self.model.to(device)
        self.model.audio_tokenizer.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            readout = Readout(config.backbone.dim, config.codec).to(device)
        self.readout = readout if settings.symbols or settings.temperature < 1 else None
        self.neighbors: tuple[Tensor, Tensor] | None = None
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
        if self.readout is not None:
            self.parameters += self.readout.parameters()
            plain += self.readout.parameters()
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

    def use_codebook(self, book: Tensor) -> None:
        """Take the codec's semantic codebook `[codes, size]`, in units of its deviation."""
        place_semantic_rows(self.model, book, self.settings.seed)
        if self.readout is not None:
            self.readout.book.copy_(book)
        if self.settings.neighbors:
            self.neighbors = code_neighbors(book.to(self.device), self.settings.neighbors)

    def state(self) -> dict[str, Any]:
        """Everything but the codec, which is not trained here, with its average if there is one, and the
        optimizer."""
        own = {k: v for k, v in self.model.state_dict().items() if not k.startswith("audio_tokenizer.")}
        state = {"model": own, "optimizer": self.optimizer.state_dict()}
        if self.readout is not None:
            state["readout"] = self.readout.state_dict()
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned. An average that the state lacks starts with the loaded weights."""
        self.model.load_state_dict(state["model"], strict=False)
        if self.readout is not None and "readout" in state:
            self.readout.load_state_dict(state["readout"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged = moving_average(self.model, self.settings.average)
            if "averaged" in state:
                self.averaged.load_state_dict(state["averaged"])

    def take_step(self) -> dict[str, float]:
        """One update; returns the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        items = self.data.batch(settings.batch, self.numpy_rng)
        reading = settings if self.step_count >= settings.own_from else replace(settings, own_share=0.0)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            losses = language_losses(
                self.model, items, self.data.tokens.audio, reading, self.rng, readout=self.readout,
                neighbors=self.neighbors,
            )  # fmt: skip
        loss = losses.get("around", losses["semantic"]) + settings.flow * losses["flow"]
        for name in ("alignment", "symbols", "expected"):
            if name in losses:
                loss = loss + getattr(settings, name) * losses[name]
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
            part = items[i : i + 16]
            found = language_losses(
                model, part, self.data.tokens.audio, self.settings, rng, False, self.readout, self.neighbors
            )
            for key, value in found.items():
                sums.setdefault(f"valid_{key}", []).append(float(value))
        return {k: round(float(np.mean(v)), 4) for k, v in sums.items()}
