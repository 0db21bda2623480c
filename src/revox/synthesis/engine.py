"""The one frame loop: a prompt becomes frames of codes, and codes become audio.

Requests join, pause, resume and leave between two frames, and each says what it says alone, up to ties in the
arithmetic's rounding: the rows of a batch do not meet, only the order of sums may change with its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from revox.model.backbone import KVCache
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES
from revox.model.decoder_state import DecoderState
from revox.model.voxtral import FrameInputs, Voxtral
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio
from revox.synthesis.errors import SpeakError
from revox.synthesis.frame_graphs import FrameGraphs, bucket_of
from revox.synthesis.prefix_cache import PrefixCache, prefix_key

MAX_POSITIONS = 4096
"""Prompt and speech together, as in serving."""
MAX_FRAMES = 2048
"""New frames, as in serving: 164 s."""
CFG_RANGE = (0.0, 10.0)
FLOW_STEPS_RANGE = (1, 100)
DEFAULT_CFG = 1.2
FIRST_CHUNK = 5
CHUNK = 25


def chunk_ends(first: int = FIRST_CHUNK) -> Iterator[int]:
    """Frames at which the chunks of a stream end: 5, 10, 20, 40, 65, 90 ..., or other ones from `first` on.

    So audio starts early and then costs less: a chunk is as long as all before it, up to 25 frames.
    """
    end = first
    while True:
        yield end
        end += min(end, CHUNK)


def noise_of(seed: int, acoustic_dim: int) -> Tensor:
    """The noise of a whole speech, `[MAX_FRAMES, acoustic_dim]`, float32, from a seed.

    Always drawn at full length, on the CPU and in float32: neither the batch, the device, the dtype nor the
    limit on the frames changes what a seed says.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(MAX_FRAMES, acoustic_dim, generator=generator, device="cpu", dtype=torch.float32)


def check_ranges(seed: int, cfg_alpha: float, max_frames: int | None, flow_steps: int | None = None) -> None:
    """Raise SpeakError when what is asked of the model is out of range."""
    low, high = CFG_RANGE
    if not (math.isfinite(cfg_alpha) and low <= cfg_alpha <= high):
        raise SpeakError(
            f"cfg {cfg_alpha:g} is out of range: {low:g} to {high:g} is possible, {DEFAULT_CFG:g} is usual"
        )
    if not -(2**63) <= seed < 2**64:
        raise SpeakError(f"the seed {seed} is out of range: take a whole number below 2^64")
    if max_frames is not None and max_frames < 1:
        raise SpeakError("the longest duration allowed is below one frame (80 ms); allow more")
    first, last = FLOW_STEPS_RANGE
    if flow_steps is not None and not first <= flow_steps <= last:
        raise SpeakError(
            f"{flow_steps} flow steps are out of range: {first} to {last} are possible, 7 are usual"
        )


@dataclass(frozen=True)
class Request:
    """A prompt `[time, dim]` to speak, and how.

    `seed` decides between equally good ways of saying it, `max_frames` (of 80 ms) is the longest that it may
    take, `min_frames` the shortest (the model's end before it is passed over; 0 is what serving does),
    `cfg_alpha` the scale of classifier-free guidance, where 1 is none. The first `prefix` positions of the
    prompt are its voice's: requests that share them read them once. `flow_steps`: Euler steps for a frame's
    acoustic codes; None is the checkpoint's own.
    Raises SpeakError when a value is out of range or the prompt leaves no room to speak.
    """

    prompt: Tensor
    seed: int = 0
    max_frames: int | None = None
    cfg_alpha: float = DEFAULT_CFG
    min_frames: int = 0
    prefix: int = 0
    flow_steps: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self.seed, self.cfg_alpha, self.max_frames, self.flow_steps)
        if self.room < 1:
            raise SpeakError(
                f"a prompt of {len(self.prompt)} positions leaves none of {MAX_POSITIONS} for speech"
            )

        if not 0 <= self.prefix < len(self.prompt):
            raise SpeakError(
                f"a shared prefix of {self.prefix} positions is not the beginning of a prompt of "
                f"{len(self.prompt)}; leave at least one position after it"
            )

    @property
    def room(self) -> int:
        """Frames that it may speak; 0 or less when the prompt is too long."""
        return min(MAX_FRAMES, MAX_POSITIONS - len(self.prompt), self.max_frames or MAX_FRAMES)


