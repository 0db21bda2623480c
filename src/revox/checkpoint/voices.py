"""Voices in a checkpoint folder: list, load, add, remove, export.

A voice NAME is in three places that other people's loaders read: `voice_embedding/NAME.pt` (bf16 `[N, dim]`),
tekken.json (`audio.voice_num_audio_tokens.NAME` = N; mistral-common builds prompts from it) and params.json
(`multimodal.audio_tokenizer_args.voice.NAME`; vllm-omni lists voices from it and loads the .pt of each at
start). revox adds two files: `NAME.codes.safetensors` (int16 `[n_codebooks, frames]`) and `NAME.voice.json`
(provenance). mlx-audio takes every .safetensors in the folder for a voice, so it also offers "NAME.codes".

A folder that was made for mlx-audio may have `NAME.safetensors` in place of NAME.pt, which is read too.

How a voice is added so that no loader sees half of one: `revox.checkpoint.voice_journal`.

Importing this module does not import torch; listing reads headers only.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from revox.checkpoint import consent_log
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.placeholders import unfinished, why_not
from revox.checkpoint.release import PRESETS
from revox.checkpoint.tekken import read_tekken
from revox.checkpoint.tensors import PtHeader, read_header, read_pt_header
from revox.checkpoint.voice_journal import (
    VOICE_FOLDER,
    commit,
    consent_log_path,
    is_file_name,
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

    rows: length of the embedding in its .pt (None when that is missing or unreadable), of the type `dtype`;
    expected_rows: what tekken.json promises (None when it lists no such voice); in_params: whether
    params.json lists it; preset: guarded against being overwritten; problem: a sentence, or None when all is
    well.
    """

    name: str
    rows: int | None
    dtype: str | None
    expected_rows: int | None
    in_params: bool
    preset: bool
    has_codes: bool
    provenance: dict[str, Any]
    problem: str | None


def list_voices(folder: str | Path) -> list[VoiceEntry]:
    """Every voice that params.json or tekken.json lists or a .pt stands for, in params.json's order.

    Reads headers only; a change that was interrupted is finished first, where the folder may be written.
    Raises CheckpointError when params.json or tekken.json cannot be read.
    """
    folder = Path(folder)
    with contextlib.suppress(VoiceError, OSError):
        recover_journal(folder)
    with reading(folder):
        return voice_entries(folder, read_params(folder), promised_rows(folder))


def voice_file(folder: Path, name: str) -> Path:
    """Where a voice's embedding is: NAME.pt, or in its absence mlx-audio's NAME.safetensors."""
    path = folder / VOICE_FOLDER / f"{name}.pt"
    other = path.with_suffix(".safetensors")
    return path if path.is_file() or path.is_symlink() or not other.is_file() else other


def voice_entries(folder: Path, params: Params, promised: Mapping[str, int]) -> list[VoiceEntry]:
    """`list_voices` where both lists have been read already: params.json, and the lengths in tekken.json."""
    on_disk = sorted(path.stem for path in (folder / VOICE_FOLDER).glob("*.pt"))
    entries = []
    for name in dict.fromkeys([*params.voices, *promised, *on_disk]):
        listed, home = name in params.voices, folder / VOICE_FOLDER
        problem: str | None = f"{folder} lists a voice {name!r}, which cannot be a file's name; remove it."
        header, provenance, has_codes = None, {}, False
        if is_file_name(name):
            path = voice_file(folder, name)
            header, problem = _voice_header(path, params.dim, listed, promised.get(name))
            provenance = _read_provenance(folder, name)
            has_codes = (home / f"{name}.codes.safetensors").is_file()
        entries.append(
            VoiceEntry(
                name,
                header.shape[0] if header else None,
                header.dtype if header else None,
                promised.get(name),
                listed,
                _guarded(name, provenance),
                has_codes,
                provenance,
                problem,
            )
        )
    return entries


def _voice_header(
    path: Path, dim: int, listed: bool, promised: int | None
) -> tuple[PtHeader | None, str | None]:
    """The header of a voice's .pt if it is one, and what is wrong with it or with the lists."""
    name, tekken = path.stem, path.parents[1] / "tekken.json"
    if not path.is_file():
        if path.is_symlink():
            return None, f"{path} is a link to a file that is gone; download the checkpoint again."
        lists = [file for file, named in (("params.json", listed), (tekken.name, promised)) if named]
        force = " --force" if _guarded(name, _read_provenance(path.parents[1], name)) else ""
        return None, unfinished(path) or (
            f"{path} is missing, but {' and '.join(lists)} {'list' if lists[1:] else 'lists'} the voice "
            f"{name}; copy the file again or remove the voice (`revox voice remove {name}{force}`)."
        )
    try:
        header = read_pt_header(path) if path.suffix == ".pt" else _only_tensor(path)
    except CheckpointError as error:
        with open(path, "rb") as file:
            bare = file.read(2) == b"\x80\x02"  # torch before 1.6: the loader says what it finds
        return None, None if bare else str(error)
    if len(header.shape) != 2 or header.shape[1] != dim:
        return None, (
            f"{path} holds {header.dtype} {list(header.shape)}, where BF16 [rows, {dim}] was expected: it is "
            "of another model; copy or add the voice again."
        )
    rows, problem = header.shape[0], None
    if promised is not None and promised != rows:
        problem = (
            f"{tekken} gives the voice {name} {promised} rows and {path} has {rows}; set "
            f"audio.voice_num_audio_tokens.{name} to {rows}, or copy both files from one checkpoint."
        )
    elif promised is None and listed:
        problem = (
            f"{tekken} does not list the voice {name} of params.json; set "
            f"audio.voice_num_audio_tokens.{name} to {rows}."
        )
    elif not listed:
        problem = (
            f"params.json does not list the voice {name}, so no runtime offers it; list it with `revox "
            f"voice add {name} {path} --force --consent STATEMENT`."
        )
    return header, problem


