"""`revox bench`: how fast and how sound speech endpoints are."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli.options import Seed

if TYPE_CHECKING:
    from rich.console import Console

    from revox.bench.neighbor import NeighborProbe
    from revox.bench.plan import BenchPlan, BenchResult
    from revox.endpoints import Endpoint, ReferenceClip, SpeechAnswer


def command(
    endpoint: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND=]ENDPOINT[#MODEL]...",
            help="A server's address, a hosted API (mistral), or a checkpoint's folder or hub id.",
        ),
    ],
    voices: Annotated[
        str | None, typer.Option(help="Names, with commas between; by default all that an endpoint lists.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="A recording to clone instead of voices.")] = None,
    transcript: Annotated[str | None, typer.Option(help="What is said in the reference.")] = None,
    consent: Annotated[
        str | None, typer.Option(help="Whose voice the reference is, and that they agreed.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Requests at each level, at least one a stream.")] = 10,
    streams: Annotated[
        str, typer.Option(help="How many requests at a time, one level after another.")
    ] = "1,4,16",
    texts: Annotated[Path | None, typer.Option(help="What to speak: one text on each line.")] = None,
    formats: Annotated[
        bool, typer.Option("--formats/--no-formats", help="Ask for each file format once.")
    ] = True,
    recognizer: Annotated[
        str, typer.Option(help="none, or whisper:FOLDER_OR_HUB_ID for word errors of the whole files.")
    ] = "none",
    key_from: Annotated[
        list[str] | None,
        typer.Option(help="[ENDPOINT=]VARIABLE that holds an endpoint's key, MISTRAL_API_KEY by itself."),
    ] = None,
    neighbor: Annotated[
        str | None, typer.Option(help="URL of another service: stop when it suffers, fail if it stays slow.")
    ] = None,
    abort_above: Annotated[
        float | None,
        typer.Option(min=0, help="Milliseconds of the neighbor that stop the run; twice its median before."),
    ] = None,
    before: Annotated[str | None, typer.Option(help="A command to run first, such as to stop it.")] = None,
    after: Annotated[
        str | None, typer.Option(help="A command to run at the end, whatever happens, such as to start it.")
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            help="FIGURE[@STREAMS]=NUMBER, such as first_audio.p95@4=0.5; by default failed=0, faulty=0."
        ),
    ] = None,
    at_least: Annotated[
        list[str] | None,
        typer.Option(help="As --at-most, for figures such as characters_per_second."),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Costs and licenses in YAML; default: revox's.")] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What your machine costs, for the price of 1000 characters.")
    ] = None,
    audition: Annotated[
        str | None,
        typer.Option(help="Only speak this phrase in every voice ('-': a phrase of revox's), with a page."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the report; by default bench- and the time.")
    ] = None,
) -> None:
    """Measure speech endpoints: times, real-time factors, status codes, every file; see docs/bench.md.

    Exit code 1 when a limit is broken, a voice of an audition fails or the run was stopped, 130 after
    Ctrl-C; what was measured is saved.
    """
    from rich.console import Console

    from revox.bench.models import read_models
    from revox.bench.summary import BenchLimit, default_limits, failures
    from revox.endpoints import open_endpoints

    console = Console(stderr=True, highlight=False)
    clip = _reference(reference, transcript, consent)
    plan = _plan(voices, clip, n, streams, texts, formats, seed)
    limits = default_limits(
        [BenchLimit.parse(one, True) for one in at_most or ()]
        + [BenchLimit.parse(one, False) for one in at_least or ()]
    )
    _check_limits(limits, plan, recognizer)
    models = read_models(table)
    folder = out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    probe = _probe(neighbor, abort_above, before)
    with (
        _commands(before, after, console) as ended,
        _closing(open_endpoints(endpoint, key_from or ())) as opened,
    ):
        if audition is not None:
            phrase = "" if audition == "-" else audition
            lost = _audition(opened, plan, phrase, folder, console)
        else:
            result, interrupted = _measure(opened, plan, folder, recognizer, probe, console)
    if audition is not None:
        _check_after(ended)
        if lost:
            raise typer.Exit(1)
        return
    if probe is not None:
        _after(probe, result)
    from revox.bench.report import write_bench

    paths = write_bench(result, limits, models, folder, usd_per_hour)
    _show(console, result)
    missed = failures(result, limits)
    for sentence in missed:
        console.print(f"not passed: {sentence}", markup=False, style="yellow")
    console.print(", ".join(map(str, paths)), markup=False)
    _check_after(ended)
    if interrupted:
        raise KeyboardInterrupt
    if missed:
        raise typer.Exit(1)


def _check_after(ended: list[str]) -> None:
    from revox.bench.errors import BenchError

    if ended:
        raise BenchError(ended[0])


def _reference(path: Path | None, transcript: str | None, consent: str | None) -> ReferenceClip | None:
    if path is None:
        return None
    from revox.bench.errors import BenchError
    from revox.endpoints import ReferenceClip
    from revox.speech import encode_audio, read_audio

    if not consent:
        raise BenchError("cloning needs --consent: whose voice the reference is, and that they agreed.")
    # WAV, which every server reads, whatever the recording's format is.
    return ReferenceClip(encode_audio(read_audio(path, max_seconds=60.0), "wav")[0], transcript, consent)


def _plan(
    voices: str | None,
    clip: ReferenceClip | None,
    n: int,
    streams: str,
    texts: Path | None,
    formats: bool,
    seed: int,
) -> BenchPlan:
    from revox.bench.errors import BenchError
    from revox.bench.plan import TEXTS, BenchPlan
    from revox.speech.files import read_text

    levels = [part.strip() for part in streams.split(",") if part.strip()]
    if not levels or not all(level.isdigit() and 0 < int(level) <= 256 for level in levels):
        raise BenchError(f"--streams {streams!r} is not a list of numbers from 1 to 256, such as 1,4,16.")
    spoken: tuple[str, ...] = TEXTS
    if texts is not None:
        spoken = tuple(filter(None, map(str.strip, read_text(texts, BenchError).splitlines())))
        if not spoken:
            raise BenchError(f"{texts} has no text; write one on each line.")
    names = tuple(filter(None, map(str.strip, voices.split(",")))) if voices else None
    if names and clip:
        raise BenchError("give --voices or a --reference, not both.")
    counts = tuple(sorted({int(level) for level in levels}))
    return BenchPlan(spoken, names, clip, n, counts, formats=formats, seed=seed)


def _check_limits(limits: list[Any], plan: BenchPlan, recognizer: str) -> None:
    """A figure that will not be measured is refused now, not after an hour."""
    from revox.bench.errors import BenchError

    for limit in limits:
        if limit.streams not in (None, 1, *plan.streams):
            raise BenchError(f"{limit} is not measured: --streams has no {limit.streams}.")
        if limit.figure == "word_errors_percent" and recognizer == "none":
            raise BenchError("word_errors_percent is not measured: --recognizer is none.")


def _probe(url: str | None, abort_above: float | None, before: str | None) -> NeighborProbe | None:
    """The neighbor's probe, with its baseline taken."""
    if url is None:
        return None
    from revox.bench.neighbor import NeighborProbe

    probe = NeighborProbe(url, abort_above / 1000 if abort_above else None, may_be_down=before is not None)
    probe.baseline()
    return probe


