"""A voice tuned: its embedding learns, by gradient through the frozen model, to say what its speaker said.

The backbone reads a voice embedding `[N, dim]` as it reads text, so the embedding can be learned as soft
prompts are (Lester et al., arXiv 2104.08691). Given the transcripts of the speaker's clips, it is moved
towards where the model finds their codes most likely: negative log-likelihood of the semantic codes and
flow-matching error of the acoustic ones (`revox.metrics.likelihood`). A change is counted in standard
deviations of what the embedding table can say, dimension by dimension, and pulled towards none. Clips that
are held out decide when to stop; the weights, and with them every other voice, stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revox.checkpoint.voices import Voice
from revox.cloning.clone import ClonedVoice
from revox.cloning.consent import Consent, provenance
from revox.cloning.errors import CloneError
from revox.metrics.likelihood import Likelihood, likelihood, prompt_likelihood
from revox.metrics.voice_embeddings import table_deviation
from revox.model.recompute import checkpointed_layers
from revox.model.voxtral import Voxtral
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import AudioError
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import Prompter, make_prompt

VALIDATION_DRAWS = 8
_AT_ONCE = 8  # replays that are spoken together


@dataclass(frozen=True)
class TuningClip:
    """One clip of the speaker: what is said, and its codes `[37, frames]` from 0."""

    text: str
    codes: Tensor


@dataclass(frozen=True)
class VoiceTuning:
    """How a voice is tuned.

    `minutes` of learning at most, `learning_rate` and `pull` in standard deviations of the embedding table's
    sums; `flow` is the weight of the acoustic codes beside the semantic ones; `batch` clips a step; every
    `validate_every` steps, and in the end, the held-out clips are scored; after `patience` scores without a
    gain it ends. `held_out` is the share of clips that are held out, at least one. With `replay` the model
    first says each clip's text in the voice that it begins with, and that is learned and scored as well, so
    that what the model can say in this voice stays.
    """

    minutes: float = 10.0
    steps: int = 4000
    learning_rate: float = 0.02
    pull: float = 0.02
    flow: float = 1.0
    batch: int = 4
    draws: int = 2
    validate_every: int = 10
    patience: int = 8
    held_out: float = 0.25
    replay: bool = True
    seed: int = 0


@dataclass(frozen=True)
class TuningScore:
    """Costs of the held-out clips and their replays: `semantic` in nats a frame, `flow` the velocity's mean
    squared error."""

    semantic: float
    flow: float

    def cost(self, settings: VoiceTuning) -> float:
        """What tuning lowers."""
        return self.semantic + settings.flow * self.flow


@dataclass(frozen=True, eq=False)
class Tuning:
    """The embedding `[N, dim]` bf16 that was best on the held-out clips, and their costs before and after.

    `steps` were taken in all, of which it is the one after `best_step`. `change` is the root mean square of
    its change in standard deviations, `concentration` the smallest share of dimensions that holds nine tenths
    of the squared change. `replays` are clips that the model said itself and that were learned as well.
    """

    embedding: Tensor
    before: TuningScore
    after: TuningScore
    steps: int
    best_step: int
    change: float
    concentration: float
    replays: int = 0

    @property
    def gained(self) -> bool:
        """Whether the held-out clips became more likely."""
        return self.best_step > 0

    def record(self) -> dict[str, Any]:
        """Its figures as plain values."""
        return {
            "before": asdict(self.before), "after": asdict(self.after), "steps_taken": self.steps,
            "best_step": self.best_step, "change": round(self.change, 4),
            "concentration": round(self.concentration, 4), "replays": self.replays,
        }  # fmt: skip


@dataclass(eq=False, kw_only=True)
class TunedVoice(Voice):
    """A tuned voice, how it was tuned, and the clips (by file name) that could not be used, with reasons."""

    tuning: Tuning
    left_out: dict[str, str]


@dataclass(frozen=True)
class TuningRequest:
    """What a voice is tuned to and how.

    `recordings` are files of one speaker, each with what is said in it. `start` is the voice to begin with,
    by default a clone of the recordings that it learns from.
    """

    recordings: Sequence[tuple[Path, str]]
    consent: Consent
    name: str
    start: Voice | None = None
    settings: VoiceTuning = VoiceTuning()


def tune_to_recordings(
    clone: Callable[[list[Path], str | None], ClonedVoice],
    model: Voxtral,
    prompter: Prompter,
    request: TuningRequest,
    *,
    progress: ProgressCallback = ignore_progress,
    should_stop: Callable[[], bool] | None = None,
) -> TunedVoice:
    """The voice that `request` asks for; its codes stay those it began with.

    `clone` makes a voice of files, whole where it is given a transcript. Raises CloneError with fewer than
    two recordings that can be used, or if nothing was gained, KeyboardInterrupt when stopped before tuning.
    """
    settings, start, count = request.settings, request.start, len(request.recordings)
    usable: list[tuple[Path, TuningClip, dict[str, Any]]] = []
    left_out: dict[str, str] = {}
    for done, (path, text) in enumerate(request.recordings, 1):
        if should_stop is not None and should_stop():  # there is nothing yet to keep
            raise KeyboardInterrupt
        try:
            found = clone([path], text)
        except AudioError as error:
            left_out[path.name] = str(error)
        else:
            assert found.codes is not None
            usable.append((path, TuningClip(text, found.codes), found.provenance["source"]))
        progress(Progress("coding the clips", done, count))
    if len(usable) < 2:
        why = "".join(f" ({file}: {reason})" for file, reason in list(left_out.items())[:1])
        raise CloneError(
            f"tuning learns from some clips and validates on others, and {len(usable)} of {count} can be "
            f"used{why}: give two or more clips of the speaker, each of up to 30 s"
        )
    rng = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(usable), generator=rng).tolist()
    share = max(1, round(settings.held_out * len(usable)))
    held_out, learned = [usable[i] for i in order[:share]], [usable[i] for i in order[share:]]
    if start is None:
        start = clone([path for path, _, _ in learned], None)
    tuning = tune_voice(
        model, prompter, start, [clip for _, clip, _ in learned], [clip for _, clip, _ in held_out], settings,
        progress=progress, should_stop=should_stop,
    )  # fmt: skip
    if not tuning.gained:
        raise CloneError(
            f"in {tuning.steps} steps no change of the voice made the held-out clips more likely: keep the "
            "voice that it began with, or give more clips and minutes"
        )
    record = provenance(request.consent, "tuned", {**asdict(settings), **tuning.record()})
    sources = [source for _, _, source in usable]
    record |= {"source": sources[0], "more_sources": sources[1:]}
    record["from"] = [{"voice": start.name, "record": start.provenance}]
    return TunedVoice(request.name, start.codes, tuning.embedding, record, tuning=tuning, left_out=left_out)


def tune_voice(
    model: Voxtral,
    prompter: Prompter,
    voice: Voice,
    learned: Sequence[TuningClip],
    held_out: Sequence[TuningClip],
    settings: VoiceTuning | None = None,
    *,
    progress: ProgressCallback = ignore_progress,
    should_stop: Callable[[], bool] | None = None,
) -> Tuning:
    """The embedding of `voice`, tuned to the clips `learned`; the clips `held_out` choose the step.

    Ends with the best so far when `should_stop` is true. `progress` counts steps; its facts are the best
    costs of the held-out clips. Raises CloneError for a voice of another model.
    """
    settings = settings or VoiceTuning()
    rng = torch.Generator().manual_seed(settings.seed)
    run = _Tuning(model, prompter, voice, settings)
    replayed: dict[int, TuningClip] = {}
    if settings.replay:
        clips = [*learned, *held_out]
        replayed = dict(_replays(model, prompter, voice, clips, settings.seed, progress, should_stop))
        held_out = [*held_out, *(one for i, one in replayed.items() if i >= len(learned))]
        learned = [*learned, *(one for i, one in replayed.items() if i < len(learned))]
    before = best = run.score(held_out)
    found, best_step, step, since = run.embedding().detach(), 0, 0, 0
    end = time.monotonic() + 60 * settings.minutes

    def ended() -> bool:
        over = step >= settings.steps or time.monotonic() >= end
        return over or (should_stop is not None and should_stop())

    def validate() -> None:
        nonlocal best, found, best_step, since
        score = run.score(held_out)
        since += 1
        if score.cost(settings) < best.cost(settings):
            best, found, best_step, since = score, run.embedding().detach(), step, 0
        facts = {"semantic": round(best.semantic, 4), "flow": round(best.flow, 4)}
        progress(Progress("tuning", step, settings.steps, facts))

    while since < settings.patience and not ended():
        chosen = torch.randperm(len(learned), generator=rng)[: settings.batch].tolist()
        run.step([learned[i] for i in chosen], int(torch.randint(2**31, (), generator=rng)))
        step += 1
        if step % settings.validate_every == 0:
            validate()
    if step % settings.validate_every:
        validate()
    change = (found.float() - run.start)[:-1] / run.deviation
    share = change.square().sum(0).sort(descending=True).values.cumsum(0)
    needed = int((share < 0.9 * share[-1]).sum()) + 1 if best_step else 0
    return Tuning(
        found.to("cpu", torch.bfloat16), before, best, step, best_step,
        float(change.square().mean().sqrt()), needed / len(share), len(replayed),
    )  # fmt: skip


def _replays(
    model: Voxtral,
    prompter: Prompter,
    voice: Voice,
    clips: Sequence[TuningClip],
    seed: int,
    progress: ProgressCallback,
    should_stop: Callable[[], bool] | None,
) -> Iterator[tuple[int, TuningClip]]:
    """Number and text of each clip as the model says it in `voice`, without those that take twice the clip's
    time and 2 s more, until `should_stop` is true."""
    engine = Engine(model)
    for start in range(0, len(clips), _AT_ONCE):
        if should_stop is not None and should_stop():
            return
        requests = []
        for i, clip in enumerate(clips[start : start + _AT_ONCE], start):
            prompt = make_prompt(model, prompter, clip.text, voice)
            longest = 2 * clip.codes.shape[1] + 25
            requests.append(Request(prompt.embeddings, seed + i, longest, prefix=prompt.voice_positions))
        for i, one in enumerate(engine.generate_batch(requests), start):
            if one.ended and one.frames:
                yield i, TuningClip(clips[i].text, one.codes())
        progress(Progress("replaying the clips", start + len(requests), len(clips)))


class _Tuning:
    """The embedding in training: `start + deviation * offset`, whose last row, the end frame, is fixed."""

    def __init__(self, model: Voxtral, prompter: Prompter, voice: Voice, settings: VoiceTuning) -> None:
        if voice.embedding.shape[1:] != (model.config.backbone.dim,):
            raise CloneError(
                f"voice {voice.name!r} has an embedding {list(voice.embedding.shape)}, this model reads "
                f"[N, {model.config.backbone.dim}]: make the voice again with this checkpoint"
            )
        self.model, self.prompter, self.settings = model, prompter, settings
        self.start = voice.embedding.to(model.device).float()
        self.deviation = table_deviation(model).clamp_min(1e-8)
        self.offset = torch.zeros_like(self.start[:-1]).requires_grad_()
        self.optimizer = torch.optim.Adam([self.offset], lr=settings.learning_rate, betas=(0.9, 0.98))

    def embedding(self) -> Tensor:
        """As it is stored: rounded to bf16, straight through."""
        exact = torch.cat((self.start[:-1] + self.deviation * self.offset, self.start[-1:]))
        return exact + (exact.to(torch.bfloat16).float() - exact).detach()

    def _prompt(self, text: str) -> Tensor:
        rows = self.embedding()
        tokens = torch.tensor(self.prompter.tokens(text, len(rows)), device=self.model.device)
        return self.model.embed_prompt(tokens, self.prompter.audio_token, rows.to(self.model.dtype))

    def step(self, clips: Sequence[TuningClip], seed: int) -> None:
        """One update. Clips are read one by one: memory is that of the longest."""
        settings = self.settings
        self.optimizer.zero_grad()
        with torch.enable_grad(), checkpointed_layers(self.model):
            for clip in clips:
                found = prompt_likelihood(
                    self.model, self._prompt(clip.text), clip.codes, draws=settings.draws, seed=seed
                )
                ((found.semantic_nll + settings.flow * found.flow_error) / len(clips)).backward()
            (settings.pull * self.offset.square().mean()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def score(self, clips: Sequence[TuningClip]) -> TuningScore:
        """Mean costs of `clips`, with the same noise at every call."""
        found: list[Likelihood] = [
            likelihood(self.model, self._prompt(clip.text), clip.codes, draws=VALIDATION_DRAWS)
            for clip in clips
        ]
        return TuningScore(
            float(torch.stack([one.semantic_nll for one in found]).mean()),
            float(torch.stack([one.flow_error for one in found]).mean()),
        )
