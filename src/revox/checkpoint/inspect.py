"""What can this checkpoint do? Read from headers alone: no torch, no tensor data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import MODEL_TYPE, Params, read_json, read_params
from revox.checkpoint.readable import is_companion, mismatch, missing, quantization, unreadable
from revox.checkpoint.release import COMPONENTS, CONFIG, IGNORED, TensorSpec, component_of, expected_tensors
from revox.checkpoint.tensors import (
    ENCODER_WEIGHTS,
    FLOAT_DTYPES,
    TensorHeader,
    folder_tensors,
    read_pt_header,
    weight_files,
)
from revox.checkpoint.voice_journal import VOICE_FOLDER, is_file_name, reading
from revox.model.config import VoxtralConfig


@dataclass(frozen=True)
class FileSize:
    """A file of the folder and its size in bytes (of what a link points to)."""

    name: str
    bytes: int


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
class Mismatch:
    """A tensor whose shape or type is not what params.json asks for."""

    name: str
    expected: str
    found: str


@dataclass(frozen=True)
class ListedVoice:
    """A voice: rows of its .pt, rows that tekken.json lists, and whether params.json names it."""

    name: str
    rows: int | None
    tekken_rows: int | None
    in_params: bool
    seconds: float | None
    bytes: int
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

    `problems` must be fixed before the folder can be used; `notes` need not. `unreadable` is the sentence
    with which `revox.checkpoint.load` refuses the weights, None if it reads them.
    """

    folder: str
    parameters: int
    bytes: int
    sizes: dict[str, Any]
    files: list[FileSize]
    components: list[Component]
    encoder: str
    quantization: str | None
    unreadable: str | None
    unknown: list[str]
    mismatched: list[Mismatch]
    voices: list[ListedVoice]
    capabilities: list[Capability]
    runtimes: list[Runtime]
    notes: list[str]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def component(self, name: str) -> Component:
        """The component of this name (one of `revox.checkpoint.tensors.COMPONENTS`)."""
        return next(component for component in self.components if component.name == name)


def inspect(folder: str | Path) -> Report:
    """Read the headers of every file in a checkpoint folder and say what is there and what it can do.

    Raises:
        CheckpointError: the folder cannot be read as a Voxtral TTS checkpoint at all (no params.json, another
            model's, a damaged or missing weight file). Lesser troubles are listed in `Report.problems`.
    """
    folder = Path(folder)
    notes: list[str] = []
    problems: list[str] = []
    params, converted = _params(folder, notes)
    config = params.voxtral_config()
    tensors = folder_tensors(folder)
    expected = expected_tensors(config)
    quantized = quantization(tensors)
    components, mismatched = _compare(expected, tensors, quantized is not None)
    unknown = sorted(
        name
        for name in tensors
        if name not in expected and name not in IGNORED and not (quantized and is_companion(name))
    )
    encoder = _encoder_state(next(c for c in components if c.name == "codec_encoder"))
    _encoder_notes(folder, tensors, notes)
    with reading(folder):
        voices = _voices(folder, params, notes, problems)
    variant = quantized is not None or converted
    _tensor_findings(
        folder, components, mismatched, unknown, encoder, variant, tensors, expected, notes, problems
    )
    why_unreadable = unreadable(tensors, expected)
    if why_unreadable and quantized:
        notes.append(why_unreadable)

    core = (
        not variant
        and not mismatched
        and all(c.found == c.expected for c in components if c.name != "codec_encoder")
    )
    spoken = [voice for voice in voices if voice.rows is not None and voice.rows == voice.tekken_rows]
    return Report(
        folder=str(folder),
        parameters=sum(entry.parameters for entry in tensors.values()),
        bytes=sum(entry.end - entry.start for entry in tensors.values()),
        sizes=_sizes(params, config),
        files=_files(folder),
        components=components,
        encoder=encoder,
        quantization=quantized,
        unreadable=why_unreadable,
        unknown=unknown,
        mismatched=mismatched,
        voices=voices,
        capabilities=_capabilities(core, encoder, components, mismatched, len(spoken), variant),
        runtimes=_runtimes(folder, config, core, encoder, unknown, spoken, variant),
        notes=notes,
        problems=problems,
    )