def _only_tensor(path: Path) -> PtHeader:
    """The header of a voice in mlx-audio's form: the tensor of that name, or else the first."""
    tensors = read_header(path)
    found = tensors.get(MLX_TENSOR) or next(iter(tensors.values()), None)
    if found is None:
        raise CheckpointError(f"{path} holds no tensor; copy or download it again.")
    return PtHeader(found.shape, found.dtype)


def find_voice(folder: str | Path, name: str) -> VoiceEntry:
    """The entry of one voice. Raises VoiceError, with the nearest names, when there is none."""
    entries = {entry.name: entry for entry in list_voices(folder)}
    if name not in entries:
        raise _unknown(Path(folder), name, list(entries))
    return entries[name]


def load_voice(folder: str | Path, name: str) -> Voice:
    """A voice with its embedding, codes (where they are on record) and provenance.

    Raises VoiceError when it is unknown (the nearest names are offered), its .pt is missing, damaged, of
    another model, or of another length than tekken.json promises.
    """
    folder = Path(folder)
    entry = find_voice(folder, name)
    with reading(folder):
        if entry.problem:
            read_tekken(folder, read_params(folder))  # what is wrong with all voices says more
            raise VoiceError(entry.problem)
        config = read_params(folder).voxtral_config()
        embedding = read_embedding(voice_file(folder, name), config.backbone.dim)
        codes = _read_codes(folder, name, len(embedding) - 1, config)
        return Voice(name, codes, embedding, entry.provenance)


def read_embedding(path: str | Path, dim: int) -> Tensor:
    """The embedding `[N, dim]` bf16 of a voice file: .pt (weights only), .safetensors, or raw bf16 .bin.

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
            found = tensors.get(MLX_TENSOR, next(iter(tensors.values()), None))
        elif path.suffix == ".bin":
            found = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).reshape(-1, dim)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise VoiceError(
            f"{path} holds something else than one tensor, which is not loaded: it could run code; "
            "get the voice from its maker as .safetensors"
        ) from None
    except Exception as error:  # every reader has its own way of refusing a file
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VoiceError(
            why_not(path) or f"{path} cannot be read as a voice ({why[:120]}); copy or download it again"
        ) from None
    if not isinstance(found, torch.Tensor):
        raise VoiceError(f"{path} holds a {type(found).__name__}, where one tensor [N, {dim}] was expected")
    _check_embedding(found, dim, str(path))
    return found.detach().to(torch.bfloat16).contiguous()


def _check_embedding(embedding: Tensor, dim: int, what: str) -> None:
    shape = embedding.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != dim or not embedding.is_floating_point():
        raise VoiceError(
            f"{what} holds {str(embedding.dtype).removeprefix('torch.')} {list(embedding.shape)}, where bf16 "
            f"[frames + 1, {dim}] was expected: it is of another model, make it again with this checkpoint"
        )
    if len(embedding) > MAX_ROWS:  # a small file can claim any number of them
        raise VoiceError(f"{what} holds {len(embedding):,} rows, where at most {MAX_ROWS:,} make a voice")


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
            f"{name[:100]!r} cannot name a voice: use 1 to 64 of the characters a-z, 0-9, _ and -, - not "
            f"first, such as {_like(name)}"
        )
    return name


def _like(name: str) -> str:
    """A name that a voice may have, as like `name` as can be."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    plain = "".join(one for one in plain if not unicodedata.combining(one))
    found = re.sub(r"[^a-z0-9_-]+", "_", plain).strip("_-")[:64]
    # Other scripts: their characters' numbers, which are at least always the same.
    return found or f"voice_{''.join(f'{ord(one):x}' for one in name[:4]) or 1}"


