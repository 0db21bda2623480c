"""What a step of `revox train adapt` costs here, for each choice of --adapt: time and memory.

    python benchmarks/adaptation.py [--checkpoint FOLDER] [--layers N] [--device cuda] [--dtype bf16|float32]
        [--adapt tune,lora,layers] [--objective distill|speech] [--rank 4] [--seconds 15] [--steps 3]
        [--out NAME]

A step is `revox.training.adapt.AdaptTrainer`'s own: two items of the objective (speech for a map) and two
replayed presets (none for a map), each of --seconds after a voice of 8 s. "tune" is a step of `revox voice
tune`: four clips, and the voice's embedding learns. Codes are random: time and memory
do not depend on them. --layers cuts the backbone to its first layers, so that a full-size folder (`python -m
lab fullsize` writes one of random weights) fits a small machine. On a CPU each choice runs in a process of
its own, so that its peak is its own.

Beside what was measured stands what is counted for the release's sizes, in bf16: weights; the learned numbers
with their gradients and AdamW's two moments, float32; what the longest item keeps for its backward pass, the
inputs of all layers and the inside of the largest one; and the change and the gradient of the largest matrix.
The counts come from the network itself on torch's meta device, where tensors have sizes and no memory. NAME
gets `.json` and `.md` beside it, by default `benchmarks/results/DATE-adaptation-DEVICE`.

    python benchmarks/adaptation.py --published adapter,layout --checkpoint RESTORED --run RUN [--steps 300]

runs the published adaptation instead, faults and all: LoRA of rank 8 on wq, wk, wv and wo of every layer at
2e-5, hidden states alone, no replay, a teacher with the adapter active and with rotary embeddings in the
other layout (--published none: the same without faults). RESTORED has its encoder. RUN/adaptation.json has
the guard and the held-out cost before and after; `revox speak --adapter RUN/published` speaks with the
result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from revox.checkpoint.adapter import write_adapter
from revox.checkpoint.load import load_model
from revox.checkpoint.release import CONFIG
from revox.checkpoint.voices import Voice
from revox.cloning.tune import TuningClip, VoiceTuning
from revox.cloning.tune import _Tuning as VoiceTuningRun
from revox.demo import checkpoint_folder
from revox.model import backbone
from revox.model.config import CodecConfig
from revox.model.voxtral import Voxtral
from revox.speech.files import replace_file
from revox.synthesis.prompt import Prompter
from revox.training import adapt_model
from revox.training.adapt import AdaptData, AdaptItem, AdaptTrainer, AdaptTraining, Decision, Objective
from revox.training.adapt_data import REFERENCE_SECONDS
from revox.training.adapt_model import AdaptRequest
from revox.training.deltas import PARTS, Deltas, Part
from training import _peak_rss, machine

TUNE = "tune"
CHARACTERS = 14  # a second of speech
STATE_BYTES = 16  # of a learned number: itself, its gradient, two moments
TRANSIENT_BYTES = 10  # of an element of a changed matrix: its change and gradient in float32, and one in bf16


def random_item(model: Voxtral, seconds: float) -> AdaptItem:
    """`seconds` of random codes after 8 s of others."""
    codec: CodecConfig = model.config.codec
    rng = torch.Generator().manual_seed(0)

    def codes(seconds: float) -> Tensor:
        frames = max(1, round(seconds * codec.frame_rate))
        semantic = torch.randint(codec.semantic_codebook_size, (1, frames), generator=rng)
        levels = (codec.acoustic_dim, frames)
        return torch.cat((semantic, torch.randint(codec.acoustic_codebook_size, levels, generator=rng)))

    said, voice = codes(seconds), codes(REFERENCE_SECONDS)
    own = torch.zeros(voice.shape[1] + 1, model.config.backbone.dim, dtype=model.dtype)
    words = "the letters are on the table and " * 40
    return AdaptItem(words[: max(1, round(CHARACTERS * seconds))].strip(), said, voice, own)


def settings_of(options: argparse.Namespace, part: str) -> AdaptTraining:
    """Of a run; of a voice's tuning, those of the map, which reads and keeps the same."""
    part = "map" if part == TUNE else part
    objective = cast(Objective, "speech" if part == "map" else options.objective)
    return AdaptTraining(cast(Part, part), objective, options.rank, warmup=1)


