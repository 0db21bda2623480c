"""The processes that train together: this one alone, or those that `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revox.training.errors import library


@dataclass(frozen=True)
class World:
    """Rank, number of processes, and this process's device. Every process must make the same calls."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str | None = None) -> World:
        """The world of the environment's variables; joins its process group (NCCL on GPUs, gloo on CPUs).

        Raises TrainingError when there are several processes and accelerate is missing.
        """
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return cls(device=device or str(there or "cpu"))
        state = library("accelerate").PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's part of `count` items, which must divide by the number of ranks."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of `value`, without a gradient; `value` itself stays as it is."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks."""
        return self.sum(value) / self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over ranks."""
        if self.size == 1:
            return
        found = [p for p in parameters if p.grad is not None]
        # One message for all: a hundred small ones cost more than their bytes.
        flat = torch.cat([p.grad.flatten() for p in found if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for p in found:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (plain numbers, strings, lists, dicts), in the order of the ranks."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()
