"""The subject of an evaluation: a checkpoint, how codes are found, and the models that score."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revox.api import Revox, find_device, find_dtype, load
from revox.checkpoint.voices import Voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.student import STUDENT_FILE, student_folder, trained_student
from revox.evaluation.cache import Cache, file_identity, folder_identity
from revox.evaluation.clips import Clip
from revox.evaluation.errors import EvaluationError
from revox.metrics.intelligibility import Recognizer, load_recognizer
from revox.metrics.naturalness import NaturalnessModel
from revox.metrics.perceptual import installed
from revox.metrics.speaker import SpeakerVerifier
from revox.model.codec import Codec
from revox.speech import Audio, normalize_loudness, read_audio, whole_frames, write_audio
from revox.speech.files import stamp_of

VERSION = 4
"""Of codes and speech: those of older versions are made again."""
SCORES_VERSION = 6
"""Of the scores of sounds."""
SCORERS = ("pesq", "pystoi", "faster-whisper", "whisper-normalizer", "distillmos")
"""Packages whose version may change a score."""

MIN_SECONDS = 1.0


@dataclass(frozen=True)
class Setup:
    """Everything a measurement depends on, apart from the clip; plain values, for other processes.

    `method`, `refine` and `steps`: how codes are found (`CodingSettings`). `encoder`: a file with the
    codec's encoder. `seconds`: the most that is used of each clip. `seeds`: how many, where something is
    random. `recognizer`: "none", "pocketsphinx" or "whisper:" and a path or hub id. `grammar`: JSGF text for
    pocketsphinx. `texts`: to be spoken. `dtype`: the arithmetic's, by name. `naturalness`: whether
    DistillMOS scores sounds; None: if it is installed. `identity`, `scorers`: see `identified`.
    """

    checkpoint: Path
    out: Path
    method: str = "auto"
    encoder: Path | None = None
    refine: int = 0
    steps: int | None = None
    seconds: float = 10.0
    seeds: int = 3
    recognizer: str = "none"
    grammar: str | None = None
    texts: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    naturalness: bool | None = None
    identity: str = ""
    scorers: str = ""

    def identified(self) -> Setup:
        """The same with the `identity` of what codes and speech depend on, and that of the `scorers`."""
        student = student_folder(self.checkpoint) / STUDENT_FILE
        identity = stamp_of(
            VERSION,
            folder_identity(self.checkpoint),
            file_identity(self.encoder) if self.encoder else None,
            *([file_identity(student)] if self.method in ("student", "best") and student.is_file() else []),
            *([self.dtype] if self.dtype else []),
        )
        whisper = Path(self.recognizer_model).expanduser()
        files = sorted(path for path in whisper.iterdir() if path.is_file()) if whisper.is_dir() else []
        scorers = stamp_of(
            SCORES_VERSION,
            {path.name: file_identity(path) for path in files},
            [installed(package) for package in SCORERS],
        )
        return dataclasses.replace(self, identity=identity, scorers=scorers)

    @property
    def recognizer_model(self) -> str:
        """The recognizer without the word before its colon."""
        return self.recognizer.removeprefix("whisper:")

    @property
    def coding(self) -> CodingSettings:
        """How codes are found. Raises CodingError for settings that are not possible."""
        return CodingSettings(self.method, self.refine, self.steps)

    def coding_key(self) -> list[object]:
        """What the codes of a clip depend on."""
        return [self.identity, self.method, self.refine, self.steps, self.seconds]

    def key(self) -> list[object]:
        """What a clip's scores depend on."""
        scored = [self.scorers, self.seeds, self.recognizer, self.grammar, self.texts, self.naturalness]
        return [*self.coding_key(), *scored]


@lru_cache(maxsize=1)
def open_subject(setup: Setup) -> Subject:
    """The subject of `setup`, opened once in each process."""
    return Subject(setup)


def measured(
    what: str, measure: Callable[..., dict[str, Any]], setup: Setup, *about: Clip | str | None
) -> Any:
    """`measure(subject, *about)`, from the cache if it was measured before; `what` names the measurement."""
    subject = open_subject(setup)
    parts = [[file_identity(one.path), one.name, one.text] if isinstance(one, Clip) else one for one in about]
    return subject.cache.record(stamp_of(what, parts, setup.key()), lambda: measure(subject, *about))


