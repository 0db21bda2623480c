"""`revox render`: a script with several voices, or a chapter with one, -> one audio file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from revox.cli.marked import log_written, model_name, say, who_signs, write_sound
from revox.cli.options import Adapter, Checkpoint, Device, Revision, Weights
from revox.cli.progress import show_progress
from revox.cli.speak_command import BAD_TAKES

if TYPE_CHECKING:
    from revox.render.render import Rendering
    from revox.render.script import Script
    from revox.synthesis.normalize import Normalization


def command(
    script: Annotated[
        Path,
        typer.Argument(
            help="YAML (.yaml), lines of `NAME: text`, or, with one --voice, a Markdown or text chapter."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The audio file.")],
    checkpoint: Checkpoint,
    voice: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VOICE for a speaker, again for each; or one VOICE for everything."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="wav, flac, mp3, opus, aac or m4a; else the file's extension tells.")
    ] = None,
    loudness: Annotated[
        float | None, typer.Option(help="LUFS of every segment, -40 to -10; else the script's, or -19.")
    ] = None,
    ceiling: Annotated[float, typer.Option(help="dBTP that no peak passes, -24 to 0.")] = -1.5,
    gap: Annotated[
        float | None, typer.Option(help="Seconds between turns; else the script's, 0.4 (paragraphs 0.6).")
    ] = None,
    music: Annotated[
        Path | None, typer.Option(help="Music under the speech, which goes down where somebody speaks.")
    ] = None,
    subtitles: Annotated[
        Path | None, typer.Option(help="Also write sentence times, to a .vtt or .srt.")
    ] = None,
    chapters: Annotated[
        Path | None, typer.Option(help="Also write the chapters, as the JSON of podcast players.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write what each segment came to, as JSON.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="A folder for spoken segments; else OUTPUT.segments, where old ones are removed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same speech.")] = 0,
    cfg: Annotated[float, typer.Option(help="Strength of guidance, 0 to 10; 1 is none.")] = 1.2,
    max_chars: Annotated[
        int, typer.Option(help="Speak a turn whole up to so many characters, 20 to 2000, and 30 s.")
    ] = 450,
    takes: Annotated[
        int, typer.Option(help="Speak what goes wrong again, at most so many times in all.")
    ] = 3,
    text_normalization: Annotated[
        str, typer.Option(metavar="basic|full|none", help="As of `revox speak`.")
    ] = "basic",
    lexicon: Annotated[
        Path | None, typer.Option(help="Lines of `written = spoken`, as of `revox speak`.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="In which full spells numbers, such as fr; else each voice's.")
    ] = None,
    device: Device = None,
    weights: Weights = "auto",
    adapter: Adapter = None,
    revision: Revision = None,
    no_mark: Annotated[
        bool, typer.Option("--no-mark", help="Do not mark the file as synthetic; that is logged.")
    ] = False,
    signing_certificate: Annotated[
        Path | None, typer.Option(envvar="REVOX_SIGNING_CERTIFICATE", help="PEM chain that signs the mark.")
    ] = None,
    signing_key: Annotated[
        Path | None, typer.Option(envvar="REVOX_SIGNING_KEY", help="Its private key, PEM without a password.")
    ] = None,
) -> None:
    """Speak SCRIPT to one file, each speaker in its voice, all as loud; the file is marked as synthetic."""
    from rich.console import Console

    from revox.render.captions import chapters_json, check_subtitles, write_subtitles
    from revox.render.errors import RenderError
    from revox.render.render import RenderSettings, render
    from revox.speech import format_for
    from revox.speech.files import replace_file
    from revox.synthesis.longform import SpeechSettings
    from revox.synthesis.normalize import load_lexicon

    output = output.expanduser()
    subtitles, chapters, report, cache = (
        path and path.expanduser() for path in (subtitles, chapters, report, cache)
    )
    for path in (output, subtitles, chapters, report):
        if path is not None and not path.parent.is_dir():
            raise RenderError(f"there is no folder {path.parent}; create it or choose another path")
    written = {"--output": output, "--subtitles": subtitles, "--chapters": chapters, "--report": report}
    _check_apart({"the script": script, "--music": music, "--lexicon": lexicon}, written)
    kind = format_for(output, format)
    if kind == "pcm":
        raise RenderError("raw samples have no place for a mark; choose another format")
    if subtitles is not None:
        check_subtitles(subtitles)
    speech = SpeechSettings(
        seed, cfg, None, None, max_chars, takes, cast("Normalization", text_normalization),
        None if lexicon is None else load_lexicon(lexicon), language,
    )  # fmt: skip
    folder = cache or output.with_name(f"{output.name}.segments")
    settings = RenderSettings(folder, cache is None, loudness, ceiling, speech)
    what = _script(script, voice or [], music, gap)
    if what.music is not None:
        _check_apart({"the script's music": Path(what.music.file)}, written)

    import revox
    from revox.checkpoint.locate import locate
    from revox.marking import new_record

    signer = None if no_mark else who_signs(signing_certificate, signing_key)
    tts = revox.load(locate(checkpoint, revision), device=device, weights=weights, adapter=adapter, lazy=True)
    started = time.perf_counter()
    with show_progress(Console(stderr=True)) as progress:
        rendering = render(tts, what, settings, progress)
        voices = ", ".join(dict.fromkeys(one.voice.voice for one in what.segments))
        record = new_record(model_name(checkpoint), voices[:200])
        digest = write_sound(
            rendering.parts(), output, kind, None if no_mark else record, signer, rendering.chapters
        )
    took = time.perf_counter() - started
    how = log_written(record, kind, digest, signer, no_mark)
    if subtitles is not None:
        write_subtitles(subtitles, rendering.cues, len(rendering.speakers) > 1)
    if chapters is not None:
        replace_file(chapters, chapters_json(rendering.chapters, what.title))
    if report is not None:
        replace_file(report, json.dumps(rendering.report(), indent=1, ensure_ascii=False) + "\n")
    bad = _say_what_came(rendering)
    again = sum(one.cached for one in rendering.placed)
    say(
        f"{output}: {rendering.seconds:.1f} s in {took:.1f} s, {len(rendering.placed)} segments, of which "
        f"{again} were spoken before{how}"
    )
    if bad:
        say(f"{bad} segments may be wrong: listen to them (each was spoken up to {takes} times)")
        raise typer.Exit(BAD_TAKES)


def _check_apart(read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """Raises RenderError when a file that is written is one that is read, or is written twice."""
    from revox.render.errors import RenderError

    names: dict[Path, str] = {}
    for name, path in (*read.items(), *written.items()):
        if path is None:
            continue
        place = path.expanduser().resolve()
        if name in written and place in names:
            raise RenderError(f"{name} is the same file as {names[place]} ({path}); name another")
        names[place] = name


def _script(path: Path, voices: list[str], music: Path | None, gap: float | None) -> Script:
    from dataclasses import replace

    from revox.render.errors import RenderError
    from revox.render.script import LONGEST_PAUSE, Music, read_script

    named, narrators = {}, []
    for one in voices:
        name, equals, voice = one.rpartition("=")
        if equals and name.strip() and voice.strip():
            named[name.strip()] = voice.strip()
        else:
            narrators.append(one)
    if len(narrators) > 1:
        raise RenderError(
            f"{' and '.join(narrators)} are two voices for everything; write --voice NAME=VOICE"
        )
    script = read_script(path, named, narrators[0] if narrators else None)
    if music is not None:
        own = script.music.model_dump() if script.music else {}
        script = replace(script, music=Music.model_validate({**own, "file": str(music)}))
    if gap is not None:
        if not 0 <= gap <= LONGEST_PAUSE:
            raise RenderError(f"a gap of {gap:g} s is out of range; give 0 to {LONGEST_PAUSE:g}")
        script = replace(script, gap=gap)
    return script


def _say_what_came(rendering: Rendering) -> int:
    """Levels and warnings on standard error; how many segments may be wrong."""
    if rendering.target < rendering.asked:
        say(
            f"all segments are at {rendering.target:.1f} LUFS instead of {rendering.asked:g}: more "
            "would take more than 6 dB from the peaks of one of them"
        )
    bad = 0
    for one in rendering.placed:
        where = f"segment {one.segment.number} ({one.segment.where}, {one.segment.speaker})"
        if one.limited > 0:
            say(f"{where}: {one.limited:.1f} dB over the ceiling, limited")
        if not one.level.audible:
            say(f"{where}: warning: is silent")
        for warning in one.warnings:
            say(f"{where}: warning: {warning}")
        bad += bool(one.warnings) or not one.level.audible
    for speaker, (low, high) in rendering.loudness_of_speakers().items():
        say(f"{speaker}: {low:.1f} to {high:.1f} LUFS" if high - low >= 0.1 else f"{speaker}: {low:.1f} LUFS")
    return bad
