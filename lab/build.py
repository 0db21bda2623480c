"""Building the lab checkpoint: speech, guide, encoder, decoder, language model, folder.

Every stage resumes where it stopped. Encoder and decoder can be started side by side once the guide is there;
the language model needs the encoder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lab.carried import take_up_state
from lab.codec_training import (
    HALVES,
    DecoderTrainer,
    DecoderTraining,
    ReferenceEncoderTrainer,
    ReferenceEncoderTraining,
)
from lab.coded import CodedSpeech, code_speech
from lab.data import KINDS, RATE, SpeechSet, prepare
from lab.errors import LabError
from lab.frames import FrameSet, make_frames, occupancies
from lab.guide import Guide, GuideTrainer, GuideTraining
from lab.language_training import LanguageData, LanguageTrainer, LanguageTraining, PromptTokens, Spoken
from lab.phone_reader import PhoneReader, PhoneReaderTrainer, PhoneReading
from lab.phones import phone_codebook
from lab.sentences import words, written
from lab.shards import unpack
from lab.sizes import PRESETS, lab_params
from lab.tokenizer import minimal_vocab_size, word_pieces, write_tekken
from revox.checkpoint.params import Params, read_params
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.tensors import write_safetensors_stream
from revox.coding.features import SpectralFeatures
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral, tensor_name
from revox.progress import Progress
from revox.speech.files import pt_bytes, replace_file, replacing
from revox.training.run import Run, saved_state

CODED_AT_ONCE = 32
"""Utterances, sorted by length so that little of a batch is padding."""

STAGES = ("speech", "guide", "encoder", "decoder", "language", "folder")

Report = Callable[[str, dict[str, float]], None]


@dataclass(frozen=True)
class SpeechCounts:
    """Sentences of each training speaker, of each preset, and of each speaker of the other splits."""

    per_speaker: int = 20
    per_preset: int = 300
    per_check: int = 10


@dataclass(frozen=True)
class BuildSettings:
    """Everything a build depends on besides the speech itself."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    guide: GuideTraining = field(default_factory=GuideTraining)
    encoder: ReferenceEncoderTraining = field(default_factory=ReferenceEncoderTraining)
    reader: PhoneReading = field(default_factory=PhoneReading)
    decoder: DecoderTraining = field(default_factory=DecoderTraining)
    language: LanguageTraining = field(default_factory=LanguageTraining)
    speech: SpeechCounts = field(default_factory=SpeechCounts)
    codec_sizes: dict[str, Any] = field(default_factory=dict)
    language_width: int = 256
    preset_frames: int = 56
    seed: int = 0


def domain_pieces() -> list[str]:
    """The pieces of text that get a token of their own: every word of the domain, as it may stand in a
    sentence."""
    starts = ((word, word[0].upper() + word[1:]) for word in words())
    inside = ((f"of {word}", written(f"first of {word}")) for word in words())
    return word_pieces(itertools.chain.from_iterable((*starts, *inside)))


