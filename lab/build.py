"""Building the lab checkpoint: speech, teacher codec, encoder, decoder, language model, folder.

Every stage resumes where it stopped. The encoder and the decoder can train at the same time once the teacher
codec is done. Then the decoder goes on with the encoder's codes (`finish`) while the language model learns
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lab import spoken
from lab.arrays import Arrays, cached_arrays
from lab.codec_training import (
    HALVES,
    CodecData,
    DecoderTrainer,
    DecoderTraining,
    ReferenceEncoderTrainer,
    ReferenceEncoderTraining,
)
from lab.data import KINDS, SpeechSet, prepare, read_utterance
from lab.errors import LabError
from lab.frames import FrameFeatures, FrameSet, make_frames
from lab.language_data import (
    FRAMES_PER_SECOND,
    LanguageData,
    PromptTokens,
    TokenizedText,
    TokenizedUtterance,
    part_of_speech,
    spoken_symbols,
    spoken_times,
)
from lab.language_training import (
    LanguageTrainer,
    LanguageTraining,
    Readout,
    predicted_codes,
)
from lab.semantic import (
    SemanticData,
    SemanticNetwork,
    SemanticTraining,
    WhisperStates,
    semantic_codes,
    train_semantic,
    whisper_states,
)
from lab.shards import SHARDS, unpack
from lab.sizes import PRESETS, lab_params
from lab.sources import SPEECH, preset_speakers, synthetic_utterances
from lab.speech.durations import Durations, read_durations
from lab.speech.plan import PlannedUtterance, plain_words, read_plan
from lab.state_bundle import averaged_weights, restore_bundles
from lab.teacher_codec import TeacherCodec, TeacherCodecTrainer, TeacherCodecTraining, TeacherData, is_leveled
from lab.tokenized import TokenizedSets, TokenizedSpeech, tokenize_speech
from lab.tokenizer import domain_pieces, minimal_vocab_size, write_tekken
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.tensors import write_safetensors_stream
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral, tensor_name
from revox.progress import Progress
from revox.speech.files import pt_bytes, replace_file, stamp_of
from revox.training.run import Run, saved_state

STAGES = ("speech", "teacher", "encoder", "decoder", "finish", "language", "tune", "folder")

SPOKEN_AT_ONCE = 500  # utterances whose codes are written together

Report = Callable[[str, dict[str, float]], None]
"""Takes the stage and its figures: losses, or how much of a count is done."""


@dataclass(frozen=True)
class BuildSettings:
    """Everything a build depends on besides the speech itself."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    semantic: SemanticTraining = field(default_factory=SemanticTraining)
    teacher: TeacherCodecTraining = field(default_factory=TeacherCodecTraining)
    encoder: ReferenceEncoderTraining = field(default_factory=ReferenceEncoderTraining)
    decoder: DecoderTraining = field(default_factory=DecoderTraining)
    finish: DecoderTraining = field(default_factory=DecoderTraining)
    """The decoder's second run, on the encoder's codes."""
    language: LanguageTraining = field(default_factory=LanguageTraining)
    tune: DecoderTraining = field(default_factory=lambda: DecoderTraining(steps=0))
    """The decoder's third run, on codes that the language model predicts as well. With no steps it is left
    out."""
    predicted_share: float = 0.5
    """Of the segments of `tune`, those of predicted codes."""
    text_pieces: int | None = None
    """How many of the committed pieces of text have a token of their own; None is all. With none, text is
    spelled in bytes, which a little speech teaches better."""
    codec_utterances: int = 4400
    """The first utterances of the plan, from which everything learns; later ones teach all but the network of
    the semantic codes."""
    codec_sizes: dict[str, Any] = field(default_factory=dict)
    language_width: int = 256
    language_layers: int = 4
    preset_frames: int = 56
    seed: int = 0


