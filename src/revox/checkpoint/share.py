"""Sharing an encoder: its model card, and export to a file of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from revox.checkpoint.encoder_file import (
    RECORD_KEY,
    Encoder,
    decoder_sha256,
    encoder_specs,
    read_encoder,
    write_encoder,
)
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import CONFIG, ENCODER_PREFIXES, HUB_ID, LICENSE, expected_tensors
from revox.checkpoint.tensors import folder_tensors, read_metadata
from revox.speech.files import replace_file

INJECTION_KEY = "revox_injection"
"""Where injected weights say, as JSON, what was added to them."""

MARK = "<!-- written by revox: it is replaced and deleted with the encoder -->"
"""Marks the cards that revox wrote; a card without it is never replaced or deleted."""

_ASKED_FOR = ("revox_run", "data", "steps")


def export_encoder(checkpoint: str | Path, out: str | Path) -> Encoder:
    """Write the encoder of a checkpoint alone: bf16, with its record, and its card beside it (`.md`).

    Returns the encoder, as it is in the checkpoint.

    Raises:
        CheckpointError: there is no whole encoder, or `out` has another ending or the place of its card is
            taken.
    """
    out = Path(out)
    card = out.with_suffix(".md")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out} should end in .safetensors, the format of the file; name another.")
    if card.exists() and not is_ours(card):
        raise CheckpointError(
            f"{card} was not written by revox, and the card would go there; name another file than {out}."
        )
    expected, tensors = expected_tensors(read_params(checkpoint).voxtral_config()), folder_tensors(checkpoint)
    files = {entry.file for name, entry in tensors.items() if name.startswith(ENCODER_PREFIXES)}
    if not files:
        raise CheckpointError(f"{checkpoint} has no codec encoder to export; name a checkpoint that has one.")
    encoder = read_encoder(files.pop(), expected, inside=True)
    injection = injection_of(encoder.path)
    record = {**injection.get("encoder", {}), "license": LICENSE}
    # An injected encoder that named no decoder may be of any: exporting it must not vouch for this one.
    if injection.get("decoder_agrees", True):
        record["decoder_sha256"] = decoder_sha256(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_encoder(out, encoder, {"format": "pt", RECORD_KEY: json.dumps(shareable(record))})
    replace_file(card, model_card(encoder, record))
    return encoder


def injection_of(weights: str | Path) -> dict[str, Any]:
    """What a weight file says was injected into it: empty for a file as released."""
    try:
        found = json.loads(read_metadata(weights).get(INJECTION_KEY, "{}"))
    except ValueError:
        found = {}
    return _with_objects(found) if isinstance(found, dict) else {}


def _with_objects(injection: dict[str, Any]) -> dict[str, Any]:
    """Without parts that should be objects and are not, as in a file that somebody else wrote."""
    inner = ("encoder", "adaptation_record", "before")
    found = {k: v for k, v in injection.items() if k not in inner or isinstance(v, dict)}
    if "before" in found:
        found["before"] = _with_objects(found["before"])
    return found


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
        made: Mapping[str, Any] | None = injection
        while made:
            injected += _adaptation(made)
            made = made.get("before")
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


def _adaptation(injection: Mapping[str, Any]) -> str:
    """What an injection's record says of the adaptation that came with it; nothing without one."""
    if not injection.get("adapted"):
        return ""
    source = str(injection.get("adaptation")).replace("`", "'")
    text = f"\n{len(injection['adapted'])} tensors of the model were replaced by an adaptation (`{source}`)."
    if consent := (injection.get("adaptation_record") or {}).get("consent"):
        text += f" Whose speech it learned from, and that they agreed: {_plain(consent)}."
    return text


def _plain(value: Any) -> str:
    """A value in a table's cell: one line, and no markup of its own."""
    if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))[:500]
