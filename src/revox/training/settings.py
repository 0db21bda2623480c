"""Settings of a run that restores the encoder, read and checked once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from revox.model.config import CodecConfig
from revox.training.augment import Augmentation
from revox.training.errors import TrainingError

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Settings):
    """What each loss counts; 0 leaves it out, and its cost.

    Of the reconstruction, among themselves: `mel`, `stft`, `waveform`, `feature`, `speaker`.
    Of the latents, beside `reconstruction` as a whole: `semantic` and `acoustic` (pairs), `commitment`,
    `diversity`, `distillation` (Whisper), `soft_semantic` and `soft_acoustic` (the mean posterior of
    students, on everything heard). `hidden` (pairs) acts on hidden states, not on the latents
    (`revox.training.hidden_states`).

    What is 0 was not worth its cost in the lab at equal time (docs/recovery.md), or needs another network.
    """

    mel: Weight = 4.0
    stft: Weight = 1.0
    waveform: Weight = 0.0
    feature: Weight = 0.0
    speaker: Weight = 0.0
    reconstruction: Weight = 1.0
    semantic: Weight = 1.0
    acoustic: Weight = 1.0
    commitment: Weight = 0.1
    diversity: Weight = 0.1
    distillation: Weight = 0.0
    soft_semantic: Weight = 0.0
    soft_acoustic: Weight = 0.0
    hidden: Weight = 0.0

    @property
    def soft(self) -> bool:
        """Whether soft labels count."""
        return bool(self.soft_semantic or self.soft_acoustic)


class Pairs(_Settings):
    """Pairs of codes and the audio decoded from them; see `revox.coding.pairs.PairSettings`.

    Codes are changed little: of codes that nobody would say, the sound tells less (docs/recovery.md).
    `all_pass` is the all-pass augmentation of the audio, in milliseconds of delay
    (`revox.training.all_pass`); 0 is none.
    """

    shortest: Count = 16
    longest: Count = 64
    mixed: float = Field(default=0.0, ge=0, le=1)
    offset: Weight = 0.15
    jitter: Weight = 0.05
    replace: float = Field(default=0.0, ge=0, le=1)
    all_pass: float = Field(default=2.5, ge=0, le=10)


class Discriminator(_Settings):
    """The STFT discriminators: from step `start` on they see a random window of `seconds` of every clip.

    They learn by the hinge loss; the encoder matches their features and gets no adversarial loss of its own
    (Voxtral TTS, arXiv 2603.25551, section 2).
    """

    n_ffts: tuple[Count, ...] = (2048, 1536, 1024, 768, 512, 384, 256, 128)
    channels: Count = 16
    start: int = Field(default=2000, ge=0)
    every: Count = 2
    learning_rate: float = Field(default=3e-4, gt=0)
    seconds: float = Field(default=1.0, gt=0.1)


class EncoderTraining(_Settings):
    """One run. `clips` (recordings), `pairs` and `pseudo_labels` (recordings whose codes were found by
    inversion beforehand) are items a step over all processes, `seconds` their length.

    Pairs alone are `clips: 0`, recordings alone `pairs: 0`.
    """

    steps: Count = 100_000
    clips: int = Field(default=8, ge=0)
    pairs: int = Field(default=8, ge=0)
    pseudo_labels: int = Field(default=0, ge=0)
    seconds: float = Field(default=4.0, gt=0.2, le=60)
    learning_rate: float = Field(default=3e-4, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon takes the matrices of the transformers (`revox.training.optimizers`)."""
    start: Literal["filters", "decoder"] = "filters"
    """Initial weights: a filter bank and noise, or the decoder's transposed (`revox.training.initial`)."""
    scaled_start: bool = False
    """Scale the last convolution at the start, so that latents vary as those of the right codes do."""
    warmup: Count = 500
    decay_steps: Count = 40_000
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: Weight = 0.01
    clip_norm: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an average of the encoder's weights (`revox.training.average`), which is then validated and
    saved in their place; 0 for none."""
    decay: float = Field(default=0.9999, gt=0, le=1)
    """Of the `waveform` and `stft` weights, a step (the paper's gamma)."""
    balance: bool = True
    weights: Weights = Field(default_factory=Weights)
    pair: Pairs = Field(default_factory=Pairs)
    augmentation: Augmentation = Field(default_factory=Augmentation)
    """Of everything heard, and of what the students hear. Labels stay, and a reconstruction is compared with
    the recording as it was changed."""
    discriminator: Discriminator = Field(default_factory=Discriminator)
    resolutions: tuple[tuple[Count, Count], ...] = ((2048, 160), (1024, 100), (512, 60), (256, 30), (128, 15))
    sentences: int = Field(default=20_000, ge=0)
    """Spoken by the model before the first step, for pairs of what it says."""
    interpolated: float = Field(default=0.7, ge=0, le=1)
    """Share of the sentences in interpolated voices, between and around the presets'."""
    pseudo_labeled: int = Field(default=0, ge=0)
    """Recordings whose codes inversion finds before the first step, for `pseudo_labels`."""
    inversion_steps: Count = 160
    """For each of them."""
    students: int = Field(default=0, ge=0)
    """Trained before the first step, on the codes of the pairs, with other seeds; for soft labels."""
    student_steps: Count = 1500
    student_width: Count = 256
    encoders: tuple[str, ...] = ()
    """Encoder files of earlier runs that give soft labels together with the students."""
    whisper: str | None = None
    whisper_cache_gb: Weight = 20.0
    """Of disk at most, for Whisper's states of the recordings, which are computed once where they fit."""
    verifier: str | None = None
    autocast: bool | None = None
    """bf16 arithmetic; None: on a GPU."""
    compile: bool = False
    """Compile the codec (torch.compile): steps are shorter on a GPU, after minutes for the first. Needs a C++
    compiler."""
    likelihood: bool = True
    """Report at each validation how likely the language model finds clips whose words are known. It is loaded
    for that time."""
    seed: int = 0
    save_every: Count = 1000
    keep: Count = 3
    report_every: Count = 50
    validate_every: Count = 1000

    def frames(self, config: CodecConfig) -> int:
        """Frames of an item: `seconds`, rounded to whole frames of the codec."""
        return max(1, round(self.seconds * config.sampling_rate / config.samples_per_frame))

    @model_validator(mode="after")
    def _sensible(self) -> EncoderTraining:
        if not self.clips and not self.pairs and not self.pseudo_labels:
            raise ValueError("clips, pairs and pseudo_labels are all 0: there is nothing to learn from")
        if bool(self.pseudo_labels) != bool(self.pseudo_labeled):
            raise ValueError(
                "pseudo_labels (items a step) and pseudo_labeled (recordings beforehand) go together: set "
                "both above 0, or neither"
            )
        weights = self.weights
        through_decoder = (weights.mel, weights.stft, weights.waveform, weights.feature, weights.speaker)
        if weights.reconstruction and self.clips and not any(through_decoder):
            raise ValueError("reconstruction counts but none of its losses: set weights.reconstruction to 0")
        from_clips = weights.reconstruction or weights.diversity or weights.distillation or weights.soft
        known = self.pairs or self.pseudo_labels
        if not (
            (self.clips and from_clips) or (known and (weights.semantic or weights.acoustic or weights.soft))
        ):
            raise ValueError("all weights of what there is to learn from are 0")
        if weights.soft and not (self.students or self.encoders):
            raise ValueError("soft labels need students or encoders: set students, or name encoders")
        if weights.hidden and (self.compile or not self.pairs):
            raise ValueError("weights.hidden is of pairs, and needs compile: false")
        if self.weights.distillation and not self.whisper:
            raise ValueError("distillation needs a teacher: set whisper to a folder or a hub id")
        if self.weights.distillation and self.seconds > 28:
            raise ValueError("Whisper takes 30 s at once: with distillation, seconds is at most 28")
        if self.weights.speaker and not self.verifier:
            raise ValueError("the speaker loss needs a network: set verifier to a folder or a hub id")
        return self


_RENAMED = (
    ("strangers", "interpolated"), ("labels", "pseudo_labels"), ("inverted", "pseudo_labeled"),
    ("pair.shift", "pair.offset"), ("pair.shake", "pair.jitter"), ("pair.strange", "pair.replace"),
    ("pair.phases", "pair.all_pass"),
)  # fmt: skip
_REMOVED = ("weights.acceptance", "acceptance_clips", "weights.adversarial")


def with_present_names(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings as version 0.1 named them by the names of today, and a sentence for each that changed.

    Raises TrainingError for a weight of the acceptance loss, which is gone.
    """
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in given.items()}
    changes = []
    for old, new in (*_RENAMED, *((name, None) for name in _REMOVED)):
        *groups, name = old.split(".")
        group = found.get(groups[0]) if groups else found
        if not isinstance(group, dict) or name not in group:
            continue
        if new is not None:
            group[new.split(".")[-1]] = group.pop(name)
            changes.append(f"{old} is called {new} now")
        elif name == "acceptance" and group[name]:
            raise TrainingError(f"{old}: there is no such loss any more: set it to 0, or leave it out")
        else:
            del group[name]
            changes.append(f"{old} is gone: leave it out")
    return found, changes


def _warn(sentence: str) -> None:
    warnings.warn(sentence, FutureWarning, stacklevel=3)


def read_settings(
    path: Path | None, message: Callable[[str], None] = _warn, **overrides: Any
) -> EncoderTraining:
    """The settings of a YAML or JSON file (None: the defaults), `overrides` that are not None on top.

    `message` receives a sentence for each name of version 0.1, by default as a warning.
    Raises TrainingError, with the entry's name, on a file that cannot be read or a value that will not do.
    """
    given: dict[str, Any] = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise TrainingError(f"the config {path} cannot be read: {reason}") from None
        if found is not None and not isinstance(found, dict):
            raise TrainingError(f"the config {path} holds no settings: write `name: value` lines")
        given = found or {}
    given, changes = with_present_names(given)
    for change in changes:
        message(f"the config {path}: {change}")
    given |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return EncoderTraining.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        source = f"the config {path}" if path else "the settings"
        raise TrainingError(f"{source}: {where}: {reason}" if where else f"{source}: {reason}") from None
