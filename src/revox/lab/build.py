"""Building the lab checkpoint: speech, codec, language model, folder; every stage resumes where it
stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revox.checkpoint.params import Params, read_params
from revox.checkpoint.tensors import ENCODER_PREFIXES, write_safetensors_stream
from revox.checkpoint.write import replace_file
from revox.lab.codec_training import CodecTrainer, CodecTraining, validate
from revox.lab.data import SpeechSet, prepare
from revox.lab.errors import LabError
from revox.lab.language_training import LanguageData, LanguageTrainer, LanguageTraining, PromptTokens, Spoken
from revox.lab.sentences import words, written
from revox.lab.shards import unpack
from revox.lab.sizes import PRESETS, lab_params
from revox.lab.tokenizer import minimal_vocab_size, word_pieces, write_tekken
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral, tensor_name

STAGES = ("speech", "codec", "language", "folder")
ENCODER_FILE = "encoder.safetensors"

Report = Callable[[str, dict[str, float]], None]


@dataclass(frozen=True)
class SpeechCounts:
    """Sentences of each training speaker, of each preset, and of each speaker of the other splits."""

    per_speaker: int = 25
    per_preset: int = 60
    per_check: int = 10


@dataclass(frozen=True)
class BuildSettings:
    """Everything a build depends on besides the speech itself."""

    codec: CodecTraining = field(default_factory=CodecTraining)
    language: LanguageTraining = field(default_factory=LanguageTraining)
    speech: SpeechCounts = field(default_factory=SpeechCounts)
    codec_sizes: dict[str, Any] = field(default_factory=dict)
    preset_frames: int = 56
    seed: int = 0


def domain_pieces() -> list[str]:
    """The pieces of text that get a token of their own: every word of the domain, as it may stand in a
    sentence."""
    starts = ((word, word[0].upper() + word[1:]) for word in words())
    inside = ((f"of {word}", written(f"first of {word}")) for word in words())
    return word_pieces(itertools.chain.from_iterable((*starts, *inside)))


def write_params(folder: Path, settings: BuildSettings) -> Params:
    """The lab's params.json and tekken.json (the presets' rows not yet known) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    params = lab_params(minimal_vocab_size(domain_pieces()), **settings.codec_sizes)
    replace_file(folder / "params.json", json.dumps(params, indent=1))
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
    report: Report = lambda stage, row: None,
) -> None:
    """Build the lab checkpoint in `out`, working in `run`; the encoder goes to the file `encoder_out`.

    `librispeech` is a folder of human clips (None: synthetic speech only). A stage that is interrupted goes
    on from its last state when called again; a stage that is complete is not repeated. Raises LabError when
    an
    earlier stage is missing.
    """
    run.mkdir(parents=True, exist_ok=True)
    if "speech" in stages:
        make_speech(run, librispeech, settings, report)
    work = run / "folder"
    params = write_params(work, settings)
    if "codec" in stages:
        train_codec(run, params, settings, device, autocast, report)
    if "language" in stages:
        train_language(run, work, params, settings, device, autocast, report)
    if "folder" in stages:
        assemble(run, work, params, settings, out, encoder_out)
        replace_file(run / "settings.json", json.dumps(asdict(settings), indent=1))


def make_speech(run: Path, librispeech: Path | None, settings: BuildSettings, report: Report) -> None:
    """The lab's speech in `run/data`: from `run/shards` where `revox lab pack` made some, else made anew."""

    def progress(what: str, done: int, of: int) -> None:
        report("speech", {what: done, "of": of})

    if any((run / "shards").glob("*.shard")):
        unpack(run / "shards", run / "data", progress=progress)
        return
    prepare(
        run / "data",
        librispeech,
        seed=settings.seed,
        progress=progress,
        per_speaker=settings.speech.per_speaker,
        per_preset=settings.speech.per_preset,
        per_check=settings.speech.per_check,
    )


def codec_trainer(
    run: Path, params: Params, settings: BuildSettings, device: str, autocast: bool
) -> CodecTrainer:
    """The codec's run, at the state it was left in."""
    speech = run / "data"
    human = SpeechSet(speech, "train", "human") if (speech / "human-train.json").is_file() else None
    trainer = CodecTrainer(
        params.voxtral_config().codec, settings.codec, SpeechSet(speech, "train", "synthetic"), human,
        run / "codec", device, autocast,
    )  # fmt: skip
    trainer.resume()
    return trainer


