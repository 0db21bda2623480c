from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.inspect import Report, check_checkpoint, inspect
from revox.checkpoint.load import load_model
from revox.checkpoint.params import Params
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.runtimes import MLX_AUDIO, RUNTIMES, VLLM_OMNI

WEIGHTS = "consolidated.safetensors"
ENCODER = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")


@pytest.fixture
def folder(tiny_checkpoint_copy: Path) -> Path:
    return tiny_checkpoint_copy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The folder with other tensors in its weights."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors if changed is None else changed, folder / WEIGHTS)
    return folder


def capability(report: Report, name: str) -> bool:
    return next(capability.available for capability in report.capabilities if capability.name == name)


def ref_audio(report: Report, runtime: str) -> str:
    return next(found.ref_audio for found in report.runtimes if found.name.startswith(runtime))


def test_a_folder_as_released_can_all_but_clone_by_ref_audio(tiny_checkpoint: Path) -> None:
    report = inspect(tiny_checkpoint)
    assert report.problems == []
    assert report.notes == []
    assert report.unknown == []
    assert report.encoder == "absent"
    assert capability(report, "preset speech")
    assert capability(report, "cloning by inversion")
    assert not capability(report, "cloning by ref_audio")
    assert not capability(report, "instructions")
    assert not capability(report, "voice design")
    assert ref_audio(report, "vllm-omni 0.30") == "refused as a bad request"
    assert ref_audio(report, "revox") == "clones by inversion"


def test_other_runtimes_are_rows_of_one_table_with_a_source_and_a_date(tiny_checkpoint: Path) -> None:
    report = inspect(tiny_checkpoint)
    assert [found.name for found in report.runtimes] == [*(facts.title for facts in RUNTIMES), "revox"]
    for facts in RUNTIMES:
        assert facts.version in facts.source
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", facts.read)
    speaks = {found.name.split()[0]: found.preset_speech for found in report.runtimes}
    assert speaks["vllm-omni"] == speaks["revox"] == "speaks the presets"
    assert speaks["mlx-audio"].startswith("speaks 0 of 20 voices: it reads NAME.safetensors")
    assert "compiled in" in speaks["voxtral-tts.c"]
    assert "extra [AUDIO]" in speaks["voxtral_tts_rs"]


def test_mlx_audio_reads_the_first_frame_at_the_prompts_last_token(folder: Path) -> None:
    for path in (folder / "voice_embedding").glob("*.pt"):
        save_file({"embedding": torch.load(path, weights_only=True)}, path.with_suffix(".safetensors"))
    speaks = {found.name: found.preset_speech for found in inspect(folder).runtimes}
    assert speaks[MLX_AUDIO.title] == "speaks the presets"


def test_components_add_up_to_what_the_file_holds(tiny_checkpoint: Path) -> None:
    report = inspect(tiny_checkpoint)
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    assert sum(part.found for part in report.components) == len(tensors)
    assert sum(part.parameters for part in report.components) == sum(t.numel() for t in tensors.values())
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert all(part.found == part.expected for part in report.components if part.name != "codec_encoder")


def test_voices_are_listed_with_the_rows_of_their_files(tiny_checkpoint: Path) -> None:
    report = inspect(tiny_checkpoint)
    assert len(report.voices) == 20
    for voice in report.voices:
        rows = torch.load(tiny_checkpoint / "voice_embedding" / f"{voice.name}.pt", weights_only=True)
        assert voice.rows == voice.tekken_rows == len(rows)
        assert voice.seconds == pytest.approx((len(rows) - 1) / 12.5)


def test_with_all_114_encoder_tensors_ref_audio_works_everywhere_it_exists(
    tiny_checkpoint_with_encoder: Path,
) -> None:
    report = inspect(tiny_checkpoint_with_encoder)
    assert report.encoder == "complete"
    assert report.component("codec_encoder").found == 114
    assert capability(report, "cloning by ref_audio")
    assert ref_audio(report, "vllm-omni 0.30") == "clones"
    assert "with the encoder" in ref_audio(report, "revox")
    assert ref_audio(report, "mlx-audio") == "no encoder in it"


def test_a_partial_encoder_is_reported_and_trusted_by_nobody(
    tiny_checkpoint_with_encoder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "partial"))
    lost = "audio_tokenizer.encoder_blocks.6.layers.1.ffn_scale"
    report = inspect(rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if n != lost}))
    assert report.encoder == "partial"
    assert report.component("codec_encoder").missing == [lost]
    assert report.problems == []
    assert "113 of 114" in report.notes[0]
    assert not capability(report, "cloning by ref_audio")
    assert "uninitialized" in ref_audio(report, "vllm-omni 0.30")
    assert "by inversion" in ref_audio(report, "revox")


