"""The codec encoder into a checkpoint's weights, and out again.

**How it is written.** The tensors that were there keep their places: the new file is a new header, the old
data in one stretch (copied by the system, which shares the blocks where the file system can), and the
encoder's tensors behind it. It is written beside the old one, synced, read back tensor by tensor, and only
then renamed, so the original is whole until the new file is. A new folder (`out`) is made under a hidden name
and renamed.

**How it is undone.** The header's metadata keeps the header that the file had, compressed; data and header
together are the original, byte for byte. What an adaptation replaces is kept in
`.revox/before-ID.safetensors` first, and `.revox/injection-ID.json` keeps the hash of every tensor that was
there. ID is also in the metadata: what belongs to no injection of these weights (a run was killed) is cleared
away by the next command.

**Links.** No file of a new folder is a hard link to the old one's. revox replaces files by rename, but `cp`,
an editor or `torch.save` write into them, and a voice changed here would change there.

Importing this does not import torch.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from revox.checkpoint.encoder_file import (
    EncoderFile,
    StoredTensor,
    decoder_sha256_of,
    encoder_specs,
    read_adaptation,
    read_encoder,
)
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.release import ENCODER_PREFIXES, TensorSpec, expected_tensors
from revox.checkpoint.rewrite import (
    Layout,
    Piece,
    copy_stretch,
    first_bytes,
    layout_of,
    reached,
    verify_layout,
    write_layout,
)
from revox.checkpoint.share import INJECTION_KEY, checkpoint_card, injection_of, is_ours, shareable
from revox.checkpoint.tensors import (
    FLOAT_DTYPES,
    WEIGHTS,
    TensorHeader,
    read_header,
    read_metadata,
    weight_files,
)
from revox.checkpoint.voice_journal import VOICE_FOLDER, reading, recover_journal
from revox.speech.files import replace_file, sync_folder

HEADER_KEY = "revox_original_header"
"""Where injected weights keep the header that they had: compressed, base64."""

CARD, OTHER_CARD = "MODEL_CARD.md", "MODEL_CARD.revox.md"

Progress = Callable[[str, int, int], None]
"""Called with (checking, writing or verifying; bytes done; bytes in all)."""

_WORK = ".revox"


@dataclass
class InjectionReport:
    """What was done, or with `dry_run` would be.

    folder: with the result; added, removed: the encoder's tensors; adapted: tensors replaced by an
    adaptation's; restored: those of an earlier one, undone; byte_for_byte: the weights are proven to be what
    they were before the injection (eject only); verified: tensors whose hashes were read back; seconds: of
    checking, writing (synced) and verifying; written: bytes; left_out: folders that a new folder lacks.
    """

    folder: Path
    added: int = 0
    removed: int = 0
    adapted: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    encoder_sha256: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    decoder_agrees: bool | None = None
    written: int = 0
    verified: int = 0
    byte_for_byte: bool = False
    card: Path | None = None
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    dry_run: bool = False


def inject(
    folder: str | Path,
    encoder: str | Path,
    out: str | Path | None,
    *,
    adaptation: str | Path | None = None,
    replace: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> InjectionReport:
    """Add a codec encoder to the weights of `folder`.

    Everything is checked before a byte is written. Memory stays in the tens of megabytes.

    Args:
        folder: a checkpoint's, with one file of weights as released.
        encoder: a safetensors file, or a training run's folder (`revox.checkpoint.encoder_file`).
        out: the folder to make; None changes `folder` in place.
        adaptation: merged weights, under the checkpoint's names, that take the place of those there.
        replace: put it in the place of an encoder that is there already. An adaptation that came with that
            one is undone.
        force: even an encoder that says it was trained against another decoder.
        dry_run: check and report only.
        progress: called as it goes.

    Raises:
        CheckpointError: one sentence; the folder is as it was.
    """
    folder, began = Path(folder), time.monotonic()
    params = read_params(folder)
    expected = expected_tensors(params.voxtral_config())
    base = _read_base(folder)
    _check_base(base, expected)
    if not dry_run and out is None:
        _settle_if_writable(folder, params)
    there = [name for name in base.present if name.startswith(ENCODER_PREFIXES)]
    if there and not replace:
        whole = "an encoder" if len(there) == len(encoder_specs(expected)) else "part of an encoder"
        raise CheckpointError(
            f"{base.weights} holds {whole} already ({len(there)} tensors); say --replace, or take it out "
            "with --eject first."
        )
    told = None if progress is None else (lambda done, of: progress("checking", done, of))
    new = read_encoder(encoder, expected, progress=told)
    decoder = decoder_sha256_of(base.tensors, expected)
    agrees = None if "decoder_sha256" not in new.record else new.record["decoder_sha256"] == decoder
    if agrees is False and not force:
        raise CheckpointError(
            f"{new.path} was trained against another decoder than {folder} has, so its codes would decode to "
            "noise; take the encoder of this checkpoint, or say --force."
        )
    adapted = read_adaptation(adaptation, expected, base.tensors) if adaptation is not None else {}

    injection = {
        "id": secrets.token_hex(8),
        "at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "encoder": shareable({"file": new.path.name, **new.record}),
        "encoder_sha256": new.sha256,
        "decoder_sha256": decoder,
        "decoder_agrees": agrees,
        "adapted": sorted(adapted),
        "adaptation": Path(adaptation).name if adaptation is not None else None,
    }
    layout = _with_encoder(base, new, adapted, injection)
    sidecar = layout_of([Piece.of(name, base.tensors[name]) for name in adapted], {"format": "pt"})
    report = InjectionReport(
        folder if out is None else Path(out), added=len(new.tensors), removed=len(there),
        adapted=sorted(adapted), restored=sorted(base.replaced), encoder_sha256=new.sha256, record=new.record,
        decoder_agrees=agrees, dry_run=dry_run,
    )  # fmt: skip
    if agrees is False:
        report.notes.append("the encoder was trained against another decoder; it was injected by force")
    _change(
        folder, out, params, base, layout, sidecar if adapted else None, injection, report, began, progress
    )
    return report


def eject(
    folder: str | Path,
    out: str | Path | None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> InjectionReport:
    """Take the codec encoder out of the weights of `folder`, and undo an adaptation that came with it.

    Weights that revox injected into become the file that they were, byte for byte (`byte_for_byte` says
    whether the hashes kept at injection prove it). From others the encoder's tensors are left out; all other
    tensors keep their bytes, under a new header.

    Args, raises: as `inject`; also CheckpointError when there is no encoder, or when what an adaptation
    replaced is not in `.revox` any more.
    """
    folder, began = Path(folder), time.monotonic()
    params = read_params(folder)
    base = _read_base(folder)
    if not dry_run and out is None:
        _settle_if_writable(folder, params)
    there = [name for name in base.present if name.startswith(ENCODER_PREFIXES)]
    if not there:
        raise CheckpointError(f"{base.weights} holds no encoder; there is nothing to take out.")
    pieces = [Piece.of(name, lies) for name, lies in base.tensors.items()]
    layout = layout_of(pieces, base.metadata) if base.header is None else Layout(base.header, pieces)
    report = InjectionReport(
        folder if out is None else Path(out),
        removed=len(there),
        restored=sorted(base.replaced),
        dry_run=dry_run,
    )
    if base.header is None:
        report.notes.append(
            "the header is written anew: revox did not inject this encoder, or it was changed since"
        )
    hashes = _change(folder, out, params, base, layout, None, None, report, began, progress)
    if not dry_run and base.header is not None:
        _compare_with_kept(base, hashes, report)
    return report


# ---------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class _Base:
    """Weights as if no encoder had been injected: tensors in the order of their data, wherever they lie now.

    present: tensors in the file as it is; data: where their data begin; state: tells whether it changed;
    header: its first bytes as they were (length and JSON), None when they are not on record or it holds no
    encoder; replaced: tensors that an adaptation replaced (they lie in `.revox`); kept: hashes of then.
    """

    weights: Path
    state: tuple[int, ...]
    present: dict[str, TensorHeader]
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    data: int
    header: bytes | None
    replaced: list[str]
    kept: dict[str, Any]


def _read_base(folder: Path) -> _Base:
    files = weight_files(folder)
    if files != [folder / WEIGHTS]:
        raise CheckpointError(
            f"{folder} has its weights in {len(files)} file{'s' if len(files) > 1 else ''} of other names "
            f"({files[0].name}); revox injects into {WEIGHTS}, as released."
        )
    weights = files[0]
    present = read_header(weights)
    metadata = read_metadata(weights)
    injection = injection_of(weights)
    data = min((lies.start for lies in present.values()), default=0)
    stat = weights.stat()
    original = metadata.get(HEADER_KEY, "")
    metadata = {key: value for key, value in metadata.items() if key not in (INJECTION_KEY, HEADER_KEY)}
    plain = {name: lies for name, lies in present.items() if not name.startswith(ENCODER_PREFIXES)}
    header, replaced = None, {}
    if len(plain) < len(present):
        replaced = _replaced(folder, injection)
        header = _original_header(original, plain, data)
    return _Base(
        weights, (stat.st_ino, stat.st_size, stat.st_mtime_ns), present,
        {name: replaced.get(name, lies) for name, lies in plain.items()},
        metadata, data, header, list(replaced), _kept(folder, injection),
    )  # fmt: skip


def _original_header(kept: str, tensors: Mapping[str, TensorHeader], data: int) -> bytes | None:
    """The first bytes that the file had, if they are kept and describe `tensors` with data from `data` on."""
    try:
        raw = zlib.decompress(base64.b64decode(kept, validate=True))
        listed = json.loads(raw)
        listed.pop("__metadata__", None)
        told = {
            name: (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))
            for name, entry in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error):
        return None
    here = {
        name: (lies.dtype, lies.shape, (lies.start - data, lies.end - data)) for name, lies in tensors.items()
    }
    return len(raw).to_bytes(8, "little") + raw if told == here else None


def _replaced(folder: Path, injection: Mapping[str, Any]) -> dict[str, TensorHeader]:
    """Where the tensors that an adaptation replaced lie as they were."""
    adapted = injection.get("adapted") or []
    if not adapted:
        return {}
    path = _beside(folder, injection, "before", "safetensors")
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, which keeps the {len(adapted)} tensors that an adaptation replaced; copy it "
            "from the folder that was injected into, or download the checkpoint again."
        )
    found = read_header(path)
    if sorted(found) != sorted(adapted):
        raise CheckpointError(
            f"{path} does not hold the tensors that were replaced; download the checkpoint again."
        )
    return found


def _kept(folder: Path, injection: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of the time of the injection; empty where they are not there."""
    try:
        kept = json.loads(_beside(folder, injection, "injection", "json").read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _beside(folder: Path, injection: Mapping[str, Any], what: str, ending: str) -> Path:
    return folder / _WORK / f"{what}-{_id_of(injection)}.{ending}"


def _id_of(injection: Mapping[str, Any]) -> str:
    found = str(injection.get("id", ""))
    return found if found.isalnum() else "none"


def _check_base(base: _Base, expected: Mapping[str, TensorSpec]) -> None:
    wanted = {name: spec for name, spec in expected.items() if spec.component != "codec_encoder"}
    missing = [name for name in wanted if name not in base.tensors]
    if missing:
        raise CheckpointError(
            f"{base.weights} lacks {len(missing)} of the {len(wanted)} tensors that params.json asks for, "
            f"{missing[0]} the first; an encoder belongs into a whole checkpoint: copy or download it again."
        )
    for name, spec in wanted.items():
        lies = base.tensors[name]
        if lies.shape != spec.shape or lies.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{base.weights}: tensor {name} is {lies.dtype} {list(lies.shape)}, where params.json asks "
                f"for {spec.dtype} {list(spec.shape)}; inject into the weights as released."
            )


