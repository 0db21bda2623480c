"""Weight files: which of them a folder has, what their headers list, and safetensors written as a stream.

Reading a header does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_json
from revox.checkpoint.placeholders import unfinished, why_not
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "consolidated.safetensors"
ENCODER_WEIGHTS = "consolidated.encoder.safetensors"
"""The codec encoder beside weights as released: a file of a name that vLLM's loader reads too."""
INDEX = "consolidated.safetensors.index.json"

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
"""Types that weights may have; the release's is BF16."""

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_BLOCK = 1 << 23  # bytes read at once
_DAMAGED = "copy or download it again"


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a safetensors header lists it; `start` and `end` are bytes from the file's beginning.

    `stored` is its name in the file where that is not the release's (`release_name`).
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int
    file: Path
    stored: str | None = None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# ------------------------------------------------------------------------------------------------- reading


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a folder's weights, by the rule of vLLM's loader for the mistral format.

    They are all of `consolidated*.safetensors`, or those that `consolidated.safetensors.index.json` lists
    where there is one. Without any, `model*.safetensors` of a converted checkpoint are taken the same way.

    Raises:
        CheckpointError: there are none, one is a link to a missing file, or the index lists a missing one.
    """
    folder, encoder = Path(folder), list[Path]()
    for stem in ("consolidated", "model"):
        files = sorted(folder.glob(f"{stem}*.safetensors"))
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file} is a link to a file that is gone; download it again.")
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            named = list(listed.values()) if isinstance(listed, dict) else []
            if not named or not all(isinstance(name, str) for name in named):
                raise CheckpointError(f"{index} should hold a weight_map; {_DAMAGED}.")
            files = [folder / Path(name).name for name in sorted(set(named))]
            # Deleting the encoder's own file takes it out again, whether or not the index still lists it.
            files = [file for file in files if file.name != ENCODER_WEIGHTS or file.exists()]
            for file in files:
                if not file.exists():
                    raise CheckpointError(
                        unfinished(file) or f"{file} is missing, but {index.name} lists it; {_DAMAGED}."
                    )
        for file in files:
            if why := unfinished(file):
                raise CheckpointError(why)
        if [file.name for file in files] == [ENCODER_WEIGHTS]:  # beside weights of another name
            encoder, files = files, []
        elif files:
            return [*encoder, *files]
    raise CheckpointError(unfinished(folder / WEIGHTS) or _no_weights(folder))


def _no_weights(folder: Path) -> str:
    """The sentence about a folder without weights of a name that is known."""
    sentence = f"{folder / WEIGHTS} is missing"
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ENCODER_WEIGHTS)
    if others:
        return (
            f"{sentence}, and weights are read under that name (or model.safetensors, or in numbered parts) "
            f"only; if {others[0]} holds them, rename it."
        )
    foreign = next(
        (path for ending in ("gguf", "pth", "pt", "bin") for path in folder.glob(f"*.{ending}")), None
    )
    if foreign is not None:
        return (
            f"{sentence}, and {foreign.name} is of a format that revox does not read; download the release's "
            "file."
        )
    return f"{sentence}; download the weights into this folder."


def folder_tensors(folder: str | Path) -> dict[str, TensorHeader]:
    """The tensors of all weight files of a folder together, under the release's names.

    Raises:
        CheckpointError: as `weight_files` and `read_header`, or two files hold one tensor (two encoders).
    """
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for stored, entry in read_header(file).items():
            name = release_name(stored)
            if name in tensors:
                what = "an encoder" if name.startswith(ENCODER_PREFIXES) else f"the tensor {name}"
                raise CheckpointError(
                    f"{folder} holds {what} twice, in {tensors[name].file.name} and in {file.name}, and "
                    "engines may load either; delete one of the two files."
                )
            tensors[name] = entry if name == stored else replace(entry, stored=stored)
    return tensors


_MLX_NAMES = (
    (re.compile(r"language_model\.model\.(?:model\.)?"), ""),
    (re.compile(r"embed_tokens\."), "mm_audio_embeddings.tok_embeddings."),
    (re.compile(r"(layers\.\d+\.)self_attn\.([qkvo])_proj\."), r"\1attention.w\2."),
    (re.compile(r"(layers\.\d+\.)mlp\.gate_proj\."), r"\1feed_forward.w1."),
    (re.compile(r"(layers\.\d+\.)mlp\.down_proj\."), r"\1feed_forward.w2."),
    (re.compile(r"(layers\.\d+\.)mlp\.up_proj\."), r"\1feed_forward.w3."),
    (re.compile(r"(layers\.\d+\.)input_layernorm\."), r"\1attention_norm."),
    (re.compile(r"(layers\.\d+\.)post_attention_layernorm\."), r"\1ffn_norm."),
    (re.compile(r"audio_codebook_embeddings\."), "mm_audio_embeddings.audio_codebook_embeddings."),
)


def release_name(stored: str) -> str:
    """The release's name of a tensor that has mlx-audio's; any other name as it is.

    mlx-audio renames the backbone and the audio embeddings when it converts, and nothing else: matrices keep
    their order, for its rotary embedding is interleaved like the release's (mlx_audio at 3647ee51:
    tts/models/voxtral_tts/voxtral_tts.py, `Model.sanitize`, `_remap_layer_key`).
    """
    if not stored.startswith(("language_model.", "audio_codebook_embeddings.")):
        return stored
    name = stored
    for pattern, replacement in _MLX_NAMES:
        if match := pattern.match(name):
            name = match.expand(replacement) + name[match.end() :]
    return name


def read_header(path: str | Path) -> dict[str, TensorHeader]:
    """List the tensors of a safetensors file from its header alone, in the order of their data.

    Raises:
        CheckpointError: missing, not safetensors, or damaged: the header contradicts itself or the file's
            length.
    """
    return _read_header(Path(path))[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text that a safetensors header carries beside the tensors (`__metadata__`), empty if none."""
    return _read_header(Path(path))[1]