def check_checkpoint(folder: str | Path) -> Report:
    """Inspect a folder and refuse it if anything in it must be mended first.

    Raises:
        CheckpointError: one sentence about the first problem.
    """
    report = inspect(folder)
    if report.problems:
        raise CheckpointError(report.problems[0])
    return report


def _params(folder: Path, notes: list[str]) -> tuple[Params, bool]:
    """The typed params, and whether they come from a converted checkpoint's config.json."""
    config = folder / "config.json"
    if not (folder / "params.json").exists() and config.is_file():
        data = read_json(config)
        if data.get("model_type") == MODEL_TYPE and "multimodal" in data:
            notes.append(
                "There is no params.json; sizes are read from config.json, as converted checkpoints have it."
            )
            return read_params(folder, "config.json"), True
    return read_params(folder), False


def _compare(
    expected: dict[str, TensorSpec], tensors: dict[str, TensorHeader], quantized: bool
) -> tuple[list[Component], list[Mismatch]]:
    components = {name: Component(name, 0) for name in COMPONENTS}
    mismatched = []
    usual = _usual_types(expected, tensors)
    for name, spec in expected.items():
        part = components[spec.component]
        part.expected += 1
        entry = tensors.get(name)
        packed = entry is None and quantized and _packed(name, tensors)
        if entry is None and not packed:
            part.missing.append(name)
            continue
        part.found += 1
        if entry is None or (quantized and entry.dtype not in FLOAT_DTYPES):
            part.quantized += 1
        elif entry.shape != spec.shape or (
            entry.dtype != spec.dtype and not (quantized or entry.dtype == usual[_kind(spec)])
        ):
            mismatched.append(
                Mismatch(name, f"{spec.dtype} {list(spec.shape)}", f"{entry.dtype} {list(entry.shape)}")
            )
    for name, entry in tensors.items():
        component = component_of(name)
        if component is not None:
            part = components[component]
            part.parameters += entry.parameters
            part.bytes += entry.end - entry.start
            part.dtypes[entry.dtype] = part.dtypes.get(entry.dtype, 0) + 1
    return list(components.values()), mismatched


def _kind(spec: TensorSpec) -> tuple[str, bool]:
    return spec.component, len(spec.shape) > 1


def _usual_types(
    expected: dict[str, TensorSpec], tensors: dict[str, TensorHeader]
) -> dict[tuple[str, bool], str]:
    """The float type that most vectors, and most matrices, of each component have.

    A folder converted to another float type as a whole is fine; a single tensor of another type is a mistake.
    """
    counts: dict[tuple[str, bool], dict[str, int]] = {}
    for name, spec in expected.items():
        count = counts.setdefault(_kind(spec), {"BF16": 0})
        if name in tensors and tensors[name].dtype in FLOAT_DTYPES:
            count[tensors[name].dtype] = count.get(tensors[name].dtype, 0) + 1
    return {kind: max(count, key=lambda dtype: count[dtype]) for kind, count in counts.items()}


def _packed(name: str, tensors: dict[str, TensorHeader]) -> bool:
    stem = name.removesuffix("weight")
    return any(f"{stem}{packed}" in tensors for packed in ("qweight", "weight_packed"))


def _encoder_state(component: Component) -> str:
    if component.found == 0:
        return "absent"
    return "complete" if component.found == component.expected else "partial"


def _encoder_notes(folder: Path, tensors: dict[str, TensorHeader], notes: list[str]) -> None:
    """Which file holds the encoder, and who put it there."""
    from revox.checkpoint.share import injection_of

    files = {entry.file for name, entry in tensors.items() if component_of(name) == "codec_encoder"}
    for file in files:
        found = injection_of(file)
        record = found.get("encoder") or {}
        run = record.get("revox_run") or record.get("file") or "a run without a name"
        adapted = found.get("adapted") or []
        more = f", and {len(adapted)} tensors of an adaptation" if adapted else ""
        if found:
            at = found.get("at", "an unknown day")
            notes.append(f"revox injected this encoder ({run}) into {file.name} on {at}{more}.")
    if not files and (folder / ENCODER_WEIGHTS).is_file():
        notes.append(
            f"{ENCODER_WEIGHTS} is there, but the index does not list its tensors, so no engine reads it; "
            "inject the encoder again, or delete the file."
        )


