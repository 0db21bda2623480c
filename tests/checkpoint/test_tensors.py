from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import Params
from revox.checkpoint.release import TensorSpec, expected_tensors
from revox.checkpoint.tensors import (
    open_tensors,
    read_header,
    read_metadata,
    read_pt_header,
    weight_files,
    write_safetensors_stream,
)

PARITY = Path(__file__).parents[1] / "parity"
RELEASE = json.loads((PARITY / "release_params.json").read_text())


def oracle_module() -> Any:
    sys.path.insert(0, str(PARITY))
    try:
        import oracle
    finally:
        sys.path.remove(str(PARITY))
    return oracle


@pytest.fixture(scope="module")
def release() -> dict[str, TensorSpec]:
    return expected_tensors(Params.model_validate(RELEASE).voxtral_config())


def test_the_release_has_386_tensors_and_the_encoder_114(release: dict[str, TensorSpec]) -> None:
    assert Counter(spec.component for spec in release.values()) == {
        "backbone": 235,
        "text_embedding": 1,
        "audio_embedding": 1,
        "acoustic_transformer": 33,
        "codec_decoder": 114,
        "quantizer": 2,
        "codec_encoder": 114,
    }


def test_the_release_has_4002_million_parameters_and_the_codec_twice_149_47(
    release: dict[str, TensorSpec],
) -> None:
    sums: Counter[str] = Counter()
    for spec in release.values():
        sums[spec.component] += spec.parameters
    encoder = sums.pop("codec_encoder")
    assert round(sum(sums.values()) / 1e6) == 4002
    assert round(encoder / 1e6, 2) == round(sums["codec_decoder"] / 1e6, 2) == 149.47
    assert all(spec.dtype == "BF16" for spec in release.values())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.25.attention.wq.weight", (4096, 3072)),
        ("layers.0.attention.wk.weight", (1024, 3072)),
        ("layers.0.attention.wo.weight", (3072, 4096)),
        ("layers.0.feed_forward.w1.weight", (9216, 3072)),
        ("layers.0.feed_forward.w2.weight", (3072, 9216)),
        ("mm_audio_embeddings.tok_embeddings.weight", (131072, 3072)),
        ("mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight", (9088, 3072)),
        ("acoustic_transformer.input_projection.weight", (3072, 36)),
        ("acoustic_transformer.semantic_codebook_output.weight", (8320, 3072)),
        ("acoustic_transformer.acoustic_codebook_output.weight", (36, 3072)),
        ("audio_tokenizer.quantizer.semantic_codebook.embedding_sum", (8192, 256)),
        ("audio_tokenizer.decoder_blocks.0.conv.parametrizations.weight.original1", (1024, 292, 3)),
        ("audio_tokenizer.decoder_blocks.2.conv.parametrizations.weight.original0", (1024, 1, 1)),
        ("audio_tokenizer.output_proj.conv.parametrizations.weight.original1", (240, 1024, 7)),
        ("audio_tokenizer.input_proj.conv.parametrizations.weight.original1", (1024, 240, 7)),
        ("audio_tokenizer.encoder_blocks.7.conv.parametrizations.weight.original1", (292, 1024, 3)),
    ],
)
def test_shapes_are_the_published_ones(
    release: dict[str, TensorSpec], name: str, shape: tuple[int, ...]
) -> None:
    assert release[name].shape == shape


@pytest.mark.parametrize(
    "codec",
    [
        {},
        {
            "decoder_transformer_lengths_str": "1,2,1",
            "decoder_convs_kernels_str": "3,4,1",
            "decoder_convs_strides_str": "1,2,1",
            "encoder_transformer_lengths_str": "2,1,1",
            "encoder_convs_kernels_str": "1,4,3",
            "encoder_convs_strides_str": "1,2,1",
        },
    ],
    ids=["as released", "other blocks"],
)
def test_names_and_shapes_are_those_of_vllm_omnis_modules(codec: dict[str, str]) -> None:
    module = oracle_module()
    theirs, params = module.load_oracle(), module.small_params(**codec)
    if codec:
        params["multimodal"]["audio_model_args"]["audio_encoding_args"]["frame_rate"] = 50
    found: dict[str, tuple[int, ...]] = {}
    tokenizer = theirs.audio_tokenizer(params)
    for name, parameter in [*tokenizer.named_parameters(), *tokenizer.named_buffers()]:
        if name.startswith("audio_token_embedding."):
            name = f"mm_audio_embeddings.audio_codebook_embeddings.{name.partition('.')[2]}"
            found[name] = tuple(parameter.shape)
        elif not name.endswith(("alibi_slopes", "_embedding")):
            found[f"audio_tokenizer.{name}"] = tuple(parameter.shape)
    for name, parameter in theirs.acoustic_transformer(params).named_parameters():
        found[f"acoustic_transformer.{name}"] = tuple(parameter.shape)
    ours = {
        name: spec.shape
        for name, spec in expected_tensors(Params.model_validate(params).voxtral_config()).items()
        if spec.component not in ("backbone", "text_embedding")
    }
    assert ours == found


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(3, 5).to(torch.bfloat16),
        "vector": torch.randn(7),
        "counts": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


