"""The library in one object: load a checkpoint, clone a voice, speak with it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from revox.checkpoint.load import default_dtype, fastest_weights, load_model
from revox.checkpoint.locate import locate
from revox.checkpoint.params import read_params
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.tekken import read_tekken
from revox.checkpoint.tensors import folder_tensors
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.model.card_linear import FORMATS
from revox.model.voxtral import Voxtral
from revox.progress import ProgressCallback, ignore_progress
from revox.speech import Audio
from revox.synthesis.engine import DEFAULT_CFG, Engine, Request, Speech
from revox.synthesis.errors import SpeakError
from revox.synthesis.longform import (
    AHEAD,
    BATCH,
    Line,
    LongSpeech,
    PromptOf,
    SentenceTime,
    SpeechSettings,
    SpokenLine,
    language_of,
    pieces_of,
    speak_pieces,
    speak_together,
)
from revox.synthesis.prefix_cache import PrefixCache
from revox.synthesis.prompt import Prompter, make_prompt
from revox.synthesis.takes import TakeWarning

if TYPE_CHECKING:
    from revox.cloning.clone import ClonedVoice, Reference, SelectedSpeech
    from revox.cloning.consent import Consent
    from revox.cloning.tune import TunedVoice, VoiceTuning
    from revox.coding import Coder, CodingResult, CodingSettings
    from revox.coding.student import StudentEncoder
    from revox.model.codec import Codec


class SpeechWarning(UserWarning):
    """A piece of a text that no take said well."""


def warn_of_take(warning: TakeWarning) -> None:
    """Report `warning` as a Python warning, `SpeechWarning`."""
    warnings.warn(str(warning), SpeechWarning, stacklevel=3)


def load(
    checkpoint: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    lazy: bool = False,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Revox:
    """Load a Voxtral TTS checkpoint, a folder or a hub id, for cloning and speaking.

    Args:
        checkpoint: a folder, or a hub id such as `mistralai/Voxtral-4B-TTS-2603`.
        device: where to compute; by default the machine's accelerator (CUDA, MPS), or else the CPU.
        dtype: the arithmetic's type; see `default_dtype`.
        revision: branch, tag or commit, for a hub id.
        lazy: read weights when they are first needed: cloning without a transcript reads the codec and the
            embedding table only.
        weights: how the weights of the language model and the acoustic transformer are held, "bf16",
            "float32", "int8", "int4" (on the CPU or CUDA), "fp8" (on CUDA), or "auto" (see
            `fastest_weights`); None: as `dtype` says.
        adapter: a folder of LoRA factors in the format of peft, added to the weights as they are read.

    Raises CheckpointError when the checkpoint or the adapter cannot be used, SpeakError when the device is
    not there or does not take such weights.
    """
    folder = locate(checkpoint, revision)
    place = find_device(device)
    if weights == "auto":
        weights = fastest_weights(folder, place)
    quantized = None
    if weights is not None:
        dtype, quantized = _held(weights, place)
    factors = None if adapter is None else Path(adapter).expanduser()
    tts = Revox(folder, place, dtype or default_dtype(folder, place), quantized, factors)
    if not lazy:
        _ = tts.model, tts.prompter
    return tts


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the machine's accelerator, or the CPU. Raises SpeakError if it is missing."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SpeakError(
            f"device {str(device)!r} is not available to this build of torch on this machine; use cpu, "
            "or install a build of torch for the device"
        ) from None
    return place


def find_dtype(name: str | None) -> torch.dtype | None:
    """The type of that name; None for None. Raises SpeakError for one in which the model does not compute."""
    known = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    if name not in known:
        raise SpeakError(f"the dtype {name!r} is not offered; give float32 or bfloat16")
    return known[name]


def _held(weights: str, device: torch.device) -> tuple[torch.dtype, str | None]:
    """The dtype, and the format of the layers if it is not that, of a format of weights."""
    dtypes = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if weights in dtypes:  # bfloat16 is the name of the former option --dtype
        return dtypes[weights], None
    if weights not in FORMATS:
        raise SpeakError(f"weights {weights!r} are not known; take auto, bf16, float32, int8, int4 or fp8")
    if device.type not in ("cpu", "cuda") or (weights == "fp8" and device.type == "cpu"):
        where = "a CUDA card" if weights == "fp8" else "the CPU or a CUDA card"
        raise SpeakError(f"{weights} weights run on {where} only, and the device is {device}; take bf16")
    return torch.float32 if device.type == "cpu" else torch.bfloat16, weights


class Revox:
    """A loaded checkpoint. Made by `revox.load`.

    `quantized`: the format of the layers' weights where they are quantized, else None. `adapter`: the folder
    of the LoRA factors that are added to the weights.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        quantized: str | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.folder, self.device, self.dtype, self.quantized = folder, device, dtype, quantized
        self.adapter = adapter

    @property
    def weights(self) -> str:
        """How the weights are held: int8, int4, fp8, bf16, float32."""
        if self.quantized is not None:
            return self.quantized
        return "bf16" if self.dtype == torch.bfloat16 else str(self.dtype).removeprefix("torch.")

    @cached_property
    def model(self) -> Voxtral:
        """The whole network."""
        return load_model(
            self.folder, self.device, self.dtype, quantized=self.quantized, adapter=self.adapter
        )

    @cached_property
    def _model_with_gradients(self) -> Voxtral:
        """The network for the search that the language model guides; quantized layers have no gradient."""
        if self.quantized is None:
            return self.model
        dtype = default_dtype(self.folder, self.device)
        return load_model(self.folder, self.device, dtype, adapter=self.adapter)

    @cached_property
    def _prefixes(self) -> PrefixCache:
        """The prompts of the voices spoken with lately, read once."""
        return PrefixCache()

    @cached_property
    def prompter(self) -> Prompter:
        """The checkpoint's tokenizer. Raises CheckpointError when it cannot be used with this checkpoint."""
        read_tekken(self.folder, read_params(self.folder))
        return Prompter(self.folder)

    @cached_property
    def _coding_model(self) -> Voxtral:
        """The network as far as finding codes needs it; the rest may be without memory."""
        from revox.coding.find import MODEL_PARTS

        if "model" in self.__dict__:
            return self.model
        return load_model(self.folder, self.device, self.dtype, MODEL_PARTS, self.quantized)

    @cached_property
    def coder(self) -> Coder:
        """What finds codes of recordings: the checkpoint's codec, preset codes, student encoder, guidance."""
        from revox.coding import Coder
        from revox.coding.presets import preset_codes

        model = self._coding_model
        return Coder(
            model.audio_tokenizer,
            lambda should_stop: preset_codes(self.folder, model, should_stop=should_stop),
            language_model=lambda: (self._model_with_gradients, self.prompter),
            student=self._trained_student,
        )

    def _trained_student(self, codec: Codec) -> StudentEncoder | None:
        from revox.coding.student import trained_student

        return trained_student(self.folder, codec)

    @property
    def sampling_rate(self) -> int:
        """Samples a second of everything spoken, Hz."""
        return self._coding_model.config.codec.sampling_rate

    @property
    def encoder(self) -> str:
        """How much of the codec's encoder the checkpoint has: complete, partial or absent."""
        if self._coding_model.audio_tokenizer.has_encoder:
            return "complete"
        there = any(name.startswith(ENCODER_PREFIXES) for name in folder_tensors(self.folder))
        return "partial" if there else "absent"

    def voices(self) -> list[str]:
        """Names of the checkpoint's voices that can be spoken with."""
        return [entry.name for entry in list_voices(self.folder) if entry.problem is None]

    def voice(self, name: str) -> Voice:
        """A voice of the checkpoint. Raises VoiceError, with the nearest names, when there is none."""
        return load_voice(self.folder, name)

    def clone(
        self,
        reference: Reference,
        *,
        consent: str | Consent,
        name: str = "clone",
        transcript: str | None = None,
        method: str = "auto",
        refine: int = 0,
        steps: int | None = None,
        budget: float | None = None,
        seed: int = 0,
        progress: ProgressCallback = ignore_progress,
        should_stop: Callable[[], bool] | None = None,
        quick_encoder: bool = False,
    ) -> ClonedVoice:
        """A voice from a recording: 3 to 30 s of one person, in any container, rate and number of channels.

        The voice is in memory only; `revox.checkpoint.voices.add_voice` puts it into a folder.

        Args:
            reference: the recording's file, its audio, or a stretch selected before (`select`); several
                recordings of one speaker make one voice, of the best 30 s.
            consent: whose voice it is, and that they agreed; kept with the voice.
            name: what to call it.
            transcript: what is said in the recording, if known. The language model then guides a search
                towards codes that say it, and it is kept with the voice. The recording is used whole, and
                must be no longer than 30 s.
            method: "auto" takes the codes from the checkpoint's encoder, at once, where it has one, else
                from the student encoder (`revox train student`), and searches for them (inversion) where
                there is neither; "encoder", "student" and "inversion" insist on one; "best" takes inversion
                as well and keeps the better codes.
            refine: steps of search that improve the encoder's or the student's codes; they are kept only if
                they are better.
            steps: steps of inversion.
            budget: seconds that the search for its codes may take.
            seed: the same seed gives the same voice.
            progress: called as the search goes on.
            should_stop: called at every step; when true, the search ends with the best codes so far.
            quick_encoder: deprecated name of `method="student"`.

        Raises AudioError on a recording that cannot be used, CodingError without consent or for settings that
        this checkpoint has no use for.
        """
        from revox.cloning.clone import CloneRequest, clone_voice
        from revox.coding import CodingSettings

        if quick_encoder:
            warnings.warn("quick_encoder=True is now method='student'", DeprecationWarning, stacklevel=2)
            method = "student"
        settings = CodingSettings(method, refine, steps, budget, seed)
        return clone_voice(
            self.coder,
            self._coding_model.mm_audio_embeddings,
            CloneRequest(reference, consent, name, transcript, settings),
            progress=progress,
            should_stop=should_stop,
        )

    def tune(
        self,
        recordings: Sequence[tuple[Path, str]],
        *,
        consent: str | Consent,
        name: str = "tuned",
        voice: Voice | str | None = None,
        settings: VoiceTuning | None = None,
        method: str = "auto",
        progress: ProgressCallback = ignore_progress,
        should_stop: Callable[[], bool] | None = None,
    ) -> TunedVoice:
        """A voice whose embedding is learned from a speaker's recordings and what is said in them.

        The model stays as it is, and the voice is in memory only. `voice` is what tuning begins with, a name
        or a Voice; by default a clone of the recordings. `method` finds codes as in `clone`. Raises
        CloneError without consent, with fewer than two recordings that can be used, or if nothing was gained.
        """
        from revox.cloning.consent import Consent, record_consent
        from revox.cloning.tune import TuningRequest, VoiceTuning, tune_to_recordings

        agreed = consent if isinstance(consent, Consent) else record_consent(consent)

        def clone(paths: list[Path], text: str | None) -> ClonedVoice:
            return self.clone(paths, consent=agreed, name=name, transcript=text, method=method)

        start = None if voice is None else self._as_voice(voice)
        request = TuningRequest(recordings, agreed, name, start, settings or VoiceTuning())
        return tune_to_recordings(
            clone, self._model_with_gradients, self.prompter, request, progress=progress,
            should_stop=should_stop,
        )  # fmt: skip

    def select(
        self,
        recording: str | os.PathLike[str] | Audio,
        *,
        transcript: str | None = None,
        source: bytes | None = None,
        max_seconds: float = 30.0,
    ) -> SelectedSpeech:
        """The stretch of a recording that `clone` would use; see `revox.cloning.clone.select_speech`."""
        from revox.cloning.clone import select_speech

        return select_speech(
            recording, self.sampling_rate, transcript=transcript, source=source, max_seconds=max_seconds
        )

    def find_codes(
        self,
        audio: Audio,
        settings: CodingSettings | None = None,
        *,
        transcript: str | None = None,
        progress: ProgressCallback = ignore_progress,
        should_stop: Callable[[], bool] | None = None,
    ) -> CodingResult:
        """The codes of `audio`, all of it, resampled to the checkpoint's rate where it has another one; see
        `revox.coding.find_codes`."""
        from revox.coding import find_codes

        samples = torch.from_numpy(audio.at(self.sampling_rate).samples.copy())
        return find_codes(
            self.coder, samples, settings, transcript=transcript, progress=progress, should_stop=should_stop
        )

    def speak(
        self,
        text: str,
        voice: Voice | str,
        settings: SpeechSettings | None = None,
        *,
        progress: ProgressCallback = ignore_progress,
        report: Callable[[TakeWarning], None] = warn_of_take,
        times: list[SentenceTime] | None = None,
        **options: Any,
    ) -> Audio:
        """Speak a text of any length in a voice, one of the checkpoint's by name or a Voice.

        Long texts are spoken in pieces (`max_chars`), several at a time. A piece whose take went wrong (it
        ended too early for its text, did not end, has silence or a loop in it) is spoken again, and reported
        when no take is good.

        Args:
            text: at least one word.
            voice: a name from `voices()`, or a Voice.
            settings: how to speak; `options` replace single ones: `speak(text, voice, seed=3, takes=1)`.
            progress: called as frames (80 ms) are made; `done` counts them.
            report: called with what no take said well; by default a Python warning, `SpeechWarning`.
            times: filled at the end with when each piece is heard; with `by_sentence=True`, each sentence.

        Returns mono audio, `truncated` when it met the limit on its length or a piece did not end.
        Raises SpeakError on a request that cannot be spoken, VoiceError on an unknown voice.
        """
        parts = list(
            self.speak_parts(text, voice, settings, progress=progress, report=report, times=times, **options)
        )
        return self._joined(parts)

    def speak_parts(
        self,
        text: str,
        voice: Voice | str,
        settings: SpeechSettings | None = None,
        *,
        progress: ProgressCallback = ignore_progress,
        report: Callable[[TakeWarning], None] = warn_of_take,
        times: list[SentenceTime] | None = None,
        **options: Any,
    ) -> Iterator[Audio]:
        """As `speak`, piece by piece, in memory that does not grow with the text.

        Laid end to end the parts are what `speak` gives; the last one is `truncated` as its audio is.
        """
        line = Line(text, voice, replace(settings or SpeechSettings(), **options))
        return self._spoken(line, report, times, progress=progress)

    def speak_batch(
        self, lines: Iterable[Line], *, progress: ProgressCallback = ignore_progress
    ) -> Iterator[SpokenLine]:
        """Speak many texts together: as each is done, its number, from 0, its audio, warnings and times.

        A line is prepared when its turn comes. `progress`: called as frames are made. Raises SpeakError on a
        line that cannot be spoken, VoiceError on an unknown voice.
        """
        voices: dict[str, Voice] = {}
        speeches: dict[int, LongSpeech] = {}
        parts: dict[int, list[Audio]] = {}

        def prepared() -> Iterator[tuple[LongSpeech, PromptOf]]:
            for number, line in enumerate(lines):
                voice = line.voice
                if isinstance(voice, str):
                    voice = voices[voice] if voice in voices else voices.setdefault(voice, self.voice(voice))
                speeches[number], prompt_of = self._prepared(Line(line.text, voice, line.settings))
                yield speeches[number], prompt_of

        engine = Engine(self.model, self._prefixes)
        for number, part in speak_together(engine, prepared(), progress=progress):
            if part is not None:
                parts.setdefault(number, []).append(part)
                continue
            speech = speeches.pop(number)
            audio = self._joined(parts.pop(number, []))
            yield SpokenLine(number, audio, speech.warnings, speech.times)

    def synthesize(
        self,
        text: str,
        voice: Voice | str,
        *,
        seed: int = 0,
        cfg: float = DEFAULT_CFG,
        flow_steps: int | None = None,
        max_seconds: float | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> Speech:
        """As `speak`, with the codes `[37, frames]` beside the audio."""
        prompt = make_prompt(self.model, self.prompter, text, self._as_voice(voice))
        request = Request(
            prompt.embeddings, seed, self._frames(max_seconds), cfg, prefix=prompt.voice_positions,
            flow_steps=flow_steps,
        )  # fmt: skip
        return Engine(self.model, self._prefixes).speak(request, progress)

    def synthesise(self, *arguments: Any, **options: Any) -> Speech:
        """The old name of `synthesize`, until the next version."""
        warnings.warn("Revox.synthesise is now Revox.synthesize", DeprecationWarning, stacklevel=2)
        return self.synthesize(*arguments, **options)

    def stream(
        self,
        text: str,
        voice: Voice | str,
        settings: SpeechSettings | None = None,
        *,
        report: Callable[[TakeWarning], None] = warn_of_take,
        **options: Any,
    ) -> Iterator[Audio]:
        """As `speak`, in chunks while it is spoken: the first after 5 frames (0.4 s).

        Later chunks are as long as all before them, up to 2 s.

        Laid end to end they are what `speak` gives where every first take is good; a take of which a part is
        out is not spoken again. The last one is `truncated` as `speak`'s audio would be.
        """
        line = Line(text, voice, replace(settings or SpeechSettings(), **options))
        return self._spoken(line, report, streaming=True)

    def decode(self, voice: Voice | str) -> Audio:
        """The recording of a voice as its codes reproduce it, mono.

        Codes that are not on record, as of a preset, are recovered from the embedding. Raises VoiceError on
        an unknown voice.
        """
        from revox.checkpoint.voice_codes import recover_codes

        voice, model = self._as_voice(voice), self._coding_model
        codes = voice.codes
        if codes is None:
            table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
            codes = recover_codes(voice.embedding, table, model.config).codes
        with torch.inference_mode():
            samples = model.audio_tokenizer.decode(codes[None].to(self.device))[0]
        return Audio(samples.float().cpu().numpy(), self.sampling_rate)

    def _spoken(
        self,
        line: Line,
        report: Callable[[TakeWarning], None],
        times: list[SentenceTime] | None = None,
        *,
        streaming: bool = False,
        progress: ProgressCallback = ignore_progress,
    ) -> Iterator[Audio]:
        speech, prompt_of = self._prepared(line, streaming=streaming)
        engine = Engine(self.model, self._prefixes)

        def parts() -> Iterator[Audio]:
            yield from speak_pieces(engine, speech, prompt_of, streaming=streaming, progress=progress)
            for warning in speech.warnings:
                report(warning)
            if times is not None:
                times.extend(speech.times)

        return parts()

    def _prepared(self, line: Line, *, streaming: bool = False) -> tuple[LongSpeech, PromptOf]:
        voice, model, settings = self._as_voice(line.voice), self.model, line.settings
        settings = replace(settings, language=settings.language or language_of(voice.name))
        speech = LongSpeech(
            pieces_of(line.text, settings),
            settings,
            model.config.codec,
            max_frames=self._frames(settings.max_seconds),
            streaming=streaming,
            together=AHEAD if streaming else BATCH,
        )
        return speech, lambda piece: make_prompt(model, self.prompter, piece, voice)

    def _joined(self, parts: list[Audio]) -> Audio:
        samples = np.concatenate([part.samples for part in parts]) if parts else np.zeros(0, np.float32)
        return Audio(samples, self.sampling_rate, truncated=bool(parts) and parts[-1].truncated)

    def _as_voice(self, voice: Voice | str) -> Voice:
        return self.voice(voice) if isinstance(voice, str) else voice

    def _frames(self, seconds: float | None) -> int | None:
        if seconds is None:
            return None
        if math.isnan(seconds):
            raise SpeakError("the longest duration allowed is not a number; give seconds")
        return int(max(0.0, min(seconds, 1e6)) * self.model.config.codec.frame_rate)
