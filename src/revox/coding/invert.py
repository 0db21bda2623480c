"""The codes of one clip, found by gradient descent through the frozen decoder: cloning without an encoder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from revox.coding.objective import SCALES, SpectralTarget
from revox.coding.prior import starting_codes
from revox.coding.regularizers import Guidance, Regularizers, guidance_of_codes
from revox.model.codec import Codec
from revox.progress import Progress, ProgressCallback, ignore_progress

CHECK_EVERY = 10  # steps between evaluations of the hard codes while noise is on
TIMED_STEPS = 3
END_SHARE = 0.3  # of a level, by which the outermost levels start inside their ends; from 0.5 they are others
DESCENT_SHARE = 0.8  # of a budget in seconds; the rest is for the local search
STRETCH = 6  # frames that a trial of the local search changes one code in
CANDIDATES = 4  # trials in a round of the local search
NEIGHBORS = 16  # semantic codes tried in place of one

DESCENT, LOCAL_SEARCH = "descent", "local search"
"""The phases of a search, as `Progress.what` names them."""


@dataclass(frozen=True)
class InversionConfig:
    """How the search runs. The defaults take a clip of 6 s under 90 s on one core at the lab's size.

    The first `soft_share` of the `steps` of Adam see noisy, partly quantized codes; the rest see only hard
    ones. `local_search_rounds` of trying single codes follow. `seconds` shortens `steps` to what this machine
    does in that time: the number of steps is then measured and recorded. With `steps` alone the search is
    deterministic.
    """

    steps: int = 160
    seconds: float | None = None
    acoustic_rate: float = 0.3
    semantic_rate: float = 0.3  # in units of the codebook's standard deviation
    soft_share: float = 0.5
    first_temperature: float = 1.0  # in squared distances between neighboring semantic codes
    last_temperature: float = 0.1
    scales: tuple[tuple[int, int], ...] = SCALES
    stft_weight: float = 0.5
    prior_weight: float = 0.02
    posterior_weight: float = 0.1
    """Of staying near the initial posterior: nats a semantic code, deviations of an acoustic value."""
    guidance_weight: float = 0.05
    """Of language-model guidance: nats a semantic code, squared error of the velocity."""
    guidance_every: int = 4  # steps between evaluations of the language model
    local_search_rounds: int = 12
    patience: int = 60
    """Steps on hard codes without a better result before the descent ends."""
    chunk_frames: int = 375
    """A longer clip is searched in pieces of this many frames, each decoded after the end of the last."""

    def with_steps(self, steps: int) -> InversionConfig:
        """The same with so many `steps`, and the local search shortened in proportion."""
        share = min(1.0, steps / self.steps) if self.steps else 0.0
        return replace(self, steps=steps, local_search_rounds=round(self.local_search_rounds * share))


@dataclass(frozen=True)
class InversionResult:
    """What was found.

    `codes` `[37, frames]`, int64, from 0; `losses`, the best objective of hard codes at each check, so that
    the first is the start's and the last that of `codes` (of the last piece, for a clip in several);
    `steps` of descent taken, `seconds`, and whether it was `stopped` before it was done.
    """

    codes: Tensor
    losses: tuple[float, ...]
    steps: int
    seconds: float
    stopped: bool

    @property
    def loss(self) -> float:
        """The objective of `codes`."""
        return self.losses[-1]


def invert(
    codec: Codec,
    target: Tensor,
    *,
    config: InversionConfig | None = None,
    regularizers: Regularizers | None = None,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
    should_stop: Callable[[], bool] | None = None,
) -> InversionResult:
    """Codes whose decoded sound is near `target` `[samples]`, a whole number of frames at the codec's rate.

    The search starts at the initial posterior among the `regularizers`, where there is one, and otherwise at
    preset codes. Language-model guidance applies to a clip in one piece only.
    The codec's weights must be float32. Deterministic for one `seed`, `config.steps` and thread count.
    KeyboardInterrupt or a true `should_stop()` ends the search: the best codes so far are the result,
    `stopped`. Raises ValueError when the target is empty, not finite, or not a whole number of frames.
    """
    config, regularizers = config or InversionConfig(), regularizers or Regularizers()
    frame = codec.samples_per_frame
    whole = target.dim() == 1 and target.numel() > 0 and target.numel() % frame == 0
    if not whole or not bool(target.isfinite().all()):
        shape = list(target.shape)
        raise ValueError(f"a target is finite samples, a whole number of frames of {frame}; got {shape}")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    device = codec.output_proj.conv.weight.device
    target = target.detach().to(device, torch.float32)
    regularizers = regularizers.to(device)
    total = target.numel() // frame
    codes = torch.zeros((codec.config.n_codebooks, 0), dtype=torch.long, device=device)
    losses: list[float] = []
    steps, stopped = 0, False
    for first in range(0, total, config.chunk_frames):
        last = min(first + config.chunk_frames, total)
        before = codes[:, max(0, first - codec.left_context) :]
        seconds = None if config.seconds is None else config.seconds * (last - first) / total
        clock = _Clock(seconds, progress, should_stop)  # finding the start counts too
        piece = target[first * frame : last * frame]
        terms = regularizers.of_frames(first, last, total)
        search = _Search(codec, piece, before, config, terms, generator)
        stopped = stopped or search.run(clock)
        codes = torch.cat((codes, search.best_codes), dim=1)
        losses += search.losses
        steps += search.step
    return InversionResult(codes.cpu(), tuple(losses), steps, time.monotonic() - started, stopped)


class _Clock:
    """Time, progress and the wish to stop."""

    def __init__(
        self, seconds: float | None, progress: ProgressCallback, should_stop: Callable[[], bool] | None
    ) -> None:
        self.seconds, self.progress, self.should_stop = seconds, progress, should_stop
        self.started = time.monotonic()
        self.phase, self.phase_started = "", self.started

    def left(self) -> float:
        """Seconds left of the budget, infinite without one."""
        return math.inf if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def start(self, phase: str) -> None:
        self.phase, self.phase_started = phase, time.monotonic()

    def tick(self, step: int, steps: int, loss: float, best: float) -> bool:
        """Report one finished step; True when the search should stop."""
        per_step = (time.monotonic() - self.phase_started) / step
        left = min(per_step * (steps - step), max(0.0, self.left()))
        facts = {"loss": loss, "best": best, "seconds_left": left}
        self.progress(Progress(self.phase, step, steps, facts))
        return self.should_stop is not None and self.should_stop()


@dataclass(frozen=True)
class _Relaxed:
    """What the decoder is given, `latents` `[1, latent, frames]`, and the hard `codes` `[37, frames]` there.

    For the prior: `probabilities` `[frames, size]` of the semantic codes, acoustic `values` `[36, frames]`.
    """

    latents: Tensor
    codes: Tensor
    probabilities: Tensor
    values: Tensor


class _Search:
    """The search over one piece: the latents being moved, and the best hard codes so far."""

    def __init__(
        self,
        codec: Codec,
        target: Tensor,
        context: Tensor,
        config: InversionConfig,
        regularizers: Regularizers,
        generator: torch.Generator,
    ) -> None:
        self.codec, self.config, self.generator = codec, config, generator
        self.prior, self.posterior = regularizers.prior, regularizers.posterior
        self.guidance = regularizers.guidance
        self.objective = SpectralTarget(target, codec.config.sampling_rate, config.scales, config.stft_weight)
        self.table = codec.quantizer.semantic_codebook.embedding.detach().float()
        self.spread = self.table.std(dim=0).mean().clamp_min(1e-8)
        self.neighbor_distance = _neighbor_distance(self.table)
        self.top_level = codec.config.acoustic_codebook_size - 1
        self.level_step = 2 / self.top_level
        self.context = codec.quantizer.decode(context[None])  # latents of the frames before this piece
        self.samples = target.numel()
        self.step = 0
        self.losses: list[float] = []
        self.best = math.inf
        if self.posterior is None:
            start = starting_codes(codec, target, self.prior, generator)
        else:
            start = self.posterior.codes(codec.config.acoustic_codebook_size)
        self.best_codes = start
        self._update(start, float(self._loss_of_codes(start[None])[0]) + self._guidance_of_codes(start))
        self.semantic = (self.table[start[0]] / self.spread).requires_grad_()
        # Not at the very ends, where the tanh has no slope left, and within half a level of them.
        limit = 1 - END_SHARE * self.level_step
        values = codec.quantizer.acoustic_codebook.decode(start[1:]).clamp(-limit, limit)
        self.acoustic = torch.atanh(values).requires_grad_()

    def run(self, clock: _Clock) -> bool:
        """Descend, then search locally. True when told to stop, not when patience or budget ended it."""
        try:
            return self._descend(clock) or self._search_locally(clock)
        except KeyboardInterrupt:
            return True

    # -- from latents or codes to a loss

    def _decode(self, latents: Tensor) -> Tensor:
        """Waveform `[batch, samples]` of this piece's `latents` `[batch, latent, frames]`."""
        context = self.context.expand(latents.shape[0], -1, -1)
        return self.codec.decode_latents(torch.cat((context, latents), dim=2))[:, -self.samples :]

    def _relax(self, temperature: float, soft: bool) -> _Relaxed:
        """Forward the quantized input of the decoder, backward the soft versions (straight-through).

        While `soft`, a frame's semantic row is the hard one half of the time; its acoustic values are
        rounded half of the time, dithered a quarter and left alone a quarter (the paper's schedule for
        training the codec).
        """
        latents = self.semantic * self.spread
        distances = torch.cdist(latents, self.table).square()
        probabilities = functional.softmax(-distances / (temperature * self.neighbor_distance), dim=1)
        semantic_codes = distances.argmin(dim=1)
        mixed, row = probabilities @ self.table, self.table[semantic_codes]
        values = torch.tanh(self.acoustic)
        levels = ((values.detach() + 1) / self.level_step).round()
        quantized = levels * self.level_step - 1
        if soft:
            draws = self._uniform(2, len(latents))
            dither = (2 * self._uniform(*values.shape) - 1) / (self.top_level + 1)
            row = torch.where(draws[0, :, None] < 0.5, row, mixed)
            noisy = torch.where(draws[1] < 0.75, values + dither, values)
            quantized = torch.where(draws[1] < 0.5, quantized, noisy)
        given = torch.cat(((mixed + (row - mixed).detach()).T, values + (quantized - values).detach()))
        codes = torch.cat((semantic_codes[None], levels.long()))
        return _Relaxed(given[None], codes, probabilities, values)

    def _uniform(self, *shape: int) -> Tensor:
        # Drawn on the CPU, so that a seed means the same on every device.
        return torch.rand(shape, generator=self.generator).to(self.table.device)

    @torch.no_grad()
    def _loss_of_codes(self, codes: Tensor) -> Tensor:
        """The objective `[batch]` of hard `codes` `[batch, 37, frames]`."""
        waveform = self._decode(self.codec.quantizer.decode(codes))
        return self.objective.distance(waveform) + self._prior_of_codes(codes)

    def _prior_of_codes(self, codes: Tensor) -> Tensor:
        cost = torch.zeros(len(codes), device=codes.device)
        values = self.codec.quantizer.acoustic_codebook.decode(codes[:, 1:])
        if self.prior is not None:
            cost = cost + self.config.prior_weight * self.prior.cost_of_codes(codes[:, 0], values)
        if self.posterior is not None:
            far = self.posterior.cost_of_codes(codes[:, 0], values, self.top_level + 1)
            cost = cost + self.config.posterior_weight * far
        return cost

    @torch.no_grad()
    def _guidance_of_codes(self, codes: Tensor) -> float:
        """The language model's loss of hard `codes` `[37, frames]`, weighted."""
        if self.guidance is None:
            return 0.0
        return self.config.guidance_weight * guidance_of_codes(self.guidance, self.codec, codes)

    def _guides(self) -> bool:
        return self.step % self.config.guidance_every == 0

    def _soft_cost(self, relaxed: _Relaxed) -> Tensor | float:
        """What soft codes cost besides the distance."""
        cost: Tensor | float = 0.0
        if self.prior is not None:
            cost = cost + self.config.prior_weight * self.prior.cost(relaxed.probabilities, relaxed.values)
        if self.posterior is not None:
            far = self.posterior.cost(relaxed.probabilities, relaxed.values, self.top_level + 1)
            cost = cost + self.config.posterior_weight * far
        if self.guidance is not None and self._guides():
            cost = cost + self.config.guidance_weight * self.guidance(relaxed.probabilities, relaxed.values)
        return cost

    def _update(self, codes: Tensor, loss: float) -> bool:
        better = loss < self.best
        if better:
            self.best, self.best_codes = loss, codes.clone()
        self.losses.append(self.best)
        return better

    # -- descent

    def _descend(self, clock: _Clock) -> bool:
        config, steps = self.config, self.config.steps
        reserve = 0.0  # seconds for the local search
        if clock.seconds is not None:
            left = clock.left()
            reserve = (1 - DESCENT_SHARE) * left
            steps = min(steps, self._steps_within(left - reserve))
        rates = (config.acoustic_rate, config.semantic_rate)
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": r} for p, r in zip((self.acoustic, self.semantic), rates, strict=True)],
            betas=(0.9, 0.95),
        )
        cooling = config.last_temperature / config.first_temperature
        since_better = 0
        clock.start(DESCENT)
        for i in range(steps):
            done = i / max(1, steps - 1)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
            soft = done < config.soft_share
            relaxed = self._relax(config.first_temperature * cooling**done, soft)
            distance = self.objective.distance(self._decode(relaxed.latents))[0]
            loss = distance + self._soft_cost(relaxed)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not soft and (self.guidance is None or self._guides()):
                # What was decoded are the hard codes: their distance is at hand.
                of_codes = float(distance.detach() + self._prior_of_codes(relaxed.codes[None])[0])
                better = self._update(relaxed.codes, of_codes + self._guidance_of_codes(relaxed.codes))
                evaluated_every = 1 if self.guidance is None else config.guidance_every
                since_better = 0 if better else since_better + evaluated_every
            elif soft and i % CHECK_EVERY == CHECK_EVERY - 1:
                of_codes = float(self._loss_of_codes(relaxed.codes[None])[0])
                self._update(relaxed.codes, of_codes + self._guidance_of_codes(relaxed.codes))
            self.step += 1
            if clock.tick(i + 1, steps, float(loss.detach()), self.best):
                return True
            if since_better >= config.patience or clock.left() <= reserve:
                break
        return False

    def _steps_within(self, seconds: float) -> int:
        """How many steps fit, from the time of a few that are then forgotten."""
        state = self.generator.get_state()
        taken = [self._time_step(None) for _ in range(TIMED_STEPS)]
        step = min(taken)  # the first one also pays for caches and memory
        if self.guidance is not None:
            taken.append(self._time_step(self.guidance))
            step += max(0.0, taken[-1] - step) / self.config.guidance_every
        self.acoustic.grad = self.semantic.grad = None
        self.generator.set_state(state)
        return max(1, int((seconds - sum(taken)) / step))

    def _time_step(self, guidance: Guidance | None) -> float:
        """Seconds of one step; with `guidance` of one that has it, and compares hard codes by it."""
        started = time.monotonic()
        relaxed = self._relax(1.0, True)
        loss = self.objective.distance(self._decode(relaxed.latents)).sum()
        if guidance is not None:
            loss = loss + guidance(relaxed.probabilities, relaxed.values)
        loss.backward()
        float(self.acoustic.detach().flatten()[0])  # waits for a graphics card, as a step does
        if guidance is not None:
            self._guidance_of_codes(relaxed.codes)
        return time.monotonic() - started

    # -- local search

    def _search_locally(self, clock: _Clock) -> bool:
        """Try single codes where the gradient promises most, in all stretches at once; keep what helps."""
        codec, quantizer = self.codec, self.codec.quantizer
        frames = self.best_codes.shape[1]
        tried = torch.zeros((frames, 2 * codec.config.acoustic_dim + NEIGHBORS), dtype=torch.bool)
        clock.start(LOCAL_SEARCH)
        for i in range(self.config.local_search_rounds):
            if clock.left() <= 0:
                break
            latents = quantizer.decode(self.best_codes[None]).requires_grad_()
            waveform = self._decode(latents)
            (slope,) = torch.autograd.grad(self.objective.distance(waveform).sum(), latents)
            # Other borders every round.
            borders = range(-(i * 3 % STRETCH), frames, STRETCH)
            stretches = [(max(0, b), min(frames, b + STRETCH)) for b in borders]
            candidates = self._candidates(slope[0], stretches, tried)
            with torch.no_grad():
                decoded = self._decode(quantizer.decode(candidates))
                now = self.objective.distance_in_time(waveform.detach(), frames)
                then = self.objective.distance_in_time(decoded, frames)
                combined = self.best_codes.clone()
                for first, last in stretches:
                    # A code changes its own frame and the next one most.
                    error = then[:, first : last + 1].sum(dim=1)
                    if error.min() < now[0, first : last + 1].sum():
                        combined[:, first:last] = candidates[int(error.argmin()), :, first:last]
                trials = torch.cat((combined[None], candidates))
                decoded = torch.cat((self._decode(quantizer.decode(combined[None])), decoded))
                losses = self.objective.distance(decoded) + self._prior_of_codes(trials)
            chosen, before = int(losses.argmin()), self.best_codes
            if self._update(trials[chosen], float(losses[chosen]) + self._guidance_of_codes(trials[chosen])):
                tried[(before != self.best_codes).any(dim=0).cpu()] = False
            if clock.tick(i + 1, self.config.local_search_rounds, float(losses[0]), self.best):
                return True
        return False

    def _candidates(self, slope: Tensor, stretches: list[tuple[int, int]], tried: Tensor) -> Tensor:
        """Variants `[CANDIDATES, 37, frames]` of the best codes with one new code in each stretch.

        The most promising moves are in the first variant. All are marked in `tried` `[frames, moves]`.
        """
        gains, neighbors = self._promise(slope)
        gains = gains.cpu().masked_fill(tried, -math.inf)
        n_moves, n_acoustic = gains.shape[1], self.codec.config.acoustic_dim
        candidates = self.best_codes.repeat(CANDIDATES, 1, 1)
        for first, last in stretches:
            order = gains[first:last].flatten().argsort(descending=True, stable=True)
            for candidate, place in zip(candidates, order.tolist(), strict=False):
                frame, move = first + place // n_moves, place % n_moves
                if gains[frame, move] == -math.inf:
                    break
                tried[frame, move] = True
                if move < 2 * n_acoustic:
                    candidate[1 + move % n_acoustic, frame] += 1 if move >= n_acoustic else -1
                else:
                    candidate[0, frame] = neighbors[frame, move - 2 * n_acoustic]
        return candidates

    def _promise(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The gain of each move from the best codes to first order in `slope` `[latent, frames]`:
        `[frames, moves]`.

        Moves are each acoustic level down, each up, and the semantic code to one of its neighbors, which
        are the second result, `[frames, NEIGHBORS]`.
        """
        codes, dim = self.best_codes, self.table.shape[1]
        by_semantic, by_acoustic = slope[:dim].T, slope[dim:].T * self.level_step
        levels = codes[1:].T
        down = by_acoustic.masked_fill(levels == 0, -math.inf)
        up = (-by_acoustic).masked_fill(levels == self.top_level, -math.inf)
        row = self.table[codes[0]]
        distances = torch.cdist(row, self.table).scatter(1, codes[0, :, None], math.inf)
        count = min(NEIGHBORS, len(self.table) - 1)
        neighbors = distances.topk(count, largest=False).indices
        gains = -torch.einsum("fnd,fd->fn", self.table[neighbors] - row[:, None], by_semantic)
        gains = functional.pad(gains, (0, NEIGHBORS - count), value=-math.inf)
        return torch.cat((down, up, gains), dim=1), neighbors


def _neighbor_distance(table: Tensor) -> Tensor:
    """The median squared distance from a semantic code's row to its nearest neighbor: a scalar."""
    some = table[:1024]
    nearest = torch.cdist(some, table).square().kthvalue(min(2, len(table)), dim=1).values
    nearest = nearest[nearest > 0]  # not between rows that coincide
    return nearest.median() if len(nearest) else torch.ones((), device=table.device)
