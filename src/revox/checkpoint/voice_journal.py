"""Changing the voices of a folder so that no loader ever sees half a change: order, journal and lock.

**Order.** Three files cannot change in one step, so they change in an order in which what a loader *lists* is
whole: adding goes codes, provenance, .pt, tekken.json, params.json; removing goes params.json, tekken.json,
files. A voice in params.json (vllm-omni's list) is in tekken.json (mistral-common's), and a voice in
tekken.json has a .pt of that many rows, at every moment. Replacing a voice by one of another length takes its
name off both lists first and puts it back at the end: until then a loader sees the folder without that voice,
never with half of it. With the same length the .pt is swapped in one rename.

**Journal.** All new files are first staged in `.revox/stage`; then `.revox/journal.json` is written, which is
the moment the change is decided. A process killed before it has changed nothing; one killed after it is
finished by the next command (`recover_journal`): every step may be done again. `.revox/lock` keeps two
writers apart.

**Log.** The last step of a change adds a line to `.revox/consent.jsonl` (`revox.checkpoint.consent_log`):
whose voice came with which consent, or that it is gone.

**Links.** Files are replaced by rename, which replaces a link and not what it points to. A `voice_embedding`
that is itself a link to a folder elsewhere is first given a folder of its own, with links to what was there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from revox.checkpoint import consent_log
from revox.checkpoint.errors import VoiceError
from revox.checkpoint.params import read_json
from revox.speech.files import replace_file, sync_folder

VOICE_FOLDER = "voice_embedding"
SUFFIXES = (".codes.safetensors", ".voice.json", ".pt")
"""A voice's files, in the order in which they are put in place: the .pt last, since loaders look for it."""

_WORK = ".revox"
_LOCK_SECONDS = 60.0
_PARAM_KEYS = ("multimodal", "audio_tokenizer_args", "voice")
_TEKKEN_KEYS = ("audio", "voice_num_audio_tokens")

Content = bytes | str | Callable[[BinaryIO], None]


def recover_journal(folder: str | Path) -> str | None:
    """Finish a change that was interrupted, or clear away one that had not begun.

    Returns a sentence about what was done, None when there was nothing to do. Every voice command calls this
    first; it costs one look at the disk when there is nothing to do. Raises VoiceError when there is
    something to do and the folder cannot be written.
    """
    folder = Path(folder)
    work = folder / _WORK
    if not (work / "journal.json").exists() and not (work / "stage").exists():
        return None
    with _locked(folder):
        return _recover(folder)


def promised_rows(folder: Path, to_change: bool = False) -> dict[str, int]:
    """Voice -> length of its embedding, as tekken.json gives it to mistral-common.

    Raises VoiceError if the list is about `to_change` and the file has no place for it.
    """
    path = folder / "tekken.json"
    data = read_json(path)
    audio = _holder(path, data, _TEKKEN_KEYS) if to_change else data.get("audio")
    voices = audio.get("voice_num_audio_tokens") if isinstance(audio, dict) else None
    if not isinstance(voices, dict):
        return {}
    return {name: rows for name, rows in voices.items() if isinstance(rows, int)}


def consent_log_path(folder: Path) -> Path:
    """The path of a folder's log of consent and removals."""
    return folder / _WORK / "consent.jsonl"


def is_file_name(name: str) -> bool:
    """Whether a listed name can be a file's: params.json may come from anywhere."""
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def stage_file(folder: Path, name: str, suffix: str, content: Content) -> None:
    """Stage one of a voice's new files; the voices do not change yet."""
    stage = folder / _WORK / "stage"
    stage.mkdir(exist_ok=True)
    replace_file(stage / f"{name}{suffix}", content)


def commit(folder: Path, entry: dict[str, Any]) -> None:
    """Decide a change and make it: add (with name, rows, id, codes, unlist) or remove (with name).

    `event` is the line for the log.
    """
    replace_file(folder / _WORK / "journal.json", json.dumps(entry) + "\n")
    _apply(folder, entry)


def _recover(folder: Path) -> str | None:
    work = folder / _WORK
    journal = work / "journal.json"
    message = None
    if journal.exists():
        entry = _read_journal(journal)
        _apply(folder, entry)
        done = "added" if entry["operation"] == "add" else "removed"
        message = f"an interrupted change was finished: voice {entry['name']!r} is {done}"
        for name in ("params.json", "tekken.json"):  # temporary files of the killed process
            for path in folder.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)
    elif (work / "stage").exists():
        shutil.rmtree(work / "stage")
        message = "an interrupted change that had not begun was cleared away"
    return message


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        entry = from_json(path.read_bytes())
        good = entry["operation"] in ("add", "remove") and isinstance(entry["name"], str)
        if entry["operation"] == "add":
            good = good and is_file_name(entry["name"])
            good = good and all(isinstance(entry[key], int) for key in ("rows", "id", "codes", "unlist"))
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise VoiceError(f"{path} is damaged; delete it and add or remove the voice again")
    return entry


