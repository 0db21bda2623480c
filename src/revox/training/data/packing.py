"""Packing of speech into Shar shards, lhotse's format: a few large files in place of many small ones.

lhotse's SharWriter encodes in the process that calls it; here workers encode, and its two file writers write.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.training.data.errors import DataError
from revox.training.data.hub import ClipStream
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_record, cut_source
from revox.training.data.pool import in_order
from revox.training.data.shar import CUTS, shard_cuts
from revox.training.data.sources import SpeechSource
from revox.training.errors import library

_PIECE = 60.0  # seconds: longer recordings are divided, so that a draw decodes little

_Clip = tuple[dict[str, Any], "str | bytes"]  # what `cut_record` takes, and where the audio is
_Pieces = list[tuple[dict[str, Any], bytes]]  # cuts with their files


def pack(
    sources: Sequence[SpeechSource],
    folder: str | Path,
    *,
    codec: Literal["opus", "flac"] = "opus",
    rate: int = 24000,
    clips_per_shard: int = 2000,
    workers: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[tuple[str, str]]:
    """Pack every clip of `sources` into Shar shards in `folder`: mono, `rate` Hz, again a source.

    Opus takes 64 kbit/s (30 MB an hour), FLAC is lossless at 16 bits and takes two to three times that. A
    clip over a minute becomes several of up to a minute, without its transcript. The shards are the same for
    any number of `workers` (default: all cores; 0: this process). A run that was interrupted continues with
    the shard that it was writing.

    Gives (id, reason) of the clips that could not be decoded in this run. Raises DataError when `folder`
    holds shards of other clips or settings.
    """
    shar = library("lhotse.shar")
    if codec == "opus" and rate not in (8000, 12000, 16000, 24000, 48000):
        raise DataError(f"Opus cannot have {rate} Hz; pack at 24000 Hz or as flac")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(sources, codec, rate, clips_per_shard)
    number = _last_shard(folder, plan)  # it may lack its end, and is written again
    clips = itertools.islice(_clips(sources), number * clips_per_shard, None)
    encoded = in_order(partial(_encoded, codec, rate), clips, workers)
    skipped: list[tuple[str, str]] = []
    while results := list(itertools.islice(encoded, clips_per_shard)):
        cuts, tar = (folder / f"{name}.{number:06d}" for name in ("cuts", "recording"))
        with (
            shar.JsonlShardWriter(f"{cuts}.jsonl.gz", None) as lines,
            shar.TarWriter(f"{tar}.tar", None) as files,
        ):
            for result in results:
                if isinstance(result, tuple):
                    skipped.append(result)
                    continue
                for record, data in result:
                    record["custom"]["plan"] = plan
                    files.write(f"{record['id']}.{codec}", BytesIO(data))
                    files.write(f"{record['id']}.json", BytesIO(json.dumps(record["recording"]).encode()))
                    lines.write(record)
        number += 1
        progress(Progress("packing", number * clips_per_shard))
    return skipped


def _last_shard(folder: Path, plan: str) -> int:
    """The number of the last shard in `folder`, 0 when there is none. Raises DataError for another plan's."""
    shards = sorted(path for path in folder.iterdir() if CUTS.fullmatch(path.name))
    for path in shards[:1]:
        if next(shard_cuts(path), {}).get("custom", {}).get("plan") != plan:
            raise DataError(
                f"{folder} holds shards of other clips or settings ({path.name}); pack into another folder, "
                "or delete them"
            )
    return int(shards[-1].name.split(".")[1]) if shards else 0


def _plan(sources: Sequence[SpeechSource], *settings: Any) -> str:
    """A hash of what is packed and how: an interrupted run continues only with the same."""
    digest = hashlib.sha256(repr(settings).encode())
    for source in sources:
        digest.update(source.name.encode())
        if not isinstance(source.cuts, ClipStream):
            digest.update(source.cuts.rows["id"].tobytes())
    return digest.hexdigest()[:16]


def _clips(sources: Sequence[SpeechSource]) -> Iterator[_Clip]:
    for source in sources:
        for cut in source.cuts:
            supervision, origin = cut.supervisions[0], (cut.custom or {}).get("origin_rate")
            facts = {
                "cut_id": cut.id,
                "speaker": supervision.speaker,
                "language": supervision.language,
                "text": supervision.text,
                "seconds": cut.duration,
                "origin_rate": origin or cut.recording.sampling_rate,
            }
            yield facts, cut_source(cut)


def _encoded(codec: str, rate: int, clip: _Clip) -> _Pieces | tuple[str, str]:
    """The pieces of a clip, or its id and why there are none."""
    try:
        return _pieces(codec, rate, *clip)
    except (DataError, ValueError, MemoryError, OSError) as error:  # AudioError is a ValueError
        return clip[0]["cut_id"], str(error)


def _pieces(codec: str, rate: int, facts: dict[str, Any], audio: str | bytes) -> _Pieces:
    from revox.speech import encode_audio, stream_audio

    seconds = facts["seconds"]
    # Pieces of equal length rather than a minute and a rest of nothing.
    block = seconds / math.ceil(seconds / _PIECE) + 0.01 if seconds > _PIECE else _PIECE
    parts = list(stream_audio(audio_source(audio), rate, block_seconds=block))
    parts = parts[:1] + [part for part in parts[1:] if part.seconds > 0.1]
    name = hashlib.sha256(facts["cut_id"].encode("utf-8", "surrogateescape")).hexdigest()[:16]
    text = facts["text"] if len(parts) == 1 else None
    pieces = []
    for i, part in enumerate(parts):
        changed = {"cut_id": f"{name}-{i:03d}", "text": text, "seconds": part.seconds, "rate": rate}
        changed["origin_rate"] = min(facts["origin_rate"] or rate, rate)
        record = cut_record(**{**facts, **changed}, source="")
        record["recording"]["sources"][0]["type"] = "shar"
        pieces.append((record, encode_audio(part, codec)[0]))
    return pieces
