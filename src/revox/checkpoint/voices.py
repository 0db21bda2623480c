"""Voices in a checkpoint folder: list, load, add, remove, export.

A voice NAME is in three places that other people's loaders read: `voice_embedding/NAME.pt` (bf16 `[N, dim]`),
tekken.json (`audio.voice_num_audio_tokens.NAME` = N; mistral-common builds prompts from it) and params.json
(`multimodal.audio_tokenizer_args.voice.NAME`; vllm-omni lists voices from it and loads the .pt of each at
start). Beside the .pt lie two files of ours: `NAME.codes.safetensors` (int16 `[n_codebooks, frames]`) and
`NAME.voice.json` (provenance). mlx-audio takes every .safetensors there for a voice, so it will offer a
"NAME.codes" nobody asks for.

How a voice is added so that no loader sees half of one: `revox.checkpoint.voice_journal`.

Importing this module does not import torch; listing reads headers only.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from revox.checkpoint import consent_log
from revox.checkpoint.errors import VoiceError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import PRESETS
from revox.checkpoint.voice_journal import (
    VOICE_FOLDER,
    check_writable,
    commit,
    consent_log_path,
    is_file_name,
    listed_ids,
    promised_rows,
    reading,
    recover_journal,
    stage_file,
    writing,
)
from revox.speech.files import pt_bytes, replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from revox.model.config import VoxtralConfig

__all__ = [
    "EXPORT_FORMATS",
    "Voice",
    "VoiceEntry",
    "add_voice",
    "check_voice_free",
    "check_voice_name",
    "check_writable",
    "codes_fit",
    "consent_document",
    "export_voice",
    "find_voice",
    "list_voices",
    "load_voice",
    "read_embedding",
    "recover_journal",
    "remove_voice",
    "rows_in_header",
    "save_codes",
]

EXPORT_FORMATS = {".pt": "vllm-omni", ".safetensors": "mlx-audio", ".bin": "the C port"}

MLX_TENSOR = "embedding"
"""The name mlx-audio looks for in `voice_embedding/NAME.safetensors` (it falls back to the first tensor)."""

MAX_ROWS = 4096
"""Positions that serving has for voice, text and speech together."""

_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,63}")  # a name that begins with - would be read as an option


@dataclass
class Voice:
    """A voice: its embedding, which the backbone reads, and the codes that the embedding is summed from.

    embedding: `[N, dim]` bf16, N = frames + 1, since an end frame closes it. codes: `[n_codebooks, frames]`
    int64, counted from 0; None when they are not on record (a preset of the release).
    """

    name: str
    codes: Tensor | None
    embedding: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Frames of speech; the closing frame is not one."""
        return self.embedding.shape[0] - 1


@dataclass(frozen=True)
class VoiceEntry:
    """What the lists and headers say about a voice, without loading it.

    rows: rows of its .pt (None when it is missing or unreadable); expected_rows: what tekken.json promises
    (None when it is not there); preset: guarded against being overwritten; problem: a sentence, or None when
    all is well.
    """

    name: str
    rows: int | None
    expected_rows: int | None
    preset: bool
    has_codes: bool
    provenance: dict[str, Any]
    problem: str | None


def list_voices(folder: str | Path) -> list[VoiceEntry]:
    """Every voice that params.json or tekken.json lists or a .pt stands for, in params.json's order.

    Reads headers only; a change that was killed half way is finished first, where the folder may be written.
    Raises CheckpointError when params.json or tekken.json cannot be read.
    """
    folder = Path(folder)
    with contextlib.suppress(VoiceError, OSError):
        recover_journal(folder)
    with reading(folder):
        params = read_params(folder)
        promised = promised_rows(folder)
        on_disk = (
            sorted(path.stem for path in (folder / VOICE_FOLDER).glob("*.pt"))
            if (folder / VOICE_FOLDER).is_dir()
            else []
        )
        names = list(dict.fromkeys([*params.voices, *promised, *on_disk]))
        return [_entry(folder, name, params.dim, name in params.voices, promised.get(name)) for name in names]


def find_voice(folder: str | Path, name: str) -> VoiceEntry:
    """The entry of one voice. Raises VoiceError, with the nearest names, when there is none."""
    entries = {entry.name: entry for entry in list_voices(folder)}
    if name not in entries:
        raise _unknown(Path(folder), name, list(entries))
    return entries[name]


def load_voice(folder: str | Path, name: str) -> Voice:
    """A voice with its rows, codes (where they are on record) and provenance.

    Raises VoiceError when it is unknown (the nearest names are offered), its .pt is missing, damaged, of
    another model, or has other rows than tekken.json promises.
    """
    folder = Path(folder)
    entry = find_voice(folder, name)
    with reading(folder):
        if entry.problem:
            raise VoiceError(entry.problem)
        path = folder / VOICE_FOLDER / f"{name}.pt"
        config = read_params(folder).voxtral_config()
        rows = read_embedding(path, config.backbone.dim)
        return Voice(name, _read_codes(folder, name, len(rows) - 1, config), rows, entry.provenance)


