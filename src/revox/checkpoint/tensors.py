"""Headers of safetensors and .pt files, the weight files of a folder, and safetensors written as a stream."""

from __future__ import annotations

import json
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from revox.checkpoint.errors import CheckpointError
from revox.speech.files import replace_file

WEIGHTS = "consolidated.safetensors"

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits an element, by the names of the safetensors format."""

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
"""Types that weights may have; the release's is BF16."""

# The format's own limit (safetensors: MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000

_DAMAGED = "copy or download it again"


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a safetensors header lists it; `start` and `end` are bytes from the file's beginning."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int
    file: Path

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a folder: consolidated.safetensors, or the shards of community variants.

    Raises:
        CheckpointError: there are none, or an index names a file that is missing.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS).is_symlink():
        raise CheckpointError(
            f"{folder / WEIGHTS} is a link to a file that is gone; download the checkpoint again."
        )
    for pattern in ("consolidated*.safetensors", "model*.safetensors"):
        index = folder / pattern.replace("*", "").replace(".safetensors", ".safetensors.index.json")
        if index.is_file():
            from revox.checkpoint.params import read_json

            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{index} should hold a weight_map; {_DAMAGED}.")
            files = [folder / Path(str(name)).name for name in sorted(set(names.values()))]
            for file in files:
                if not file.exists():
                    raise CheckpointError(f"{file} is missing, but {index.name} lists it; {_DAMAGED}.")
            return files
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise CheckpointError(f"{folder / WEIGHTS} is missing; download the weights into this folder.")


def read_header(path: str | Path) -> dict[str, TensorHeader]:
    """List the tensors of a safetensors file from its header alone, in the order of their data.

    Raises:
        CheckpointError: missing, not safetensors, a header whose shapes and offsets contradict each other, or
            a file shorter or longer than its header promises.
    """
    return _read_header(Path(path))[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text that a safetensors header carries beside the tensors (`__metadata__`), empty if none."""
    return _read_header(Path(path))[1]


def _read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length < 2 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file (no valid header); {_DAMAGED}.")
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated: its header alone takes {length + 8:,} bytes and the file has "
                    f"{size:,}; {_DAMAGED}."
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected a readable file: mend its permissions."
        ) from None
    try:
        listed = json.loads(raw)
        metadata = listed.pop("__metadata__", {})
        entries = {
            name: TensorHeader(
                shape=tuple(_whole(n) for n in entry["shape"]),
                dtype=str(entry["dtype"]),
                start=8 + length + _whole(entry["data_offsets"][0]),
                end=8 + length + _whole(entry["data_offsets"][1]),
                file=path,
            )
            for name, entry in listed.items()
        }
        if not isinstance(metadata, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is not a safetensors file (its header is not as the format says); {_DAMAGED}."
        ) from None

    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    at = 8 + length
    for name, entry in entries.items():
        bits = DTYPE_BITS.get(entry.dtype)
        wanted = None if bits is None else (entry.parameters * bits + 7) // 8
        if entry.start != at or entry.end < at or (wanted is not None and entry.end - at != wanted):
            shape = list(entry.shape)
            raise CheckpointError(
                f"{path}: tensor {name} should take {wanted} bytes ({entry.dtype} {shape}) after the one "
                f"before it, and the header gives it {entry.end - entry.start}; {_DAMAGED}."
            )
        at = entry.end
    if size < at:
        cut = next(name for name, entry in entries.items() if entry.end > size)
        raise CheckpointError(
            f"{path} is truncated at tensor {cut}: its header promises {at:,} bytes and the file has "
            f"{size:,}; {_DAMAGED}."
        )
    if size > at:
        raise CheckpointError(
            f"{path} is damaged: its header promises {at:,} bytes and the file has {size:,}; {_DAMAGED}."
        )
    return entries, {str(key): str(value) for key, value in metadata.items()}


def read_folder_header(folder: str | Path) -> dict[str, TensorHeader]:
    """The tensors of all weight files of a folder together."""
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        tensors.update(read_header(file))
    return tensors


@contextmanager
def open_tensors(path: str | Path, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file for lazy reading, its header checked first: `handle.get_tensor(name)`.

    Only what is asked for is read. Imports torch.
    """
    read_header(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=device) as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_DAMAGED}.") from None


