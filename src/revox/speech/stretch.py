"""Speech made slower or faster at the same pitch, piece by piece: FFmpeg's atempo, by PyAV."""

from __future__ import annotations

from typing import Any

import numpy as np


class TimeStretch:
    """A filter for mono float32 samples at `rate` Hz: what goes in at `speed` 2 comes out half as long.

    atempo (waveform-similarity overlap-add; https://ffmpeg.org/ffmpeg-filters.html#atempo) takes 0.5 to 100
    and skips samples above 2, so a speed of 0.25 to 4 is made of one step or two equal ones.
    """

    def __init__(self, rate: int, speed: float) -> None:
        self.rate, self.speed = rate, speed
        self._graph = None if speed == 1 else _graph(rate, speed)
        self._taken = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """The stretched samples that are certain once `samples` `[n]` have come; there may be none."""
        import av

        if self._graph is None:
            return samples
        if samples.size:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples, dtype=np.float32)[None], format="flt", layout="mono"
            )
            frame.sample_rate, frame.pts = self.rate, self._taken
            self._taken += samples.size
            self._graph.push(frame)
        return self._pulled()

    def finish(self) -> np.ndarray:
        """What is left when nothing more comes; the filter is then used up."""
        if self._graph is None or not self._taken:
            return np.zeros(0, np.float32)
        self._graph.push(None)
        return self._pulled()

    def _pulled(self) -> np.ndarray:
        import av

        assert self._graph is not None
        pieces = []
        while True:
            try:
                pieces.append(self._graph.pull().to_ndarray().reshape(-1))
            except (av.error.BlockingIOError, av.error.EOFError):
                return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _graph(rate: int, speed: float) -> Any:
    from av.filter import Graph

    steps = 1 if 0.5 <= speed <= 2 else 2
    graph = Graph()
    nodes = [graph.add_abuffer(format="flt", sample_rate=rate, layout="mono")]
    nodes += [graph.add("atempo", repr(speed ** (1 / steps))) for _ in range(steps)]
    # Packed floats out, whatever the filter prefers.
    nodes += [graph.add("aformat", "sample_fmts=flt:channel_layouts=mono"), graph.add("abuffersink")]
    graph.link_nodes(*nodes).configure()
    return graph