def write_params(folder: Path, settings: BuildSettings) -> Params:
    """The lab's params.json and tekken.json (the presets' rows not yet known) in `folder`. Raises LabError
    where they were of other sizes: what has been learnt would not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    params = lab_params(minimal_vocab_size(domain_pieces()), settings.language_width, **settings.codec_sizes)
    path = folder / "params.json"
    before = None
    with contextlib.suppress(OSError, ValueError):  # one that cannot be read is written again
        before = json.loads(path.read_bytes())
    if before not in (None, params):
        raise LabError(
            f"{path} is of other sizes (language_width, codec_sizes) or another version: give this build a "
            "folder of its own"
        )
    replace_file(path, json.dumps(params, indent=1))
    _write_tokenizer(folder, dict.fromkeys(PRESETS, settings.preset_frames + 1), params)
    return read_params(folder)


def _write_tokenizer(folder: Path, rows: dict[str, int], params: dict[str, Any]) -> None:
    audio = params["multimodal"]["audio_model_args"]["audio_encoding_args"]
    write_tekken(
        folder / "tekken.json",
        rows,
        sampling_rate=audio["sampling_rate"],
        frame_rate=audio["frame_rate"],
        words=domain_pieces(),
    )


def build(
    run: Path,
    out: Path,
    librispeech: Path | None,
    settings: BuildSettings,
    *,
    encoder_out: Path,
    stages: tuple[str, ...] = STAGES,
    device: str = "cpu",
    autocast: bool = False,
    flite: Path | None = None,
    report: Report = lambda stage, row: None,
) -> None:
    """Build the lab checkpoint in `out`, working in `run`; the encoder goes to the file `encoder_out`.

    `librispeech` is a folder of human clips (None: synthetic speech only), `flite` one of a carried
    synthesiser (None: the installed one). A stage that is interrupted goes on from its last state when called
    again, or from the one that `python -m lab state` put into `run/state`; a stage that is complete is not
    repeated. Decoder and language model learn from the encoder's codes once it is done, before that from the
    guide's. Raises LabError when an earlier stage is missing.
    """
    run.mkdir(parents=True, exist_ok=True)
    for stage in take_up_state(run / "state", run):
        report(stage, {"carried states taken up": 1})
    if "speech" in stages:
        make_speech(run, librispeech, settings, report, flite)
    work = run / "folder"
    params = write_params(work, settings)
    if "guide" in stages:
        train_guide(run, params, settings, device, report)
    for stage in ("encoder", "decoder"):
        if stage in stages:
            train_half(stage, run, params, settings, device, autocast, report)
    if "language" in stages:
        train_language(run, work, params, settings, device, autocast, report)
    if "folder" in stages:
        assemble(run, work, params, settings, out, encoder_out)
        replace_file(run / "settings.json", json.dumps(asdict(settings), indent=1))


def make_speech(
    run: Path,
    librispeech: Path | None,
    settings: BuildSettings,
    report: Report,
    flite: Path | None = None,
) -> None:
    """The lab's speech in `run/data`: from `run/shards` where `python -m lab pack` made some, else made anew.

    Shards that hold human speech only are joined by synthetic speech made here.
    """

    def progress(at: Progress) -> None:
        report("speech", {at.what: at.done, "of": at.total or 0})

    if any((run / "shards").glob("*.shard")):
        unpack(run / "shards", run / "data", progress=progress)
        if any((run / "shards").glob("synthetic-*.shard")):
            return
        librispeech = None
    prepare(
        run / "data",
        librispeech,
        seed=settings.seed,
        progress=progress,
        per_speaker=settings.speech.per_speaker,
        per_preset=settings.speech.per_preset,
        per_check=settings.speech.per_check,
        workers=os.cpu_count() or 1,
        flite=flite,
    )


def _speech_sets(run: Path, split: str) -> dict[str, SpeechSet]:
    data = run / "data"
    return {k: SpeechSet(data, split, k) for k in KINDS if (data / f"{k}-{split}.json").is_file()}


def frame_sets(run: Path, params: Params, report: Report) -> dict[tuple[str, str], FrameSet]:
    """Features and phone labels of the training and validation speech, by (kind, split)."""
    config = params.voxtral_config().codec
    spectra = SpectralFeatures(config)
    book = _phone_book(run, params)
    return {
        (kind, split): make_frames(
            speech, spectra, book["centroids"], run / "guide" / f"features-{kind}-{split}.npy", RATE,
            partial(_report_done, report, f"features of {kind} {split}"),
        )
        for split in ("train", "validation")
        for kind, speech in _speech_sets(run, split).items()
    }  # fmt: skip


def _report_done(report: Report, what: str, done: int, of: int) -> None:
    report("frames", {what: done, "of": of})


def _reports(report: Report, stage: str, trainer: Run) -> Callable[[dict[str, float]], None]:
    """A run's reports as the build's: with how many steps there are, and how long they still take."""
    return lambda row: report(
        stage, row | {"of": trainer.schedule.steps, "seconds_left": trainer.seconds_left()}
    )


def _phone_book(run: Path, params: Params) -> dict[str, np.ndarray]:
    """Clusters of phones and codebook rows, made once."""
    path = run / "guide" / "phones.npz"
    config = params.voxtral_config().codec
    if not (run / "data" / "synthetic-train.json").is_file():
        raise LabError(f"{run / 'data'} holds no synthetic speech: run the stage `speech` first")
    if not path.is_file():
        known = occupancies(SpeechSet(run / "data", "train", "synthetic"), config.samples_per_frame, RATE)
        if any(one is None for one in known):
            raise LabError(f"the speech in {run / 'data'} has no phones: remove it and run `speech` again")
        frames = np.concatenate([one for one in known if one is not None])
        centroids, rows = phone_codebook(frames, config.semantic_codebook_size, config.semantic_dim, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez(file, centroids=centroids, rows=rows)
    with np.load(path) as kept:
        book = dict(kept)
    if book["rows"].shape != (config.semantic_codebook_size, config.semantic_dim):
        raise LabError(f"{path} is of another size of codebook: give this build a folder of its own")
    return book


def guide_trainer(
    run: Path, params: Params, settings: BuildSettings, device: str, frames: dict[tuple[str, str], FrameSet]
) -> GuideTrainer:
    """The guide's run, at the state it was left in."""
    held = {kind: one for (kind, split), one in frames.items() if split == "validation"}
    trainer = GuideTrainer(
        params.voxtral_config().codec, settings.guide, frames["synthetic", "train"],
        frames.get(("human", "train")), held, _phone_book(run, params)["rows"], run / "guide", device,
    )  # fmt: skip
    trainer.resume()
    return trainer


