"""The one entry from sound to codes: which methods a request means, and the best codes they find."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from revox.coding.beam import beam_search
from revox.coding.encode import Encoded, encode, float_codec, served_codec
from revox.coding.errors import CodingError
from revox.coding.invert import InversionConfig, InversionResult, invert
from revox.coding.likelihood import language_model_guidance
from revox.coding.objective import SpectralTarget
from revox.coding.prior import CodePrior
from revox.coding.refine import Score, Scorer, posterior_of, refinement
from revox.coding.regularizers import Guidance, Posterior, Regularizers
from revox.coding.student import StudentEncoder
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral
from revox.progress import ProgressCallback, ignore_progress
from revox.synthesis.prompt import Prompter

METHODS = ("auto", "encoder", "student", "inversion", "best")
"""How codes are found. "auto" is the encoder where the checkpoint has one, else the student encoder where one
was trained, else inversion; "best" takes inversion as well and keeps the better codes."""

MODEL_PARTS = ("mm_audio_embeddings.audio_codebook_embeddings", "audio_tokenizer")
"""The parts of a model that finding codes needs (`revox.checkpoint.load.load_model`), guidance apart."""

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class CodingSettings:
    """How codes are found; the names are those of the command line's options.

    `method` is one of `METHODS`. `refine`: steps of inversion from the encoder's or the student's codes.
    `steps`: of inversion's descent. `budget`: seconds for all searches. The same `seed`, steps and thread
    count give the same codes. `local_search`: rounds of trying single codes, by default in proportion to the
    steps. `as_served`: the encoder in bf16, as runtimes serve it; float32 is for parity tests. `beam`: with a
    transcript, so many paths of the encoder's or the student's best semantic codes are followed by the
    language model's likelihood (`revox.coding.beam`), an experiment. `inversion`: what a search is like
    otherwise.

    Raises CodingError for a method that does not exist or a number out of range.
    """

    method: str = "auto"
    refine: int = 0
    steps: int | None = None
    budget: float | None = None
    seed: int = 0
    local_search: int | None = None
    as_served: bool = True
    beam: int = 0
    inversion: InversionConfig = field(default_factory=InversionConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CodingError(f"there is no method {self.method!r}: use one of {', '.join(METHODS)}")
        if self.refine < 0:
            raise CodingError(f"{self.refine} steps of refinement are not possible: give 0 or more")
        if self.beam < 0:
            raise CodingError(f"a beam of {self.beam} paths is not possible: give 0 or more")
        if self.steps is not None and self.steps < 0:
            raise CodingError(f"{self.steps} steps are not possible: give 0 or more")
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise CodingError(f"a budget of {self.budget:g} s is not possible: give seconds above 0")

    def ways(self, has_encoder: bool, has_student: bool = False) -> tuple[str, ...]:
        """What these settings run on such a checkpoint, of "encoder", "student", "refined" and "inversion",
        in that order. Raises CodingError for settings that it would ignore."""
        method = self.method
        if method == "encoder" and not has_encoder:
            raise CodingError(
                "this checkpoint has no whole encoder: use --method auto, which does without, or put an "
                "encoder in with `revox inject` (`revox inspect` shows what the checkpoint has)"
            )
        if method == "student" and not has_student:
            raise CodingError(
                "no student encoder is trained for this checkpoint: train it once with `revox train student "
                "CHECKPOINT`, or use --method inversion"
            )
        at_once = {"encoder": "encoder", "student": "student", "inversion": None}.get(
            method, "encoder" if has_encoder else "student" if has_student else None
        )
        searches = at_once is None or method == "best"
        if self.refine and at_once is None:
            why = "the method is inversion" if method == "inversion" else "this checkpoint has neither"
            raise CodingError(
                f"--refine improves the codes of an encoder or a student, and {why}: leave it out "
                "(inversion has --steps), or train a student with `revox train student CHECKPOINT`"
            )
        if self.steps is not None and not searches:
            raise CodingError(
                f"--steps is for inversion, and the {at_once}'s codes are taken at once: leave it out, "
                "improve the codes with --refine N, or use --method inversion"
            )
        if self.budget is not None and not searches and not self.refine:
            raise CodingError(
                f"the {at_once}'s codes are taken at once, so --budget limits nothing: leave it out, improve "
                "the codes with --refine N, or use --method inversion"
            )
        found = (at_once, "refined" if self.refine else None, "inversion" if searches else None)
        return tuple(way for way in found if way)

    def search(self, searches: int, refining: bool = False) -> InversionConfig:
        """The settings of each of so many searches: of inversion, or of a refinement."""
        config = self.inversion
        if self.budget is not None:
            config = dataclasses.replace(config, seconds=self.budget / max(1, searches))
        if refining:
            config = refinement(self.refine, config)
        elif self.steps is not None:
            config = config.with_steps(self.steps)
        if self.local_search is not None:
            config = dataclasses.replace(config, local_search_rounds=self.local_search)
        return config


@dataclass(frozen=True)
class CodingResult:
    """Codes, and how they were found.

    `codes` `[37, frames]`, int64, from 0, on the CPU. `method` is the way whose codes they are
    (`CodingSettings.ways`). `scores` of all ways that were compared (`revox.coding.refine`), empty with only
    one. `searches` are those that were run, `seconds` is the time of everything, `settings` what reproduces
    the searches.
    """

    codes: Tensor
    method: str
    scores: dict[str, Score]
    searches: dict[str, InversionResult]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        """Whether a search was stopped before it was done, by Ctrl-C or `should_stop`."""
        return any(search.stopped for search in self.searches.values())

    @property
    def description(self) -> str:
        """The way in words, for a voice's record: a refinement says whose codes it began with."""
        source = "student" if "student" in self.settings else "encoder"
        return f"{source}, refined" if self.method == "refined" else self.method

    @property
    def search(self) -> InversionResult | None:
        """The search that found the codes; None where they were taken at once."""
        return self.searches.get(self.method)

    def record(self) -> dict[str, Any]:
        """What provenance keeps: settings, steps, how codes compared; without a search only the student, and
        a beam or exact codes where they were asked for."""
        if not self.searches:
            return dict(self.settings)
        found = self.search
        record = self.settings | {
            "steps_done": sum(search.steps for search in self.searches.values()),
            "stopped": self.stopped,
            "loss": round(self.scores[self.method].total if found is None else found.loss, 6),
        }
        if self.scores:
            record["chosen"] = self.method
            record["scores"] = {way: score.to_json() for way, score in self.scores.items()}
        return record


