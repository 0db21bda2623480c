"""A codec encoder in a file of its own, and the merged weights of an adaptation: read and checked before use.

An encoder file is a safetensors file of the encoder's tensors (114 at the release's structure), under their
names in the checkpoint or without `audio_tokenizer.`, in float32, float16 or bf16. What is known of it is
JSON in the header's metadata under the key `revox`: any keys, of which these are understood: `revox_run`,
`data`, `steps` (shown in the model card) and `decoder_sha256` (what the function of that name gives for the
checkpoint that the encoder was trained against).

Importing this does not import torch; reading an encoder does, and takes memory for one in bf16 (300 MB).
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import TensorSpec, expected_tensors
from revox.checkpoint.tensors import (
    FLOAT_DTYPES,
    TensorHeader,
    folder_tensors,
    open_tensors,
    open_weights,
    read_header,
    read_metadata,
    tensor_sha256,
)
from revox.speech.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

ENCODER_FILE = "encoder.safetensors"
"""The encoder's name in a training run's folder."""

RECORD_KEY = "revox"
"""Where a file's metadata says, as JSON, what the encoder is."""

DECODER = ("codec_decoder", "quantizer")
"""The components that an encoder is trained against: it serves no other."""

_PREFIX = "audio_tokenizer."
_DIVERGED = "the run diverged: take an earlier state"


@dataclass(frozen=True)
class Encoder:
    """A checked encoder: tensors in bf16 by their names in the checkpoint, its record, one hash of all."""

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    sha256: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def encoder_specs(expected: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Those of `expected_tensors` that are the encoder's."""
    return {name: spec for name, spec in expected.items() if spec.component == "codec_encoder"}


def find_encoder(path: str | Path) -> Path:
    """The file that `--encoder` names: a file, or a training run's folder with `encoder.safetensors` in it.

    Raises CheckpointError when a folder holds none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / ENCODER_FILE).exists():
            raise CheckpointError(
                f"{path} holds no {ENCODER_FILE}; name a run that has saved its encoder, or the file."
            )
        return path / ENCODER_FILE
    return path


def read_encoder(path: str | Path, expected: Mapping[str, TensorSpec], *, inside: bool = False) -> Encoder:
    """Read an encoder and check all of it.

    Args:
        path: as for `find_encoder`.
        expected: `expected_tensors` of the checkpoint that it is for.
        inside: the file holds other tensors of the checkpoint too, which are passed over.

    Raises:
        CheckpointError: damaged, tensors missing or unknown, another codec's sizes, a type that is not
            floating point, a value that is not finite (in bf16 either), or an all-zero direction of weight
            norm.
    """
    path, wanted = find_encoder(path), encoder_specs(expected)
    found: dict[str, TensorHeader] = {}
    in_file: dict[str, str] = {}
    for name, entry in read_header(path).items():
        full = name if name.startswith(_PREFIX) or inside else _PREFIX + name
        if full in found:
            raise CheckpointError(
                f"{path} holds {full} twice, with and without {_PREFIX!r}; leave one of them out."
            )
        if full in wanted or not inside:
            found[full], in_file[full] = entry, name
    _check_names(path, found, wanted)
    for name, entry in found.items():
        if entry.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path} is the encoder of a codec of other sizes: {name} is {list(entry.shape)}, and "
                f"params.json asks for {list(wanted[name].shape)}; train one for this checkpoint."
            )
    with open_tensors(path) as file:
        tensors = {name: _in_bf16(path, name, found[name], file.get_tensor(in_file[name])) for name in wanted}
    for name, tensor in tensors.items():
        if name.endswith(".original1") and not bool(tensor.flatten(1).any(1).all()):
            channel = int(tensor.flatten(1).any(1).int().argmin())
            raise CheckpointError(
                f"{path}: {name} is all zero in channel {channel}, so weight norm divides by zero there; "
                "the encoder is damaged: take an earlier state of the run."
            )
    lines = [(name, "BF16", list(tensor.shape), _sha256(tensor)) for name, tensor in tensors.items()]
    return Encoder(path, tensors, read_record(path), _sha256_of(lines))


def write_encoder(path: Path, encoder: Encoder, metadata: dict[str, str]) -> None:
    """Write an encoder to a safetensors file, read back before it takes its place. Raises OSError."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(encoder.tensors, temporary, metadata)
        lines = [(n, e.dtype, list(e.shape), tensor_sha256(e)) for n, e in read_header(temporary).items()]
        if _sha256_of(lines) != encoder.sha256:
            raise OSError(errno.EIO, "the encoder reads back otherwise than it was written", str(path))


def check_adaptation(path: str | Path, expected: Mapping[str, TensorSpec]) -> dict[str, TensorHeader]:
    """The header of merged weights that may take the place of the checkpoint's, by their names there.

    Args:
        path: a safetensors file of whole tensors under the checkpoint's names.
        expected: `expected_tensors` of the checkpoint.

    Raises:
        CheckpointError: damaged, empty, LoRA factors that were not merged, an unknown name, a tensor of the
            codec (an encoder is trained against the decoder as it is), another shape, values not finite.
    """
    path = Path(path).expanduser()
    found = read_header(path)
    if not found:
        raise CheckpointError(f"{path} holds no tensors; name the file with the merged weights.")
    for name, entry in found.items():
        if name not in expected:
            raise CheckpointError(
                f"{path}: the checkpoint has no tensor {name}; merge LoRA factors, and save whole tensors "
                "under their names there."
            )
        if expected[name].component in (*DECODER, "codec_encoder"):
            raise CheckpointError(
                f"{path} would change {name}: the encoder is trained for the codec as it is; leave it out."
            )
        if entry.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {list(entry.shape)}, and params.json asks for "
                f"{list(expected[name].shape)}; take the adaptation of this checkpoint."
            )
    with open_weights(found) as get:
        for name, entry in found.items():
            _in_bf16(path, name, entry, get(name))
    return found


