"""The language model adapted to embeddings that it does not take for a voice, with the presets unharmed.

An encoder can reconstruct perfectly and still give embeddings that the backbone reads otherwise than a
preset's. Two objectives change the model (`revox.training.deltas`): `distill` asks for the hidden states,
semantic distribution and velocity that the untouched model has with a preset's own embedding, where the
prompt holds the restored encoder's embedding of the same preset's speech; `speech` asks for the likelihood
of a speaker's clips after another stretch of the speaker. Every batch replays presets, whose outputs are to
stay those of the untouched model. A guard measures that on held-out sentences (`Guard`), and a run without an
objective, `replay`, is the control.

A map of voice embeddings (part "map", objective `speech`) leaves the weights and the presets bit-identical:
there is nothing to replay, and its control is the untouched model.

Clips can become likelier while speech falls apart or loses the voice (docs/adaptation.md), so the guard has
the changed model speak as well; the untouched one reads which text that is, and a verifier, where there is
one, whose voice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.checkpoint.adapter import Adapter
from revox.metrics.likelihood import likelihood, prompt_likelihood
from revox.model.config import N_SPECIAL_CODES
from revox.model.recompute import checkpointed_layers
from revox.model.voxtral import Voxtral
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import Prompter
from revox.training.deltas import Deltas, Part
from revox.training.errors import TrainingError
from revox.training.run import Run
from revox.training.speaker import SpeakerLoss

Objective = Literal["distill", "speech", "replay"]
MAP_LEARNING_RATE = 2e-3
"""Of a map, whose unit is a standard deviation of voice embeddings: more than a change of weights bears."""
SCALES = (1.0, 0.75, 0.5, 0.25)
"""At which a change is tried when it is merged, the largest first."""
SPOKEN = 24
"""Held-out items that the guard has spoken, at most; once by the untouched model and once at each scale."""
_SILENCE = 10.0  # nats a frame, for a text of which nothing is said


@dataclass(frozen=True)
class AdaptTraining:
    """Settings of one run. `batch` items of the objective and `replay` presets a step.

    `hidden`, `semantic` and `flow` weigh the parts of distillation. `agreement`, `nats`, `spoken` and
    `similarity` are the guard's thresholds: the least share of equal semantic codes, the largest change of
    likelihood, by how many nats a frame new speech may be less likely, and by how much its voice may be less
    like the reference's, beyond a standard error (docs/adaptation.md has what they are set by).
    """

    part: Part = "lora"
    objective: Objective = "distill"
    rank: int = 4
    steps: int = 300
    batch: int = 2
    replay: int = 2
    learning_rate: float = 2e-4
    warmup: int = 20
    decay_steps: int = 100
    hidden: float = 1.0
    semantic: float = 1.0
    flow: float = 1.0
    agreement: float = 0.98
    nats: float = 0.02
    spoken: float = 0.1
    similarity: float = 0.01
    seed: int = 0
    save_every: int = 50

    @property
    def changes_weights(self) -> bool:
        """Whether presets can be harmed."""
        return self.part != "map"


@dataclass(frozen=True)
class AdaptItem:
    """One utterance after a voice: its `text` and `codes` `[37, frames]`.

    `voice` are the codes `[37, n]` of the reference in the prompt; `own` the rows `[n + 1, dim]` of the
    preset's own embedding, None where the speaker has none.
    """

    text: str
    codes: Tensor
    voice: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class AdaptData:
    """Items of the objective, presets to replay (items with their `own` rows), and held-out ones of both."""

    items: Sequence[AdaptItem]
    replay: Sequence[AdaptItem]
    held_out_items: Sequence[AdaptItem]
    held_out_replay: Sequence[AdaptItem]


@dataclass(frozen=True)
class Guard:
    """Beside the untouched model: presets on held-out sentences, teacher-forced, as the share of equal
    semantic codes and the change of their likelihood in nats a frame; and new speech in held-out voices
    (`NewSpeech`), as the nats a frame by which it is less likely, and the change of its similarity with the
    standard error of that over the items, both 0 without a verifier."""

    agreement: float
    nats: float
    spoken: float = 0.0
    similarity: float = 0.0
    similarity_error: float = 0.0

    def holds(self, settings: AdaptTraining) -> bool:
        """Whether the presets are unharmed, and the model still says what it is given to say, as it did."""
        unharmed = self.agreement >= settings.agreement and self.nats <= settings.nats
        alike = self.similarity + self.similarity_error >= -settings.similarity
        return unharmed and self.spoken <= settings.spoken and alike


@dataclass(frozen=True)
class NewSpeech:
    """Held-out texts spoken after their voices: nats a frame of the codes to the untouched model, the mean,
    and each one's cosine `[items]` with the decoded codes of its voice by the verifier, 0 without one."""

    nats: float
    similarity: Tensor