def test_unknown_tensors_are_reported_and_the_computed_one_is_not(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["acoustic_transformer.time_embedding.inv_freq"] = torch.zeros(4)
        tensors["audio_tokenizer.extra.weight"] = torch.zeros(4)

    report = inspect(rewrite(folder, add))
    assert report.unknown == ["audio_tokenizer.extra.weight"]
    assert report.problems == []
    assert any("vllm-omni refuses to start" in note for note in report.notes)


def test_a_scale_beside_a_bf16_weight_makes_the_folder_unreadable(folder: Path) -> None:
    report = inspect(
        rewrite(folder, lambda tensors: tensors | {"layers.0.attention.wq.weight_scale": torch.ones(2)})
    )
    assert report.quantization is not None
    assert "weight_scale" in report.unreadable
    assert not capability(report, "preset speech")


def test_other_float_types_are_a_note(folder: Path) -> None:
    count = len(load_file(folder / WEIGHTS))
    report = inspect(rewrite(folder, lambda tensors: {n: t.float() for n, t in tensors.items()}))
    assert report.problems == []
    assert report.notes == [f"{count} tensors are F32, where the release has BF16."]
    assert capability(report, "preset speech")


@pytest.mark.parametrize(
    "kept", [lambda name, tensor: tensor.ndim == 1, lambda name, tensor: name == "norm.weight"]
)
def test_norms_kept_in_float32_beside_bf16_matrices_are_a_note(folder: Path, kept: Callable) -> None:
    report = inspect(
        rewrite(folder, lambda tensors: {n: t.float() if kept(n, t) else t for n, t in tensors.items()})
    )
    assert report.problems == []
    assert "are F32" in report.notes[0]


def test_a_voice_in_torchs_old_format_is_a_note(folder: Path) -> None:
    path = folder / "voice_embedding" / "ar_male.pt"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    report = inspect(folder)
    assert report.problems == []
    assert "format before 1.6" in report.notes[0]


def _int8(tensors: dict[str, Tensor]) -> None:
    # As the C port's quantize_model.py: I8 in place of a matrix, a scale a row beside it.
    for name in [name for name in tensors if name.startswith("layers.") and tensors[name].ndim == 2]:
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]))
        tensors[name] = tensors[name].to(torch.int8)


