"""From a checkpoint as released and folders of speech to an encoder: assembles what a run needs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revox.checkpoint.encoder_file import ENCODER_FILE, decoder_sha256, read_record
from revox.checkpoint.load import default_dtype, load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.voices import list_voices
from revox.coding.find import MODEL_PARTS
from revox.coding.presets import preset_codes
from revox.metrics.codes import perplexity, saturated_share
from revox.model.config import CodecConfig
from revox.model.voxtral import Voxtral
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file, stamp_of
from revox.synthesis.prompt import Prompter
from revox.training.data import ClipBatches, ClipSampler, SpeechSource, find_sources
from revox.training.data import report as report_sources
from revox.training.data.loading import decode_cut
from revox.training.data.locate import audio_source
from revox.training.data.manifest import Manifest, cut_source
from revox.training.encoder import EncoderTrainer, Teachers, TrainingData
from revox.training.errors import TrainingError, library
from revox.training.pseudo_labels import pseudo_labeled
from revox.training.sentences import drawn_sentences
from revox.training.settings import EncoderTraining, with_present_names
from revox.training.soft_labels import load_ensemble
from revox.training.spoken import SpokenSettings, Utterance, spoken_utterances
from revox.training.validation import Validation, ValidationClip
from revox.training.watch import Expected, Watch
from revox.training.world import World

SETTINGS_FILE = "settings.json"
HELD_OUT = 12  # validation clips, of speakers that are not trained on
HELD_OUT_SECONDS = 15.0  # of each, at most
HELD_OUT_SENTENCES = 32  # spoken for validation, in voices that are not trained on
TRAINING = "training the encoder"
"""The phase whose progress has a row of figures, at every report."""


@dataclass
class RunOptions:
    """What is not a setting of the method: where things are, and who receives messages.

    `sentences` are what the model says for pairs; without any, the transcripts of the data. `message`
    receives sentences for the user, `progress` the preparations and, of `TRAINING`, the figures of every
    report as facts. Only the main process calls them.
    """

    validation: Sequence[str] = ()
    refuse_below: int | None = None
    sentences: Sequence[str] = ()
    workers: int = 2
    device: str | None = None
    resume: bool = False
    cache: Path | None = None
    tensorboard: bool = True
    message: Callable[[str], None] = lambda sentence: None
    progress: ProgressCallback = ignore_progress


def restore_encoder(
    checkpoint: Path,
    data: Sequence[str],
    out: Path,
    settings: EncoderTraining,
    options: RunOptions | None = None,
) -> Path:
    """Train the encoder of `checkpoint` in the folder `out` to the end of `settings`; gives its file.

    `data` are the specs of `revox.training.data.find_sources`. A run that was stopped goes on with
    `options.resume`, with the same settings. Raises TrainingError on what cannot be done, KeyboardInterrupt
    (the state is saved) when it was asked to stop.
    """
    options = options or RunOptions()
    world = World.join(options.device)
    message = options.message if world.is_main else lambda sentence: None
    progress = options.progress if world.is_main else ignore_progress
    sources: list[SpeechSource] = []
    # Errors come before anything is written or computed.
    if settings.clips:
        library("lhotse")
    if settings.clips or settings.pseudo_labels:
        sources = find_sources(data, cache=options.cache, workers=options.workers, progress=progress)
    _check_folder(out, settings, options.resume, world, message)
    if "discriminator" in settings.model_fields_set and not settings.weights.feature:
        message("the config describes discriminators, but none is used: weights.feature is 0")
    model = load_model(checkpoint, dtype=torch.float32, parts=MODEL_PARTS)
    presets = [entry.name for entry in list_voices(checkpoint) if entry.preset and not entry.problem]
    voices, held_voices = hold_out_names(presets, len(presets))
    codes = preset_codes(checkpoint, model, only=voices)
    if not codes:
        raise TrainingError(f"{checkpoint} has no preset whose codes can be recovered: see `revox inspect`")
    config = read_params(checkpoint).voxtral_config().codec
    utterances = [Utterance("", one) for one in preset_codes(checkpoint, model, only=held_voices)]
    if settings.sentences and settings.pairs:
        given = options.sentences or texts_of(sources) or drawn_sentences(settings.sentences)
        texts, held_texts = hold_out_names(given, HELD_OUT_SENTENCES)
        message(
            f"the model speaks {settings.sentences:,} sentences, {len(texts):,} different ones, in the "
            f"voices of {len(voices)} presets and between them"
        )
        if 10 * len(texts) < settings.sentences:
            message("each is spoken more than ten times: more different --texts teach more")
        spoken = SpokenSettings(
            settings.sentences, texts, voices, interpolated=settings.interpolated, seed=settings.seed
        )
        speak = partial(
            spoken_utterances, checkpoint, cache=out / "spoken", device=world.device, world=world,
            progress=progress,
        )  # fmt: skip
        codes += [one.codes for one in speak(spoken)]
        if held_voices:
            others = SpokenSettings(
                HELD_OUT_SENTENCES, held_texts or texts, held_voices, interpolated=0.5, seed=settings.seed + 1
            )
            utterances = speak(others)
    seconds = sum(one.shape[1] for one in codes) / config.frame_rate
    message(f"{len(codes)} utterances of the model's own ({seconds:.0f} s) for pairs")
    about: dict[str, Any] = {"decoder_sha256": decoder_sha256(checkpoint), "data": list(data)}
    if options.sentences:
        about["sentences_sha256"] = stamp_of(list(options.sentences))
    if options.resume:
        _check_resumed(out, about)
    recordings = None
    train: list[SpeechSource] = []
    held: list[SpeechSource] = []
    if sources:
        found = report_sources(sources, refuse_below=options.refuse_below, workers=options.workers)
        for sentence in found.sentences:
            message(sentence)
        about["hours"], about["speakers"] = round(found.hours, 2), found.speakers
        train, held = divided_sources(found.sources, options)
    if settings.clips:
        sampler = ClipSampler(
            train, seconds=settings.frames(config) / config.frame_rate, seed=settings.seed,
            batch=-(-settings.clips // world.size),  # the trainer refuses what does not divide
            rank=world.rank, world=world.size,
        )  # fmt: skip
        recordings = ClipBatches(sampler, config.sampling_rate, workers=options.workers)
    teachers = _teachers(settings, config, out, world)
    if teachers.asr is not None:
        message(
            f"Whisper's states of the recordings are computed when they are first needed and kept in {out}/"
            f"whisper, {settings.whisper_cache_gb:g} GB at most"
        )
    if settings.weights.soft:
        load = partial(
            load_ensemble, model.audio_tokenizer.to(world.device), codes, settings, out / "students",
            stamp_of(about["decoder_sha256"], len(codes), settings.seed),
        )  # fmt: skip
        if world.is_main:
            load(progress)
        world.wait()
        teachers.soft = load()  # the students from their files
    labeled: list[tuple[Tensor, Tensor]] = []
    if settings.pseudo_labels:
        label = partial(
            pseudo_labeled, model.audio_tokenizer, codes, train, settings, out / "pseudo-labels",
            stamp=[about["decoder_sha256"], *data], device=world.device,
        )  # fmt: skip
        if world.is_main:
            label(progress=progress)
        world.wait()
        labeled = label()  # from the cache
    clips = validation_clips(held, config.sampling_rate)
    if settings.likelihood and clips and not any(clip.transcript for clip in clips):
        message(
            f"no validation clip of at most {HELD_OUT_SECONDS:.0f} s has a transcript: the language model's "
            "likelihood of recordings is not reported"
        )

    def language_model() -> tuple[Voxtral, Prompter]:
        dtype = default_dtype(checkpoint, world.device)
        return load_model(checkpoint, world.device, dtype), Prompter(checkpoint)

    writer = _writer(out) if options.tensorboard and world.is_main else None
    trainer = EncoderTrainer(
        model, TrainingData(codes, recordings, labeled), settings, out, teachers=teachers,
        validation=Validation(
            clips, utterances, language_model if settings.likelihood else None, writer
        ),
        world=world, about=about,
    )  # fmt: skip
    if options.resume:
        trainer.resume()
        message(f"continuing from step {trainer.step_count}")
    watch = Watch(_expected(model, codes, config.acoustic_codebook_size))

    def report(row: dict[str, float]) -> None:
        if not world.is_main:
            return
        items = settings.clips + settings.pairs + settings.pseudo_labels
        # Earlier sittings included; the row's own seconds are rounded, to 0 on a fast machine.
        seconds_a_step = trainer.seconds / trainer.step_count
        row = row | {
            "audio_seconds_per_second": round(settings.seconds * items / seconds_a_step, 2),
            "seconds_left": trainer.seconds_left(),
            "cpu_seconds": round(trainer.cpu_seconds, 2),
        }
        if torch.cuda.is_available():
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if writer is not None:
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["step"]))
        progress(Progress(TRAINING, trainer.step_count, settings.steps, row))
        for warning in watch.update(row):
            message(warning)

    try:
        trainer.run(
            report,
            trainer.validate,
            report_every=settings.report_every,
            validate_every=settings.validate_every,
        )
    finally:
        if recordings is not None:
            recordings.close()
        if writer is not None:
            writer.close()
    return out / ENCODER_FILE


def _check_resumed(out: Path, about: Mapping[str, Any]) -> None:
    """Raises TrainingError where the encoder so far learned from another codec, or from other sentences."""
    if not (out / ENCODER_FILE).is_file():
        return
    before = read_record(out / ENCODER_FILE)
    for name, what in (("decoder_sha256", "another checkpoint"), ("sentences_sha256", "other --texts")):
        if before.get(name, about.get(name)) != about.get(name):
            raise TrainingError(f"{out} was begun with {what}: give the same, or name another folder")


def texts_of(sources: Sequence[SpeechSource], most: int = 20_000) -> list[str]:
    """The transcripts of the clips, each once, in a fixed order of hashes.

    Only those of 4 to 200 characters: longer ones take long to speak, and shorter ones teach little.
    """
    found = {
        text.capitalize() if text.isupper() else text
        for source in sources
        for text in map(str.strip, source.cuts.texts())
        if 4 <= len(text) <= 200
    }
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:most]


def divided_sources(
    sources: Sequence[SpeechSource], options: RunOptions
) -> tuple[list[SpeechSource], list[SpeechSource]]:
    """What is trained on and what is validated on: `options.validation`, or else some of the speakers."""
    if options.validation:
        held = find_sources(options.validation, cache=options.cache)
        validated_on = {address for source in held for address in source.cuts.addresses()}
        return _without(
            sources, lambda cuts: np.array([address in validated_on for address in cuts.addresses()])
        ), held
    return hold_out(sources, HELD_OUT)


def hold_out(sources: Sequence[SpeechSource], clips: int) -> tuple[list[SpeechSource], list[SpeechSource]]:
    """`sources` without some speakers, and up to `clips` clips of those speakers, one each.

    At most a tenth of the speakers is held out, the same ones in every run on the same data; with fewer than
    ten speakers none. Who is held out of one source is held out of all: several may be of the same people.
    """
    held: list[SpeechSource] = []
    names: set[str] = set()
    left = clips
    for source in sources:
        cuts = source.cuts
        speaker = cuts.rows["speaker"]
        speakers = np.unique(speaker)
        count = min(left, len(speakers) // 10)
        chosen = speakers[np.random.default_rng(0).permutation(len(speakers))[:count]]
        if count:
            first = [int(np.flatnonzero(speaker == one)[0]) for one in chosen]
            held.append(dataclasses.replace(source, cuts=cuts.take(np.array(first))))
            left -= count
            names |= {cuts.speakers[one] for one in chosen}

    return _without(
        sources, lambda cuts: np.array([name in names for name in cuts.speakers])[cuts.rows["speaker"]]
    ), held


def _without(
    sources: Sequence[SpeechSource], is_held: Callable[[Manifest], np.ndarray]
) -> list[SpeechSource]:
    return [
        dataclasses.replace(source, cuts=source.cuts.take(np.flatnonzero(~is_held(source.cuts))))
        if len(source.cuts)
        else source
        for source in sources
    ]


def hold_out_names(names: Sequence[str], most: int) -> tuple[list[str], list[str]]:
    """`names` (texts, voices) without some of them, and those: a tenth, at most `most`, chosen by their
    hashes. Fewer than ten are all learned from."""
    count = min(most, len(names) // 10)
    held = set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [name for name in names if name not in held], [name for name in names if name in held]


def validation_clips(held: Sequence[SpeechSource], rate: int) -> list[ValidationClip]:
    """The first `HELD_OUT` clips of each source at `rate` Hz, of `HELD_OUT_SECONDS` at most."""
    found = []
    for source in held:
        for cut in itertools.islice(source.cuts, HELD_OUT):
            samples, whole, _ = decode_cut(
                audio_source(cut_source(cut)), 0.0, cut.recording.duration or None, HELD_OUT_SECONDS, rate
            )
            text = (cut.supervisions[0].text or "").strip() if whole else ""
            # Longer texts do not fit into such a clip, and may not fit into a prompt.
            known = text if len(text) < 500 else None
            found.append(ValidationClip(torch.from_numpy(samples), known, cut.supervisions[0].speaker))
    return found


def _check_folder(
    out: Path, settings: EncoderTraining, resume: bool, world: World, message: Callable[[str], None]
) -> None:
    path = out / SETTINGS_FILE
    asked = settings.model_dump(mode="json")
    if path.is_file():
        if not resume:
            raise TrainingError(
                f"{out} already holds a run: continue it with --resume, or name another folder"
            )
        try:  # a setting that came later has its default
            begun = json.loads(path.read_bytes())
            given, _ = with_present_names(begun)
            before = EncoderTraining.model_validate(given).model_dump(mode="json")
        except TrainingError:
            raise
        except (ValueError, AttributeError):
            raise TrainingError(
                f"{path} is not a run's settings: start a new run in another folder"
            ) from None
        other = [name for name in asked if before.get(name) != asked[name]]
        free = {
            "steps",
            "decay_steps",
            "save_every",
            "report_every",
            "validate_every",
            "keep",
            "compile",
            "likelihood",
            "whisper_cache_gb",
        }
        if set(other) - free:
            name = sorted(set(other) - free)[0]
            raise TrainingError(
                f"{out} was begun with another {name}: leave the config as it was, or start a new run"
            )
        if adversarial := begun.get("weights", {}).get("adversarial"):
            message(
                f"{out} was begun with weights.adversarial {adversarial:g}, by version 0.1: there is no such "
                "loss any more, and the run goes on without it"
            )
    elif resume:
        raise TrainingError(f"{out} does not hold a run to continue: leave --resume out")
    world.wait()
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(asked, indent=1))


def _expected(model: Any, codes: Sequence[Tensor], levels: int) -> Expected:
    together = torch.cat(list(codes), dim=1)
    norms = torch.stack(
        [
            model.mm_audio_embeddings.voice_embedding(one)[:-1].float().norm(dim=-1).mean()
            for one in codes[:20]
        ]
    )
    return Expected(
        perplexity(together), saturated_share(together, levels), float(norms.mean()), float(norms.std())
    )


def _teachers(settings: EncoderTraining, config: CodecConfig, out: Path, world: World) -> Teachers:
    rate, device = config.sampling_rate, world.device
    found = Teachers()
    if settings.weights.distillation and settings.whisper:
        from revox.training.distill import AsrDistillation, WhisperTeacher
        from revox.training.distiller import Distiller, StatesCache

        cache = StatesCache(out / "whisper", settings.whisper_cache_gb * 1e9, world.size)
        teacher = WhisperTeacher.load(settings.whisper, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            found.asr = Distiller(teacher, AsrDistillation(config.semantic_dim, teacher.width), rate, cache)
    if settings.weights.speaker and settings.verifier:
        from revox.training.speaker import SpeakerLoss

        found.speaker = SpeakerLoss.load(settings.verifier, rate, device)
    return found


def _writer(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is an extra: the log is there without it
        return None
    return SummaryWriter(str(out / "tensorboard"))