def _read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file, safe_open(str(path), framework="np"):
            # The library has checked the header against itself and the file's length.
            length = int.from_bytes(file.read(8), "little")
            listed = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected a readable file: fix its permissions."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            why_not(path) or f"{path} is truncated, damaged or not a safetensors file ({error}); {_DAMAGED}."
        ) from None
    metadata = listed.pop("__metadata__", None) or {}
    tensors = {
        name: TensorHeader(
            tuple(entry["shape"]),
            entry["dtype"],
            8 + length + entry["data_offsets"][0],
            8 + length + entry["data_offsets"][1],
            path,
        )
        for name, entry in listed.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))), metadata


@contextmanager
def open_tensors(path: str | Path, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file for lazy reading, its header checked first: `handle.get_tensor(name)`.

    Imports torch. Raises CheckpointError as `read_header`.
    """
    read_header(path)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device=device) as handle:
        yield handle


@contextmanager
def open_weights(tensors: Mapping[str, TensorHeader]) -> Iterator[Callable[[str], Tensor]]:
    """Lazy reading of tensors in one file or several: yields a function from name to tensor.

    Imports torch. Raises CheckpointError as `read_header`.
    """
    with ExitStack() as stack:
        paths = {entry.file for entry in tensors.values()}
        files = {path: stack.enter_context(open_tensors(path)) for path in paths}
        yield lambda name: files[tensors[name].file].get_tensor(tensors[name].stored or name)


def read_tensor(name: str, entry: TensorHeader) -> Tensor:
    """One tensor, mapped from its file; its memory is given back with it.

    Imports torch. Raises CheckpointError as `read_header`.
    """
    with open_tensors(entry.file) as file:
        return file.get_tensor(entry.stored or name)


def tensor_blocks(entry: TensorHeader) -> Iterator[bytes]:
    """A tensor's bytes as they are in its file, in blocks of some megabytes."""
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start)
        left = entry.end - entry.start
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise CheckpointError(f"{entry.file} was cut short while it was read; {_DAMAGED}.")
            left -= len(block)
            yield block


