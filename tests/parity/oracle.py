"""The published serving code as an oracle: vllm-omni 0.30.0's own Voxtral modules, run on a CPU.

Their `vllm` imports, vllm_omni's package `__init__`s, its `platforms` and its `quantization` are stubbed
while the modules are imported; nothing of it stays in `sys.modules`. What the oracle computes is the
package's own code.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

VERSION = "0.30.0"
INSTALL = f"pip install --no-deps vllm-omni=={VERSION} einops regex"

_MODELS = "vllm_omni.model_executor.models.voxtral_tts"
_PLAIN_PACKAGES = (
    "vllm_omni",
    "vllm_omni.model_executor",
    "vllm_omni.model_executor.models",
    "vllm_omni.model_executor.models.voxtral_tts",
    "vllm_omni.transformers_utils",
    "vllm_omni.transformers_utils.configs",
    "vllm_omni.transformers_utils.parsers",
)
_STUBBED = (
    "vllm",
    "vllm_omni.data_entry_keys",
    "vllm_omni.model_executor.custom_process_mixin",
    "vllm_omni.model_executor.models.output_templates",
    "vllm_omni.platforms",
    "vllm_omni.quantization",
    "vllm_omni.transformers_utils.repo_utils",
)


class OracleMissingError(Exception):
    """vllm-omni is not there, or is another version."""


@dataclass(frozen=True)
class Oracle:
    """The four published modules."""

    model: ModuleType
    tokenizer: ModuleType
    generation: ModuleType
    parser: ModuleType

    def parse_params(self, params: dict[str, Any]) -> Any:
        """vllm-omni's config object of a params.json: `.text_config`, `.audio_config`."""
        with _imports_stubbed():
            _, config = self.parser._parse_voxtral_tts(copy.deepcopy(params))
        return config

    def audio_tokenizer(self, params: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
        """VoxtralTTSAudioTokenizer with its own initial weights, built under `dtype` as serving builds it."""
        config = self.parse_params(params)
        vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
        with _default_dtype(dtype):
            module = self.tokenizer.VoxtralTTSAudioTokenizer(vllm_config=vllm_config)
        return module.eval().requires_grad_(False)

    def load_weights(self, tokenizer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The serving model's own `load_weights`, in the stage that has the audio tokenizer alone."""
        stage = SimpleNamespace(
            audio_tokenizer=tokenizer,
            audio_generation=None,
            _enable_acoustic_transformer_cudagraph=lambda: None,
        )
        return self.model.VoxtralTTSForConditionalGeneration.load_weights(stage, weights)

    def acoustic_transformer(self, params: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
        """FlowMatchingAudioTransformer with its own initial weights, built under `dtype` as serving does."""
        args = self.parse_params(params).audio_config["audio_model_args"]
        with _default_dtype(dtype):
            module = self.generation.FlowMatchingAudioTransformer(args)
        return module.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def load_oracle() -> Oracle:
    """Import vllm-omni's voxtral_tts modules. Raises OracleMissingError with the command that installs it."""
    try:
        found = importlib.metadata.version("vllm-omni")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        have = "it is not installed" if found is None else f"{found} is installed"
        raise OracleMissingError(
            f"the parity tests compare with vllm-omni {VERSION} and {have}: run `{INSTALL}`"
        )
    try:
        with _imports_stubbed():
            return Oracle(
                model=importlib.import_module(f"{_MODELS}.voxtral_tts"),
                tokenizer=importlib.import_module(f"{_MODELS}.voxtral_tts_audio_tokenizer"),
                generation=importlib.import_module(f"{_MODELS}.voxtral_tts_audio_generation"),
                parser=importlib.import_module("vllm_omni.transformers_utils.parsers.voxtral_tts"),
            )
    except ModuleNotFoundError as error:
        sentence = f"vllm-omni needs {error.name}, which is not installed: run `{INSTALL}`"
        raise OracleMissingError(sentence) from error


class _Stub:
    """Stands for any class that vllm gives; takes any arguments and subscripts."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __class_getitem__(cls, item: object) -> type:
        return cls


class _Registry:
    @staticmethod
    def register_processor(*args: object, **kwargs: object):
        return lambda cls: cls


def _copy_weight(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape, f"{tuple(parameter.shape)} is not {tuple(loaded.shape)}"
    parameter.data.copy_(loaded)


def _general_mistral_names(config: dict[str, Any]) -> dict[str, Any]:
    """vllm's map from params.json's names to Hugging Face's (vllm/transformers_utils/configs/mistral.py)."""
    names = {
        "dim": "hidden_size",
        "norm_eps": "rms_norm_eps",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
    }
    renamed = {names.get(name, name): value for name, value in config.items()}
    return {"model_type": "transformer", "hidden_act": "silu"} | renamed


_GIVEN = {
    "init_logger": lambda name: _quiet_logger(name),
    "default_weight_loader": _copy_weight,
    "MULTIMODAL_REGISTRY": _Registry(),
    "current_omni_platform": SimpleNamespace(device_type="cpu"),
    "_CONFIG_FORMAT_TO_CONFIG_PARSER": {},
    "_remap_general_mistral_args": _general_mistral_names,
    "_remap_mistral_quantization_args": lambda config: config,
}


def _quiet_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(f"oracle.{name}")
    logger.setLevel(logging.ERROR)
    return logger


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _GIVEN[name] if name in _GIVEN else type(name, (_Stub,), {})
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand-ins for `_STUBBED`; for `_PLAIN_PACKAGES`, packages whose `__init__` is not run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name in _PLAIN_PACKAGES or any(name == s or name.startswith(f"{s}.") for s in _STUBBED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        plain = spec.name in _PLAIN_PACKAGES
        module = ModuleType(spec.name) if plain else _StubModule(spec.name)
        module.__path__ = [str(self.root.joinpath(*spec.name.split(".")))] if plain else []
        return module

    def exec_module(self, module: ModuleType) -> None: ...


@contextlib.contextmanager
def _imports_stubbed() -> Iterator[None]:
    def ours(name: str) -> bool:
        return name.split(".")[0] in ("vllm", "vllm_omni")

    distribution = importlib.metadata.distribution("vllm-omni")
    finder = _StubFinder(Path(str(distribution.locate_file(""))))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    sys.modules.update(_imported)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _imported.update({name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)})
        sys.modules.update(before)


_imported: dict[str, ModuleType] = {}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def noise_injected(oracle: Oracle, noise: Tensor) -> Iterator[None]:
    """Make the oracle's next frame start from `noise` `[batch, 36]` instead of the global generator's."""

    class _Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            assert shape == tuple(noise.shape), f"asked for noise {shape}, given {tuple(noise.shape)}"
            return noise.to(dtype=dtype, device=device)

    with mock.patch.object(oracle.generation, "torch", _Torch("torch")):
        yield


def release_params() -> dict[str, Any]:
    """The release's params.json (Voxtral-4B-TTS-2603)."""
    return json.loads((Path(__file__).parent / "release_params.json").read_text())


def small_params(**codec: Any) -> dict[str, Any]:
    """Sizes of the lab's kind: the release's structure, narrow. `codec` overrides sizes of the codec."""
    params = release_params()
    params |= {
        "dim": 256, "n_layers": 4, "head_dim": 64, "hidden_dim": 640, "n_heads": 4, "n_kv_heads": 2,
        "vocab_size": 1256,
    }  # fmt: skip
    multimodal = params["multimodal"]
    model = multimodal["audio_model_args"]
    model["semantic_codebook_size"] = 512
    model["acoustic_transformer_args"] |= {
        "input_dim": 256, "dim": 256, "n_layers": 3, "head_dim": 64, "hidden_dim": 640, "n_heads": 4,
        "n_kv_heads": 2,
    }  # fmt: skip
    multimodal["audio_tokenizer_args"] |= {
        "semantic_codebook_size": 512, "semantic_dim": 64, "dim": 192, "hidden_dim": 512, "head_dim": 48,
        "n_heads": 4, "n_kv_heads": 4,
    } | codec  # fmt: skip
    return params


_ORACLE_TABLE = "audio_token_embedding.embeddings.weight"
_FILE_TABLE = "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"


def random_codec_state(tokenizer: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights, in the file's names, for everything VoxtralTTSAudioTokenizer holds (float32)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in tokenizer.named_parameters()}
    state = {}
    for name, shape in shapes.items():
        file_name = _FILE_TABLE if name == _ORACLE_TABLE else f"audio_tokenizer.{name}"
        state[file_name] = _random_tensor(name, shape, generator)
    codebook = tokenizer.quantizer.semantic_codebook
    size, dim = codebook.embedding_sum.shape
    usage = torch.rand(size, generator=generator) * 20 + 0.1
    # Codes that were never used: their usage is clamped at 1e-5.
    usage[:: max(2, size // 7)] = 0.0
    rows = torch.randn(size, dim, generator=generator) * 0.7
    state["audio_tokenizer.quantizer.semantic_codebook.cluster_usage"] = usage
    state["audio_tokenizer.quantizer.semantic_codebook.embedding_sum"] = rows * usage.clamp(min=1e-5)[:, None]
    return state


def random_acoustic_state(transformer: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights, in the file's names, for FlowMatchingAudioTransformer (float32)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"acoustic_transformer.{name}": _random_tensor(name, tuple(p.shape), generator)
        for name, p in transformer.named_parameters()
    }


def random_backbone_state(params: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights, in the file's names and shapes, for the backbone's layers and norm (float32)."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden = params["dim"], params["hidden_dim"]
    q_dim, kv_dim = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (dim,)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (q_dim, dim),
            f"layers.{i}.attention.wk.weight": (kv_dim, dim),
            f"layers.{i}.attention.wv.weight": (kv_dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, q_dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep activations near 1, with nothing left at a value that would hide a mistake."""
    if name.endswith("original0"):
        # A transposed convolution's gain is per input channel: 4 taps of 2 strides each fall on an output.
        return torch.rand(shape, generator=generator) + 0.5
    if name.endswith("original1"):
        return torch.randn(shape, generator=generator) * 0.3
    if name.endswith("_scale"):
        return torch.rand(shape, generator=generator) * 0.6 + 0.1
    if len(shape) == 1:
        return 1 + 0.3 * torch.randn(shape, generator=generator)
    fan_in = 1 if "embeddings" in name else math.prod(shape[1:])
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)


def load_into_oracle(
    module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype | None = None
) -> nn.Module:
    """Give an oracle module the weights of `state` (the file's names) through its own `load_weight`."""
    for name, tensor in state.items():
        tensor = tensor if dtype is None else tensor.to(dtype)
        if name == _FILE_TABLE:
            module.load_weight((_ORACLE_TABLE, tensor))
        elif name.startswith(("audio_tokenizer.", "acoustic_transformer.")):
            module.load_weight((name.split(".", 1)[1], tensor))
    return module


def oracle_latents(tokenizer: nn.Module, waveform: Tensor) -> Tensor:
    """Float32 latents `[1, latent_dim, frames]` of one clip `[samples]`: `_tokenize_audio` less autocast."""
    x = waveform[None, None]
    x = nn.functional.pad(x, (0, -x.shape[-1] % tokenizer.patch_size))
    return tokenizer._forward_encoder(x)


def oracle_velocity(transformer: nn.Module, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Velocity `[batch, 36]` of x `[batch, 36]` at times t `[batch]` given h `[batch, dim]`, in h's dtype."""
    emb = transformer.time_embedding(t.view(-1, 1)).to(h.dtype)
    return transformer._predict_velocity(
        x_t=x, llm_proj=transformer.llm_projection(h), t_proj=transformer.time_projection(emb)
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over largest absolute value."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def codes_equal_up_to_ties(
    latents: Tensor, codes_a: Tensor, codes_b: Tensor, codebook: Tensor, levels: int, margin: float = 1e-5
) -> bool:
    """Whether two codings of `latents` `[batch, latent_dim, frames]` differ only where the choice is a tie.

    A semantic code may differ where the two chosen rows of `codebook` `[size, dim]` are, relative to the
    distance, within `margin` of equally far; an acoustic one by one level where the value to be rounded lies
    within `margin` of a half, relative to the range of levels.
    """
    assert codes_a.shape == codes_b.shape
    semantic_dim = codebook.shape[1]
    points, scalars = latents[:, :semantic_dim].double().transpose(1, 2), latents[:, semantic_dim:].double()
    rows = codebook.double()
    far_a = (points - rows[codes_a[:, 0]]).norm(dim=-1)
    far_b = (points - rows[codes_b[:, 0]]).norm(dim=-1)
    semantic_ok = (codes_a[:, 0] == codes_b[:, 0]) | ((far_a - far_b).abs() <= margin * far_a.clamp(min=1))
    scaled = (scalars.tanh() + 1) / 2 * (levels - 1)
    to_half = (scaled - scaled.floor() - 0.5).abs()
    apart = (codes_a[:, 1:] - codes_b[:, 1:]).abs()
    acoustic_ok = (apart == 0) | ((apart == 1) & (to_half <= margin * (levels - 1)))
    return bool(semantic_ok.all() and acoustic_ok.all())
