"""What can this checkpoint do? Read from headers alone: no torch, no tensor data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.readable import is_companion, mismatch, missing, quantization, unreadable
from revox.checkpoint.release import COMPONENTS, CONFIG, IGNORED, TensorSpec, component_of, expected_tensors
from revox.checkpoint.runtimes import MLX_AUDIO, RUNTIMES, VLLM_OMNI, RuntimeFacts
from revox.checkpoint.tekken import read_tekken
from revox.checkpoint.tensors import ENCODER_WEIGHTS, FLOAT_DTYPES, TensorHeader, folder_tensors
from revox.checkpoint.voice_journal import VOICE_FOLDER, reading
from revox.checkpoint.voices import voice_entries, voice_file
from revox.model.config import VoxtralConfig

CODEC_PARTS = ("codec_decoder", "quantizer", "audio_embedding", "text_embedding")
"""What cloning by inversion loads: it works where only the language model is quantized."""


@dataclass
class Component:
    """A part of the model: how many of its tensors are there, and what they hold."""

    name: str
    expected: int
    found: int = 0
    quantized: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ListedVoice:
    """A voice: the lengths of its file and in tekken.json (frames + 1), and whether params.json lists it."""

    name: str
    file: str
    rows: int | None
    tekken_rows: int | None
    in_params: bool
    seconds: float | None
    added_by_revox: bool


@dataclass(frozen=True)
class Capability:
    """Something one may want from the folder, and whether it can be had."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class Runtime:
    """What a runtime does with this folder."""

    name: str
    preset_speech: str
    ref_audio: str


