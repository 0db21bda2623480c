"""A codec encoder from a file: read for scoring and for nothing else."""

from __future__ import annotations

from pathlib import Path

from revox.checkpoint.load import codec_with_encoder
from revox.model.codec import Codec


def original_codec(checkpoint: Path, encoder: Path) -> Codec:
    """The checkpoint's codec with the encoder of the file `encoder` (`codec_with_encoder`).

    For scoring only: a method that restores the encoder must never see the original, so the recovery
    experiment's fence refuses this module.
    """
    return codec_with_encoder(checkpoint, encoder)
