"""One frame of a batch as one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from revox.model.backbone import KVCache
from revox.model.voxtral import FrameInputs, Voxtral

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sizes of batches for which there is a graph; smaller ones are padded."""


def bucket_of(streams: int) -> int:
    """The smallest bucket that holds so many."""
    return next(bucket for bucket in BUCKETS if bucket >= streams)


class FrameGraphs:
    """Runs `Voxtral.next_frame` on the first slots of a cache.

    On CUDA it is captured once for each size of batch, number of steps of the flow and place of the cache in
    memory, and replayed: a frame is one launch. On other devices it is called as it is.
    """

    def __init__(self, model: Voxtral) -> None:
        self.model = model
        self._cache_at: tuple[object, ...] = ()
        self._captured: dict[tuple[int, int | None], tuple[torch.cuda.CUDAGraph, FrameInputs, Tensor]] = {}

    def __call__(self, inputs: FrameInputs, cache: KVCache, steps: int | None = None) -> Tensor:
        """Ids `[slots, 37]` of the next frames of the cache's first slots, as many as `inputs` has."""
        if cache.keys.device.type != "cuda":
            return self._run(inputs, cache, steps)
        at = cache.keys.data_ptr(), cache.values.data_ptr(), tuple(cache.keys.shape)
        if at != self._cache_at:
            self._captured.clear()
            self._cache_at = at
        key = (len(inputs.ids), steps)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs, cache, steps)
        graph, own, ids = self._captured[key]
        for target, source in zip(own, inputs, strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return ids.clone()

    def _run(self, inputs: FrameInputs, cache: KVCache, steps: int | None) -> Tensor:
        slots = len(inputs.ids)
        return self.model.next_frame(inputs, cache.keys[:, :slots], cache.values[:, :slots], steps)

    def _capture(
        self, inputs: FrameInputs, cache: KVCache, steps: int | None
    ) -> tuple[torch.cuda.CUDAGraph, FrameInputs, Tensor]:
        own = FrameInputs(*(tensor.clone() for tensor in inputs))
        # What is made at the first call (workspaces, projected times) is made outside of the graph. Writing
        # the same positions again changes nothing.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(own, cache, steps)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ids = self._run(own, cache, steps)
        return graph, own, ids
