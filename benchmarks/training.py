"""What training costs here: the model's speech, the student, labelling, and a step of the encoder.

    python benchmarks/training.py [--size full|lab] [--device cuda] [--parts speech,student,labels,step]
        [--budget 300] [--clips 32] [--pairs 32] [--seconds 8] [--compile] [--dtype bf16|float32] [--count]
        [--out NAME]

Weights are random (time and memory do not depend on them) at the release's sizes, or with `--size lab` at the
lab checkpoint's. Each part is repeated within its share of the budget of seconds, at least once. On a CPU
`--size full` needs 9 GB for `speech` (bf16); the other parts need 4 GB.

- speech: the engine speaks 32 sentences together; seconds of speech a second.
- student: a step of `revox train student`.
- labels: an ensemble of three students and an encoder gives soft labels of recordings.
- step: `revox.training.encoder.EncoderTrainer`'s own, with everything a run for the real model has but
  Whisper: encoder trained, decoder frozen, pairs, spectral losses, eight STFT discriminators from the first
  step, a speaker network of ECAPA-TDNN's size. Recordings come from memory: what decoding them takes is
  `data_loading.py`'s question. Throughput and memory are of steps left alone; the shares are of further
  steps, timed part by part (on a GPU with a wait after each, so those steps are slower).

On a CPU "memory, peak" is the process's so far, earlier parts included: for one part's own name it alone.

`--count` counts instead of timing: operations (torch's own formulas) and the memory that a step keeps for
its backward pass, for clips of 8 s, from steps of one and two clips of `--seconds`, and of one twice as long.
On a machine with other work the second of processor time is the fairer one. NAME gets `.json` and `.md`
beside it, by default `benchmarks/results/DATE-training-SIZE-DEVICE`.
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
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revox.checkpoint.params import Params
from revox.checkpoint.release import release_params
from revox.coding.student import StudentEncoder
from revox.losses.spectral import SpectralObjective
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.model.voxtral import Voxtral
from revox.synthesis.engine import Engine, Request
from revox.training import encoder as step_of
from revox.training.data import ClipBatch
from revox.training.ecapa import EcapaTdnn
from revox.training.encoder import EncoderTrainer, Teachers, TrainingData
from revox.training.initial import initialize
from revox.training.settings import EncoderTraining
from revox.training.soft_labels import Ensemble
from revox.training.speaker import SpeakerLoss
from revox.training.spoken import SHARD
from revox.training.student import StudentTrainer, StudentTraining
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

    grad, backward = torch.autograd.grad, torch.autograd.backward
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

    def timed_backward(*arguments: Any, **options: Any) -> None:
        # The discriminators' own is inside `_update_discriminators`; the other one is the encoder's.
        part = "discriminators' own update" if in_waveform[0] else "encoder backward"
        with watch.part(part):
            backward(*arguments, **options)

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
    put(torch.autograd, "backward", timed_backward)
    try:
        yield
    finally:
        for owner, name, before in reversed(undo):
            if before is undo:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def random_codec(config: CodecConfig, with_encoder: bool = False) -> Codec:
    """A decoder to train against: random weights, a codebook of rows of unit size."""
    codec = Codec(config, with_encoder)
    initialize(codec, 0)
    with torch.no_grad():
        codec.quantizer.semantic_codebook.embedding_sum.normal_(generator=torch.Generator().manual_seed(0))
    return codec.requires_grad_(False)


def codec_of(size: str) -> Codec:
    """The codec of a size, float32, on the CPU."""
    if size == "full":
        return random_codec(CodecConfig())
    from revox.checkpoint.load import load_model
    from revox.demo import checkpoint_folder

    return load_model(checkpoint_folder(), dtype=torch.float32, parts=("audio_tokenizer",)).audio_tokenizer


def random_codes(config: CodecConfig, frames: int) -> Tensor:
    """Codes `[37, frames]`, uniform."""
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(config.semantic_codebook_size, (1, frames), generator=generator)
    acoustic = torch.randint(
        config.acoustic_codebook_size, (config.acoustic_dim, frames), generator=generator
    )
    return torch.cat((semantic, acoustic))


def make_trainer(options: argparse.Namespace, folder: Path) -> EncoderTrainer:
    codec = codec_of(options.size)
    config = codec.config
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
        model, TrainingData([random_codes(config, 400)], source), settings, folder,
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


class Repeats:
    """Seconds of a job, on the clock and of the processor, within a budget; and the peak of memory."""

    def __init__(self, options: argparse.Namespace, job: Callable[[], Any]) -> None:
        on_gpu = options.device.startswith("cuda")
        watch = Stopwatch(options.device)
        began = watch.now()
        job()
        self.first = watch.now() - began  # with what is made once
        count = max(1, int(options.budget / max(self.first, 1e-3)) - 1) if options.budget > self.first else 0
        count = min(count, 50)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began, spent = watch.now(), time.process_time()
        for _ in range(count):
            job()
        self.count = count
        self.seconds = (watch.now() - began) / count if count else self.first
        self.core = (time.process_time() - spent) / count if count else float("nan")
        self.memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_rss()


def measure_speech(options: argparse.Namespace) -> dict[str, Any]:
    """The engine speaks a shard together: seconds of speech a second."""
    if options.size == "full":
        config = Params.model_validate(release_params()).voxtral_config()
        dtype = torch.bfloat16
        from revox.checkpoint.load import _place_computed_buffers

        with torch.device("meta"):
            model = Voxtral(config, with_encoder=False)
        state = {
            name: torch.empty(tensor.shape, dtype=dtype, device=options.device).normal_(std=0.02)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        _place_computed_buffers(model, options.device)
        model.eval().requires_grad_(False)
    else:
        from revox.checkpoint.load import default_dtype, load_model
        from revox.demo import checkpoint_folder

        dtype = default_dtype(checkpoint_folder(), options.device)
        model = load_model(checkpoint_folder(), options.device, dtype)
    frames, sentences = options.frames, options.sentences
    generator = torch.Generator().manual_seed(0)
    width = model.config.backbone.dim
    prompts = [0.02 * torch.randn((250, width), generator=generator) for _ in range(sentences)]
    spoken: list[int] = []

    def speak() -> None:
        requests = [Request(p.to(options.device, dtype), i, frames) for i, p in enumerate(prompts)]
        spoken.append(sum(len(one.frames) for one in Engine(model).generate_batch(requests)))

    took = Repeats(options, speak)
    speech = spoken[-1] / model.config.codec.frame_rate
    return _figures(took, speech, f"{sentences} sentences of up to {frames} frames together, {dtype}")


def measure_student(options: argparse.Namespace) -> dict[str, Any]:
    """A step of the student's training: seconds of decoded speech heard a second."""
    codec = codec_of(options.size).to(options.device)
    training = StudentTraining()
    with tempfile.TemporaryDirectory() as folder:
        trainer = StudentTrainer(codec, [random_codes(codec.config, 400)], training, Path(folder), "")
        took = Repeats(options, trainer.step)
    heard = training.batch * training.frames / codec.config.frame_rate
    return _figures(took, heard, f"a step of {training.batch} items of {training.frames} frames, float32")


