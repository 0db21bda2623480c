"""A recording to a voice: choose, level, find the codes (by the encoder or by search), sum their rows."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.params import read_params
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.cloning.consent import provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.coding.encode import encode
from revox.coding.invert import (
    Guess,
    InversionConfig,
    InversionProgress,
    InversionResult,
    Opinion,
    invert,
)
from revox.coding.prior import CodePrior
from revox.coding.refine import Score, Scorer, guess_of, refine, refinement
from revox.coding.student import QuickEncoder
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral
from revox.speech import Audio, Selection, normalize_loudness, select_reference, whole_frames

METHODS = ("auto", "encoder", "inversion", "best")
"""The ways from sound to codes. "auto" is the encoder where there is one, else inversion; "best" goes every
way there is and keeps the best codes."""

PARTS = ("mm_audio_embeddings.audio_codebook_embeddings", "audio_tokenizer")
"""What cloning needs of a checkpoint (`revox.checkpoint.load.load_model`): not what speaks."""

MAX_BANK_FRAMES = 4000  # five minutes of preset speech say enough about codes


@dataclass(frozen=True)
class ClonedVoice:
    """A voice and how it came about.

    `selection` is the stretch of the recording, `reference` what was coded (the stretch, levelled, in whole
    frames, at the codec's rate), `decoded` the same through the voice's codes. `result` is of the search that
    found the codes kept; where they are the encoder's it has no step, and its loss is the spectral distance
    or, where there was something to compare with, the score. `kept` says whose codes the voice has
    ("encoder", "refined", "inversion"), `scores` what they were compared by (`revox.coding.refine`): empty
    when there was one way only.
    """

    voice: Voice
    selection: Selection
    result: InversionResult
    decoded: Audio
    reference: Audio
    kept: str = "inversion"
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)


def clone_voice(
    model: Voxtral,
    audio: Audio,
    *,
    consent: str,
    name: str = "clone",
    method: str = "auto",
    refine_steps: int = 0,
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
    """A voice from a recording. It is not added to any checkpoint.

    `model` needs only its `PARTS`. `consent` says whose voice it is and that they agreed. `method` is one of
    `METHODS`: with the checkpoint's encoder the codes are its own, at once, and `refine_steps` of inversion
    from there improve them, or else are thrown away; without it they are found by inversion.
    `budget` is in seconds for all searches, `steps` of plain inversion's descent; the same `steps`, `seed`
    and thread count give the same voice. `presets` are the codes `[37, frames]` of the model's own voices
    (`preset_codes`), which make a search quicker and keep it where the model's codes live. `source` is the
    recording's file (or its bytes), kept as a hash. A `selection` made before is used as it is. The quick
    `encoder` gives plain inversion its start and what it stays near. `transcript` is what is said in the
    recording, which is then used whole, or in the given selection; it is kept with the voice, and `opinion`,
    the language model's of codes that say it (`revox.coding.likelihood.opinion_on`), takes part in a search.
    `progress`, `should_stop` and KeyboardInterrupt: see `invert`.

    Raises CloneError without consent, for a setting out of range or that means nothing with this method and
    checkpoint, an encoder that is asked for and missing or gives no numbers, or audio that is not finite;
    AudioError when the recording holds too little speech.
    """
    agreed = record_consent(consent)
    check_transcript(transcript)
    ways = choose_ways(
        model.audio_tokenizer.has_encoder, method, refine_steps, budget, steps, encoder is not None
    )
    settings = _settings(config or InversionConfig(), budget, steps, len(ways) - ("encoder" in ways))
    codec = float_codec(model.audio_tokenizer)
    rate = codec.config.sampling_rate
    if not bool(torch.from_numpy(audio.samples).isfinite().all()):
        raise CloneError("the recording holds values that are not numbers: convert it again from its source")
    if selection is None:
        whole = transcript is not None
        selection = select_reference(audio, min_seconds, max_seconds, rate=rate, whole=whole)
    samples = normalize_loudness(Audio(selection.samples, selection.rate).at(rate).samples, rate)
    samples = whole_frames(samples, codec.samples_per_frame, rate)
    prior = CodePrior.from_codes(presets, codec) if presets else None
    target = torch.from_numpy(samples.copy())
    # Before the search: who moves the recording meanwhile loses nothing.
    origin = source_of(source if source is not None else audio.samples.tobytes())
    found = _find_codes(
        model.audio_tokenizer, codec, target, ways, refine_steps,
        config=settings, prior=prior, quick=encoder, opinion=opinion, seed=seed, progress=progress,
        should_stop=should_stop,
    )  # fmt: skip
    result = found.result
    with torch.no_grad():
        decoded = codec.decode(result.codes[None].to(codec.output_proj.conv.weight.device))[0].float().cpu()
        table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
        rows = model.mm_audio_embeddings.voice_embedding(result.codes.to(table.device)).to(
            "cpu", torch.bfloat16
        )
    record = provenance(
        agreed,
        "encoder, refined" if found.kept == "refined" else found.kept,
        {
            **_settings_of(found, settings, ways, refine_steps),
            **({"seed": seed, "preset_frames": sum(c.shape[1] for c in presets)} if found.searches else {}),
            **({"quick_encoder": encoder is not None} if "inversion" in ways else {}),
            **({"language_model_asked": opinion is not None} if found.searches else {}),
        },
        origin,
        start_s=round(selection.start, 3),
        seconds=round(len(samples) / rate, 3),
    )
    if transcript is not None:
        record["transcript"] = transcript
    voice = Voice(name, result.codes, rows, record)
    sound, reference = Audio(decoded.numpy(), rate), Audio(samples, rate)
    return ClonedVoice(voice, selection, result, sound, reference, found.kept, found.scores)


@dataclass(frozen=True)
class _Found:
    """The codes kept (`result`'s), what they were compared by, and all searches that were run."""

    result: InversionResult
    kept: str
    scores: dict[str, Score]
    searches: tuple[InversionResult, ...]


def choose_ways(
    has_encoder: bool,
    method: str = "auto",
    refine_steps: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    quick_encoder: bool = False,
) -> tuple[str, ...]:
    """The ways to codes that these settings mean, of "encoder", "refined" and "inversion", in that order.

    Raises CloneError for a method that there is not, and for settings that would be passed over.
    """
    if method not in METHODS:
        raise CloneError(f"there is no method {method!r}: it is one of {', '.join(METHODS)}")
    if refine_steps < 0:
        raise CloneError(f"{refine_steps} steps of refinement cannot be taken: give 0 or more")
    if method == "encoder" and not has_encoder:
        raise CloneError(
            "this checkpoint has no whole encoder: leave the method to auto, which inverts, or put an "
            "encoder in with `revox inject` (`revox inspect` tells what is there)"
        )
    encodes = has_encoder and method != "inversion"
    inverts = not encodes or method == "best"
    if refine_steps and not encodes:
        why = "the method is inversion" if has_encoder else "this checkpoint has no whole encoder"
        raise CloneError(
            f"--refine improves an encoder's codes, and {why}: leave it out (inversion has --steps)"
        )
    for given, what in ((steps is not None, "--steps"), (quick_encoder, "--quick-encoder")):
        if given and not inverts:
            raise CloneError(
                f"{what} is for inversion, and this checkpoint has an encoder, whose codes are taken at "
                "once: leave it out, improve the codes with --refine N, or say --method inversion"
            )
    if budget is not None and not inverts and not refine_steps:
        raise CloneError(
            "the encoder's codes are taken at once, so a budget limits nothing: leave it out, improve the "
            "codes with --refine N, or say --method inversion"
        )
    ways = (("encoder", encodes), ("refined", encodes and refine_steps > 0), ("inversion", inverts))
    return tuple(way for way, taken in ways if taken)


def _find_codes(
    own: Codec,
    codec: Codec,
    target: Tensor,
    ways: tuple[str, ...],
    refine_steps: int,
    *,
    config: InversionConfig,
    prior: CodePrior | None,
    quick: QuickEncoder | None,
    opinion: Opinion | None,
    seed: int,
    progress: Callable[[InversionProgress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> _Found:
    """The codes of `target`, by all `ways`; `own` is the checkpoint's codec, `codec` the same in float32."""
    began = time.monotonic()
    encoded = encode(own, target) if "encoder" in ways else None
    took = time.monotonic() - began
    inverted = None
    if "inversion" in ways:
        inverted = invert(
            codec, target, config=config, prior=prior,
            guess=None if quick is None else Guess(*quick.guess(target.to(_device(codec)))), opinion=opinion,
            seed=seed, progress=progress, should_stop=should_stop,
        )  # fmt: skip
        if encoded is None:
            return _Found(inverted, "inversion", {}, (inverted,))
    assert encoded is not None
    at_once = InversionResult(encoded.codes.cpu(), (), 0, took, False)
    if ways == ("encoder",):
        distance = Scorer(codec, target, config=config).score(encoded.codes).reconstruction
        return _Found(dataclasses.replace(at_once, losses=(distance,)), "encoder", {}, ())
    others = {} if inverted is None else {"inversion": inverted.codes}
    refined = None
    if "refined" in ways and not (inverted is not None and inverted.stopped):
        refined = refine(
            codec, target, encoded, refine_steps, config=config, prior=prior, opinion=opinion, others=others,
            seed=seed, progress=progress, should_stop=should_stop,
        )  # fmt: skip
        kept, scores = refined.kept, refined.scores
    else:
        guess = guess_of(codec, encoded)
        scorer = Scorer(codec, target, config=config, prior=prior, guess=guess, opinion=opinion)
        kept, scores = scorer.best_of({"encoder": encoded.codes, **others})
    results = {
        "encoder": dataclasses.replace(at_once, losses=(scores["encoder"].total,)),
        "refined": None if refined is None else refined.result,
        "inversion": inverted,
    }
    result = results[kept]
    assert result is not None
    searches = tuple(r for r in (inverted, results["refined"]) if r is not None)
    return _Found(result, kept, scores, searches)


def _device(codec: Codec) -> torch.device:
    return codec.output_proj.conv.weight.device


def _settings_of(
    found: _Found, config: InversionConfig, ways: tuple[str, ...], refine_steps: int
) -> dict[str, Any]:
    """What a voice's record says of the searches and of how their codes compared."""
    if not found.searches:
        return {"reconstruction": round(found.result.loss, 6)}
    if "inversion" not in ways:
        config = refinement(refine_steps, config)
    record = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    if "refined" in ways:
        record["refine"] = refine_steps
    record["steps_done"] = sum(search.steps for search in found.searches)
    record["stopped"] = any(search.stopped for search in found.searches)
    record["loss"] = round(found.result.loss, 6)
    if found.scores:
        record["kept"] = found.kept
        record["scores"] = {name: score.to_json() for name, score in found.scores.items()}
    return record


def check_transcript(transcript: str | None) -> None:
    """Raises CloneError when there is a transcript and it says nothing."""
    if transcript is not None and not transcript.strip():
        raise CloneError("the transcript is empty: write what is said in the recording, or leave it out")


def preset_codes(
    folder: Path | str,
    model: Voxtral,
    max_frames: int = MAX_BANK_FRAMES,
    should_stop: Callable[[], bool] | None = None,
) -> list[Tensor]:
    """Codes `[37, frames]` of a checkpoint's presets, on record or recovered from their rows, in its order.

    Presets whose rows this checkpoint's table does not explain are left out, and so is what comes after
    `max_frames` frames, or after `should_stop` (asked before each preset) says so.
    """
    folder = Path(folder)
    config = read_params(folder).voxtral_config()
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    found: list[Tensor] = []
    for entry in list_voices(folder):
        if should_stop is not None and should_stop():
            break
        if not entry.preset or entry.problem or sum(c.shape[1] for c in found) >= max_frames:
            continue
        try:
            voice = load_voice(folder, entry.name)
        except VoiceError:  # a damaged preset is `revox inspect`'s business; the others serve
            continue
        codes = voice.codes
        if codes is None:
            recovered = recover_codes(voice.embedding, table, config)
            codes = recovered.codes[:, recovered.exact] if recovered.exact.float().mean() > 0.9 else None
        if codes is not None and codes.shape[1]:
            found.append(codes)
    return found


def _settings(
    config: InversionConfig, budget: float | None, steps: int | None, searches: int = 1
) -> InversionConfig:
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise CloneError(f"a budget of {budget:g} s leaves no time: give a number of seconds above 0")
    if steps is not None and steps < 0:
        raise CloneError(f"{steps} steps cannot be taken: give 0 or more")
    if budget is not None:
        config = dataclasses.replace(config, seconds=budget / max(1, searches))
    if steps is not None:
        config = config.taking(steps)
    return config


def float_codec(codec: Codec) -> Codec:
    """The codec in float32: a copy if it is not, for gradients through bf16 weights are too coarse."""
    if codec.output_proj.conv.weight.dtype == torch.float32:
        return codec
    return copy.deepcopy(codec).float().requires_grad_(False)
