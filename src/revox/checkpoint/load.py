"""A checkpoint's tensors into the model."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from revox.checkpoint.adapter import read_adapter
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.quantized import INT4, INT8, StoredWeight, stored_weights
from revox.checkpoint.readable import check_tensors
from revox.checkpoint.release import (
    EMBEDDING_TABLE,
    ENCODER_PREFIXES,
    TEXT_TABLE,
    expected_tensors,
    is_quantizable,
)
from revox.checkpoint.tensors import folder_tensors, open_tensors, read_tensor
from revox.model.card_linear import card_linear
from revox.model.codec import Codec
from revox.model.linear import (
    BFloat16Linear,
    Weight,
    as_tensor,
    has_fbgemm,
    multiplies_bf16,
    quantized_linear,
)
from revox.model.voxtral import Voxtral, parameter_name

PARTS = ("mm_audio_embeddings", "backbone", "acoustic_transformer", "audio_tokenizer")
SMALL_MODEL_BYTES = 2_000_000_000
SHARE_OF_MEMORY = 0.8


def load_model(
    folder: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    parts: Iterable[str] = PARTS,
    quantized: str | None = None,
    adapter: Path | None = None,
) -> Voxtral:
    """The model of a checkpoint folder, in eval mode, frozen, with its encoder if the folder has a whole one.

    `parts` names the top-level modules to load (of `PARTS`); the others stay on the meta device, without
    memory. `dtype` is that of the floating-point weights (None: as stored). Tensors that the model does not
    know are left alone.

    `quantized` ("int8" or "int4"; on a graphics card "fp8" as well) quantizes the matrices that
    `is_quantizable` names, one after another, so that memory stays near what the model takes in the end. On
    the CPU the embedding tables are then as stored, the rest and the arithmetic are float32; on a card all is
    bf16. `dtype` does not count.

    Weights that the folder stores in fewer bits (`revox.checkpoint.quantized`) are taken as they are where
    they are what is asked for on the CPU, and otherwise turned back into floating point.

    `adapter` is a folder of LoRA factors (`revox.checkpoint.adapter`), added to their matrices in float32
    before these get their dtype or bits.

    Raises CheckpointError when a tensor is missing, has another shape, is stored in a way that revox does not
    read (the sentence is `revox inspect`'s), or the file cannot be read; when the adapter does not fit.
    """
    config = read_params(folder).voxtral_config()
    inventory, present = expected_tensors(config), folder_tensors(folder)
    with_encoder = all(name in present for name in inventory if name.startswith(ENCODER_PREFIXES))
    wanted = tuple(f"{part}." for part in parts)
    expected = {
        name: spec
        for name, spec in inventory.items()
        if parameter_name(name).startswith(wanted) and (with_encoder or spec.component != "codec_encoder")
    }
    tensors = {n: entry for n, entry in present.items() if parameter_name(n).startswith(wanted)}
    check_tensors(tensors, expected)
    changes = None if adapter is None else read_adapter(adapter, inventory)
    with torch.device("meta"):
        model = Voxtral(config, with_encoder)
    stored = stored_weights(tensors, expected)

    def read(name: str) -> Weight:
        weight = stored[name].read() if name in stored else read_tensor(name, tensors[name])
        return weight if changes is None else changes.applied(name, weight)

    names, place = list(expected), torch.device(device)
    if quantized is not None:
        _quantize_layers(model, [name for name in names if is_quantizable(name)], read, quantized, place)
        names = [name for name in names if not is_quantizable(name)]
    state = {}
    for name in names:
        tensor = as_tensor(read(name))
        if quantized is None:
            tensor = tensor.to(dtype=dtype)
        elif place.type != "cpu":
            tensor = tensor.bfloat16()
        elif name not in (TEXT_TABLE, EMBEDDING_TABLE):
            tensor = tensor.float()
        elif name in stored:
            tensor = tensor.bfloat16()
        state[parameter_name(name)] = tensor.to(device)
    model.load_state_dict(state, strict=False, assign=True)
    _place_computed_buffers(model, device)
    if torch.device(device).type == "cpu" and not multiplies_bf16():
        _multiply_rows_in_float32(model.backbone)
        # Their products have six rows and more. The encoder is left as serving has it: its codes turn on the
        # last digit.
        for part in (model.acoustic_transformer.layers, model.audio_tokenizer.decoder_blocks):
            _multiply_rows_in_float32(part, wide=True)
    return model.eval().requires_grad_(False)


def codec_with_encoder(checkpoint: Path, encoder: Path) -> Codec:
    """The checkpoint's codec with the encoder of the file `encoder`, float32, on the CPU, frozen.

    The file is a safetensors file, as `revox encoder export` and training runs write it. Raises
    CheckpointError when it is missing or damaged, or not this checkpoint's encoder.
    """
    released = load_model(checkpoint, dtype=torch.float32, parts=("audio_tokenizer",)).audio_tokenizer
    codec = Codec(released.config, with_encoder=True)
    state = dict(released.state_dict())
    with open_tensors(encoder) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            state[name.removeprefix("audio_tokenizer.")] = file.get_tensor(name).float()
    try:
        codec.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{encoder} is not an encoder of {checkpoint.name}: {why}") from None
    return codec.eval().requires_grad_(False)


def _quantize_layers(
    model: Voxtral,
    names: Sequence[str],
    read: Callable[[str], Weight],
    quantized: str,
    device: torch.device,
) -> None:
    def layer(name: str) -> nn.Module:
        if device.type != "cpu":
            return _on_card(read(name), quantized, device)
        # The acoustic transformer is read seven times a frame for six rows: its products are bound by
        # arithmetic, and the errors of its steps average out.
        digits = 1 if name.startswith("acoustic_transformer.") else 2
        return quantized_linear(read(name), 8 if quantized == "int8" else 4, digits)

    with ThreadPoolExecutor(max_workers=2) as workers:
        for count, (name, made) in enumerate(zip(names, workers.map(layer, names), strict=True), 1):
            model.set_submodule(parameter_name(name).removesuffix(".weight"), made)
            if count % 8 == 0 or count == len(names):
                _return_freed_memory()


def _on_card(weight: Weight, quantized: str, device: torch.device) -> nn.Module:
    try:
        return card_linear(weight, quantized, device)
    except ImportError:
        raise CheckpointError(
            f"{quantized} weights on a graphics card need torchao: pip install 'revox[card]', or take bf16"
        ) from None


def _return_freed_memory() -> None:
    """glibc keeps freed blocks below 32 MB; after hundreds of weights that is gigabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _multiply_rows_in_float32(part: nn.Module, wide: bool = False) -> None:
    for name, module in list(part.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16:
            part.set_submodule(name, BFloat16Linear(module.weight, wide))


def _place_computed_buffers(model: nn.Module, device: str | torch.device) -> None:
    # ALiBi slopes and table offsets are not in the file: they are computed on the CPU when the model is
    # built.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))


def default_dtype(folder: Path, device: str | torch.device) -> torch.dtype:
    """bf16 on CUDA, as in serving. Elsewhere float32 for a small model and bf16 for a full-size one.

    float32 is the exact arithmetic, and quicker where a processor has no bf16 instructions; but at full size
    it would take 16 GB of memory instead of 8 and read twice as much of it for every frame.
    """
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    small = 0 < weights < SMALL_MODEL_BYTES
    return torch.float32 if small and torch.device(device).type != "cuda" else torch.bfloat16


def fastest_weights(folder: Path, device: torch.device) -> str:
    """What measures best for speaking on this device: "float32", "bf16", "int8" or "int4".

    As `default_dtype`, but int8 for a full-size model on a processor where torch has FBGEMM: there it is
    several times as fast as bf16 (docs/performance.md). On a graphics card bf16, or int8 where that would
    fill the memory. int4 where int8 would. A folder that `revox quantize` made is taken as it is, on the CPU.
    """
    kinds = {weight.kind for weight in _stored_in(folder).values()}
    if device.type == "cpu" and kinds & {INT8, INT4}:
        return "int4" if INT4 in kinds else "int8"
    if default_dtype(folder, device) == torch.float32:
        return "float32"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device.type == "cuda" and stored <= SHARE_OF_MEMORY * memory:
        return "bf16"
    if device.type != "cuda" and not (device.type == "cpu" and has_fbgemm()):
        return "bf16"
    return "int4" if stored / 2 > SHARE_OF_MEMORY * memory else "int8"


def _stored_in(folder: Path) -> dict[str, StoredWeight]:
    return stored_weights(folder_tensors(folder), expected_tensors(read_params(folder).voxtral_config()))