class AdaptTrainer(Run):
    """A run on a loaded model, whose own weights stay frozen. With a `verifier` the guard compares voices."""

    def __init__(
        self,
        model: Voxtral,
        prompter: Prompter,
        settings: AdaptTraining,
        data: AdaptData,
        folder: Path,
        verifier: SpeakerLoss | None = None,
    ) -> None:
        super().__init__("adapt", settings, folder, str(model.device))
        if settings.changes_weights and not (data.replay and data.held_out_replay):
            raise TrainingError(
                "an adaptation replays the presets, and the checkpoint spoke with none of them"
            )
        if settings.objective != "replay" and not (data.items and data.held_out_items):
            raise TrainingError("there is too little speech to adapt to: give more clips with transcripts")
        self.model, self.prompter, self.settings, self.data = model, prompter, settings, data
        self.deltas = Deltas.on(model, settings.part, settings.rank, settings.seed)
        self.verifier = verifier
        self._spoken: dict[float, NewSpeech] = {}
        self.optimizer = torch.optim.AdamW(
            self.deltas.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def state(self) -> dict[str, Any]:
        """The changes and their optimizer."""
        return {"deltas": self.deltas.state(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.deltas.load_state(state["deltas"])
        self.optimizer.load_state_dict(state["optimizer"])

    def take_step(self) -> dict[str, float]:
        """One update; returns the losses. Items are read one by one: memory is that of the longest."""
        settings = self.settings
        self._spoken.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        sums = {"objective": 0.0, "replay": 0.0}
        parts: list[tuple[str, Sequence[AdaptItem], int, bool]] = []
        if settings.changes_weights:
            parts.append(("replay", self.data.replay, settings.replay, True))
        if settings.objective != "replay":
            parts.append(("objective", self.data.items, settings.batch, False))
        with checkpointed_layers(self.model):
            for name, items, count, own in parts:
                for _ in range(count):
                    item = items[int(torch.randint(len(items), (), generator=self.rng))]
                    seed = int(torch.randint(2**31, (), generator=self.rng))
                    if own or settings.objective == "distill":
                        loss = self.distillation(item, own, seed)
                    else:
                        loss = self.cost(item, seed)
                    (loss / count).backward()
                    sums[name] += float(loss.detach()) / count
        norm = nn.utils.clip_grad_norm_(self.deltas.parameters(), 1.0)
        self.optimizer.step()
        return sums | {"norm": float(norm), "loss": sum(sums.values())}

    def _voice(self, item: AdaptItem, own: bool) -> Tensor:
        if own:
            assert item.own is not None
            return item.own.to(self.model.device)
        rows = self.model.mm_audio_embeddings.voice_embedding(item.voice.to(self.model.device))
        return self.deltas.mapped(rows)

    def _prompt(self, item: AdaptItem, own: bool) -> Tensor:
        rows = self._voice(item, own)
        tokens = torch.tensor(self.prompter.tokens(item.text, len(rows)), device=self.model.device)
        return self.model.embed_prompt(tokens, self.prompter.audio_token, rows)

    def _outputs(self, item: AdaptItem, own: bool) -> tuple[list[Tensor], Tensor]:
        """Hidden states `[frames + 1, dim]` after every layer where frames are read, the normed last among
        them; and semantic log-probabilities `[frames + 1, rows]`."""
        prompt = self._prompt(item, own)
        ids = item.codes.to(self.model.device) + N_SPECIAL_CODES
        rows = self.model.mm_audio_embeddings.frames(ids[None])[0]
        with _layer_outputs(self.model) as states:
            hidden = self.model.teacher_forced([torch.cat((prompt, rows.to(prompt.dtype)))])
        found = [state[0, len(prompt) - 1 :] for state in (*states, hidden)]
        return found, self.model.acoustic_transformer.semantic_logits(found[-1]).log_softmax(-1)

    def distillation(self, item: AdaptItem, own: bool, seed: int) -> Tensor:
        """The distance of the model's outputs from the untouched model's with the preset's own embedding.

        Hidden states as a share of the target's variance, mean over layers; Kullback-Leibler divergence of
        the semantic codes, nats; mean squared difference of the velocities. With `own` rows both read the
        same prompt (replay).
        """
        with torch.no_grad(), self.deltas.scaled(0.0):
            wanted, target = self._outputs(item, True)
            aim = self._velocity(item, wanted[-1], seed)
        states, found = self._outputs(item, own)
        hidden = torch.stack(
            [
                (a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-6)
                for a, b in zip(states, wanted, strict=True)
            ]
        ).mean()
        known = target.isfinite()
        divergence = functional.kl_div(
            found.masked_fill(~known, 0.0),
            target.masked_fill(~known, -1e4),
            reduction="none",
            log_target=True,
        )
        flow = (self._velocity(item, states[-1], seed) - aim).square().mean()
        settings = self.settings
        return settings.hidden * hidden + settings.semantic * divergence.sum(-1).mean() + settings.flow * flow

    def _velocity(self, item: AdaptItem, hidden: Tensor, seed: int) -> Tensor:
        """Velocity `[frames, 36]` at a noisy point of each frame, the same for one `seed`."""
        rng = torch.Generator().manual_seed(seed)
        values = self.model.audio_tokenizer.quantizer.acoustic_codebook.decode(
            item.codes[1:].to(self.model.device)
        ).T.float()
        noise = torch.randn(values.shape, generator=rng).to(values.device)
        times = torch.rand(len(values), generator=rng).to(values.device)
        point = noise + (values - noise) * times[:, None]
        dtype = self.model.dtype
        return self.model.acoustic_transformer.velocity(
            point.to(dtype), times.to(dtype), hidden[:-1].to(dtype)
        ).float()

    def cost(self, item: AdaptItem, seed: int) -> Tensor:
        """Semantic negative log-likelihood, nats a frame, and `flow` times the flow-matching error."""
        prompt = self._prompt(item, False)
        found = prompt_likelihood(self.model, prompt, item.codes, draws=2, seed=seed)
        return found.semantic_nll + self.settings.flow * found.flow_error

    @torch.no_grad()
    def held_out_cost(self, scale: float) -> float:
        """Mean cost of the held-out items at `scale`: their likelihood, whatever the objective."""
        found = []
        for item in self.data.held_out_items:
            with self.deltas.scaled(scale):
                prompt = self._prompt(item, False)
                one = likelihood(self.model, prompt, item.codes, draws=4)
            found.append(float(one.semantic_nll + self.settings.flow * one.flow_error))
        return sum(found) / len(found) if found else 0.0

    @torch.no_grad()
    def guard(self, scale: float) -> Guard:
        """The presets at `scale` on held-out sentences, and new speech."""
        agreement, nats = self._preset_change(scale) if self.settings.changes_weights else (1.0, 0.0)
        before, after = self.new_speech(0.0), self.new_speech(scale)
        change = after.similarity - before.similarity
        error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
        return Guard(agreement, nats, after.nats - before.nats, float(change.mean()), error)

    def _preset_change(self, scale: float) -> tuple[float, float]:
        agreement, nats = [], []
        for item in self.data.held_out_replay:
            ids = item.codes[0].to(self.model.device) + N_SPECIAL_CODES
            rows = []
            for one in (0.0, scale):
                with self.deltas.scaled(one):
                    _, found = self._outputs(item, True)
                rows.append(found[:-1])
            agreement.append(float((rows[0].argmax(-1) == rows[1].argmax(-1)).float().mean()))
            before, after = (-row.gather(1, ids[:, None]).mean() for row in rows)
            nats.append(float(after - before))
        return sum(agreement) / len(agreement), sum(nats) / len(nats)

    @torch.no_grad()
    def new_speech(self, scale: float) -> NewSpeech:
        """What the model says at `scale`: up to `SPOKEN` held-out texts, each after its voice.

        Speech that no longer says its text is unlikely to the untouched model, which reads the codes after
        text and voice: no recognizer is needed. Zeros without items; remembered until the next step.
        """
        items = self.data.held_out_items[:SPOKEN]
        if scale not in self._spoken:
            with self.deltas.scaled(scale):
                requests = [
                    Request(self._prompt(item, False), 0, 2 * item.codes.shape[1] + 25) for item in items
                ]
                spoken = Engine(self.model).generate_batch(requests)
            nats, similarity = [0.0] * (not items), [0.0] * (not items)  # no items, no cost
            with self.deltas.scaled(0.0):
                for item, one in zip(items, spoken, strict=True):
                    nats.append(self._nats(item, one.codes()) if one.frames else _SILENCE)
                    similarity.append(self._similarity(item, one.codes()) if one.frames else 0.0)
            self._spoken[scale] = NewSpeech(sum(nats) / len(nats), torch.tensor(similarity))
        return self._spoken[scale]

    def _nats(self, item: AdaptItem, codes: Tensor) -> float:
        return float(likelihood(self.model, self._prompt(item, False), codes, draws=1).semantic_nll)

    def _similarity(self, item: AdaptItem, codes: Tensor) -> float:
        if self.verifier is None:
            return 0.0
        device, codec = self.model.device, self.model.audio_tokenizer
        speech, voice = (codec.decode(one[None].to(device)).float() for one in (codes, item.voice))
        return float(self.verifier.similarity(speech, voice))

    def largest_scale(self, progress: ProgressCallback = ignore_progress) -> tuple[float, Guard]:
        """The largest of `SCALES` at which the guard holds, and that guard; 0 if there is none."""
        for tried, scale in enumerate(SCALES):
            progress(Progress("guarding: scales tried", tried, len(SCALES)))
            guard = self.guard(scale)
            if guard.holds(self.settings):
                return scale, guard
        return 0.0, guard


@contextmanager
def _layer_outputs(model: Voxtral) -> Iterator[list[Tensor]]:
    """Collects the outputs `[batch, time, dim]` of the backbone's layers, in order."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for layer in model.backbone.layers:
            handle = layer.register_forward_hook(lambda _module, _given, made: found.append(made))
            stack.callback(handle.remove)
        yield found


@dataclass(frozen=True)
class Decision:
    """What came of an adaptation: the held-out cost before, after it and after the control, at `scale`.

    `spread` is the largest difference between seeds of either. The change is worth having if it gains more
    over the control than that; `tensors` are then the merged weights by the release's names, `adapter` the
    factors if it is of low rank, and `voice_map` those of a map (up and down), else none.
    """

    scale: float
    guard: Guard
    before: float
    after: float
    control: float
    spread: float
    tensors: dict[str, Tensor]
    adapter: Adapter | None = None
    voice_map: tuple[Tensor, Tensor] | None = None

    @property
    def adapt(self) -> bool:
        """Whether to change the model; otherwise it is better left alone."""
        return self.scale > 0 and self.control - self.after > self.spread


def decide(
    trainer: Callable[[AdaptTraining, str], AdaptTrainer],
    settings: AdaptTraining,
    seeds: int,
    report: Callable[[str, dict[str, float]], None],
    progress: ProgressCallback = ignore_progress,
) -> Decision:
    """Train the adaptation and its control with `seeds` seeds each and compare them on held-out items.

    A map has no control to train: it is compared with the untouched model.

    `trainer` gives the run of those settings, with a name, at its last state. The first seed's change is the
    one to merge, at the largest scale that its guard allows. `report` gets names and figures, `progress` what
    the guard tries.
    """
    costs: dict[str, list[float]] = {"adapt": []}
    if settings.changes_weights:
        costs["replay"] = []
    before, scale, guard = 0.0, 0.0, Guard(0.0, 0.0)
    tensors, adapter, voice_map = dict[str, Tensor](), None, None
    for seed in range(seeds):
        for name in costs:
            given = replace(settings, seed=settings.seed + seed)
            if name == "replay":
                given = replace(given, objective="replay")
            run = trainer(given, f"{name}-{seed}")
            run.run(partial(report, f"{name}-{seed}"), report_every=10, validate_every=given.steps)
            if not seed and name == "adapt":
                scale, guard = run.largest_scale(progress)
                before, adapter = run.held_out_cost(0.0), run.deltas.adapter(scale)
                voice_map = run.deltas.voice_map(scale)
                tensors = run.deltas.merged(run.model, scale) if scale else {}
            costs[name].append(run.held_out_cost(scale or SCALES[-1]))
            run.deltas.remove(run.model)
    spread = max(max(found) - min(found) for found in costs.values())
    control = sum(costs["replay"]) / seeds if settings.changes_weights else before
    found = Decision(scale, guard, before, costs["adapt"][0], control, spread, tensors, adapter, voice_map)
    return found if found.adapt else replace(found, tensors={}, adapter=None, voice_map=None)