def _mlx(tensors: dict[str, Tensor]) -> None:
    # As mlx: 4-bit groups packed into U32, scales and biases beside them.
    for name in [name for name in tensors if name.startswith("layers.") and tensors[name].ndim == 2]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
        for suffix in ("scales", "biases"):
            tensors[name.replace("weight", suffix)] = torch.ones(rows, columns // 32, dtype=torch.bfloat16)


def _gptq(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("layers.") and tensors[name].ndim == 2]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        tensors[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{stem}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        tensors[f"{stem}scales"] = torch.zeros(1, rows, dtype=torch.float16)


def _fp8(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("layers.") and tensors[name].ndim == 2]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1)


@pytest.mark.parametrize(
    ("quantize", "kind", "read"),
    [
        (_int8, "INT8 with scales", True),
        (_mlx, "MLX groups", True),
        (_gptq, "GPTQ or AWQ", False),
        (_fp8, "FP8", True),
    ],
)
def test_quantized_community_variants_are_reported_and_read_or_refused_with_a_way_out(
    folder: Path, quantize: Callable[[dict[str, Tensor]], None], kind: str, read: bool
) -> None:
    report = inspect(rewrite(folder, quantize))
    assert report.quantization is not None
    assert report.quantization.startswith(kind)
    assert report.problems == []
    assert report.unknown == []
    assert report.component("backbone").quantized == 14  # 7 matrices in each of 2 layers
    assert report.component("backbone").found == report.component("backbone").expected
    assert bool(capability(report, "preset speech")) == read
    speaks = {runtime.name: runtime.preset_speech for runtime in report.runtimes}
    assert "quantized" in speaks[VLLM_OMNI.title] or "FP8" in speaks[VLLM_OMNI.title]
    if read:
        assert report.unreadable is None
        assert speaks["revox"] == "speaks the presets"
        load_model(folder)
    else:
        assert report.unreadable in report.notes
        assert "revox quantize CHECKPOINT --weights int8 --out FOLDER" in report.unreadable
        with pytest.raises(CheckpointError) as refusal:
            load_model(folder)
        assert str(refusal.value) == report.unreadable
    assert capability(report, "cloning by inversion")
    load_model(folder, parts=("mm_audio_embeddings", "audio_tokenizer"))  # what inversion loads


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def _tensor(name: str, tensor: Tensor | None) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return lambda folder: rewrite(folder, change) and None


def _json(name: str, path: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        *parents, last = path.split(".")
        section = data
        for key in parents:
            section = section[key]
        if value is None:
            del section[last]
        else:
            section[last] = value
        (folder / name).write_text(json.dumps(data))

    return change


def _pt(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: torch.save(tensor, folder / "voice_embedding" / f"{name}.pt")


def _other_model(folder: Path) -> None:
    (folder / "params.json").unlink()
    (folder / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')


BROKEN = {
    "no params": (_drop("params.json"), "params.json", "is missing"),
    "no weights": (_drop(WEIGHTS), WEIGHTS, "is missing; download"),
    "no tokenizer": (_drop("tekken.json"), "tekken.json", "is missing; copy or download it again"),
    "no voice file": (
        _drop("voice_embedding/ar_male.pt"),
        "ar_male.pt",
        "is missing, but params.json and tekken",
    ),
    "truncated weights": (_truncate(WEIGHTS), WEIGHTS, "is truncated, damaged or not a safetensors file"),
    "truncated voice": (_truncate("voice_embedding/ar_male.pt"), "ar_male.pt", "truncated; copy or download"),
    "truncated params": (_truncate("params.json"), "params.json", "not valid JSON"),
    "truncated tokenizer": (_truncate("tekken.json"), "tekken.json", "not valid JSON"),
    "missing tensor": (
        _tensor("norm.weight", None),
        WEIGHTS,
        r"lacks 1 of the 161 tensors .* norm.weight \(BF16",
    ),
    "mistyped tensor": (
        _tensor("norm.weight", torch.zeros(256, dtype=torch.int32)),
        WEIGHTS,
        r"norm.weight is I32 \[256\], where params.json asks for BF16 \[256\]; copy",
    ),
    "misshapen tensor": (
        _tensor("norm.weight", torch.zeros(255, dtype=torch.bfloat16)),
        WEIGHTS,
        r"norm.weight is BF16 \[255\], where params.json asks for BF16 \[256\]; copy",
    ),
    "rows disagree": (
        _json("tekken.json", "audio.voice_num_audio_tokens.ar_male", 99),
        "tekken.json",
        r"gives the voice ar_male 99 rows and .*ar_male.pt has 28; set audio.*tokens.ar_male to 28",
    ),
    "rows not listed": (
        _json("tekken.json", "audio.voice_num_audio_tokens.ar_male", None),
        "tekken.json",
        "does not list the voice ar_male of params.json; set",
    ),
    "rows of another width": (
        _pt("ar_male", torch.zeros(28, 64, dtype=torch.bfloat16)),
        "ar_male.pt",
        r"holds BF16 \[28, 64\], where BF16 \[rows, 256\] was expected: .*; copy",
    ),
    "rows of another type": (
        _pt("ar_male", torch.zeros(28, 256)),
        "ar_male.pt",
        "holds F32, where BF16 was expected",
    ),
    "another rate": (
        _json("tekken.json", "audio.frame_rate", 25.0),
        "tekken.json",
        "audio.frame_rate is 25.0, where params.json says 12.5; copy both",
    ),
    "another tokenizer": (
        _json("tekken.json", "config.default_vocab_size", 131072),
        "tekken.json",
        "has 131072 tokens and params.json a vocab_size of 1256; copy both",
    ),
    "no audio section": (_json("tekken.json", "audio", None), "tekken.json", "has no audio section"),
    "another model": (_other_model, "config.json", "holds another model"),
    "other sizes": (
        _json("params.json", "n_layers", 3),
        WEIGHTS,
        r"lacks 9 of the 170 tensors .* layers.2.attention.wq.weight .*; copy or download it again",
    ),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `revox inspect` as the command line does; gives (exit code, stdout, stderr)."""
    from revox.cli import inspect_command, main

    # The other commands may bring heavier libraries along; this one is tested alone.
    def build() -> Any:
        import typer

        app = typer.Typer(pretty_exceptions_enable=False)
        app.callback()(lambda: None)
        app.command("inspect")(inspect_command.command)
        return app

    monkeypatch.setattr(main, "build_app", build)
    monkeypatch.setattr(main, "user_errors", lambda: (CheckpointError,))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["revox", "inspect", *map(str, arguments)])
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("what", BROKEN)
def test_what_must_be_mended_is_exit_code_2_and_one_sentence(
    folder: Path, run: Callable[..., Any], what: str
) -> None:
    break_it, file, words = BROKEN[what]
    break_it(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        check_checkpoint(folder)
    sentence = str(error.value)
    assert file in sentence
    assert "\n" not in sentence
    code, _, err = run(folder)
    assert code == 2
    assert err == f"revox: {sentence}\n"


def test_a_listed_name_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    params["multimodal"]["audio_tokenizer_args"]["voice"]["../../secret"] = 20
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match="cannot be a file's name; remove it"):
        check_checkpoint(folder)


def test_a_mended_folder_passes(folder: Path) -> None:
    (folder / "tekken.json").rename(folder / "aside")
    with pytest.raises(CheckpointError):
        check_checkpoint(folder)
    (folder / "aside").rename(folder / "tekken.json")
    assert check_checkpoint(folder).problems == []


def test_json_holds_the_whole_report(tiny_checkpoint: Path, run: Callable[..., Any]) -> None:
    code, out, err = run(tiny_checkpoint, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == inspect(tiny_checkpoint).to_json()


def test_json_is_whole_even_when_something_must_be_mended(folder: Path, run: Callable[..., Any]) -> None:
    (folder / "voice_embedding" / "ar_male.pt").unlink()
    code, out, err = run(folder, "--json")
    assert code == 2
    assert "ar_male.pt is missing" in err
    assert "ar_male.pt is missing" in json.loads(out)["problems"][0]


def test_the_table_shows_components_voices_capabilities_and_runtimes(
    tiny_checkpoint: Path, run: Callable[..., Any]
) -> None:
    code, out, _ = run(tiny_checkpoint)
    assert code == 0
    for words in ("codec_encoder", "casual_female", "cloning by inversion", "voxtral_tts_rs", "24000 Hz"):
        assert words in out


def test_a_hub_cache_folder_of_links_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "voice_embedding").mkdir(parents=True)
    for path in tiny_checkpoint.rglob("*.*"):
        (snapshot / path.relative_to(tiny_checkpoint)).symlink_to(path)
    report = check_checkpoint(snapshot)
    assert report.to_json() | {"folder": ""} == inspect(tiny_checkpoint).to_json() | {"folder": ""}


@pytest.fixture(scope="module")
def release_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's headers and file sizes: 8.0 GB of weights without data (a sparse file), a tekken.json
    of 150,000 tokens and 20 voices."""
    from lab.tokenizer import tekken
    from revox.checkpoint.release import PRESETS, release_params

    folder = tmp_path_factory.mktemp("release-sized")
    params = release_params()
    specs = expected_tensors(Params.model_validate(params).voxtral_config()).items()
    header, at = {}, 0
    for name, spec in specs:
        if spec.component != "codec_encoder":
            end = at + math.prod(spec.shape) * 2
            header[name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [at, end]}
            at = end
    raw = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "params.json").write_text(json.dumps(params))
    contents = tekken(PRESETS, vocab_size=131072)
    spare = contents["vocab"][-1]
    contents["vocab"] += [spare | {"rank": rank} for rank in range(len(contents["vocab"]), 150_000)]
    (folder / "tekken.json").write_text(json.dumps(contents, indent=1))
    (folder / "voice_embedding").mkdir()
    for name, rows in PRESETS.items():
        torch.save(torch.zeros(rows, 3072, dtype=torch.bfloat16), folder / "voice_embedding" / f"{name}.pt")
    return folder


PROBE = """
import resource, sys
from revox.cli.inspect_command import command
command(sys.argv[1], as_json=False, revision=None)
spent = resource.getrusage(resource.RUSAGE_SELF)
if sys.platform == "linux":  # ru_maxrss would count the process that started this one
    status = open("/proc/self/status").read()
    megabytes = int(status.split("VmHWM:")[1].split()[0]) / 2**10
else:
    megabytes = spent.ru_maxrss / 2**20
print(spent.ru_utime + spent.ru_stime, megabytes, "torch" in sys.modules, file=sys.stderr)
"""


def test_inspecting_the_release_takes_a_second_and_300_mb_at_most_and_no_torch(release_sized: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, release_sized], capture_output=True, text=True, check=True, timeout=60
    )
    cpu, megabytes, torch_imported = done.stderr.split()
    print(f"{cpu} s of CPU time, {megabytes} MB")
    assert "4,002.4 M parameters, 8.00 GB" in done.stdout
    assert float(cpu) < 1
    assert float(megabytes) < 300
    assert torch_imported == "False"
