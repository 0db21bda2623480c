"""The checkpoint under test: what is loaded, decoded and spoken once serves all checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from revox.api import Revox
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.release import CONFIG, PRESETS
from revox.checkpoint.tensors import open_tensors, read_header, weight_files
from revox.checkpoint.voice_codes import RecoveredCodes, recover_codes
from revox.checkpoint.voices import Voice, find_voice, list_voices, load_voice
from revox.doctor.findings import TextDependence
from revox.doctor.sound import SoundFigures, measure
from revox.metrics.errors import MetricError
from revox.model.config import VoxtralConfig
from revox.progress import Progress
from revox.speech import Audio
from revox.synthesis.engine import Speech

if TYPE_CHECKING:
    from revox.metrics.intelligibility import Recognizer
    from revox.metrics.speaker import SpeakerVerifier

SENTENCES = (
    "Please open the window in the kitchen.",
    "My number is three one four one five.",
    "We will arrive on Monday at half past nine.",
    "The concert is on Friday the twelfth.",
    "Thank you very much for the book.",
    "The next train to the city leaves at quarter to eight.",
    "Turn left at the bridge and walk for seven minutes.",
    "It will be twenty degrees on Sunday.",
    "Can I have six oranges and two lemons?",
    "The keys are under the table in the hall.",
    "Today is Tuesday the third of March.",
    "Please close the door at ten o'clock.",
)
"""Plain English, also in the small lab model's domain. Voice i says sentence i, cyclically."""

CHARACTERS_A_SECOND = (5.0, 30.0)
"""Read speech has 10 to 20, and languages and moods differ."""
QUICK_VOICES = 4


def longest_reading(text: str) -> float:
    """Seconds that a reading of `text` may take, with one for silence; what takes longer does not end."""
    return len(text) / CHARACTERS_A_SECOND[0] + 1


@dataclass
class CheckpointUnderTest:
    """A checkpoint folder and what is known about it so far.

    `tts` is None until the weights are loaded, and if they cannot be. `suspects` are tensors whose values
    look untrained. `names` are the voices to examine. `text_dependence` is None until it is measured.
    """

    folder: Path
    tts: Revox | None = None
    seed: int = 0
    quick: bool = False
    recognizer: Recognizer | None = None
    names: list[str] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    progress: Callable[[str], None] | None = None
    text_dependence: TextDependence | None = None
    _recovered: dict[str, RecoveredCodes] = field(default_factory=dict)
    _decoded: dict[str, Audio] = field(default_factory=dict)
    _spoken: dict[str, Speech] = field(default_factory=dict)
    _figures: dict[str, SoundFigures] = field(default_factory=dict)

    @cached_property
    def params(self) -> Params:
        """params.json. Raises CheckpointError."""
        return read_params(self.folder)

    @cached_property
    def config(self) -> VoxtralConfig:
        """Sizes of the model."""
        return self.params.voxtral_config()

    @property
    def is_release_sized(self) -> bool:
        """Whether this has the release's sizes: what is known of the release then applies."""
        return self.config == CONFIG

    @property
    def model(self) -> Revox:
        """The loaded checkpoint; only checks that need it are run without `tts` being None."""
        assert self.tts is not None
        return self.tts

    @cached_property
    def verifier(self) -> SpeakerVerifier | str:
        """The speaker-verification model, or the sentence that says how to install it."""
        from revox.metrics.speaker import SpeakerVerifier

        try:
            return SpeakerVerifier()
        except MetricError as error:
            return str(error)

    def update(self, what: str) -> None:
        """Report what is being done."""
        if self.progress is not None:
            self.progress(what)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor as stored, or None when no weight file has it."""
        for path in weight_files(self.folder):
            if name in read_header(path):
                with open_tensors(path) as file:
                    return file.get_tensor(name)
        return None

    def voice(self, name: str) -> Voice:
        """A voice of the folder. Raises VoiceError."""
        return load_voice(self.folder, name)

    def recovered(self, name: str) -> RecoveredCodes:
        """The codes behind a voice embedding."""
        if name not in self._recovered:
            self.update(f"{name}: codes from its embedding")
            table = self.model.model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
            self._recovered[name] = recover_codes(self.voice(name).embedding, table.cpu(), self.config)
        return self._recovered[name]

    def decoded(self, name: str) -> Audio:
        """A voice's own reference: its recovered codes, decoded."""
        if name not in self._decoded:
            codes = self.recovered(name).codes
            self.update(f"{name}: decoding {codes.shape[1]} frames")
            self._decoded[name] = self.model.decode(replace(self.voice(name), codes=codes))
        return self._decoded[name]

    def sentence_of(self, name: str) -> str:
        """The sentence of this voice."""
        return SENTENCES[self.names.index(name) % len(SENTENCES)]

    def spoken(self, name: str) -> Speech:
        """The voice speaking its sentence."""
        if name not in self._spoken:
            text = self.sentence_of(name)
            longest = longest_reading(text)

            def spoken_so_far(progress: Progress) -> None:
                seconds = progress.facts.get("seconds", 0.0)
                self.update(f"{name}: speaking, {seconds:.0f} of {longest:.0f} s at most")

            self.update(f"{name}: speaking")
            self._spoken[name] = self.model.synthesize(
                text, name, seed=self.seed, max_seconds=longest, progress=spoken_so_far
            )
        return self._spoken[name]

    def decoded_figures(self, name: str) -> SoundFigures:
        """Measurements of the voice's decoded reference."""
        return self._measured(f"decoded {name}", self.decoded(name))

    def spoken_figures(self, name: str) -> SoundFigures:
        """Measurements of the voice's spoken sentence."""
        return self._measured(f"spoken {name}", self.spoken(name).audio)

    def _measured(self, key: str, audio: Audio) -> SoundFigures:
        if key not in self._figures:
            self._figures[key] = measure(audio)
        return self._figures[key]

    def sounds(self) -> dict[str, dict[str, Audio]]:
        """Everything decoded and spoken so far: kind -> voice -> sound."""
        spoken = {name: speech.audio for name, speech in self._spoken.items()}
        return {"decoded": dict(self._decoded), "spoken": spoken}

    def pair(self) -> list[str]:
        """Two voices, a male and a female one where there are both."""
        males = [name for name in self.names if sex_of(name) == "male"]
        females = [name for name in self.names if sex_of(name) == "female"]
        return [*females[:1], *males[:1]] if males and females else self.names[:2]


def sex_of(name: str) -> str | None:
    """`male` or `female`, as a preset's name says; None for other names."""
    return next((sex for sex in ("female", "male") if name.endswith(f"_{sex}")), None)


def choose_voices(folder: Path, wanted: Sequence[str], quick: bool) -> list[str]:
    """The voices to examine: those of `wanted`, or the presets (the first two of each sex when `quick`).

    Raises VoiceError when one of `wanted` does not exist.
    """
    if wanted:
        return [find_voice(folder, name).name for name in wanted]
    entries = [entry for entry in list_voices(folder) if entry.rows is not None]
    names = [entry.name for entry in entries if entry.name in PRESETS]
    names = names or [entry.name for entry in entries]
    if not quick:
        return names
    by_sex = {sex: [n for n in names if sex_of(n) == sex] for sex in ("female", "male")}
    few = [n for pair in zip(by_sex["female"], by_sex["male"], strict=False) for n in pair][:QUICK_VOICES]
    return few or names[:QUICK_VOICES]