@dataclass(frozen=True)
class BuildRun:
    """A build in progress: `folder` with a folder for each stage, the settings, and how to compute.

    `device` is "cpu" or "cuda". `autocast` computes in bf16.
    """

    folder: Path
    settings: BuildSettings
    device: str = "cpu"
    autocast: bool = False
    report: Report = lambda stage, figures: None
    whisper: Path | None = None
    """The folder of the ASR teacher, where a stage asks for it."""
    spoken: Path = spoken.FOLDER
    """The folder of codes of speech (`lab.spoken`)."""

    @property
    def data(self) -> Path:
        """The folder of the speech."""
        return self.folder / "data"

    @property
    def work(self) -> Path:
        """The folder of params.json and tekken.json, from which the stages train."""
        return self.folder / "folder"

    @cached_property
    def params(self) -> Params:
        """The sizes, as `write_params` wrote them."""
        return read_params(self.work)

    def speech(self, split: str, kind: str = "synthetic") -> SpeechSet:
        """One set of the speech."""
        return SpeechSet(self.data, split, kind)

    def progress(self, stage: str, at: Progress) -> None:
        """Report progress of a stage that has no losses."""
        self.report(stage, {at.what: at.done, "of": at.total or 0})

    def train(self, trainer: Run, stage: str, settings: Any, validate: Callable[[], Any] | None) -> None:
        """Train to the end of the schedule; each report adds the number of steps and the seconds left.

        The state of a stage that is complete stays as it is.
        """
        if trainer.step_count >= trainer.schedule.steps and trainer.state_path.is_file():
            return
        trainer.run(
            lambda figures: self.report(
                stage, figures | {"of": trainer.schedule.steps, "seconds_left": trainer.seconds_left()}
            ),
            validate,
            report_every=settings.report_every,
            validate_every=settings.validate_every if validate else settings.steps,
        )

    @contextlib.contextmanager
    def state(self, stage: str) -> Iterator[dict[str, Any]]:
        """The saved state of `stage`, for a body that loads it.

        Raises LabError if there is none, TrainingError if it cannot be used.
        """
        path = self.folder / stage / f"{stage}-state.pt"
        if not path.is_file():
            raise LabError(f"{path} is missing: run the stage `{stage}` first")
        with saved_state(path) as state:
            yield state


def build(
    run: BuildRun,
    out: Path,
    encoder_out: Path,
    materials: Materials,
    *,
    stages: tuple[str, ...] = STAGES,
) -> None:
    """Build the lab checkpoint in the folder `out`; the reference encoder goes to the file `encoder_out`.

    A stage that was interrupted resumes from its last state, or from the state bundle in RUN/state; a stage
    that is complete is not repeated. Encoder and decoder learn from the teacher codec's codes, the language
    model from those of the encoder after both were trained together. Raises LabError if an earlier stage or a
    material is missing, or for `tune` with a part of the speech.
    """
    parts = run.settings.language.speakers < 1 or run.settings.language.speech < 1
    if "tune" in stages and run.settings.tune.steps and run.settings.predicted_share and parts:
        raise LabError(
            "`tune` pairs predicted codes with all of the speech, and `language.speakers` or "
            "`language.speech` leaves a part of it out: set both to 1, or `predicted_share` or "
            "`tune.steps` to 0"
        )
    run = replace(run, whisper=materials.whisper)
    run.folder.mkdir(parents=True, exist_ok=True)
    for stage in restore_bundles(run.folder / "state", run.folder):
        run.report(stage, {"state bundles restored": 1})
    if "speech" in stages:
        make_speech(run, materials)
    write_params(run)
    if "teacher" in stages:
        train_teacher(run)
    for half, steps in (("encoder", run.settings.encoder.steps), ("decoder", run.settings.decoder.steps)):
        if half in stages and steps:
            train_half(half, run)
    if "finish" in stages:
        if _is_tuned(run):  # what has been tuned has been finished before
            run.report("finish", {"left out, since `tune` has begun; steps": 0})
        else:
            finish_decoder(run)
    if "language" in stages:
        train_language(run)
    if "tune" in stages and run.settings.tune.steps:
        tune_decoder(run)
    if "folder" in stages:
        assemble(run, out, encoder_out)
        replace_file(run.folder / "settings.json", json.dumps(asdict(run.settings), indent=1))


# Speech and sizes


@dataclass(frozen=True)
class Materials:
    """What the lab is made from (`lab/speech/README.md`).

    `speech`: folders of synthetic speech. `librispeech`: human clips with transcripts, or None for synthetic
    speech only. `whisper`: the ASR teacher of the semantic codes.
    """

    speech: tuple[Path, ...] = ()
    librispeech: Path | None = None
    whisper: Path | None = None


def make_speech(run: BuildRun, materials: Materials) -> None:
    """Make the speech in RUN/data: from RUN/shards if `python -m lab pack` wrote them, or `materials`."""
    progress, shards = partial(run.progress, "speech"), run.folder / SHARDS
    if shards.is_dir():
        unpack(shards, run.data, progress=progress)
        return
    if not materials.speech:
        raise LabError("name the folders of synthetic speech (--speech); lab/speech/README.md makes one")
    prepare(
        run.data, materials.speech, materials.librispeech, run.settings.codec_utterances, progress=progress
    )


