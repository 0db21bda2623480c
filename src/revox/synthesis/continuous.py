"""The frame loop for speech that comes and goes: utterances join and leave a batch between two frames.

Each says what it says alone (`revox.synthesis.generate`), up to ties in the arithmetic's rounding: the rows
of a batch do not meet, only the order of sums may change with its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from revox.model.backbone import KVCache
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES, BackboneConfig
from revox.model.voxtral import Voxtral
from revox.synthesis.errors import SpeakError
from revox.synthesis.generate import DEFAULT_CFG, MAX_POSITIONS, check_settings, noise_of, room_for_speech

POSITIONS = 256
"""The cache grows by so many positions at a time."""


@dataclass(eq=False)
class Utterance:
    """One that takes part: its frames so far (ids `[37]` each, without the end frame), and how it ended.

    `ended`: the model ended by itself; `cut`: its room was used up. `room` is in frames, `cfg_alpha` the
    scale of its guidance.
    """

    room: int
    length: int
    noise: Tensor
    cfg_alpha: float = DEFAULT_CFG
    ids: list[Tensor] = field(default_factory=list)
    ended: bool = False
    cut: bool = False

    @property
    def done(self) -> bool:
        """It takes part no more."""
        return self.ended or self.cut

    def codes(self, start: int = 0) -> Tensor:
        """Codes `[37, frames]`, from 0, of the frames from `start` on; there must be one."""
        return torch.stack(self.ids[start:], dim=1) - N_SPECIAL_CODES


class ContinuousBatch:
    """Utterances spoken together. Not for several threads at once.

    Those that speak stand in the first slots of the cache and those that rest after them, so a step works on
    the cache as it lies; one slot is copied when somebody leaves. `step` may fail (memory, a broken device);
    it can then be tried again, or for one alone (`step_one`): no frame is lost by it.
    """

    def __init__(self, model: Voxtral, flow_steps: int | None = None) -> None:
        check_settings(DEFAULT_CFG, flow_steps, 0)
        self.model, self.flow_steps = model, flow_steps
        self.members: list[Utterance] = []
        self._speaking = 0
        self._pool = _Pool(model.config.backbone, model.dtype, model.device)
        self._hidden = torch.empty(0, model.config.backbone.dim, dtype=model.dtype, device=model.device)

    @property
    def speaking(self) -> list[Utterance]:
        """Those that the next step works on."""
        return self.members[: self._speaking]

    @property
    def count_speaking(self) -> int:
        """How many they are."""
        return self._speaking

    @property
    def cache_bytes(self) -> int:
        """What the cache of keys and values takes."""
        return 2 * self._pool.keys.nbytes

    @torch.inference_mode()
    def join(
        self, prompt: Tensor, seed: int, max_frames: int | None = None, cfg_alpha: float = DEFAULT_CFG
    ) -> Utterance:
        """Read a prompt `[time, dim]`; its utterance speaks from the next step on.

        Raises SpeakError when a setting is out of range or the prompt leaves no room to speak. Whatever is
        raised, the others are as they were.
        """
        check_settings(cfg_alpha, self.flow_steps, seed, max_frames)
        room = room_for_speech(len(prompt), max_frames)
        if room < 1:
            raise SpeakError(f"a prompt of {len(prompt)} positions leaves none of {MAX_POSITIONS} for speech")
        noise = noise_of(seed, self.model.config.codec.acoustic_dim)[:room]
        one = Utterance(room, len(prompt), noise.to(self.model.device, self.model.dtype), cfg_alpha)
        slot = len(self.members)
        self._pool.make_room(slot + 1, len(prompt) + 1)
        window = self._pool.window(slot, slot + 1, [0])
        hidden = self.model.backbone(prompt[None], window)[:, -1]
        self._hidden = torch.cat((self._hidden[:slot], hidden))
        self.members.append(one)
        try:
            self._swap(slot, self._speaking)
        except BaseException:
            self.members.pop()
            raise
        self._speaking += 1
        return one

    @torch.inference_mode()
    def rest(self, one: Utterance) -> None:
        """Leave `one` out of the steps until `wake`; it keeps its place in the cache."""
        slot = self.members.index(one)
        if slot < self._speaking:
            self._speaking -= 1
            self._swap(slot, self._speaking)

    @torch.inference_mode()
    def wake(self, one: Utterance) -> None:
        """Let `one` speak again."""
        slot = self.members.index(one)
        if slot >= self._speaking:
            self._swap(slot, self._speaking)
            self._speaking += 1

    @torch.inference_mode()
    def leave(self, one: Utterance) -> None:
        """Forget `one`, done or not."""
        if one not in self.members:
            return
        self.rest(one)
        slot, last = self.members.index(one), len(self.members) - 1
        self._swap(slot, last)
        self.members.pop()
        self._hidden = self._hidden[:last]
        if not self.members:
            self._pool.clear()

    @torch.inference_mode()
    def step(self) -> list[Utterance]:
        """One frame of everybody who speaks; those who end with it have left when this returns.

        Gives those who spoke (`Utterance.ids` has grown, or `ended` says that they are through).
        """
        return self._step(0, self._speaking)

    @torch.inference_mode()
    def step_one(self, one: Utterance) -> None:
        """One frame of `one`, who speaks, alone."""
        slot = self.members.index(one)
        self._step(slot, slot + 1)

    def _step(self, first: int, stop: int) -> list[Utterance]:
        spoke = self.members[first:stop]
        if not spoke:
            return []
        noise = torch.stack([one.noise[len(one.ids)] for one in spoke])
        alphas = torch.tensor([one.cfg_alpha for one in spoke], device=noise.device)
        ids = self.model.acoustic_transformer.frame(self._hidden[first:stop], noise, alphas, self.flow_steps)
        ended = [code == END_AUDIO_ID for code in ids[:, 0].tolist()]
        # Whoever goes on is fed its frame before anything is written down: a failure leaves all as it was.
        stays = [not end and len(one.ids) + 1 < one.room for one, end in zip(spoke, ended, strict=True)]
        if any(stays):
            self._pool.make_room(len(self.members), max(one.length for one in spoke) + 1)
            window = self._pool.window(first, stop, [one.length for one in spoke])
            # Those who leave are fed too: a batch of one row more costs less than copying the others' past.
            self._hidden[first:stop] = self.model.step(ids, window)
        for i, one in enumerate(spoke):
            one.length += 1
            if ended[i]:
                one.ended = True
            else:
                one.ids.append(ids[i])
                one.cut = not stays[i]
        for one in spoke:
            if one.done:
                self.leave(one)
        return spoke

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        self._pool.swap(a, b, max(self.members[a].length, self.members[b].length))
        self._hidden[[a, b]] = self._hidden[[b, a]]
        self.members[a], self.members[b] = self.members[b], self.members[a]


class _Pool:
    """Keys and values `[layers, slots, positions, kv_heads, head_dim]` that grow when they must."""

    def __init__(self, config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.keys, self.values = (self._empty(0, 0) for _ in range(2))

    def _empty(self, slots: int, positions: int) -> Tensor:
        config = self._config
        shape = (config.n_layers, slots, positions, config.n_kv_heads, config.head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def make_room(self, slots: int, positions: int) -> None:
        """Room for so many slots of so many positions; what is there stays."""
        _, have, reach, *_ = self.keys.shape
        if slots <= have and positions <= reach:
            return
        # Ends at the model's last position; a slot is added at a time: they are few, and large.
        reach = max(reach, -(-positions // POSITIONS) * POSITIONS)
        grown = []
        for old in (self.keys, self.values):
            new = self._empty(max(slots, have), reach)
            new[:, :have, : old.shape[2]] = old
            grown.append(new)
        self.keys, self.values = grown

    def window(self, first: int, stop: int, lengths: list[int]) -> KVCache:
        """Some slots, each filled to its length, as the backbone reads and writes them: nothing is copied."""
        window = object.__new__(KVCache)
        window.keys, window.values = self.keys[:, first:stop], self.values[:, first:stop]
        window.lengths = torch.tensor(lengths, dtype=torch.long, device=self._device)
        return window

    def swap(self, a: int, b: int, positions: int) -> None:
        """Exchange two slots, of which so many positions count."""
        # Both are kept before either is written: there may be no memory for the second.
        kept = [part[:, a, :positions].clone() for part in (self.keys, self.values)]
        for part, old in zip((self.keys, self.values), kept, strict=True):
            part[:, a, :positions] = part[:, b, :positions]
            part[:, b, :positions] = old
