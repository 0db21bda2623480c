"""What `revox train student` will cost on this machine, from counted operations and its measured speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from revox.checkpoint.load import default_dtype
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.model.config import VoxtralConfig
from revox.training.spoken import SHARD
from revox.training.student import StudentTraining

FRAMES = 45  # of a sentence of our own, as the presets speak: 3.6 s
LONGEST = 75  # of the longest of a batch, for which the others wait
PROMPT = 250  # positions before them: voice and text
KERNELS = 30  # launches a layer, in a step that speaks one frame
REPEATS = 5


@dataclass(frozen=True)
class StudentPlan:
    """Estimates: seconds of speaking and of learning, and bytes of disk and of memory."""

    sentences: int
    steps: int
    speaking: float
    learning: float
    disk: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of everything."""
        return self.speaking + self.learning


def plan_student(
    checkpoint: Path,
    sentences: int,
    training: StudentTraining,
    device: str,
    dtype: torch.dtype | None = None,
) -> StudentPlan:
    """What that would cost on `device`, speaking in `dtype` (None: `default_dtype`).

    Takes about a second and no weights; an estimate within a factor of two, of which the progress of the job
    itself soon knows more.
    """
    config = read_params(checkpoint).voxtral_config()
    sizes = component_sizes(config)
    dtype = dtype or default_dtype(checkpoint, device)
    backbone = config.backbone
    speaking = speaking_seconds(config, sentences, SHARD, dtype, device)
    launch = launch_seconds(device)
    codec = config.codec
    rows = training.batch * training.frames
    fast = operations_a_second(rows, codec.dim, codec.hidden_dim, torch.float32, device)
    learned = training.steps * rows * decoder_operations(config)
    learning = learned / fast + training.steps * 1000 * launch
    cache = 2 * backbone.n_layers * backbone.n_kv_heads * backbone.head_dim * dtype.itemsize
    speaks = sum(count for component, count in sizes.items() if component != "codec_encoder")
    return StudentPlan(
        sentences, training.steps, speaking, min(learning, training.seconds or math.inf),
        disk=sentences * FRAMES * codec.n_codebooks * 2 + 50e6,
        memory=speaks * dtype.itemsize + SHARD * (PROMPT + LONGEST) * cache + 1e9,
    )  # fmt: skip


def speaking_seconds(
    config: VoxtralConfig, sentences: int, together: int, dtype: torch.dtype, device: str
) -> float:
    """Seconds in which the model says so many sentences, some `together`: counted operations and launches."""
    sizes, acoustic = component_sizes(config), config.acoustic
    evaluations = 2 * acoustic.n_decoding_steps  # guidance takes two a step
    operations = 2 * together * (sizes["backbone"] + evaluations * sizes["acoustic_transformer"])
    layers = config.backbone.n_layers + acoustic.n_decoding_steps * acoustic.n_layers
    speed = operations_a_second(together, config.backbone.dim, config.backbone.hidden_dim, dtype, device)
    frame = operations / speed + layers * KERNELS * launch_seconds(device)
    return math.ceil(sentences / together) * LONGEST * frame


def component_sizes(config: VoxtralConfig) -> Counter[str]:
    """Parameters of each component of the release."""
    sizes: Counter[str] = Counter()
    for spec in expected_tensors(config).values():
        sizes[spec.component] += spec.parameters
    return sizes


def launch_seconds(device: str) -> float:
    """Seconds that the smallest operation takes."""
    tiny = torch.zeros(1, device=device)
    return _seconds(lambda: tiny.add_(1), tiny)


def decoder_operations(config: VoxtralConfig) -> float:
    """Operations for one frame of decoded sound: two a weight and position, attention's own left out."""
    codec = config.codec
    layer = (
        2 * (codec.n_heads + codec.n_kv_heads) * codec.head_dim * codec.dim + 3 * codec.dim * codec.hidden_dim
    )
    positions, total = 1, 0
    for layers, stride in zip(codec.decoder_transformer_lengths, codec.decoder_convs_strides, strict=True):
        positions *= stride
        total += layers * layer * positions
    return 2.0 * total


def operations_a_second(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of a product of `rows` vectors with a matrix of the model."""
    matrix = torch.zeros((outputs, inputs), dtype=dtype, device=device)
    vectors = torch.zeros((rows, inputs), dtype=dtype, device=device)
    taken = _seconds(lambda: torch.nn.functional.linear(vectors, matrix), matrix)
    return 2 * rows * inputs * outputs / taken


def _seconds(job: Callable[[], object], on: torch.Tensor) -> float:
    """Seconds that `job` takes where the tensor `on` is: the fastest of a few."""
    found = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            job()
        on.flatten()[0].item()  # waits for the device
        found = min(found, (time.perf_counter() - began) / REPEATS)
    return found
