"""`revox train adapt`: what it needs, its runs, and the files of the change if it is worth having."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from revox.checkpoint.adapter import CONFIG_FILE, FACTORS_FILE, write_adapter
from revox.checkpoint.encoder_file import find_encoder
from revox.checkpoint.load import codec_with_encoder, default_dtype, load_model
from revox.checkpoint.tensors import write_safetensors_stream
from revox.checkpoint.voice_map import MAP_FILE, write_map
from revox.coding import Coder
from revox.coding.presets import preset_codes
from revox.coding.student import trained_student
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


def adapt_model(checkpoint: Path, out: Path, request: AdaptRequest) -> tuple[Decision, Path | None]:
    """Adapt the model of the folder `checkpoint` to its encoder; gives the decision and the file.

    Without a file the model is better left alone. Runs and codes are kept in `out`: what was stopped goes on
    with the same settings. Raises TrainingError if there is no encoder or too little speech,
    KeyboardInterrupt when asked to stop.
    """
    training = request.training
    dtype = request.dtype or default_dtype(checkpoint, torch.device(request.device))
    model = load_model(checkpoint, request.device, dtype)
    if request.encoder is not None:
        codec = codec_with_encoder(checkpoint, find_encoder(request.encoder))
        model.audio_tokenizer = codec.to(request.device, dtype)
    coder = Coder(
        model.audio_tokenizer,
        lambda should_stop: preset_codes(checkpoint, model),
        student=partial(trained_student, checkpoint),
    )
    method: str | None = None
    if training.objective == "distill":
        method = "encoder" if coder.has_encoder else "student"
        if method == "student" and coder.student is None:
            raise TrainingError(
                f"{checkpoint} has no encoder whose embeddings could be distilled, and no student: restore "
                "it first (`revox train encoder`) and name its run with --encoder, inject it (`revox "
                "inject`), or train a student (`revox train student`)"
            )
    texts = request.texts or drawn_sentences(40, training.seed)
    sources = find_sources(request.data, progress=request.progress) if request.data else []
    speech = AdaptSpeech(texts, out, request.sentences, sources, seed=training.seed)
    presets = []
    if training.changes_weights:
        presets = preset_items(checkpoint, coder, speech, method, request.progress)
    if training.objective == "speech":
        items = clip_items(coder, speech, progress=request.progress)
    else:
        items = distilled(presets)
    data, learned = divided(presets, items), stamp_of_items([item for _, item in [*presets, *items]])
    prompter = Prompter(checkpoint)
    verifier = None
    if request.verifier is not None:
        verifier = SpeakerLoss.load(request.verifier, model.config.codec.sampling_rate, request.device)

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