@dataclass(eq=False)
class Generation:
    """A request in the engine: its frames so far, and how it ended.

    `frames` are ids `[37]`, without the end frame. `ended`: the model ended by itself; `truncated`: it met
    the limit on its length. `hidden` `[dim]` is the state from which the next frame is read, None until the
    last frame is fed to the backbone. `decoder` is the codec's state after the `decoded` first frames, None
    before them and once everything is decoded.
    """

    request: Request
    noise: Tensor
    hidden: Tensor | None = None
    frames: list[Tensor] = field(default_factory=list)
    ended: bool = False
    truncated: bool = False
    decoder: DecoderState | None = None
    decoded: int = 0

    @property
    def done(self) -> bool:
        """No further frame comes."""
        return self.ended or self.truncated

    def codes(self, start: int = 0) -> Tensor:
        """Codes `[37, frames]`, from 0, of the frames from `start` on."""
        if len(self.frames) <= start:
            return torch.zeros((self.noise.shape[1] + 1, 0), dtype=torch.long, device=self.noise.device)
        return torch.stack(self.frames[start:], dim=1) - N_SPECIAL_CODES


@dataclass(frozen=True)
class Speech:
    """Audio, `truncated` when it met the limit on its length, and its codes `[37, frames]` from 0."""

    audio: Audio
    codes: Tensor


