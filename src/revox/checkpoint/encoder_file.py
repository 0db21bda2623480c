"""A codec encoder in a file of its own, and merged weights of an adaptation: read and checked before use.

An encoder file is a safetensors file of the encoder's tensors (114 at the release's structure), under their
names in the checkpoint or without `audio_tokenizer.`, in float32, float16 or bf16. What is known of it is
JSON in the header's metadata under the key `revox`: any keys, of which these are understood: `revox_run`,
`data`, `steps` (told in the model card) and `decoder_sha256` (what the function of that name gives for the
checkpoint that the encoder was trained against).

Nothing here imports torch, and memory stays at one tensor of the encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import ENCODER_PREFIXES, TensorSpec, component_of, expected_tensors
from revox.checkpoint.tensors import FLOAT_DTYPES, WEIGHTS, TensorHeader, read_header, read_metadata

ENCODER_FILE = "encoder.safetensors"
"""The encoder's name in a training run's folder, and in a repository on the hub."""

RECORD_KEY = "revox"
"""Where a file's metadata says, as JSON, what the encoder is."""

DECODER = ("codec_decoder", "quantizer")
"""The components that an encoder is trained against: it serves no other."""

_PREFIX = "audio_tokenizer."
_BLOCK = 1 << 23  # bytes read at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of another file as it goes into the weights: where it lies, its type there, its hash there.

    `name` and `dtype` are those in the weights; `sha256` is of the bytes that `blocks()` gives.
    """

    name: str
    lies: TensorHeader
    dtype: str
    sha256: str

    def blocks(self) -> Iterator[memoryview]:
        """The bytes as they go into the weights, in blocks."""
        for block in _values(self.lies):
            yield _cast(block, self.lies.dtype, self.dtype)


@dataclass(frozen=True)
class EncoderFile:
    """A checked encoder: its tensors by their names in the checkpoint, what is known of it, one hash."""

    path: Path
    tensors: dict[str, StoredTensor]
    record: dict[str, Any]
    sha256: str


def find_encoder(path: str | Path) -> Path:
    """The file that `--encoder` names: a file, or a training run's folder with `encoder.safetensors` in it.

    Raises CheckpointError when there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / ENCODER_FILE).exists():
            raise CheckpointError(
                f"{path} holds no {ENCODER_FILE}; name a run that has saved its encoder, or the file."
            )
        return path / ENCODER_FILE
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; name a training run's folder or a safetensors file of the encoder."
        )
    return path


def encoder_specs(expected: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Those of `expected_tensors` that are the encoder's."""
    return {name: spec for name, spec in expected.items() if spec.component == "codec_encoder"}


def read_encoder(
    path: str | Path,
    expected: Mapping[str, TensorSpec],
    sizes_known: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EncoderFile:
    """Read an encoder (a file, or a run's folder) through once and check all of it.

    Args:
        path: as for `find_encoder`.
        expected: `expected_tensors` of the checkpoint that it is for.
        sizes_known: False when there is no such checkpoint: names are compared, shapes only with each other.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: damaged, tensors missing or unknown, another codec's sizes, a type that is no float,
            a value that is not finite (in bf16 neither), or a direction of weight norm that is all zero.
    """
    path = find_encoder(path)
    return check_encoder(path, _named(path, read_header(path)), expected, sizes_known, progress)


def check_encoder(
    path: Path,
    found: Mapping[str, TensorHeader],
    expected: Mapping[str, TensorSpec],
    sizes_known: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EncoderFile:
    """As `read_encoder`, of tensors that are in `path` under the checkpoint's names."""
    wanted = encoder_specs(expected)
    _check_names(path, found, wanted)
    for name, lies in found.items():
        if sizes_known and lies.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path} is the encoder of a codec of other sizes: {name} is {list(lies.shape)}, and "
                f"params.json asks for {list(wanted[name].shape)}; train one for this checkpoint."
            )
        if lies.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} is {lies.dtype}, where F32, F16 or BF16 was expected; save it again."
            )
    _check_pairs(path, found)
    tensors, done, total = {}, 0, sum(lies.end - lies.start for lies in found.values())
    for name in wanted:
        tensors[name] = _checked(path, name, found[name], "BF16")
        if name.endswith(".original1"):
            _check_direction(path, tensors[name])
        done += found[name].end - found[name].start
        if progress is not None:
            progress(done, total)
    return EncoderFile(path, tensors, read_record(path), sha256_of(tensors.values()))