def test_a_header_is_read_as_safetensors_reads_it(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})
    header = read_header(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        assert {n: (list(h.shape), h.dtype) for n, h in header.items()} == {
            n: (s.get_shape(), s.get_dtype()) for n, s in theirs.items()
        }
    assert read_metadata(tmp_path / "a.safetensors") == {"made": "here"}
    raw = (tmp_path / "a.safetensors").read_bytes()
    matrix = header["matrix"]
    assert raw[matrix.start : matrix.end] == tensors["matrix"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("left", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], left: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"truncated|not a safetensors file") as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "download it again" in str(error.value)


def test_a_file_longer_than_its_header_promises_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        ["a"],
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(CheckpointError, match=r"safetensors"):
        read_header(path)


def test_a_header_too_long_to_be_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + bytes(64))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def test_open_tensors_reads_one_tensor_and_refuses_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0)}, path)
    with open_tensors(path) as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0))
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="truncated"), open_tensors(path):
        pass


def test_a_streamed_file_is_what_safetensors_reads(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    path = tmp_path / "b.safetensors"
    write_safetensors_stream(
        path,
        [(name, tuple(t.shape), names[t.dtype], lambda t=t: t) for name, t in tensors.items()],
        metadata={"format": "pt"},
    )
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_stream_takes_bytes_arrays_strided_tensors_and_blocks(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)

    def blocks() -> Iterator[np.ndarray]:
        yield values[:1]
        yield values[1:]

    seen: list[tuple[int, int]] = []
    path = tmp_path / "b.safetensors"
    write_safetensors_stream(
        path,
        [
            ("bytes", (3, 4), "F32", values.tobytes()),
            ("array", (4, 3), "F32", values.T),
            ("blocks", (3, 4), "F32", blocks),
            ("tensor", (4, 3), "F32", torch.from_numpy(values).t()),
            ("bits", (2,), "BF16", np.array([0x3F80, 0xC000], dtype=np.uint16)),
        ],
        progress=lambda at: seen.append((at.done, at.total)),
    )
    read = load_file(path)
    for name in ("bytes", "blocks"):
        assert np.array_equal(read[name].numpy(), values)
    for name in ("array", "tensor"):
        assert np.array_equal(read[name].numpy(), values.T)
    assert read["bits"].tolist() == [1.0, -2.0]
    assert seen[-1] == (4 * 48 + 4, 4 * 48 + 4)


@pytest.mark.parametrize("provider", [b"123", b"12345", np.zeros(1, np.int64), [b"12", b"345"]])
def test_a_stream_of_the_wrong_size_leaves_the_old_file(tmp_path: Path, provider: Any) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="tensor a"):
        write_safetensors_stream(path, [("a", (1,), "F32", provider)])
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.safetensors"]


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name: torch.zeros(1)}, tmp_path / name)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == sorted(index["weight_map"].values())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        weight_files(tmp_path)


def test_a_folder_without_weights_names_the_file_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors is missing; download"):
        weight_files(tmp_path)
    (tmp_path / "consolidated.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="link to a file that is gone"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(214, 3072, dtype=torch.bfloat16),
        torch.zeros(1, 8, dtype=torch.bfloat16),
        torch.zeros(70_000, 2, dtype=torch.float32),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(9, 4, dtype=torch.bfloat16)[2:5],
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_a_pt_header_is_what_torch_loads(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save(tensor, tmp_path / "voice.pt")
    loaded = torch.load(tmp_path / "voice.pt", weights_only=True)
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    header = read_pt_header(tmp_path / "voice.pt")
    assert header.shape == tuple(loaded.shape)
    assert header.dtype == names[loaded.dtype]


@pytest.mark.parametrize("value", [{"rows": torch.zeros(2)}, [torch.zeros(1), torch.ones(1)], "text", 3])
def test_a_pt_of_anything_but_one_tensor_is_refused_or_read_as_its_tensor(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "voice.pt")
    if isinstance(value, dict):
        return
    with pytest.raises(CheckpointError, match=r"not a \.pt file with one tensor"):
        read_pt_header(tmp_path / "voice.pt")


def test_a_truncated_pt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "voice.pt"
    torch.save(torch.zeros(20, 8, dtype=torch.bfloat16), path)
    whole = path.read_bytes()
    for left in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(CheckpointError, match=r"voice\.pt"):
            read_pt_header(path)
    with pytest.raises(CheckpointError, match=r"absent\.pt is missing"):
        read_pt_header(tmp_path / "absent.pt")


def test_a_pt_whose_data_is_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(20, 8, dtype=torch.bfloat16), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[:-2] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="does not fit its data of 318 bytes"):
        read_pt_header(tmp_path / "cut.pt")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_reading_a_pt_header_runs_nothing_of_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with zipfile.ZipFile(tmp_path / "voice.pt", "w") as archive:
        archive.writestr("voice/data.pkl", pickle.dumps(_Bomb(trace), protocol=2))
        archive.writestr("voice/data/0", bytes(8))
    with pytest.raises(CheckpointError):
        read_pt_header(tmp_path / "voice.pt")
    assert not trace.exists()
