"""`revox evaluate`: tables about a checkpoint, from a folder of clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.options import (
    CheckpointArgument,
    CheckpointOption,
    Device,
    Dtype,
    Method,
    Refine,
    chosen_checkpoint,
)

if TYPE_CHECKING:
    from rich.console import Console

    from revox.evaluation.report import EvaluationReport

OLD_NAMES = {"--by": "--method", "--recogniser": "--recognizer", "-o": "--out"}
MAX_GRAMMAR = 1 << 18  # bytes; the lab's takes 4500


def command(
    kind: Annotated[str, typer.Argument(metavar="codec|cloning|acceptance", help="Which tables.")],
    clips: Annotated[Path, typer.Option(help="A folder of recordings; subfolders are groups.")],
    out: Annotated[Path, typer.Option(help="Folder for the report, its sounds and the measurements.")],
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    method: Method = "auto",
    refine: Refine = 0,
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of inversion, for each clip.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="A file with the codec's encoder, for scoring only.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="What to speak (cloning, acceptance): one text on each line.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="CSV or JSONL of the clips: file, speaker, group, text.")
    ] = None,
    transcripts: Annotated[
        Path | None, typer.Option(help="A clip's name and its words on each line.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="The most that is used of each clip.")] = 10.0,
    limit: Annotated[int | None, typer.Option(min=1, help="How many clips of each group, at most.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, where something is random.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes that share the work.")] = 1,
    recognizer: Annotated[
        str,
        typer.Option(
            help="none, whisper:FOLDER_OR_HUB_ID (faster-whisper), or pocketsphinx (codec, cloning)."
        ),
    ] = "none",
    grammar: Annotated[
        str | None, typer.Option(help="A JSGF file for pocketsphinx, or lab for the lab's sentences.")
    ] = None,
    naturalness: Annotated[
        bool | None,
        typer.Option(
            "--naturalness/--no-naturalness",
            help="DistillMOS of every sound (codec, cloning); else if distillmos is installed.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a checkpoint on a folder of clips and write a report; see docs/measuring.md.

    codec: recordings against what their codes decode to, and against noise.

    cloning: new words in voices that are cloned from the clips.

    acceptance: likelihood of the clips' codes, and the clips' voice embeddings.
    A clip needs its whole transcript, so give enough --seconds.
    """
    from rich.console import Console

    from revox.api import find_dtype
    from revox.checkpoint.locate import locate
    from revox.cli.progress import show_progress
    from revox.evaluation.clips import find_clips
    from revox.training.spoken import read_sentences

    console = Console(stderr=True, highlight=False)
    # What can be wrong is reported before anything is computed.
    given = chosen_checkpoint(checkpoint, checkpoint_option)
    find_dtype(dtype)
    found = find_clips(clips, manifest, transcripts, limit)
    spoken, rules = read_sentences(texts) if texts else (), _grammar(grammar)
    folder = locate(given)
    from revox.evaluation.evaluate import evaluate
    from revox.evaluation.report import write_report
    from revox.evaluation.subject import Setup

    setup = Setup(folder, out, method, encoder, refine, steps, seconds, seeds, recognizer, rules)
    setup = dataclasses.replace(
        setup, texts=tuple(spoken), device=device, dtype=dtype, naturalness=naturalness
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with show_progress(console) as progress:
            report = evaluate(kind, setup, found, jobs, progress)
    except KeyboardInterrupt:
        console.print(f"saved in {out / 'cache'}; the same command resumes from there", markup=False)
        raise
    paths = write_report(report, out)
    _show(console, report)
    for reason in report.left_out:
        console.print(f"left out: {reason}", markup=False)
    console.print(f"{', '.join(str(path) for path in paths)}", markup=False)


def _grammar(name: str | None) -> str | None:
    if name is None:
        return None
    if name == "lab":
        from revox.demo import grammar_file

        return grammar_file().read_text(encoding="utf-8")
    from revox.evaluation.errors import EvaluationError
    from revox.speech.files import read_text

    path = Path(name)
    if path.is_file() and path.stat().st_size > MAX_GRAMMAR:
        raise EvaluationError(f"{path} is larger than {MAX_GRAMMAR >> 10} kB; give a smaller grammar")
    return read_text(path, EvaluationError)


def _show(console: Console, report: EvaluationReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    from revox.evaluation.report import ARROWS, LABELS

    for table in report.tables:
        # One figure a line, without its interval: a terminal is narrower than a page.
        grid = Table(title=escape(table.title))
        grid.add_column("", overflow="fold")
        for row in table.rows:
            grid.add_column(escape(row.name) + LABELS[row.kind], overflow="fold")
        for column in table.columns:
            cells = [row.cells.get(column.key) for row in table.rows]
            figures = [f"{cell.value:.{column.digits}f}" if cell else "–" for cell in cells]
            title = escape(column.title) + ARROWS[column.better]
            grid.add_row(title, *([column.unavailable] if column.unavailable else figures))
        console.print(grid)
        for note in table.notes:
            console.print(note, markup=False)
