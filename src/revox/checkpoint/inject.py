"""The codec encoder into a checkpoint folder, and its own file out again.

**A file of its own.** The encoder's tensors are written to `consolidated.encoder.safetensors` beside the
weights, which stay as they are: vLLM's loader for the mistral format reads every `consolidated*.safetensors`
of a folder. Where an index lists the weights of a sharded folder, it is made to list the encoder's tensors
too, since vLLM then reads only the files that it lists.

**Merged.** With `merge` a new folder has weights and encoder in one `consolidated.safetensors`, for runtimes
that read no other file, and with the tensors of an adaptation in place of the release's. Where these change
the table of audio codes, voices that are sums over it are summed again in the new folder; presets, whose
embedding is the release's, stay.

Files are replaced in one step and a new folder appears whole, so a killed command leaves the old state or the
new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from revox.checkpoint.encoder_file import (
    RECORD_KEY,
    Encoder,
    check_adaptation,
    decoder_sha256,
    read_encoder,
    read_record,
    released_sha256,
    write_encoder,
)
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.params import read_json, read_params
from revox.checkpoint.readable import check_tensors
from revox.checkpoint.release import EMBEDDING_TABLE, ENCODER_PREFIXES, TensorSpec, expected_tensors
from revox.checkpoint.share import INJECTION_KEY, injection_of, is_ours, model_card, shareable
from revox.checkpoint.tensors import (
    ENCODER_WEIGHTS,
    FLOAT_DTYPES,
    INDEX,
    WEIGHTS,
    Provider,
    TensorHeader,
    folder_tensors,
    open_weights,
    tensor_blocks,
    write_safetensors_stream,
)
from revox.checkpoint.voice_journal import VOICE_FOLDER, reading, recover_journal
from revox.checkpoint.voices import add_voice, list_voices, load_voice
from revox.progress import ProgressCallback, ignore_progress
from revox.speech.files import replace_file

CARD = "consolidated.encoder.md"

_OLD_CARDS = ("MODEL_CARD.md", "MODEL_CARD.revox.md")
"""The card of version 0.1, which had merged weights only."""

_LEFTOVER_SECONDS = 3600


@dataclass(frozen=True)
class InjectionOptions:
    """How an encoder is injected.

    out: the folder to make; None changes the checkpoint's own. merge: into one file of weights, in a new
    folder. adaptation: merged weights, under the checkpoint's names, that take the place of those there (with
    `merge`). replace: in the place of an encoder that is there already. force: even an encoder that says it
    was trained against another decoder, or an adaptation of another model. dry_run: check and report only.
    """

    out: Path | None = None
    merge: bool = False
    adaptation: Path | None = None
    replace: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass
class InjectionReport:
    """What was done, or in a dry run would be.

    folder: with the result; file: that the encoder went into or came out of; added, removed: the encoder's
    tensors; adapted: tensors replaced by an adaptation's; written: bytes of weights; left_out: folders that a
    new folder lacks.
    """

    folder: Path
    file: str
    added: int = 0
    removed: int = 0
    adapted: list[str] = field(default_factory=list)
    encoder_sha256: str | None = None
    decoder_agrees: bool | None = None
    written: int = 0
    left_out: list[str] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    dry_run: bool = False


def inject(
    folder: str | Path,
    encoder: str | Path | None,
    options: InjectionOptions = InjectionOptions(),
    progress: ProgressCallback = ignore_progress,
) -> InjectionReport:
    """Add a codec encoder to a checkpoint folder. Everything is checked before a byte is written.

    Args:
        folder: a checkpoint's.
        encoder: a safetensors file, or a training run's folder (`revox.checkpoint.encoder_file`); None, with
            an adaptation, leaves the encoder, or its absence, as it is.
        options: where it goes, and what it may replace.
        progress: called while all weights are written anew.

    Raises:
        CheckpointError: one sentence; the folder is as it was.
    """
    folder = Path(folder)
    config = read_params(folder).voxtral_config()
    expected = expected_tensors(config)
    there, base = _split(folder)
    check_tensors(base, {n: spec for n, spec in expected.items() if spec.component != "codec_encoder"})
    if encoder is None and options.adaptation is None:
        raise CheckpointError("there is nothing to write: name an encoder, or an adaptation.")
    if encoder is not None and there and not options.replace:
        raise CheckpointError(
            f"{folder} has an encoder already, in {next(iter(there.values())).file.name}; say --replace, or "
            "take it out with --eject first."
        )
    if options.out is not None and options.out.resolve() == folder.resolve():
        raise CheckpointError(
            f"{options.out} is the checkpoint itself; name a new folder, or leave --out out to add "
            "the encoder to this one."
        )
    if not options.merge:
        _check_outside(folder, there)
    if (options.merge or options.adaptation) and not (options.merge and options.out):
        raise CheckpointError(
            "--merge and --adaptation write all weights anew, into a new folder; say --merge --out FOLDER."
        )
    new, record = _encoder_to_write(encoder, there, expected)
    decoder = decoder_sha256(folder)
    agrees = None if "decoder_sha256" not in record else record["decoder_sha256"] == decoder
    if encoder is not None and agrees is False and not options.force:
        raise CheckpointError(
            f"{encoder} was trained against another decoder than {folder} has, so its codes would decode to "
            "noise; take the encoder of this checkpoint, or say --force."
        )
    adapted: Mapping[str, TensorHeader] = {}
    if options.adaptation is not None:
        adapted = check_adaptation(options.adaptation, expected)
        if coarse := [name for name in adapted if name not in base or base[name].dtype not in FLOAT_DTYPES]:
            raise CheckpointError(
                f"{folder} holds {coarse[0]} in fewer bits, where an adaptation cannot go; write it into the "
                "checkpoint as released, then quantize that."
            )
        base_sha256 = read_record(options.adaptation).get("base_sha256", "")
        if base_sha256 and base_sha256 != released_sha256(folder) and not options.force:
            raise CheckpointError(
                f"{options.adaptation} was learned on another model than {folder} holds; take the checkpoint "
                "that was adapted, or say --force."
            )
    injection = {
        "at": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "encoder": shareable(record),
        "encoder_sha256": new.sha256 if new else None,
        "decoder_sha256": decoder,
        "decoder_agrees": agrees,
        "adapted": sorted(adapted),
        "adaptation": options.adaptation.name if options.adaptation is not None else None,
        "adaptation_record": shareable(read_record(options.adaptation)) if options.adaptation else None,
        "before": _adapted_before(base),
    }
    report = InjectionReport(
        options.out or folder,
        WEIGHTS if options.merge else ENCODER_WEIGHTS,
        added=len(new.tensors) if new else 0,
        removed=len(there),
        adapted=sorted(adapted),
        encoder_sha256=new.sha256 if new else None,
        decoder_agrees=agrees,
        written=(2 * new.parameters if new else 0) + (_bytes(base) if options.out else 0),
        dry_run=options.dry_run,
    )
    _check_target(folder, report)
    if EMBEDDING_TABLE in adapted:
        _sort_voices(folder, report)
    if options.dry_run:
        return report
    metadata = {
        "format": "pt",
        **({RECORD_KEY: json.dumps(injection["encoder"])} if new else {}),
        INJECTION_KEY: json.dumps(injection, separators=(",", ":")),
    }
    with folder_to_write(folder, report.folder, base if options.merge else {}) as place:
        if options.merge:
            _write_merged(place / WEIGHTS, base, adapted, new, metadata, progress)
            _rebuild_voices(place, report.rebuilt)
        elif new is not None:
            write_encoder(place / ENCODER_WEIGHTS, new, metadata)
            _list_in_index(place, new.tensors)
        if new is not None:
            replace_file(place / CARD, model_card(new, injection["encoder"], injection))
    return report


def _encoder_to_write(
    encoder: str | Path | None, there: Mapping[str, TensorHeader], expected: Mapping[str, TensorSpec]
) -> tuple[Encoder | None, dict[str, Any]]:
    """The encoder of a file, or else the one that is there, and its record; None where there is neither."""
    if encoder is not None:
        new = read_encoder(encoder, expected)
        return new, {"file": new.path.name, **new.record}
    if not there:
        return None, {}
    new = read_encoder(next(iter(there.values())).file, expected, inside=True)
    return new, injection_of(new.path).get("encoder") or {}


def eject(folder: str | Path, *, dry_run: bool = False) -> InjectionReport:
    """Delete the encoder's own file from a checkpoint folder, with its card and its entries in the index.

    Raises:
        CheckpointError: there is no encoder, or it is inside the file of the model's weights.
    """
    folder = Path(folder)
    there, _ = _split(folder)
    if not there and not (folder / ENCODER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no encoder; there is nothing to take out.")
    _check_outside(folder, there)
    report = InjectionReport(folder, ENCODER_WEIGHTS, removed=len(there), dry_run=dry_run)
    _check_target(folder, report)
    if not dry_run:
        with folder_to_write(folder, folder, {}):
            _list_in_index(folder, ())
            (folder / ENCODER_WEIGHTS).unlink(missing_ok=True)
            (folder / CARD).unlink(missing_ok=True)
    return report


def _check_outside(folder: Path, encoder: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError if the encoder is not in a file of its own."""
    inside = sorted({entry.file.name for entry in encoder.values()} - {ENCODER_WEIGHTS})
    if inside:
        raise CheckpointError(
            f"{folder} has an encoder inside {inside[0]}, expected it in {ENCODER_WEIGHTS} or nowhere; "
            "download the release's file again or restore your backup (`revox encoder export` saves the "
            "encoder)."
        )


