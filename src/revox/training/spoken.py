"""What the model itself says, as codes: pairs whose right answer is the language model's own.

The sound that a decoder makes of arbitrary codes tells little of them, and an encoder that learns from such
pairs learns noise. So most of its pairs are speech of the model, of many sentences and in many voices: the
presets', and voices interpolated between and around them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from revox.checkpoint.encoder_file import released_sha256
from revox.checkpoint.load import default_dtype, load_model
from revox.checkpoint.voice_journal import VOICE_FOLDER
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.coding.presets import preset_codes
from revox.metrics.likelihood import likelihood
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, read_text, save_stamped, stamp_of
from revox.synthesis.engine import Engine, Generation, Request
from revox.synthesis.prompt import Prompter, make_prompt
from revox.training.errors import TrainingError
from revox.training.world import World

SHARD = 32  # sentences spoken together, and cached in one file
SPREAD = 0.6  # deviations by which an interpolated voice leaves the line between two presets
MAX_FRAMES = 250  # 20 s: a sentence that does not end by then is babble
FEWEST_COMPARED = 8
LENGTH_FACTOR = 2.5
NLL_MARGIN = 0.5


def read_sentences(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises TrainingError when there are none."""
    found = [line.strip() for line in read_text(path, TrainingError).splitlines() if line.strip()]
    if not found:
        raise TrainingError(f"the texts {path} are empty: write one sentence a line")
    return found


def interpolated_voice(presets: Sequence[Tensor], levels: int, rng: torch.Generator) -> Tensor:
    """Codes `[37, frames]` of a voice that is none of `presets`, codes `[37, frames]` of so many `levels`.

    One of them, its acoustic values offset for the whole of it: towards another's mean by a uniform share of
    the way, and by `SPREAD` normal deviations of each codebook over the presets.
    """
    one, other = (presets[int(torch.randint(len(presets), (), generator=rng))] for _ in range(2))
    own, target = one[1:].float(), other[1:].float().mean(dim=1)
    deviation = torch.cat([p[1:] for p in presets], dim=1).float().std(dim=1, correction=0).clamp_min(0.5)
    share = float(torch.rand((), generator=rng))
    offset = share * (target - own.mean(dim=1))
    offset = offset + SPREAD * torch.randn(len(own), generator=rng) * deviation
    moved = (own + offset[:, None]).round().clamp(0, levels - 1).long()
    return torch.cat((one[:1], moved))


@dataclass(frozen=True)
class SpokenSettings:
    """What the model says: `count` sentences, those of `sentences` in turn.

    Each is said in one of the presets `voices` (none named: all of them), in turn, or, a share `interpolated`
    of them, in a voice of its own between and around those (`interpolated_voice`). `seed` decides these
    voices and the noise of speaking. The first sentences are the same whatever `count` is. `dtype` is the
    arithmetic's; None: `default_dtype`.
    """

    count: int
    sentences: Sequence[str]
    voices: Sequence[str] = ()
    interpolated: float = 0.0
    seed: int = 0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Utterance:
    """What the model said: `text`, as codes `[37, frames]`, in the preset `voice` where that is known."""

    text: str
    codes: Tensor
    voice: str = ""


def clear_speech(frames: Sequence[int], characters: Sequence[int], nll: Sequence[float]) -> list[bool]:
    """Which utterances spoken together are not babble, by length and likelihood (`nll`, nats a frame).

    Left out are those whose frames a character differ from the median by a factor of `LENGTH_FACTOR`, and
    those whose NLL exceeds the median by three deviations (1.48 times the median deviation) and by
    `NLL_MARGIN`. Fewer than `FEWEST_COMPARED` have nothing to be compared with: all of them are taken.
    """
    if len(frames) < FEWEST_COMPARED:
        return [True] * len(frames)
    # A short sentence has as much of a pause at its ends as a long one.
    rates = torch.tensor(frames) / (torch.tensor(characters) + 10)
    ratio = rates / rates.median()
    costs = torch.tensor(nll)
    excess = costs - costs.median()
    limit = max(NLL_MARGIN, 3 * 1.48 * float(excess.abs().median()))
    clear = (ratio < LENGTH_FACTOR) & (ratio > 1 / LENGTH_FACTOR) & (excess <= limit)
    return [bool(one) for one in clear]


