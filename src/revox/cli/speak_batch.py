"""`revox speak --batch`: the lines of a table -> one audio file each, spoken together; resumable."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from revox.cli.marked import log_written, model_name, say, write_sound
from revox.cli.progress import show_progress
from revox.speech.files import append_line, file_stamp, read_text, stamp_of
from revox.synthesis.errors import SpeakError

if TYPE_CHECKING:
    from revox.marking import Signer
    from revox.synthesis.longform import SpeechSettings, SpokenLine

BAD_TAKES = 4
RECORD = "batch.jsonl"
"""What was spoken, a line each, in the folder of the files: what a later run does not speak again."""


class BatchRow(BaseModel):
    """A line of the table. `output` is a file's name in the folder, whose ending is the format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    voice: str | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    output: str | None = None


@dataclass(frozen=True)
class BatchOptions:
    """The command's options: what a line leaves open, and how files are written."""

    voice: str | None
    settings: SpeechSettings
    format: str
    signer: Signer | None
    no_mark: bool
    log_text: bool
    adapter: Path | None = None


@dataclass(frozen=True)
class _Job:
    """A line that can be spoken. `stamp`: of everything that its file depends on."""

    text: str
    voice: str
    settings: SpeechSettings
    target: Path
    kind: str
    stamp: str


def speak_batch(
    table: Path,
    out: Path,
    checkpoint: str,
    revision: str | None,
    options: BatchOptions,
    device: str | None,
    weights: str,
) -> None:
    """Speak every line of `table` into `out`, those that are there already excepted.

    Raises SpeakError, VoiceError and CheckpointError before anything is spoken when a line cannot be; ends
    the command with 4 when something was spoken badly or not at all.
    """
    from rich.console import Console

    import revox
    from revox.checkpoint.locate import locate
    from revox.checkpoint.voices import load_voice
    from revox.synthesis.longform import Line, no_sound_advice

    folder, out = locate(checkpoint, revision), out.expanduser()
    jobs = _jobs(table, out, folder, checkpoint, options, weights)
    voices = {name: load_voice(folder, name) for name in dict.fromkeys(job.voice for job in jobs)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpeakError(f"{out} cannot be made ({error.strerror}); choose another --out") from None
    done = _recorded(out)
    left, warned = list[_Job](), list[str]()
    for job in jobs:
        stamp, warnings = done.get(job.target.name, ("", []))
        if stamp != job.stamp or not job.target.is_file():
            left.append(job)
        else:
            warned += [f"{job.target.name}: {warning}" for warning in warnings]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} lines are spoken already")
    if not left:
        return _end(warned)
    tts = revox.load(folder, device=device, weights=weights, adapter=options.adapter)
    started, seconds, silent = time.perf_counter(), 0.0, 0
    with show_progress(Console(stderr=True)) as progress:
        lines = [Line(job.text, voices[job.voice], job.settings) for job in left]
        for spoken in tts.speak_batch(lines, progress=progress):
            job, what = left[spoken.number], left[spoken.number].target.name
            warned += [f"{what}: {warning}" for warning in spoken.warnings]
            if not len(spoken.audio.samples):
                silent += 1
                advice = no_sound_advice(job.settings.takes)
                warned.append(f"{what}: not written, the model ended at its first frame; {advice}")
                continue
            _write(job, spoken, checkpoint, options, out)
            seconds += spoken.audio.seconds
    took = time.perf_counter() - started
    say(
        f"{out}: {len(left) - silent} files, {seconds:.1f} s of speech in {took:.1f} s "
        f"({tts.model.device.type}, {tts.weights})"
    )
    if options.no_mark:
        say("not marked as synthetic, because of --no-mark (logged)")
    _end(warned)


def _end(warned: list[str]) -> None:
    """Name what may be wrong, of this run and of files that were there, and end the command with 4 then."""
    for warning in warned:
        say(f"warning: {warning}")
    if warned:
        say(f"{len(warned)} parts of the texts may be wrong: listen to them; deleted files are spoken again")
        raise typer.Exit(BAD_TAKES)


