"""What the model itself says, as codes: pairs whose right answer is the language model's own.

Codes that nobody would say are poor questions: the sound that a decoder makes of them tells little of them,
and what is learnt is noise. So most of what an encoder learns from is speech of the model, of many sentences
and in many voices: the presets', and voices between and beside theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import WEIGHTS
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.cloning.clone import preset_codes
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import Prompter, make_prompt
from revox.training.errors import TrainingError
from revox.training.kept import read_kept, write_kept

AT_ONCE = 32
BESIDE = 0.6  # deviations that a stranger's acoustic values stand beside those between two presets
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
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise TrainingError(f"the texts {path} cannot be read: {reason}") from None
    found = [line for line in lines if line]
    if not found:
        raise TrainingError(f"the texts {path} are empty: write one sentence a line")
    return found


def stranger(presets: Sequence[Tensor], levels: int, rng: torch.Generator) -> Tensor:
    """Codes `[37, frames]` of a voice that is none of `presets`, codes `[37, frames]` of so many `levels`.

    One of them, its acoustic values moved for the whole of it: towards another's mean by any share of the
    way, and by `BESIDE` of each codebook's deviation over the presets.
    """
    one, other = (presets[int(torch.randint(len(presets), (), generator=rng))] for _ in range(2))
    own, target = one[1:].float(), other[1:].float().mean(dim=1)
    deviation = torch.cat([p[1:] for p in presets], dim=1).float().std(dim=1, correction=0).clamp_min(0.5)
    share = float(torch.rand((), generator=rng))
    shift = share * (target - own.mean(dim=1))
    shift = shift + BESIDE * torch.randn(len(own), generator=rng) * deviation
    moved = (own + shift[:, None]).round().clamp(0, levels - 1).long()
    return torch.cat((one[:1], moved))


def spoken_codes(
    folder: Path,
    count: int,
    kept: Path,
    *,
    strangers: float = 0.0,
    sentences: Sequence[str] = SENTENCES,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Tensor]:
    """Codes `[37, frames]` of `count` sentences, said by the presets of the checkpoint `folder` in turn, or,
    a share `strangers` of them, in a voice of its own each (`stranger`). No two voices say the same sentence
    before there are no more sentences.

    They are kept in the file `kept` after every few, and taken from there where they were made of the same
    checkpoint, sentences, strangers and seed. What did not end by itself is left out.
    """
    voices = [entry.name for entry in list_voices(folder) if entry.preset and not entry.problem]
    if not voices:
        raise TrainingError(f"{folder} has no preset that could speak: set sentences to 0, or mend it")
    digest = hashlib.sha256((folder / "params.json").read_bytes())
    told = ((folder / WEIGHTS).stat().st_size, tuple(sentences), seed, voices, strangers)
    digest.update(repr(told).encode())
    stamp = digest.hexdigest()
    found = [codes.long() for _, codes in sorted(read_kept(kept, stamp).items())]
    if len(found) >= count:
        return [codes for codes in found[:count] if codes.shape[1]]
    model, prompter = load_model(folder, device=device, dtype=dtype), Prompter(folder)
    presets = preset_codes(folder, model) if strangers else []

    def speaker(i: int) -> Voice:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i)
        if presets and float(torch.rand((), generator=rng)) < strangers:
            codes = stranger(presets, model.config.codec.acoustic_codebook_size, rng)
            return Voice("stranger", codes, model.mm_audio_embeddings.voice_embedding(codes.to(model.device)))
        return load_voice(folder, voices[(i + i // len(sentences)) % len(voices)])

    for start in range(len(found), count, AT_ONCE):
        which = range(start, min(start + AT_ONCE, count))
        requests = []
        for i in which:
            prompt = make_prompt(model, prompter, sentences[i % len(sentences)], speaker(i))
            requests.append(Request(prompt.embeddings, seed + i, MAX_FRAMES))
        spoken = Engine(model).generate_batch(requests)
        found += [one.codes().cpu() if one.ended else one.codes()[:, :0].cpu() for one in spoken]
        write_kept(kept, stamp, {f"{i:06d}": codes.to(torch.int16) for i, codes in enumerate(found)})
        progress(len(found), count)
    return [codes for codes in found if codes.shape[1]]