def write_params(run: BuildRun) -> None:
    """Write params.json and tekken.json, with a preliminary length of the presets, for the stages.

    Raises LabError if the folder has other sizes already: the saved states would not fit.
    """
    settings, path = run.settings, run.work / "params.json"
    run.work.mkdir(parents=True, exist_ok=True)
    params = lab_params(
        minimal_vocab_size(_pieces(settings)), settings.language_width, settings.language_layers,
        **settings.codec_sizes,
    )  # fmt: skip
    before = None
    with contextlib.suppress(OSError, ValueError):  # a damaged file is written again
        before = json.loads(path.read_bytes())
    if before not in (None, params):
        raise LabError(
            f"{path} has other sizes (language_width, codec_sizes) or is of another version: give this build "
            "a folder of its own"
        )
    replace_file(path, json.dumps(params, indent=1))
    rows = dict.fromkeys(PRESETS, settings.preset_frames + 1)
    _write_tokenizer(run.work, rows, params, _pieces(settings))


def _pieces(settings: BuildSettings) -> list[str]:
    return domain_pieces()[: settings.text_pieces]


def _write_tokenizer(folder: Path, rows: dict[str, int], params: dict[str, Any], pieces: list[str]) -> None:
    audio = params["multimodal"]["audio_model_args"]["audio_encoding_args"]
    write_tekken(
        folder / "tekken.json",
        rows,
        sampling_rate=audio["sampling_rate"],
        frame_rate=audio["frame_rate"],
        words=pieces,
    )


# Teacher codec


def frame_sets(
    run: BuildRun, splits: tuple[str, ...] = ("train", "validation")
) -> dict[tuple[str, str], FrameSet]:
    """Features of the speech, by (kind, split).

    Raises LabError if there is no synthetic speech.
    """
    if not (run.data / "synthetic-train.json").is_file():
        raise LabError(f"{run.data} holds no synthetic speech: run the stage `speech` first")
    spectra = FrameFeatures(run.params.voxtral_config().codec)
    return {
        (kind, split): make_frames(
            run.speech(split, kind), spectra, run.folder / "teacher" / f"features-{kind}-{split}.npy",
            partial(run.progress, "frames"),
        )
        for split in splits
        for kind in KINDS
        if (run.data / f"{kind}-{split}.json").is_file()
    }  # fmt: skip


def _whisper_states(run: BuildRun, kind: str, split: str, frames: FrameSet) -> WhisperStates:
    if run.whisper is None:
        raise LabError(
            "name the folder of a Whisper (--whisper), of whose states the semantic codes are made"
        )
    path = run.folder / "teacher" / f"whisper-{kind}-{split}.npy"
    return whisper_states(
        run.whisper, run.speech(split, kind), frames, path, partial(run.progress, "whisper")
    )


def semantic_network(run: BuildRun) -> SemanticNetwork:
    """The network that makes the semantic codes: that of the teacher codec's state, or learned of the speech
    of "train" (in bf16, so that what a state bundle holds makes the same codes).

    Raises LabError if no phonemes of the synthetic speech are known, or no Whisper is named.
    """
    config, settings = run.params.voxtral_config().codec, run.settings.semantic
    sizes = (FrameFeatures(config).mel_size, config.semantic_dim, config.semantic_codebook_size)
    with contextlib.suppress(LabError), run.state("teacher") as saved:
        network = SemanticNetwork(len(saved["semantic"]["mean"]), *sizes, settings)
        network.load_state_dict(saved["semantic"])
        return network.eval().requires_grad_(False)
    data: list[SemanticData] = []
    states_by_kind: dict[str, list[WhisperStates]] = {}
    for (kind, split), frames in frame_sets(run, ("train", "more")).items():
        states = _whisper_states(run, kind, split, frames)
        states_by_kind.setdefault(kind, []).append(states)
        if split == "train":
            data.append(SemanticData(states, frames, _half_frame_symbols(run, kind, split, frames)))
    if not any(one.symbols for one in data):
        raise LabError(
            "no phonemes are known of this speech, from which the semantic codes are made: run "
            "`python -m lab.speech.durations --kokoro MODEL --voices FILE --index SPEECH` first "
            "(lab/speech/README.md has both files)"
        )
    network = train_semantic(
        data, list(states_by_kind.values()), sizes, settings, partial(run.progress, "teacher")
    )
    return network.to(torch.bfloat16).float()


def _semantic_cache(run: BuildRun, rows: torch.Tensor, kind: str, split: str) -> tuple[Path, str]:
    stamp = stamp_of(run.speech(split, kind).identity, _identity([rows]))
    return run.folder / "teacher" / f"semantic-{kind}-{split}.cache", stamp