def _write(job: _Job, spoken: SpokenLine, checkpoint: str, options: BatchOptions, out: Path) -> None:
    from revox.marking import new_record

    record = new_record(model_name(checkpoint), job.voice[:200])
    digest = write_sound(
        spoken.audio, job.target, job.kind, None if options.no_mark else record, options.signer
    )
    text = job.text if options.log_text else None
    log_written(record, job.kind, digest, options.signer, options.no_mark, text, quiet=True)
    entry = {
        "output": job.target.name,
        "voice": job.voice,
        "seed": job.settings.seed,
        "seconds": round(spoken.audio.seconds, 3),
        "truncated": spoken.audio.truncated,
        "warnings": [str(warning) for warning in spoken.warnings],
        "stamp": job.stamp,
    }
    append_line(out / RECORD, json.dumps(entry, ensure_ascii=False).encode())


def _recorded(out: Path) -> dict[str, tuple[str, list[str]]]:
    """The stamps and warnings of the files that earlier runs wrote."""
    try:
        lines = (out / RECORD).read_bytes().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            warnings = [str(warning) for warning in entry.get("warnings", [])]
            found[str(entry["output"])] = str(entry["stamp"]), warnings
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # a line that a crash cut off
    return found


def _jobs(
    table: Path, out: Path, folder: Path, checkpoint: str, options: BatchOptions, weights: str
) -> list[_Job]:
    from revox import __version__
    from revox.checkpoint.adapter import adapter_files
    from revox.checkpoint.voices import voice_file
    from revox.speech import format_for
    from revox.synthesis.longform import language_of, pieces_of

    files = [*sorted(folder.glob("*.safetensors")), folder / "params.json", folder / "tekken.json"]
    if options.adapter is not None:
        files += adapter_files(options.adapter.expanduser())
    made_by = [__version__, weights, *(file_stamp(path) for path in files)]
    jobs: list[_Job] = []
    taken: dict[str, int] = {}
    for number, (where, row) in enumerate(_rows(table), 1):
        voice = row.voice or options.voice
        if voice is None:
            raise SpeakError(f"{where} names no voice; give it one, or all of them with --voice")
        name = row.output or f"{number:05d}.{options.format}"
        if name != Path(name).name or name.startswith(".") or name == RECORD:
            raise SpeakError(f"{where}: the output {name!r} is not a plain file name; leave folders out")
        if name in taken:
            raise SpeakError(f"{where} writes to {name}, as line {taken[name]} does; give it another output")
        taken[name] = number
        seed = options.settings.seed if row.seed is None else row.seed
        language = options.settings.language or language_of(voice)
        settings = replace(options.settings, seed=seed, language=language)
        try:
            kind = format_for(out / name)
            pieces_of(row.text, settings)
        except ValueError as error:
            raise SpeakError(f"{where}: {error}") from None
        mark = None if options.no_mark else "mark"
        made_of = [*made_by, file_stamp(voice_file(folder, voice))]
        stamp = stamp_of(row.text, voice, settings.__dict__, kind, mark, model_name(checkpoint), made_of)
        jobs.append(_Job(row.text, voice, settings, out / name, kind, stamp))
    if not jobs:
        raise SpeakError(f"{table} has no lines; give it at least one with a text")
    return jobs


def _rows(table: Path) -> Iterator[tuple[str, BatchRow]]:
    """The rows of a table, each with where it is, for messages."""
    text = read_text(table, SpeakError)
    rows: Iterator[tuple[int, Any]]
    if table.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        rows = ((reader.line_num, {k: v for k, v in row.items() if v != ""}) for row in reader)
    elif table.suffix.lower() in (".jsonl", ".ndjson"):
        rows = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        raise SpeakError(f"{table.name} is not a table that is read; end it in .csv or .jsonl")
    try:
        for number, row in rows:
            where = f"{table.name}, line {number}"
            try:
                read = BatchRow.model_validate_json if isinstance(row, str) else BatchRow.model_validate
                yield where, read(row)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(str(part) for part in first["loc"])
                raise SpeakError(
                    f"{where}: {f'{field}: ' if field else ''}{first['msg']}; lines have text, voice, seed "
                    "and output"
                ) from None
    except csv.Error as error:
        raise SpeakError(f"{table.name} is not read as CSV ({error}); save it as CSV in UTF-8") from None