def train_guide(run: Path, params: Params, settings: BuildSettings, device: str, report: Report) -> None:
    """Settle what the codes mean."""
    trainer = guide_trainer(run, params, settings, device, frame_sets(run, params, report))
    trainer.run(
        _reports(report, "guide", trainer),
        trainer.validate,
        report_every=settings.guide.report_every,
        validate_every=settings.guide.validate_every,
    )


@contextlib.contextmanager
def _learnt(run: Path, stage: str, *, mmap: bool = False) -> Iterator[dict[str, Any]]:
    """The state of `stage`, for a body that takes it up. Raises LabError where there is none, TrainingError
    where it is of no use."""
    path = run / stage / f"{stage}-state.pt"
    if not path.is_file():
        raise LabError(f"{path} is missing: run the stage `{stage}` first")
    with saved_state(path, mmap=mmap) as state:
        yield state


def trained_guide(run: Path, params: Params, settings: BuildSettings) -> Guide:
    """The guide as it was left, on the CPU."""
    with _learnt(run, "guide") as kept:
        state = kept["guide"]
        config = params.voxtral_config().codec
        guide = Guide(config, len(state["mean"]), settings.guide.width, settings.guide.blocks)
        guide.load_state_dict(state)
    return guide.eval().requires_grad_(False)