class _SpeakingModel:
    """The model of a checkpoint, loaded, and the voices that it speaks in."""

    def __init__(self, folder: Path, settings: SpokenSettings, device: str):
        self.settings = settings
        self.model = load_model(folder, device, settings.dtype or default_dtype(folder, device))
        self.prompter = Prompter(folder)
        self.presets = [load_voice(folder, name) for name in settings.voices]
        named = set(settings.voices)
        self.codes = preset_codes(folder, self.model, only=named) if settings.interpolated else []

    def voice(self, i: int) -> Voice:
        """The voice of the `i`-th utterance; no two voices say one sentence before all are said."""
        settings = self.settings
        rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + i)
        if self.codes and float(torch.rand((), generator=rng)) < settings.interpolated:
            codes = interpolated_voice(self.codes, self.model.config.codec.acoustic_codebook_size, rng)
            embeddings = self.model.mm_audio_embeddings
            return Voice("interpolated", codes, embeddings.voice_embedding(codes.to(self.model.device)))
        return self.presets[_turn(i, len(settings.sentences), settings)]

    def speak(self, which: range) -> dict[str, Tensor]:
        """Codes `[37, frames]` of those utterances, int16, by number; none of those that babble or did not
        end."""
        sentences, requests = self.settings.sentences, []
        for i in which:
            prompt = make_prompt(self.model, self.prompter, sentences[i % len(sentences)], self.voice(i))
            requests.append(Request(prompt.embeddings, self.settings.seed + i, MAX_FRAMES))
        spoken = Engine(self.model).generate_batch(requests)
        ended = [(i, one, one.codes()) for i, one in zip(which, spoken, strict=True) if one.ended]
        compared = len(ended) >= FEWEST_COMPARED
        clear = clear_speech(
            [codes.shape[1] for _, _, codes in ended],
            [len(sentences[i % len(sentences)]) for i, _, _ in ended],
            [self._nll(one, codes) for _, one, codes in ended] if compared else [],
        )
        return {
            f"{i:06d}": codes.to("cpu", torch.int16).contiguous()
            for (i, _, codes), is_clear in zip(ended, clear, strict=True)
            if is_clear
        }

    def _nll(self, one: Generation, codes: Tensor) -> float:
        if not codes.shape[1]:
            return math.inf
        return float(likelihood(self.model, one.request.prompt, codes, draws=1).semantic_nll)


def _turn(i: int, different: int, settings: SpokenSettings) -> int:
    """Which of the voices says the `i`-th of sentences of which so many are different."""
    return (i + i // different) % len(settings.voices)


def spoken_utterances(
    checkpoint: Path,
    settings: SpokenSettings,
    cache: Path,
    *,
    device: str = "cpu",
    world: World | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[Utterance]:
    """What the model of the folder `checkpoint` says.

    Utterances that do not end by themselves or babble (`clear_speech`) are left out. Every `SHARD` sentences
    are a file of their own in the folder `cache`, written when they are spoken and taken from there where the
    checkpoint's weights and presets and the settings are the same: a job that was stopped goes on, and a
    damaged file is made again.
    The processes of `world` share the work and the folder. Raises TrainingError without a preset.
    """
    presets = [entry.name for entry in list_voices(checkpoint) if entry.preset and not entry.problem]
    settings = dataclasses.replace(settings, voices=tuple(settings.voices or presets))
    if not settings.voices:
        raise TrainingError(
            f"{checkpoint} has no preset that could speak: set sentences to 0, or repair the checkpoint"
        )
    world = world or World()
    voice_files = [(checkpoint / VOICE_FOLDER / f"{name}.pt").read_bytes() for name in settings.voices]
    stamp = stamp_of(
        released_sha256(checkpoint), (checkpoint / "params.json").read_text(encoding="utf-8"),
        [hashlib.sha256(file).hexdigest() for file in voice_files],
        settings.seed, settings.interpolated, "clear", *([str(settings.dtype)] if settings.dtype else []),
    )  # fmt: skip
    shards, different = {}, len(settings.sentences)
    for start in range(0, settings.count, SHARD):
        which = range(start, min(start + SHARD, settings.count))
        # Only its own texts, and how often they were said before: more of them leave it as it is.
        its_stamp = stamp_of(
            stamp, start, [(settings.sentences[i % different], i // different) for i in which]
        )
        # Other settings have other names: what they spoke stays where it is.
        shards[which] = cache / f"{start:06d}-{its_stamp[:8]}.safetensors", its_stamp
    model: _SpeakingModel | None = None
    for which, (path, its_stamp) in list(shards.items())[world.rank :: world.size]:
        if load_stamped(path, its_stamp) is None:
            model = model or _SpeakingModel(checkpoint, settings, device)
            save_stamped(path, its_stamp, save(model.speak(which)))
            progress(Progress("sentences spoken by the model", which.stop, settings.count))
    del model
    world.wait()
    found: list[Utterance] = []
    for path, its_stamp in shards.values():
        content = load_stamped(path, its_stamp)
        if content is None:
            raise TrainingError(
                f"{path} is missing: another process should have spoken it; give all processes one folder"
            )
        for i, codes in sorted(load(content).items()):
            if codes.shape[1]:
                number = int(i)
                name = "" if settings.interpolated else settings.voices[_turn(number, different, settings)]
                found.append(Utterance(settings.sentences[number % different], codes.long(), name))
    return found