def _apply(folder: Path, entry: Mapping[str, Any]) -> None:
    """Do what the journal says. Every step may be done again after a kill; the order is the module's."""
    name, stage = entry["name"], folder / _WORK / "stage"
    if entry["operation"] == "remove" or entry["unlist"]:
        _set_in_json(folder / "params.json", _PARAM_KEYS, name, None)
        _set_in_json(folder / "tekken.json", _TEKKEN_KEYS, name, None)
    home = _own_voice_folder(folder)
    if entry["operation"] == "remove":
        # An export for mlx-audio in this folder is a voice to it, and here where there is no .pt.
        for suffix in (*reversed(SUFFIXES), ".safetensors") if is_file_name(name) else ():
            (home / f"{name}{suffix}").unlink(missing_ok=True)
    else:
        if not entry["codes"]:
            (home / f"{name}.codes.safetensors").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            # A file that is not there was moved before the kill.
            with contextlib.suppress(FileNotFoundError):
                os.replace(stage / f"{name}{suffix}", home / f"{name}{suffix}")
        # An export for mlx-audio in this folder is the voice that was replaced.
        (home / f"{name}.safetensors").unlink(missing_ok=True)
        sync_folder(home)
        if not (home / f"{name}.pt").is_file():
            # The staged files were deleted: a voice without an embedding must not be listed.
            (folder / _WORK / "journal.json").unlink()
            raise VoiceError(
                f"the interrupted change to voice {name!r} lost its staged files; add the voice again"
            )
        _set_in_json(folder / "tekken.json", _TEKKEN_KEYS, name, entry["rows"])
        _set_in_json(folder / "params.json", _PARAM_KEYS, name, entry["id"])
    if isinstance(entry.get("event"), dict):
        consent_log.append(consent_log_path(folder), entry["event"], once=True)
    (folder / _WORK / "journal.json").unlink()
    shutil.rmtree(stage, ignore_errors=True)


def _own_voice_folder(folder: Path) -> Path:
    """`voice_embedding`, made this folder's own if it is absent or a link to a folder elsewhere."""
    home = folder / VOICE_FOLDER
    if not home.is_symlink() or folder.resolve() in home.resolve().parents:
        home.mkdir(exist_ok=True)
        return home
    # A link can be swapped for another link in one rename, not for a folder.
    own = folder / f"{VOICE_FOLDER}.own"
    if own.is_dir() and all(path.is_symlink() for path in own.iterdir()):
        shutil.rmtree(own)  # links of an attempt that was killed
    own.mkdir()
    for path in home.resolve().iterdir() if home.exists() else ():
        (own / path.name).symlink_to(path.resolve())
    sync_folder(own)
    temporary = folder / f"{_WORK}/{VOICE_FOLDER}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(own.name)
    os.replace(temporary, home)
    sync_folder(folder)
    return home


def _holder(path: Path, data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for key in keys[:-1]:
        data = data.get(key)  # type: ignore[assignment]
        if not isinstance(data, dict):
            raise VoiceError(
                f"{path} has no section {key!r}, where voices are listed; restore the file as released"
            )
    return data


def _set_in_json(path: Path, keys: tuple[str, ...], name: str, value: int | None) -> None:
    """Set (or, with None, delete) one number in a JSON file, whose layout is kept."""
    text = path.read_bytes().decode()
    data = json.loads(text)
    holder, key = _holder(path, data, keys), keys[-1]
    voices = dict(holder.get(key) or {})
    if voices.get(name) == value:
        return
    voices.pop(name, None) if value is None else voices.update({name: value})
    holder[key] = voices
    indent = re.match(r"\s*\{\s*\n( +)", text)
    escaped = re.search(r"\\u(?!00[01])", text) is not None  # control characters always are
    written = json.dumps(data, indent=len(indent[1]) if indent else None, ensure_ascii=escaped)
    replace_file(path, written + text[len(text.rstrip()) :])


# ---------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The folder's lock for a change; what an earlier one left is finished first."""
    with _locked(folder):
        _recover(folder)
        try:
            yield
        except Exception:
            if not (folder / _WORK / "journal.json").exists():
                shutil.rmtree(folder / _WORK / "stage", ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    path = folder / _WORK / "lock"
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        _take(descriptor, fcntl.LOCK_EX, folder)
        yield
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path) -> None:
    """Whether voices can be changed, for who wants to know before the work; nothing is left behind.

    Raises VoiceError when the folder cannot be written.
    """
    folder = Path(folder)
    for place in (folder, folder / _WORK, folder / VOICE_FOLDER):
        if place.exists():
            try:
                tempfile.TemporaryFile(dir=place).close()
            except OSError as error:
                raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> VoiceError:
    return VoiceError(
        f"{folder} cannot be written ({error.strerror}); copy the checkpoint to a folder of your own"
    )


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep writers out while several files are read; without a lock file nothing was ever written."""
    try:
        descriptor = os.open(folder / _WORK / "lock", os.O_RDONLY)
    except OSError:
        yield
        return
    import fcntl

    try:
        _take(descriptor, fcntl.LOCK_SH, folder)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, kind: int, folder: Path) -> None:
    import fcntl

    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise VoiceError(
                    f"another command is changing the voices of {folder}; wait for it and try again"
                ) from None
            time.sleep(0.02)