def half_trainer(
    half: str, run: Path, params: Params, settings: BuildSettings, device: str, autocast: bool, report: Report
) -> ReferenceEncoderTrainer | DecoderTrainer:
    """The run of the codec's "encoder" or "decoder", at the state it was left in."""
    guide = trained_guide(run, params, settings)
    config = params.voxtral_config().codec
    # The decoder learns from the codes that it will be given, the encoder's; beside an encoder that is still
    # learning, from what that one is to learn.
    by = coder(run, params, settings, device) if half == "decoder" else None
    levels = (config.acoustic_codebook_size - 1) / 2
    coded: dict[tuple[str, str], CodedSpeech] = {}
    for (kind, split), frames in frame_sets(run, params, report).items():
        speech = _speech_sets(run, split)[kind]
        if by is None or by.name == "guide":
            coded[kind, split] = code_speech(
                guide, speech, frames, config.samples_per_frame, run / "guide" / f"codes-{kind}-{split}.npz",
                device, partial(_report_done, report, f"codes of {kind} {split}"),
            )  # fmt: skip
        else:
            codes = np.concatenate(encoded(run, by, kind, split, report), axis=1)
            values = (codes[1:].T / levels - 1).astype(np.float16)
            coded[kind, split] = CodedSpeech(speech, frames, codes[0], values, config.samples_per_frame)
    held = {kind: one for (kind, split), one in coded.items() if split == "validation"}
    common = (guide, coded["synthetic", "train"], coded.get(("human", "train")), held, run / half)
    trainer: ReferenceEncoderTrainer | DecoderTrainer
    if half == "encoder":
        trainer = ReferenceEncoderTrainer(config, settings.encoder, *common, device, autocast)
    else:
        reader = trained_reader(run, settings, device, report) if settings.decoder.phones else None
        trainer = DecoderTrainer(config, settings.decoder, *common, device, autocast, reader)
    trainer.resume()
    return trainer


def trained_reader(run: Path, settings: BuildSettings, device: str, report: Report) -> PhoneReader:
    """The reader of phones that the decoder is told by, trained to the end of its schedule."""
    speech = SpeechSet(run / "data", "train", "synthetic")
    trainer = PhoneReaderTrainer(settings.reader, speech, run / "decoder", device)
    trainer.resume()
    if trainer.step_count < settings.reader.steps:
        trainer.run(
            _reports(report, "reader", trainer),
            report_every=settings.reader.report_every, validate_every=settings.reader.steps,
        )  # fmt: skip
    return trainer.reader


def encoder_is_done(run: Path, settings: BuildSettings) -> bool:
    """Whether the encoder has been trained to the end of its schedule."""
    if not (run / "encoder" / "encoder-state.pt").is_file():
        return False
    with _learnt(run, "encoder", mmap=True) as kept:
        return bool(kept["step"] >= settings.encoder.steps)


@dataclass(frozen=True)
class WaveCoder:
    """What gives codes to waveforms: the encoder, or beside one that is still learning the guide, which it
    learns from. `stamp` tells one from another."""

    name: str
    stamp: str
    codes: Callable[[list[np.ndarray]], list[np.ndarray]]
    """int16 `[37, frames]` of each of several waveforms `[samples]`."""


def coder(run: Path, params: Params, settings: BuildSettings, device: str = "cpu") -> WaveCoder:
    """The encoder where it has been trained to its end, else the guide."""
    if encoder_is_done(run, settings):
        codec = trained_codec(run, params, ("encoder",))
        weights = sum(float(p.double().sum()) for p in codec.encoder_blocks.parameters())
        return WaveCoder("encoder", f"{weights:.9e}", partial(encode_speech, codec.to(device)))
    guide = trained_guide(run, params, settings)
    spectra = SpectralFeatures(params.voxtral_config().codec)
    weights = sum(float(p.double().sum()) for p in guide.parameters())
    guide.to(device)

    def of_guide(waves: list[np.ndarray]) -> list[np.ndarray]:
        return [guide_codes(guide, spectra(torch.from_numpy(wave)).to(device)) for wave in waves]

    return WaveCoder("guide", f"{weights:.9e}", of_guide)


def encoded(run: Path, by: WaveCoder, kind: str, split: str, report: Report) -> list[np.ndarray]:
    """Codes `[37, frames]` of every utterance, made once (in `run/NAME`)."""
    cache = run / by.name / f"language-codes-{kind}-{split}.npz"
    speech = SpeechSet(run / "data", split, kind)
    done = partial(_report_done, report, f"{by.name}'s codes of {kind} {split}")
    stamp = f"{len(speech)} {speech.seconds:.3f} {by.stamp}"
    return _cached_codes(cache, stamp, by, speech, done)