def measure_labels(options: argparse.Namespace) -> dict[str, Any]:
    """Soft labels of recordings: seconds labelled a second."""
    codec = random_codec(CodecConfig() if options.size == "full" else codec_of("lab").config, True)
    codec = codec.to(options.device)
    students = [StudentEncoder.for_codec(codec).to(options.device) for _ in range(3)]
    rate = codec.config.sampling_rate
    source = FromMemory(options.clips, round(options.seconds * rate), rate)
    audio = next(source).waveforms.to(options.device)
    took = Repeats(options, lambda: Ensemble(students, [codec]).posterior(audio))
    what = f"three students and an encoder, {options.clips} clips of {options.seconds:g} s, float32"
    return _figures(took, options.clips * options.seconds, what)


def _figures(took: Repeats, audio: float, what: str) -> dict[str, Any]:
    return {
        "what": what, "repeats": took.count, "first_seconds": took.first, "seconds": took.seconds,
        "processor_seconds": took.core, "audio_seconds_a_second": audio / took.seconds,
        "memory_gb": took.memory / 1e9,
    }  # fmt: skip


class CountOperations(TorchDispatchMode):
    """Operations of products and convolutions, by torch's formulas (`FlopCounterMode` stops at gradients of
    leaves)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


class Saved:
    """A tensor that is kept for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class KeptForBackward:
    """Bytes of the storages that graphs keep at once, those at `apart` (weights) left out; and their peak."""

    def __init__(self, apart: set[int]) -> None:
        self.apart, self.users = apart, defaultdict(int)
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> Saved:
        saved, storage = Saved(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.apart:
            if not self.users[place]:
                self.live += size
                self.peak = max(self.peak, self.live)
            self.users[place] += 1
            weakref.finalize(saved, self.release, place, size)
        return saved

    def release(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            self.live -= size


def count_step(options: argparse.Namespace) -> dict[str, Any]:
    """Operations of a step and bytes that it keeps for its backward pass, for clips of 8 s.

    Counted are one clip, one twice as long, and two clips: what a step keeps however many there are (weights
    in bf16), what a clip keeps however long it is (discriminators see one second of it), and what a second
    does. Attention within its windows is counted as it is computed.
    """
    operations, kept = [], []
    for clips, longer in ((1, 1), (1, 2), (2, 1)):
        changes = {"clips": clips, "pairs": clips, "seconds": longer * options.seconds}
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(argparse.Namespace(**vars(options) | changes), Path(folder))
            kept_here = KeptForBackward({p.untyped_storage().data_ptr() for p in trainer.codec.parameters()})
            counter = CountOperations()
            hooks = torch.autograd.graph.saved_tensors_hooks(kept_here.pack, lambda saved: saved.tensor)
            with counter, hooks:
                trainer.step()
        operations.append(counter.total)
        kept.append(kept_here.peak)

    def of_8_seconds(counted: list[int]) -> float:
        one, long, two = counted
        return two - one + (8.0 / options.seconds - 1) * (long - one)

    memory, constant = of_8_seconds(kept), 2 * kept[0] - kept[2]
    trained = sum(p.numel() for p in trainer.encoder)
    others = sum(p.numel() for p in trainer.codec.parameters()) - trained
    side = sum(p.numel() for p in trainer.discriminators.parameters())
    assert trainer.teachers.speaker is not None
    speaker = sum(p.numel() for p in trainer.teachers.speaker.parameters())
    # Weight, gradient and two averages, in float32.
    fixed = 16 * (trained + side) + 4 * (others + speaker) + constant
    return {
        "what": f"a recording and a pair of 8 s each, {options.dtype}, with discriminators in every "
        f"step and a speaker network; from steps of {options.seconds:g} and {2 * options.seconds:g} s",
        "gflop_a_second_of_recording": of_8_seconds(operations) / 8e9,
        "kept_gb_a_clip": memory / 1e9,
        "fixed_gb": fixed / 1e9,
        "gb": {f"{n} + {n} clips of 8 s": (fixed + memory * n) / 1e9 for n in (4, 8, 16, 32)},
    }


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the encoder's step."""
    on_gpu = options.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, Path(folder))
        watch = Stopwatch(options.device)
        began = watch.now()
        for _ in range(options.warmup):
            trainer.step()
        ready = watch.now() - began
        # Half of the budget for steps left alone, half for steps timed by part; whole turns of `every`.
        pace = ready / max(1, options.warmup)
        fit = int(options.budget / 2 / max(pace, 1e-3)) if options.warmup else options.every
        steps = max(1, min(options.steps, fit) // options.every) * options.every
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began, spent = watch.now(), time.process_time()
        rows = [trainer.step() for _ in range(steps)]
        took, core = (watch.now() - began) / steps, (time.process_time() - spent) / steps
        memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_rss()
        timed = Stopwatch(options.device)
        with timed_parts(trainer, timed):
            for _ in range(steps):
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
        "what": f"{options.clips} recordings and {options.pairs} pairs of {options.seconds:g} s, "
        f"{options.dtype}{', compiled' if options.compile else ''}, discriminators of {options.channels} "
        f"channels every {options.every} steps",
        "repeats": steps,
        "encoder_parameters": sum(p.numel() for p in trainer.encoder),
        "first_seconds": ready,
        "seconds": took,
        "processor_seconds": core,
        "audio_seconds_a_second": heard / took,
        "recordings_seconds_a_second": options.seconds * options.clips / took,
        "memory_gb": memory / 1e9,
        "share": {name: timed.seconds[name] / whole for name in PARTS},
        "last_losses": {k: v for k, v in rows[-1].items() if k in ("loss", "mel", "semantic", "feature")},
    }


MEASURES = {
    "speech": measure_speech, "student": measure_student, "labels": measure_labels, "step": measure_step,
}  # fmt: skip


def _peak_rss() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def as_markdown(found: dict[str, Any]) -> str:
    """The figures as tables: results first."""
    lines = [f"# Training at {found['size']} size", "", f"{found['date']}; {found['machine']}.", ""]
    parts = found["parts"]
    if parts:
        lines += [
            "| measured | audio-seconds a second | seconds (of processor time) | memory, peak | repeats |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, one in parts.items():
            lines.append(
                f"| {name}: {one['what']} | {one['audio_seconds_a_second']:.3g} | {one['seconds']:.3g} "
                f"({one['processor_seconds']:.3g}) | {one['memory_gb']:.2f} GB | {one['repeats']} |"
            )
    if "counted" in found:
        one = found["counted"]
        lines += [
            "", f"Counted: {one['what']}.", "", "| counted | |", "| --- | --- |",
            f"| operations, a second of recording with its pair | {one['gflop_a_second_of_recording']:.0f} "
            "GFLOP |",
            f"| kept for the backward pass, a recording and a pair of 8 s | {one['kept_gb_a_clip']:.2f} GB |",
            f"| weights, gradients, averages, and what every step keeps | {one['fixed_gb']:.2f} GB |",
            *(f"| together, {size} | {gb:.1f} GB |" for size, gb in one["gb"].items()),
        ]  # fmt: skip
    if "step" in parts:
        share = parts["step"]["share"]
        lines += ["", "| part of a step | share of time |", "| --- | --- |"]
        lines += [f"| {name} | {100 * part:.1f} % |" for name, part in share.items()]
    on_gpu = found["settings"]["device"].startswith("cuda")
    memory = "allocated on the device" if on_gpu else "of the process, whose peak includes the parts before"
    return "\n".join([*lines, "", f"Memory is what is {memory}.", ""])


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
    parser.add_argument("--steps", type=int, default=10, help="at most")
    parser.add_argument("--parts", default="speech,student,labels,step")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds, shared by the parts")
    parser.add_argument("--sentences", type=int, default=SHARD, help="spoken together")
    parser.add_argument("--frames", type=int, default=45, help="of a sentence, at most")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    date = datetime.now(timezone.utc).date().isoformat()
    out = options.out or Path("benchmarks/results") / (
        f"{date}-training-{options.size}-{torch.device(options.device).type}{'-counted' * options.count}"
    )
    parts = [] if options.count else [part for part in options.parts.split(",") if part]
    unknown = set(parts) - MEASURES.keys()
    if unknown:
        raise SystemExit(f"there is no part {', '.join(unknown)}: take some of {', '.join(MEASURES)}")
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    found: dict[str, Any] = {
        "date": date, "machine": machine(options.device), "size": options.size, "settings": settings,
        "parts": {},
    }  # fmt: skip
    options.budget /= max(1, len(parts))
    if options.count:
        found["counted"] = count_step(options)
    for part in parts or [None]:
        if part is not None:
            found["parts"][part] = MEASURES[part](options)
        # After each, so that one that does not fit leaves the others' figures.
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".md").write_text(as_markdown(found))
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(as_markdown(found), flush=True)


if __name__ == "__main__":
    main()