def _tensor_findings(
    folder: Path,
    components: list[Component],
    mismatched: list[Mismatch],
    unknown: list[str],
    encoder: str,
    variant: bool,
    tensors: dict[str, TensorHeader],
    expected: dict[str, TensorSpec],
    notes: list[str],
    problems: list[str],
) -> None:
    absent = [n for part in components if part.name != "codec_encoder" for n in part.missing]
    asked = {name: spec for name, spec in expected.items() if spec.component != "codec_encoder"}
    if absent and not variant:
        problems.append(missing(str(weight_files(folder)[0]), absent, asked))
    elif absent:
        notes.append(
            f"{len(absent)} of {len(asked)} tensors do not have the release's names: a converted folder."
        )
    for wrong in mismatched:
        sentence = mismatch(wrong.name, tensors[wrong.name], expected[wrong.name])
        (notes if variant else problems).append(sentence)
    if encoder == "partial":
        part = components[COMPONENTS.index("codec_encoder")]
        notes.append(
            f"The codec encoder is partial: {part.found} of {part.expected} tensors, {part.missing[0]} the "
            "first missing; vllm-omni would turn ref_audio on uninitialised, revox leaves it off."
        )
    other = {dtype for component in components for dtype in component.dtypes} & (FLOAT_DTYPES - {"BF16"})
    if other and not variant:
        count = sum(component.dtypes.get(dtype, 0) for component in components for dtype in other)
        notes.append(f"{count} tensors are {' and '.join(sorted(other))}, where the release has BF16.")
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        notes.append(
            f"{len(unknown)} unknown tensors, which revox leaves alone: {', '.join(unknown[:3])}{more}."
        )
        if any(name.startswith("audio_tokenizer.") for name in unknown) and not variant:
            notes.append("vllm-omni refuses to start on an unknown tensor under audio_tokenizer.")


def _voices(folder: Path, params: Params, notes: list[str], problems: list[str]) -> list[ListedVoice]:
    config = params.voxtral_config()
    tekken_rows = _tekken(folder, params, problems)
    listed = params.voices
    if (folder / ".revox" / "journal.json").exists():
        notes.append("A change of voices was interrupted; the next `revox voice` command finishes it.")
    embeddings = {path.name[:-3]: path for path in sorted((folder / VOICE_FOLDER).glob("*.pt"))}
    voices = []
    for name in dict.fromkeys([*listed, *tekken_rows, *embeddings]):
        if not is_file_name(name):
            problems.append(
                f"{folder} lists a voice {name!r}, which cannot be a file's name; remove it there."
            )
            continue
        path = folder / VOICE_FOLDER / f"{name}.pt"
        rows: int | None = None
        if name in embeddings and path.exists():
            try:
                header = read_pt_header(path)
                if header.dtype != "BF16" or len(header.shape) != 2 or header.shape[1] != config.backbone.dim:
                    raise CheckpointError(
                        f"{path} holds {header.dtype} {list(header.shape)}, where BF16 [rows, "
                        f"{config.backbone.dim}] was expected; copy or add the voice again."
                    )
                rows = header.shape[0]
            except CheckpointError as error:
                if _is_bare_pickle(path):
                    notes.append(
                        f"{path} is in torch's format before 1.6: its rows show only when it is loaded."
                    )
                else:
                    problems.append(str(error))
        elif name in embeddings:
            problems.append(f"{path} is a link to a file that is gone; download the checkpoint again.")
        else:
            where = " and ".join(
                file
                for file, names in (("params.json", listed), ("tekken.json", tekken_rows))
                if name in names
            )
            problems.append(
                f"{path} is missing, but {where} lists the voice {name}; copy the file again or remove "
                f"the voice (`revox voice remove {name}`)."
            )
        count = tekken_rows.get(name)
        if rows is not None and count is not None and rows != count:
            problems.append(
                f"{folder / 'tekken.json'} gives the voice {name} {count} rows and {path} has {rows}; "
                f"set audio.voice_num_audio_tokens.{name} to {rows}, or copy both files from one checkpoint."
            )
        if rows is not None and name in listed and count is None:
            problems.append(
                f"{folder / 'tekken.json'} does not list the voice {name} of params.json; "
                f"set audio.voice_num_audio_tokens.{name} to {rows}."
            )
        elif rows is not None and name not in listed:
            notes.append(
                f"The voice {name} has a .pt but params.json does not list it: no runtime offers it."
            )
        if name != name.lower():
            notes.append(f"vllm-omni cannot serve the voice {name}: it lower-cases the names in requests.")
        voices.append(
            ListedVoice(
                name=name,
                rows=rows,
                tekken_rows=count,
                in_params=name in listed,
                seconds=None if rows is None else round((rows - 1) / config.codec.frame_rate, 2),
                bytes=path.stat().st_size if path.exists() else 0,
                added_by_revox=(folder / VOICE_FOLDER / f"{name}.voice.json").exists(),
            )
        )
    return voices


