"""`revox restore`: from a checkpoint as released to one that clones, in one command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli.options import (
    CheckpointArgument,
    CheckpointOption,
    Device,
    Dtype,
    chosen_checkpoint,
)
from revox.cli.progress import duration, show_progress
from revox.cli.train_command import training_line
from revox.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from revox.training.settings import EncoderTraining


def command(
    data: Annotated[
        list[str],
        typer.Option(
            "--data", "-d", help="Folders of speech, or hf:OWNER/NAME[:config][:split]; repeatable."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The restoration's folder: runs, report, the restored checkpoint.")
    ],
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The small checkpoint's recipe and few measurements.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="The training's settings (YAML or JSON); see docs/training.md.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Of training, on a CPU of its own time: the steps that fit. With --quick 15."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training, in place of the config's.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Speech to measure on and not to train on (else some speakers).")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Sentences for the model to say, one a line; else the data's own.")
    ] = None,
    adapt: Annotated[
        str, typer.Option(metavar="auto|never", help="Whether the model is adapted where the rule says so.")
    ] = "auto",
    clip: Annotated[
        Path | None, typer.Option(help="What is cloned in the end; else a clip that comes with revox.")
    ] = None,
    consent: Annotated[
        str | None, typer.Option(help="Whose voice --clip is, and that they agreed. Required with it.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would take here.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode speech.")] = 2,
    seed: Annotated[int | None, typer.Option(help="In place of the config's.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Restore the missing encoder: train, measure, adapt if a rule says so, inject, examine, clone a clip.

    The plan comes first. Every stage is done once: after Ctrl-C, a kill or a failure the same command goes
    on. Exit code 1 if a stage failed; the report in OUT says which.
    """
    from rich.console import Console

    from revox.api import find_device
    from revox.checkpoint.locate import locate
    from revox.cloning.consent import record_consent
    from revox.demo.demo import CONSENT, EXAMPLES, REFERENCE
    from revox.restore.errors import RestoreError
    from revox.restore.request import QUICK_MINUTES, RestoreRequest
    from revox.restore.restore import Restoration
    from revox.restore.rule import RULE
    from revox.training.restore import TRAINING
    from revox.training.spoken import read_sentences

    console = Console(stderr=True, highlight=False)
    if quick and (config is not None or steps is not None):
        raise RestoreError("--quick has its own settings: leave --config and --steps out, or --quick")
    if minutes is not None and steps is not None:
        raise RestoreError("say how long to train once: --steps or --minutes")
    if clip is None and consent is not None:
        raise RestoreError("--consent is for the voice of --clip: name the clip, or leave --consent out")
    agreed = CONSENT if clip is None else record_consent(consent).statement
    given = chosen_checkpoint(checkpoint, checkpoint_option)
    place, settings = str(find_device(device)), _settings(console, quick, config, steps, seed, dtype)
    folder = locate(given)
    request: dict[str, Any] = {
        "name": folder.resolve().name if Path(given).expanduser().is_dir() else given,
        "clip": clip or EXAMPLES / REFERENCE, "validation": validation or (),
        "texts": read_sentences(texts) if texts else (), "quick": quick, "adapt": adapt,
        "minutes": QUICK_MINUTES if quick and minutes is None else minutes, "device": place, "dtype": dtype,
        "workers": workers,
    }  # fmt: skip
    with show_progress(console) as show:

        def progress(at: Progress) -> None:
            if at.what == TRAINING:
                console.print(training_line(at), soft_wrap=True)
            else:
                show(at)

        job = Restoration(
            RestoreRequest(
                folder, data=data, settings=settings, consent=agreed, progress=progress,
                message=lambda line: console.print(line, markup=False, soft_wrap=True), **request,
            ),
            out,
        )  # fmt: skip
        try:
            planned = job.plan()
            if planned is not None:
                _print_plan(console, planned, out)
                console.print(RULE if adapt == "auto" else "The model is not adapted.", soft_wrap=True)
            missing = ["plan"] if planned is None else [] if plan else job.run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from there")
            raise
    if plan and planned is not None:
        return
    console.print(f"the report is {out / 'report.md'}, and report.html beside it", markup=False)
    if missing:
        console.print(f"not done: {', '.join(missing)}; the same command tries again", markup=False)
        raise typer.Exit(1)
    console.print(
        f"{job.folder} clones: revox clone CLIP -c {job.folder} --name NAME --consent \"...\"",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _settings(
    console: Console, quick: bool, config: Path | None, steps: int | None, seed: int | None, dtype: str | None
) -> EncoderTraining:
    import torch

    from revox.api import find_dtype
    from revox.restore.request import QUICK_TRAINING
    from revox.training.settings import EncoderTraining, read_settings

    autocast = None if dtype is None else find_dtype(dtype) == torch.bfloat16
    if quick:
        return EncoderTraining.model_validate({**QUICK_TRAINING, "seed": seed or 0, "autocast": autocast})
    return read_settings(config, console.print, steps=steps, seed=seed, autocast=autocast)


def _print_plan(console: Console, plan: dict[str, Any], out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from revox.restore.report import plan_rows

    estimates = plan["estimates"]
    grid = Table("stage", "minutes", "disk", "memory", title=f"Plan, on {plan['device']}: rough estimates")
    for row in plan_rows(estimates):
        grid.add_row(*map(escape, list(row.values())[:4]))
    console.print(grid)
    for one in estimates:
        console.print(f"{one['stage']}: {one['how']}", markup=False, soft_wrap=True)
    total, disk = (sum(one[key] for one in estimates) for key in ("seconds", "disk"))
    free = shutil.disk_usage(out).free
    console.print(f"together about {duration(total)} and {disk / 1e9:.1f} of {free / 1e9:,.1f} GB of disk")
    if disk > free:
        console.print("[bold]that does not fit[/]: make room, or name a folder on another disk with --out")