def tensor_sha256(entry: TensorHeader) -> str:
    """SHA-256 of a tensor's bytes as they are in its file."""
    digest = hashlib.sha256()
    for block in tensor_blocks(entry):
        digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ .pt files


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
_MAX_PICKLE_BYTES = 1 << 20


class _HeaderUnpickler(pickle.Unpickler):
    """Reads the pickle of one saved tensor without torch; no function that the file names is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *_: PtHeader(
                tuple(operator.index(one) for one in size), _STORAGES[storage]
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]  # ("storage", type, key, device, elements)


def read_pt_header(path: str | Path) -> PtHeader:
    """Shape and type of the tensor in a .pt file, without torch and without running what its pickle names.

    A .pt file is a zip archive of a pickle and of records of data. Raises CheckpointError when it is missing,
    truncated, not a .pt file (torch before 1.6 wrote bare pickles), or holds anything but one tensor.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if records["data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise ValueError
            with archive.open(records["data.pkl"]) as file:
                header = _HeaderUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected a readable .pt file: fix its permissions."
        ) from None
    except Exception:  # zipfile and pickle raise many kinds on damaged input
        header = None
    if not isinstance(header, PtHeader):
        raise CheckpointError(
            why_not(path) or f"{path} is not a .pt file with one tensor, or it is truncated; {_DAMAGED}."
        )
    stored = next((info.file_size for name, info in records.items() if name.startswith("data/")), -1)
    if math.prod(header.shape) * _ITEM_BYTES[header.dtype] > stored:
        raise CheckpointError(
            f"{path}: the tensor's shape {list(header.shape)} does not fit its data of {stored} bytes; "
            f"{_DAMAGED}."
        )
    return header


# ------------------------------------------------------------------------------------------------- writing

Provider = Any
"""Where a tensor's bytes come from: bytes, a numpy array, a torch tensor, an iterable of those, or a function
that returns one of them when its turn comes."""


def write_safetensors_stream(
    path: str | Path,
    tensors: Iterable[tuple[str, tuple[int, ...], str, Provider]],
    metadata: Mapping[str, str] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> None:
    """Write a safetensors file, header first and then one tensor's data after another, in the order given.

    Memory stays at one tensor, or at one block of one where the provider gives blocks. The file is replaced
    in one step (`revox.speech.files`).

    Args:
        path: where the file goes.
        tensors: (name, shape, type as safetensors names it, provider). bf16 without torch: uint16 arrays.
        metadata: free text for the header.
        progress: called with the bytes written.

    Raises:
        ValueError: a name given twice, an unknown type, or a provider that gives another number of bytes.
    """
    entries = list(tensors)
    header: dict[str, Any] = {}
    total = 0
    for name, shape, dtype, _ in entries:
        if name in header or name == "__metadata__":
            raise ValueError(f"tensor {name} is given twice")
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"tensor {name}: unknown type {dtype}")
        end = total + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [total, end]}
        total = end
    listed = {"__metadata__": dict(metadata), **header} if metadata else header
    raw = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(raw).to_bytes(8, "little") + raw)
        done = 0
        for name, _, _, provider in entries:
            first, last = header[name]["data_offsets"]
            for block in _blocks(provider):
                done += len(block)
                if done > last:
                    raise ValueError(f"tensor {name}: more than the {last - first} bytes its shape takes")
                file.write(block)
                progress(Progress("writing weights", done, total))
            if done != last:
                raise ValueError(
                    f"tensor {name}: {done - first} bytes instead of the {last - first} its shape takes"
                )

    replace_file(path, write)


def _blocks(provider: Provider) -> Iterator[memoryview]:
    if callable(provider):
        provider = provider()
    if isinstance(provider, (bytes, bytearray, memoryview)):
        yield memoryview(provider).cast("B")
    elif hasattr(provider, "detach"):
        import torch

        yield from _blocks(provider.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif hasattr(provider, "dtype"):
        import numpy as np

        yield np.ascontiguousarray(provider).reshape(-1).view(np.uint8).data
    else:
        for block in provider:
            yield from _blocks(block)