# -------------------------------------------------------------------------------------------- the new file


def _with_encoder(
    base: _Base, encoder: EncoderFile, adapted: Mapping[str, StoredTensor], injection: Mapping[str, Any]
) -> Layout:
    """The base's tensors in their places, the adapted ones exchanged, and the encoder behind them."""
    plain = [Piece.of(name, lies) for name, lies in base.tensors.items()]
    held_one = len(base.present) > len(base.tensors)
    original = base.header or (
        layout_of(plain, base.metadata).header if held_one else first_bytes(base.weights)
    )
    pieces = [Piece.of(name, adapted.get(name, lies)) for name, lies in base.tensors.items()]
    pieces += [Piece.of(name, tensor) for name, tensor in encoder.tensors.items()]
    metadata = {
        **base.metadata,
        INJECTION_KEY: json.dumps(injection, separators=(",", ":")),
        HEADER_KEY: base64.b64encode(zlib.compress(original[8:], 9)).decode(),
    }
    return layout_of(pieces, metadata, base.data)


# --------------------------------------------------------------------------------------------- the folder


def _change(
    folder: Path,
    out: str | Path | None,
    params: Params,
    base: _Base,
    layout: Layout,
    sidecar: Layout | None,
    injection: Mapping[str, Any] | None,
    report: InjectionReport,
    began: float,
    progress: Progress | None,
) -> dict[str, str]:
    """Write the weights, and around them the folder; gives the hash of each tensor written."""

    def told(stage: str) -> Callable[[int, int], None]:
        return (lambda done, of: None) if progress is None else (lambda done, of: progress(stage, done, of))

    rest = [] if out is None else _rest(folder, report)
    report.written = (
        layout.size + (sidecar.size if sidecar else 0) + sum(path.stat().st_size for path in rest)
    )
    report.copied = [str(path.relative_to(folder)) for path in rest]
    _check_target(folder, out)
    _check_room(folder if out is None else Path(out), report.written)
    report.seconds = {"checking": time.monotonic() - began, "writing": 0.0, "verifying": 0.0}
    if report.dry_run:
        return {}
    hashes: dict[str, str] = {}
    before: dict[str, str] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        try:
            return work()
        finally:
            report.seconds[stage] += time.monotonic() - begun

    def put(
        path: Path, content: Layout, into: dict[str, str], then: Callable[[], None] | None = None
    ) -> None:
        def write(file: BinaryIO) -> None:
            timed("writing", lambda: write_layout(file, content, told("writing")))
            reached(f"wrote {path.name}")
            into.update(
                timed("verifying", lambda: verify_layout(Path(file.name), content, told("verifying")))
            )
            reached(f"verified {path.name}")
            if then is not None:
                then()

        replace_file(path, write)
        reached(f"renamed {path.name}")

    with _place(folder, out) as place:
        stat = base.weights.stat()
        if base.state != (stat.st_ino, stat.st_size, stat.st_mtime_ns):
            raise CheckpointError(f"{base.weights} was changed by something else just now; try again.")
        (place / _WORK).mkdir(exist_ok=True)
        if out is not None:
            begun = time.monotonic()
            _copy_rest(folder, place, rest)
            report.seconds["writing"] += time.monotonic() - begun
        if sidecar is not None and injection is not None:
            put(_beside(place, injection, "before", "safetensors"), sidecar, before)

        def keep() -> None:
            # Before the rename: weights that are in place have their hashes beside them.
            if injection is not None:
                original = base64.b64decode(json.loads(layout.header[8:])["__metadata__"][HEADER_KEY])
                kept = {
                    "header_sha256": hashlib.sha256(zlib.decompress(original)).hexdigest(),
                    "tensors": {
                        name: before.get(name, sha)
                        for name, sha in hashes.items()
                        if not name.startswith(ENCODER_PREFIXES)
                    },
                }
                replace_file(_beside(place, injection, "injection", "json"), json.dumps(kept) + "\n")
                reached("kept hashes")

        put(place / WEIGHTS, layout, hashes, keep)
        card = _settle(place, params)
        report.card = None if card is None else report.folder / card.name
    report.verified = len(hashes) + len(before)
    return hashes


