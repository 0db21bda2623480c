"""`revox speak`: text and a voice -> an audio file."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from revox.cli.marked import log_written, model_name, say, who_signs, write_sound
from revox.cli.options import Adapter, Checkpoint, Device, Revision, Weights
from revox.cli.progress import show_progress
from revox.synthesis.errors import SpeakError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from revox.progress import ProgressCallback
    from revox.speech import Audio
    from revox.synthesis.longform import SentenceTime
    from revox.synthesis.normalize import Normalization
    from revox.synthesis.takes import TakeWarning

BAD_TAKES = 4
"""The exit code when the file is written and parts of the text may be wrong in it."""


OLD_NAMES = {"--dtype": "--weights"}


def command(
    checkpoint: Checkpoint,
    voice: Annotated[
        str | None, typer.Option(help="A voice of the checkpoint; see `revox voice list`.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The audio file; - is standard output.")
    ] = None,
    text: Annotated[
        str | None, typer.Argument(help="What to say; - reads it from standard input.", show_default=False)
    ] = None,
    file: Annotated[str | None, typer.Option(help="Read the text from a file; - is standard input.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help="Speak every line of a .csv or .jsonl with text and, if you like, voice, seed and output; "
            "lines that are spoken already are left as they are."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the files of --batch.")] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Also write when each sentence is heard, to a .vtt, .srt or .json; each is a take then."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="wav, flac, mp3, opus, aac, m4a or pcm; else the file's extension tells, - is wav."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same speech.")] = 0,
    cfg: Annotated[float, typer.Option(help="Strength of guidance, 0 to 10; 1 is none.")] = 1.2,
    flow_steps: Annotated[
        int | None,
        typer.Option(help="Steps for a frame's acoustic codes, 1 to 100; else the checkpoint's own (7)."),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop after so many seconds of speech; else at the text's end.")
    ] = None,
    max_chars: Annotated[
        int, typer.Option(help="Speak at most so many characters at a time, 20 to 2000, cut at sentences.")
    ] = 300,
    takes: Annotated[
        int,
        typer.Option(
            help="Speak what goes wrong again, at most so many times in all; 1 is the model's own first take."
        ),
    ] = 3,
    text_normalization: Annotated[
        str,
        typer.Option(
            metavar="basic|full|none",
            help="basic reads markup and URLs as text and [pause:1s] as silence; full spells numbers "
            "as well; none changes nothing.",
        ),
    ] = "basic",
    lexicon: Annotated[
        Path | None,
        typer.Option(help="Lines of `written = spoken`: how to write words so that they are read rightly."),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="In which full spells numbers, such as fr; else the voice's.")
    ] = None,
    device: Device = None,
    weights: Weights = "auto",
    adapter: Adapter = None,
    revision: Revision = None,
    no_mark: Annotated[
        bool, typer.Option("--no-mark", help="Do not mark the file as synthetic; that is logged.")
    ] = False,
    signing_certificate: Annotated[
        Path | None,
        typer.Option(
            envvar="REVOX_SIGNING_CERTIFICATE",
            help="PEM chain that signs the mark; else one made on this machine.",
        ),
    ] = None,
    signing_key: Annotated[
        Path | None, typer.Option(envvar="REVOX_SIGNING_KEY", help="Its private key, PEM without a password.")
    ] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="Keep the text too in the log of what was spoken.")
    ] = False,
) -> None:
    """Speak TEXT in a voice of a checkpoint; the file is marked as synthetic."""
    from rich.console import Console

    from revox.marking import new_record
    from revox.speech import format_for
    from revox.synthesis.longform import SpeechSettings, language_of, pieces_of
    from revox.synthesis.normalize import load_lexicon

    settings = SpeechSettings(
        seed, cfg, flow_steps, max_seconds, max_chars, takes,
        cast("Normalization", text_normalization), None if lexicon is None else load_lexicon(lexicon),
        language, by_sentence=times is not None,
    )  # fmt: skip
    if batch is not None:
        from revox.cli.speak_batch import BatchOptions, speak_batch

        alone = {"TEXT": text, "--file": file, "--output": output, "--times": times}
        check_batch_options(out, alone)
        signer = None if no_mark else who_signs(signing_certificate, signing_key)
        options = BatchOptions(voice, settings, format or "wav", signer, no_mark, log_text, adapter)
        speak_batch(batch, cast(Path, out), checkpoint, revision, options, device, weights)
        return
    if out is not None:
        raise SpeakError("--out is the folder of --batch; name one file with -o")
    if voice is None:
        raise SpeakError("there is no voice; name one with --voice (`revox voice list` shows them)")
    words = _text(text, file)
    target = _target(output)
    kind = format_for(target, format or ("wav" if target is None else None))
    if times is not None:
        from revox.render.captions import check_times, write_times

        check_times(times)
    settings = replace(settings, language=language or language_of(voice))

    import revox
    from revox.checkpoint.locate import locate
    from revox.checkpoint.voices import load_voice

    # What cannot be spoken, and a voice that is not there, is said before gigabytes are read.
    pieces_of(words, settings)
    folder = locate(checkpoint, revision)
    spoken_in = load_voice(folder, voice)
    record = new_record(model_name(checkpoint), voice)
    signer = None if no_mark else who_signs(signing_certificate, signing_key)
    tts = revox.load(folder, device=device, weights=weights, adapter=adapter)
    spoken = _Spoken(takes)
    started = time.perf_counter()
    sentence_times: list[SentenceTime] = []
    with show_progress(Console(stderr=True)) as progress:
        if target is None and kind == "pcm" and times is None:
            # Raw samples are heard as they are made: `... -o - --format pcm | aplay -r 24000 -f S16_LE`.
            parts = spoken.counted(tts.stream(words, spoken_in, settings, report=spoken.warnings.append))
            digest = _write_raw(parts, progress)
        else:
            parts = tts.speak_parts(
                words,
                spoken_in,
                settings,
                progress=progress,
                report=spoken.warnings.append,
                times=sentence_times,
            )
            digest = write_sound(spoken.counted(parts), target, kind, None if no_mark else record, signer)
    took = time.perf_counter() - started
    if times is not None:
        write_times(times, sentence_times)
    how = log_written(record, kind, digest, signer, no_mark, words if log_text else None)
    if spoken.truncated and max_seconds is not None and spoken.seconds + 0.08 > max_seconds:
        say(f"stopped at --max-seconds {max_seconds:g}: the model had not finished")
    say(
        f"{target or 'standard output'}: {spoken.seconds:.2f} s of speech in {took:.2f} s, real-time factor "
        f"{took / spoken.seconds:.3f} ({tts.model.device.type}, "
        f"{tts.weights}), voice {voice}, seed {seed}{how}"
    )
    if spoken.warnings:
        for warning in spoken.warnings:
            say(f"warning: {warning}")
        again = "--takes 3 speaks such pieces again" if takes == 1 else f"each was spoken {takes} times"
        say(f"{len(spoken.warnings)} parts of the text may be wrong: listen to them ({again})")
        raise typer.Exit(BAD_TAKES)


def check_batch_options(out: Path | None, alone: Mapping[str, object]) -> None:
    """Raise SpeakError when a batch has no folder, or an option that belongs to one text."""
    given = next((name for name, value in alone.items() if value is not None), None)
    if given is not None:
        raise SpeakError(f"{given} belongs to one text, and --batch has many; leave one of the two out")
    if out is None:
        raise SpeakError("--batch writes many files; name their folder with --out")


class _Spoken:
    """What came of a text: its length, whether speech is missing, and what no take said well."""

    def __init__(self, takes: int) -> None:
        self._takes = takes
        self.seconds, self.truncated = 0.0, False
        self.warnings: list[TakeWarning] = []

    def counted(self, parts: Iterator[Audio]) -> Iterator[Audio]:
        for part in parts:
            self.seconds, self.truncated = self.seconds + part.seconds, part.truncated
            yield part
        if not self.seconds:
            from revox.synthesis.longform import no_sound_advice

            raise SpeakError(
                "the model ended at its first frame, without a sound, and nothing was written; "
                f"{no_sound_advice(self._takes)}"
            )


def _text(text: str | None, file: str | None) -> str:
    if text is not None and file is not None:
        raise SpeakError("the text is given twice, as an argument and by --file; leave one out")
    if text is None and file is None:
        raise SpeakError('there is no text; give it in quotes, by --file, or pipe it in with "-"')
    if text is not None and text != "-":
        return text
    name = "standard input" if file in (None, "-") else str(file)
    try:
        data = sys.stdin.buffer.read() if file in (None, "-") else Path(str(file)).expanduser().read_bytes()
        # Neither a byte order mark nor the end of the last line is text.
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SpeakError(f"{name} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    except OSError as error:
        raise SpeakError(f"{name} cannot be read ({error.strerror}); name a text file") from None


def _target(output: str | None) -> Path | None:
    """The path to write, or None for standard output; what cannot work is said before any work is done."""
    if output is None:
        raise SpeakError("there is no place for the speech; name a file with -o, or - for standard output")
    if output == "-":
        if sys.stdout.isatty():
            raise SpeakError("audio would go to the terminal; pipe it somewhere or name a file with -o")
        return None
    path = Path(output).expanduser()
    if path.is_dir():
        raise SpeakError(f"{path} is a folder; name a file in it, such as {path / 'speech.wav'}")
    if not path.parent.is_dir():
        raise SpeakError(f"there is no folder {path.parent}; create it or choose another path")
    return path


def _write_raw(parts: Iterator[Audio], progress: ProgressCallback) -> str:
    """Write samples to standard output as they come; returns the SHA-256 of all."""
    import hashlib

    from revox.progress import Progress
    from revox.speech import encode_audio

    seconds, digest = 0.0, hashlib.sha256()
    for part in parts:
        data, _ = encode_audio(part, "pcm")
        digest.update(data)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        seconds += part.seconds
        progress(Progress("speaking", round(12.5 * seconds), facts={"seconds": seconds}))
    return digest.hexdigest()
