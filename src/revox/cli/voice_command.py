"""`revox voice`: the voices of a checkpoint: add, tune, mix, map, list, show, decode, remove, export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli import tune_command
from revox.cli.marked import say, who_signs, write_synthetic
from revox.cli.options import Checkpoint, Device, with_old_names

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from revox.checkpoint.voice_codes import RecoveredCodes
    from revox.checkpoint.voices import VoiceEntry

app = typer.Typer(
    help="Add, tune, list, show, decode, remove or export the voices of a checkpoint.", no_args_is_help=True
)

app.command("tune")(tune_command.command)

OLD_OPTIONS = with_old_names({"--out": "--output"})
Name = Annotated[str, typer.Argument(help="The voice's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_command(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """List the voices with their lengths and where they come from. Only headers are read."""
    from revox.checkpoint.voices import list_voices

    folder, frame_rate = _open(checkpoint)
    entries = list_voices(folder)
    if as_json:
        print(json.dumps([_as_json(entry, frame_rate) for entry in entries], indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("voice", "rows", "seconds", "codes", "made by", "date", "whose"):
        table.add_column(
            column, justify="right" if column in ("rows", "seconds") else "left", overflow="fold"
        )
    for entry in entries:
        # The record may come from anywhere: what it says is shown as it is.
        consent = entry.provenance.get("consent")
        agreed = consent if isinstance(consent, dict) else {}
        table.add_row(
            escape(entry.name),
            "?" if entry.rows is None else str(entry.rows),
            "?" if entry.rows is None else f"{max(entry.rows - 1, 0) / frame_rate:.1f}",
            "stored" if entry.has_codes else "in the embedding",
            escape(str(entry.provenance.get("method", "the release" if entry.preset else ""))),
            escape(str(entry.provenance.get("created_at", ""))[:10]),
            escape(str(agreed.get("subject") or agreed.get("statement") or "")),
        )
    console = Console(highlight=False)
    console.print(table)
    for entry in entries:
        if entry.problem:
            console.print(entry.problem, style="yellow", markup=False, soft_wrap=True)


@app.command("show")
def show_command(name: Name, checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Show one voice: its size, and the record of how it was made, of what, and with whose consent."""
    from revox.checkpoint.voices import consent_document, find_voice

    folder, frame_rate = _open(checkpoint)
    entry = find_voice(folder, name)
    record = _as_json(entry, frame_rate)
    agreed = consent_document(folder, name)["voices"][0] if entry.provenance else {}
    record["log"] = agreed.get("log", [])
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    import yaml

    print(f"{name} of {folder}")
    known = {key: value for key, value in record.items() if value is not None and value != {}}
    print(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000), end="")
    if not entry.provenance:
        print("no record of how it was made (the release's presets have none)")


@app.command("add")
def add_command(
    name: Annotated[str, typer.Argument(help="The new voice's name: a-z, 0-9, _ and -, 1 to 64 of them.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="Its embedding (.pt, .safetensors, raw bf16 .bin) or its codes (.safetensors, tensor codes)."
        ),
    ],
    checkpoint: Checkpoint,
    consent: Annotated[
        str | None, typer.Option(help="Whose voice it is, and that they agreed to its use. Required.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The name of the person whose voice it is.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace it even if it is a preset.")] = False,
) -> None:
    """Add a voice that exists as a file. (From a recording: `revox clone`.)"""
    from rich.console import Console

    from revox.checkpoint.params import read_params
    from revox.checkpoint.voices import add_voice, check_voice_free, check_voice_name, read_embedding
    from revox.cloning.consent import provenance, record_consent

    agreed = record_consent(consent, subject)
    check_voice_name(name)
    folder, _ = _open(checkpoint)
    check_voice_free(folder, name, overwrite, force)
    console = Console(stderr=True, highlight=False)
    from revox.checkpoint.voice_codes import embedding_of_codes, read_table, recover_codes

    config = read_params(folder).voxtral_config()
    table = read_table(folder)
    settings: dict[str, Any]
    codes: Tensor | None = _read_codes(file, config)
    if codes is not None:
        rows, settings = embedding_of_codes(codes, table, config), {"from": "codes", **_made(file)}
    else:
        rows = read_embedding(file, config.backbone.dim)
        with console.status("recovering the codes from the embedding"):
            found = recover_codes(rows, table, config)
        settings = {"from": "rows", **(_made(file) if file.suffix == ".safetensors" else {})}
        _print_recovered(console, found)
        if found.ended and bool(found.exact.all()):
            codes = found.codes
    record = provenance(agreed, "added from a file", settings, source=file)
    add_voice(folder, name, rows, codes, record, overwrite=overwrite, force=force)
    say(f"voice {name} added to {folder}: {rows.shape[0]} rows")