class Coder:
    """What finding codes needs of one checkpoint; each part is made when it is first needed.

    codec: the checkpoint's, in any type, with an encoder if it has one. preset_codes: codes `[37, frames]` of
    the model's own voices, or a function that finds them (and raises CodingError when told to stop): a search
    starts there and stays near their statistics. language_model: gives the whole model and its prompter, for
    guidance by a transcript. student: gives the student encoder trained for the codec, or None.
    """

    def __init__(
        self,
        codec: Codec,
        preset_codes: Sequence[Tensor] | Callable[[ShouldStop | None], list[Tensor]] = (),
        language_model: Callable[[], tuple[Voxtral, Prompter]] | None = None,
        student: Callable[[Codec], StudentEncoder | None] | None = None,
    ) -> None:
        self._codec, self._find_presets, self._language_model = codec, preset_codes, language_model
        self._load_student = student
        self._presets: list[Tensor] | None = None
        self._lock = threading.RLock()  # a server finds codes in several threads

    @property
    def has_encoder(self) -> bool:
        """Whether the checkpoint has a whole encoder."""
        return self._codec.has_encoder

    @cached_property
    def codec(self) -> Codec:
        """The codec in float32, for searches and comparisons: bf16 is too coarse for gradients."""
        return float_codec(self._codec)

    @cached_property
    def _served(self) -> Codec:
        return served_codec(self._codec)

    def preset_codes(self, should_stop: ShouldStop | None = None) -> list[Tensor]:
        """Codes `[37, frames]` of the presets, found once."""
        with self._lock:
            if self._presets is None:
                found = self._find_presets
                self._presets = found(should_stop) if callable(found) else list(found)
            return self._presets

    def prior(self, should_stop: ShouldStop | None = None) -> CodePrior | None:
        """The statistics of the presets' codes; None without presets."""
        presets = self.preset_codes(should_stop)
        return CodePrior.from_codes(presets, self.codec) if presets else None

    @cached_property
    def student(self) -> StudentEncoder | None:
        """The student encoder that was trained for this checkpoint; None without."""
        student = None if self._load_student is None else self._load_student(self._codec)
        return None if student is None else student.to(_device(self._codec))

    def ways(self, settings: CodingSettings) -> tuple[str, ...]:
        """What `settings` run here (`CodingSettings.ways`); the student is looked up only where it counts."""
        counts = settings.method == "student" or not (self.has_encoder or settings.method == "inversion")
        return settings.ways(self.has_encoder, counts and self.student is not None)

    def about(self, ways: Sequence[str]) -> dict[str, Any]:
        """What a record keeps of the student, where `ways` take it."""
        return {"student": self.student.record} if "student" in ways and self.student else {}

    def guidance(self, transcript: str) -> Guidance:
        """The language model's guidance towards codes that say `transcript`, for one clip."""
        if self._language_model is None:
            raise CodingError("there is no language model at hand for the transcript: leave it out")
        model, prompter = self._language_model()
        return language_model_guidance(model, prompter, transcript)

    def beam_search(self, transcript: str, posterior: Posterior, beam: int) -> Tensor:
        """Codes `[37, frames]` of the best of `beam` paths (`revox.coding.beam`)."""
        if self._language_model is None:
            raise CodingError("there is no language model at hand for the beam: set beam to 0")
        model, prompter = self._language_model()
        return beam_search(model, prompter, transcript, posterior, beam)

    def encode(self, samples: Tensor, as_served: bool = True) -> Encoded:
        """The encoder's codes and latents of `samples` `[samples]`. Raises CodingError without an encoder."""
        return encode(self._served if as_served else self.codec, samples)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sound `[samples]` of `codes` `[37, frames]`, float32, on the CPU."""
        return self.codec.decode(codes[None].to(_device(self.codec)))[0].float().cpu()

    def distance(self, decoded: Tensor, target: Tensor) -> float:
        """The spectral distance of two sounds `[samples]`, as inversion measures it."""
        objective = SpectralTarget(target, self.codec.config.sampling_rate)
        return float(objective.distance(decoded[None])[0])


def find_codes(
    coder: Coder,
    samples: Tensor,
    settings: CodingSettings | None = None,
    *,
    transcript: str | None = None,
    progress: ProgressCallback = ignore_progress,
    should_stop: ShouldStop | None = None,
) -> CodingResult:
    """The codes of `samples` `[samples]` at the codec's rate, as `settings` ask for them.

    With an encoder, and unless a search is asked for, they are the codes that runtimes with this checkpoint
    give the same samples. Where several ways are taken the best codes are kept, the encoder's among equals.
    A search completes a partial last frame with silence. `transcript`, what is said in the clip, lets the
    language model guide the searches. KeyboardInterrupt or a true `should_stop()` ends a search with the best
    codes so far.

    Raises CodingError for settings that this checkpoint has no use for, an encoder that is damaged, or when
    stopped before there was anything to keep; ValueError for samples that are not such a clip.
    """
    settings = settings or CodingSettings()
    began = time.monotonic()
    ways = coder.ways(settings)
    at_once, posterior = _at_once(coder, samples, settings, ways[0])
    source = coder.about(ways)
    if ways[0] == "encoder" and not settings.as_served:
        source["as_served"] = False
    if settings.beam and posterior is not None and transcript is not None:
        at_once = coder.beam_search(transcript, posterior, settings.beam)
        source["beam"] = settings.beam
    if ways in (("encoder",), ("student",)):
        assert at_once is not None
        return CodingResult(at_once, ways[0], {}, {}, time.monotonic() - began, source)
    # Encoders complete the last frame by themselves; a search compares whole frames.
    samples = functional.pad(samples, (0, -samples.shape[-1] % coder.codec.samples_per_frame))
    count = sum(way in ("refined", "inversion") for way in ways)
    config, refining = settings.search(count), settings.search(count, refining=True)
    guidance = None if transcript is None else coder.guidance(transcript)
    regularizers = Regularizers(coder.prior(should_stop), None, guidance)

    def search(config: InversionConfig, posterior: Posterior | None) -> InversionResult:
        return invert(
            coder.codec, samples, config=config, seed=settings.seed, progress=progress,
            regularizers=dataclasses.replace(regularizers, posterior=posterior), should_stop=should_stop,
        )  # fmt: skip

    searches: dict[str, InversionResult] = {}
    if "inversion" in ways:
        searches["inversion"] = search(config, None)
    method = "inversion"
    scores: dict[str, Score] = {}
    if at_once is not None:
        terms = dataclasses.replace(regularizers, posterior=posterior)
        if "refined" in ways and not any(found.stopped for found in searches.values()):
            searches["refined"] = search(refining, posterior)
        candidates = {ways[0]: at_once}
        candidates |= {way: searches[way].codes for way in ("refined", "inversion") if way in searches}
        method, scores = Scorer(coder.codec, samples, config, terms).best_of(candidates)
    if "refined" in searches and len(searches) == 1:
        config = refining
    about = {
        **{name: value for name, value in dataclasses.asdict(config).items() if value is not None},
        **({"refine": settings.refine} if "refined" in ways else {}),
        "seed": settings.seed,
        "preset_frames": sum(codes.shape[1] for codes in coder.preset_codes()),
        "language_model_guidance": guidance is not None,
        **source,
    }
    codes = searches[method].codes if method in searches else at_once
    assert codes is not None
    return CodingResult(codes, method, scores, searches, time.monotonic() - began, about)


def _at_once(
    coder: Coder, samples: Tensor, settings: CodingSettings, way: str
) -> tuple[Tensor | None, Posterior | None]:
    """The codes that an encoder or the student gives, on the CPU, and their posterior; None for a search."""
    if way == "encoder":
        encoded = coder.encode(samples, settings.as_served)
        # The posterior is needed only where a search follows.
        posterior = (
            posterior_of(coder.codec, encoded)
            if settings.refine or settings.beam or settings.method == "best"
            else None
        )
        return encoded.codes.cpu(), posterior
    if way == "student":
        assert coder.student is not None
        posterior = coder.student.posterior(samples.to(_device(coder.codec)))
        return posterior.codes(coder.codec.config.acoustic_codebook_size).cpu(), posterior
    return None, None


def _device(codec: Codec) -> torch.device:
    return codec.output_proj.conv.weight.device
