"""params.json <-> a typed config: sizes come from the file, only what the release omits has a default."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.placeholders import unfinished, why_not
from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig

MODEL_TYPE = "voxtral_tts"
ARCHITECTURE = "VoxtralTTSForConditionalGeneration"

# Far above any model's, and low enough that no product of three overflows or fills the memory before the
# tensors' own shapes are compared.
MOST, MOST_LAYERS = 1 << 20, 1024
Count = Annotated[int, Field(gt=0, le=MOST, strict=True)]
Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS, strict=True)]
Size = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    """A part of params.json. Fields that this project does not read are kept and written back."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class AudioEncodingArgs(_Section):
    """`multimodal.audio_model_args.audio_encoding_args`."""

    num_codebooks: Count
    sampling_rate: Count
    frame_rate: Size
    codebook_pattern: str = "parallel"


class AcousticTransformerArgs(_Section):
    """`multimodal.audio_model_args.acoustic_transformer_args`."""

    input_dim: Count
    dim: Count
    n_layers: Layers
    head_dim: Count
    hidden_dim: Count
    n_heads: Count
    n_kv_heads: Count
    use_biases: Literal[False] = False
    norm_eps: Size = 1e-5
    n_decoding_steps: Count | None = None
    """Euler steps of the flow; absent from the release, where the serving code takes 7."""


class AudioModelArgs(_Section):
    """`multimodal.audio_model_args`."""

    semantic_codebook_size: Count
    acoustic_codebook_size: Count
    n_acoustic_codebook: Count
    audio_encoding_args: AudioEncodingArgs
    audio_token_id: int
    begin_audio_token_id: int
    input_embedding_concat_type: Literal["sum"] = "sum"
    acoustic_transformer_args: AcousticTransformerArgs

    @model_validator(mode="before")
    @classmethod
    def _sizes_as_one_string(cls, data: Any) -> Any:
        # The serving code also takes "codebook_sizes": "8192,21,21,...": semantic, then equal acoustic ones.
        if isinstance(data, dict) and isinstance(data.get("codebook_sizes"), str):
            sizes = _numbers("codebook_sizes", data["codebook_sizes"])
            if len(sizes) < 2 or len(set(sizes[1:])) != 1:
                raise ValueError("codebook_sizes should be one semantic size and then equal acoustic sizes")
            data = data | {
                "semantic_codebook_size": sizes[0],
                "acoustic_codebook_size": sizes[1],
                "n_acoustic_codebook": len(sizes) - 1,
            }
        return data


class AudioTokenizerArgs(_Section):
    """`multimodal.audio_tokenizer_args`: the codec, and the list of voices."""

    channels: Literal[1] = 1
    sampling_rate: Count
    pretransform_patch_size: Count
    patch_proj_kernel_size: Count
    semantic_codebook_size: Count
    semantic_dim: Count
    acoustic_codebook_size: Count
    acoustic_dim: Count
    conv_weight_norm: bool = True
    causal: Literal[True] = True
    attn_sliding_window_size: Count
    half_attn_window_upon_downsampling: bool = True
    dim: Count
    hidden_dim: Count
    head_dim: Count
    n_heads: Count
    n_kv_heads: Count
    qk_norm: Literal[True] = True
    qk_norm_eps: Size = 1e-6
    use_biases: Literal[False] = False
    norm_eps: Size = 1e-2
    layer_scale: Literal[True] = True
    layer_scale_init: Size | None = None
    # The release omits the shape of the encoder, which it withholds; these are the serving code's defaults.
    encoder_transformer_lengths_str: str = "2,2,2,2"
    encoder_convs_kernels_str: str = "4,4,4,3"
    encoder_convs_strides_str: str = "2,2,2,1"
    decoder_transformer_lengths_str: str = "2,2,2,2"
    decoder_convs_kernels_str: str = "3,4,4,4"
    decoder_convs_strides_str: str = "1,2,2,2"
    voice: dict[str, int] = Field(default_factory=dict)


class Multimodal(_Section):
    """`multimodal`."""

    bos_token_id: int = 1
    audio_model_args: AudioModelArgs
    audio_tokenizer_args: AudioTokenizerArgs