@app.command("decode", cls=OLD_OPTIONS)
def decode_command(
    name: Name,
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Option("--output", "-o", help="The audio file; - is standard output.")],
    audio_format: Annotated[
        str | None, typer.Option("--format", help="Instead of the extension of --output.")
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="From its embedding, even if its codes are stored.")
    ] = False,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Decode a voice's codes to sound; a preset's codes are recovered from its embedding.

    The file is marked as synthetic.
    """
    from rich.console import Console

    from revox.checkpoint.params import read_params
    from revox.checkpoint.voices import load_voice
    from revox.speech import format_for

    sound = "wav" if output == "-" and audio_format is None else format_for(output, audio_format)
    signer = who_signs()
    folder, _ = _open(checkpoint)
    voice = load_voice(folder, name)
    console = Console(stderr=True, highlight=False)
    import revox
    from revox.api import find_dtype
    from revox.checkpoint.voice_codes import read_table, recover_codes

    if voice.codes is None or recover:
        with console.status("recovering the codes from the embedding"):
            found = recover_codes(voice.embedding, read_table(folder), read_params(folder).voxtral_config())
        _print_recovered(console, found)
        voice = dataclasses.replace(voice, codes=found.codes)
    with console.status("decoding"):
        audio = revox.load(folder, device, find_dtype(dtype), lazy=True).decode(voice)
    write_synthetic(None if output == "-" else Path(output), audio, checkpoint, name, signer, sound)
    say(f"{audio.seconds:.2f} s of voice {name} written to {output}")


@app.command("mix")
def mix_command(
    name: Annotated[str, typer.Argument(help="The new voice's name: a-z, 0-9, _ and -, 1 to 64 of them.")],
    parts: Annotated[
        list[str],
        typer.Argument(metavar="VOICE=WEIGHT...", help="Two voices or more, such as ada=0.7 bob=0.3."),
    ],
    checkpoint: Checkpoint,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace it even if it is a preset.")] = False,
) -> None:
    """Make a voice between voices of the checkpoint; what their owners agreed to is kept with it."""
    from rich.console import Console

    from revox.checkpoint.errors import VoiceError
    from revox.checkpoint.params import read_params
    from revox.checkpoint.voice_codes import embedding_of_codes, is_sum_of_codes, read_table, recover_codes
    from revox.checkpoint.voice_mix import mix_codes, parse_weights
    from revox.checkpoint.voices import add_voice, check_voice_free, check_voice_name, load_voice
    from revox.cloning.consent import mixed_provenance

    weights = parse_weights(parts)
    check_voice_name(name)
    folder, _ = _open(checkpoint)
    check_voice_free(folder, name, overwrite, force)
    voices = {one: load_voice(folder, one) for one in weights}
    config, table = read_params(folder).voxtral_config(), read_table(folder)
    console, codes = Console(stderr=True, highlight=False), {}
    for one, voice in voices.items():
        if voice.codes is not None:
            if not is_sum_of_codes(voice.embedding, voice.codes, table, config):
                raise VoiceError(
                    f"{one} is not the sum of its codes, and a mix is made of those: it was tuned or mapped, "
                    "or made for another table; mix the voice that it was made of"
                )
            codes[one] = voice.codes
            continue
        with console.status(f"recovering the codes of {one} from its embedding"):
            found = recover_codes(voice.embedding, table, config)
        codes[one] = found.codes
        if not bool(found.exact.all()):
            _print_recovered(console, found)
    mixed = mix_codes(codes, weights, config.codec.acoustic_codebook_size)
    record = mixed_provenance(weights, {one: voice.provenance for one, voice in voices.items()})
    add_voice(folder, name, embedding_of_codes(mixed, table, config), mixed, record, overwrite, force)
    shares = ", ".join(f"{one} {weight:.2f}" for one, weight in weights.items())
    say(f"voice {name} added to {folder}: {shares}; use it as the owners of these voices agreed to")


@app.command("map")
def map_command(
    name: Annotated[str, typer.Argument(help="The new voice's name: a-z, 0-9, _ and -, 1 to 64 of them.")],
    checkpoint: Checkpoint,
    start: Annotated[str, typer.Option("--from", help="The voice to map.")],
    voice_map: Annotated[
        Path, typer.Option("--map", help="The run of `revox train adapt --adapt map`, or its file.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace it even if it is a preset.")] = False,
) -> None:
    """Make a voice of another by a map that `revox train adapt --adapt map` learned.

    The model stays as it is. The codes stay those of the voice that it is made of.
    """
    from revox.checkpoint.errors import VoiceError
    from revox.checkpoint.voice_map import read_map
    from revox.checkpoint.voices import add_voice, check_voice_free, check_voice_name, load_voice
    from revox.cloning.consent import mapped_provenance

    check_voice_name(name)
    folder, _ = _open(checkpoint)
    check_voice_free(folder, name, overwrite, force)
    voice = load_voice(folder, start)
    if voice.provenance.get("method") == "mapped":
        raise VoiceError(f"the voice {start} is mapped already; map the one that it was made of")
    found = read_map(voice_map, folder)
    settings = {"map": found.record, "map_sha256": found.sha256}
    record = mapped_provenance(start, voice.provenance, settings)
    add_voice(folder, name, found.applied(voice.embedding), voice.codes, record, overwrite, force)
    say(f"voice {name} added to {folder}: {start}, mapped; clones by ref_audio are not, in any engine")


@app.command("remove")
def remove_command(
    name: Name,
    checkpoint: Checkpoint,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if it is a preset.")] = False,
) -> None:
    """Remove a voice from the checkpoint."""
    from revox.checkpoint.voices import remove_voice

    folder, _ = _open(checkpoint)
    remove_voice(folder, name, force=force)
    say(f"voice {name} removed from {folder}")


@app.command("consent", cls=OLD_OPTIONS)
def consent_command(
    checkpoint: Checkpoint,
    name: Annotated[
        str | None, typer.Argument(help="One voice, also a removed one; else all of them.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file for the JSON.")] = None,
) -> None:
    """Write who agreed to what, when, of which recording and by which method, as one JSON."""
    from revox.checkpoint.voices import consent_document
    from revox.speech.files import replace_file

    folder, _ = _open(checkpoint)
    text = json.dumps(consent_document(folder, name), indent=2, ensure_ascii=False)
    if output is None:
        print(text)
        return
    replace_file(output, text + "\n")
    say(f"revox: the record of consent is in {output}")


@app.command("export", cls=OLD_OPTIONS)
def export_command(
    name: Name,
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="NAME.pt for vllm-omni, .safetensors for mlx-audio, .bin for the C port."
        ),
    ],
    consent: Annotated[
        bool, typer.Option("--consent", help="Write its record of consent (.json) instead.")
    ] = False,
) -> None:
    """Write a voice embedding for another runtime; the extension of --output says which."""
    if consent:
        return consent_command(checkpoint, name, output)
    from revox.checkpoint.voices import EXPORT_FORMATS, export_voice

    folder, _ = _open(checkpoint)
    export_voice(folder, name, output)
    say(f"voice {name} written to {output} for {EXPORT_FORMATS[output.suffix]}")


def _open(checkpoint: str) -> tuple[Path, float]:
    """The checkpoint's folder and frame rate (Hz), after finishing what an interrupted command left."""
    from revox.checkpoint.errors import VoiceError
    from revox.checkpoint.locate import locate
    from revox.checkpoint.params import read_params
    from revox.checkpoint.voice_journal import recover_journal

    folder = locate(checkpoint)
    frame_rate = read_params(folder).voxtral_config().codec.frame_rate
    try:
        message = recover_journal(folder)
    except VoiceError as error:
        # Reading is still possible in a folder that only others may write.
        message = f"an interrupted change could not be finished: {error}"
    if message:
        say(f"revox: {message}")
    return folder, frame_rate


