"""A folder of any kind gets one answer: from `revox inspect`, from `revox speak` and from `revox serve`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from conftest import in_shards
from revox.checkpoint.quantize import write_quantized
from revox.cli import main, serve_command

W = "consolidated.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 8001234567\n"
VOICE = "voice_embedding/neutral_male.pt"
COPY = "copy or download it again"


def _rename(old: str, new: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)

    return make


def _write(name: str, content: bytes | str) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def _with_bom(name: str) -> Callable[[Path], None]:
    return lambda folder: _write(name, b"\xef\xbb\xbf" + (folder / name).read_bytes())(folder)


def _half(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return make


def _model_shards(folder: Path) -> None:
    in_shards(folder)
    index = folder / f"{W}.index.json"
    (folder / "model.safetensors.index.json").write_text(index.read_text().replace("consolidated", "model"))
    index.unlink()
    for path in list(folder.glob("consolidated-*")):
        path.rename(folder / path.name.replace("consolidated", "model"))


def _a_shard_less(folder: Path) -> None:
    in_shards(folder)
    (folder / "consolidated-00002-of-00002.safetensors").unlink()


def _voices_of_mlx(folder: Path) -> None:
    for path in list((folder / "voice_embedding").glob("*.pt")):
        save_file({"embedding": torch.load(path, weights_only=True)}, path.with_suffix(".safetensors"))
        path.unlink()


def _hub_cache(folder: Path) -> None:
    """As the hub's client lays it out: a snapshot of links into blobs."""
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def _hub_cache_in_part(folder: Path) -> None:
    _hub_cache(folder)
    (folder / W).resolve().rename(folder.parents[1] / "blobs" / "1.4d4d.incomplete")
    (folder / W).unlink()


def _hub_cache_pruned(folder: Path) -> None:
    _hub_cache(folder)
    (folder / W).resolve().unlink()


def _quantized(of: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Every matrix of the backbone's layers as `of(tensors, name)` stores it."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / W)
        for name in [n for n in tensors if n.startswith("layers.") and tensors[n].ndim == 2]:
            of(tensors, name)
        (folder / W).unlink()
        save_file(tensors, folder / W)

    return make


def _fp8(tensors, name):
    scale = tensors[name].float().abs().max() / 448
    tensors[f"{name}_scale"] = scale.reshape(1)
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)


def _nvfp4(tensors, name):
    _fp8(tensors, name)
    tensors[f"{name}_scale_2"] = torch.ones(1)


def _int8(tensors, name):
    scale = tensors[name].float().abs().amax(1) / 127
    tensors[f"{name}_scale"] = scale
    tensors[name] = (tensors[name].float() / scale[:, None]).round().to(torch.int8)


def _bitsandbytes_int8(tensors, name):
    tensors[name.replace("weight", "SCB")] = tensors[name].float().abs().amax(1)
    _int8(tensors, name)
    del tensors[f"{name}_scale"]


def _bitsandbytes_nf4(tensors, name):
    weight = tensors[name]
    state = {"shape": list(weight.shape), "blocksize": 64}
    codes = torch.linspace(-1, 1, 16)
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(1)
    nearest = (blocks[..., None] / largest[:, None, None] - codes).abs().argmin(-1).reshape(-1, 2)
    tensors[name] = (nearest[:, 0] * 16 + nearest[:, 1]).to(torch.uint8)[:, None]
    tensors[f"{name}.absmax"] = largest
    tensors[f"{name}.quant_map"] = codes
    encoded = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(encoded), dtype=torch.uint8)


def _mlx(tensors, name):
    rows = len(tensors[name])
    groups = tensors[name].float().reshape(rows, -1, 32)
    low, step = groups.amin(-1), (groups.amax(-1) - groups.amin(-1)) / 15
    values = ((groups - low[..., None]) / step[..., None]).round().long().reshape(rows, -1, 8)
    packed = (values << torch.arange(0, 32, 4)).sum(-1)
    tensors[name] = packed.to(torch.uint32)
    tensors[name.replace("weight", "scales")] = step
    tensors[name.replace("weight", "biases")] = low


