"""A checkpoint in this process as an endpoint, for what needs no server."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from revox.endpoints.endpoint import SpeechAnswer, SpeechQuery
from revox.speech import FORMATS, Audio, encode_audio

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.checkpoint.voices import Voice


def _ignore(warning: object) -> None:
    """Bad takes are found by whoever checks the answers, alike for all endpoints."""


class CheckpointEndpoint:
    """A loaded checkpoint; one utterance at a time, several streams are what `revox serve` is for."""

    kind = "checkpoint"
    streams = clones = True
    formats = tuple(name for name in FORMATS if name != "wav-float")
    max_streams: int | None = 1

    def __init__(self, tts: Revox, name: str) -> None:
        self.tts, self.name = tts, name
        self.rate: int | None = tts.sampling_rate
        self._turn = threading.Lock()
        self._cloned: dict[bytes, Voice] = {}

    def facts(self) -> dict[str, str]:
        """Its folder's name, device and weights."""
        tts = self.tts
        return {
            "kind": self.kind,
            "model": tts.folder.name,
            "device": str(tts.device),
            "weights": tts.weights,
        }

    def voices(self) -> list[str]:
        """The voices of the checkpoint."""
        return self.tts.voices()

    def speak(self, query: SpeechQuery) -> SpeechAnswer:
        """Speak. What a server would refuse is an answer with the status 400."""
        from revox.checkpoint.errors import CheckpointError
        from revox.coding.errors import CodingError
        from revox.speech import AudioError
        from revox.synthesis.errors import SpeakError

        answer = SpeechAnswer(None, "pcm" if query.stream else query.response_format, self.rate)
        with self._turn:
            started = time.perf_counter()
            try:
                self._speak(query, answer, started)
                answer.status = 200
            except (CheckpointError, CodingError, AudioError, SpeakError) as error:
                answer.status, answer.message = 400, str(error)
            answer.seconds = time.perf_counter() - started
        return answer

    def _speak(self, query: SpeechQuery, answer: SpeechAnswer, started: float) -> None:
        voice, seed = self._voice(query), query.seed or 0
        if not query.stream:
            spoken_whole = self.tts.speak(query.text, voice, seed=seed, report=_ignore)
            answer.content = encode_audio(spoken_whole, query.response_format)[0]
            return
        spoken: list[np.ndarray] = []
        for chunk in self.tts.stream(query.text, voice, seed=seed, report=_ignore):
            now = time.perf_counter() - started
            answer.first_audio = now if answer.first_audio is None else answer.first_audio
            spoken.append(chunk.samples)
            answer.arrivals.append((now, sum(map(len, spoken)) / chunk.rate))
        audio = Audio(np.concatenate(spoken) if spoken else np.zeros(0, np.float32), self.tts.sampling_rate)
        answer.content = encode_audio(audio, "pcm")[0]

    def _voice(self, query: SpeechQuery) -> Voice | str:
        if query.reference is None:
            return query.voice or next(iter(self.voices()), "")
        from revox.speech import read_audio

        clip = query.reference
        if clip.content not in self._cloned:
            recording = read_audio(clip.content)
            self._cloned[clip.content] = self.tts.clone(
                recording, consent=clip.consent or "", transcript=clip.transcript
            )
        return self._cloned[clip.content]

    def close(self) -> None:
        """Nothing to end."""