def _is_bare_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x80\x02"


def _tekken(folder: Path, params: Params, problems: list[str]) -> dict[str, int]:
    """Rows of each voice as tekken.json lists them."""
    path = folder / "tekken.json"
    codec = params.multimodal.audio_tokenizer_args
    rate = params.multimodal.audio_model_args.audio_encoding_args.frame_rate
    try:
        data = read_json(path)
        audio = data.get("audio")
        if not isinstance(audio, dict):
            raise CheckpointError(
                f"{path} has no audio section, so no voice can be prompted; copy the release's file."
            )
        for key, wanted in (("sampling_rate", codec.sampling_rate), ("frame_rate", rate)):
            if audio.get(key) != wanted:
                raise CheckpointError(
                    f"{path}: audio.{key} is {audio.get(key)!r}, where params.json says {wanted!r}; "
                    "copy both files from one checkpoint."
                )
        rows = audio.get("voice_num_audio_tokens") or {}
        if not isinstance(rows, dict) or not all(type(count) is int and count > 0 for count in rows.values()):
            raise CheckpointError(
                f"{path}: audio.voice_num_audio_tokens should give each voice its rows; copy the file again."
            )
        size = (data.get("config") or {}).get("default_vocab_size")
        if isinstance(size, int) and size > params.vocab_size:
            raise CheckpointError(
                f"{path} has {size} tokens and params.json a vocab_size of {params.vocab_size}; "
                "copy both files from one checkpoint."
            )
    except CheckpointError as error:
        problems.append(str(error))
        return {}
    return dict(rows)


def _files(folder: Path) -> list[FileSize]:
    found = [folder / "params.json", folder / "config.json", folder / "tekken.json", *weight_files(folder)]
    found += sorted((folder / VOICE_FOLDER).glob("*.pt"))
    return [FileSize(str(path.relative_to(folder)), path.stat().st_size) for path in found if path.exists()]


def _sizes(params: Params, config: VoxtralConfig) -> dict[str, Any]:
    return {
        "sampling_rate": config.codec.sampling_rate,
        "frame_rate": config.codec.frame_rate,
        "codebooks": config.codec.n_codebooks,
        "semantic_codes": config.codec.semantic_codebook_size,
        "acoustic_levels": config.codec.acoustic_codebook_size,
        "dim": config.backbone.dim,
        "layers": config.backbone.n_layers,
        "vocab_size": config.backbone.vocab_size,
        "acoustic_layers": config.acoustic.n_layers,
        "flow_steps": config.acoustic.n_decoding_steps,
        "codec_dim": config.codec.dim,
        "bits_per_weight": 16,
        "max_seq_len": params.max_seq_len,
    }


