"""Sharing an encoder: model cards, export to a file of its own, and upload to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from revox.checkpoint.encoder_file import (
    ENCODER_FILE,
    RECORD_KEY,
    Encoder,
    decoder_sha256_of,
    encoder_specs,
    read_encoder,
    write_encoder,
)
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import CONFIG, ENCODER_PREFIXES, HUB_ID, LICENSE, expected_tensors
from revox.checkpoint.tensors import folder_tensors, read_metadata
from revox.speech.files import replace_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INJECTION_KEY = "revox_injection"
"""Where injected weights say, as JSON, what was added to them."""

MARK = "<!-- written by revox: it is replaced and deleted with the encoder -->"
"""Marks the cards that revox wrote; a card without it is never replaced or deleted."""

_ASKED_FOR = ("revox_run", "data", "steps")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ExportReport:
    """An encoder written to a file of its own, with its card beside it."""

    path: Path
    card: Path
    tensors: int
    bytes: int
    sha256: str
    record: dict[str, Any]


def export_encoder(
    out: str | Path, *, checkpoint: str | Path | None = None, run: str | Path | None = None
) -> ExportReport:
    """Write the encoder of a checkpoint, or of a training run, alone: bf16, with what is known of it.

    With both, the run's encoder is checked against the checkpoint's sizes and decoder first; with a run alone
    only the names and the values are. The card goes beside `out`, with the ending `.md`.

    Raises:
        CheckpointError: neither is named, there is no whole encoder, or `out` has another ending.
    """
    out = Path(out)
    card = out.with_suffix(".md")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out} should end in .safetensors, the format of the file; name another.")
    if card.exists() and not is_ours(card):
        raise CheckpointError(
            f"{card} was not written by revox, and the card would go there; name another file than {out}."
        )
    if checkpoint is None and run is None:
        raise CheckpointError("Nothing to export; name a checkpoint with an encoder, or a run.")
    expected, tensors, decoder = expected_tensors(CONFIG), {}, None
    if checkpoint is not None:
        expected = expected_tensors(read_params(checkpoint).voxtral_config())
        tensors = folder_tensors(checkpoint)
        decoder = decoder_sha256_of(tensors, expected)
    if run is not None:
        encoder = read_encoder(run, expected, sizes_known=checkpoint is not None)
        record = encoder.record
        if decoder is not None and record.get("decoder_sha256") not in (None, decoder):
            raise CheckpointError(
                f"{encoder.path} was trained against another decoder than {checkpoint} has; leave the "
                "checkpoint out, or name the one that it was trained against."
            )
    else:
        files = {entry.file for name, entry in tensors.items() if name.startswith(ENCODER_PREFIXES)}
        if not files:
            raise CheckpointError(
                f"{checkpoint} has no codec encoder to export; name a checkpoint that has one, or a run."
            )
        encoder = read_encoder(files.pop(), expected, inside=True)
        record = injection_of(encoder.path).get("encoder", {})
    record = {**record, **({"decoder_sha256": decoder} if decoder else {}), "license": LICENSE}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_encoder(out, encoder, {"format": "pt", RECORD_KEY: json.dumps(shareable(record))})
    replace_file(card, model_card(encoder, record))
    return ExportReport(out, card, len(encoder.tensors), out.stat().st_size, encoder.sha256, record)


def push_encoder(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload an exported encoder and its card to the hub, in one commit; returns the commit's address.

    The repository is created if need be. Its README.md becomes the card, unless there is one that revox did
    not write: then the card is MODEL_CARD.md.

    `path` is a file that `export_encoder` wrote, its card beside it; `repository` is owner/name. `private` is
    for a repository that is made now. `api` has by default the token that `hf auth login` keeps. Raises
    CheckpointError: no such file or card, no whole encoder in it, no valid name, or the hub refused.
    """
    path = Path(path)
    card = path.with_suffix(".md")
    if not _ID.fullmatch(repository):
        raise CheckpointError(f"{repository} is not a repository's name; name it owner/name.")
    encoder = read_encoder(path, expected_tensors(CONFIG), sizes_known=False)
    if not card.is_file():
        raise CheckpointError(
            f"{card}, the encoder's card, is missing; write both with `revox encoder export`."
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        name = "README.md"
        if api.file_exists(repository, name) and MARK not in Path(
            api.hf_hub_download(repository, name)
        ).read_text(encoding="utf-8"):
            name = "MODEL_CARD.md"
        commit = api.create_commit(
            repository,
            operations=[
                CommitOperationAdd(path_in_repo=ENCODER_FILE, path_or_fileobj=str(encoder.path)),
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(card)),
            ],
            commit_message=message or f"A codec encoder for {HUB_ID}, {encoder.sha256[:12]}",
        )
    except Exception as error:  # the hub library's http errors are of another package in each of its versions
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{repository} could not be written on the hub ({reason}); log in with `hf auth login`, check "
            "the name and the connection, and try again."
        ) from None
    return str(commit.commit_url)


def injection_of(weights: str | Path) -> dict[str, Any]:
    """What a weight file says was injected into it: empty for a file as released."""
    try:
        found = json.loads(read_metadata(weights).get(INJECTION_KEY, "{}"))
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def is_ours(card: Path) -> bool:
    """Whether a card was written by revox, and may be replaced or deleted by it."""
    return card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")


def shareable(value: Any) -> Any:
    """A record without paths of the local machine: only the last part of an absolute path is kept."""
    if isinstance(value, Mapping):
        return {str(key): shareable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(inner) for inner in value]
    if (
        isinstance(value, str)
        and re.match(r"(/|~[\w.-]*/|[A-Za-z]:[\\/]|file://)", value)
        and "\n" not in value
    ):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def model_card(
    encoder: Encoder, record: Mapping[str, Any], injection: Mapping[str, Any] | None = None
) -> str:
    """The card of an encoder alone, or of the checkpoint that it was injected into."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.tensors.items()}
    release = {name: spec.shape for name, spec in encoder_specs(expected_tensors(CONFIG)).items()}
    injected = "`revox inject --checkpoint FOLDER --encoder encoder.safetensors` adds it to a checkpoint."
    if injection is not None:
        made_for = {
            True: "It names the decoder that it was trained against, and it is this checkpoint's.",
            False: "**It was trained against another decoder**; it was injected by force.",
            None: "It does not say which decoder it was trained against.",
        }[injection["decoder_agrees"]]
        injected = f"Injected into this checkpoint on {injection['at']}. {made_for}"
        if injection["adapted"]:
            source = str(injection["adaptation"]).replace("`", "'")
            count = len(injection["adapted"])
            injected += f"\n{count} tensors of the model were replaced by an adaptation (`{source}`)."
        injected += " All other tensors are as they were, byte for byte."
    rows = {key: record.get(key, "not recorded") for key in _ASKED_FOR} | dict(record)
    return Template((Path(__file__).parent / "model_card.md").read_text()).substitute(
        # The hub reads the first lines; the base model is named only where the sizes are its.
        base=f"base_model: {HUB_ID}\n" if shapes == release else "",
        mark=MARK,
        size=f"{encoder.parameters / 1e6:.1f} M parameters, {encoder.parameters * 2 / 1e6:.1f} MB, bf16",
        release=HUB_ID,
        license=LICENSE,
        injected=injected,
        rows="".join(f"| {_plain(key)} | {_plain(value)} |\n" for key, value in shareable(rows).items()),
        sha256=encoder.sha256,
    )


def _plain(value: Any) -> str:
    """A value in a table's cell: one line, and no markup of its own."""
    if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))[:500]
