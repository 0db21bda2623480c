"""A recording to a voice, with the weights as released: choose, level, find the codes, sum their rows."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.params import read_params
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.cloning.consent import provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.cloning.invert import (
    Guess,
    InversionConfig,
    InversionProgress,
    InversionResult,
    Opinion,
    invert,
)
from revox.cloning.prior import CodePrior
from revox.cloning.quick_encoder import QuickEncoder
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral
from revox.speech import Audio, Selection, normalise_loudness, select_reference, whole_frames

METHOD = "inversion"
PARTS = ("mm_audio_embeddings.audio_codebook_embeddings", "audio_tokenizer")
"""What cloning needs of a checkpoint (`revox.checkpoint.load.load_model`): not what speaks."""

MAX_BANK_FRAMES = 4000  # five minutes of preset speech say enough about codes


@dataclass(frozen=True)
class ClonedVoice:
    """A voice and how it came about.

    `selection` is the stretch of the recording, `reference` what was inverted (the stretch, levelled, in
    whole frames, at the codec's rate), `decoded` the same through the voice's codes, `result` the
    inversion's.
    """

    voice: Voice
    selection: Selection
    result: InversionResult
    decoded: Audio
    reference: Audio


def clone_voice(
    model: Voxtral,
    audio: Audio,
    *,
    consent: str,
    name: str = "clone",
    budget: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[InversionProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    min_seconds: float = 3.0,
    max_seconds: float = 30.0,
    presets: Sequence[Tensor] = (),
    source: Path | str | bytes | None = None,
    selection: Selection | None = None,
    config: InversionConfig | None = None,
    encoder: QuickEncoder | None = None,
    transcript: str | None = None,
    opinion: Opinion | None = None,
) -> ClonedVoice:
    """A voice from a recording, by inversion, without an encoder. It is not added to any checkpoint.

    `model` needs only its `PARTS`. `consent` says whose voice it is and that they agreed. `budget` is in
    seconds, `steps` of descent; the same `steps`, `seed` and thread count give the same voice. `presets`
    are the codes `[37, frames]` of the model's own voices (`preset_codes`), which make the search quicker
    and keep it where the model's codes live. `source` is the recording's file (or its bytes), kept as a
    hash. A `selection` made before is used as it is. `encoder` gives the search its start and what it stays
    near. `transcript` is what is said in the recording, which is then used whole, or in the given
    selection; it is kept with the voice, and `opinion`, the
    language model's of codes that say it (`revox.cloning.opinion.opinion_on`), takes part in the search.
    `progress`, `should_stop` and KeyboardInterrupt: see `invert`.

    Raises CloneError without consent, for a setting out of range or audio that is not finite; AudioError when
    the recording holds too little speech.
    """
    agreed = record_consent(consent)
    check_transcript(transcript)
    settings = _settings(config or InversionConfig(), budget, steps)
    codec = float_codec(model.audio_tokenizer)
    rate = codec.config.sampling_rate
    if not bool(torch.from_numpy(audio.samples).isfinite().all()):
        raise CloneError("the recording holds values that are not numbers: convert it again from its source")
    if selection is None:
        whole = transcript is not None
        selection = select_reference(audio, min_seconds, max_seconds, rate=rate, whole=whole)
    samples = normalise_loudness(Audio(selection.samples, selection.rate).at(rate).samples, rate)
    samples = whole_frames(samples, codec.samples_per_frame, rate)
    prior = CodePrior.from_codes(presets, codec) if presets else None
    target = torch.from_numpy(samples.copy())
    device = codec.output_proj.conv.weight.device
    # Before the search: who moves the recording meanwhile loses nothing.
    origin = source_of(source if source is not None else audio.samples.tobytes())
    guess = None if encoder is None else Guess(*encoder.guess(target.to(device)))
    result = invert(
        codec,
        target,
        config=settings,
        prior=prior,
        guess=guess,
        opinion=opinion,
        seed=seed,
        progress=progress,
        should_stop=should_stop,
    )
    with torch.no_grad():
        decoded = codec.decode(result.codes[None].to(codec.output_proj.conv.weight.device))[0].float().cpu()
        table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
        rows = model.mm_audio_embeddings.voice_rows(result.codes.to(table.device)).to("cpu", torch.bfloat16)
    record = provenance(
        agreed,
        METHOD,
        {
            **{k: v for k, v in dataclasses.asdict(settings).items() if v is not None},
            "seed": seed,
            "steps_done": result.steps,
            "stopped": result.stopped,
            "preset_frames": sum(c.shape[1] for c in presets),
            "quick_encoder": encoder is not None,
            "language_model_asked": opinion is not None,
            "loss": round(result.loss, 6),
        },
        origin,
        start_s=round(selection.start, 3),
        seconds=round(len(samples) / rate, 3),
    )
    if transcript is not None:
        record["transcript"] = transcript
    voice = Voice(name, result.codes, rows, record)
    return ClonedVoice(voice, selection, result, Audio(decoded.numpy(), rate), Audio(samples, rate))


def check_transcript(transcript: str | None) -> None:
    """Raises CloneError when there is a transcript and it says nothing."""
    if transcript is not None and not transcript.strip():
        raise CloneError("the transcript is empty: write what is said in the recording, or leave it out")


def preset_codes(folder: Path | str, model: Voxtral, max_frames: int = MAX_BANK_FRAMES) -> list[Tensor]:
    """Codes `[37, frames]` of a checkpoint's presets, on record or recovered from their rows, in its order.

    Presets whose rows this checkpoint's table does not explain are left out, and so is what comes after
    `max_frames` frames.
    """
    folder = Path(folder)
    config = read_params(folder).voxtral_config()
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    found: list[Tensor] = []
    for entry in list_voices(folder):
        if not entry.preset or entry.problem or sum(c.shape[1] for c in found) >= max_frames:
            continue
        try:
            voice = load_voice(folder, entry.name)
        except VoiceError:  # a damaged preset is `revox inspect`'s business; the others serve
            continue
        codes = voice.codes
        if codes is None:
            recovered = recover_codes(voice.rows, table, config)
            codes = recovered.codes[:, recovered.exact] if recovered.exact.float().mean() > 0.9 else None
        if codes is not None and codes.shape[1]:
            found.append(codes)
    return found


def _settings(config: InversionConfig, budget: float | None, steps: int | None) -> InversionConfig:
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise CloneError(f"a budget of {budget:g} s leaves no time: give a number of seconds above 0")
    if steps is not None and steps < 0:
        raise CloneError(f"{steps} steps cannot be taken: give 0 or more")
    if budget is not None:
        config = dataclasses.replace(config, seconds=budget)
    if steps is not None:
        # Who asks for a few steps wants an answer soon: the polish is cut short in proportion.
        rounds = round(config.polish_rounds * min(1.0, steps / config.steps))
        config = dataclasses.replace(config, steps=steps, polish_rounds=rounds)
    return config


def float_codec(codec: Codec) -> Codec:
    """The codec in float32: a copy if it is not, for gradients through bf16 weights are too coarse."""
    if codec.output_proj.conv.weight.dtype == torch.float32:
        return codec
    return copy.deepcopy(codec).float().requires_grad_(False)
