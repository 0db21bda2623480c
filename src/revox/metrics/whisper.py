"""Transcripts by a Whisper (arXiv 2212.04356), from a local folder or the hub, through faster-whisper."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.locate import HUB_ID, fetch
from revox.metrics.errors import MetricError
from revox.speech.audio import Audio

_RATE = 16000
_FILES = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")
_CONVERT = (
    "a Whisper of transformers is converted by `ct2-transformers-converter --model MODEL --output_dir FOLDER "
    "--copy_files tokenizer.json preprocessor_config.json`"
)


class WhisperRecognizer:
    """Transcribes speech with any Whisper in CTranslate2's format. Needs the extra `whisper`.

    The same sound gives the same words: beam search of width 5, no sampling, no second try at a higher
    temperature, and no text carried from one window of 30 s to the next. Weights are computed in int8 on a
    CPU and in float16 on CUDA.

    Args:
        source: a folder, or a hub id such as `Systran/faster-whisper-base`, which is downloaded once.
        device: "cuda" or "cuda:N"; every other device means the CPU, on torch's number of threads.
        language: of the speech, for multilingual models; None: the model finds it.

    Raises MetricError when faster-whisper is missing or the model cannot be found or loaded.
    """

    def __init__(self, source: str, device: str = "cpu", language: str | None = "en") -> None:
        import torch

        folder = Path(source).expanduser()
        local = bool(source) and folder.is_dir()
        if not local:
            _check_hub_id(source)
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise MetricError(
                "Whisper needs faster-whisper; install it with `pip install 'revox[whisper]'`"
            ) from None
        if not local:
            try:
                folder = fetch(source, _FILES)
            except CheckpointError as error:
                raise MetricError(str(error)) from None
        missing = [name for name in ("model.bin", "tokenizer.json") if not (folder / name).is_file()]
        if missing:
            raise MetricError(
                f"{source} is not a faster-whisper model, it has no {' and no '.join(missing)}; {_CONVERT}"
            )
        kind, _, index = device.partition(":")
        where = {"device": "cpu", "compute_type": "int8", "cpu_threads": torch.get_num_threads()}
        if kind == "cuda":
            where = {"device": kind, "compute_type": "float16", "device_index": int(index or 0)}
        try:
            self._model = WhisperModel(str(folder), **where)
        except Exception as error:  # tokenizers raises Exception itself
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise MetricError(
                f"{source} cannot be loaded as a faster-whisper model on {where['device']} ({why}); copy or "
                "download it again, or choose another --device"
            ) from None
        self._language = language

    def transcribe(self, audio: Audio) -> str:
        """The words, as Whisper writes them; "" for silence."""
        samples = audio.at(_RATE).samples
        if not np.any(samples):
            return ""
        segments, _ = self._model.transcribe(
            samples,
            language=self._language,
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
        )
        return " ".join(filter(None, (segment.text.strip() for segment in segments)))


def _check_hub_id(source: str) -> None:
    if source.startswith("openai/whisper"):
        raise MetricError(
            f"{source} is a Whisper of transformers; give a faster-whisper model, for example "
            f"Systran/faster-{source.removeprefix('openai/')}"
        )
    if not HUB_ID.fullmatch(source):
        raise MetricError(
            f"there is no recognizer {source!r}; give none, pocketsphinx, or a faster-whisper model as "
            "whisper:FOLDER or whisper:OWNER/NAME (for example whisper:Systran/faster-whisper-base)"
        )
