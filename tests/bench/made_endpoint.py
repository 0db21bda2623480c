"""An endpoint that speaks made sound, as it is told to."""

from __future__ import annotations

import threading

import numpy as np

from revox.endpoints import SpeechAnswer
from revox.speech import Audio, encode_audio
from revox.synthesis.split import expected_seconds

RATE = 24_000


def speech(seconds, rate=RATE, level=0.3):
    """Bursts of a tone, as syllables are, that fade at both ends."""
    t = np.arange(round(seconds * rate)) / rate
    envelope = np.minimum(1, np.minimum(t, seconds - t) / 0.05) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    return Audio((level * envelope * np.sin(2 * np.pi * 180 * t)).astype(np.float32), rate)


class MadeEndpoint:
    """`tell`: query -> SpeechAnswer, in the place of the default answer."""

    kind, rate, clones, max_streams = "openai", RATE, False, None

    def __init__(self, name="made", streams=True, formats=("wav", "flac"), tell=None):
        self.name, self.streams, self.formats, self.tell = name, streams, formats, tell
        self.asked, self.closed = [], False
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    def facts(self):
        return {"address": "http://made", "kind": self.kind, "model": "tts-1"}

    def voices(self):
        return ["ada", "bea"]

    def speak(self, query):
        with self._lock:
            self.asked.append(query)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self.tell(query) if self.tell else self.answer(query)
        finally:
            with self._lock:
                self._now -= 1

    def answer(self, query):
        audio = speech(expected_seconds(query.text))
        name = "pcm" if query.stream else query.response_format
        answer = SpeechAnswer(200, name, RATE, encode_audio(audio, name)[0], 0.5 * audio.seconds)
        if query.stream:
            answer.first_audio = 0.1
            answer.arrivals = [(0.1, 0.5), (0.4, audio.seconds)]
        return answer

    def close(self):
        self.closed = True
