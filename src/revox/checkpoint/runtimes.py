"""What other runtimes do with a checkpoint: one table of facts, each row with its source and its date.

`revox inspect` and `revox deploy` take what they say from here. Later versions may differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuntimeFacts:
    """A runtime as it was read.

    version: the newest at hand. voice_ending: of the voices' files that it reads. extra_frame: it feeds an
    `[AUDIO]` after the prompt, where the first frame is read at the prompt's last token, so that all frames
    are one position off. any_size: sizes come from params.json, and are not compiled in. encoder: it uses the
    codec's encoder. quantized: what it does with weights in fewer bits, FP8 apart. fp8: how it has FP8.
    read: when the source was read.
    """

    name: str
    version: str
    voice_ending: str
    extra_frame: bool
    any_size: bool
    encoder: bool
    quantized: str
    fp8: str | None
    source: str
    read: str

    @property
    def title(self) -> str:
        """Its name with the version that the facts are of."""
        return f"{self.name} {self.version}"


VLLM_OMNI = RuntimeFacts(
    "vllm-omni", "0.30.0", ".pt", extra_frame=False, any_size=True, encoder=True,
    quantized="does not read quantized weights",
    fp8="quantizes the language model as it loads (quantization: fp8); reads FP8 weights, unchecked here",
    source="wheel vllm_omni 0.30.0: model_executor/models/voxtral_tts/voxtral_tts_audio_generation.py, "
    "entrypoints/openai/tts_adapters/voxtral.py",
    read="2026-11-29",
)  # fmt: skip
MLX_AUDIO = RuntimeFacts(
    "mlx-audio", "0.6.2", ".safetensors", extra_frame=False, any_size=True, encoder=False,
    quantized="reads its own 4 and 8 bits",
    fp8=None,
    source="wheel mlx_audio 0.6.2: tts/models/voxtral_tts/voxtral_tts.py, generate",
    read="2026-11-29",
)  # fmt: skip
C_PORT = RuntimeFacts(
    "voxtral-tts.c", "1fa7475", ".pt", extra_frame=True, any_size=False, encoder=False,
    quantized="reads its own INT8 variant only",
    fp8=None,
    source="github.com/mudler/voxtral-tts.c at 1fa7475: voxtral_tts.c, tts_generate; quantize_model.py",
    read="2026-11-29",
)  # fmt: skip
RUST_PORT = RuntimeFacts(
    "voxtral_tts_rs", "0da2701", ".pt", extra_frame=True, any_size=True, encoder=False,
    quantized="does not start",
    fp8=None,
    source="github.com/second-state/voxtral_tts_rs at 0da2701: src/inference.rs, generate",
    read="2026-11-29",
)  # fmt: skip
RUNTIMES = (VLLM_OMNI, MLX_AUDIO, C_PORT, RUST_PORT)
