"""Options that several commands share, and old names of options, which still work for one version."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ENVIRONMENT = "REVOX_CHECKPOINT"
_HELP = "The checkpoint's folder, or a hub id (owner/name)."

Checkpoint = Annotated[str, typer.Option("--checkpoint", "-c", envvar=ENVIRONMENT, help=_HELP)]
"""For commands whose positional arguments are other things."""

# The pair for commands with no other positional argument; `chosen_checkpoint` takes both.
CheckpointArgument = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help=f"{_HELP} Or use --checkpoint.", show_default=False),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", "-c", envvar=ENVIRONMENT, help="The same as the argument."),
]

Method = Annotated[
    str,
    typer.Option(
        metavar="auto|encoder|student|inversion|best",
        help="How codes are found: by the checkpoint's encoder if it has one, else by the student that "
        "`revox train student` trained, else by inversion (auto); by one of them; or by the first of them "
        "and inversion, and the better codes are kept (best).",
    ),
]
Refine = Annotated[
    int, typer.Option(min=0, help="Inversion steps that improve the codes of the encoder or the student.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; by default the accelerator if there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; by default bfloat16, or float32 for a small model on the CPU."),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="auto|bf16|int8|int4|fp8|float32",
        help="How the weights are held: fewer bits are faster on a processor and less exact. auto takes what "
        "measures best and fits the memory.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A folder of LoRA factors in peft's format, such as `revox train adapt` writes; they are added "
        "to the weights as these are read.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same result.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


def chosen_checkpoint(argument: str | None, option: str | None) -> str:
    """The checkpoint from a command's argument, its option or $REVOX_CHECKPOINT, in this order.

    Raises typer.BadParameter when there is none, or when argument and option name two.
    """
    if argument and option and option not in (argument, os.environ.get(ENVIRONMENT)):
        raise typer.BadParameter(
            f"two checkpoints were given, {argument} and --checkpoint {option}; give one",
            param_hint="CHECKPOINT",
        )
    found = argument or option
    if not found:
        raise typer.BadParameter(
            f"no checkpoint was given; give its folder or hub id, or set {ENVIRONMENT}",
            param_hint="CHECKPOINT",
        )
    return found


def with_old_names(names: Mapping[str, str]) -> type[TyperCommand]:
    """A command (`cls=`) that takes old names of its options and says the new ones.

    `names` maps an old option to what replaces it: another option, or one with a value for what was a flag
    (`{"--by": "--method", "--quick-encoder": "--method student"}`).
    """

    class CommandWithOldNames(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _with_new_names(args, names))

    return CommandWithOldNames


def _with_new_names(args: list[str], names: Mapping[str, str]) -> list[str]:
    end = args.index("--") if "--" in args else len(args)
    renewed: list[str] = []
    for word in args[:end]:
        option, equals, value = word.partition("=")
        if option not in names:
            renewed.append(word)
            continue
        print(f"{option} is now {names[option]}; the next version takes only that", file=sys.stderr)
        *words, last = names[option].split()
        renewed += [*words, last + equals + value]
    return renewed + args[end:]