def read_record(path: str | Path) -> dict[str, Any]:
    """What a file's metadata says of the encoder: the JSON under `revox`, and what stands beside it."""
    metadata = read_metadata(path)
    record: dict[str, Any] = {
        key: value for key, value in metadata.items() if key not in (RECORD_KEY, "format")
    }
    if RECORD_KEY in metadata:
        try:
            inner = json.loads(metadata[RECORD_KEY])
        except ValueError:
            inner = metadata[RECORD_KEY]
        record |= inner if isinstance(inner, dict) else {"note": inner}
    return record


def decoder_sha256(folder: str | Path) -> str:
    """One hash of the codec's decoder and quantizer in a checkpoint: what an encoder is trained against.

    A run writes it into its encoder's record under `decoder_sha256`; injection compares.
    Raises CheckpointError when the weights lack one of those tensors.
    """
    return _components_sha256(folder, DECODER)


def released_sha256(folder: str | Path) -> str:
    """One hash of all tensors of a checkpoint but the encoder's: what its speech depends on.

    It reads every byte: some ten seconds at the release's size. Raises CheckpointError when a tensor is
    missing.
    """
    expected = expected_tensors(read_params(folder).voxtral_config())
    return _components_sha256(folder, {spec.component for spec in expected.values()} - {"codec_encoder"})


def _components_sha256(folder: str | Path, components: Collection[str]) -> str:
    tensors, expected = folder_tensors(folder), expected_tensors(read_params(folder).voxtral_config())
    lines = []
    for name, spec in expected.items():
        if spec.component in components:
            if name not in tensors:
                raise CheckpointError(f"the weights lack the tensor {name}; copy them again.")
            entry = tensors[name]
            lines.append((name, entry.dtype, list(entry.shape), tensor_sha256(entry)))
    return _sha256_of(lines)


def _sha256_of(tensors: Iterable[tuple[str, str, list[int], str]]) -> str:
    """One hash of many tensors: SHA-256 of the lines `name dtype shape sha256`, in the order of the names."""
    lines = (f"{name} {dtype} {shape} {sha256}\n" for name, dtype, shape, sha256 in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _in_bf16(path: Path, name: str, entry: TensorHeader, tensor: Tensor) -> Tensor:
    """The tensor in bf16, all of its values finite in its own type and in bf16."""
    import torch

    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is {entry.dtype}, where F32, F16 or BF16 was expected; save it again."
        )
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{path}: {name} holds values that are not finite; {_DIVERGED}.")
    stored = tensor.to(torch.bfloat16).contiguous()
    if not bool(stored.isfinite().all()):
        raise CheckpointError(f"{path}: {name} holds values too large for BF16; {_DIVERGED}.")
    return stored


def _check_names(path: Path, found: Mapping[str, TensorHeader], wanted: Mapping[str, TensorSpec]) -> None:
    unknown = next((name for name in found if name not in wanted), None)
    missing = next((name for name in wanted if name not in found), None)
    if unknown:
        raise CheckpointError(
            f"{path} is not an encoder of this codec: it holds {unknown}, which params.json lacks; "
            f"expected the encoder's {len(wanted)} tensors alone, their weight norm as pairs (original0 and "
            "original1): save it again, or train one for this checkpoint."
        )
    if missing:
        raise CheckpointError(
            f"{path} holds {len(found)} of the encoder's {len(wanted)} tensors, {missing} the first missing; "
            "an engine would clone from uninitialized weights: take the whole encoder."
        )
