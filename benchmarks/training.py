"""A step of the encoder's training: audio-seconds a second, memory, and where the time goes.

    python benchmarks/training.py [--size full|lab] [--device cuda] [--clips 32] [--pairs 32] [--seconds 8]
        [--compile] [--dtype bf16|float32] [--channels 16] [--steps 10] [--out NAME]

The step is `revox.training.encoder.EncoderTrainer`'s own, with everything a run for the real model has but
Whisper: encoder trained, decoder frozen, pairs, spectral losses, eight STFT discriminators from the first
step, a speaker network of ECAPA-TDNN's size (random weights: time and memory do not depend on them). Full
size is the release's, random; `--size lab` the lab's checkpoint. Recordings come from memory: what decoding
them takes is `data_loading.py`'s question.

Throughput and memory are of steps left alone. The shares are of further steps, timed part by part (on a GPU
with a wait after each, so those steps are slower). Take a number of steps that `--every` divides. On a
machine with other work the second of processor time is the fairer one. NAME gets `.json` and `.md` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from revox.losses.spectral import SpectralObjective
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.training import encoder as step_of
from revox.training.data import ClipBatch
from revox.training.ecapa import EcapaTdnn
from revox.training.encoder import EncoderTrainer, Teachers, TrainingData
from revox.training.initial import initialize
from revox.training.settings import EncoderTraining
from revox.training.speaker import SpeakerLoss
from revox.training.world import World

OTHER = "the rest (pair losses, nearest codes, balancing)"
PARTS = (
    "data: recordings drawn, pairs' codes", "decoder forward, pairs", "encoder forward", "decoder forward",
    "decoder backward", "spectral losses forward", "spectral losses backward", "speaker loss forward",
    "speaker loss backward", "discriminators forward", "discriminators backward",
    "discriminators' own update", "encoder backward", "optimizer", OTHER,
)  # fmt: skip


class FromMemory:
    """Recordings that are there already: `[clips, samples]` of noise with speech's envelope."""

    def __init__(self, clips: int, samples: int, rate: int) -> None:
        t = torch.arange(samples) / rate
        generator = torch.Generator().manual_seed(0)
        envelope = (0.6 + torch.sin(2 * torch.pi * 3 * t)).clamp_min(0)
        self.waveforms = 0.07 * envelope * torch.randn(2 * clips, samples, generator=generator)
        self.clips, self.place = clips, 0

    def __next__(self) -> ClipBatch:
        self.place = (self.place + 1) % 2
        part = self.waveforms[self.place * self.clips :][: self.clips]
        return ClipBatch(part, torch.full((self.clips,), part.shape[1]))

    def state(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Stopwatch:
    """Time by part; a part inside another is taken off the outer one."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict(float)
        self.open: list[list[Any]] = []

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.open.append([self.now(), 0.0])
        try:
            yield
        finally:
            began, inside = self.open.pop()
            took = self.now() - began
            self.seconds[name] += took - inside
            if self.open:
                self.open[-1][1] += took

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed


@contextmanager
def timed_parts(trainer: EncoderTrainer, watch: Stopwatch) -> Iterator[None]:
    """Within, every part of the trainer's steps is timed."""
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, owner.__dict__.get(name, undo)))
        setattr(owner, name, value)

    def time_it(owner: Any, name: str, part: str) -> None:
        put(owner, name, watch.around(part, getattr(owner, name)))

    whose: dict[int, str] = {}  # a loss -> whose backward it starts

    def mark(owner: Any, name: str, part: str) -> None:
        function = watch.around(f"{part} forward", getattr(owner, name))

        def marked(*arguments: Any, **options: Any) -> Tensor:
            loss = function(*arguments, **options)
            whose[id(loss)] = f"{part} backward"
            return loss

        put(owner, name, marked)

    grad, backward = torch.autograd.grad, Tensor.backward
    in_waveform = [False]

    def timed_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        if grad_outputs is not None:
            part = "decoder backward"
        elif in_waveform[0]:
            part = whose.pop(id(outputs), "spectral losses backward")
        else:
            part = OTHER
        with watch.part(part):
            return grad(outputs, inputs, grad_outputs, **options)

    def timed_backward(self: Tensor, *arguments: Any, **options: Any) -> None:
        # The discriminators' own is inside `_update_discriminators`; the other one is the encoder's.
        part = "discriminators' own update" if in_waveform[0] else "encoder backward"
        with watch.part(part):
            backward(self, *arguments, **options)

    inner = trainer._waveform_losses

    def waveform_losses(*arguments: Any) -> Any:
        in_waveform[0] = True
        whose.clear()
        try:
            return inner(*arguments)
        finally:
            in_waveform[0] = False

    time_it(trainer, "_batch", PARTS[0])
    # As the trainer calls them, compiled or not; what the codec's own methods are is of no account to it.
    time_it(trainer, "_encode_latents", "encoder forward")
    of_decoder = trainer._decode_latents

    def decode_latents(latents: Tensor) -> Tensor:
        with watch.part("decoder forward" if torch.is_grad_enabled() else "decoder forward, pairs"):
            return of_decoder(latents)

    put(trainer, "_decode_latents", decode_latents)
    put(trainer, "_waveform_losses", waveform_losses)
    time_it(SpectralObjective, "spectra", "spectral losses forward")
    time_it(SpectralObjective, "__call__", "spectral losses forward")
    time_it(step_of, "stft", "discriminators forward")
    time_it(trainer.discriminators, "forward", "discriminators forward")
    time_it(trainer, "_update_discriminators", "discriminators' own update")
    time_it(trainer.optimizer, "step", "optimizer")
    mark(step_of, "feature_matching_loss", "discriminators")
    if trainer.teachers.speaker is not None:
        mark(trainer.teachers, "speaker", "speaker loss")
    put(torch.autograd, "grad", timed_grad)
    put(Tensor, "backward", timed_backward)
    try:
        yield
    finally:
        for owner, name, before in reversed(undo):
            if before is undo:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def random_codec(config: CodecConfig) -> Codec:
    """A decoder to train against: random weights, a codebook of rows of unit size."""
    codec = Codec(config, with_encoder=False)
    initialize(codec, 0)
    with torch.no_grad():
        codec.quantizer.semantic_codebook.embedding_sum.normal_(generator=torch.Generator().manual_seed(0))
    return codec.requires_grad_(False)


