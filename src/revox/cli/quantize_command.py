"""`revox quantize`: a smaller folder of a checkpoint, and how much its codes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revox.cli.options import CheckpointArgument, CheckpointOption, Revision, chosen_checkpoint
from revox.cli.progress import show_progress

NOT_MEASURED = "Not measured (`revox quantize --utterances 0`, or it was stopped)."


def command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    weights: Annotated[str, typer.Option(metavar="int8|int4", help="Bits of the layers' matrices.")] = "int8",
    utterances: Annotated[
        int,
        typer.Option(
            min=0, help="Utterances of which the codes are compared with the original's; 0 compares none."
        ),
    ] = 6,
    max_seconds: Annotated[
        float, typer.Option(min=0.08, help="The longest that each of them may take, in seconds of speech.")
    ] = 4.0,
    revision: Revision = None,
) -> None:
    """Write CHECKPOINT with its matrices in 8 or 4 bits to a new folder, which loads at once.

    The folder's card (README.md) has the table of how many codes differ, given the same past. The original
    speaks for it on the processor, which takes minutes at full size.
    """
    from rich.console import Console

    import revox
    from revox.checkpoint.errors import CheckpointError
    from revox.checkpoint.locate import locate
    from revox.checkpoint.quantize import write_card, write_quantized

    bits = {"int8": 8, "int4": 4}.get(weights)
    if bits is None:
        raise CheckpointError(f"weights {weights!r} cannot be stored; take int8 or int4.")
    folder, out = locate(chosen_checkpoint(checkpoint, checkpoint_option), revision), out.expanduser()
    with show_progress(Console(stderr=True), unit="bytes") as progress:
        sizes = write_quantized(folder, out, bits, progress)
    quality = NOT_MEASURED
    write_card(folder, out, bits, sizes, quality)  # the measurement may be stopped
    if utterances:
        from revox.evaluation.weights_table import quality_table, weights_agreement

        original, quantized = revox.load(folder, "cpu"), revox.load(out, "cpu", weights=weights)
        with show_progress(Console(stderr=True)) as progress:
            found = weights_agreement(original, quantized, utterances, max_seconds, progress)
        quality = quality_table(found, utterances, original, quantized)
        write_card(folder, out, bits, sizes, quality)
    print(f"{out}: {sizes[1] / 1e9:.3g} GB instead of {sizes[0] / 1e9:.3g} GB\n\n{quality}")
