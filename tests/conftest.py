"""What all test rooms share: a complete checkpoint folder, small enough to make in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.tokenizer import minimal_vocab_size, write_tekken
from revox.checkpoint.tensors import WEIGHTS
from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig
from revox.model.voxtral import Voxtral, tensor_name
from revox.speech import Audio, write_audio

TINY = VoxtralConfig(
    # 256 wide, so that a voice's codes can be found again from its rows.
    backbone=BackboneConfig(
        dim=256, n_layers=2, head_dim=32, hidden_dim=256, n_heads=4, n_kv_heads=2,
        vocab_size=minimal_vocab_size(),
    ),
    acoustic=AcousticConfig(
        input_dim=256, dim=256, n_layers=2, head_dim=32, hidden_dim=128, n_heads=4, n_kv_heads=2
    ),
    codec=CodecConfig(
        semantic_codebook_size=512, semantic_dim=16, dim=32, hidden_dim=48, head_dim=8, n_heads=4,
        n_kv_heads=4,
    ),
)  # fmt: skip

REDUCED = VoxtralConfig(
    # The release's proportions: queries wider than the model, four heads to a key.
    backbone=BackboneConfig(
        dim=96, n_layers=6, head_dim=4, hidden_dim=288, n_heads=32, n_kv_heads=8,
        vocab_size=minimal_vocab_size(),
    ),
    acoustic=AcousticConfig(input_dim=96, dim=96, n_layers=3, head_dim=4, hidden_dim=288),
    codec=CodecConfig(semantic_codebook_size=512, semantic_dim=16, dim=32, hidden_dim=128, head_dim=4),
)  # fmt: skip

PRESETS = (
    "casual_female", "casual_male", "cheerful_female", "neutral_female", "neutral_male",
    "pt_male", "pt_female", "nl_male", "nl_female", "it_male",
    "it_female", "fr_male", "fr_female", "es_male", "es_female",
    "de_male", "de_female", "ar_male", "hi_male", "hi_female",
)  # fmt: skip

RELEASE_PARAMS = Path(__file__).parent / "parity" / "release_params.json"


def tiny_model(with_encoder: bool = False, seed: int = 0, config: VoxtralConfig = TINY) -> Voxtral:
    """Random weights at tiny sizes, float32: it babbles for 1 to 5 s at a time, loudly enough to hear."""
    torch.manual_seed(seed)
    model = Voxtral(config, with_encoder)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("embeddings.weight"):
                tensor.normal_(std=0.045)  # rows of voices then have the release's norm, 4.4
            elif "_scale" in name:
                tensor.fill_(0.3)
            elif name.endswith(("input_projection.weight", "llm_projection.weight")):
                tensor.mul_(3)
            elif name.endswith("acoustic_codebook_output.weight"):
                tensor.mul_(2)
            elif name.endswith("embedding_sum"):
                tensor.normal_()
            elif name.endswith("output_proj.conv.parametrizations.weight.original0"):
                tensor.mul_(3)
        # So that speech ends now and then, as a trained model's does: hidden states that vary with the last
        # frame more than with the past, and an end that is as likely as a few dozen other codes together.
        for layer in model.backbone.layers:
            layer.attention.wo.weight.mul_(0.2)
        model.acoustic_transformer.semantic_codebook_output.weight[1].mul_(1.8)
    return model.eval().requires_grad_(False)


def preset_codes() -> dict[str, Tensor]:
    """The codes `[37, frames]`, from 0, that the tiny checkpoint's presets are made of (10 to 29 frames)."""
    codes = {}
    for i, name in enumerate(PRESETS):
        generator = torch.Generator().manual_seed(1000 + i)
        frames = 10 + i
        semantic = torch.randint(TINY.codec.semantic_codebook_size, (1, frames), generator=generator)
        acoustic = torch.randint(TINY.codec.acoustic_codebook_size, (36, frames), generator=generator)
        codes[name] = torch.cat((semantic, acoustic))
    return codes


def tiny_params() -> dict[str, Any]:
    """params.json of the tiny checkpoint: the release's, with other sizes."""
    params = json.loads(RELEASE_PARAMS.read_text())

    def fit(target: dict[str, Any], sizes: object) -> None:
        for key in target:
            if hasattr(sizes, key):
                target[key] = getattr(sizes, key)

    multimodal = params["multimodal"]
    fit(params, TINY.backbone)
    fit(multimodal["audio_model_args"], TINY.codec)
    fit(multimodal["audio_model_args"]["acoustic_transformer_args"], TINY.acoustic)
    fit(multimodal["audio_tokenizer_args"], TINY.codec)
    multimodal["audio_tokenizer_args"]["voice"] = {name: i for i, name in enumerate(PRESETS)}
    return params


def write_checkpoint(folder: Path, model: Voxtral) -> Path:
    """A folder in exactly the release's format, with `model`'s weights in bf16 and 20 presets."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    state = {tensor_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(tiny_params(), indent=1))
    (folder / "voice_embedding").mkdir()
    rows = {name: model.mm_audio_embeddings.voice_embedding(codes) for name, codes in preset_codes().items()}
    for name, tensor in rows.items():
        torch.save(tensor, folder / "voice_embedding" / f"{name}.pt")
    write_tekken(folder / "tekken.json", {name: len(tensor) for name, tensor in rows.items()})
    return folder


def write_speakers(folder: Path, rate: int) -> Path:
    """What training takes for speech: folders of twenty speakers, a swelling hum of 1 s each."""
    for i in range(20):
        t = np.arange(rate) / rate
        wave = 0.1 * np.sin(2 * np.pi * (100 + 10 * i) * t) * (1 + np.sin(2 * np.pi * 3 * t))
        (folder / f"speaker{i:02d}").mkdir()
        write_audio(folder / f"speaker{i:02d}" / "a.flac", Audio(wave.astype(np.float32), rate))
    return folder


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Signing key, log of marks and cache go to folders of the tests, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVOX_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("REVOX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread for a file of tests, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config() -> VoxtralConfig:
    """Sizes of the tiny checkpoint."""
    return TINY


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder without encoder, as released. Shared by all tests: never write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", tiny_model())


@pytest.fixture
def tiny_checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tiny_checkpoint_with_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_checkpoint`, with all 114 encoder tensors. Read only."""
    folder = tmp_path_factory.mktemp("tiny-encoder") / "checkpoint"
    return write_checkpoint(folder, tiny_model(with_encoder=True))


@pytest.fixture(scope="session")
def tiny_preset_codes() -> dict[str, Tensor]:
    """name -> codes `[37, frames]` that the tiny checkpoint's presets are made of."""
    return preset_codes()


def in_shards(folder: Path) -> Path:
    """The folder with its weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"consolidated-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