def make_semantic_codes(run: BuildRun, network: SemanticNetwork) -> dict[tuple[str, str], TeacherData]:
    """Frames and semantic codes of the speech, by (kind, split), cached for `semantic_data`."""
    found = {}
    for (kind, split), frames in frame_sets(run, ("train", "more", "validation")).items():

        def codes(kind: str = kind, split: str = split, frames: FrameSet = frames) -> Arrays:
            return {"codes": semantic_codes(network, _whisper_states(run, kind, split, frames))}

        made = cached_arrays(*_semantic_cache(run, network.rows, kind, split), codes)
        found[kind, split] = TeacherData(frames, made["codes"])
    return found


def semantic_data(run: BuildRun, teacher: TeacherCodec) -> dict[tuple[str, str], TeacherData]:
    """Frames and semantic codes of the speech, by (kind, split), as the stage `teacher` made them."""

    def missing() -> Arrays:
        raise LabError("the semantic codes of this speech are missing: run the stage `teacher` again")

    return {
        (kind, split): TeacherData(
            frames, cached_arrays(*_semantic_cache(run, teacher.rows, kind, split), missing)["codes"]
        )
        for (kind, split), frames in frame_sets(run, ("train", "more", "validation")).items()
    }


def teacher_trainer(run: BuildRun) -> TeacherCodecTrainer:
    """The teacher codec's run, at its last state."""
    network = semantic_network(run)
    data = make_semantic_codes(run, network)
    train = {
        kind: [data[kind, split] for split in ("train", "more") if (kind, split) in data]
        for kind in KINDS
        if (kind, "train") in data
    }
    validation = {kind: one for (kind, split), one in data.items() if split == "validation"}
    trainer = TeacherCodecTrainer(
        run.params.voxtral_config().codec, run.settings.teacher, train, validation, network,
        run.folder / "teacher", run.device, run.autocast,
    )  # fmt: skip
    trainer.resume()
    return trainer


def _half_frame_symbols(run: BuildRun, kind: str, split: str, frames: FrameSet) -> dict[int, np.ndarray]:
    durations, found = _spoken_durations(run.spoken), {}
    for i, u in enumerate(run.speech(split, kind).utterances):
        known = durations.get((u.speaker.removesuffix(f"-{u.speed}"), u.text or ""))
        if known and kind == "synthetic":
            halves = np.arange(2 * (frames.ends[i] - frames.starts[i])) / 2 + 0.25
            found[i] = spoken_symbols(known, halves, u.speed)
    return found


def train_teacher(run: BuildRun) -> None:
    """Train the teacher codec, which settles what the codes mean."""
    trainer = teacher_trainer(run)
    run.train(trainer, "teacher", run.settings.teacher, trainer.validate)
    if not trainer.leveled:  # `teacher.steps` was lowered to steps already taken
        trainer.use_levels()
        trainer.save()


def trained_teacher(run: BuildRun) -> TeacherCodec:
    """The teacher codec at its last state, on the CPU.

    Raises LabError if its training has not come to its end, which fits its values to the levels.
    """
    with run.state("teacher") as saved:
        if not is_leveled(saved):
            raise LabError("the teacher codec's training has not ended: run the stage `teacher` again")
        state, settings = saved["teacher"], run.settings.teacher
        config = run.params.voxtral_config().codec
        teacher = TeacherCodec(config, len(state["mean"]), settings.width, settings.blocks)
        teacher.load_state_dict(state)
    return teacher.eval().requires_grad_(False)


# Encoder and decoder


def half_trainer(half: str, run: BuildRun) -> ReferenceEncoderTrainer | DecoderTrainer:
    """The run of the codec's "encoder" or "decoder", at its last state."""
    config, settings = run.params.voxtral_config().codec, run.settings
    data, folder = _codec_data(run), run.folder / half
    trainer: ReferenceEncoderTrainer | DecoderTrainer
    if half == "encoder":
        trainer = ReferenceEncoderTrainer(config, settings.encoder, data, folder, run.device, run.autocast)
    else:
        trainer = DecoderTrainer(config, settings.decoder, data, folder, run.device, run.autocast)
    trainer.resume()
    return trainer


