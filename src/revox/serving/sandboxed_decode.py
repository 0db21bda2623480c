"""Decode an untrusted recording in a process of its own, which may crash without harm.

A file of a kilobyte can decode to hours of silence, declare a million channels, or exploit a bug in a
decoder. The decoding process therefore has limits on memory and time that the system enforces, cannot open or
write files, and stops at the allowed seconds. The server sees only finite float32 samples, or a message.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from revox.speech import Audio, AudioError

MEMORY_BYTES = 512 << 20
"""Memory for decoding on top of the interpreter and its libraries (enforced on Linux)."""

SECONDS = 30.0
"""The time limit of one decoding; a minute of speech takes a hundredth of that."""

UNUSABLE = 3
"""The status of the process when the recording is at fault."""

_SILENCE = (  # a WAV of 64 samples, 8 kHz
    b"RIFF\xa4\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x80\0\0\0" + bytes(128)
)


def sandboxed_decode(data: bytes, rate: int, max_seconds: float, seconds: float = SECONDS) -> Audio:
    """The first audio stream of a file's bytes, complete, mono at `rate` Hz.

    Raises AudioError on what is not audio, is longer than `max_seconds`, or takes more time (`seconds`) or
    memory than a recording needs.
    """
    passed_on = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    environment = {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **{name: os.environ[name] for name in passed_on if name in os.environ},
    }
    command = "from revox.serving.sandboxed_decode import decode_stdin; decode_stdin()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command, str(rate), repr(float(max_seconds)), repr(float(seconds))],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            cwd="/",
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AudioError(
            f"The recording takes longer than {seconds:g} s to decode; convert it to WAV or FLAC."
        ) from None
    if done.returncode == UNUSABLE:
        raise AudioError(done.stdout.decode())
    if done.returncode:
        raise AudioError(
            "The recording takes more memory or time to decode than it should; convert it to WAV or FLAC."
        )
    return Audio(np.frombuffer(done.stdout, dtype="<f4"), rate)


def decode_stdin() -> None:
    """The process: set its limits, then turn the recording on stdin into samples on stdout.

    Ends with status 0, or UNUSABLE and a sentence on stdout.
    """
    rate, max_seconds, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    from revox.speech import stream_audio

    # Decode once before files are closed off, so that everything loaded at first use is loaded.
    for _ in stream_audio(_SILENCE, rate + 1):
        pass
    data = sys.stdin.buffer.read()
    _limit(seconds)
    try:
        # One second more than allowed shows whether there is more.
        blocks = stream_audio(data, rate, max_seconds=max_seconds + 1.0)
        samples = np.concatenate([np.zeros(0, np.float32), *(block.samples for block in blocks)])
        if len(samples) > round(max_seconds * rate):
            raise AudioError(f"The recording is longer than {max_seconds:g} s; send the relevant part.")
        if not len(samples):
            raise AudioError("The recording holds no audio samples; record or copy it again.")
        answer, status = samples.astype("<f4").tobytes(), 0
    except AudioError as error:
        answer, status = str(error).replace("The given audio", "The recording").encode(), UNUSABLE
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    os._exit(status)  # what the decoder left behind is not torn down under these limits


def _limit(seconds: float) -> None:
    """Limit memory and time from here on; no new files, no core dump."""
    import resource

    statm = Path("/proc/self/statm")
    if statm.exists():  # macOS has this limit too, but does not enforce it
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    whole = int(seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))