def read_embedding(path: str | Path, dim: int) -> Tensor:
    """Rows `[N, dim]` bf16 of a voice file: .pt (loaded as weights only), .safetensors, or raw bf16 .bin.

    Raises VoiceError naming the file, what was expected and what was found.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise VoiceError(f"{path} is missing; copy or download it again, or remove the voice")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
            rows = tensors.get(MLX_TENSOR, next(iter(tensors.values()), None))
        elif path.suffix == ".bin":
            rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16)
            rows = rows.reshape(-1, dim)
        else:
            rows = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise VoiceError(
            f"{path} holds something else than one tensor, which is not loaded: it could run code; "
            "get the voice from its maker as .safetensors"
        ) from None
    except Exception as error:  # every reader has its own way of refusing a file
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VoiceError(
            f"{path} cannot be read as a voice ({why[:120]}); copy or download it again"
        ) from None
    if not isinstance(rows, torch.Tensor):
        raise VoiceError(f"{path} holds a {type(rows).__name__}, where one tensor [N, {dim}] was expected")
    if rows.ndim != 2 or rows.shape[1] != dim or rows.shape[0] < 1 or not rows.is_floating_point():
        raise VoiceError(
            f"{path} holds {str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}, where bf16 "
            f"[N, {dim}] was expected: the voice is of another model, make it again with this checkpoint"
        )
    if rows.shape[0] > MAX_ROWS:  # a small file can claim any number of them
        raise VoiceError(f"{path} holds {rows.shape[0]:,} rows, where at most {MAX_ROWS:,} make a voice")
    return rows.detach().to(torch.bfloat16).contiguous()


def rows_in_header(path: str | Path) -> tuple[int, int] | None:
    """(N, dim) of the tensor in a .pt file, from its pickle's opcodes: nothing is executed and torch is not
    needed.

    None when the file is not a zip with one tensor in it (torch before 1.6, or something else).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            info = archive.getinfo(names[0])
            if info.file_size > 1 << 20:
                return None
            pickled = archive.read(info)
        numbers: list[int] | None = None
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "BINPERSID" and numbers is None:
                numbers = []  # next come the storage's offset, then the shape
            elif numbers is not None and opcode.name.startswith(("BININT", "INT", "LONG")):
                numbers.append(int(argument or 0))
            elif numbers is not None and opcode.name in ("TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"):
                return (numbers[1], numbers[2]) if opcode.name == "TUPLE2" and len(numbers) == 3 else None
    except (OSError, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, NotImplementedError):
        return None
    return None


def _entry(folder: Path, name: str, dim: int, listed: bool, promised: int | None) -> VoiceEntry:
    path = folder / VOICE_FOLDER / f"{name}.pt"
    problem = None
    rows = None
    if is_file_name(name):
        header = rows_in_header(path)
        rows = header[0] if header else None
        if not path.is_file():
            problem = (
                f"{path} is missing although voice {name!r} is listed; copy it again or remove the voice"
            )
        elif header is None:
            # Old or damaged files are left to the loader, which says what it finds.
            problem = (
                None
                if _loadable(path)
                else f"{path} is no voice file or is damaged; copy or download it again"
            )
        elif header[1] != dim:
            problem = (
                f"{path} has rows of {header[1]} values, where {dim} were expected: it is of another model"
            )
        elif promised is not None and promised != rows:
            problem = (
                f"{path} has {rows} rows and {folder / 'tekken.json'} promises {promised} for {name!r}; "
                "copy both files again from one source"
            )
        elif not listed or promised is None:
            missing = "params.json" if not listed else "tekken.json"
            problem = (
                f"{folder / missing} does not list voice {name!r}, so others do not offer it; add it again"
            )
    else:
        problem = f"{folder} lists a voice {name!r}, which cannot be a file's name; remove it"
    provenance = _read_provenance(folder, name) if is_file_name(name) else {}
    codes = folder / VOICE_FOLDER / f"{name}.codes.safetensors"
    return VoiceEntry(
        name,
        rows,
        promised,
        _guarded(name, provenance),
        is_file_name(name) and codes.is_file(),
        provenance,
        problem,
    )


def _loadable(path: Path) -> bool:
    # Files by torch before 1.6 are bare pickles; anything else without a readable header is damage.
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"\x80\x02"
    except OSError:
        return False