def _codec_data(
    run: BuildRun, encoder: Codec | None = None, predicted: dict[str, list[np.ndarray]] | None = None
) -> CodecData:
    """The speech with the teacher codec's codes, or with those of `encoder`.

    `predicted`: further codes of the utterances of "train", by kind, for a share of the segments.
    """
    teacher, config = trained_teacher(run), run.params.voxtral_config().codec
    found: dict[tuple[str, str], TokenizedSpeech] = {}

    def tokenized(speech: SpeechSet, frames: FrameSet, codes: list[np.ndarray]) -> TokenizedSpeech:
        joined = np.concatenate(codes, axis=1)
        values = (joined[1:].T * (2 / (config.acoustic_codebook_size - 1)) - 1).astype(np.float16)
        return TokenizedSpeech(speech, frames, joined[0], values, config.samples_per_frame)

    def mixed(kind: str) -> TokenizedSets | None:
        plain = [found[kind, s] for s in ("train", "more") if (kind, s) in found]
        if not plain or predicted is None:
            return TokenizedSets(plain) if plain else None
        speech = run.speech("train", kind)
        further = tokenized(speech, found[kind, "train"].frames, predicted[kind])
        return TokenizedSets(plain, further, run.settings.predicted_share)

    given = {} if encoder else semantic_data(run, teacher)
    for (kind, split), frames in frame_sets(run, ("train", "more", "validation")).items():
        speech = run.speech(split, kind)
        if encoder is None:
            found[kind, split] = tokenize_speech(
                teacher, speech, given[kind, split], config.samples_per_frame,
                run.folder / "teacher" / f"codes-{kind}-{split}.cache", run.device,
                partial(run.progress, "frames"),
            )  # fmt: skip
        else:
            found[kind, split] = tokenized(speech, frames, utterance_codes(run, encoder, kind, split))
    validation = {kind: one for (kind, split), one in found.items() if split == "validation"}
    synthetic = mixed("synthetic")
    assert synthetic is not None
    return CodecData(teacher, synthetic, mixed("human"), validation, run.whisper)


def train_half(half: str, run: BuildRun) -> None:
    """Train the codec's "encoder" or "decoder" to the end of its schedule."""
    trainer = half_trainer(half, run)
    run.train(trainer, half, trainer.settings, trainer.validate)


def finish_trainer(run: BuildRun) -> DecoderTrainer:
    """The decoder's run on the encoder's codes, at its last state, or at what it learned from the teacher
    codec's, or, if `decoder.steps` is 0, at its beginning."""
    data = _codec_data(run, trained_encoder(run).to(run.device))
    trainer = DecoderTrainer(
        run.params.voxtral_config().codec, run.settings.finish, data, run.folder / "finish", run.device,
        run.autocast, "finish",
    )  # fmt: skip
    if not trainer.resume() and run.settings.decoder.steps:
        with run.state("decoder") as decoder:
            trainer.begin(decoder)
    return trainer


def finish_decoder(run: BuildRun) -> None:
    """Train the decoder on the encoder's codes to the end of the schedule."""
    trainer = finish_trainer(run)
    run.train(trainer, "finish", trainer.settings, trainer.validate)


def tune_decoder(run: BuildRun) -> None:
    """Train the decoder further, on the encoder's codes and on those that the language model predicts of the
    same speech, to the end of the schedule."""
    predicted = None
    if run.settings.predicted_share:
        predicted = {kind: predicted_speech(run, kind) for kind in KINDS if _has(run, kind, "train")}
    data = _codec_data(run, trained_encoder(run).to(run.device), predicted)
    settings = run.settings.tune
    trainer = DecoderTrainer(
        run.params.voxtral_config().codec,
        settings,
        data,
        run.folder / "tune",
        run.device,
        run.autocast,
        "tune",
    )
    if not trainer.resume():
        with run.state("finish") as finish:
            trainer.begin(finish)
    run.train(trainer, "tune", settings, trainer.validate)


def _has(run: BuildRun, kind: str, split: str) -> bool:
    return (run.data / f"{kind}-{split}.json").is_file()


def _trained(run: BuildRun, *stages: str) -> Codec:
    codec = Codec(run.params.voxtral_config().codec, with_encoder=True)
    for stage in stages:
        with run.state(stage) as saved:
            codec.load_state_dict(saved["codec"] | averaged_weights(saved), strict=False)
    return codec.to(torch.bfloat16).float().eval().requires_grad_(False)


def trained_encoder(run: BuildRun) -> Codec:
    """The codec with its trained encoder, and a decoder that is not, on the CPU.

    Values are rounded to bf16 as in the shipped file.
    """
    return _trained(run, "encoder")


def trained_codec(run: BuildRun) -> Codec:
    """The trained codec, on the CPU, rounded like `trained_encoder`'s."""
    return _trained(run, "encoder", "tune" if _is_tuned(run) else "finish")


def _is_tuned(run: BuildRun) -> bool:
    return (run.folder / "tune" / "tune-state.pt").is_file()


# Codes


@torch.no_grad()
def encode_speech(codec: Codec, wave: np.ndarray) -> np.ndarray:
    """Codes int16 `[37, frames]` of `wave` `[samples]`."""
    device = codec.output_proj.conv.weight.device
    return codec.encode(torch.from_numpy(wave)[None].to(device))[0].cpu().numpy().astype(np.int16)