@dataclass
class Report:
    """All that the headers say.

    `problems` must be fixed before the folder can be used; `notes` need not. `renamed`: tensors have
    mlx-audio's names. `unreadable` is the sentence
    with which `revox.checkpoint.load` refuses the weights, None if it reads them. `encoder` is "absent",
    "partial" or "complete".
    """

    folder: str
    parameters: int
    bytes: int
    sizes: dict[str, Any]
    quantization: str | None
    unreadable: str | None
    renamed: bool = False
    encoder: str = "absent"
    components: list[Component] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    voices: list[ListedVoice] = field(default_factory=list)
    capabilities: list[Capability] = field(default_factory=list)
    runtimes: list[Runtime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def component(self, name: str) -> Component:
        """The component of this name (one of `revox.checkpoint.release.COMPONENTS`)."""
        return next(component for component in self.components if component.name == name)


def inspect(folder: str | Path) -> Report:
    """Read the headers of every file in a checkpoint folder and say what is there and what it can do.

    Raises:
        CheckpointError: the folder cannot be read as a Voxtral TTS checkpoint at all (no params.json, another
            model's, a damaged or missing weight file). Lesser troubles are listed in `Report.problems`.
    """
    folder = Path(folder)
    params = read_params(folder)
    config = params.voxtral_config()
    tensors, expected = folder_tensors(folder), expected_tensors(config)
    report = Report(
        folder=str(folder),
        parameters=sum(entry.parameters for entry in tensors.values()),
        bytes=sum(entry.end - entry.start for entry in tensors.values()),
        sizes=_sizes(config),
        quantization=quantization(tensors),
        unreadable=unreadable(tensors, expected),
        renamed=any(entry.stored for entry in tensors.values()),
    )
    report.unknown = sorted(
        name
        for name in tensors
        if name not in expected and name not in IGNORED and not (report.quantization and is_companion(name))
    )
    _compare(report, tensors, expected)
    encoder = report.component("codec_encoder")
    if encoder.found:
        report.encoder = "complete" if encoder.found == encoder.expected else "partial"
    _encoder_notes(folder, tensors, report)
    with reading(folder):
        _add_voices(folder, params, report)
    variant = report.quantization is not None
    _tensor_findings(report, tensors, expected, variant)
    core = [part for part in report.components if part.name != "codec_encoder"]
    usable = report.unreadable is None and not report.mismatched and not any(part.missing for part in core)
    spoken = [voice for voice in report.voices if voice.rows is not None and voice.rows == voice.tekken_rows]
    codec = {name: entry for name, entry in tensors.items() if component_of(name) in CODEC_PARTS}
    invertible = unreadable(codec, expected) is None
    report.capabilities = _capabilities(report, usable, invertible, len(spoken))
    report.runtimes = _runtimes(folder, report, spoken, usable, variant)
    return report


def check_checkpoint(folder: str | Path) -> Report:
    """Inspect a folder, and raise CheckpointError with the first problem if there is one."""
    report = inspect(folder)
    if report.problems:
        raise CheckpointError(report.problems[0])
    return report


# --------------------------------------------------------------------------------------------------- tensors


def _compare(report: Report, tensors: dict[str, TensorHeader], expected: dict[str, TensorSpec]) -> None:
    """Count the tensors of each component, and find those of another shape, or of a type that is not read."""
    components = {name: Component(name, 0) for name in COMPONENTS}
    for name, spec in expected.items():
        part = components[spec.component]
        part.expected += 1
        entry = tensors.get(name)
        stem = name.removesuffix("weight")
        if entry is None and not (f"{stem}qweight" in tensors or f"{stem}weight_packed" in tensors):
            part.missing.append(name)
            continue
        part.found += 1
        if entry is None or (report.quantization is not None and entry.dtype not in FLOAT_DTYPES):
            part.quantized += 1
        elif entry.shape != spec.shape or entry.dtype not in FLOAT_DTYPES:
            report.mismatched.append(name)
    for name, entry in tensors.items():
        component = component_of(name)
        if component is not None:
            part = components[component]
            part.parameters += entry.parameters
            part.bytes += entry.end - entry.start
            part.dtypes[entry.dtype] = part.dtypes.get(entry.dtype, 0) + 1
    report.components = list(components.values())


def _encoder_notes(folder: Path, tensors: dict[str, TensorHeader], report: Report) -> None:
    """Which file holds the encoder, who put it there, and whether it is whole."""
    from revox.checkpoint.share import injection_of

    part = report.component("codec_encoder")
    files = {entry.file for name, entry in tensors.items() if component_of(name) == "codec_encoder"}
    for file in files:
        found = injection_of(file)
        record = found.get("encoder") or {}
        run = record.get("revox_run") or record.get("file") or "a run without a name"
        if found.get("encoder_sha256"):
            report.notes.append(f"revox injected this encoder ({run}) into {file.name} on {found.get('at')}.")
    for file in sorted({entry.file for entry in tensors.values()}):
        made: Any = injection_of(file)
        while made:
            if made.get("adapted"):
                consent = (made.get("adaptation_record") or {}).get("consent") or "the presets' alone"
                report.notes.append(
                    f"{len(made['adapted'])} tensors in {file.name} are an adaptation's, merged on "
                    f"{made.get('at')}; whose speech it learned from: {consent}."
                )
            made = made.get("before")
    if report.encoder == "partial":
        report.notes.append(
            f"The codec encoder is partial: {part.found} of {part.expected} tensors, {part.missing[0]} the "
            "first missing; vllm-omni would turn ref_audio on uninitialized, revox leaves it off."
        )
    if not files and (folder / ENCODER_WEIGHTS).is_file():
        report.notes.append(
            f"{ENCODER_WEIGHTS} is there, but the index does not list its tensors, so no engine reads it; "
            "inject the encoder again, or delete the file."
        )


def _tensor_findings(
    report: Report, tensors: dict[str, TensorHeader], expected: dict[str, TensorSpec], variant: bool
) -> None:
    """Sentences about the tensors: notes for a variant (quantized), else problems."""
    absent = [n for part in report.components if part.name != "codec_encoder" for n in part.missing]
    asked = {name: spec for name, spec in expected.items() if spec.component != "codec_encoder"}
    variant = variant and report.unreadable is not None  # what is read must be whole, in whatever form
    if absent and not variant:
        where = next((str(entry.file) for entry in tensors.values()), "the weights")
        report.problems.append(missing(where, absent, asked))
    elif absent:
        report.notes.append(f"{len(absent)} of {len(asked)} tensors do not have the release's names.")
    for name in report.mismatched:
        sentence = mismatch(name, tensors[name], expected[name])
        (report.notes if variant else report.problems).append(sentence)
    if report.quantization and report.unreadable:
        report.notes.append(report.unreadable)
    other = {dtype for part in report.components for dtype in part.dtypes} & (FLOAT_DTYPES - {"BF16"})
    if other and not report.quantization:
        count = sum(part.dtypes.get(dtype, 0) for part in report.components for dtype in other)
        report.notes.append(f"{count} tensors are {' and '.join(sorted(other))}, where the release has BF16.")
    if report.unknown:
        more = f" and {len(report.unknown) - 3} more" if len(report.unknown) > 3 else ""
        report.notes.append(
            f"{len(report.unknown)} unknown tensors, which revox leaves alone: "
            f"{', '.join(report.unknown[:3])}{more}."
        )
        if not report.quantization and any(name.startswith("audio_tokenizer.") for name in report.unknown):
            report.notes.append("vllm-omni refuses to start on an unknown tensor under audio_tokenizer.")


# ---------------------------------------------------------------------------------------- voices, tokenizer


def _add_voices(folder: Path, params: Params, report: Report) -> None:
    frame_rate = params.voxtral_config().codec.frame_rate
    try:
        promised, known = read_tekken(folder, params), True
    except CheckpointError as error:
        report.problems.append(str(error))
        promised, known = {}, False
    if (folder / ".revox" / "journal.json").exists():
        report.notes.append("A change of voices was interrupted; the next `revox voice` command finishes it.")
    for entry in voice_entries(folder, params, promised):
        name, rows, path = entry.name, entry.rows, voice_file(folder, entry.name)
        if entry.problem and (known or rows is None):
            unlisted = rows is not None and not entry.in_params and entry.expected_rows in (None, rows)
            (report.notes if unlisted else report.problems).append(entry.problem)
        elif rows is None and known:
            report.notes.append(f"{path} is in torch's format before 1.6: only loading it shows its length.")
        elif rows is not None and entry.dtype != "BF16":
            report.problems.append(
                f"{path} holds {entry.dtype}, where BF16 was expected; add the voice again."
            )
        if name != name.lower():
            report.notes.append(f"vllm-omni cannot serve the voice {name}: it lower-cases names in requests.")
        report.voices.append(
            ListedVoice(
                name=name,
                file=path.name,
                rows=rows,
                tekken_rows=entry.expected_rows,
                in_params=entry.in_params,
                seconds=None if rows is None else round((rows - 1) / frame_rate, 2),
                added_by_revox=bool(entry.provenance),
            )
        )
    other = [voice.name for voice in report.voices if not voice.file.endswith(".pt")]
    if other:
        home = folder / VOICE_FOLDER
        report.notes.append(
            f"{len(other)} voices have no .pt, which vllm-omni reads, but a .safetensors; `revox voice "
            f"export {other[0]} -o {home / other[0]}.pt` writes the first's."
        )


def _sizes(config: VoxtralConfig) -> dict[str, Any]:
    return {
        "sampling_rate": config.codec.sampling_rate,
        "frame_rate": config.codec.frame_rate,
        "codebooks": config.codec.n_codebooks,
        "semantic_codes": config.codec.semantic_codebook_size,
        "acoustic_levels": config.codec.acoustic_codebook_size,
        "dim": config.backbone.dim,
        "layers": config.backbone.n_layers,
        "release": config == CONFIG,
    }


# ---------------------------------------------------------------------------------------- what it is good for


def _capabilities(report: Report, usable: bool, invertible: bool, n_voices: int) -> list[Capability]:
    wrong = {component_of(name) for name in report.mismatched}
    parts = [report.component(name) for name in CODEC_PARTS]
    invertible = invertible and not any(part.missing or part.name in wrong for part in parts)
    part = report.component("codec_encoder")
    unusable = "the weights are not usable as they are"
    presets = f"{n_voices} voices" if usable else unusable
    cloning = {
        "absent": f"the codec encoder is not in the weights (0 of {part.expected} tensors); restore it first",
        "partial": f"the codec encoder is partial ({part.found} of {part.expected} tensors)",
        "complete": "the codec encoder is complete" if usable else unusable,
    }[report.encoder]
    inversion = "through the frozen decoder, with `revox clone`"
    return [
        Capability(
            "preset speech",
            usable and n_voices > 0,
            presets if n_voices else "no voice of the length that tekken.json promises",
        ),
        Capability("cloning by ref_audio", usable and report.encoder == "complete", cloning),
        Capability(
            "cloning by inversion",
            invertible,
            inversion if invertible else "decoder, quantizer or table not usable",
        ),
        Capability("instructions", False, "accepted by vllm-omni and ignored: the model has no such input"),
        Capability("voice design", False, "the model has no description of a voice as input"),
    ]


def _runtimes(
    folder: Path, report: Report, spoken: list[ListedVoice], usable: bool, variant: bool
) -> list[Runtime]:
    no_encoder, broken = "no encoder in it", "does not start: tensors are missing or wrong"
    cloning = {
        "complete": ("clones", "clones with the encoder, or by inversion"),
        "partial": (
            "turned on, but clones from uninitialized weights",
            "clones by inversion (the partial encoder is left off)",
        ),
        "absent": ("refused as a bad request", "clones by inversion"),
    }[report.encoder]
    found = []
    for facts in RUNTIMES:
        speaks, clones = _speaks(facts, folder, spoken), cloning[0] if facts.encoder else no_encoder
        if report.renamed:
            speaks = speaks if facts is MLX_AUDIO else "does not start: tensors have mlx-audio's names"
        elif variant:
            fp8 = facts.fp8 if (report.quantization or "").startswith("FP8") else None
            # mlx-audio's own variants are MLX groups, which revox reads as well.
            speaks = speaks if facts is MLX_AUDIO else fp8 or facts.quantized
        elif not usable:
            speaks = broken
        elif not facts.any_size and not report.sizes["release"]:
            speaks = "does not start: the release's sizes are compiled in"
        elif facts is VLLM_OMNI and any(name.startswith("audio_tokenizer.") for name in report.unknown):
            speaks = "does not start: unknown tensors under audio_tokenizer"
        if facts.encoder and (variant or report.renamed or not usable):
            clones = "no"
        found.append(Runtime(facts.title, speaks, clones))
    refused = "does not read these quantized weights" if variant else broken
    ours = (_presets(spoken), cloning[1]) if usable else (refused, "no")
    return [*found, Runtime("revox", *ours)]


def _presets(spoken: list[ListedVoice]) -> str:
    return "speaks the presets" if spoken else "has no preset to speak"


def _speaks(facts: RuntimeFacts, folder: Path, spoken: list[ListedVoice]) -> str:
    """What a runtime that reads the weights does with the voices."""
    home = folder / VOICE_FOLDER
    there = [voice for voice in spoken if (home / f"{voice.name}{facts.voice_ending}").is_file()]
    if len(there) < len(spoken):
        return (
            f"speaks {len(there)} of {len(spoken)} voices: it reads NAME{facts.voice_ending} in "
            "voice_embedding (`revox voice export` writes them)"
        )
    frame = " (an extra [AUDIO] before the first frame)" if facts.extra_frame and spoken else ""
    return f"{_presets(spoken)}{frame}"