def _split(folder: Path) -> tuple[dict[str, TensorHeader], dict[str, TensorHeader]]:
    """The encoder's tensors in a folder, and all others."""
    read_params(folder)
    tensors = folder_tensors(folder)
    encoder = {name: entry for name, entry in tensors.items() if name.startswith(ENCODER_PREFIXES)}
    return encoder, {name: entry for name, entry in tensors.items() if name not in encoder}


def _adapted_before(base: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
    """What the weights say of an earlier injection that adapted them: its record stays with them."""
    for file in sorted({entry.file for entry in base.values()}):
        found = injection_of(file)
        if found.get("adapted") or found.get("before"):
            return found
    return None


def _bytes(tensors: Mapping[str, TensorHeader]) -> int:
    return sum(entry.end - entry.start for entry in tensors.values())


# ------------------------------------------------------------------------------------------ what is written


def _list_in_index(folder: Path, names: Iterable[str]) -> None:
    """Have the index of sharded weights list the encoder's tensors `names` and no other of its file."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        others = {name: file for name, file in index["weight_map"].items() if file != ENCODER_WEIGHTS}
        index["weight_map"] = others | dict.fromkeys(names, ENCODER_WEIGHTS)
        replace_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_merged(
    path: Path,
    base: Mapping[str, TensorHeader],
    changed: Mapping[str, TensorHeader],
    encoder: Encoder | None,
    metadata: dict[str, str],
    progress: ProgressCallback,
) -> None:
    """Write one file of the base's tensors in their order, some exchanged for `changed`, and the encoder."""
    import torch

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    with open_weights(changed) as get:
        providers: dict[str, Provider] = {
            name: lambda e=entry: tensor_blocks(e) for name, entry in base.items()
        }
        for name in changed:
            providers[name] = lambda n=name: get(n).to(types[base[n].dtype])
        entries = [(name, base[name].shape, base[name].dtype, providers[name]) for name in base]
        added = encoder.tensors if encoder is not None else {}
        entries += [(name, tuple(t.shape), "BF16", t) for name, t in added.items()]
        write_safetensors_stream(path, entries, metadata, progress)


def _sort_voices(folder: Path, report: InjectionReport) -> None:
    """Into the report: which voices of `folder`, presets excepted, are sums over its table and which not."""
    from revox.checkpoint.voice_codes import is_sum_of_codes, read_table

    table, config = read_table(folder), read_params(folder).voxtral_config()
    for entry in list_voices(folder):
        if entry.preset or entry.problem:
            continue
        voice = load_voice(folder, entry.name)
        known = voice.codes is not None and is_sum_of_codes(voice.embedding, voice.codes, table, config)
        (report.rebuilt if known else report.outdated).append(entry.name)


def _rebuild_voices(folder: Path, names: Iterable[str]) -> None:
    """Sum voices of `folder` over its table."""
    from revox.checkpoint.voice_codes import embedding_of_codes, read_table

    table, config = read_table(folder), read_params(folder).voxtral_config()
    for name in names:
        voice = load_voice(folder, name)
        assert voice.codes is not None
        rows = embedding_of_codes(voice.codes, table, config)
        add_voice(folder, name, rows, voice.codes, voice.provenance, overwrite=True)


# ------------------------------------------------------------------------------------------------ the folder


def _check_target(folder: Path, report: InjectionReport) -> None:
    """Refuse a target that cannot be written to, already holds something, or has no room."""
    target, source = report.folder.resolve(), folder.resolve()
    if report.folder != folder:
        if source in target.parents:
            raise CheckpointError(
                f"{report.folder} is inside the checkpoint itself; name a folder elsewhere."
            )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{report.folder} is there already; name a new folder, or an empty one.")
        report.left_out = [f"{name}/" for name in sorted(_folders(folder)) if name != VOICE_FOLDER]
    nearest = next(path for path in (target, *target.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise CheckpointError(f"{nearest} cannot be written; make a new folder elsewhere with --out.")
    free = shutil.disk_usage(nearest).free
    if free < report.written * 1.01:
        raise CheckpointError(
            f"{target} needs {report.written / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB free; make "
            "room, or name a folder on another disk with --out."
        )


@contextlib.contextmanager
def folder_to_write(folder: Path, out: Path, rewritten: Mapping[str, TensorHeader]) -> Iterator[Path]:
    """The folder to write in: `folder` if `out` is that, or a hidden copy that becomes `out` in the end.

    A copy lacks the weight files of `rewritten`, hidden files (the log of consent stays with its folder), and
    folders other than the voices'.
    """
    if out == folder:
        for left in folder.glob(".consolidated*.tmp"):  # of a command that was killed
            if time.time() - left.stat().st_mtime > _LEFTOVER_SECONDS:
                left.unlink(missing_ok=True)
        yield folder
        return
    out = out.resolve()
    left_out = {name for name in _folders(folder) if name != VOICE_FOLDER}
    left_out |= {name for name in _OLD_CARDS if is_ours(folder / name)}
    if rewritten:
        left_out |= {INDEX, ENCODER_WEIGHTS, *(entry.file.name for entry in rewritten.values())}

    def ignored(at: str, names: list[str]) -> set[str]:
        return {n for n in names if n[0] == "."} | (left_out & {*names} if Path(at) == folder else set())

    hidden = out.with_name(f".{out.name}.revox.tmp")
    shutil.rmtree(hidden, ignore_errors=True)  # of a command that was killed
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(VoiceError, OSError):
            recover_journal(folder)
        with reading(folder):
            shutil.copytree(folder, hidden, ignore=ignored, copy_function=shutil.copyfile)
        yield hidden
        os.sync()
        os.replace(hidden, out)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
