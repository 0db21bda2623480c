"""`revox find`: the best reference clips of one speaker in recordings of any length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from revox.find.export import FoundClip


def command(
    media: Annotated[
        list[Path], typer.Argument(help="Films, podcasts or calls: any audio or video files, of any length.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for the clips, find.json and find.png.")],
    subtitles: Annotated[
        list[Path] | None,
        typer.Option(help="WebVTT or SRT: only what has subtitles is taken; once for each recording."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A clip of the speaker; else the one who speaks most is taken.")
    ] = None,
    pitch: Annotated[
        str | None, typer.Option(metavar="LOW-HIGH", help="The speaker's median pitch in Hz, as 160-260.")
    ] = None,
    seconds: Annotated[
        str, typer.Option(metavar="LEAST-MOST", help="How long a clip may be, in seconds.")
    ] = "10-40",
    most: Annotated[int, typer.Option(min=1, max=50, help="How many clips to write.")] = 5,
) -> None:
    """Find the best reference clips of one speaker in MEDIA: the winner, alternates, and why.

    Clips are 24 kHz mono WAV at -16 LUFS. Nothing is cloned; `revox clone` takes the winner.
    """
    from rich.console import Console

    from revox.cli.progress import show_progress
    from revox.find import FindRequest, find_references
    from revox.find.export import CONSENT, PICTURE, REPORT, prepare_folder, write_findings

    console = Console(stderr=True, highlight=False)
    band = None if pitch is None else _range(pitch, "--pitch", "160-260")
    request = FindRequest(media, subtitles or (), like, band, _range(seconds, "--seconds", "10-40"), most)
    prepare_folder(out, [*media, *request.subtitles, *([like] if like else [])])
    with show_progress(console) as progress:
        findings = find_references(request, progress)
    clips = write_findings(findings, out)
    for one in findings.speakers:
        mark = " (chosen)" if one.number == findings.chosen else ""
        console.print(f"speaker {one.number + 1}: {one.seconds:.0f} s, {one.pitch:.0f} Hz{mark}")
    for note in findings.notes:
        console.print(note, style="yellow", markup=False)
    _print_clips(console, clips)
    console.print(f"The clips, {REPORT} and {PICTURE} are in {out}", markup=False, soft_wrap=True)
    console.print(CONSENT, style="bold", soft_wrap=True)


def _print_clips(console: Console, clips: list[FoundClip]) -> None:
    from rich.table import Table

    table = Table("", "from", "to", "file", "why", box=None, padding=(0, 1, 1, 0))
    for clip in clips:
        why = " ".join(clip.reasons)
        table.add_row(str(clip.rank), _clock(clip.start), _clock(clip.end), clip.file, why)
    console.print(table)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}"


def _range(given: str, option: str, example: str) -> tuple[float, float]:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", given)
    if match is None:
        raise typer.BadParameter(
            f"{given!r} is not a range; give two numbers, as {example}", param_hint=option
        )
    return float(match[1]), float(match[2])
