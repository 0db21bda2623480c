"""A checkpoint's tensors into the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from revox.checkpoint.params import read_params
from revox.checkpoint.readable import check_tensors
from revox.checkpoint.release import ENCODER_PREFIXES, expected_tensors
from revox.checkpoint.tensors import folder_tensors, open_weights
from revox.model.voxtral import Voxtral, parameter_name

PARTS = ("mm_audio_embeddings", "backbone", "acoustic_transformer", "audio_tokenizer")
SMALL_MODEL_BYTES = 2_000_000_000


def load_model(
    folder: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    parts: Iterable[str] = PARTS,
) -> Voxtral:
    """The model of a checkpoint folder, in eval mode, frozen, with its encoder if the folder has a whole one.

    `parts` names the top-level modules to load (of `PARTS`); the others stay on the meta device, without
    memory. `dtype` is that of the floating-point weights (None: as stored). Tensors that the model does not
    know are left alone.
    Raises CheckpointError when a tensor is missing, has another shape, is not plain floating point (quantized
    weights: the sentence is `revox inspect`'s), or the file cannot be read.
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
    with torch.device("meta"):
        model = Voxtral(config, with_encoder)
    with open_weights(tensors) as get:
        state = {parameter_name(name): get(name).to(device=device, dtype=dtype) for name in expected}
    model.load_state_dict(state, strict=False, assign=True)
    _place_computed_buffers(model, device)
    return model.eval().requires_grad_(False)


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
