"""`revox evaluate`: tables about a checkpoint, from a folder of clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli.options import with_old_names

if TYPE_CHECKING:
    from rich.console import Console

    from revox.evaluation.report import Report

app = typer.Typer(
    help="Measure a checkpoint on a folder of clips: codec, cloning, acceptance; see docs/measuring.md.",
    no_args_is_help=True,
)

Checkpoint = Annotated[str, typer.Argument(help="The checkpoint's folder, or a hub id.")]
Clips = Annotated[Path, typer.Option("--clips", help="A folder of recordings; subfolders are groups.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the report, its sounds and what was done go.")]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="auto|encoder|student|inversion|best",
        help="How codes are found, as in `revox clone`.",
    ),
]
OldMethod = Annotated[str | None, typer.Option("--by", hidden=True, help="The old name of --method.")]
Encoder = Annotated[
    Path | None, typer.Option("--encoder", help="The lab's reference encoder, for scoring only.")
]
Refine = Annotated[int, typer.Option("--refine", min=0, help="Steps that improve the encoder's codes.")]
Steps = Annotated[int | None, typer.Option("--steps", min=0, help="Steps of inversion, for each clip.")]
Manifest = Annotated[
    Path | None,
    typer.Option("--manifest", help="CSV or JSONL of the clips: file, speaker, group, text."),
]
Transcripts = Annotated[
    Path | None, typer.Option("--transcripts", help="What is said: a clip's name and its words on each line.")
]
Seconds = Annotated[float, typer.Option("--seconds", help="How much of each clip is taken, at most.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="How many clips of each group, at most.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How often, where there is chance.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes that share the work.")]
Listener = Annotated[
    str,
    typer.Option("--recognizer", help="none, pocketsphinx, or whisper:FOLDER_OR_HUB_ID."),
]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", help="A JSGF file for pocketsphinx, or lab for the lab's sentences."),
]
Texts = Annotated[Path | None, typer.Option("--texts", help="What to speak: one text on each line.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]

_WITH_OLD_NAMES = with_old_names({"--recogniser": "--recognizer"})
MAX_GRAMMAR = 1 << 18  # bytes; the lab's takes 4500


@app.command("codec", cls=_WITH_OLD_NAMES)
def codec_command(
    checkpoint: Checkpoint,
    clips: Clips,
    out: Out,
    method: Method = "encoder",
    encoder: Encoder = None,
    refine: Refine = 0,
    steps: Steps = None,
    manifest: Manifest = None,
    transcripts: Transcripts = None,
    seconds: Seconds = 10.0,
    limit: Limit = None,
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    recognizer: Listener = "none",
    grammar: Grammar = None,
    device: Device = None,
    by: OldMethod = None,
) -> None:
    """Recordings beside what their codes decode to, wrong speakers, random codes and noise."""
    _run(
        "codec", checkpoint, clips, out, manifest, transcripts, limit, jobs, grammar, None,
        method=_method(method, by), encoder=encoder, refine=refine, steps=steps, seconds=seconds,
        seeds=seeds, recognizer=recognizer, device=device,
    )  # fmt: skip


@app.command("cloning", cls=_WITH_OLD_NAMES)
def cloning_command(
    checkpoint: Checkpoint,
    clips: Clips,
    out: Out,
    method: Method = "encoder",
    encoder: Encoder = None,
    refine: Refine = 0,
    steps: Steps = None,
    texts: Texts = None,
    manifest: Manifest = None,
    transcripts: Transcripts = None,
    seconds: Seconds = 10.0,
    limit: Limit = None,
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    recognizer: Listener = "none",
    grammar: Grammar = None,
    device: Device = None,
    by: OldMethod = None,
) -> None:
    """New words in voices cloned from the clips: likeness, words, stops, acceptance."""
    _run(
        "cloning", checkpoint, clips, out, manifest, transcripts, limit, jobs, grammar, texts,
        method=_method(method, by), encoder=encoder, refine=refine, steps=steps, seconds=seconds,
        seeds=seeds, recognizer=recognizer, device=device,
    )  # fmt: skip


@app.command("acceptance", cls=_WITH_OLD_NAMES)
def acceptance_command(
    checkpoint: Checkpoint,
    clips: Clips,
    out: Out,
    method: Method = "encoder",
    encoder: Encoder = None,
    refine: Refine = 0,
    steps: Steps = None,
    texts: Texts = None,
    manifest: Manifest = None,
    transcripts: Transcripts = None,
    seconds: Seconds = 10.0,
    limit: Limit = None,
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    device: Device = None,
    by: OldMethod = None,
) -> None:
    """What the language model makes of the clips' codes, beside its own speech; and of their voices' rows.

    A clip needs its whole transcript: give --seconds enough to take all of it.
    """
    _run(
        "acceptance", checkpoint, clips, out, manifest, transcripts, limit, jobs, None, texts,
        method=_method(method, by), encoder=encoder, refine=refine, steps=steps, seconds=seconds,
        seeds=seeds, device=device,
    )  # fmt: skip


def _method(method: str, by: str | None) -> str:
    if by is None:
        return method
    typer.echo("--by is now --method", err=True)
    return by


def _run(
    kind: str,
    checkpoint: str,
    folder: Path,
    out: Path,
    manifest: Path | None,
    transcripts: Path | None,
    limit: int | None,
    jobs: int,
    grammar: str | None,
    texts: Path | None,
    **settings: Any,
) -> None:
    from rich.console import Console

    from revox.checkpoint.locate import locate
    from revox.evaluation.clips import find_clips

    console = Console(stderr=True, highlight=False)
    # What can be wrong is said before anything is computed.
    clips = find_clips(folder, manifest, transcripts, limit)
    spoken = _texts(texts)
    rules = _grammar(grammar)
    place = locate(checkpoint)
    from revox.evaluation.evaluate import evaluate
    from revox.evaluation.report import write_report
    from revox.evaluation.subject import Setup

    setup = Setup(place, out, texts=spoken, grammar=rules, **settings)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with _Progress(console) as progress:
            report = evaluate(kind, setup, clips, jobs, progress)
    except KeyboardInterrupt:
        kept = f"what is done is kept in {out / 'cache'}; the same command goes on from there"
        console.print(kept, markup=False)
        raise
    paths = write_report(report, out)
    _show(console, report)
    for reason in report.left_out:
        console.print(f"left out: {reason}", markup=False)
    console.print(f"{', '.join(str(path) for path in paths)}", markup=False)


def _texts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    from revox.evaluation.errors import EvaluationError

    texts = tuple(line.strip() for line in _read(path).splitlines() if line.strip())
    if not texts:
        raise EvaluationError(f"{path} holds no text; write one on each line")
    return texts


def _grammar(name: str | None) -> str | None:
    if name is None:
        return None
    if name == "lab":
        from revox.demo import grammar_file

        return grammar_file().read_text(encoding="utf-8")
    from revox.evaluation.errors import EvaluationError

    path = Path(name)
    if path.is_file() and path.stat().st_size > MAX_GRAMMAR:
        raise EvaluationError(f"{path} is larger than {MAX_GRAMMAR >> 10} kB; give a smaller grammar")
    return _read(path)


def _read(path: Path) -> str:
    from revox.evaluation.errors import EvaluationError

    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EvaluationError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); name a text file") from None


class _Progress:
    """One bar for each stage on stderr, with the time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)


def _show(console: Console, report: Report) -> None:
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
