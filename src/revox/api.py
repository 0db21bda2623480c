"""The library in one object: load a checkpoint, clone a voice, speak with it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.checkpoint.locate import locate
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.model.voxtral import Voxtral
from revox.progress import ProgressCallback, ignore_progress
from revox.speech import Audio, read_audio
from revox.synthesis.engine import DEFAULT_CFG, Engine, Request, Speech
from revox.synthesis.errors import SpeakError
from revox.synthesis.prompt import Prompter, make_prompt

if TYPE_CHECKING:
    from revox.coding.invert import InversionProgress
    from revox.coding.student import QuickEncoder

SMALL_MODEL_BYTES = 2_000_000_000


def load(
    checkpoint: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Revox:
    """Load a Voxtral TTS checkpoint, a folder or a hub id, for cloning and speaking.

    Args:
        checkpoint: a folder, or a hub id such as `mistralai/Voxtral-4B-TTS-2603`.
        device: where to compute; by default the machine's accelerator (CUDA, MPS), or else the CPU.
        dtype: the arithmetic's type; see `default_dtype`.
        revision: branch, tag or commit, for a hub id.

    Raises CheckpointError when the checkpoint cannot be used, SpeakError when the device is not there.
    """
    folder = locate(checkpoint, revision)
    place = find_device(device)
    if dtype is None:
        dtype = default_dtype(folder, place)
    return Revox(folder, load_model(folder, place, dtype), Prompter(folder))


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


def default_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """bf16 on CUDA, as in serving. Elsewhere float32 for a small model and bf16 for a full-size one.

    float32 is the exact arithmetic, and quicker where a processor has no bf16 instructions; but at full size
    it would take 16 GB of memory instead of 8 and read twice as much of it for every frame.
    """
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    small = 0 < weights < SMALL_MODEL_BYTES
    return torch.float32 if small and device.type != "cuda" else torch.bfloat16


class Revox:
    """A loaded checkpoint. Made by `revox.load`."""

    def __init__(self, folder: Path, model: Voxtral, prompter: Prompter) -> None:
        self.folder = folder
        self.model = model
        self.prompter = prompter

    @property
    def sampling_rate(self) -> int:
        """Samples a second of everything spoken, Hz."""
        return self.model.config.codec.sampling_rate

    def voices(self) -> list[str]:
        """Names of the checkpoint's voices that can be spoken with."""
        return [entry.name for entry in list_voices(self.folder) if entry.problem is None]

    def voice(self, name: str) -> Voice:
        """A voice of the checkpoint. Raises VoiceError, with the nearest names, when there is none."""
        return load_voice(self.folder, name)

    def clone(
        self,
        reference: str | os.PathLike[str] | Audio,
        *,
        consent: str,
        name: str = "clone",
        transcript: str | None = None,
        method: str = "auto",
        refine: int = 0,
        budget: float | None = None,
        seed: int = 0,
        quick_encoder: bool = False,
        progress: Callable[[InversionProgress], None] | None = None,
    ) -> Voice:
        """A voice from a recording: 3 to 30 s of one person, in any container, rate and number of channels.

        The voice is in memory only; `revox.checkpoint.voices.add_voice` puts it into a folder.

        Args:
            reference: the recording's file, or its audio.
            consent: whose voice it is, and that they agreed; kept with the voice.
            name: what to call it.
            transcript: what is said in the recording, if known; the search then asks the language model how
                well the codes say it, and it is kept with the voice. The recording is then used whole, and
                must be no longer than 30 s.
            quick_encoder: let inversion's first guess of the codes be made by an encoder that is trained for
                this checkpoint, once, in the time that `QuickEncoderTraining.seconds` allows.
            method: "auto" takes the codes from the checkpoint's encoder, at once, where it has one, and
                searches for them where it has none; "encoder" and "inversion" insist on one, "best" goes both
                ways and keeps the better codes.
            refine: steps of search that improve the encoder's codes; what is worse than they were is not
                kept.
            budget: seconds that the search for its codes may take.
            seed: the same seed gives the same voice.
            progress: told how the search is going.

        Raises AudioError on a recording that cannot be used, CloneError without consent or for settings that
        this checkpoint has no use for.
        """
        from revox.cloning.clone import choose_ways, clone_voice
        from revox.coding.likelihood import opinion_on

        has_encoder = self.model.audio_tokenizer.has_encoder
        ways = choose_ways(has_encoder, method, refine, budget, quick_encoder=quick_encoder)
        searches = ways != ("encoder",)
        if isinstance(reference, Audio):
            audio, source = reference, None
        else:
            source = Path(reference)
            audio = read_audio(source)
        opinion = None
        if transcript is not None and searches:
            tokens_of = partial(self.prompter.tokens_for_rows, transcript)
            opinion = opinion_on(self.model, tokens_of, self.prompter.audio_token)
        cloned = clone_voice(
            self.model,
            audio,
            transcript=transcript,
            opinion=opinion,
            encoder=self._quick_encoder if quick_encoder else None,
            consent=consent,
            name=name,
            method=method,
            refine_steps=refine,
            budget=budget,
            seed=seed,
            progress=progress,
            presets=self._preset_codes if searches else (),
            source=source,
        )
        return cloned.voice

    def speak(
        self,
        text: str,
        voice: Voice | str,
        *,
        seed: int = 0,
        cfg: float = DEFAULT_CFG,
        flow_steps: int | None = None,
        max_seconds: float | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> Audio:
        """Speak `text` in a voice, one of the checkpoint's by name or a Voice.

        Args:
            text: at least one word; text and voice together have room in 4096 positions.
            voice: a name from `voices()`, or a Voice.
            seed: the same seed says it in the same way.
            cfg: strength of classifier-free guidance, 0 to 10; 1 is none.
            flow_steps: Euler steps for a frame's acoustic codes, 1 to 100; else the checkpoint's own, 7.
            max_seconds: the longest that it may speak; 164 s (2048 frames) at most.
            progress: called after every frame (80 ms); `done` counts frames.

        Returns mono audio, `truncated` when it met the limit on its length before the model ended.
        Raises SpeakError on a request that cannot be spoken, VoiceError on an unknown voice.
        """
        return self.synthesize(
            text,
            voice,
            seed=seed,
            cfg=cfg,
            flow_steps=flow_steps,
            max_seconds=max_seconds,
            progress=progress,
        ).audio

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
        request = self._request(text, voice, seed, cfg, max_seconds)
        return Engine(self.model, flow_steps).speak(request, progress)

    def synthesise(self, *arguments: Any, **options: Any) -> Speech:
        """The old name of `synthesize`, until the next version."""
        warnings.warn("Revox.synthesise is now Revox.synthesize", DeprecationWarning, stacklevel=2)
        return self.synthesize(*arguments, **options)

    def stream(
        self,
        text: str,
        voice: Voice | str,
        *,
        seed: int = 0,
        cfg: float = DEFAULT_CFG,
        flow_steps: int | None = None,
        max_seconds: float | None = None,
    ) -> Iterator[Audio]:
        """As `speak`, in chunks while it is spoken: the first after 5 frames (0.4 s), later ones of 2 s.

        Laid end to end they are what `speak` gives. The last one is `truncated` if the speech met its limit.
        """
        request = self._request(text, voice, seed, cfg, max_seconds)
        return Engine(self.model, flow_steps).stream(request)

    def _request(
        self, text: str, voice: Voice | str, seed: int, cfg: float, max_seconds: float | None
    ) -> Request:
        prompt = make_prompt(self.model, self.prompter, text, self._as_voice(voice))
        return Request(prompt.embeddings, seed, self._frames(max_seconds), cfg)

    def _as_voice(self, voice: Voice | str) -> Voice:
        return self.voice(voice) if isinstance(voice, str) else voice

    def _frames(self, seconds: float | None) -> int | None:
        if seconds is None:
            return None
        if math.isnan(seconds):
            raise SpeakError("the longest duration allowed is not a number; give seconds")
        return int(max(0.0, min(seconds, 1e6)) * self.model.config.codec.frame_rate)

    @cached_property
    def _quick_encoder(self) -> QuickEncoder | None:
        from revox.checkpoint.locate import user_cache
        from revox.cloning.clone import float_codec
        from revox.coding.student import default_training, quick_encoder_for

        codec = float_codec(self.model.audio_tokenizer)
        bank = self._preset_codes
        return quick_encoder_for(codec, bank, default_training(codec), user_cache()) if bank else None

    @cached_property
    def _preset_codes(self) -> list[Tensor]:
        from revox.cloning.clone import preset_codes

        return preset_codes(self.folder, self.model)