@dataclass(frozen=True)
class PtHeader:
    """The one tensor of a .pt file: its shape, and its type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


def read_pt_header(path: str | Path) -> PtHeader:
    """Shape and type of the tensor in a .pt file, without torch and without running its pickle.

    A .pt file is a zip archive: the pickle's opcodes are read as text, and must agree with the size of the
    record that holds the data.

    Raises:
        CheckpointError: missing, truncated, not a .pt file, or holding anything but one tensor.
    """
    path = Path(path)
    wrong = f"{path} is not a .pt file with one tensor"
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in records or records["data.pkl"].file_size > 1_000_000:
                raise CheckpointError(f"{wrong}; {_DAMAGED}.")
            operations: list[tuple[str, Any]] = [
                (op.name, argument)
                for op, argument, _ in pickletools.genops(archive.read(records["data.pkl"]))
            ]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected a readable .pt file: mend its permissions."
        ) from None
    except CheckpointError:
        raise
    except Exception:  # zipfile and pickletools raise many kinds on damaged input
        raise CheckpointError(f"{wrong}, or it is truncated; {_DAMAGED}.") from None
    names = [name for name, _ in operations]
    storages = [
        argument.split()[-1] for name, argument in operations if name == "GLOBAL" and "Storage" in argument
    ]
    if names.count("BINPERSID") != 1 or len(storages) != 1 or storages[0] not in _STORAGES:
        raise CheckpointError(f"{wrong}; {_DAMAGED}.")
    after = operations[names.index("BINPERSID") + 1 :]
    numbers: list[int] = []
    for name, argument in after:
        if not name.startswith(("BININT", "LONG")):
            break
        numbers.append(int(argument))
    shape, dtype = (
        tuple(numbers[1:]),
        _STORAGES[storages[0]],
    )  # the first number is the offset into the storage
    stored = next((info.file_size for name, info in records.items() if name.startswith("data/")), -1)
    if not shape or min(shape) < 0 or math.prod(shape) * DTYPE_BITS[dtype] // 8 > stored:
        raise CheckpointError(
            f"{path}: the tensor's shape {list(shape)} does not fit its data of {stored} bytes; {_DAMAGED}."
        )
    return PtHeader(shape, dtype)


Provider = Any
"""Where a tensor's bytes come from: bytes, a numpy array, a torch tensor, an iterable of those, or a function
that returns one of them when its turn comes."""


def write_safetensors_stream(
    path: str | Path,
    tensors: Iterable[tuple[str, tuple[int, ...], str, Provider]],
    metadata: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a safetensors file, header first and then one tensor's data after another, in the order given.

    Memory stays at one tensor, or at one block of one where the provider gives blocks. The file is written
    beside `path` and renamed, never through a link.

    Args:
        path: where the file goes.
        tensors: (name, shape, type as safetensors names it, provider). bf16 without torch: uint16 arrays.
        metadata: free text for the header.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: a name given twice, an unknown type, or a provider that gives another number of bytes.
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape, dtype, _ in entries:
        if name in header or name == "__metadata__":
            raise ValueError(f"tensor {name} is given twice")
        if dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {name}: unknown type {dtype}")
        end = at + (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    total = at
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(raw).to_bytes(8, "little") + raw)
        done = 0
        for name, _, dtype, provider in entries:
            first, last = header[name]["data_offsets"]
            for block in _blocks(provider, dtype, name):
                if done + len(block) > last:
                    raise ValueError(f"tensor {name}: more than the {last - first} bytes its shape takes")
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
            if done != last:
                raise ValueError(
                    f"tensor {name}: {done - first} bytes instead of the {last - first} its shape takes"
                )

    replace_file(path, write)


_NUMPY_NAMES = {
    "F64": {"float64"},
    "F32": {"float32"},
    "F16": {"float16"},
    "BF16": {"bfloat16", "uint16"},
    "I64": {"int64"},
    "I32": {"int32"},
    "I16": {"int16"},
    "I8": {"int8"},
    "U64": {"uint64"},
    "U32": {"uint32"},
    "U16": {"uint16"},
    "U8": {"uint8"},
    "BOOL": {"bool"},
}


def _blocks(provider: Provider, dtype: str, name: str) -> Iterator[memoryview]:
    if callable(provider):
        provider = provider()
    if isinstance(provider, (bytes, bytearray, memoryview)):
        yield memoryview(provider).cast("B")
    elif hasattr(provider, "dtype") and hasattr(provider, "shape"):
        kind = str(provider.dtype).removeprefix("torch.")
        if kind not in _NUMPY_NAMES.get(dtype, {kind}):
            raise ValueError(f"tensor {name}: {kind} data for the type {dtype}")
        if hasattr(provider, "detach"):
            import torch

            provider = provider.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        elif not provider.flags.c_contiguous:
            provider = provider.copy(order="C")
        if provider.size:
            yield memoryview(provider.reshape(-1).view("uint8"))
    else:
        for block in provider:
            yield from _blocks(block, dtype, name)


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError
    return number
