from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import load_file

from lab.errors import LabError
from lab.fullsize import write_random_checkpoint
from revox.checkpoint.inspect import check_checkpoint
from revox.checkpoint.release import PRESETS, release_params

PARITY = Path(__file__).parents[1] / "parity"
VOICES = {"ar_male": 67, "hi_male": 94}
TABLE = "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"


def small_params() -> dict[str, Any]:
    params = release_params(VOICES) | {"dim": 128, "n_layers": 2, "head_dim": 32, "hidden_dim": 96}
    params |= {"n_heads": 4, "n_kv_heads": 2, "vocab_size": 1256}
    multimodal = params["multimodal"]
    multimodal["audio_model_args"]["semantic_codebook_size"] = 64
    multimodal["audio_model_args"]["acoustic_transformer_args"] |= {
        "input_dim": 128, "dim": 128, "head_dim": 32, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
    }  # fmt: skip
    multimodal["audio_tokenizer_args"] |= {
        "semantic_codebook_size": 64, "semantic_dim": 16, "dim": 32, "hidden_dim": 64, "head_dim": 8,
        "n_heads": 4, "n_kv_heads": 4,
    }  # fmt: skip
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("small") / "made", small_params(), VOICES, with_encoder=True
    )


def test_the_params_are_the_releases() -> None:
    assert release_params() == json.loads((PARITY / "release_params.json").read_text())
    assert len(PRESETS) == 20


def test_what_is_written_is_a_complete_checkpoint(folder: Path) -> None:
    report = check_checkpoint(folder)
    assert report.notes == []
    assert report.encoder == "complete"
    assert {voice.name: voice.rows for voice in report.voices} == VOICES


def test_the_encoder_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    report = check_checkpoint(write_random_checkpoint(tmp_path / "made", small_params(), VOICES))
    assert report.encoder == "absent"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    same = write_random_checkpoint(tmp_path / "same", small_params(), VOICES, with_encoder=True)
    other = write_random_checkpoint(tmp_path / "other", small_params(), VOICES, seed=1, with_encoder=True)
    for name in ("consolidated.safetensors", "params.json", "tekken.json"):
        assert (same / name).read_bytes() == (folder / name).read_bytes()
    for name in ("consolidated.safetensors", "voice_embedding/ar_male.pt"):
        ours, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
        assert len(ours) == len(theirs)
        assert ours != theirs


def test_weights_have_the_spread_of_fresh_ones(folder: Path) -> None:
    tensors = load_file(folder / "consolidated.safetensors")
    wq = tensors["layers.0.attention.wq.weight"].float()
    assert abs(wq.mean()) < 0.001
    assert wq.std() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(wq, tensors["layers.1.attention.wq.weight"].float())
    assert (tensors["norm.weight"] == 1).all()
    assert tensors["audio_tokenizer.decoder_blocks.1.layers.0.ffn_scale"].unique().tolist() == [
        torch.tensor(0.01, dtype=torch.bfloat16).item()
    ]
    codebook = "audio_tokenizer.quantizer.semantic_codebook"
    assert (tensors[f"{codebook}.cluster_usage"] == 1).all()
    assert tensors[f"{codebook}.embedding_sum"].float().std() == pytest.approx(1, rel=0.1)


def test_a_weight_normed_convolution_is_its_direction(folder: Path) -> None:
    tensors = load_file(folder / "consolidated.safetensors")
    gains = [name for name in tensors if name.endswith("original0")]
    assert len(gains) == 5 + 5  # decoder_blocks and output_proj; input_proj and encoder_blocks
    for name in gains:
        direction = tensors[name[:-1] + "1"].float()
        norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
        assert tensors[name].shape == norm.shape
        torch.testing.assert_close(tensors[name].float(), norm, rtol=2**-8, atol=0)


def test_voices_are_sums_of_table_rows_and_close_with_the_end_frame(folder: Path) -> None:
    table = load_file(folder / "consolidated.safetensors")[TABLE].float()
    offsets = torch.tensor(
        [0] + [66 + 23 * k for k in range(36)]
    )  # 64 semantic codes and 2 special, then 21 + 2
    rows = torch.load(folder / "voice_embedding" / "ar_male.pt", weights_only=True)
    assert rows.dtype == torch.bfloat16
    assert tuple(rows.shape) == (67, 128)
    end = offsets.clone()
    end[0] += 1
    torch.testing.assert_close(rows[-1].float(), table[end].sum(0), rtol=2**-7, atol=1e-3)
    assert rows[:-1].float().norm(dim=1).mean() == pytest.approx(4.45, rel=0.1)
    assert rows[-1].float().norm() == pytest.approx(14.75, rel=0.25)
    assert not torch.equal(rows[0], rows[1])


def test_mistral_common_prompts_with_as_many_audio_tokens_as_rows(folder: Path) -> None:
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json"))
    tokens = tokenizer.encode_speech_request(SpeechRequest(input="Hello.", voice="ar_male")).tokens
    audio = tokenizer.instruct_tokenizer.tokenizer.get_special_token("[AUDIO]")
    assert audio == small_params()["multimodal"]["audio_model_args"]["audio_token_id"]
    assert tokens.count(audio) == VOICES["ar_male"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LabError, match="holds other files; name a folder"):
        write_random_checkpoint(tmp_path, small_params(), VOICES)
    with pytest.raises(LabError, match="is a file; name a folder"):
        write_random_checkpoint(tmp_path / "thesis.txt", small_params(), VOICES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_disk_too_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LabError, match="make room first"):
        write_random_checkpoint(tmp_path / "made", small_params(), VOICES)
    assert not list((tmp_path / "made").rglob("*.safetensors"))


PROBE = """
import resource, sys
from lab.fullsize import write_fullsize
write_fullsize(sys.argv[1])
if sys.platform == "linux":  # ru_maxrss would count the process that started this one
    print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_full_size_folder_takes_8_gb_of_disk_and_under_1_5_gb_of_memory(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9
    report = check_checkpoint(tmp_path)
    assert sum(part.found for part in report.components) == 386
    assert round((tmp_path / "consolidated.safetensors").stat().st_size / 1e9, 1) == 8.0
