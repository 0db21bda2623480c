"""LoRA factors beside a checkpoint, in the format of peft, applied to the weights as they are read.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The factors of the release's
`NAME.weight` `[out, in]` are `base_model.model.NAME.lora_A.weight` `[r, in]` and
`base_model.model.NAME.lora_B.weight` `[out, r]`; the weight becomes W + lora_alpha / r * B A (Hu et al.,
arXiv 2106.09685).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_json
from revox.checkpoint.release import TensorSpec
from revox.checkpoint.tensors import FLOAT_DTYPES, open_tensors, read_header, write_safetensors_stream
from revox.model.linear import Weight, as_tensor
from revox.model.voxtral import tensor_name
from revox.speech.files import replace_file

CONFIG_FILE = "adapter_config.json"
FACTORS_FILE = "adapter_model.safetensors"

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_COMPONENTS = ("backbone", "acoustic_transformer")
_UNUSED = (
    "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern",
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens",
)  # fmt: skip
"""Settings of peft under which the factors mean more than one scale times a product."""


class _AdapterConfig(BaseModel):
    """What is read of adapter_config.json."""

    model_config = ConfigDict(frozen=True)

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    bias: Literal["none"] = "none"
    unused: dict[str, Any] = {}

    @field_validator("unused")
    @classmethod
    def _off(cls, values: dict[str, Any]) -> dict[str, Any]:
        if on := next((key for key, value in values.items() if value), None):
            raise ValueError(f"{on} is {values[on]!r}, and plain LoRA of one rank and scale is expected")
        return values


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of weights by the release's names: `up` `[out, r]` and `down` `[r, in]`, float32."""

    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def applied(self, name: str, weight: Weight) -> Weight:
        """The weight `name` with its change, summed in float32; as it is if it has none."""
        if name not in self.factors:
            return weight
        up, down = self.factors[name]
        return as_tensor(weight).float() + self.scale * (up @ down)


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter. Raises CheckpointError if one is missing."""
    files = [folder / CONFIG_FILE, folder / FACTORS_FILE]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: name a folder with LoRA factors in peft's format")
    return files


def read_adapter(folder: Path, expected: Mapping[str, TensorSpec]) -> Adapter:
    """Read and check the adapter in `folder` for a checkpoint with the tensors `expected`.

    Modules may also have the names of `Voxtral`, which peft writes when it wraps that. Raises CheckpointError
    when a file is missing or damaged, the config asks for more than plain LoRA, or a factor is of another
    model, without its partner or not finite.
    """
    path = folder / FACTORS_FILE
    config = _read_config(folder / CONFIG_FILE)
    found: dict[str, dict[str, str]] = {}
    header = read_header(path)
    for key, entry in header.items():
        match = _FACTOR.fullmatch(key)
        name = tensor_name(f"{match[1]}.weight") if match else ""
        spec = expected.get(name)
        if match is None or spec is None or spec.component not in _COMPONENTS or len(spec.shape) != 2:
            raise CheckpointError(
                f"{path}: {key} is not a LoRA factor of a matrix of this checkpoint's language model; take "
                "an adapter whose modules have the release's names, such as layers.0.attention.wq."
            )
        out, inside = spec.shape
        shape = (config.r, inside) if match[2] == "A" else (out, config.r)
        if entry.shape != shape or entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: {key} is {entry.dtype} {list(entry.shape)}, expected floating point {list(shape)}; "
                "take the adapter of this checkpoint."
            )
        found.setdefault(name, {})[match[2]] = key
    alone = next((name for name, parts in found.items() if len(parts) < 2), None)
    if alone is not None or not found:
        raise CheckpointError(f"{path} lacks the factors of {alone or 'any matrix'}; copy it again.")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    with open_tensors(path) as file:
        for name, parts in found.items():
            up, down = (file.get_tensor(parts[part]).float() for part in "BA")
            if not bool(up.isfinite().all() & down.isfinite().all()):
                raise CheckpointError(f"{path}: the factors of {name} are not finite; the run diverged.")
            factors[name] = up, down
    return Adapter(config.lora_alpha / config.r, factors)


def write_adapter(folder: Path, adapter: Adapter, record: Mapping[str, Any]) -> None:
    """Write `adapter` for peft and `read_adapter`; `record` goes into the metadata. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = {name: name.removesuffix(".weight") for name in adapter.factors}
    rank = next(iter(adapter.factors.values()))[1].shape[0]
    config = {
        "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "lora_alpha": adapter.scale * rank, "lora_dropout": 0.0, "peft_type": "LORA", "r": rank,
        # One pattern: names in a list would also match the ends of longer names.
        "target_modules": "|".join(re.escape(stem) for stem in stems.values()), "task_type": None,
    }  # fmt: skip
    entries = [
        (f"base_model.model.{stems[name]}.lora_{part}.weight", tuple(factor.shape), "F32", factor.float())
        for name, (up, down) in adapter.factors.items()
        for part, factor in (("A", down), ("B", up))
    ]
    write_safetensors_stream(
        folder / FACTORS_FILE, entries, {"format": "pt", "revox": json.dumps(dict(record))}
    )
    replace_file(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _read_config(path: Path) -> _AdapterConfig:
    data = read_json(
        path, f"{path} is missing; name a folder that `revox train adapt` or peft wrote a LoRA adapter to."
    )
    try:
        given = {key: data[key] for key in ("peft_type", "r", "lora_alpha", "bias") if key in data}
        return _AdapterConfig(**given, unused={key: data.get(key) for key in _UNUSED})
    except ValidationError as error:
        first = error.errors()[0]
        where = "" if first["loc"] == ("unused",) else f"{first['loc'][0]}: "
        raise CheckpointError(f"{path}: {where}{first['msg'].removeprefix('Value error, ')}.") from None