def _gptq(tensors, name):
    rows, columns = tensors.pop(name).shape
    stem = name.removesuffix("weight")
    tensors[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    tensors[f"{stem}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
    tensors[f"{stem}scales"] = torch.zeros(1, rows, dtype=torch.float16)


def _compressed_tensors(tensors, name):
    rows, columns = tensors.pop(name).shape
    tensors[f"{name}_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    tensors[f"{name}_scale"] = torch.ones(rows, 1)
    tensors[f"{name}_shape"] = torch.tensor([rows, columns])


def _by_revox(bits: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_quantized(folder, folder / "smaller", bits)
        (folder / "smaller" / W).replace(folder / W)

    return make


UNREAD = r"The weights are quantized \({}.*\) in a way that revox does not read"
UNFINISHED = r"is not complete: its download stopped \({}\); run the download again"
# What makes the folder, and the sentence about it; None where it speaks.
KINDS: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "as released": (lambda folder: None, None),
    "in shards": (in_shards, None),
    "in shards without an index": (lambda f: (in_shards(f) / f"{W}.index.json").unlink(), None),
    "model.safetensors": (_rename(W, "model.safetensors"), None),
    "model.safetensors in shards": (_model_shards, None),
    "a shard less": (_a_shard_less, f"00002.safetensors is missing, but .*index.json lists it; {COPY}"),
    "renamed": (_rename(W, "voxtral.safetensors"), "if voxtral.safetensors holds them, rename it"),
    "GGUF": (_rename(W, "voxtral-q4.gguf"), "voxtral-q4.gguf is of a format that revox does not read"),
    "FP8": (_quantized(_fp8), None),
    "INT8 with scales": (_quantized(_int8), None),
    "bitsandbytes INT8": (_quantized(_bitsandbytes_int8), None),
    "bitsandbytes NF4": (_quantized(_bitsandbytes_nf4), None),
    "MLX": (_quantized(_mlx), None),
    "revox int8": (_by_revox(8), None),
    "revox int4": (_by_revox(4), None),
    "GPTQ": (_quantized(_gptq), UNREAD.format("GPTQ or AWQ")),
    "NVFP4": (_quantized(_nvfp4), UNREAD.format("FP8")),
    "compressed tensors": (_quantized(_compressed_tensors), UNREAD.format("unknown kind")),
    "voices of mlx-audio": (_voices_of_mlx, None),
    "params.json with a BOM": (_with_bom("params.json"), "params.json begins with a byte order mark"),
    "tekken.json with a BOM": (_with_bom("tekken.json"), "tekken.json begins with a byte order mark"),
    "pointer for weights": (_write(W, POINTER), f"{W} is a git-lfs pointer.*`git lfs pull`"),
    "pointer for params": (_write("params.json", POINTER), "params.json is a git-lfs pointer"),
    "pointer for the tokenizer": (_write("tekken.json", POINTER), "tekken.json is a git-lfs pointer"),
    "pointer for the voice": (_write(VOICE, POINTER), "neutral_male.pt is a git-lfs pointer"),
    "web page": (_write(W, "<!DOCTYPE html><title>Sign in"), f"{W} is a web page"),
    "empty": (_write(W, ""), f"{W} is empty"),
    "half the weights": (_half(W), f"{W} is truncated, damaged or not a safetensors file"),
    "half the voice": (_half(VOICE), "neutral_male.pt is not a .pt file .* truncated"),
    "half a download by the hub's client": (
        _rename(W, ".cache/huggingface/download/x.4d4d.incomplete"),
        UNFINISHED.format("x.4d4d.incomplete"),
    ),
    "half a download by aria2": (_write(f"{W}.aria2", "x"), UNFINISHED.format(f"{W}.aria2")),
    "half a download by a browser": (_rename(W, f"{W}.part"), UNFINISHED.format(f"{W}.part")),
    "hub cache": (_hub_cache, None),
    "hub cache, in part": (_hub_cache_in_part, UNFINISHED.format("1.4d4d.incomplete")),
    "hub cache, pruned": (_hub_cache_pruned, f"{W} is a link to a file that is gone; download it again"),
    "no voice": (lambda f: (f / VOICE).unlink(), "neutral_male.pt is missing, but params.json and tekken"),
    "no tokenizer": (lambda f: (f / "tekken.json").unlink(), f"tekken.json is missing; {COPY}"),
    "another's tokenizer": (
        lambda f: _write("tekken.json", (f / "tekken.json").read_text().replace("12.5", "25.0"))(f),
        "audio.frame_rate is 25.0, where params.json says 12.5",
    ),
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "models--m--v" / "snapshots" / "0123"))


@pytest.fixture
def revox(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run a command in this process: its exit code, standard output, and last line of standard error."""
    names = ("inspect", "speak", "serve")
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in names})
    monkeypatch.setenv("COLUMNS", "4000")

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["revox", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_speak_and_serve_give_one_answer(kind, folder, revox, tmp_path, monkeypatch):
    make, sentence = KINDS[kind]
    make(folder)
    spoken = {}

    def serve(app: Any, *_: Any) -> None:
        with TestClient(app, base_url="http://127.0.0.1") as client:
            asked = {"input": "ten", "voice": "neutral_male", "max_new_tokens": 1, "takes": 1}
            spoken["response"] = client.post("/v1/audio/speech", json=asked)

    monkeypatch.setattr(serve_command, "_run", serve)
    inspected = revox("inspect", folder, "--json")
    said = ("ten", "--voice", "neutral_male", "--max-seconds", 0.08, "--takes", 1)
    speaking = revox("speak", *said, "-c", folder, "-o", tmp_path / "a.wav")
    serving = revox("serve", folder, "--port", 0, "--voices-folder", tmp_path / "voices")

    if sentence is None:
        assert inspected.code == speaking.code == serving.code == 0, speaking.err + serving.err
        assert "preset speech" in _capabilities(inspected.out)
        assert spoken["response"].status_code == 200
        assert (tmp_path / "a.wav").stat().st_size > 1000
        return
    assert speaking.code == 2
    assert not (tmp_path / "a.wav").exists()
    one = speaking.err.strip().splitlines()[-1].removeprefix("revox: ")
    assert re.search(sentence, one), one
    if VOICE in one:  # the others can be spoken with
        assert spoken["response"].status_code == 500
        assert f"The voice neutral_male cannot be used: {one}" in serving.err
    else:
        assert serving.code == 2
        assert serving.err.strip().splitlines()[-1] == f"revox: {one}"
        assert "preset speech" not in _capabilities(inspected.out)
    assert one in inspected.err or one in json.loads(inspected.out)["notes"]


def test_an_adapter_that_is_not_there_is_a_sentence_to_speak_and_serve(
    revox, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(serve_command, "_run", lambda *_: pytest.fail("served"))
    given = ("-c", tiny_checkpoint, "--adapter", tmp_path / "none")
    speaking = revox("speak", "ten", "--voice", "neutral_male", "-o", tmp_path / "a.wav", *given)
    serving = revox("serve", "--port", 0, "--voices-folder", tmp_path / "voices", *given)
    for done in (speaking, serving):
        assert done.code == 2
        assert "none/adapter_config.json is missing" in done.err


def test_a_folder_of_a_short_name_that_is_not_there_is_a_sentence(revox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "."):
        inspected = revox("inspect", folder)
        assert inspected.code == 2
        assert "params.json is missing" in inspected.err


def _capabilities(report: str) -> set[str]:
    if not report.strip():
        return set()
    return {one["name"] for one in json.loads(report)["capabilities"] if one["available"]}