def encoder_identity(codec: Codec) -> str:
    """Twelve hexadecimal digits that change with the codec's encoder: of its bf16 weights, so that they are
    the same on every processor."""
    return _identity(p for k, p in codec.named_parameters() if k.startswith(HALVES["encoder"]))


def _identity(weights: Iterable[torch.Tensor]) -> str:
    bits = (p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16) for p in weights)
    return hashlib.sha256(b"".join(b.numpy().tobytes() for b in bits)).hexdigest()[:12]


def utterance_codes(run: BuildRun, codec: Codec, kind: str, split: str) -> list[np.ndarray]:
    """Codes `[37, frames]` of every utterance, cached for this codec and this speech."""
    speech = run.speech(split, kind)

    def encode() -> Arrays:
        codes = []
        for i in range(len(speech)):
            codes.append(encode_speech(codec, speech.waveform(i)))
            if i % 500 == 499:
                run.progress("frames", Progress(f"codes of {kind} {split}", i + 1, len(speech)))
        return {"codes": np.concatenate(codes, axis=1), "ends": np.cumsum([c.shape[1] for c in codes])}

    cache = run.folder / "language" / f"codes-{kind}-{split}.cache"
    cached = cached_arrays(cache, stamp_of(speech.identity, encoder_identity(codec)), encode)
    return np.split(cached["codes"], cached["ends"][:-1], axis=1)


# Language model


def preset_waveforms(speech: SpeechSet, seconds: float) -> dict[str, np.ndarray]:
    """A fixed reference for each preset: its first training utterances, concatenated and cut to `seconds`."""
    found: dict[str, np.ndarray] = {}
    for name in PRESETS:
        mine = [i for i, u in enumerate(speech.utterances) if u.preset == name]
        if not mine:
            raise LabError(f"the speech has no utterance of the preset {name}: run the stage `speech` again")
        samples = np.concatenate([speech.waveform(i) for i in mine[:8]])
        found[name] = samples[: int(seconds * 24000)]
    return found


def _preset_seconds(run: BuildRun) -> float:
    return run.settings.preset_frames / run.params.voxtral_config().codec.frame_rate


def language_data(
    run: BuildRun,
    encode: Callable[[np.ndarray], np.ndarray],
    codes_of: Callable[[str, str], list[np.ndarray]],
    extra: Sequence[tuple[PlannedUtterance, np.ndarray]] = (),
) -> tuple[LanguageData, LanguageData]:
    """Training and validation utterances as codes, with the presets' references and the prompt's ids.

    `encode` gives codes `[37, frames]` of samples, `codes_of` those of a kind and split's utterances.
    `extra`: further training utterances with their codes.
    """
    tokenizer = _Tokenizer(run.work)
    waves = preset_waveforms(run.speech("train", "synthetic"), _preset_seconds(run))
    references = {name: encode(wave) for name, wave in waves.items()}
    durations = _spoken_durations(run.spoken)
    made = []
    for splits in (("train", "more"), ("validation",)):
        utterances = []
        for kind, split in itertools.product(KINDS, splits):
            if not (run.data / f"{kind}-{split}.json").is_file():
                continue
            for u, c in zip(run.speech(split, kind).utterances, codes_of(kind, split), strict=True):
                if not u.text:
                    continue
                times = symbols = None
                if u.words is not None:
                    times = np.array(u.words) * FRAMES_PER_SECOND
                elif known := durations.get((u.speaker.removesuffix(f"-{u.speed}"), u.text)):
                    times, symbols = spoken_times(known, c.shape[1], u.speed)
                utterances.append(
                    TokenizedUtterance(
                        c, tokenizer.forms(u.text), u.speaker, u.preset, kind == "human", times, symbols
                    )
                )
        if splits[0] == "train":
            roles = {speaker: preset for preset, speaker in preset_speakers().items()}
            for i, c in extra:
                known = durations.get((i.speaker, i.written))
                times, symbols = spoken_times(known, c.shape[1]) if known else (None, None)
                forms, preset = tokenizer.forms(i.written), roles.get(i.speaker)
                utterances.append(TokenizedUtterance(c, forms, i.speaker, preset, False, times, symbols))
            shares = run.settings.language
            utterances = part_of_speech(utterances, shares.speakers, shares.speech)
        settings = run.settings.language
        if splits[0] == "validation":  # as people speak, and comparable with other settings
            settings = replace(settings, spliced=0.0)
        made.append(LanguageData(utterances, references, tokenizer.prompt, settings, tokenizer.space))
    return made[0], made[1]


def _spoken_durations(folder: Path) -> dict[tuple[str, str], Durations]:
    """What is known of when phonemes are said, by speaker and sentence."""
    found = read_durations(folder / "durations.npz")
    return {(item.speaker, item.written): found[item.number] for item in _plan() if item.number in found}