def add_voice(
    folder: str | Path,
    name: str,
    embedding: Tensor,
    codes: Tensor | None,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Add a voice, or replace one, so that every loader sees the old set or a whole new one (see the module).

    embedding: `[N, dim]`, stored as bf16. codes: `[n_codebooks, N - 1]` counted from 0, or None. provenance:
    plain JSON values, not empty (`revox.cloning.consent.provenance`). overwrite: replace a voice of that
    name; force: even a preset. Raises VoiceError when the name will not do, is taken, the shapes do not fit
    this checkpoint, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    folder = Path(folder)
    check_voice_name(name)
    if not provenance:
        raise VoiceError(
            f"voice {name!r} comes without provenance: say how it was made and whose voice it is"
        )
    with writing(folder):
        params, promised, rows = read_params(folder), promised_rows(folder, True), len(embedding)
        _check_free(folder, name, {*params.voices, *promised}, overwrite, force)
        _check_new(name, embedding, codes, params.voxtral_config())
        if codes is not None:
            stored_codes = codes.cpu().to(torch.int16).contiguous()
            stage_file(folder, name, ".codes.safetensors", save({"codes": stored_codes}))
        record = json.dumps(dict(provenance), indent=2, ensure_ascii=False) + "\n"
        stage_file(folder, name, ".voice.json", record)
        stored = embedding.detach().cpu().to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        stage_file(folder, name, ".pt", pt_bytes(stored))
        entry = {
            "operation": "add",
            "name": name,
            "rows": rows,
            "id": params.voices.get(name, max(params.voices.values(), default=-1) + 1),
            "codes": codes is not None,
            # Same length: one rename of the .pt is the whole change.
            "unlist": promised.get(name, rows) != rows or (name in params.voices) != (name in promised),
            "event": consent_log.event("replaced" if name in promised else "added", name, provenance),
        }
        commit(folder, entry)


def _check_new(name: str, embedding: Tensor, codes: Tensor | None, config: VoxtralConfig) -> None:
    _check_embedding(embedding, config.backbone.dim, f"the embedding of voice {name!r}")
    if len(embedding) < 2 or not bool(embedding.isfinite().all()):
        raise VoiceError(f"the embedding of voice {name!r} is empty or not finite; make the voice again")
    shape = [config.codec.n_codebooks, len(embedding) - 1]
    if codes is not None and list(codes.shape) != shape:
        raise VoiceError(f"the codes of voice {name!r} are {list(codes.shape)}, where {shape} was expected")
    if codes is not None and not codes_fit(codes.cpu(), config):
        raise VoiceError(
            f"the codes of voice {name!r} are outside this checkpoint's codebooks; make the voice again"
        )


def remove_voice(folder: str | Path, name: str, force: bool = False) -> None:
    """Take a voice off both lists, then delete its files. A preset needs `force`.

    Raises VoiceError when it is unknown, a preset, or the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        on_disk = (path.stem for path in (folder / VOICE_FOLDER).glob("*.pt"))
        known = {*read_params(folder).voices, *promised_rows(folder, True), *on_disk}
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
    """Whether a voice of that name may be added, to be asked before the work rather than after it.

    Raises VoiceError when the name will not do, is a preset's, or is taken and `overwrite` is not said.
    """
    folder = Path(folder)
    check_voice_name(name)
    _check_free(folder, name, {*read_params(folder).voices, *promised_rows(folder)}, overwrite, force)


def _check_free(folder: Path, name: str, listed: set[str], overwrite: bool, force: bool) -> None:
    if force or (name not in listed and not (folder / VOICE_FOLDER / f"{name}.pt").exists()):
        return
    if _guarded(name, _read_provenance(folder, name)):
        raise VoiceError(
            f"voice {name!r} of {folder} is a preset; choose another name, or say --force to replace it"
        )
    if not overwrite:
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


def save_embedding(path: str | Path, embedding: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write an embedding `[N, dim]` that is of no checkpoint yet, with its record, as .safetensors.

    `revox voice add` takes the file. Raises OSError.
    """
    from safetensors.torch import save

    stored = {MLX_TENSOR: embedding.cpu().contiguous()}
    replace_file(path, save(stored, {"provenance": json.dumps(dict(provenance), ensure_ascii=False)}))


def export_voice(folder: str | Path, name: str, out: str | Path) -> Path:
    """Write a voice's embedding for another runtime, chosen by `out`'s ending; returns the path written.

    .pt is vllm-omni's (one bf16 tensor), .safetensors mlx-audio's (tensor "embedding"; it goes into the
    `voice_embedding` folder there), .bin the C port's (raw little-endian bf16, N x dim). Raises VoiceError
    for another ending or a voice that cannot be loaded.
    """
    import torch
    from safetensors.torch import save

    out = Path(out)
    writers: dict[str, Callable[[Tensor], bytes]] = {
        ".pt": pt_bytes,
        ".safetensors": lambda embedding: save({MLX_TENSOR: embedding}),
        ".bin": lambda embedding: embedding.view(torch.int16).numpy().astype("<i2").tobytes(),
    }
    if out.suffix not in writers:
        endings = ", ".join(f"{suffix} ({runtime})" for suffix, runtime in EXPORT_FORMATS.items())
        raise VoiceError(f"{out} has no ending that tells the format; use one of {endings}")
    if not out.parent.is_dir():
        raise VoiceError(f"{out.parent} is not a folder; make it first")
    replace_file(out, writers[out.suffix](load_voice(folder, name).embedding.clone()))
    return out