class Params(_Section):
    """The whole params.json; `model_dump(exclude_unset=True)` gives the file's content back."""

    dim: Count
    n_layers: Layers
    head_dim: Count
    hidden_dim: Count
    n_heads: Count
    n_kv_heads: Count
    rope_theta: Size
    norm_eps: Size
    vocab_size: Count
    max_seq_len: Count | None = None
    model_type: str = MODEL_TYPE
    multimodal: Multimodal

    @model_validator(mode="after")
    def _parts_agree(self) -> Params:
        model, codec = self.multimodal.audio_model_args, self.multimodal.audio_tokenizer_args
        acoustic, encoding = model.acoustic_transformer_args, model.audio_encoding_args
        rules: list[tuple[bool, str]] = [
            (
                codec.semantic_codebook_size == model.semantic_codebook_size
                and codec.acoustic_codebook_size == model.acoustic_codebook_size
                and codec.acoustic_dim == model.n_acoustic_codebook,
                "the codebook sizes of audio_model_args and audio_tokenizer_args should be the same",
            ),
            (codec.acoustic_codebook_size > 1, "acoustic_codebook_size should be above 1"),
            (
                encoding.num_codebooks == 1 + model.n_acoustic_codebook,
                f"audio_encoding_args.num_codebooks should be {1 + model.n_acoustic_codebook}",
            ),
            # The semantic head reads the backbone's hidden state: all widths are one.
            (
                acoustic.input_dim == acoustic.dim == self.dim,
                f"acoustic_transformer_args.dim and .input_dim should be dim, {self.dim}",
            ),
            (self.head_dim % 2 == 0, "head_dim should be even"),
            (acoustic.dim % 2 == 0, "acoustic_transformer_args.dim should be even"),
        ]
        for n_heads, n_kv_heads, where in (
            (self.n_heads, self.n_kv_heads, "n_heads"),
            (acoustic.n_heads, acoustic.n_kv_heads, "acoustic_transformer_args.n_heads"),
            (codec.n_heads, codec.n_kv_heads, "audio_tokenizer_args.n_heads"),
        ):
            rules.append((n_heads % n_kv_heads == 0, f"{where} should be a multiple of n_kv_heads"))
        for holds, sentence in rules:
            if not holds:
                raise ValueError(sentence)
        self._check_codec_shape(codec, encoding)
        return self

    def _check_codec_shape(self, codec: AudioTokenizerArgs, encoding: AudioEncodingArgs) -> None:
        shape = {
            part: [
                _numbers(f"{part}_{what}_str", getattr(codec, f"{part}_{what}_str"))
                for what in ("transformer_lengths", "convs_kernels", "convs_strides")
            ]
            for part in ("encoder", "decoder")
        }
        for part, (lengths, kernels, strides) in shape.items():
            if not len(lengths) == len(kernels) == len(strides):
                raise ValueError(f"the {part}'s lengths, kernels and strides should be equally many")
            if max(sum(lengths), *kernels) > MOST_LAYERS:
                raise ValueError(f"the {part} should have at most {MOST_LAYERS} layers, and kernels as long")
            if any(kernel < stride for kernel, stride in zip(kernels, strides, strict=True)):
                raise ValueError(f"{part}_convs_kernels_str should not be below {part}_convs_strides_str")
            if codec.half_attn_window_upon_downsampling and any(stride > 2 for stride in strides):
                raise ValueError(
                    f"{part}_convs_strides_str should be of 1 and 2, since the attention window halves"
                )
        factor = math.prod(shape["encoder"][2])
        if factor != math.prod(shape["decoder"][2]):
            raise ValueError("the encoder's strides should multiply to the same number as the decoder's")
        if codec.half_attn_window_upon_downsampling and codec.attn_sliding_window_size // factor < 2:
            raise ValueError(
                f"attn_sliding_window_size should be at least {2 * factor}, since it halves with each stride"
            )
        if codec.sampling_rate != encoding.sampling_rate:
            raise ValueError("audio_encoding_args.sampling_rate should be audio_tokenizer_args.sampling_rate")
        rate = codec.sampling_rate / (codec.pretransform_patch_size * factor)
        if not math.isclose(rate, encoding.frame_rate, rel_tol=1e-6):
            raise ValueError(
                f"audio_encoding_args.frame_rate should be {rate:g}, as the codec's strides give"
            )

    @property
    def voices(self) -> dict[str, int]:
        """Names of the voices listed, with their ids (which no runtime reads)."""
        return self.multimodal.audio_tokenizer_args.voice

    def voxtral_config(self) -> VoxtralConfig:
        """The sizes as plain dataclasses, as `revox.model` takes them."""
        codec = self.multimodal.audio_tokenizer_args
        acoustic = self.multimodal.audio_model_args.acoustic_transformer_args
        stacks: dict[str, Any] = {
            name: _numbers(name, getattr(codec, f"{name}_str"))
            for part in ("encoder", "decoder")
            for name in (f"{part}_transformer_lengths", f"{part}_convs_kernels", f"{part}_convs_strides")
        }
        return VoxtralConfig(
            backbone=BackboneConfig(**_sizes(BackboneConfig, self)),
            acoustic=AcousticConfig(**_sizes(AcousticConfig, acoustic)),
            codec=CodecConfig(**_sizes(CodecConfig, codec), **stacks),
        )