class Subject:
    """A checkpoint under evaluation, with the models that score; each part is loaded on first use."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.cache = Cache(setup.out / "cache")
        self.sounds = setup.out / "sounds"

    @cached_property
    def tts(self) -> Revox:
        """The checkpoint; only the parts that are used are loaded."""
        return load(self.setup.checkpoint, self.setup.device, find_dtype(self.setup.dtype), lazy=True)

    @cached_property
    def coder(self) -> Coder:
        """What finds codes: the checkpoint's own, or with the encoder of a file."""
        if self.setup.encoder is None:
            return self.tts.coder
        from revox.evaluation.reference_encoder import original_codec

        codec = original_codec(self.setup.checkpoint, self.setup.encoder).to(self.tts.device)
        return Coder(
            codec, self.tts.coder.preset_codes, student=partial(trained_student, self.setup.checkpoint)
        )

    @property
    def codec(self) -> Codec:
        """The codec in float32."""
        return self.coder.codec

    @cached_property
    def verifier(self) -> SpeakerVerifier:
        """The speaker-verification model."""
        return SpeakerVerifier()

    @cached_property
    def recognizer(self) -> Recognizer | None:
        """The recognizer, or None when none was asked for."""
        return load_recognizer(self.setup.recognizer, self.setup.grammar, str(find_device(self.setup.device)))

    @cached_property
    def naturalness(self) -> NaturalnessModel | None:
        """What scores naturalness, or None when that is not measured."""
        return NaturalnessModel() if self.setup.naturalness else None

    @property
    def rate(self) -> int:
        """Hz of everything that is compared."""
        return self.codec.config.sampling_rate

    def reference(self, clip: Clip) -> Audio:
        """The part of a clip that is measured: its first seconds, mono, leveled, in whole frames.

        Raises AudioError when it cannot be read, EvaluationError when it is too short or silent.
        """
        audio = read_audio(clip.path, rate=self.rate, max_seconds=self.setup.seconds)
        if audio.seconds < MIN_SECONDS:
            raise EvaluationError(f"{clip.name} has {audio.seconds:.1f} s, and at least 1 s is needed")
        if not np.isfinite(audio.samples).all() or not np.any(audio.samples):
            raise EvaluationError(f"{clip.name} is silent or damaged")
        samples = normalize_loudness(audio.samples, self.rate)
        return Audio(whole_frames(samples, self.codec.samples_per_frame, self.rate), self.rate)

    def codes(self, clip: Clip) -> Tensor:
        """Codes `[37, frames]` of a clip, by the method under evaluation."""
        key = stamp_of("codes", file_identity(clip.path), self.setup.coding_key())
        return self.cache.codes(key, lambda: (self.encode(self.reference(clip)), True))[0]

    def encode(self, audio: Audio, method: str | None = None) -> Tensor:
        """Codes `[37, frames]` of `audio` at the codec's rate, by the method under evaluation or another."""
        settings = self.setup.coding if method is None else CodingSettings(method)
        found = find_codes(self.coder, torch.from_numpy(audio.samples.copy()), settings)
        if found.stopped:  # by Ctrl-C: an unfinished search is not a measurement
            raise KeyboardInterrupt
        return found.codes

    def decoded(self, codes: Tensor) -> Audio:
        """The sound of `codes` `[37, frames]`."""
        device = self.codec.output_proj.conv.weight.device
        return Audio(self.codec.decode(codes[None].to(device))[0].float().cpu().numpy(), self.rate)

    def voice(self, codes: Tensor) -> Voice:
        """The voice of `codes` `[37, frames]`."""
        model = self.tts.model
        with torch.inference_mode():
            embedding = model.mm_audio_embeddings.voice_embedding(codes.to(model.device))
        return Voice("clone", codes, embedding.cpu().to(torch.bfloat16), {})

    def spoken(self, text: str, voice: Voice, seed: int) -> tuple[Tensor, bool]:
        """The codes `[37, frames]` of the model's speech of `text` in `voice`, and whether it ended itself.

        The limit is about twice the time that slow speech takes.
        """
        content = voice.embedding.contiguous().view(torch.int16).numpy().tobytes()
        key = stamp_of("speech", self.setup.identity, hashlib.sha256(content).hexdigest(), text, seed)

        def make() -> tuple[Tensor, bool]:
            speech = self.tts.synthesize(text, voice, seed=seed, max_seconds=3 + len(text) / 5)
            return speech.codes, not speech.audio.truncated

        return self.cache.codes(key, make)

    def save_sound(self, clip: Clip, row: str, audio: Audio) -> str:
        """Write a sound for the report; returns its path relative to the report."""
        stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{clip.name}-{row}")[-80:]
        # Scores that were measured before keep their sound: that of other settings has another name.
        name = f"{stem}-{stamp_of(clip.name, row, self.setup.key())[:8]}.mp3"
        self.sounds.mkdir(parents=True, exist_ok=True)
        write_audio(self.sounds / name, audio)
        return f"sounds/{name}"


def clip_seed(clip: Clip, seed: int) -> int:
    """A seed of its own for each clip: the same noise for all would hide how much clips differ."""
    return zlib.crc32(f"{clip.name} {seed}".encode())


def random_codes(codec: Codec, frames: int, seed: int) -> Tensor:
    """Codes `[37, frames]`, each uniform over its codebook."""
    generator = torch.Generator().manual_seed(seed)
    config = codec.config
    semantic = torch.randint(config.semantic_codebook_size, (1, frames), generator=generator)
    acoustic = torch.randint(
        config.acoustic_codebook_size, (config.acoustic_dim, frames), generator=generator
    )
    return torch.cat((semantic, acoustic))


def noise_like(audio: Audio, seed: int) -> Audio:
    """White noise of the length and root mean square of `audio`."""
    level = float(np.sqrt(np.mean(audio.samples.astype(np.float64) ** 2)))
    noise = np.random.default_rng(seed).standard_normal(len(audio.samples)) * level
    return Audio(noise.astype(np.float32), audio.rate)