def make_trainer(options: argparse.Namespace, folder: Path) -> EncoderTrainer:
    if options.size == "full":
        codec = random_codec(CodecConfig())
    else:
        from revox.checkpoint.load import load_model
        from revox.demo import checkpoint_folder

        codec = load_model(
            checkpoint_folder(), dtype=torch.float32, parts=("audio_tokenizer",)
        ).audio_tokenizer
    config = codec.config
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(config.semantic_codebook_size, (1, 400), generator=generator)
    acoustic = torch.randint(config.acoustic_codebook_size, (config.acoustic_dim, 400), generator=generator)
    settings = EncoderTraining.model_validate(
        {
            "clips": options.clips, "pairs": options.pairs, "seconds": options.seconds, "warmup": 1,
            "autocast": options.dtype == "bf16", "compile": options.compile,
            "weights": {"speaker": 3.0, "waveform": 1.0, "feature": 2.0},
            "verifier": "in memory",
            "discriminator": {"start": 0, "channels": options.channels, "every": options.every},
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        speaker = SpeakerLoss(EcapaTdnn(), config.sampling_rate).to(options.device)
    source = FromMemory(options.clips, round(options.seconds * config.sampling_rate), config.sampling_rate)
    model: Any = SimpleNamespace(audio_tokenizer=codec, mm_audio_embeddings=None)
    trainer = EncoderTrainer(
        model, TrainingData([torch.cat((semantic, acoustic))], source), settings, folder,
        teachers=Teachers(speaker=speaker), world=World(device=options.device),
    )  # fmt: skip
    if options.channels_last:
        trainer.discriminators.to(memory_format=torch.channels_last)
    return trainer


def machine(device: str) -> str:
    """In words."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return f"{name} ({memory:.0f} GB), torch {torch.__version__}, Python {platform.python_version()}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads used{load}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one setting."""
    on_gpu = options.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, Path(folder))
        began = time.perf_counter()
        for _ in range(options.warmup):
            trainer.step()
        ready = time.perf_counter() - began
        watch = Stopwatch(options.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began, spent = watch.now(), time.process_time()
        rows = [trainer.step() for _ in range(options.steps)]
        took, core = (watch.now() - began) / options.steps, (time.process_time() - spent) / options.steps
        memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_rss()
        timed = Stopwatch(options.device)
        with timed_parts(trainer, timed):
            for _ in range(options.steps):
                with timed.part(OTHER):
                    trainer.step()
        whole = sum(timed.seconds.values())
        lost = [name for name in PARTS if name not in timed.seconds]
        if lost:
            raise SystemExit(
                f"never timed: {', '.join(lost)} (give more --steps, or the trainer has changed)"
            )
    heard = options.seconds * (options.clips + options.pairs)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(options.device),
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "encoder_parameters": sum(p.numel() for p in trainer.encoder),
        "warmup_seconds": ready,
        "seconds_a_step": took,
        "processor_seconds_a_step": core,
        "audio_seconds_a_second": heard / took,
        "audio_seconds_a_processor_second": heard / core,
        "recordings_seconds_a_second": options.seconds * options.clips / took,
        "memory_gb": memory / 1e9,
        "timed_seconds_a_step": whole / options.steps,
        "share": {name: timed.seconds[name] / whole for name in PARTS},
        "last_losses": {k: v for k, v in rows[-1].items() if k in ("loss", "mel", "semantic", "feature")},
    }


def _peak_rss() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def as_markdown(found: dict[str, Any]) -> str:
    """The figures as tables."""
    of = found["settings"]
    every = f"of {of['channels']} channels every {of['every']} steps"
    what = (
        f"{of['size']} size, {found['encoder_parameters'] / 1e6:.1f} M parameters trained, {of['clips']} "
        f"recordings and {of['pairs']} pairs of {of['seconds']:g} s, {of['dtype']}"
        f"{', compiled' if of['compile'] else ''}"
        f"{', channels-last' if of['channels_last'] else ''}, discriminators {every}"
    )
    lines = [
        f"# A training step: {what}", "", f"{found['date']}; {found['machine']}.", "",
        "| | |", "| --- | --- |",
        f"| audio-seconds a second, recordings and pairs | {found['audio_seconds_a_second']:.3g} |",
        f"| the same, a second of processor time | {found['audio_seconds_a_processor_second']:.3g} |",
        f"| of recordings alone | {found['recordings_seconds_a_second']:.3g} |",
        f"| seconds a step (of processor time) | {found['seconds_a_step']:.3g} "
        f"({found['processor_seconds_a_step']:.3g}) |",
        f"| {'memory allocated' if of['device'].startswith('cuda') else 'memory of the process'}, peak | "
        f"{found['memory_gb']:.2f} GB |",
        f"| first {of['warmup']} steps, not counted | {found['warmup_seconds']:.1f} s |", "",
        "| part | share of time |", "| --- | --- |",
        *(f"| {name} | {100 * share:.1f} % |" for name, share in found["share"].items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=("full", "lab"), default="full" if gpu else "lab")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--clips", type=int, default=32 if gpu else 4)
    parser.add_argument("--pairs", type=int, default=32 if gpu else 4)
    parser.add_argument("--seconds", type=float, default=8.0 if gpu else 2.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16" if gpu else "float32")
    parser.add_argument("--channels", type=int, default=16, help="of a discriminator's first layer")
    parser.add_argument("--every", type=int, default=2, help="steps between the discriminators' updates")
    parser.add_argument("--channels-last", action="store_true", help="of the discriminators' convolutions")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(as_markdown(found), flush=True)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(as_markdown(found))


if __name__ == "__main__":
    main()
