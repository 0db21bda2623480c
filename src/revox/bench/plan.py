"""What is measured, and what one request gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from revox.bench.errors import BenchError
from revox.endpoints import Endpoint, ReferenceClip, SpeechQuery

TEXTS = (
    "The train to the coast leaves at ten past seven from the second platform.",
    "We kept the old map because nobody had drawn a better one since the river changed its course.",
    "Please close the window; the rain is coming in.",
    "After the meeting they walked home slowly, talking about the summer, and about everything that they "
    "would do when the work was finally over.",
    "Thank you, that is very kind.",
    "Most of the letters had been read so often that the paper had gone soft along the folds, and one of "
    "them could only be opened with care, since it had once been wet and had dried in the sun.",
)
"""Sentences of 29 to 190 characters, without numbers and names."""

STATISTICS = ("mean", "min", "p50", "p95", "max")


@dataclass(frozen=True)
class BenchPlan:
    """Texts and voices take turns over `requests` requests (at least one a stream) at each of `streams`.

    voices: None takes those that an endpoint lists. warmup: requests before anything is counted.
    """

    texts: tuple[str, ...] = TEXTS
    voices: tuple[str, ...] | None = None
    reference: ReferenceClip | None = None
    requests: int = 10
    streams: tuple[int, ...] = (1, 4, 16)
    warmup: int = 1
    formats: bool = True
    seed: int = 0

    def levels(self, endpoint: Endpoint) -> list[tuple[str, int]]:
        """(mode, streams): whole files one by one, then streams; whole files only where it cannot stream."""
        levels = [n for n in self.streams if endpoint.max_streams is None or n <= endpoint.max_streams]
        if not endpoint.streams:
            return [("whole", n) for n in sorted({1, *levels})]
        return [("whole", 1), *(("stream", n) for n in levels)]

    def query(self, number: int, voices: list[str], mode: str, response_format: str = "wav") -> SpeechQuery:
        """The request with this number, always the same one."""
        return SpeechQuery(
            text=self.texts[number % len(self.texts)],
            voice=voices[number % len(voices)] if voices else None,
            reference=self.reference if not voices else None,
            seed=self.seed + number,
            response_format=response_format,
            stream=mode == "stream",
        )

    def voices_of(self, endpoint: Endpoint) -> list[str]:
        """The voices that are asked for; none where a reference is cloned, or the server lists none.

        Raises BenchError for a voice that the endpoint does not list.
        """
        if self.reference is not None:
            return []
        listed = endpoint.voices()
        if self.voices is None:
            return listed
        known = {name.lower() for name in listed}
        for name in self.voices:
            if listed and name.lower() not in known:
                some = ", ".join(listed[:10])
                raise BenchError(f"{endpoint.name} has no voice {name!r}; it lists {some}.")
        return list(self.voices)


@dataclass(frozen=True)
class RequestResult:
    """One request. Times in seconds from its start; None where there is nothing to measure.

    `speech` is the length of what was spoken, `ran_dry` whether a player that starts at the first audio would
    have waited. `transcript`: by the recognizer.
    """

    endpoint: str
    mode: str
    streams: int
    number: int
    text: str
    voice: str | None
    response_format: str
    status: int | None
    seconds: float
    first_audio: float | None = None
    speech: float | None = None
    ran_dry: bool | None = None
    size: int = 0
    problems: tuple[str, ...] = ()
    transcript: str | None = None

    @property
    def failed(self) -> bool:
        """Whether there was no speech."""
        return self.speech is None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds a second of speech took."""
        return self.seconds / self.speech if self.speech else None


@dataclass
class BenchResult:
    """Everything that was measured. `stopped` says why it ended before its time; walls: by (endpoint, mode,
    streams), the seconds of that level as a whole; neighbor: what the probe found."""

    environment: dict[str, str]
    endpoints: dict[str, dict[str, Any]]
    requests: list[RequestResult] = field(default_factory=list)
    walls: dict[tuple[str, str, int], float] = field(default_factory=dict)
    neighbor: dict[str, Any] | None = None
    stopped: str | None = None