def _read_codes(file: Path, config: Any) -> Tensor | None:
    """The codes `[n_codebooks, frames]` of a .safetensors with a tensor `codes`; None for any other file."""
    from revox.checkpoint.errors import VoiceError
    from revox.checkpoint.tensors import open_tensors, read_header
    from revox.checkpoint.voices import MAX_ROWS, codes_fit

    if file.suffix != ".safetensors" or not file.is_file() or "codes" not in read_header(file):
        return None
    with open_tensors(file) as tensors:
        codes = tensors.get_tensor("codes")
    if codes.ndim != 2 or codes.shape[0] != config.codec.n_codebooks or codes.is_floating_point():
        raise VoiceError(
            f"{file}: expected codes as whole numbers [{config.codec.n_codebooks}, frames], "
            f"found {str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
        )
    if codes.shape[1] >= MAX_ROWS:
        raise VoiceError(f"{file}: {codes.shape[1]:,} frames of codes are too many for a voice")
    codes = codes.long()
    if not codes_fit(codes, config):
        raise VoiceError(
            f"{file}: some codes are outside this checkpoint's codebooks; it is of another model"
        )
    return codes


def _made(file: Path) -> dict[str, Any]:
    """The record of how a voice came about, where `revox clone` or `voice tune` kept one with it."""
    from pydantic_core import from_json

    from revox.checkpoint.tensors import read_metadata

    try:
        return {"made": from_json(read_metadata(file).get("provenance", ""))}
    except ValueError:
        return {}


def _print_recovered(console: Console, found: RecoveredCodes) -> None:
    console.print(f"codes recovered from the embedding: {found.summary()}", soft_wrap=True)
    if not found.ended:
        console.print("[yellow]the embedding does not end with the end frame that the model expects[/]")
    if not bool(found.exact.all()):
        console.print("[yellow]frames whose codes are not exact may sound wrong[/]")


def _as_json(entry: VoiceEntry, frame_rate: float) -> dict[str, Any]:
    return {
        "name": entry.name,
        "rows": entry.rows,
        "seconds": None if entry.rows is None else round((entry.rows - 1) / frame_rate, 2),
        "preset": entry.preset,
        "codes_kept": entry.has_codes,
        "problem": entry.problem,
        "provenance": entry.provenance,
    }