class Engine:
    """Runs the frames of everything that is spoken together. Not for several threads at once.

    The speaking generations have the first slots of the cache and the paused ones those after them, so a step
    works on the cache where it lies. `step` may fail (no memory, a broken device); it can then be repeated,
    for all or for one of them: no frame is lost.

    `prefixes`: the beginnings of prompts that are known from before; by default those that this engine
    reads. `graphs`: frames run in fixed shapes, on CUDA as graphs; off until that has run on a card.
    """

    def __init__(self, model: Voxtral, prefixes: PrefixCache | None = None, graphs: bool = False) -> None:
        self.model = model
        self.prefixes = PrefixCache() if prefixes is None else prefixes
        self._graphs = FrameGraphs(model) if graphs else None
        self.generations: list[Generation] = []
        self.count_speaking = 0
        self.cache = self._empty_cache()

    def _empty_cache(self) -> KVCache:
        return KVCache.empty(self.model.config.backbone, 0, 0, self.model.dtype, self.model.device)

    @property
    def speaking(self) -> list[Generation]:
        """Those that the next step works on."""
        return self.generations[: self.count_speaking]

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> list[Generation]:
        """Read the prompts of `requests`, which speak from the next step on.

        Whatever is raised, the others are as they were.
        """
        if not requests:
            return []
        keys = [prefix_key(one.prompt[: one.prefix]) if one.prefix else None for one in requests]
        # One request of each new prefix first: the others continue what it reads.
        new = [key for key in keys if key is not None and key not in self.prefixes]
        leading = [keys.index(key) for key in dict.fromkeys(new)]
        joined: dict[int, Generation] = {}
        try:
            for group in (leading, [i for i in range(len(requests)) if i not in leading]):
                if group:
                    generations = self._join([requests[i] for i in group], [keys[i] for i in group])
                    joined.update(zip(group, generations, strict=True))
        except BaseException:
            for generation in joined.values():
                self.leave(generation)
            raise
        return [joined[i] for i in range(len(requests))]

    def _join(self, requests: Sequence[Request], keys: Sequence[bytes | None]) -> list[Generation]:
        """Read what is not known of the prompts of `requests`, in one batch; `keys` are their prefixes'."""
        model, first = self.model, len(self.generations)
        stop = first + len(requests)
        prefixes = [None if key is None else self.prefixes.get(key) for key in keys]
        starts = [0 if prefix is None else prefix.shape[2] for prefix in prefixes]
        rests = [request.prompt[start:] for request, start in zip(requests, starts, strict=True)]
        # The shorter rests are padded to the longest.
        self.cache.reserve(stop, max(starts) + max(map(len, rests)) + 1)
        window = self.cache.window(first, stop)
        window.lengths.zero_()
        for slot, prefix in enumerate(prefixes):
            if prefix is not None:
                window.write(slot, prefix)
        hidden = model.prefill(rests, window)
        for slot, (request, key) in enumerate(zip(requests, keys, strict=True)):
            if key is not None and prefixes[slot] is None:
                self.prefixes.put(key, window.read(slot, request.prefix))
        joined = []
        for request, state in zip(requests, hidden, strict=True):
            noise = noise_of(request.seed, model.config.codec.acoustic_dim)[: request.room]
            joined.append(Generation(request, noise.to(model.device, model.dtype), state))
        self.cache.lengths[first:stop] = window.lengths
        self.generations += joined
        try:
            for generation in joined:
                self.resume(generation)
        except BaseException:
            for generation in joined:
                self.leave(generation)
            raise
        return joined

    @torch.inference_mode()
    def pause(self, generation: Generation) -> None:
        """Leave `generation` out of the steps until `resume`; it keeps its place in the cache."""
        slot = self.generations.index(generation)
        if slot < self.count_speaking:
            self._swap(slot, self.count_speaking - 1)
            self.count_speaking -= 1

    @torch.inference_mode()
    def resume(self, generation: Generation) -> None:
        """Let `generation` speak again."""
        slot = self.generations.index(generation)
        if slot >= self.count_speaking:
            self._swap(slot, self.count_speaking)
            self.count_speaking += 1

    @torch.inference_mode()
    def leave(self, generation: Generation) -> None:
        """Forget `generation`, done or not. Needs no memory."""
        if generation not in self.generations:
            return
        slot = self.generations.index(generation)
        if slot < self.count_speaking:
            self.count_speaking -= 1
            self._move(self.count_speaking, slot)
            slot = self.count_speaking
        self._move(len(self.generations) - 1, slot)
        self.generations.pop()
        if not self.generations:
            self.cache = self._empty_cache()

    @torch.inference_mode()
    def step(self, only: Generation | None = None) -> list[Generation]:
        """One frame of everybody who speaks, or of one of them; those who are done with it leave.

        Returns those who took part: `frames` has grown, or `ended` says that there is no more.
        """
        first, stop = 0, self.count_speaking
        if only is not None:
            first = self.generations.index(only)
            stop = first + 1
        taking_part = self.generations[first:stop]
        if not taking_part:
            return []
        steps = {one.request.flow_steps for one in taking_part}
        in_one_graph = self._graphs is not None and only is None and len(steps) == 1
        if in_one_graph and all(one.hidden is None for one in taking_part):
            ids = self._in_one_graph(taking_part)
        else:
            ids = self._frames(taking_part, self._hidden_states(first, stop))
        ended = (ids[:, 0] == END_AUDIO_ID).tolist()
        for one, frame, end in zip(taking_part, ids, ended, strict=True):
            one.hidden = None
            if end:
                one.ended = True
            else:
                one.frames.append(frame)
                one.truncated = len(one.frames) == len(one.noise)
        for one in taking_part:
            if one.done:
                self.leave(one)
        return taking_part

    def _frames(self, taking_part: Sequence[Generation], hidden: Tensor) -> Tensor:
        """Ids `[slots, 37]` of the next frames, read at `hidden` `[slots, dim]`; equal steps in one batch."""
        noise, alphas, may_end = self._settings(taking_part)
        groups: dict[int | None, list[int]] = {}
        for slot, one in enumerate(taking_part):
            groups.setdefault(one.request.flow_steps, []).append(slot)
        frame = self.model.acoustic_transformer.frame
        if len(groups) == 1:
            return frame(hidden, noise, alphas, next(iter(groups)), may_end)
        ids = torch.empty((len(taking_part), noise.shape[1] + 1), dtype=torch.long, device=hidden.device)
        for steps, slots in groups.items():
            ids[slots] = frame(hidden[slots], noise[slots], alphas[slots], steps, may_end[slots])
        return ids

    def _settings(self, taking_part: Sequence[Generation]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the next frames: noise `[slots, 36]`, scale of guidance `[slots]`, and which may be the end."""
        noise = torch.stack([one.noise[len(one.frames)] for one in taking_part])
        alphas = torch.tensor([one.request.cfg_alpha for one in taking_part], device=noise.device)
        may_end = [len(one.frames) >= one.request.min_frames for one in taking_part]
        return noise, alphas, torch.tensor(may_end, device=noise.device)

    def _in_one_graph(self, taking_part: Sequence[Generation]) -> Tensor:
        """Ids `[slots, 37]` of the next frames of the first slots, none of which is just read.

        The batch is filled up to its bucket with the slots that follow. What is written there lies where
        their own next position will be written.
        """
        assert self._graphs is not None
        slots = len(taking_part)
        bucket = bucket_of(slots)
        taken = len(self.generations)
        self.cache.reserve(max(bucket, taken), int(self.cache.lengths[:taken].max()) + 1)
        positions = self.cache.lengths[:bucket].clamp(max=self.cache.capacity - 1)
        last = [one.frames[-1] for one in taking_part]
        noise, alphas, may_end = self._settings(taking_part)
        inputs = FrameInputs(
            torch.stack(last + last[:1] * (bucket - slots)),
            positions.to(noise.device),
            functional.pad(noise, (0, 0, 0, bucket - slots)),
            functional.pad(alphas, (0, bucket - slots)),
            functional.pad(may_end, (0, bucket - slots)),
        )
        ids = self._graphs(inputs, self.cache, taking_part[0].request.flow_steps)[:slots]
        self.cache.lengths[:slots] += 1
        return ids

    def _hidden_states(self, first: int, stop: int) -> Tensor:
        """States `[slots, dim]` to read frames from; the last frames that are not yet fed are fed now."""
        slot = first
        for fed, neighbors in groupby(self.generations[first:stop], key=lambda one: one.hidden is not None):
            group = list(neighbors)
            if not fed:
                self.cache.reserve(len(self.generations), int(self.cache.lengths[first:stop].max()) + 1)
                window = self.cache.window(slot, slot + len(group))
                hidden = self.model.feed_frames(torch.stack([one.frames[-1] for one in group]), window)
                self.cache.lengths[slot : slot + len(group)] = window.lengths
                for one, state in zip(group, hidden, strict=True):
                    one.hidden = state
            slot += len(group)
        return torch.stack([one.hidden for one in self.generations[first:stop] if one.hidden is not None])

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.cache.swap(a, b)
            self.generations[a], self.generations[b] = self.generations[b], self.generations[a]

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.cache.copy(source, target)
            self.generations[target] = self.generations[source]

    def generate_batch(
        self, requests: Sequence[Request], progress: ProgressCallback = ignore_progress
    ) -> list[Generation]:
        """Speak `requests` together, each to its end. `progress` counts frames."""
        joined, frames = self.join(requests), 0
        frame_rate = self.model.config.codec.frame_rate
        try:
            while not all(one.done for one in joined):
                self.step()
                frames += 1
                progress(Progress("speaking", frames, facts={"seconds": frames / frame_rate}))
        finally:
            for one in joined:
                self.leave(one)
        return joined

    def speak(self, request: Request, progress: ProgressCallback = ignore_progress) -> Speech:
        """Speak one request to its end."""
        [one] = self.generate_batch([request], progress)
        return Speech(self._audio(one), one.codes())

    def stream(self, request: Request) -> Iterator[Audio]:
        """Speak one request and give its audio while it is made, in chunks that end as `chunk_ends` says.

        Laid end to end the chunks are what `speak` gives; the last one is `truncated` where that is.
        """
        [one] = self.join([request])
        ends = chunk_ends()
        end = next(ends)
        try:
            while not one.done:
                self.step()
                if len(one.frames) > one.decoded and (one.done or len(one.frames) >= end):
                    yield self._audio(one)
                    end = next(ends)
        finally:
            self.leave(one)

    def _audio(self, one: Generation) -> Audio:
        [samples] = self.decode([one])
        return Audio(samples.cpu().numpy(), self.model.config.codec.sampling_rate, truncated=one.truncated)

    @torch.inference_mode()
    def decode(self, generations: Sequence[Generation]) -> list[Tensor]:
        """Samples `[samples]`, float32, of each one's frames that are not decoded yet; never clipped.

        Those with equally many such frames are decoded together. When it fails it can be repeated, for all or
        for some of them.
        """
        codec = self.model.audio_tokenizer
        groups: dict[int, list[Generation]] = {}
        for one in generations:
            groups.setdefault(len(one.frames) - one.decoded, []).append(one)
        samples: dict[Generation, Tensor] = {}
        states: dict[Generation, DecoderState] = {}
        for group in groups.values():
            state = DecoderState.stack([one.decoder or codec.empty_state() for one in group])
            codes = torch.stack([one.codes(one.decoded) for one in group])
            samples.update(zip(group, codec.decode(codes, state).float(), strict=True))
            states.update(zip(group, state.split(), strict=True))
        for one in generations:
            one.decoder, one.decoded = None if one.done else states[one], len(one.frames)
        return [samples[one] for one in generations]
