"""What is measured and by whom: a checkpoint, a way from sound to codes, and the judges. One a process."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revox.api import Revox, load
from revox.checkpoint.voices import Voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.evaluation.cache import Cache, content_hash, file_identity, folder_identity, key_of
from revox.evaluation.clips import Clip
from revox.evaluation.errors import EvaluationError
from revox.metrics.intelligibility import Recognizer, load_recognizer
from revox.metrics.perceptual import installed
from revox.metrics.speaker import SpeakerVerifier
from revox.model.codec import Codec
from revox.speech import Audio, normalize_loudness, read_audio, whole_frames, write_audio

VERSION = 3
"""Of the measurements: what an older one measured is measured again."""

MIN_SECONDS = 1.0


@dataclass(frozen=True)
class Setup:
    """Everything a measurement depends on, apart from the clip; plain values, so that it can be sent to
    another process.

    `method`, `refine` and `steps`: how codes are found (`CodingSettings`); `encoder`: a file with the lab's
    reference encoder; `seconds` that are taken of each clip; `seeds`: how many, where there is
    chance; `recognizer`: "none", "pocketsphinx" or a Whisper by path or hub id; `grammar`: JSGF text for
    pocketsphinx; `texts` to be spoken.
    """

    checkpoint: Path
    out: Path
    method: str = "encoder"
    encoder: Path | None = None
    refine: int = 0
    steps: int | None = None
    seconds: float = 10.0
    seeds: int = 3
    recognizer: str = "none"
    grammar: str | None = None
    texts: tuple[str, ...] = ()
    device: str | None = None
    identity: str = ""

    def identified(self) -> Setup:
        """The same with the `identity` of all files that results depend on, and of the judges."""
        local = Path(self.recognizer)
        whisper = ""
        if local.is_dir():
            whisper = key_of(files={p.name: file_identity(p) for p in sorted(local.iterdir()) if p.is_file()})
        identity = key_of(
            version=VERSION,
            checkpoint=folder_identity(self.checkpoint),
            encoder=file_identity(self.encoder) if self.encoder else None,
            whisper=whisper,
            pesq=installed("pesq"),
            pystoi=installed("pystoi"),
        )
        return dataclasses.replace(self, identity=identity)

    @property
    def coding(self) -> CodingSettings:
        """How codes are found. Raises CodingError for settings that are not possible."""
        return CodingSettings(self.method, self.refine, self.steps)

    def coding_key(self) -> dict[str, object]:
        """What the codes of a clip depend on."""
        return {
            "identity": self.identity,
            "method": self.method,
            "refine": self.refine,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def key(self) -> dict[str, object]:
        """What a clip's scores depend on."""
        return {
            **self.coding_key(),
            "seeds": self.seeds,
            "recognizer": self.recognizer,
            "grammar": self.grammar,
            "texts": list(self.texts),
        }


@lru_cache(maxsize=1)
def open_subject(setup: Setup) -> Subject:
    """The subject of `setup`, opened once in each process."""
    return Subject(setup)


class Subject:
    """A checkpoint under test, with its judges; each part is loaded when it is first asked for."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.cache = Cache(setup.out / "cache")
        self.sounds = setup.out / "sounds"
        self.sounds.mkdir(parents=True, exist_ok=True)

    @cached_property
    def tts(self) -> Revox:
        """The checkpoint, of which only what is used is loaded."""
        return load(self.setup.checkpoint, device=self.setup.device, lazy=True)

    @cached_property
    def coder(self) -> Coder:
        """What finds codes: the checkpoint's own, or with the lab's reference encoder."""
        if self.setup.encoder is None:
            return self.tts.coder
        from revox.evaluation.reference_encoder import original_codec

        codec = original_codec(self.setup.checkpoint, self.setup.encoder)
        return Coder(codec, self.tts.coder.preset_codes)

    @property
    def codec(self) -> Codec:
        """The codec in float32."""
        return self.coder.codec

    @cached_property
    def speakers(self) -> SpeakerVerifier:
        """The speaker judge."""
        return SpeakerVerifier()

    @cached_property
    def recognizer(self) -> Recognizer | None:
        """The recognizer, or None when none was asked for."""
        return load_recognizer(self.setup.recognizer, self.setup.grammar, self.setup.device or "cpu")

    @property
    def preset_codes(self) -> list[Tensor]:
        """Codes `[37, frames]` of the presets, as far as they can be recovered from their embeddings."""
        return self.coder.preset_codes()

    @property
    def rate(self) -> int:
        """Hz of everything that is compared."""
        return self.codec.config.sampling_rate

    def reference(self, clip: Clip) -> Audio:
        """What is measured of a clip: its first seconds, mono, levelled, in whole frames.

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
        """Codes `[37, frames]` of a clip, by the method under test."""
        key = key_of(what="codes", clip=file_identity(clip.path), **self.setup.coding_key())
        return self.cache.codes(key, lambda: (self.encode(self.reference(clip)), True))[0]

    def encode(self, audio: Audio, method: str | None = None) -> Tensor:
        """Codes `[37, frames]` of `audio` at the codec's rate, by the method under test or another."""
        settings = self.setup.coding if method is None else CodingSettings(method)
        found = find_codes(self.coder, torch.from_numpy(audio.samples.copy()), settings)
        if found.stopped:  # by Ctrl-C: a search that was not finished is not a measurement
            raise KeyboardInterrupt
        return found.codes

    def decoded(self, codes: Tensor) -> Audio:
        """The sound of `codes` `[37, frames]`."""
        device = self.codec.output_proj.conv.weight.device
        return Audio(self.codec.decode(codes[None].to(device))[0].float().cpu().numpy(), self.rate)

    def voice(self, codes: Tensor, name: str = "clone") -> Voice:
        """The voice of `codes` `[37, frames]`."""
        with torch.inference_mode():
            embedding = self.tts.model.mm_audio_embeddings.voice_embedding(codes.to(self.tts.model.device))
        return Voice(name, codes, embedding.cpu().to(torch.bfloat16), {})

    def spoken(self, text: str, voice: Voice, seed: int) -> tuple[Tensor, bool]:
        """The codes `[37, frames]` that the model speaks `text` with in `voice`, and whether it ended itself.

        It is given about twice the time that slow speech takes.
        """
        rows = content_hash(voice.embedding.contiguous().view(torch.int16).numpy().tobytes())
        key = key_of(what="speech", identity=self.setup.identity, rows=rows, text=text, seed=seed)

        def make() -> tuple[Tensor, bool]:
            said = self.tts.synthesize(text, voice, seed=seed, max_seconds=3 + len(text) / 5)
            return said.codes, not said.audio.truncated

        return self.cache.codes(key, make)

    def keep_sound(self, clip: Clip, row: str, audio: Audio) -> str:
        """Write a sound for the report; its path beside it."""
        stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{clip.name}-{row}")[-80:]
        name = f"{stem}-{key_of(clip=clip.name, row=row)[:8]}.mp3"
        write_audio(self.sounds / name, audio)
        return f"sounds/{name}"


def chance(clip: Clip, seed: int) -> int:
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