class _Tokenizer:
    """The lab's tekken.json as mistral-common reads it."""

    def __init__(self, folder: Path) -> None:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        self.tekken = Tekkenizer.from_file(folder / "tekken.json")
        special = self.tekken.get_special_token
        self.prompt = PromptTokens(
            bos=self.tekken.bos_id,
            audio=special("[AUDIO]"),
            begin_audio=special("[BEGIN_AUDIO]"),
            next_audio_text=special("[NEXT_AUDIO_TEXT]"),
            repeat_audio_text=special("[REPEAT_AUDIO_TEXT]"),
        )

        (self.space,) = self.tekken.encode(" ", bos=False, eos=False)

    def forms(self, text: str) -> tuple[TokenizedText, ...]:
        """A text as written, and its plain words."""
        return tuple(
            TokenizedText.of(t, tuple(self.tekken.encode(t, bos=False, eos=False)))
            for t in (text, plain_words(text))
        )


def _language_trainer(
    run: BuildRun, settings: LanguageTraining, data: tuple[LanguageData, LanguageData]
) -> LanguageTrainer:
    config, folder = run.params.voxtral_config(), run.folder / "language"
    trainer = LanguageTrainer(config, settings, data, folder, run.device, run.autocast)
    trainer.use_codebook(_standard_book(trained_teacher(run)))
    return trainer


def _standard_book(teacher: TeacherCodec) -> torch.Tensor:
    rows = teacher.rows.detach()
    return (rows - rows.mean(0)) / rows.std()


def encoded_language_data(run: BuildRun) -> tuple[LanguageData, LanguageData]:
    """`language_data` with the trained encoder's codes, and with those of speech that only its codes are left
    of (`lab.spoken`)."""
    codec = trained_encoder(run).to(run.device)
    codes = spoken.read_codes(run.spoken, encoder_identity(codec))
    there = set(_planned(run))
    extra = [(item, codes[item.number]) for item in _plan() if item.number in codes.keys() - there]
    run.report("language", {"utterances without their sound": len(extra)})
    return language_data(run, partial(encode_speech, codec), partial(utterance_codes, run, codec), extra)


def pack_spoken(run: BuildRun, folder: Path, speech: Sequence[Path]) -> tuple[int, int]:
    """Add to `folder` the codes of the training utterances in the folders `speech` that it lacks.

    Returns how many were added, and are there. Raises LabError as `spoken.add_codes` does, or if a folder has
    no index of speech.
    """
    codec, numbers = trained_encoder(run).to(run.device), {(i.speaker, i.written): i for i in _plan()}
    there = spoken.read_codes(folder, encoder_identity(codec))
    utterances = [(numbers[u.speaker, u.text or ""], u) for u in synthetic_utterances(speech, "train")]
    new = [(item, u) for item, u in utterances if item.number not in there]

    def made(start: int) -> Iterator[tuple[PlannedUtterance, np.ndarray, float]]:
        for done, (item, utterance) in enumerate(new[start : start + SPOKEN_AT_ONCE], start + 1):
            samples, _ = read_utterance(utterance)
            yield item, encode_speech(codec, samples.astype(np.float32) / 32768), len(samples) / 24000
            if done % 100 == 0 or done == len(new):
                run.progress("spoken", Progress("codes", done, len(new)))

    # A part at a time is written, so that an interruption loses no more than that.
    parts = [
        spoken.add_codes(folder, encoder_identity(codec), made(start))
        for start in range(0, len(new) or 1, SPOKEN_AT_ONCE)
    ]
    return sum(added for added, _ in parts), parts[-1][1]


def _plan() -> list[PlannedUtterance]:
    return read_plan(SPEECH / "plan.tsv")


def _planned(run: BuildRun) -> dict[int, tuple[str, int]]:
    """Split and place in it of the training plan's utterances that RUN/data has the sound of, by number."""
    numbers = {(item.speaker, item.written): item.number for item in _plan()}
    found = {}
    for split in ("train", "more"):
        if (run.data / f"synthetic-{split}.json").is_file():
            for index, u in enumerate(run.speech(split).utterances):
                if u.text and (u.speaker, u.text) in numbers:
                    found[numbers[u.speaker, u.text]] = (split, index)
    return found


def train_language(run: BuildRun) -> None:
    """Train backbone and acoustic transformer on the encoder's codes to the end of their schedule."""
    data, settings = encoded_language_data(run), run.settings.language
    trainer = _language_trainer(run, settings, data)
    trainer.resume()
    run.train(trainer, "language", settings, trainer.validate)


