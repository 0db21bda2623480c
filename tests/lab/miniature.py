"""What a miniature build is made from: a few seconds of tones in place of speech, and a tiny Whisper."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lab import semantic, sources
from lab.build import BuildSettings, Materials
from lab.codec_training import DecoderTraining, ReferenceEncoderTraining
from lab.language_training import LanguageTraining
from lab.semantic import SemanticTraining
from lab.sources import SPEECH, HumanClip, preset_speakers
from lab.speech.plan import PlannedUtterance, read_plan, read_speakers
from lab.teacher_codec import TeacherCodecTraining
from revox.speech import Audio, write_audio
from training.test_distill import save_whisper

SETTINGS = BuildSettings(
    teacher=TeacherCodecTraining(steps=4, batch=4, frames=6, width=16, blocks=1, warmup=1, decay_steps=2,
                                 save_every=2, validate_every=100),
    semantic=SemanticTraining(epochs=2, batch=64, width=16, rounds=3),
    encoder=ReferenceEncoderTraining(steps=4, batch=2, frames=4, warmup=1, decay_steps=2, save_every=2,
                                     validate_every=100, average=0.5),
    decoder=DecoderTraining(steps=4, batch=2, frames=4, warmup=1, decay_steps=2, save_every=2,
                            validate_every=100, discriminator_from=2, discriminator_channels=2, average=0.5),
    finish=DecoderTraining(steps=4, batch=2, frames=4, warmup=1, decay_steps=2, save_every=2,
                           validate_every=100, discriminator_from=0, discriminator_channels=2, average=0.5),
    language=LanguageTraining(steps=3, batch=2, save_every=2, validate_every=100, average=0.5, alignment=0.2,
                              symbols=0.5, spliced=0.5, frame_noise=0.1, temperature=0.5),
    tune=DecoderTraining(steps=2, batch=2, frames=4, warmup=1, decay_steps=1, save_every=2,
                         validate_every=100, discriminator_from=0, discriminator_channels=2, average=0.5,
                         noisy=0.5),
    codec_sizes={"dim": 32, "hidden_dim": 32, "head_dim": 8, "encoder_transformer_lengths_str": "1,1,1,1",
                 "decoder_transformer_lengths_str": "1,1,1,1", "semantic_codebook_size": 8},
    codec_utterances=43,
    preset_frames=10,
)  # fmt: skip
CLIPS = tuple(HumanClip(f"{i}-1.flac", str(i), "FM"[i % 2], split) for i, split in enumerate(
    ["train", "train", "train", "validation", "heldout"]
))  # fmt: skip
WORDS = [
    [0.2, 1.0, "plain", 0.9],
    [1.0, 1.7, "words,", 0.9],
    [2.1, 2.8, "and", 0.9],
    [2.8, 3.7, "more.", 0.9],
]
"""Of every human clip: two utterances, cut at 1.9 s."""


def tone(rng: np.random.Generator, rate: int, seconds: float) -> np.ndarray:
    """A harmonic tone float32 `[samples]` of a random pitch."""
    time = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(90, 250)
    waves = [np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12)]
    return (np.sum(waves, axis=0) * 0.05).astype(np.float32)


def planned() -> list[PlannedUtterance]:
    """Two utterances of each preset and of five other speakers, and one held out, in the plan's order.

    The last of them are those of three training speakers, so that these are the first to be left to `more`.
    """
    speakers, plan = read_speakers(SPEECH / "speakers.json"), read_plan(SPEECH / "plan.tsv")
    presets = set(preset_speakers().values())
    of: dict[str, list[PlannedUtterance]] = {}
    for item in plan:
        of.setdefault(item.speaker, []).append(item)
    chosen = [item for name in sorted(presets) for item in of[name][:2]]
    for split, count, spoken in (("train", 3, 2), ("validation", 2, 2), ("heldout", 1, 1)):
        names = (n for n, s in speakers.items() if s.split == split and n not in presets)
        chosen += [item for name in islice(names, count) for item in of[name][-spoken:]]
    numbers = {item.number for item in chosen}
    return [item for item in plan if item.number in numbers]


def write_speech(folder: Path) -> Path:
    """A folder as `lab.speech.kokoro` writes it."""
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "index.jsonl").open("w") as index:
        for item in planned():
            file = f"{item.number:05d}.flac"
            write_audio(folder / "audio" / file, Audio(tone(rng, 24000, 0.7), 24000))
            line = {"file": file, "speaker": item.speaker, "text": item.text, "written": item.written}
            index.write(json.dumps(line) + "\n")
    return folder


def write_humans(folder: Path) -> Path:
    """A folder of the human clips `CLIPS` and their transcripts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    lines = []
    for clip in CLIPS:
        wave = tone(rng, 16000, 4.0)
        wave[round(1.75 * 16000) : round(2.05 * 16000)] = 0
        write_audio(folder / clip.file, Audio(wave, 16000))
        lines.append({"file": clip.file, "seconds": 4.0, "logprob": -0.3, "words": WORDS})
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_materials(folder: Path, patch: pytest.MonkeyPatch) -> Materials:
    """All that a build is made from. `patch` makes `CLIPS` the list of human clips."""
    patch.setattr(sources, "human_clips", lambda: CLIPS)
    patch.setattr(semantic, "WINDOW", 8.0)
    (folder / "whisper").mkdir(parents=True)
    return Materials(
        speech=(write_speech(folder / "speech"),),
        librispeech=write_humans(folder / "humans"),
        whisper=save_whisper(folder / "whisper", positions=448),
    )
