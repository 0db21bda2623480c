"""What the model itself says, as codes: pairs whose right answer is the language model's own.

The sound that a decoder makes of arbitrary codes tells little of them, and an encoder that learns from such
pairs learns noise. So most of its pairs are speech of the model, of many sentences and in many voices: the
presets', and voices interpolated between and around them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import ENCODER_WEIGHTS, weight_files
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.coding.presets import preset_codes
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, read_text, save_stamped, stamp_of
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import Prompter, make_prompt
from revox.training.errors import TrainingError

BATCH = 32  # sentences spoken together, and cached in one file
SPREAD = 0.6  # deviations by which an interpolated voice leaves the line between two presets
MAX_FRAMES = 250  # 20 s: a sentence that does not end by then is babble

SENTENCES = (
    "The train to the coast leaves at seven and stops at every village on the way.",
    "She put the kettle on, opened the window, and listened to the rain.",
    "Could you tell me where the nearest post office is?",
    "We measured the depth of the lake in nineteen places.",
    "Nobody expected the old bridge to hold for another winter.",
    "If you change your mind, call me before Thursday.",
    "A quick walk after lunch does more good than a second cup of coffee.",
    "The committee voted eleven to four against the proposal.",
    "His grandmother kept bees, geese, and a very bad-tempered donkey.",
    "Turn left at the church, then follow the river for two miles.",
    "What a strange thing to find in a library book!",
    "Light travels from the sun to the earth in about eight minutes.",
    "They argued about music all evening and parted as friends.",
    "Please keep your belongings with you at all times.",
    "The recipe asks for butter, flour, sugar, and three eggs.",
    "I have never seen the harbour as quiet as it was this morning.",
)
"""Spoken where no texts are given."""


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


class _SpeakingModel:
    """The model of a checkpoint, loaded, and the voices that it speaks in."""

    def __init__(self, folder: Path, presets: Sequence[str], interpolated: float, seed: int, device: str):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.folder, self.presets, self.interpolated, self.seed = folder, presets, interpolated, seed
        self.model = load_model(folder, device=device, dtype=dtype)
        self.prompter = Prompter(folder)
        self.codes = preset_codes(folder, self.model) if interpolated else []

    def voice(self, i: int, sentences: int) -> Voice:
        """The voice of the `i`-th utterance; no two voices say one of `sentences` before all are said."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        if self.codes and float(torch.rand((), generator=rng)) < self.interpolated:
            codes = interpolated_voice(self.codes, self.model.config.codec.acoustic_codebook_size, rng)
            embeddings = self.model.mm_audio_embeddings
            return Voice("interpolated", codes, embeddings.voice_embedding(codes.to(self.model.device)))
        return load_voice(self.folder, self.presets[(i + i // sentences) % len(self.presets)])

    def speak(self, which: range, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Codes `[37, frames]` of those utterances, int16, by number; none of those that did not end."""
        requests = []
        for i in which:
            text, voice = sentences[i % len(sentences)], self.voice(i, len(sentences))
            prompt = make_prompt(self.model, self.prompter, text, voice)
            requests.append(Request(prompt.embeddings, self.seed + i, MAX_FRAMES))
        spoken = Engine(self.model).generate_batch(requests)
        return {
            f"{i:06d}": one.codes().to("cpu", torch.int16).contiguous()
            for i, one in zip(which, spoken, strict=True)
            if one.ended
        }


def spoken_codes(
    checkpoint: Path,
    count: int,
    cache: Path,
    *,
    interpolated: float = 0.0,
    sentences: Sequence[str] = SENTENCES,
    seed: int = 0,
    device: str = "cpu",
    progress: ProgressCallback = ignore_progress,
) -> list[Tensor]:
    """Codes `[37, frames]` of `count` sentences that the model of the folder `checkpoint` says.

    It speaks in its presets' voices in turn, or, a share `interpolated` of the sentences, each in a voice of
    its own (`interpolated_voice`); in float32 on the CPU, in bf16 elsewhere. Utterances that do not end by
    themselves are left out. They are cached in the folder `cache`, `BATCH` to a file, and taken from there
    where checkpoint, sentences, share and seed are the same. Raises TrainingError without a preset.
    """
    presets = [entry.name for entry in list_voices(checkpoint) if entry.preset and not entry.problem]
    if not presets:
        raise TrainingError(
            f"{checkpoint} has no preset that could speak: set sentences to 0, or repair the checkpoint"
        )
    params = hashlib.sha256((checkpoint / "params.json").read_bytes()).hexdigest()
    # An encoder in a file of its own does not change what the model speaks.
    size = sum(file.stat().st_size for file in weight_files(checkpoint) if file.name != ENCODER_WEIGHTS)
    facts = (params, size, list(sentences), seed, presets, interpolated)
    speaker: _SpeakingModel | None = None
    found: list[Tensor] = []
    for start in range(0, count, BATCH):
        which = range(start, min(start + BATCH, count))
        path, stamp = cache / f"{start:06d}.safetensors", stamp_of(*facts, start, len(which))
        content = load_stamped(path, stamp)
        if content is None:
            speaker = speaker or _SpeakingModel(checkpoint, presets, interpolated, seed, device)
            content = save(speaker.speak(which, sentences))
            save_stamped(path, stamp, content)
            progress(Progress("sentences spoken by the model", which.stop, count))
        found += [codes.long() for _, codes in sorted(load(content).items()) if codes.shape[1]]
    return found
