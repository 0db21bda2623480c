"""The codes of a checkpoint's presets: examples of what the language model says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import list_voices, load_voice
from revox.coding.errors import CodingError
from revox.model.voxtral import Voxtral

MAX_FRAMES = 4000  # five minutes of speech: enough for statistics of codes
EXPLAINED = 0.9  # of a preset's frames must be recovered exactly


def preset_codes(
    folder: Path | str,
    model: Voxtral,
    max_frames: int = MAX_FRAMES,
    should_stop: Callable[[], bool] | None = None,
    only: Collection[str] | None = None,
) -> list[Tensor]:
    """Codes `[37, frames]` of a checkpoint's presets, stored or recovered from their embeddings, in order.

    `model` needs only its embedding table, `only` names the presets (None: all). Those that this table does
    not explain are left out, and so is what comes after `max_frames` frames. Raises CodingError when
    `should_stop`, called before each preset, is true: statistics of some of the presets would give other
    codes.
    """
    folder = Path(folder)
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    found: list[Tensor] = []
    for entry in list_voices(folder):
        if should_stop is not None and should_stop():
            raise CodingError("stopped before the codes of the presets were known")
        if only is not None and entry.name not in only:
            continue
        if not entry.preset or entry.problem or sum(c.shape[1] for c in found) >= max_frames:
            continue
        try:
            voice = load_voice(folder, entry.name)
        except VoiceError:  # `revox inspect` reports a damaged preset; the others serve here
            continue
        codes = voice.codes
        if codes is None:
            recovered = recover_codes(voice.embedding, table, model.config)
            explained = float(recovered.exact.float().mean()) > EXPLAINED
            codes = recovered.codes[:, recovered.exact] if explained else None
        if codes is not None and codes.shape[1]:
            found.append(codes)
    return found