def _sizes(config: type, section: _Section) -> dict[str, Any]:
    """What a section says of a config's fields; the rest keeps the config's defaults."""
    named = {field.name: getattr(section, field.name, None) for field in fields(config)}
    return {name: value for name, value in named.items() if value is not None}


def read_params(folder: str | Path) -> Params:
    """Read and check `folder`/params.json.

    Raises:
        CheckpointError: no such folder or file, not JSON, another model's, a field missing or of the wrong
            kind, or parts that do not fit together.
    """
    path = Path(folder) / "params.json"
    try:
        stat = path.stat()
    except OSError:
        return _read(path)  # which says what is wrong
    return _read_once(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=8)
def _read_once(path: Path, state: tuple[int, ...]) -> Params:
    """One command asks for params.json in several places; it is read anew when the file has changed."""
    return _read(path)


def _read(path: Path) -> Params:
    data = read_json(path, missing=_why_no_params(path.parent))
    if not _is_voxtral_tts(data):
        kind = data.get("model_type") or next(iter(data.get("architectures") or []), "none")
        raise CheckpointError(
            f'{path} is of another model (model_type {kind!r}, where "{MODEL_TYPE}" was expected); '
            "name the folder of a Voxtral TTS checkpoint."
        )
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_complaint(error)}; restore the file as released.") from None


def read_json(path: Path, missing: str | None = None) -> dict[str, Any]:
    """Read a JSON object from `path`, with a sentence for everything that can be wrong."""
    try:
        data = from_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            unfinished(path) or missing or f"{path} is missing; copy or download it again."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected a readable JSON file: fix its permissions."
        ) from None
    except ValueError as error:
        raise CheckpointError(
            why_not(path) or f"{path} is not valid JSON ({error}); copy or download it again."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object; copy or download it again.")
    return data


def _is_voxtral_tts(data: dict[str, Any]) -> bool:
    # The serving code's own rule: the type, or the architecture's name.
    return data.get("model_type") == MODEL_TYPE or ARCHITECTURE in (data.get("architectures") or [])


def _why_no_params(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; name the folder of a checkpoint (with params.json) or a hub id."
    if not (folder / "config.json").is_file():
        return (
            f"{folder}/params.json is missing; name the folder of a Voxtral TTS checkpoint, or download it "
            "again."
        )
    try:
        other = from_json((folder / "config.json").read_bytes())
        kind = other.get("model_type") or next(iter(other.get("architectures") or []), "unknown")
    except (OSError, ValueError, AttributeError):
        kind = "unknown"
    what = "a converted Voxtral TTS checkpoint" if kind == MODEL_TYPE else "another model"
    return (
        f"{folder} holds {what} (config.json says {kind!r}, and {folder}/params.json is missing); name the "
        "original folder of a Voxtral TTS checkpoint, with params.json and consolidated.safetensors."
    )


def _first_complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} is missing"
    what = str(first["msg"]).removeprefix("Value error, ")
    if not where or first["type"] == "value_error":
        return what
    found = repr(first["input"])
    what = what[0].lower() + what[1:]
    return f"{where}: {what.replace('input should', 'the value should')}, found {found[:60]}"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{name} should be whole numbers above 0 with commas between them, found {text!r}")
    return numbers