def read_adaptation(
    path: str | Path, expected: Mapping[str, TensorSpec], present: Mapping[str, TensorHeader]
) -> dict[str, StoredTensor]:
    """Merged weights that take the place of the checkpoint's, by their names there, checked.

    Args:
        path: a safetensors file of whole tensors under the checkpoint's names.
        expected: `expected_tensors` of the checkpoint.
        present: the checkpoint's tensors, whose types are kept.

    Raises:
        CheckpointError: damaged, empty, LoRA factors that were not merged, an unknown name, a tensor of the
            codec (an encoder is trained against the decoder as it is), another shape, values not finite.
    """
    path = Path(path).expanduser()
    tensors = {}
    found = read_header(path)
    if not found:
        raise CheckpointError(f"{path} holds no tensors; name the file with the merged weights.")
    for name, lies in found.items():
        if "lora_" in name:
            raise CheckpointError(
                f"{path} holds LoRA factors ({name}), not weights; merge them and name that file."
            )
        if name not in expected:
            raise CheckpointError(
                f"{path}: the checkpoint has no tensor {name}; save it under its name there."
            )
        if (component_of(name) or "").startswith("codec_") or component_of(name) == "quantizer":
            raise CheckpointError(
                f"{path} would change {name}: the codec is what the encoder is for; leave it out."
            )
        if lies.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {list(lies.shape)}, and params.json asks for "
                f"{list(expected[name].shape)}; take the adaptation of this checkpoint."
            )
        if lies.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} is {lies.dtype}, where F32, F16 or BF16 was expected; save it again."
            )
        tensors[name] = _checked(path, name, lies, present[name].dtype)
    return tensors


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
    folder = Path(folder)
    expected = expected_tensors(read_params(folder).voxtral_config())
    return decoder_sha256_of(read_header(folder / WEIGHTS), expected)


def decoder_sha256_of(tensors: Mapping[str, TensorHeader], expected: Mapping[str, TensorSpec]) -> str:
    """`decoder_sha256` where the headers have been read already."""
    found = []
    for name, spec in expected.items():
        if spec.component in DECODER:
            if name not in tensors:
                raise CheckpointError(
                    f"the weights lack {name}, a tensor of the codec's decoder; copy them again."
                )
            lies = tensors[name]
            found.append(StoredTensor(name, lies, lies.dtype, sha256_in_file(lies)))
    return sha256_of(found)