def _compare_with_kept(base: _Base, hashes: Mapping[str, str], report: InjectionReport) -> None:
    """Say whether what was restored is proven to be what was there."""
    kept = base.kept.get("tensors")
    if not isinstance(kept, dict) or base.header is None:
        report.notes.append(
            "the header is the original's; hashes of the time of the injection are not there to compare with"
        )
        return
    changed = [name for name in hashes if kept.get(name) != hashes[name]]
    if changed:
        report.notes.append(
            f"{len(changed)} tensors were changed by something else since the injection and stay so, "
            f"{changed[0]} the first"
        )
        return
    same = hashlib.sha256(base.header[8:]).hexdigest() == base.kept.get("header_sha256")
    report.byte_for_byte = same and len(kept) == len(hashes)


@contextlib.contextmanager
def _place(folder: Path, out: str | Path | None) -> Iterator[Path]:
    """The folder to write in, locked: `folder`, or a hidden one that becomes `out` when all went well."""
    if out is None:
        with _locked(folder):
            yield folder
        return
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_killed(out)
    hidden = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    hidden.mkdir()
    try:
        with _locked(hidden):
            yield hidden
            sync_folder(hidden)
            os.replace(hidden, out)
            sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    reached("renamed the folder")


def _clear_killed(out: Path) -> None:
    """Delete what killed runs left of this folder: hidden folders that nobody holds a lock on."""
    for left in out.parent.glob(f".{out.name}.????????.tmp"):
        with contextlib.suppress(CheckpointError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other injections out; voices may be changed and read meanwhile."""
    path = folder / _WORK / "inject.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); make a new folder with --out."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another injection is changing {folder}; wait for it and try again."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _settle_if_writable(folder: Path, params: Params) -> None:
    # Only where there is something of a killed run; a read-only folder says so later, in a sentence.
    if (folder / _WORK).is_dir() and os.access(folder, os.W_OK):
        with _locked(folder):
            _settle(folder, params)


def _settle(folder: Path, params: Params) -> Path | None:
    """Make card and `.revox` agree with the weights, and clear away what killed runs left."""
    injection = injection_of(folder / WEIGHTS)
    holds = any(name.startswith(ENCODER_PREFIXES) for name in read_header(folder / WEIGHTS))
    mine = _id_of(injection) if holds and injection else None
    for at, names in ((folder, (WEIGHTS, CARD, OTHER_CARD)), (folder / _WORK, ("before-*", "injection-*"))):
        for path in (found for name in names for found in at.glob(f".{name}.*.tmp")):
            path.unlink(missing_ok=True)
    for path in (*(folder / _WORK).glob("before-*"), *(folder / _WORK).glob("injection-*")):
        if path.stem.partition("-")[2] != mine:
            path.unlink(missing_ok=True)
    reached("cleared")
    found = [folder / name for name in (CARD, OTHER_CARD) if is_ours(folder / name)]
    if mine is None:
        for card in found:
            card.unlink()
        return None
    card = found[0] if found else folder / (OTHER_CARD if os.path.lexists(folder / CARD) else CARD)
    text = checkpoint_card(injection, params.voxtral_config())
    if not found or card.read_text(encoding="utf-8") != text:
        replace_file(card, text)
    reached("card")
    return card


def _check_target(folder: Path, out: str | Path | None) -> None:
    if out is None:
        if not os.access(folder, os.W_OK):
            raise CheckpointError(f"{folder} cannot be written; make a new folder with --out.")
        return
    target, source = Path(out).resolve(), folder.resolve()
    if target == source:
        raise CheckpointError(
            f"{out} is the checkpoint itself; say --in-place to change it, or name another."
        )
    if source in target.parents:
        raise CheckpointError(f"{out} lies inside the checkpoint; name a folder elsewhere.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{out} is there already; name a folder that is not, or an empty one.")
    if not os.access(_nearest(target), os.W_OK):
        raise CheckpointError(f"{_nearest(target)} cannot be written; name a folder elsewhere.")


def _check_room(target: Path, wanted: int) -> None:
    free = shutil.disk_usage(_nearest(target)).free
    if free < wanted * 1.01:
        raise CheckpointError(
            f"{target} needs {_size(wanted)} and its disk has {_size(free)} free; make room, or "
            "name a folder on another disk with --out."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _nearest(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _rest(folder: Path, report: InjectionReport) -> list[Path]:
    """What a new folder takes over unchanged: the visible files, and those of the voices."""
    with contextlib.suppress(VoiceError, OSError):
        if not report.dry_run:
            recover_journal(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.name == VOICE_FOLDER:
            found += [inner for inner in sorted(path.iterdir()) if inner.is_file() and inner.name[0] != "."]
        elif path.is_dir():
            report.left_out.append(f"{path.name}/")
        elif path.is_file() and path.name != WEIGHTS and not _is_our_card(path):
            found.append(path)
    return found


def _is_our_card(path: Path) -> bool:
    return path.name in (CARD, OTHER_CARD) and is_ours(path)


def _copy_rest(folder: Path, place: Path, rest: list[Path]) -> None:
    """Own copies, sharing blocks where the file system can; links become what they point to."""
    with reading(folder):
        for path in rest:
            target = place / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            with open(target, "xb") as file:
                for _ in copy_stretch(path, file.fileno(), 0, path.stat().st_size):
                    reached("copied")
                os.fsync(file.fileno())
            shutil.copymode(path, target)
            target.chmod(target.stat().st_mode | 0o200)
            sync_folder(target.parent)
