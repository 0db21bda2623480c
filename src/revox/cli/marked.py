"""The sound files that commands write: marked as synthetic, with a line in the log of marks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from revox.marking import MarkRecord, Signer
    from revox.speech import Audio
    from revox.speech.write import Chapter


def write_synthetic(
    target: Path | None,
    audio: Audio,
    checkpoint: str,
    voice: str,
    signer: Signer | None,
    format: str | None = None,
) -> None:
    """Write what a checkpoint spoke or decoded in a voice, marked and logged as `revox speak` does.

    target: None is standard output. format: a name of `revox.speech.FORMATS`, by default the path's ending.
    signer: from `who_signs`. Raises AudioError and MarkError.
    """
    from revox.marking import new_record
    from revox.speech import format_for

    record, kind = new_record(model_name(checkpoint), voice[:200]), format_for(target, format)
    log_written(record, kind, write_sound(audio, target, kind, record, signer), signer)


def model_name(checkpoint: str) -> str:
    """The model's name in a mark: the folder's own name without its path, or the hub id."""
    folder = Path(checkpoint).expanduser()
    return (folder.resolve().name or "checkpoint")[:200] if folder.exists() else checkpoint


def who_signs(certificate: Path | None = None, key: Path | None = None) -> Signer | None:
    """The signer of marks; None, with a line on stderr, when marks can only be tags.

    Raises MarkError when a certificate or key is given and cannot sign.
    """
    from revox.marking import MarkError, load_signer
    from revox.marking.manifest import signing_files

    try:
        signer = load_signer(certificate, key)
    except MarkError as error:
        if signing_files(certificate, key) != (None, None):
            raise
        say(f"{error}; marked by tags only")
        return None
    if signer is None:
        say("marked by tags only; what signs a manifest comes with: pip install 'revox[mark]'")
    return signer


def write_sound(
    audio: Audio | Iterable[Audio],
    target: Path | None,
    kind: str,
    record: MarkRecord | None,
    signer: Signer | None,
    chapters: Sequence[Chapter] = (),
) -> str:
    """Write the audio, or its parts as they come, to a path or (None) standard output.

    It is marked unless `record` is None. Returns the SHA-256 of what was written. Raises AudioError and
    MarkError.
    """
    from revox.marking import write_marked_parts
    from revox.speech import Audio

    file = sys.stdout.buffer if target is None else target
    parts = [audio] if isinstance(audio, Audio) else audio
    digest, clipped = write_marked_parts(file, parts, kind, record=record, signer=signer, chapters=chapters)
    if target is None:
        sys.stdout.buffer.flush()
    if clipped:
        say(f"{clipped} samples were beyond full scale and clipped")
    return digest


def log_written(
    record: MarkRecord,
    kind: str,
    digest: str,
    signer: Signer | None,
    no_mark: bool = False,
    text: str | None = None,
    quiet: bool = False,
) -> str:
    """Log what was written, warn when it has no mark, and return the end of a sentence about the mark.

    quiet: no warning, for who gives one for many files.
    """
    from revox.marking import MarkError, how_marked, log_mark

    how = "none" if no_mark else how_marked(kind, signer)
    try:
        log = log_mark(record, format=kind, sha256=digest, how=how, text=text)
    except MarkError as error:
        say(f"not logged: {error}")
        log = None
    logged = f" (logged in {log})" if log else ""
    if quiet:
        pass
    elif no_mark:
        say(f"not marked as synthetic, because of --no-mark{logged}")
    elif how == "none":
        say(f"raw samples have no place for a mark: say where you use them that they are synthetic{logged}")
    return {"manifest": ", marked as synthetic", "tags": ", marked as synthetic by tags"}.get(how, "")


def say(sentence: str) -> None:
    """A line on standard error."""
    print(sentence, file=sys.stderr)
