"""One clip cloned, two sentences spoken in its voice and in a preset's: figures, and marked sounds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from revox.api import Revox
from revox.cloning.clone import ClonedVoice
from revox.doctor.checkpoint_under_test import longest_reading
from revox.marking import load_signer, new_record, write_marked
from revox.metrics.errors import MetricError
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio, read_audio
from revox.stages import Facts

SENTENCES = (
    "Please open the window in the kitchen.",
    "The next plane to the city leaves at quarter past four.",
)


@dataclass(frozen=True)
class CloneTrial:
    """The `clip` to clone and whose it is; `name` is what marks call the checkpoint."""

    clip: Path
    consent: str
    name: str

    def run(self, tts: Revox, out: Path) -> tuple[Facts, ClonedVoice]:
        """Clone the clip, speak, and write the sounds (`decoded`, `clone-0` ...) as WAV into `out`.

        Raises AudioError or CloneError for a clip that cannot be cloned.
        """
        began = time.perf_counter()
        voice = tts.clone(self.clip, consent=self.consent)
        took, signer = time.perf_counter() - began, load_signer()
        sounds = {"decoded": voice.decoded}
        rows = []
        for name, who in (("clone", voice), ("preset", tts.voice(tts.voices()[0]))):
            for i, text in enumerate(SENTENCES):
                began = time.perf_counter()
                audio = tts.synthesize(text, who, max_seconds=longest_reading(text)).audio
                spent = time.perf_counter() - began
                sounds[f"{name}-{i}"] = audio
                rows.append(
                    {
                        "voice": name, "text": text, "seconds": round(audio.seconds, 2),
                        "ended": not audio.truncated,
                        "times real time": round(audio.seconds / spent, 2) if spent else None,
                    }
                )  # fmt: skip
        for name, audio in sounds.items():
            if audio.samples.size:
                write_marked(out / f"{name}.wav", audio, record=new_record(self.name, name), signer=signer)
        return {
            "method": voice.coding.method, "clone_seconds": round(took, 2),
            "distance": round(voice.distance, 4), "spoken": rows,
            "similarity": _similarity(self.clip, sounds),
        }, voice  # fmt: skip


def _similarity(clip: Path, sounds: dict[str, Audio]) -> dict[str, float] | None:
    """Resemblyzer's cosine of each sound to the clip; None without it."""
    try:
        verifier = SpeakerVerifier()
    except MetricError:
        return None
    own = verifier.embed(read_audio(clip))
    return {
        name: round(verifier.similarity(verifier.embed(audio), own), 3)
        for name, audio in sounds.items()
        if audio.seconds > 0.5
    }