def sha256_of(tensors: Iterable[StoredTensor]) -> str:
    """One hash of many tensors: SHA-256 of the lines `name dtype shape sha256`, in the order of the names."""
    lines = (
        f"{t.name} {t.dtype} {list(t.lies.shape)} {t.sha256}\n" for t in sorted(tensors, key=lambda t: t.name)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_in_file(lies: TensorHeader) -> str:
    """SHA-256 of a tensor's bytes as they are in its file."""
    digest = hashlib.sha256()
    for block in _bytes(lies):
        digest.update(block)
    return digest.hexdigest()


def _named(path: Path, tensors: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors under the checkpoint's names, which may lack the prefix in the file."""
    found: dict[str, TensorHeader] = {}
    for name, lies in tensors.items():
        full = name if name.startswith(_PREFIX) else _PREFIX + name
        if full in found:
            raise CheckpointError(
                f"{path} holds {full} twice, with and without {_PREFIX!r}; leave one of them out."
            )
        found[full] = lies
    return found


def _check_names(path: Path, found: Mapping[str, TensorHeader], wanted: Mapping[str, TensorSpec]) -> None:
    unknown = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    plain = [name for name in missing if name.rsplit(".parametrizations", 1)[0] + ".weight" in found]
    if plain or any(name.endswith(("weight_g", "weight_v")) for name in unknown):
        first = plain[0] if plain else missing[0]
        raise CheckpointError(
            f"{path} stores convolutions without their weight-norm pairs (no {first}); save the encoder with "
            "parametrizations.weight.original0 and original1."
        )
    strange = [name for name in unknown if not name.startswith(ENCODER_PREFIXES)]
    if strange and not missing:
        raise CheckpointError(
            f"{path} holds more than an encoder ({strange[0]}); write the encoder alone with "
            "`revox encoder export`."
        )
    if strange:
        raise CheckpointError(
            f"{path} is no encoder of this codec: it holds {strange[0]} and lacks {missing[0]}; name the "
            f"file with the encoder's {len(wanted)} tensors."
        )
    if unknown:
        raise CheckpointError(
            f"{path} is the encoder of another codec: params.json asks for no {unknown[0]}; train one for "
            "this checkpoint."
        )
    if missing:
        raise CheckpointError(
            f"{path} holds {len(wanted) - len(missing)} of the encoder's {len(wanted)} tensors, {missing[0]} "
            "the first missing; an engine would clone from uninitialised weights: take the whole encoder."
        )


def _check_pairs(path: Path, found: Mapping[str, TensorHeader]) -> None:
    for name, direction in found.items():
        if name.endswith(".original1"):
            gain = found[f"{name[:-1]}0"]
            if len(direction.shape) != 3 or gain.shape != (direction.shape[0], 1, 1):
                raise CheckpointError(
                    f"{path}: the weight-norm pair of {name} does not fit: gain {list(gain.shape)}, "
                    f"direction {list(direction.shape)}; the gain should be one for each of the first."
                )


def _check_direction(path: Path, tensor: StoredTensor) -> None:
    stored = np.frombuffer(b"".join(tensor.blocks()), dtype="<u2")
    values = stored.reshape(tensor.lies.shape[0], -1)
    # Zero and minus zero; the norm of a row of bf16 vanishes in no other way that serving survives.
    dead = np.flatnonzero(~(values & 0x7FFF).any(axis=1))
    if dead.size:
        raise CheckpointError(
            f"{path}: {tensor.name} is all zero in channel {dead[0]}, so weight norm divides by zero there; "
            "the encoder is damaged: take an earlier state of the run."
        )


def _checked(path: Path, name: str, lies: TensorHeader, dtype: str) -> StoredTensor:
    """The tensor with the hash of its bytes in the type `dtype`, all of its values finite in both types."""
    digest = hashlib.sha256()
    for block in _values(lies):
        if not np.isfinite(_float32(block, lies.dtype)).all():
            raise CheckpointError(
                f"{path}: {name} holds values that are not finite; the run diverged: take an earlier state."
            )
        stored = _cast(block, lies.dtype, dtype)
        if (
            dtype != lies.dtype
            and not np.isfinite(_float32(np.frombuffer(stored, _NUMPY[dtype]), dtype)).all()
        ):
            raise CheckpointError(
                f"{path}: {name} holds values too large for {dtype}; the run diverged: take an earlier state."
            )
        digest.update(stored)
    return StoredTensor(name, lies, dtype, digest.hexdigest())


_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _bytes(lies: TensorHeader) -> Iterator[bytes]:
    with open(lies.file, "rb", buffering=0) as file:
        file.seek(lies.start)
        left = lies.end - lies.start
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise CheckpointError(f"{lies.file} was cut short while it was read; try again.")
            left -= len(block)
            yield block


def _values(lies: TensorHeader) -> Iterator[np.ndarray]:
    rest = b""
    size = np.dtype(_NUMPY[lies.dtype]).itemsize
    for block in _bytes(lies):
        joined = rest + block if rest else block
        whole = len(joined) // size * size
        rest = joined[whole:]
        yield np.frombuffer(joined[:whole], dtype=_NUMPY[lies.dtype])


def _float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _cast(values: np.ndarray, dtype: str, wanted: str) -> memoryview:
    """The bytes of `values` (bits, for BF16) in another type, rounded half to even as torch does."""
    if dtype != wanted:
        numbers = _float32(values, dtype)
        if wanted == "BF16":
            bits = np.ascontiguousarray(numbers).view(np.uint32)
            values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        else:
            with np.errstate(over="ignore"):
                values = numbers.astype(_NUMPY[wanted])
    return np.ascontiguousarray(values).data.cast("B")