@contextmanager
def _closing(endpoints: list[Endpoint]) -> Iterator[list[Endpoint]]:
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            endpoint.close()


@contextmanager
def _commands(before: str | None, after: str | None, console: Console) -> Iterator[list[str]]:
    """Run `before`, then what is inside, then `after` whatever happens; SIGTERM counts as Ctrl-C.

    Gives a list that has a sentence in the end if `after` failed, so that what was measured is written first.
    Raises BenchError when `before` fails.
    """
    from revox.bench.errors import BenchError

    def run(command: str) -> int:
        console.print(f"running: {command}", markup=False)
        # The user's own command, for the user's own shell.
        return subprocess.run(command, shell=True, check=False, stdin=subprocess.DEVNULL).returncode

    def interrupted(number: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # for whoever handles Ctrl-C just then, such as an event loop

    previous, ended = signal.signal(signal.SIGTERM, interrupted), list[str]()
    try:
        if before is not None and (code := run(before)):
            raise BenchError(f"--before ended with {code}: {before}")
        yield ended
    finally:
        if after is not None:
            again = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not prevent it
            try:
                code = run(after)
            finally:
                signal.signal(signal.SIGINT, again)
            if code:
                ended.append(f"--after ended with {code}; do by hand what it should have done: {after}")
                console.print(ended[0], markup=False, style="yellow")
        signal.signal(signal.SIGTERM, previous)


def _measure(
    opened: list[Endpoint],
    plan: BenchPlan,
    folder: Path,
    recognizer: str,
    probe: NeighborProbe | None,
    console: Console,
) -> tuple[BenchResult, bool]:
    """What was measured, and whether Ctrl-C ended it."""
    from revox.bench.environment import environment
    from revox.bench.plan import BenchResult
    from revox.bench.run import BenchRun
    from revox.cli.progress import show_progress
    from revox.metrics.intelligibility import load_recognizer, word_errors

    result = BenchResult(environment(folder), {})
    listener = load_recognizer(recognizer)
    if listener is not None:
        word_errors("a word", "a word")  # what is missing for it is said now, not after an hour
    stop = probe.should_stop if probe is not None else lambda: None
    with show_progress(console) as progress:
        run = BenchRun(plan, result, folder, listener, stop, progress)
        if probe is not None:
            probe.watch()
        try:
            run.measure(opened)
        except KeyboardInterrupt:
            result.stopped = "stopped by Ctrl-C; what was measured until then is here"
            return result, True
    return result, False


def _after(probe: NeighborProbe, result: BenchResult) -> None:
    """Probe the neighbor again; that it is gone is a failure of the run, whose figures are kept."""
    from revox.bench.errors import BenchError

    try:
        probe.end()
    except BenchError as error:
        result.stopped = result.stopped or str(error)
    result.neighbor = probe.report()


def _audition(opened: list[Endpoint], plan: BenchPlan, phrase: str, folder: Path, console: Console) -> int:
    """Write the audition, name its page, and return how many voices failed."""
    from revox.bench.audition import PHRASE, audition
    from revox.cli.progress import show_progress

    voices = [(one, plan.voices_of(one)) for one in opened if one.clones or plan.reference is None]
    with show_progress(console) as progress:
        page, failed = audition(
            voices, folder, phrase or PHRASE, plan.reference, _sound_writer(opened), progress
        )
    console.print(str(page), markup=False)
    if failed:
        asked = sum(len(names) or 1 for _, names in voices)
        console.print(f"{failed} of {asked} voices failed; the page says how", style="yellow")
    return failed


def _sound_writer(opened: list[Endpoint]) -> Any:
    """Servers' files are written as they came; what a checkpoint here spoke is marked as by `revox speak`."""
    from revox.bench.audition import write_answer

    if all(one.kind != "checkpoint" for one in opened):
        return write_answer
    from revox.cli.marked import who_signs, write_synthetic

    signer = who_signs()

    def write(endpoint: Endpoint, answer: SpeechAnswer, voice: str, path: Path) -> None:
        if endpoint.kind == "checkpoint":
            write_synthetic(path, answer.audio(), endpoint.facts()["model"], voice, signer)
        else:
            write_answer(endpoint, answer, voice, path)

    return write


def _show(console: Console, result: BenchResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    from revox.bench.summary import summarize_levels

    grid = Table(caption="medians and 95th percentiles")
    for title in (
        "endpoint",
        "mode",
        "streams",
        "first audio p50, p95",
        "whole p50, p95",
        "RTF p50",
        "failed",
    ):
        grid.add_column(title, overflow="fold")
    for level in summarize_levels(result):
        figures = level.figures
        failed = f"{100 * (figures['failed'] or 0):.0f} %"
        times = [_pair(figures, name) for name in ("first_audio", "latency")]
        factor = figures["real_time_factor.p50"]
        cells = (*times, "–" if factor is None else f"{factor:.2f}", failed)
        grid.add_row(escape(level.endpoint), level.mode, str(level.streams), *cells)
    console.print(grid)


def _pair(figures: dict[str, float | None], name: str) -> str:
    middle, high = figures[f"{name}.p50"], figures[f"{name}.p95"]
    return "–" if middle is None or high is None else f"{1000 * middle:.0f}, {1000 * high:.0f}"