def _capabilities(
    core: bool,
    encoder: str,
    components: list[Component],
    mismatched: list[Mismatch],
    n_voices: int,
    variant: bool,
) -> list[Capability]:
    parts = {component.name: component for component in components}
    wrong = {component_of(mismatch.name) for mismatch in mismatched}
    invertible = not variant and all(
        parts[name].found == parts[name].expected and name not in wrong
        for name in ("codec_decoder", "quantizer", "audio_embedding")
    )
    part = parts["codec_encoder"]
    why_no_encoder = {
        "absent": f"the codec encoder is not in the weights (0 of {part.expected} tensors); restore it first",
        "partial": f"the codec encoder is partial ({part.found} of {part.expected} tensors)",
        "complete": "the codec encoder is complete"
        if core
        else "the encoder is there, but the weights are not usable",
    }[encoder]
    why_no_presets = (
        "no voice with matching rows" if not n_voices else "the weights are not usable as they are"
    )
    return [
        Capability(
            "preset speech",
            core and n_voices > 0,
            f"{n_voices} voices" if core and n_voices else why_no_presets,
        ),
        Capability("cloning by ref_audio", core and encoder == "complete", why_no_encoder),
        Capability(
            "cloning by inversion",
            invertible,
            "through the frozen decoder, with `revox clone`"
            if invertible
            else "decoder, quantizer or table not usable",
        ),
        Capability("instructions", False, "accepted by vllm-omni and ignored: the model has no such input"),
        Capability("voice design", False, "the model has no description of a voice as input"),
    ]


def _runtimes(
    folder: Path,
    config: VoxtralConfig,
    core: bool,
    encoder: str,
    unknown: list[str],
    spoken: list[ListedVoice],
    variant: bool,
) -> list[Runtime]:
    speaks = "speaks the presets" if spoken else "has no preset to speak"
    if not core:
        why = (
            "does not read converted or quantized weights"
            if variant
            else "does not start: tensors are missing or wrong"
        )
        serves, clones = why, "no"
        old = new = clones
        ours, ours_cloning = why, "no"
    else:
        serves = speaks
        if any(name.startswith("audio_tokenizer.") for name in unknown):
            serves = "does not start: unknown tensors under audio_tokenizer"
        restored = {"complete": "clones", "partial": "turned on, but clones from uninitialised weights"}
        old = restored.get(encoder, "kills the engine")
        new = restored.get(encoder, "refused as a bad request")
        ours = speaks
        ours_cloning = {
            "complete": "clones with the encoder, or by inversion",
            "partial": "clones by inversion (the partial encoder is left off)",
            "absent": "clones by inversion",
        }[encoder]
    safetensors = {path.stem for path in (folder / VOICE_FOLDER).glob("*.safetensors")}
    exported = sum(voice.name in safetensors for voice in spoken)
    if exported == len(spoken) and spoken:
        mlx = "speaks the presets (an extra [AUDIO] before the first frame)"
    else:
        mlx = (
            f"speaks {exported} of {len(spoken)} voices: it reads NAME.safetensors in voice_embedding "
            "(`revox voice export` writes them)"
        )
    if core and config == CONFIG:
        c_port = "speaks the presets (an extra [AUDIO] before the first frame)"
    elif core:
        c_port = "does not start: the release's sizes are compiled in"
    else:
        c_port = "reads its own INT8 variant only" if variant else "does not start: tensors are missing"
    rust = "speaks the presets (an extra [AUDIO] before the first frame)" if core else "does not start"
    return [
        Runtime("vllm-omni 0.18 to 0.28", serves, old),
        Runtime("vllm-omni 0.30 and later", serves, new),
        Runtime(
            "mlx-audio",
            mlx if core or variant else "does not start: tensors are missing or wrong",
            "no encoder in it",
        ),
        Runtime("voxtral-tts.c (C)", c_port, "no encoder in it"),
        Runtime("voxtral_tts_rs (Rust)", rust, "no encoder in it"),
        Runtime("revox", ours, ours_cloning),
    ]
