"""Transcripts by a Whisper (arXiv 2212.04356), from a local folder or the hub, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from revox.metrics.errors import MetricError
from revox.speech.audio import Audio

_RATE = 16000
_WINDOW = 30 * _RATE


class WhisperRecognizer:
    """Transcribes speech with any Whisper by path or hub id. Needs the extra `whisper`.

    Weights are read from safetensors only, never from pickles, and no code in the model's folder is run.
    Multilingual models are told that it is English. Raises MetricError when transformers is missing or the
    model cannot be loaded.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        import torch

        try:
            from transformers import WhisperForConditionalGeneration, WhisperProcessor
        except ImportError:
            raise MetricError(
                "Whisper needs transformers; install it with `pip install 'revox[whisper]'`"
            ) from None
        try:
            self._processor = WhisperProcessor.from_pretrained(source)
            self._model = WhisperForConditionalGeneration.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "folder" if Path(source).is_dir() else "hub id or folder"
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise MetricError(
                f"{source} cannot be loaded as a Whisper ({why}); name the {what} of a Whisper with "
                "config.json, tokenizer and model.safetensors"
            ) from None
        self._model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        multilingual = getattr(self._model.generation_config, "is_multilingual", False)
        self._options: dict[str, Any] = {"language": "en", "task": "transcribe"} if multilingual else {}

    def transcribe(self, audio: Audio) -> str:
        """The words, as Whisper writes them, in pieces of 30 s; "" for silence."""
        import torch

        samples = audio.at(_RATE).samples
        texts = []
        for start in range(0, len(samples), _WINDOW):
            piece = samples[start : start + _WINDOW]
            if not np.any(piece):
                continue
            inputs = self._processor(
                piece, sampling_rate=_RATE, return_tensors="pt", return_attention_mask=True
            )
            with torch.inference_mode():
                ids = self._model.generate(
                    inputs.input_features.to(self._model.device, self._model.dtype),
                    attention_mask=inputs.attention_mask.to(self._model.device),
                    do_sample=False,
                    **self._options,
                )
            texts.append(self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
        return " ".join(filter(None, texts))