def train_codec(
    run: Path, params: Params, settings: BuildSettings, device: str, autocast: bool, report: Report
) -> None:
    """Train encoder and decoder together to the end of their schedule."""
    trainer = codec_trainer(run, params, settings, device, autocast)
    clips = {kind: _validation_clips(run / "data", kind) for kind in ("synthetic", "human")}

    def check() -> dict[str, float]:
        scored = ((kind, validate(trainer.codec, c)) for kind, c in clips.items() if c)
        return {f"{kind}_{name}": value for kind, row in scored for name, value in row.items()}

    trainer.run(
        lambda row: report("codec", row),
        check,
        report_every=settings.codec.report_every,
        validate_every=settings.codec.validate_every,
    )


def _validation_clips(speech: Path, kind: str, count: int = 12, seconds: float = 4.0) -> list[np.ndarray]:
    if not (speech / f"{kind}-validation.json").is_file():
        return []
    clips = SpeechSet(speech, "validation", kind)
    step = max(1, len(clips) // count)
    return [clips.waveform(i)[: int(seconds * 24000)] for i in range(0, len(clips), step)][:count]


def trained_codec(run: Path, params: Params) -> Codec:
    """The trained codec with its encoder, on the CPU, in bf16's values (what the shipped file will hold)."""
    path = run / "codec" / "codec-state.pt"
    if not path.is_file():
        raise LabError(f"{path} is missing: run the stage `codec` first")
    codec = Codec(params.voxtral_config().codec, with_encoder=True)
    codec.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["codec"])
    return codec.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def encode_speech(codec: Codec, waveform: np.ndarray) -> np.ndarray:
    """Codes int16 `[37, frames]` of `waveform` `[samples]`."""
    return codec.encode(torch.from_numpy(waveform)[None])[0].numpy().astype(np.int16)


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
    run: Path, folder: Path, params: Params, settings: BuildSettings, report: Report
) -> tuple[LanguageData, LanguageData]:
    """Training and validation utterances as codes (kept in `run`), with the presets' references and the
    prompt's ids."""
    codec = trained_codec(run, params)
    tokenizer = _Tokenizer(folder)
    seconds = settings.preset_frames / params.voxtral_config().codec.frame_rate
    references = {
        name: encode_speech(codec, w)
        for name, w in preset_waveforms(SpeechSet(run / "data", "train", "synthetic"), seconds).items()
    }
    made = []
    for split in ("train", "validation"):
        speech = SpeechSet(run / "data", split, "synthetic")
        cache = run / "language" / f"codes-{split}.npz"
        codes = _cached_codes(cache, codec, speech, partial(_report_codes, report, split))
        spoken = [
            Spoken(c, tuple(tuple(tokenizer.text(t)) for t in (u.text, written(u.text))), u.speaker, u.preset)
            for u, c in zip(speech.utterances, codes, strict=True)
            if u.text
        ]
        made.append(LanguageData(spoken, references, tokenizer.prompt, settings.language))
    return made[0], made[1]


def _report_codes(report: Report, split: str, done: int, of: int) -> None:
    report("codes", {split: done, "of": of})


def _cached_codes(
    cache: Path, codec: Codec, speech: SpeechSet, progress: Callable[[int, int], None]
) -> list[np.ndarray]:
    book = codec.quantizer.semantic_codebook.embedding
    encoder = sum(float(p.double().sum()) for p in codec.encoder_blocks.parameters())
    stamp = f"{len(speech)} {speech.seconds:.3f} {encoder:.9e} {float(book.double().sum()):.9e}"
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return np.split(kept["codes"], kept["ends"][:-1], axis=1)
    codes = []
    for i in range(len(speech)):
        codes.append(encode_speech(codec, speech.waveform(i)))
        if i % 100 == 99:
            progress(i + 1, len(speech))
    cache.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([c.shape[1] for c in codes])
    beside = cache.with_suffix(".partial.npz")
    np.savez(beside, stamp=stamp, codes=np.concatenate(codes, axis=1), ends=ends)
    beside.replace(cache)
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
    data, held = language_data(run, folder, params, settings, report)
    trainer = LanguageTrainer(
        params.voxtral_config(), settings.language, data, held, run / "language", device, autocast
    )
    trainer.resume()
    trainer.run(
        lambda row: report("language", row),
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
    path = run / "language" / "language-state.pt"
    if not path.is_file():
        raise LabError(f"{path} is missing: run the stage `language` first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"], strict=False)
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
        codes = torch.from_numpy(encode_speech(codec, samples).astype(np.int64))
        voice = model.mm_audio_embeddings.voice_rows(codes)
        replace_file(out / "voice_embedding" / f"{name}.pt", partial(torch.save, voice.clone()))
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
