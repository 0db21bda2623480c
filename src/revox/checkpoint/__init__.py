"""The release on disk: a folder of params.json, weights, tokenizer and voices (imported without torch)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: the function has its module's name, which would otherwise take its place.
from revox.checkpoint.locate import locate as locate

if TYPE_CHECKING:
    from revox.checkpoint.errors import CheckpointError as CheckpointError
    from revox.checkpoint.errors import VoiceError as VoiceError
    from revox.checkpoint.inspect import Report as Report
    from revox.checkpoint.inspect import check_checkpoint as check_checkpoint
    from revox.checkpoint.params import Params as Params
    from revox.checkpoint.params import read_params as read_params
    from revox.checkpoint.release import TensorSpec as TensorSpec
    from revox.checkpoint.release import expected_tensors as expected_tensors
    from revox.checkpoint.tensors import read_header as read_header
    from revox.checkpoint.tensors import write_safetensors_stream as write_safetensors_stream

# `inspect.inspect` is not re-exported: the name is the submodule's.
_HOME = {
    "CheckpointError": "errors",
    "VoiceError": "errors",
    "Report": "inspect",
    "check_checkpoint": "inspect",
    "Params": "params",
    "read_params": "params",
    "TensorSpec": "release",
    "expected_tensors": "release",
    "read_header": "tensors",
    "write_safetensors_stream": "tensors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
