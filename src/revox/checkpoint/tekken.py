"""tekken.json as far as a checkpoint needs it: the lengths of its voices, and whether it is this model's."""

from __future__ import annotations

from pathlib import Path

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import Params, read_json


def read_tekken(folder: str | Path, params: Params) -> dict[str, int]:
    """Rows of each voice's embedding as tekken.json lists them (mistral-common builds prompts from it).

    Raises CheckpointError when the file is missing or damaged, or not of the checkpoint of `params`.
    """
    path = Path(folder) / "tekken.json"
    codec = params.multimodal.audio_tokenizer_args
    rate = params.multimodal.audio_model_args.audio_encoding_args.frame_rate
    data = read_json(path)
    audio = data.get("audio")
    if not isinstance(audio, dict):
        raise CheckpointError(
            f"{path} has no audio section, so no voice can be prompted; copy the release's file."
        )
    for key, wanted in (("sampling_rate", codec.sampling_rate), ("frame_rate", rate)):
        if audio.get(key) != wanted:
            raise CheckpointError(
                f"{path}: audio.{key} is {audio.get(key)!r}, where params.json says {wanted!r}; "
                "copy both files from one checkpoint."
            )
    rows = audio.get("voice_num_audio_tokens") or {}
    if not isinstance(rows, dict) or not all(type(count) is int and count > 0 for count in rows.values()):
        raise CheckpointError(
            f"{path}: audio.voice_num_audio_tokens should give each voice its rows; copy the file again."
        )
    size = (data.get("config") or {}).get("default_vocab_size")
    if isinstance(size, int) and size > params.vocab_size:
        raise CheckpointError(
            f"{path} has {size} tokens and params.json a vocab_size of {params.vocab_size}; "
            "copy both files from one checkpoint."
        )
    return dict(rows)