def _read_provenance(folder: Path, name: str) -> dict[str, Any]:
    try:
        record = from_json((folder / VOICE_FOLDER / f"{name}.voice.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def codes_fit(codes: Tensor, config: VoxtralConfig) -> bool:
    """Whether codes `[n_codebooks, frames]` are whole numbers, from 0, inside a model's codebooks."""
    import torch

    sizes = torch.tensor(config.codebook_rows)[:, None] - 2
    return not codes.is_floating_point() and not bool(((codes < 0) | (codes >= sizes)).any())


def _read_codes(folder: Path, name: str, frames: int, config: VoxtralConfig) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / VOICE_FOLDER / f"{name}.codes.safetensors"
    if not path.is_file():
        return None
    try:
        codes = load_file(path)["codes"]
    except (OSError, SafetensorError, KeyError):
        raise VoiceError(
            f"{path} cannot be read; delete it (decode then recovers the codes) or add the voice again"
        ) from None
    # A .pt that something else has put here since makes the codes another voice's.
    if codes.shape != (config.codec.n_codebooks, frames) or not codes_fit(codes, config):
        return None
    return codes.long()


def _guarded(name: str, provenance: Mapping[str, Any]) -> bool:
    return name in PRESETS or not provenance or bool(provenance.get("preset"))


def _unknown(folder: Path, name: str, known: list[str]) -> VoiceError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif known:
        hint = f"there are {', '.join(sorted(known)[:8])}{' ...' if len(known) > 8 else ''}"
    else:
        hint = "it has no voices at all"
    return VoiceError(f"{folder} has no voice {name!r}: {hint}")


def check_voice_name(name: str) -> str:
    """`name`, if a new voice may have it. Raises VoiceError (vllm-omni lower-cases requests only)."""
    if not _NAME.fullmatch(name):
        raise VoiceError(
            f"{name!r} cannot name a voice: use 1 to 64 of the characters a-z, 0-9, _ and -, - not first"
        )
    return name


def add_voice(
    folder: str | Path,
    name: str,
    rows: Tensor,
    codes: Tensor | None,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Add a voice, or replace one, so that every loader sees the old set or a whole new one (see the module).

    rows: `[N, dim]`, stored as bf16. codes: `[n_codebooks, N - 1]` counted from 0, or None. provenance: plain
    JSON values, not empty (`revox.cloning.consent.provenance`). overwrite: replace a voice of that name;
    force: even a preset. Raises VoiceError when the name will not do, is taken, the shapes do not fit this
    checkpoint, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    folder = Path(folder)
    check_voice_name(name)
    config = read_params(folder).voxtral_config()
    dim, n_codebooks = config.backbone.dim, config.codec.n_codebooks
    if rows.ndim != 2 or rows.shape[1] != dim or rows.shape[0] < 2 or not rows.is_floating_point():
        raise VoiceError(
            f"the rows of voice {name!r} are {list(rows.shape)}, where [frames + 1, {dim}] was expected"
        )
    if rows.shape[0] > MAX_ROWS:
        raise VoiceError(
            f"voice {name!r} has {rows.shape[0]:,} rows, where at most {MAX_ROWS:,} are possible"
        )
    if not torch.isfinite(rows).all():
        raise VoiceError(f"the rows of voice {name!r} hold values that are not numbers; make the voice again")
    if codes is not None:
        if tuple(codes.shape) != (n_codebooks, rows.shape[0] - 1):
            raise VoiceError(
                f"the codes of voice {name!r} are {list(codes.shape)}, "
                f"where [{n_codebooks}, {rows.shape[0] - 1}] was expected"
            )
        if not codes_fit(codes.cpu(), config):
            raise VoiceError(
                f"the codes of voice {name!r} are outside the codebooks of {folder}; make the voice again"
            )
    if not provenance:
        raise VoiceError(
            f"voice {name!r} comes without provenance: say how it was made and whose voice it is"
        )
    record = json.dumps(dict(provenance), indent=2, ensure_ascii=False) + "\n"

    with writing(folder):
        promised = promised_rows(folder)
        check_voice_free(folder, name, overwrite, force)
        if codes is not None:
            stored_codes = codes.cpu().to(torch.int16).contiguous()
            stage_file(folder, name, ".codes.safetensors", save({"codes": stored_codes}))
        stage_file(folder, name, ".voice.json", record)
        stored = rows.detach().cpu().to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        stage_file(folder, name, ".pt", pt_bytes(stored))
        voices = listed_ids(folder)
        entry = {
            "operation": "add",
            "name": name,
            "rows": int(rows.shape[0]),
            "id": voices.get(name, max(voices.values(), default=-1) + 1),
            "codes": codes is not None,
            # Same length: one rename of the .pt is the whole change.
            "unlist": promised.get(name, rows.shape[0]) != rows.shape[0]
            or (name in voices) != (name in promised),
            "event": consent_log.event("replaced" if name in promised else "added", name, provenance),
        }
        commit(folder, entry)


def remove_voice(folder: str | Path, name: str, force: bool = False) -> None:
    """Take a voice off both lists, then delete its files. A preset needs `force`.

    Raises VoiceError when it is unknown, a preset, or the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        known = {
            *listed_ids(folder),
            *promised_rows(folder),
            *(path.stem for path in (folder / VOICE_FOLDER).glob("*.pt")),
        }
        if name not in known:
            raise _unknown(folder, name, sorted(known))
        record = _read_provenance(folder, name) if is_file_name(name) else {}
        if not force and _guarded(name, record):
            raise VoiceError(f"voice {name!r} of {folder} is a preset; say --force to remove it all the same")
        # The tombstone keeps whose voice it was and of which recording; the voice itself is gone.
        tombstone = consent_log.event("removed", name, record)
        commit(folder, {"operation": "remove", "name": name, "event": tombstone})


def consent_document(folder: str | Path, name: str | None = None) -> dict[str, Any]:
    """Everything a folder knows of consent, of one voice or of all, as one JSON.

    Of each: statement, whose voice, when, the recording's hash, the method, and the log's lines; removed ones
    have only those. Raises VoiceError for a voice that neither the folder nor its log knows, or when the log
    cannot be read.
    """
    folder = Path(folder)
    entries = [entry for entry in list_voices(folder) if entry.provenance]
    try:
        lines = consent_log.read(consent_log_path(folder))
    except OSError as error:
        raise VoiceError(
            f"{consent_log_path(folder)} cannot be read ({error.strerror}); check its permissions"
        ) from None
    found = consent_log.document([(e.name, e.provenance) for e in entries], lines, folder.resolve().name)
    if name is not None:
        found["voices"] = [voice for voice in found["voices"] if voice["voice"] == name]
        if not found["voices"]:
            find_voice(folder, name)
            raise VoiceError(f"voice {name!r} of {folder} has no record of consent: it came with the release")
    return found


def check_voice_free(folder: str | Path, name: str, overwrite: bool = False, force: bool = False) -> None:
    """Whether a voice of that name may be added, for who wants to know before the work rather than after it.

    Raises VoiceError when the name will not do, is a preset's, or is taken and `overwrite` is not said.
    """
    folder = Path(folder)
    check_voice_name(name)
    taken = (
        name in listed_ids(folder)
        or name in promised_rows(folder)
        or (folder / VOICE_FOLDER / f"{name}.pt").exists()
    )
    if not taken:
        return
    if not force and _guarded(name, _read_provenance(folder, name)):
        raise VoiceError(
            f"voice {name!r} of {folder} is a preset; choose another name, or say --force to replace it"
        )
    if not (overwrite or force):
        raise VoiceError(
            f"{folder} already has a voice {name!r}; choose another name, or say --overwrite to replace it"
        )


def save_codes(path: str | Path, codes: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write codes `[n_codebooks, frames]` that are of no checkpoint yet, with their record, as .safetensors.

    `revox voice add` takes the file. Raises OSError.
    """
    import torch
    from safetensors.torch import save

    stored = {"codes": codes.cpu().to(torch.int16).contiguous()}
    replace_file(path, save(stored, {"provenance": json.dumps(dict(provenance), ensure_ascii=False)}))


def export_voice(folder: str | Path, name: str, out: str | Path) -> Path:
    """Write a voice's rows for another runtime, chosen by `out`'s ending; returns the path written.

    .pt is vllm-omni's (one bf16 tensor), .safetensors mlx-audio's (tensor "embedding"; it goes into the
    `voice_embedding` folder there), .bin the C port's (raw little-endian bf16, N x dim). Raises VoiceError
    for another ending or a voice that cannot be loaded.
    """
    import torch

    out = Path(out)
    writers: dict[str, Callable[[Tensor], bytes]] = {
        ".pt": pt_bytes,
        ".safetensors": _as_safetensors,
        ".bin": lambda rows: rows.view(torch.int16).numpy().astype("<i2").tobytes(),
    }
    if out.suffix not in writers:
        endings = ", ".join(f"{suffix} ({runtime})" for suffix, runtime in EXPORT_FORMATS.items())
        raise VoiceError(f"{out} has no ending that tells the format; use one of {endings}")
    if not out.parent.is_dir():
        raise VoiceError(f"{out.parent} is not a folder; make it first")
    voice = load_voice(folder, name)
    replace_file(out, writers[out.suffix](voice.embedding.clone()))
    return out


def _as_safetensors(rows: Tensor) -> bytes:
    from safetensors.torch import save

    return save({MLX_TENSOR: rows})
