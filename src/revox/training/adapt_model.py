"""`revox train adapt`: what it needs, its runs, and the files of the change if it is worth having."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from revox.checkpoint.adapter import CONFIG_FILE, FACTORS_FILE, write_adapter
from revox.checkpoint.encoder_file import find_encoder, released_sha256
from revox.checkpoint.load import codec_with_encoder, default_dtype, load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.share import shareable
from revox.checkpoint.tensors import folder_tensors, write_safetensors_stream
from revox.checkpoint.voice_map import MAP_FILE, write_map
from revox.coding import Coder
from revox.coding.presets import preset_codes
from revox.coding.student import has_trained_student, trained_student
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file, stamp_of
from revox.synthesis.prompt import Prompter
from revox.training.adapt import AdaptTrainer, AdaptTraining, Decision, decide
from revox.training.adapt_data import (
    AdaptSpeech,
    clip_items,
    distilled,
    divided,
    preset_items,
    spoken_presets,
    stamp_of_items,
)
from revox.training.data import find_sources
from revox.training.errors import TrainingError
from revox.training.sentences import drawn_sentences
from revox.training.speaker import SpeakerLoss

ADAPTATION_FILE = "adaptation.safetensors"
ADAPTER_FOLDER = "adapter"
REPORT_FILE = "adaptation.json"


@dataclass(frozen=True)
class AdaptRequest:
    """What `adapt_model` does.

    `data` are specs of `find_sources`, for the objective "speech", and `consent` says whose speech that is
    and that they agreed; both are recorded with the adaptation. `texts` are what the presets say (else
    sentences of our own), `sentences` of them each. `encoder` is an encoder's file or a run's folder, for a
    checkpoint without one. `verifier` (what `SpeakerLoss.load` takes) has the guard compare voices.
    """

    training: AdaptTraining
    data: Sequence[str] = ()
    texts: Sequence[str] = ()
    consent: str | None = None
    sentences: int = 8
    encoder: Path | None = None
    verifier: str | None = None
    seeds: int = 2
    device: str = "cpu"
    dtype: torch.dtype | None = None
    progress: ProgressCallback = ignore_progress
    report: Callable[[str, dict[str, float]], None] = lambda run, figures: None


def coding_method(checkpoint: Path, request: AdaptRequest) -> str:
    """What codes voices: the encoder if one is named or there, else a trained student.

    Raises TrainingError where there is neither: a search for the codes of so many clips takes hours.
    """
    if request.encoder is not None or any(n.startswith(ENCODER_PREFIXES) for n in folder_tensors(checkpoint)):
        return "encoder"
    if has_trained_student(checkpoint):
        return "student"
    raise TrainingError(
        f"{checkpoint} has no encoder whose embeddings the model could be adapted to, and no student: "
        "restore it first (`revox train encoder`) and name its run with --encoder, inject it (`revox "
        "inject`), or train a student (`revox train student`)"
    )


def adapt_model(checkpoint: Path, out: Path, request: AdaptRequest) -> tuple[Decision, Path | None]:
    """Adapt the model of the folder `checkpoint` to its encoder; gives the decision and the file.

    Without a file the model is better left alone. Runs and codes are kept in `out`: what was stopped goes on
    with the same settings. Raises TrainingError if there is no encoder or too little speech,
    KeyboardInterrupt when asked to stop.
    """
    training = request.training
    device, dtype = request.device, request.dtype or default_dtype(checkpoint, torch.device(request.device))
    method, verifier = coding_method(checkpoint, request), None
    if request.verifier is not None:
        rate = read_params(checkpoint).voxtral_config().codec.sampling_rate
        verifier = SpeakerLoss.load(request.verifier, rate, device)
    texts = request.texts or drawn_sentences(40, training.seed)
    sources = find_sources(request.data, progress=request.progress) if request.data else []
    speech = AdaptSpeech(texts, out, request.sentences, sources, seed=training.seed)
    spoken = []
    if training.changes_weights:
        spoken = spoken_presets(checkpoint, speech, device, request.dtype, request.progress)
    model = load_model(checkpoint, device, dtype)
    if request.encoder is not None:
        codec = codec_with_encoder(checkpoint, find_encoder(request.encoder))
        model.audio_tokenizer = codec.to(device, dtype)
    coder = Coder(
        model.audio_tokenizer,
        lambda should_stop: preset_codes(checkpoint, model),
        student=partial(trained_student, checkpoint),
    )
    learns_clips = training.objective == "speech"
    presets = preset_items(checkpoint, coder, spoken, None if learns_clips else method, request.progress)
    items = clip_items(coder, speech, method, request.progress) if learns_clips else distilled(presets)
    data = divided(presets, items)
    base = released_sha256(checkpoint)
    learned = stamp_of(base, str(dtype), stamp_of_items([item for _, item in [*presets, *items]]))
    prompter = Prompter(checkpoint)

    def trainer(settings: AdaptTraining, name: str) -> AdaptTrainer:
        stamp = stamp_of(asdict(settings), learned)[:8]
        found = AdaptTrainer(model, prompter, settings, data, out / f"{name}-{stamp}", verifier)
        found.resume()
        return found

    decision = decide(trainer, training, request.seeds, request.report, request.progress)
    figures = ("adapt", "scale", "before", "after", "control", "spread")
    about = {name: getattr(decision, name) for name in figures}
    about |= {"guard": asdict(decision.guard), "training": asdict(training), "seeds": request.seeds}
    about |= {"data": list(request.data), "consent": request.consent, "verifier": request.verifier}
    about |= {"base_sha256": base, "clips": len(items) if learns_clips else 0}
    about = shareable(about)
    replace_file(out / REPORT_FILE, json.dumps(about, indent=1) + "\n")
    path = out / ADAPTATION_FILE
    for stale in (
        ADAPTATION_FILE,
        MAP_FILE,
        f"{ADAPTER_FOLDER}/{FACTORS_FILE}",
        f"{ADAPTER_FOLDER}/{CONFIG_FILE}",
    ):
        (out / stale).unlink(missing_ok=True)
    if not decision.adapt:
        return decision, None
    if decision.voice_map is not None:
        write_map(out / MAP_FILE, *decision.voice_map, checkpoint, about)
        return decision, out / MAP_FILE
    if decision.adapter is not None:
        write_adapter(out / ADAPTER_FOLDER, decision.adapter, about)
    entries = [(name, tuple(t.shape), "BF16", t) for name, t in decision.tensors.items()]
    write_safetensors_stream(path, entries, {"format": "pt", "revox": json.dumps(about)})
    request.progress(Progress("written", 1, 1))
    return decision, path
