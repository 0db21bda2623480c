"""Tags: the record in the container's standard comment, and a hash of the sound beside it.

Every container but raw PCM has a place for a comment: INFO `ICMT` in WAV, the Vorbis comment `DESCRIPTION` in
FLAC and Ogg, ID3v2 `TXXX` "comment" in MP3 and before ADTS, `©cmt` in M4A; FFmpeg calls them all "comment".
Packets of sound are copied, not coded again. A tag is not signed: whoever can change the sound can change the
tag as well.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any, BinaryIO

from revox.marking.errors import MarkError
from revox.marking.record import SENTENCE, MarkRecord
from revox.speech import FORMATS

KEY = "comment"
_CUSTOM_KEY = "digitalsourcetype"  # in the containers that take any key
# Playlist formats could make FFmpeg open other files or addresses: no protocol is allowed. And 16-bit WAV is
# not searched for other codecs in disguise, which costs ten times as much as all the rest.
_READING = {"protocol_whitelist": "none", "max_probe_packets": "1"}
_LONGEST_COMMENT = 8192  # characters
# FFmpeg's name for a container when it reads, by its name when it writes.
_READ_AS = {"wav": "wav", "flac": "flac", "mp3": "mp3", "ogg": "ogg", "adts": "aac", "ipod": "mov"}


def add_tags(encoded: BinaryIO, tagged: BinaryIO, format: str, record: MarkRecord, manifest: bool) -> None:
    """Copy a file of `format` to another, empty one, with the record in its comment; packets are copied.

    manifest: whether a manifest will be added, so that its removal can be noticed. Raises MarkError on data
    that is not audio of that format.
    """
    import av

    note = {**record.plain(), "manifest": manifest, "sound": sound_hash(encoded)}
    comment = f"{SENTENCE} {json.dumps(note, sort_keys=True, separators=(',', ':'))}"
    kind = FORMATS[format]
    options = {"fflags": "+bitexact"}
    if kind.container == "adts":
        options["write_id3v2"] = "1"
    encoded.seek(0)
    try:
        with (
            av.open(encoded, "r", options=_READING) as source,
            av.open(tagged, "w", format=kind.container, options=options) as target,
        ):
            found = source.format.name
            if found.split(",")[0] != _READ_AS[kind.container]:
                raise MarkError(f"the audio is {found}, not {format}; name its own format")
            stream = source.streams.audio[0]
            copy = target.add_stream_from_template(stream)
            # Ogg has its comments in the stream, the others in the file.
            holder = copy if kind.container == "ogg" else target
            holder.metadata.update({KEY: comment, _CUSTOM_KEY: record.source_type})
            if chapters := source.chapters():
                target.set_chapters(chapters)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
    except MarkError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise MarkError(f"the audio cannot be tagged as {format} ({error}); encode it again") from None


def read_tags(data: bytes) -> dict[str, Any] | None:
    """The record in a file's comment, unchecked; {} when it is damaged, None without one.

    Raises MarkError when the data is not audio.
    """
    import av

    try:
        with _opened(data) as container:
            places = [container.metadata, *(stream.metadata for stream in container.streams.audio)]
            comments = [text for place in places for key, text in place.items() if key.lower() == KEY]
            has_sound = bool(container.streams.audio)
    except (av.error.FFmpegError, ValueError, OSError, EOFError):
        raise MarkError("it cannot be read as an audio file; give one that plays") from None
    if not has_sound:
        raise MarkError("there is no sound in it; give an audio file")
    for comment in comments:
        text = comment[:_LONGEST_COMMENT]
        if text.startswith(SENTENCE):
            try:
                note = json.loads(text[len(SENTENCE) :])
            except (ValueError, RecursionError):
                return {}
            return note if isinstance(note, dict) else {}
    return None


def sound_hash(data: bytes | BinaryIO) -> str:
    """SHA-256, in hexadecimal, of what makes the sound: codec, rate, channels, codec header and every packet.

    Tags, manifests and the order of a container's parts do not count. Raises MarkError when the data is not
    audio.
    """
    import av

    digest = hashlib.sha256()
    try:
        with _opened(data) as container:
            stream = container.streams.audio[0]
            context = stream.codec_context
            if context is None:  # an unknown codec
                raise ValueError
            digest.update(f"{context.name} {context.sample_rate} {context.channels} ".encode())
            digest.update(context.extradata or b"")
            for packet in container.demux(stream):
                digest.update(packet)
    except (av.error.FFmpegError, IndexError, ValueError, OSError, EOFError):
        raise MarkError("the sound cannot be read to its end; give an audio file that plays") from None
    return digest.hexdigest()


def _opened(data: bytes | BinaryIO) -> Any:
    import av

    file = io.BytesIO(data) if isinstance(data, bytes) else data
    file.seek(0)
    return av.open(file, "r", metadata_errors="replace", options=_READING)
