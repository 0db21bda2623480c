"""What an adaptation learns from: the presets' own speech, and clips of speakers with transcripts."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from revox.checkpoint.voices import list_voices, load_voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import AudioError, whole_frames
from revox.speech.files import load_stamped, save_stamped, stamp_of
from revox.training.adapt import AdaptData, AdaptItem
from revox.training.data import DataError, SpeechSource
from revox.training.data.loading import decode_cut
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_source
from revox.training.restore import hold_out_names
from revox.training.spoken import SpokenSettings, Utterance, spoken_utterances

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

REFERENCE_SECONDS = 8.0
SHORTEST_CLIP, LONGEST_CLIP = 0.5, 15.0  # seconds; of a longer one the words of a part are not known


@dataclass(frozen=True)
class AdaptSpeech:
    """What is spoken and read: each preset says `sentences` texts of `texts`, and at most `clips` clips of
    `sources` are coded (`chosen_cuts`), the codes cached in `cache`."""

    texts: Sequence[str]
    cache: Path
    sentences: int = 8
    sources: Sequence[SpeechSource] = ()
    clips: int = 2000
    seed: int = 0


def spoken_presets(
    checkpoint: Path,
    speech: AdaptSpeech,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[Utterance]:
    """What every preset says; cached. It loads the model by itself, so it comes before another is loaded."""
    names = [entry.name for entry in list_voices(checkpoint) if entry.preset and not entry.problem]
    settings = SpokenSettings(
        speech.sentences * len(names), speech.texts, tuple(names), seed=speech.seed, dtype=dtype
    )
    return spoken_utterances(checkpoint, settings, speech.cache / "spoken", device=device, progress=progress)


def preset_items(
    checkpoint: Path,
    coder: Coder,
    utterances: Sequence[Utterance],
    method: str | None = "encoder",
    progress: ProgressCallback = ignore_progress,
) -> list[tuple[str, AdaptItem]]:
    """What presets said, by their names; the prompt's voice is the next sentences, coded by `method`.

    A preset of one sentence has no other one for its prompt: it can be replayed only (`distilled`). So can
    those that no method codes anew (None).
    """
    found: list[tuple[str, AdaptItem]] = []
    names = sorted({one.voice for one in utterances})
    device = coder.codec.output_proj.conv.weight.device
    frames = round(REFERENCE_SECONDS * coder.codec.config.frame_rate)
    for done, name in enumerate(names, 1):
        spoken = [one for one in utterances if one.voice == name]
        own = load_voice(checkpoint, name).embedding
        read = []
        for one in spoken:
            if method is None:
                read.append(one.codes)
                continue
            with torch.no_grad():
                sound = coder.codec.decode(one.codes[None].to(device))[0].float()
            read.append(find_codes(coder, sound, CodingSettings(method)).codes)
        for i, one in enumerate(spoken):
            found.append((name, AdaptItem(one.text, one.codes, reference_codes(read, i, frames), own)))
        progress(Progress("presets encoded", done, len(names)))
    return found


def reference_codes(clips: Sequence[Tensor], number: int, frames: int) -> Tensor:
    """Codes `[37, n]` of a speaker's `clips` after the one with that number, in turn, `frames` at most: as
    long as the references that voices are made from. Of an only clip it is that clip."""
    others = [clips[(number + i) % len(clips)] for i in range(1, len(clips))] or [clips[number]]
    return torch.cat(others, dim=1)[:, :frames]


def distilled(presets: Sequence[tuple[str, AdaptItem]]) -> list[tuple[str, AdaptItem]]:
    """Those of `preset_items` whose prompt holds another sentence than they say."""
    count = Counter(name for name, _ in presets)
    return [(name, item) for name, item in presets if count[name] > 1]


def clip_items(
    coder: Coder, speech: AdaptSpeech, method: str = "auto", progress: ProgressCallback = ignore_progress
) -> list[tuple[str, AdaptItem]]:
    """The clips with transcripts, by speaker: the prompt's voice is the speaker's next clips.

    Those that `chosen_cuts` leaves out, and clips that cannot be decoded, which `progress` counts as
    `damaged`, are not among them.
    """
    config = coder.codec.config
    frames = round(REFERENCE_SECONDS * config.frame_rate)
    coding, cuts, damaged = _coding_stamp(coder, method), chosen_cuts(speech), 0
    by_speaker: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for done, (speaker, cut) in enumerate(cuts, 1):
        path = speech.cache / "codes" / f"{stamp_of(cut.id)[:16]}.cache"
        stamp = stamp_of(cut_source(cut), (cut.custom or {}).get("stamp"), cut.duration, coding)
        cached = load_stamped(path, stamp)
        if cached is None:
            try:
                source = audio_source(cut_source(cut))
                samples, _, _ = decode_cut(source, 0.0, cut.duration, LONGEST_CLIP, config.sampling_rate)
            except (AudioError, DataError, OSError):
                damaged += 1
                progress(Progress("clips encoded", done, len(cuts), {"damaged": damaged}))
                continue
            samples = whole_frames(samples, config.samples_per_frame, config.sampling_rate)
            codes = find_codes(coder, torch.from_numpy(samples.copy()), CodingSettings(method)).codes
            path.parent.mkdir(parents=True, exist_ok=True)
            save_stamped(path, stamp, codes.to(torch.int16).numpy().tobytes())
            cached = load_stamped(path, stamp)
        assert cached is not None
        read = torch.frombuffer(bytearray(cached), dtype=torch.int16).view(config.n_codebooks, -1).long()
        by_speaker[speaker].append((cut.supervisions[0].text.strip(), read))
        progress(Progress("clips encoded", done, len(cuts), {"damaged": damaged} if damaged else {}))
    return [
        (speaker, AdaptItem(text, codes, reference_codes([codes for _, codes in mine], i, frames)))
        for speaker, mine in by_speaker.items()
        if len(mine) > 1
        for i, (text, codes) in enumerate(mine)
    ]


def chosen_cuts(speech: AdaptSpeech) -> list[tuple[str, MonoCut]]:
    """Up to `clips` cuts with words, by speaker: two of each speaker in turn, then another of each.

    One name in two sources is two speakers. Speakers with one such clip are left out, since nothing of theirs
    could be the prompt's voice.
    """
    by_speaker: dict[str, list[tuple[str, MonoCut]]] = defaultdict(list)
    for number, source in enumerate(speech.sources):
        for cut in source.cuts:
            if cut.supervisions[0].text and SHORTEST_CLIP <= cut.duration <= LONGEST_CLIP:
                speaker = f"{number}/{cut.supervisions[0].speaker}"
                by_speaker[speaker].append((speaker, cut))
    turns = [[mine[:2], *([one] for one in mine[2:])] for mine in by_speaker.values() if len(mine) > 1]
    chosen = itertools.chain.from_iterable(itertools.zip_longest(*turns, fillvalue=[]))
    return list(itertools.chain.from_iterable(chosen))[: speech.clips]


def _coding_stamp(coder: Coder, method: str) -> str:
    """A stamp of what codes come from: the encoder's weights, the student's or the search, and the codec."""
    ways = coder.ways(CodingSettings(method))
    networks: list[nn.Module] = [coder.codec]  # which has the encoder
    if "student" in ways and coder.student is not None:
        networks.append(coder.student)
    found = hashlib.sha256("+".join(ways).encode())
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            found.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return found.hexdigest()


def stamp_of_items(items: Sequence[AdaptItem]) -> str:
    """A stamp of everything that is learned from: texts, codes, voices and presets' own rows."""
    found = hashlib.sha256()
    for item in items:
        rows = [] if item.own is None else [item.own.float()]
        found.update(stamp_of(item.text).encode())
        for tensor in (item.codes, item.voice, *rows):
            found.update(stamp_of(list(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def divided(presets: Sequence[tuple[str, AdaptItem]], items: Sequence[tuple[str, AdaptItem]]) -> AdaptData:
    """Presets and items as data: a tenth of the presets' texts, and of the items' speakers, is held out.

    With fewer than ten of them one is; with fewer than three, every fourth item of each.
    """

    def parted(names: Sequence[str], these: Sequence[AdaptItem]) -> tuple[list[AdaptItem], list[AdaptItem]]:
        known = sorted(set(names))
        _, held = hold_out_names(known, len(names))
        if not held and len(known) > 2:
            held = known[-1:]
        out = [name in held if held else i % 4 == 3 for i, name in enumerate(names)]
        pairs = list(zip(these, out, strict=True))
        return [item for item, held in pairs if not held], [item for item, held in pairs if held]

    replay, held_replay = parted([item.text for _, item in presets], [item for _, item in presets])
    learned, held_items = parted([name for name, _ in items], [item for _, item in items])
    return AdaptData(learned, replay, held_items, held_replay)
