"""Clips packed into a few large files, read at the speed of the disk.

A shard is a plain tar file, `revox-00000.tar`: first `index.jsonl` (a line on the shard, then one for each
clip: speaker, language, transcript, seconds, the rate of its origin, and `at` and `bytes`: where its file
lies beyond the index), then the clips as FLAC or Ogg Opus files. `tar -tf` lists it; nothing in it is ever
unpacked or executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from revox.speech.files import replace_file
from revox.training.data.errors import DataError
from revox.training.data.pool import cores, in_order
from revox.training.data.sources import Progress, Source
from revox.training.data.stream import ClipStream
from revox.training.data.table import Clip

_FORMAT = "revox-shard-1"
_INDEX = "index.jsonl"
_PIECE = 60.0  # seconds: longer recordings are cut into pieces, so that a draw decodes little
_CHUNK = 16  # clips a worker encodes at a time
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote. `skipped` lists (key, reason) of clips that could not be decoded in this run."""

    shards: list[Path]
    clips: int
    seconds: float
    bytes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)


def pack(
    sources: Sequence[Source],
    folder: str | Path,
    *,
    codec: Literal["opus", "flac"] = "opus",
    rate: int = 24000,
    max_shard_bytes: int = 256 << 20,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack every clip of `sources` into shards in `folder`: mono, `rate` Hz, again a source.

    Opus takes 64 kbit/s (30 MB an hour), FLAC is lossless at 16 bits and takes two to three times that. A
    clip over a minute becomes several of up to a minute, without its transcript; the level is kept. Each
    shard is written beside and renamed, and is the same whatever `workers` is (all cores; 0: none); a run
    that was interrupted goes on behind the last whole shard. One shard is held in memory.

    Raises DataError when `folder` holds shards of other clips or settings.
    """
    folder = Path(folder)
    if codec not in ("opus", "flac"):
        raise DataError(f"shards are packed as opus or flac, not as {codec}")
    if rate not in (8000, 12000, 16000, 24000, 48000) and codec == "opus":
        raise DataError(f"Opus knows no {rate} Hz; pack at 24000 Hz or as flac")
    folder.mkdir(parents=True, exist_ok=True)
    plan = _fingerprint(sources, codec, rate, max_shard_bytes)
    done, shards = _packed_already(folder, plan)
    total = sum(len(s.clips) for s in sources if not isinstance(s.clips, ClipStream))
    known = total if total and not any(s.streamed for s in sources) else None
    writer = _Shard(folder, plan, len(shards), done)
    skipped: list[tuple[str, str]] = []
    work = partial(_encoded, codec, rate)
    chunks = _chunks(sources, done)
    for results in in_order(work, chunks, cores() if workers is None else workers):
        for key, pieces in results:
            if isinstance(pieces, str):
                skipped.append((key, pieces))
                writer.skipped += 1
            elif writer.pieces and writer.bytes + sum(len(data) for _, data in pieces) > max_shard_bytes:
                shards.append(writer.write())
                writer = _Shard(folder, plan, len(shards), done)
            if not isinstance(pieces, str):
                writer.pieces += pieces
            done += 1
            writer.after = done
        if progress:
            progress("packing", done, known)
    if writer.pieces or writer.skipped:
        shards.append(writer.write())
    if not any(_lines(path)[1:] for path in shards):
        why = f"; the first: {skipped[0][1]}" if skipped else ""
        raise DataError(f"none of {done} clips could be decoded{why}")
    heads = [_lines(path) for path in shards]
    return Packed(
        shards,
        sum(len(lines) - 1 for lines in heads),
        sum(one["seconds"] for lines in heads for one in lines[1:]),
        sum(path.stat().st_size for path in shards),
        skipped,
    )


def is_shard(path: str | Path) -> bool:
    """Whether a tar file is one of these."""
    try:
        with open(path, "rb") as file:
            head = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
            return head.name == _INDEX and _FORMAT.encode() in file.read(256)
    except (OSError, tarfile.TarError):
        return False


def shard_clips(path: str | Path, name: str | None = None) -> Iterator[Clip]:
    """The clips of a shard; keys begin with `name` (else `path`). Raises DataError if it is cut short."""
    begin, lines = _index(path)
    for one in lines[1:]:
        yield Clip(
            f"{path if name is None else name}@{begin + one['at']}+{one['bytes']}",
            one["speaker"],
            one["language"],
            one["transcript"],
            one["seconds"],
            one["rate"],
        )


def read_shard(path: str | Path) -> Iterator[tuple[Clip, bytes]]:
    """The clips of a shard with their files, in one pass from front to end."""
    clips = list(shard_clips(path))
    with open(path, "rb", buffering=1 << 20) as file:
        for clip in clips:
            at, length = map(int, clip.key.rpartition("@")[2].split("+"))
            file.seek(at)
            yield clip, file.read(length)


def _index(path: str | Path) -> tuple[int, list[dict[str, Any]]]:
    """Where the clips begin, and the lines of the index."""
    damaged = f"{path} is no whole shard of speech; copy or pack it again"
    try:
        with open(path, "rb") as file:
            head = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
            lines = [json.loads(line) for line in file.read(head.size).splitlines()]
        begin = _BLOCK + _padded(head.size)
        if lines[0]["format"] != _FORMAT:
            raise DataError(f"{path} is a shard of another version; pack it again")
        ends = max((one["at"] + one["bytes"] for one in lines[1:]), default=0)
        if Path(path).stat().st_size < begin + ends or len(lines) - 1 != lines[0]["clips"]:
            raise DataError(damaged)
    except (ValueError, KeyError, TypeError, IndexError, tarfile.TarError):
        raise DataError(damaged) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return begin, lines


def _lines(path: Path) -> list[dict[str, Any]]:
    return _index(path)[1]


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


class _Shard:
    """A shard that grows in memory until it is written."""

    def __init__(self, folder: Path, plan: str, number: int, first: int) -> None:
        self.path, self.plan = folder / f"revox-{number:05d}.tar", plan
        self.first = self.after = first
        self.skipped = 0
        self.pieces: list[tuple[dict[str, Any], bytes]] = []

    @property
    def bytes(self) -> int:
        """Of the clips so far, each with its header."""
        return sum(_BLOCK + _padded(len(data)) for _, data in self.pieces)

    def write(self) -> Path:
        """Write it beside its place and rename."""
        head = {"format": _FORMAT, "plan": self.plan, "first": self.first, "after": self.after}
        lines: list[dict[str, Any]] = [{**head, "skipped": self.skipped, "clips": len(self.pieces)}]
        at = _BLOCK  # beyond the clip's own header
        for one, data in self.pieces:
            lines.append({**one, "at": at, "bytes": len(data)})
            at += _padded(len(data)) + _BLOCK
        index = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

        def content(file: Any) -> None:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, data in [(_INDEX, index), *((one["file"], data) for one, data in self.pieces)]:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

        replace_file(self.path, content)
        return self.path


def _packed_already(folder: Path, plan: str) -> tuple[int, list[Path]]:
    """How many clips the whole shards of an earlier run cover, and those shards."""
    shards: list[Path] = []
    done = 0
    for path in sorted(folder.glob("revox-*.tar")):
        head = _lines(path)[0]
        if head["plan"] != plan or path.name != f"revox-{len(shards):05d}.tar" or head["first"] != done:
            raise DataError(
                f"{folder} holds shards of other clips or settings ({path.name}); pack into another folder, "
                "or delete them"
            )
        shards.append(path)
        done = head["after"]
    return done, shards


def _fingerprint(sources: Sequence[Source], codec: str, rate: int, max_shard_bytes: int) -> str:
    """A hash of what is packed and how: an interrupted run goes on only with the same."""
    digest = hashlib.sha256(repr((codec, rate, max_shard_bytes)).encode())
    for source in sources:
        digest.update(source.name.encode())
        for clip in () if isinstance(source.clips, ClipStream) else source.clips:
            digest.update(clip.key.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


_Item = tuple[Clip, "str | bytes"]


def _chunks(sources: Sequence[Source], skip: int) -> Iterator[list[_Item]]:
    """Clips with their files in the order of the plan, from number `skip` on."""
    chunk: list[_Item] = []
    for source in sources:
        if isinstance(source.clips, ClipStream):
            items: Iterator[_Item] = source.clips.once()
        else:
            jump, skip = min(skip, len(source.clips)), skip - min(skip, len(source.clips))
            clips = source.clips
            items = ((clips[i], clips[i].key) for i in range(jump, len(clips)))
        for item in items:
            if skip:
                skip -= 1
                continue
            chunk.append(item)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


_Pieces = list[tuple[dict[str, Any], bytes]]


def _encoded(codec: str, rate: int, chunk: list[_Item]) -> list[tuple[str, _Pieces | str]]:
    """For each clip its pieces (index entry, file), or why there are none."""
    from revox.speech import AudioError

    results: list[tuple[str, _Pieces | str]] = []
    for clip, source in chunk:
        pieces: _Pieces | str
        try:
            pieces = _pieces(clip, source, codec, rate)
        except (AudioError, DataError, ValueError, MemoryError) as error:
            pieces = str(error)
        except OSError as error:
            pieces = f"{clip.key} cannot be read ({error.strerror})"
        results.append((clip.key, pieces))
    return results


def _pieces(clip: Clip, source: str | bytes, codec: str, rate: int) -> _Pieces:
    from revox.speech import audio_header, encode_audio, stream_audio
    from revox.training.data.locate import clip_source

    data = clip_source(source) if isinstance(source, str) else source
    origin = clip.rate
    if origin is None:
        with contextlib.suppress(ValueError):
            origin = audio_header(data)[1]
    seconds = clip.seconds or 0.0
    # Pieces of one length rather than a minute and a rest of nothing.
    block = seconds / math.ceil(seconds / _PIECE) + 0.01 if seconds > _PIECE else _PIECE
    audios = list(_bounded(stream_audio(data, rate, block_seconds=block)))
    name = hashlib.sha256(clip.key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return [
        (
            {
                "file": f"{name}-{i:03d}.{codec}",
                "key": clip.key.rpartition("/")[2],
                "speaker": clip.speaker,
                "language": clip.language,
                "transcript": clip.transcript if len(audios) == 1 else None,
                "seconds": round(audio.seconds, 4),
                "rate": min(origin, rate) if origin else rate,
            },
            encode_audio(audio, codec)[0],
        )
        for i, audio in enumerate(audios)
    ]


def _bounded(audios: Iterator[Any]) -> Iterator[Any]:
    """Without a last piece of nothing but rounding."""
    for i, audio in enumerate(audios):
        if i == 0 or audio.seconds > 0.1:
            yield audio
