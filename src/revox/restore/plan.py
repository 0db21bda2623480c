"""What a restoration takes on this device: training from timed steps, the rest from counted operations."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from revox.checkpoint.load import default_dtype
from revox.checkpoint.params import read_params
from revox.checkpoint.voices import list_voices
from revox.doctor.speed import memory
from revox.evaluation.acceptance_table import MAX_PRESETS
from revox.evaluation.evaluate import DEFAULT_TEXTS
from revox.progress import Progress
from revox.restore.request import RestoreRequest
from revox.stages import Facts
from revox.training.adapt import SCALES, SPOKEN
from revox.training.adapt_model import AdaptRequest
from revox.training.restore import HELD_OUT, TRAINING, restore_encoder
from revox.training.spoken import SHARD
from revox.training.student import StudentTraining
from revox.training.student_plan import (
    FRAMES,
    PROMPT,
    component_sizes,
    operations_a_second,
    plan_student,
    speaking_seconds,
)

TIMED_STEPS = 4  # after the first; even, because discriminators are updated in every second step
TIMED_SECONDS = 60.0
PASSES = 5  # of an adaptation: the untouched model's, forward, forward again, and backward as two
EXAMINED = 4  # sentences for each voice that the doctor examines
DISK_SPEED = 5e8  # bytes a second that are copied, assumed
COUNTED = "counted operations at this device's speed"


class _EnoughSteps(Exception):  # noqa: N818 - nothing is wrong
    """Ends a run that is only timed."""


def timed_step(request: RestoreRequest, folder: Path) -> Facts:
    """What a step of the training takes: `seconds`, `cpu_seconds` (of this process), `memory` (bytes).

    Measured over the first steps but one of a run in `folder`, which is deleted. It has all that the run
    itself has but what is made beforehand (sentences, students, pseudo-labels); discriminators take part
    from the first step.
    """
    settings = request.settings
    weights = settings.weights.model_copy(update={"soft_semantic": 0.0, "soft_acoustic": 0.0})
    discriminator = settings.discriminator.model_copy(update={"start": 0})
    never = 1 << 40
    settings = settings.model_copy(
        update={
            "steps": never, "pairs": settings.pairs + settings.pseudo_labels, "pseudo_labels": 0,
            "pseudo_labeled": 0, "sentences": 0, "students": 0, "weights": weights,
            "discriminator": discriminator, "likelihood": False, "report_every": 1, "validate_every": never,
            "save_every": never,
        }
    )  # fmt: skip
    ticks: list[tuple[float, float]] = []

    def watch(at: Progress) -> None:
        if at.what != TRAINING:
            request.progress(at)
            return
        ticks.append((time.perf_counter(), time.process_time()))
        taken = len(ticks) - 1
        if taken >= TIMED_STEPS or (taken and ticks[-1][0] - ticks[0][0] > TIMED_SECONDS):
            raise _EnoughSteps

    options = request.options(message=lambda sentence: None, progress=watch, tensorboard=False)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        restore_encoder(request.checkpoint, request.data, folder, settings, options)
    except _EnoughSteps:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    taken = len(ticks) - 1
    seconds, cpu_seconds = ((last - first) / taken for first, last in zip(ticks[0], ticks[-1], strict=True))
    peak = memory(torch.device(request.device))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory": None if peak is None else peak * 1e9}


def plan_restore(request: RestoreRequest, folder: Path) -> Facts:
    """Steps to take, and for each stage seconds, bytes of disk and of memory, and how that is known.

    `folder` is for the timed run. On a CPU the minutes asked for are of the processor's time.
    """
    step = timed_step(request, folder)
    steps = request.fitting(step["cpu_seconds"] if request.device == "cpu" else step["seconds"])
    settings, device = request.scheduled(steps), request.device
    config = read_params(request.checkpoint).voxtral_config()
    dtype = request.arithmetic or default_dtype(request.checkpoint, torch.device(device))
    sizes = component_sizes(config)
    encoder = sizes["codec_encoder"]
    speaks = plan_student(request.checkpoint, settings.sentences, StudentTraining(), device, dtype)
    presets = sum(one.preset and not one.problem for one in list_voices(request.checkpoint))

    def alone(sentences: int) -> float:
        return speaking_seconds(config, sentences, 1, dtype, device)

    backbone, training = config.backbone, request.adaptation
    items = AdaptRequest.seeds * training.steps * (training.batch + 2 * training.replay)  # and the control's
    speed = operations_a_second(PROMPT + FRAMES, backbone.dim, backbone.hidden_dim, dtype, device)
    adapting = items * PASSES * 2 * sizes["backbone"] * (PROMPT + FRAMES) / speed
    spoken = AdaptRequest.sentences * presets
    adapting += speaking_seconds(config, spoken, SHARD, dtype, device)
    guarding = (1 + len(SCALES)) * speaking_seconds(config, min(SPOKEN, spoken), SPOKEN, dtype, device)
    clips = len(DEFAULT_TEXTS) * request.seeds * (2 * HELD_OUT + min(presets, MAX_PRESETS))
    size = sum(path.stat().st_size for path in request.checkpoint.rglob("*") if path.is_file())
    adapted = 2 * (sizes["acoustic_transformer"] + 2 * sizes["backbone"] // backbone.n_layers)
    on_cpu = f" ({step['cpu_seconds']:.2g} s of the processor)" if device == "cpu" else ""
    timed = (
        f"{steps:,} steps of {step['seconds']:.2g} s{on_cpu}, timed here over a few and extrapolated; "
        f"before them {settings.sentences:,} sentences, {COUNTED}"
    )
    states: float = encoder * (12 + 4 * bool(settings.average) + 2 * settings.keep)
    states += settings.sentences * FRAMES * config.codec.n_codebooks * 2
    states += settings.whisper_cache_gb * 1e9 if settings.whisper else 0
    copied = f"{size / 1e9:.2g} GB at an assumed {DISK_SPEED / 1e9:g} GB a second"
    table = {
        "train": (speaks.speaking + steps * step["seconds"], states, step["memory"], timed),
        "measure": (alone(clips), 0, speaks.memory, COUNTED),
        "adapt": (
            adapting + guarding, adapted, speaks.memory, f"if the rule says so; {COUNTED}",
        ),
        "inject": (size / DISK_SPEED, size + 2 * encoder, adapted + 2 * encoder, copied),
        "doctor": (alone(EXAMINED * (4 if request.quick else presets)), 0, speaks.memory, COUNTED),
        "clone and speak": (alone(4), 0, speaks.memory, COUNTED),
    }  # fmt: skip
    if request.adapt == "never":
        del table["adapt"]
    return {
        "device": device, "steps": steps, "step_seconds": round(step["seconds"], 4),
        "step_cpu_seconds": round(step["cpu_seconds"], 4),
        "estimates": [
            {"stage": stage, "seconds": round(seconds, 3), "disk": disk, "memory": used, "how": how}
            for stage, (seconds, disk, used, how) in table.items()
        ],
    }  # fmt: skip
