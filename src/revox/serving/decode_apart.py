"""Decode a stranger's recording in a process of its own, which may die without harm.

A file of a kilobyte can decode to hours of silence, claim a million channels, or find a mistake in a decoder.
So the decoding process has limits of memory and time that the system enforces, may open and write no file,
and stops at the seconds allowed. The server only ever sees finite float32 samples, or a sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.speech import Audio, AudioError

MEMORY_BYTES = 512 << 20
"""What decoding may take on top of the interpreter and its libraries (enforced on Linux)."""

SECONDS = 30.0
"""The longest that a decoding may take; a minute of speech takes a hundredth of that."""

_SOUND = (  # a WAV of 64 samples of silence, 8 kHz
    b"RIFF\xa4\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x80\0\0\0" + bytes(128)
)


def decode_apart(data: bytes, rate: int, max_seconds: float, seconds: float = SECONDS) -> Audio:
    """The first audio stream of a file's bytes, mono at `rate` Hz, all of it.

    Raises AudioError, one sentence, on what is no audio, lasts longer than `max_seconds`, or takes more time
    (`seconds`) or memory than a recording does.
    """
    if not data:
        raise AudioError("The recording is empty (0 bytes); send a whole audio file.")
    package = str(Path(__file__).resolve().parents[2])
    environment = {
        "PYTHONPATH": package,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **{
            name: os.environ[name]
            for name in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
            if name in os.environ
        },
    }
    command = "from revox.serving.decode_apart import serve_one; serve_one()"
    child = subprocess.Popen(
        [sys.executable, "-c", command, str(rate), repr(float(max_seconds)), repr(float(seconds))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
    )
    try:
        answer, _ = child.communicate(data, timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise AudioError(
            f"The recording takes longer than {seconds:g} s to decode; convert it to WAV or FLAC."
        ) from None
    except BaseException:
        child.kill()
        child.communicate()
        raise
    header, _, body = answer.partition(b"\n")
    try:
        said = json.loads(header)
    except ValueError:
        raise AudioError(
            "The recording takes more memory or time to decode than it should; convert it to WAV or FLAC."
        ) from None
    if "error" in said:
        raise AudioError(str(said["error"]))
    return Audio(np.frombuffer(body, dtype="<f4"), rate)


def serve_one() -> None:
    """What the process does: its limits first, then a recording from stdin to samples on stdout."""
    rate, max_seconds, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    from revox.speech import stream_audio

    # Once through everything, so that all that is loaded when first used is there before files are closed
    # off.
    for _ in stream_audio(_SOUND, rate + 1):
        pass
    data = sys.stdin.buffer.read()
    _limit(seconds)
    out = sys.stdout.buffer
    blocks, held = [], 0
    try:
        # A little more than allowed, to know that there was more.
        for block in stream_audio(data, rate, max_seconds=max_seconds + 1.0, block_seconds=10.0):
            blocks.append(block.samples)
            held += len(block.samples)
        if held > round(max_seconds * rate):
            raise AudioError(f"The recording is longer than {max_seconds:g} s; send the part that matters.")
        samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        if not len(samples):
            raise AudioError("The recording holds no audio samples; record or copy it again.")
        _answer(out, {"samples": len(samples)}, np.ascontiguousarray(samples, "<f4").tobytes())
    except AudioError as error:
        _answer(out, {"error": str(error).replace("The given audio", "The recording")}, b"")


def _answer(out: BinaryIO, header: dict[str, Any], body: bytes) -> None:
    out.write(json.dumps(header).encode() + b"\n")
    out.write(body)
    out.flush()


def _limit(seconds: float) -> None:
    """From here on: so much memory and time, no new file, no core dump."""
    import resource

    statm = Path("/proc/self/statm")
    if statm.exists():  # macOS has this limit too, but does not keep it
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    whole = int(seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))