def data_of(item: AdaptItem) -> AdaptData:
    return AdaptData([item], [item], [item], [item])


# ---------------------------------------------------------------------------------------------- measured


def measure(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """A step of `part`: seconds, and the peak of memory in GB beside what the loaded model takes."""
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    on_gpu = options.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_layers(options.checkpoint, options.layers, Path(scratch) / "checkpoint")
        model = load_model(folder, options.device, dtype)
        item = random_item(model, options.seconds)
        prompter, run = Prompter(folder), Path(scratch) / "run"
        if part == TUNE:
            rows = model.mm_audio_embeddings.voice_embedding(item.voice.to(model.device))
            tuning = VoiceTuningRun(model, prompter, Voice(TUNE, item.voice, rows), VoiceTuning())
            clips = [TuningClip(item.text, item.codes.to(model.device))] * tuning.settings.batch
            learned, step = tuning.offset.numel(), partial(tuning.step, clips, 0)
        else:
            trainer = AdaptTrainer(model, prompter, settings_of(options, part), data_of(item), run)
            learned, step = sum(p.numel() for p in trainer.deltas.parameters()), trainer.step
        loaded = torch.cuda.memory_allocated() / 1e9 if on_gpu else _peak_rss() / 1e9
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, core = [], []
        for _ in range(options.steps + 1):  # the first makes the optimizer's state
            began, spent = now(on_gpu), time.process_time()
            step()
            seconds.append(now(on_gpu) - began)
            core.append(time.process_time() - spent)
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_rss()
    return {
        "learned": learned,
        "layers": len(model.backbone.layers), "seconds": min(seconds[1:]), "processor_seconds": min(core[1:]),
        "loaded_gb": loaded, "peak_gb": peak / 1e9,
    }  # fmt: skip


def with_layers(checkpoint: Path, layers: int | None, folder: Path) -> Path:
    """The checkpoint with the first `layers` of its backbone only, as links in `folder`."""
    if layers is None:
        return checkpoint
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    params = json.loads((checkpoint / "params.json").read_text())
    (folder / "params.json").unlink()
    (folder / "params.json").write_text(json.dumps(params | {"n_layers": layers}))
    return folder


def now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------- counted


class OnMeta(AdaptTrainer):
    """A trainer whose prompts have a size only: `Voxtral.embed_prompt` looks at values."""

    def _prompt(self, item: AdaptItem, own: bool) -> Tensor:
        rows = self._voice(item, own)
        text = torch.empty((len(item.text) // 3 + 6, rows.shape[1]), dtype=rows.dtype, device=rows.device)
        return torch.cat((text, rows))


class Kept:
    """Bytes of the storages that a graph keeps for its backward pass, by layer of the backbone (None: outside
    them); those of the frozen weights left out."""

    def __init__(self, model: Voxtral) -> None:
        self.bytes: dict[int | None, int] = defaultdict(int)
        self.seen = {p.untyped_storage()._cdata for p in model.parameters()}
        self.layer: int | None = None
        for i, layer in enumerate(model.backbone.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: setattr(self, "layer", i))
            layer.register_forward_hook(lambda *_: setattr(self, "layer", None))

    def of(self, forward: Callable[[], Tensor]) -> dict[int | None, int]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            loss = forward()
        assert loss.requires_grad
        return dict(self.bytes)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes[self.layer] += storage.nbytes()
        return tensor


def count(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """Bytes of a step of `part` at the release's sizes in bf16, by what they are for, in GB."""
    with torch.device("meta"):
        model = Voxtral(CONFIG, with_encoder=True)
    model = model.to("meta", torch.bfloat16).eval().requires_grad_(False)
    weights = 2 * sum(p.numel() for p in model.parameters())
    item = random_item(model, options.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = OnMeta(model, cast(Any, None), settings_of(options, part), data_of(item), Path(scratch))
        learned = sum(p.numel() for p in trainer.deltas.parameters())
        if part == TUNE:
            learned = item.voice.shape[1] * CONFIG.backbone.dim
        changes = trainer.deltas.modules.values() if trainer.settings.changes_weights else ()
        largest = max((delta.change().numel() for delta in changes), default=0)
        if trainer.settings.objective == "distill":
            kept = Kept(model).of(lambda: trainer.distillation(item, False, 0))
        else:
            kept = Kept(model).of(lambda: trainer.cost(item, 0))
        positions = len(trainer._prompt(item, False)) + item.codes.shape[1]
    inputs = 2 * positions * CONFIG.backbone.dim * CONFIG.backbone.n_layers
    inside = max((size for layer, size in kept.items() if layer is not None), default=0)
    parts = {
        "weights": weights, "learned": STATE_BYTES * learned,
        "kept": inputs + inside + kept.get(None, 0), "matrix": TRANSIENT_BYTES * largest,
    }  # fmt: skip
    return {
        "learned": learned, "positions": positions,
        **{f"{name}_gb": size / 1e9 for name, size in parts.items()}, "gb": sum(parts.values()) / 1e9,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- published

FAULTS = ("adapter", "layout")


class PublishedTrainer(AdaptTrainer):
    """A trainer whose teacher has `faults`: its own adapter is active, or the other layout of RoPE."""

    faults: tuple[str, ...] = FAULTS

    def distillation(self, item: AdaptItem, own: bool, seed: int) -> Tensor:
        untouched = Deltas.scaled

        @contextmanager
        def teacher(deltas: Deltas, scale: float) -> Iterator[None]:  # nothing else asks here
            with ExitStack() as stack:
                if "adapter" not in self.faults:
                    stack.enter_context(untouched(deltas, scale))
                if "layout" in self.faults:
                    stack.enter_context(patch.object(backbone, "rotate_interleaved", rotate_halves))
                yield

        with patch.object(Deltas, "scaled", teacher):
            return super().distillation(item, own, seed)


def rotate_halves(x: Tensor, rotation: Tensor) -> Tensor:
    """`revox.model.layers.rotate_interleaved` on pairs (i, i + half), the layout of Hugging Face's files."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotation[..., 1::2].unsqueeze(-2).unbind()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def published(options: argparse.Namespace) -> Decision:
    """Train as published, and measure at full scale what came of it, whatever the guard says."""
    PublishedTrainer.faults = tuple(f for f in options.published.split(",") if f != "none")
    if unknown := set(PublishedTrainer.faults) - set(FAULTS):
        raise SystemExit(f"there is no fault {', '.join(unknown)}: take some of {', '.join(FAULTS)}, or none")
    settings = AdaptTraining(
        "attention", "distill", 8, options.steps, replay=0, learning_rate=2e-5, semantic=0.0, flow=0.0
    )

    def one_run(trainer: Any, settings: AdaptTraining, *_: Any) -> Decision:
        run = trainer(settings, "-".join(("published", *PublishedTrainer.faults)))
        run.run(print, report_every=10, validate_every=settings.steps)
        adapter = run.deltas.adapter(1.0)
        write_adapter(options.run / "published", adapter, {"faults": PublishedTrainer.faults})
        before, after = (run.held_out_cost(scale) for scale in (0.0, 1.0))
        return Decision(
            1.0, run.guard(1.0), before, after, before, 0.0, run.deltas.merged(run.model, 1.0), adapter
        )

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    request = AdaptRequest(settings, device=options.device, dtype=dtype)
    with (
        patch.object(adapt_model, "AdaptTrainer", PublishedTrainer),
        patch.object(adapt_model, "decide", one_run),
    ):
        decision, _ = adapt_model.adapt_model(options.checkpoint, options.run, request)
    return decision


# ------------------------------------------------------------------------------------------------ report


def as_markdown(found: dict[str, Any]) -> str:
    settings, rows = found["settings"], found["rows"]
    layers = {one["measured"]["layers"] for one in rows.values()}
    lines = [
        f"# A step of adaptation, objective {settings['objective']}", "",
        f"{found['date']}; {found['machine']}. Measured: {settings['checkpoint']}, "
        f"{', '.join(map(str, layers))} layers of the backbone, {settings['dtype']}; items of "
        f"{settings['seconds']:g} s, rank {settings['rank']}. Counted: the release, bf16.", "",
        "| `--adapt` | learned | seconds a step (of processor time) | memory: model loaded | peak "
        "| full size: learned | weights | with gradients and moments | kept for the backward pass "
        "| largest matrix | together |",
        "|" + " --- |" * 11,
    ]  # fmt: skip
    for part, row in rows.items():
        one, full = row["measured"], row["counted"]
        lines.append(
            f"| {part} | {one['learned']:,} | {one['seconds']:.2f} ({one['processor_seconds']:.2f}) "
            f"| {one['loaded_gb']:.2f} GB | {one['peak_gb']:.2f} GB | {full['learned']:,} "
            f"| {full['weights_gb']:.2f} GB | {full['learned_gb']:.2f} GB | {full['kept_gb']:.2f} GB "
            f"| {full['matrix_gb']:.2f} GB | {full['gb']:.1f} GB |"
        )
    memory = "allocated on the device" if settings["device"].startswith("cuda") else "of the process"
    return "\n".join([*lines, "", f"Measured memory is what is {memory}.", ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_folder())
    parser.add_argument("--layers", type=int, help="of the backbone; else all")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16" if gpu else "float32")
    parser.add_argument("--adapt", default=",".join((TUNE, *PARTS)))
    parser.add_argument("--objective", choices=("distill", "speech"), default="distill")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="of an item")
    parser.add_argument("--steps", type=int, help="timed, by default 3; of the published run, 300")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--published", metavar="FAULTS", help="adapter, layout, both with a comma, or none")
    parser.add_argument("--run", type=Path, help="the published run's folder")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (3 if options.published is None else 300)
    if options.published is not None:
        if options.run is None:
            parser.error("--published needs --run FOLDER")
        found = published(options)
        print(f"held-out cost {found.before:.4f} -> {found.after:.4f}; presets: {found.guard}", flush=True)
        return
    asked = [part for part in options.adapt.split(",") if part]
    if unknown := set(asked) - {TUNE, *PARTS}:
        raise SystemExit(f"there is no --adapt {', '.join(unknown)}: take some of {TUNE}, {', '.join(PARTS)}")
    kind = torch.device(options.device).type
    date = datetime.now(timezone.utc).date().isoformat()
    out = options.out or Path("benchmarks/results") / f"{date}-adaptation-{kind}"
    table: dict[str, Any] = {
        "date": date, "machine": machine(options.device), "rows": {},
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()},
    }  # fmt: skip
    if options.checkpoint == checkpoint_folder():
        table["settings"]["checkpoint"] = "the lab's checkpoint"
    for part in asked:
        if kind == "cpu":
            with multiprocessing.get_context("spawn").Pool(1) as process:
                measured = process.apply(measure, (options, part))
        else:
            measured = measure(options, part)
            torch.cuda.empty_cache()
        table["rows"][part] = {"measured": measured, "counted": count(options, part)}
        # After each, so that one that does not fit leaves the others' figures.
        replace_file(out.with_suffix(".json"), json.dumps(table, indent=1) + "\n")
        replace_file(out.with_suffix(".md"), as_markdown(table))
    print(as_markdown(table), flush=True)


if __name__ == "__main__":
    main()