def predicted_speech(run: BuildRun, kind: str) -> list[np.ndarray]:
    """Codes of every training utterance as the language model predicts them from its text and the true frames
    before; of one without a text or a reference, the encoder's. Cached for this language model."""
    speech, (data, _) = run.speech("train", kind), encoded_language_data(run)
    rng = np.random.default_rng(run.settings.seed)
    data.settings = replace(run.settings.language, spliced=0.0)
    with run.state("language") as saved:
        averaged = {k: v for k, v in averaged_weights(saved).items() if not k.startswith("audio_tokenizer.")}
        model = Voxtral(run.params.voxtral_config(), with_encoder=False)
        model.load_state_dict(saved["model"] | averaged, strict=False)
        readout = None
        learned: list[torch.Tensor] = [
            p for k, p in model.named_parameters() if not k.startswith("audio_tokenizer.")
        ]
        if "readout" in saved:
            readout = Readout(model.config.backbone.dim, model.config.codec)
            readout.load_state_dict(saved["readout"])
            readout.book.copy_(_standard_book(trained_teacher(run)))
            learned += [*readout.parameters(), readout.book]
    codec = trained_encoder(run).to(run.device)
    settings = run.settings.language
    model_stamp = stamp_of(_identity(learned), settings.temperature, settings.own_steps)
    stamp = stamp_of(speech.identity, encoder_identity(codec), model_stamp, run.settings.seed)

    def predict() -> Arrays:
        codes = utterance_codes(run, codec, kind, "train")
        # The utterances with a text, in their order, are the kind's first in the language model's data.
        first = next(i for i, u in enumerate(data.utterances) if u.human == (kind == "human"))
        with_text = [i for i, u in enumerate(speech.utterances) if u.text]
        places = {i: first + n for n, i in enumerate(with_text)}
        known = [i for i in with_text if data.has_reference(places[i])]
        known.sort(key=lambda i: codes[i].shape[1])
        noise = torch.Generator().manual_seed(run.settings.seed)
        for start in range(0, len(known), 16):
            part = known[start : start + 16]
            items = [data.item(places[i], rng) for i in part]
            found = predicted_codes(model, items, data.tokens.audio, noise, settings, readout)
            for i, one in zip(part, found, strict=True):
                codes[i] = one
            if start % 320 == 0:
                run.progress("tune", Progress(f"predicted codes, {kind}", start + len(part), len(known)))
        return {"codes": np.concatenate(codes, axis=1), "ends": np.cumsum([c.shape[1] for c in codes])}

    cached = cached_arrays(run.folder / "tune" / f"codes-{kind}.cache", stamp, predict)
    return np.split(cached["codes"], cached["ends"][:-1], axis=1)


# The checkpoint


def assemble(run: BuildRun, out: Path, encoder_out: Path) -> None:
    """Write the checkpoint folder `out` in the release's format, without its encoder, which goes to the file
    `encoder_out`."""
    codec = trained_codec(run)
    model = Voxtral(run.params.voxtral_config(), with_encoder=True)
    model.audio_tokenizer.load_state_dict(codec.state_dict())
    with run.state("language") as saved:
        averaged = {k: v for k, v in averaged_weights(saved).items() if not k.startswith("audio_tokenizer.")}
        model.load_state_dict(saved["model"] | averaged, strict=False)
    model = model.to(torch.bfloat16)
    tensors = {tensor_name(k): v.contiguous() for k, v in model.state_dict().items()}
    encoder = {k: v for k, v in tensors.items() if k.startswith(ENCODER_PREFIXES)}
    released = {k: v for k, v in tensors.items() if k not in encoder}
    (out / "voice_embedding").mkdir(parents=True, exist_ok=True)
    encoder_out.parent.mkdir(parents=True, exist_ok=True)
    _write_tensors(out / "consolidated.safetensors", released)
    _write_tensors(encoder_out, encoder)
    rows = {}
    for name, samples in preset_waveforms(run.speech("train", "synthetic"), _preset_seconds(run)).items():
        codes = torch.from_numpy(encode_speech(codec, samples).astype(np.int64))
        voice = model.mm_audio_embeddings.voice_embedding(codes)
        replace_file(out / "voice_embedding" / f"{name}.pt", pt_bytes(voice.detach().clone()))
        rows[name] = len(voice)
    raw = json.loads((run.work / "params.json").read_text())
    replace_file(out / "params.json", json.dumps(raw, indent=1))
    _write_tokenizer(out, rows, raw, _pieces(run.settings))


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def bits(tensor: torch.Tensor) -> np.ndarray:
        return tensor.view(torch.int16).numpy().view(np.uint16)

    write_safetensors_stream(
        path, [(name, tuple(t.shape), "BF16", bits(t)) for name, t in tensors.items()], {"format": "pt"}
    )