def train_half(
    half: str, run: Path, params: Params, settings: BuildSettings, device: str, autocast: bool, report: Report
) -> None:
    """Train the codec's "encoder" or "decoder" to the end of its schedule."""
    trainer = half_trainer(half, run, params, settings, device, autocast, report)
    trainer.run(
        _reports(report, half, trainer),
        trainer.validate,
        report_every=trainer.settings.report_every,
        validate_every=trainer.settings.validate_every,
    )


def _averaged(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The average among what a run kept, by the module's own names; nothing where it kept none."""
    found = state.get("averaged", {}).items()
    return {k.removeprefix("module."): v for k, v in found if k.startswith("module.")}


def trained_codec(run: Path, params: Params, halves: tuple[str, ...] = ("encoder", "decoder")) -> Codec:
    """The trained codec, on the CPU, in bf16's values (what the shipped file will hold).

    A half that is not asked for keeps fresh weights.
    """
    codec = Codec(params.voxtral_config().codec, with_encoder=True)
    for half in halves:
        with _learnt(run, half) as kept:
            state = kept["codec"] | _averaged(kept)
            own = {k: v for k, v in state.items() if k.startswith((*HALVES[half], "quantizer."))}
            codec.load_state_dict(own, strict=False)
    return codec.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def encode_speech(codec: Codec, waves: list[np.ndarray]) -> list[np.ndarray]:
    """Codes int16 `[37, frames]` of each of `waves` `[samples]`."""
    device = codec.output_proj.conv.weight.device
    codes = (codec.encode(torch.from_numpy(wave)[None].to(device))[0] for wave in waves)
    return [one.cpu().numpy().astype(np.int16) for one in codes]


@torch.no_grad()
def guide_codes(guide: Guide, features: torch.Tensor) -> np.ndarray:
    """Codes int16 `[37, frames]` that the guide gives for `features` `[frames, size]`."""
    semantic, acoustic = guide.encode(features[None])
    half = (guide.levels - 1) / 2
    levels = (torch.tanh(acoustic[0]) * half + half).round()
    return torch.cat((semantic, levels.T)).cpu().numpy().astype(np.int16)


def preset_waveforms(speech: SpeechSet, seconds: float) -> dict[str, np.ndarray]:
    """A fixed reference for each preset: its first training utterances, laid end to end and cut."""
    found: dict[str, np.ndarray] = {}
    for name in PRESETS:
        mine = [i for i, u in enumerate(speech.utterances) if u.preset == name]
        if not mine:
            raise LabError(f"the speech has no utterance of the preset {name}: run the stage `speech` again")
        samples = np.concatenate([speech.waveform(i) for i in mine[:8]])
        found[name] = samples[: int(seconds * 24000)]
    return found


def language_data(
    run: Path, folder: Path, params: Params, settings: BuildSettings, report: Report, device: str = "cpu"
) -> tuple[LanguageData, LanguageData]:
    """Training and validation utterances as codes (kept in `run`), with the presets' references and the
    prompt's ids."""
    by = coder(run, params, settings, device)
    tokenizer = _Tokenizer(folder)
    seconds = settings.preset_frames / params.voxtral_config().codec.frame_rate
    waves = preset_waveforms(SpeechSet(run / "data", "train", "synthetic"), seconds)
    references = dict(zip(waves, by.codes(list(waves.values())), strict=True))
    made = []
    for split in ("train", "validation"):
        speech = SpeechSet(run / "data", split, "synthetic")
        codes = encoded(run, by, "synthetic", split, report)
        spoken = [
            Spoken(c, tuple(tuple(tokenizer.text(t)) for t in (u.text, written(u.text))), u.speaker, u.preset)
            for u, c in zip(speech.utterances, codes, strict=True)
            if u.text
        ]
        made.append(LanguageData(spoken, references, tokenizer.prompt, settings.language))
    return made[0], made[1]


def _cached_codes(
    cache: Path, stamp: str, by: WaveCoder, speech: SpeechSet, progress: Callable[[int, int], None]
) -> list[np.ndarray]:
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return np.split(kept["codes"], kept["ends"][:-1], axis=1)
    found: dict[int, np.ndarray] = {}
    shortest_first = sorted(range(len(speech)), key=lambda i: speech.utterances[i].samples)
    for start in range(0, len(speech), CODED_AT_ONCE):
        chosen = shortest_first[start : start + CODED_AT_ONCE]
        found.update(zip(chosen, by.codes([speech.waveform(i) for i in chosen]), strict=True))
        if start // 500 != (start + len(chosen)) // 500:
            progress(len(found), len(speech))
    codes = [found[i] for i in range(len(speech))]
    cache.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([c.shape[1] for c in codes])
    with replacing(cache) as beside, open(beside, "wb") as file:
        np.savez(file, stamp=stamp, codes=np.concatenate(codes, axis=1), ends=ends)
    return codes


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

    def text(self, text: str) -> list[int]:
        return self.tekken.encode(text, bos=False, eos=False)


def train_language(
    run: Path,
    folder: Path,
    params: Params,
    settings: BuildSettings,
    device: str,
    autocast: bool,
    report: Report,
) -> None:
    """Train backbone and acoustic transformer on the codec's codes to the end of their schedule."""
    data, held = language_data(run, folder, params, settings, report, device)
    trainer = LanguageTrainer(
        params.voxtral_config(), settings.language, data, held, run / "language", device, autocast
    )
    trainer.resume()
    trainer.run(
        _reports(report, "language", trainer),
        trainer.validate,
        report_every=settings.language.report_every,
        validate_every=settings.language.validate_every,
    )


def assemble(
    run: Path, work: Path, params: Params, settings: BuildSettings, out: Path, encoder_out: Path
) -> None:
    """Write the checkpoint folder `out` in the release's format, and the encoder apart, to `encoder_out`."""
    codec = trained_codec(run, params)
    model = Voxtral(params.voxtral_config(), with_encoder=True)
    model.audio_tokenizer.load_state_dict(codec.state_dict())
    with _learnt(run, "language") as kept:
        spoken = {k: v for k, v in _averaged(kept).items() if not k.startswith("audio_tokenizer.")}
        model.load_state_dict(kept["model"] | spoken, strict=False)
    model = model.to(torch.bfloat16)
    tensors = {tensor_name(k): v.contiguous() for k, v in model.state_dict().items()}
    encoder = {k: v for k, v in tensors.items() if k.startswith(ENCODER_PREFIXES)}
    released = {k: v for k, v in tensors.items() if k not in encoder}
    (out / "voice_embedding").mkdir(parents=True, exist_ok=True)
    encoder_out.parent.mkdir(parents=True, exist_ok=True)
    _write_tensors(out / "consolidated.safetensors", released)
    _write_tensors(encoder_out, encoder)
    seconds = settings.preset_frames / params.voxtral_config().codec.frame_rate
    rows = {}
    for name, samples in preset_waveforms(SpeechSet(run / "data", "train", "synthetic"), seconds).items():
        codes = torch.from_numpy(encode_speech(codec, [samples])[0].astype(np.int64))
        voice = model.mm_audio_embeddings.voice_embedding(codes)
        replace_file(out / "voice_embedding" / f"{name}.pt", pt_bytes(voice.detach().clone()))
        rows[name] = len(voice)
    raw = json.loads((work / "params.json").read_text())
    replace_file(out / "params.json", json.dumps(raw, indent=1))
    _write_tokenizer(out, rows, raw)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def bits(tensor: torch.Tensor) -> np.ndarray:
        return tensor.view(torch.int16).numpy().view(np.uint16)

    write_safetensors_stream(
        path, [(name, tuple(t.shape), "BF16", bits(t)) for name, t in tensors.items()], {"format": "pt"}
    )
