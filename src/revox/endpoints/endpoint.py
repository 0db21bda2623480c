"""What is asked of a speech endpoint, and what came back, when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from revox.speech import Audio

PCM_BYTES = {"pcm": 2, "pcm-float": 4}
"""Bytes a sample of answers without a header: little-endian, mono, 16 bit or float32."""


@dataclass(frozen=True)
class ReferenceClip:
    """A recording to clone: the bytes of its file, its transcript, whose voice it is and that they agreed."""

    content: bytes
    transcript: str | None = None
    consent: str | None = None


@dataclass(frozen=True)
class SpeechQuery:
    """A text to speak, in a voice of the endpoint or in that of a reference clip.

    `stream` asks for raw samples while they are made, where the endpoint can; else the whole is a file of
    `response_format`. `seed` is sent to endpoints that know one.
    """

    text: str
    voice: str | None = None
    reference: ReferenceClip | None = None
    seed: int | None = None
    response_format: str = "wav"
    stream: bool = False


@dataclass
class SpeechAnswer:
    """What came back: the file (or raw samples) and when its parts came, in seconds from the request.

    `status` is HTTP's; None means that there was no answer (no connection, a time limit), and `message` says
    why. `arrivals` of a stream: (seconds, seconds of speech so far), only where the samples can be counted;
    `first_audio` is the arrival of its first sample.
    """

    status: int | None
    response_format: str = "wav"
    rate: int | None = None
    content: bytes = b""
    seconds: float = 0.0
    first_audio: float | None = None
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is something to decode."""
        return self.status == 200 and bool(self.content) and not self.message

    def audio(self) -> Audio:
        """The speech, mono at its own rate. Raises AudioError when it cannot be decoded."""
        import numpy as np

        from revox.speech import AudioError, read_audio

        if self.response_format not in PCM_BYTES:
            return read_audio(self.content)
        size = PCM_BYTES[self.response_format]
        if not self.content or len(self.content) % size:
            raise AudioError(f"The answer has {len(self.content)} bytes, not whole samples of {size}.")
        samples = np.frombuffer(self.content, "<i2" if size == 2 else "<f4").astype(np.float32)
        return Audio(samples / 2**15 if size == 2 else np.nan_to_num(samples), self.rate or 24_000)


class Endpoint(Protocol):
    """Something that speaks. Any number of threads may call `speak`, unless `max_streams` says less.

    name: short and unique among those opened together. kind: of its adapter. rate: Hz that it promises, or
    None. streams: whether it sends audio while it is made. clones: whether it takes a `reference`. formats:
    the file formats that it offers.
    """

    name: str
    kind: str
    rate: int | None
    streams: bool
    clones: bool
    formats: tuple[str, ...]
    max_streams: int | None

    def facts(self) -> dict[str, str]:
        """What is known of it: address, model, version."""

    def voices(self) -> list[str]:
        """The names of its voices; empty if it lists none. Raises EndpointError when it does not answer."""

    def speak(self, query: SpeechQuery) -> SpeechAnswer:
        """Ask for speech. A refusal or a lost connection is in the answer, not an exception."""

    def close(self) -> None:
        """End it; what is being spoken fails."""
