"""A checkpoint's tensors into the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.readable import unreadable
from revox.checkpoint.release import ENCODER_PREFIXES, expected_tensors
from revox.checkpoint.tensors import WEIGHTS, open_tensors, read_header
from revox.model.voxtral import Voxtral, parameter_name, tensor_name

PARTS = ("mm_audio_embeddings", "backbone", "acoustic_transformer", "audio_tokenizer")


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
    folder = Path(folder)
    config = read_params(folder).voxtral_config()
    path = folder / WEIGHTS
    wanted = tuple(f"{part}." for part in parts)
    header = {
        name: entry for name, entry in read_header(path).items() if parameter_name(name).startswith(wanted)
    }
    if why := unreadable(header, expected_tensors(config)):
        raise CheckpointError(why)
    with open_tensors(path) as file:
        names = {parameter_name(name): name for name in file.keys()}  # noqa: SIM118 - not a mapping
        with torch.device("meta"):
            model = Voxtral(config, with_encoder=True)
            encoder = [n for n in model.state_dict() if n.startswith(ENCODER_PREFIXES)]
            if not all(n in names for n in encoder):
                model = Voxtral(config, with_encoder=False)
        state = {}
        for name, parameter in model.state_dict().items():
            if not name.startswith(wanted):
                continue
            if name not in names:
                raise CheckpointError(
                    f"{path} has no tensor {tensor_name(name)}: "
                    "the download is incomplete or this is another model"
                )
            tensor = file.get_tensor(names[name])
            if tensor.shape != parameter.shape:
                found, wanted_shape = list(tensor.shape), list(parameter.shape)
                raise CheckpointError(
                    f"{path}: {names[name]} has shape {found}, params.json asks for {wanted_shape}"
                )
            if dtype is not None:
                tensor = tensor.to(dtype)
            state[name] = tensor.to(device)
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
