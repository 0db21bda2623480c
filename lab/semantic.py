"""The lab's semantic codes: clusters of what Whisper hears, brought together by phoneme.

The release's semantic codes are distilled from an ASR model (Voxtral TTS paper, arXiv 2603.25551, section 2).
Here they are made of one: a small network narrows the states of Whisper's encoder, a frame of codes with its
neighbors, to the size of a semantic latent, from which the synthesizer's phonemes at a quarter and at three
quarters of the frame, and the frame's spectra less their mean over the utterance, can be read. Clusters of
these latents (k-means) are the codebook. Phonemes are known of synthetic speech only, but Whisper's states
hardly depend on who speaks, so that the network holds for people, whose spectra it learns too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.data import RATE, SpeechSet
from lab.frames import PATCH_BANDS, FrameSet
from lab.language_data import SYMBOLS
from revox.evaluation.cache import file_identity
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, replace_file, save_stamped, stamp_of
from revox.training.distill import WhisperTeacher

WINDOW = 29.0  # seconds
GAP_FRAMES = 5  # of silence between utterances
HALVES = 2  # of a frame, each with the mean of Whisper's states in it
SILENT = (0, 3, 4, 5, 6, 9, 11)  # the synthesizer's tokens of punctuation, and of silence at both ends
SPACE = 16  # its token of a space


def windows(speech: SpeechSet, per_frame: int) -> list[list[tuple[int, int, int]]]:
    """Groups of (utterance, its first frame, its frames) that share one of Whisper's windows, which takes the
    time of 30 s however much of it is speech.

    An utterance longer than a window has one to itself and is heard as far as the window goes.
    """
    groups: list[list[tuple[int, int, int]]] = []
    at = 0
    for i, one in enumerate(speech.utterances):
        frames = -(-one.samples // per_frame)
        if not groups or (at + frames) * per_frame > WINDOW * RATE:
            groups.append([])
            at = 0
        groups[-1].append((i, at, frames))
        at += frames + GAP_FRAMES
    return groups


class WhisperStates:
    """States of Whisper's encoder, float16 `[frames, HALVES * width]`, of the utterances of a set one after
    the other; those of utterance i are at `starts[i]` to `ends[i]`."""

    def __init__(self, states: np.ndarray, frames: FrameSet) -> None:
        self.states, self.starts, self.ends = states, frames.starts, frames.ends
        every, lengths = np.arange(len(states)), (frames.ends - frames.starts).astype(np.int64)
        before = np.maximum(every - 1, np.repeat(frames.starts, lengths))
        after = np.minimum(every + 1, np.repeat(frames.ends - 1, lengths))
        self._places = np.stack((every, before, after), axis=1)

    def __len__(self) -> int:
        return len(self.states)

    def around(self, chosen: np.ndarray) -> Tensor:
        """States `[n, 3 * HALVES * width]` of the frames `chosen`, of those before and of those after, within
        the utterance."""
        return torch.from_numpy(self.states[self._places[chosen].ravel()]).float().reshape(len(chosen), -1)

    def parts(self) -> Iterator[Tensor]:
        """`around` of every frame, some thousand at a time."""
        for part in np.array_split(np.arange(len(self)), -(-len(self) // 4096)):
            yield self.around(part)


def whisper_identity(whisper: Path) -> str:
    """A hash of the weights in a Whisper's folder, of transformers or CTranslate2."""
    files = [path for pattern in ("*.safetensors", "*.bin") for path in whisper.glob(pattern)]
    return stamp_of({path.name: file_identity(path) for path in sorted(files)})


@torch.no_grad()
def whisper_states(
    whisper: Path,
    speech: SpeechSet,
    frames: FrameSet,
    path: Path,
    progress: ProgressCallback = ignore_progress,
) -> WhisperStates:
    """States of every utterance of `speech` by the Whisper in the folder `whisper`, cached in `path`
    (.npy)."""
    total, per_frame = int(frames.ends[-1]), RATE * 2 // 25
    stamp = stamp_of(speech.identity, total, whisper_identity(whisper), HALVES)
    by_name = stamp_of(speech.identity, total, whisper.name, HALVES)  # as states were stamped before
    done_path = path.with_suffix(".done")  # written last: it says that the states are complete
    if not (path.is_file() and any(load_stamped(done_path, one) is not None for one in (stamp, by_name))):
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher = WhisperTeacher.load(str(whisper))

        def write(file: BinaryIO) -> None:
            size = HALVES * teacher.width
            header = {"descr": "<f2", "fortran_order": False, "shape": (total, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for group in windows(speech, per_frame):
                rows = _of_window(teacher, speech, group, per_frame)
                file.write(rows.reshape(-1, size).tobytes())
                progress(Progress(f"Whisper's states of {speech.name}", group[-1][0] + 1, len(speech)))

        replace_file(path, write)
        save_stamped(done_path, stamp, b"done")
    return WhisperStates(np.load(path, mmap_mode="r"), frames)


def _of_window(
    teacher: WhisperTeacher, speech: SpeechSet, group: list[tuple[int, int, int]], per_frame: int
) -> np.ndarray:
    _, at, frames = group[-1]
    wave = np.zeros((at + frames) * per_frame, np.float32)
    for i, first, _ in group:
        samples = speech.waveform(i)
        wave[first * per_frame : first * per_frame + len(samples)] = samples
    wave = wave[: int(WINDOW * RATE)]
    states = teacher.encode(torch.from_numpy(wave)[None], RATE, torch.tensor([len(wave)]))[0].float()
    positions = max(1, len(states) * per_frame // (30 * RATE * HALVES))  # of Whisper's, in a half of a frame
    halves = states.unfold(0, positions, positions).mean(-1).half().numpy()
    lacking = HALVES * (at + frames) - len(halves)
    halves = np.concatenate((halves, np.repeat(halves[-1:], max(0, lacking), axis=0)))
    return np.concatenate([halves[HALVES * a : HALVES * (a + n)] for _, a, n in group])


@dataclass(frozen=True)
class SemanticTraining:
    """Settings of the network that makes the semantic codes. The defaults take two minutes of one CPU
    core."""

    epochs: int = 6
    batch: int = 512
    width: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    dropout: float = 0.2
    spectra: float = 2.0
    """Weight of the absolute error of the spectra, beside the cross-entropy of the phonemes."""
    rounds: int = 15
    """Of k-means."""
    clustered: int = 100_000
    """Frames of each kind of speech that are clustered, at most."""
    seed: int = 0


class SemanticNetwork(nn.Module):
    """Semantic latents `[n, size]` of Whisper's states `[n, 3 * states]` of a frame, the one before and the
    one after.

    `rows` `[codes, size]` is the codebook, `distance` the mean squared distance of latents to their codes;
    `mean` and `scale` `[states]` standardize states.
    """

    rows: Tensor
    distance: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, states: int, spectra: int, size: int, codes: int, settings: SemanticTraining) -> None:
        super().__init__()
        width, dropped = settings.width, settings.dropout
        self.narrow = nn.Sequential(
            nn.Linear(3 * states, width), nn.SiLU(), nn.Dropout(dropped),
            nn.Linear(width, width // 2), nn.SiLU(), nn.Dropout(dropped / 2),
            nn.Linear(width // 2, size), nn.RMSNorm(size, elementwise_affine=False),
        )  # fmt: skip
        self.phonemes = nn.Linear(size, HALVES * SYMBOLS)
        self.spectra = nn.Sequential(nn.Linear(size, width // 2), nn.SiLU(), nn.Linear(width // 2, spectra))
        self.register_buffer("rows", torch.zeros(codes, size))
        self.register_buffer("distance", torch.ones(()))
        self.register_buffer("mean", torch.zeros(states))
        self.register_buffer("scale", torch.ones(states))

    def forward(self, states: Tensor) -> Tensor:
        """Latents of `states`, as they are in the cache."""
        parts = states.unflatten(-1, (3, -1))
        return cast(Tensor, self.narrow(((parts - self.mean) / self.scale).flatten(-2)))

    @torch.no_grad()
    def codes(self, states: Tensor) -> Tensor:
        """Codes int64 `[n]`."""
        return torch.cdist(self(states), self.rows).argmin(-1)


@dataclass(frozen=True)
class SemanticData:
    """What one set of speech teaches: Whisper's states, features as `FrameFeatures` gives them, of whose
    first columns are the mel bands of the frame's patches, and the phonemes int16 `[2 * frames]` of
    utterances where they are known."""

    states: WhisperStates
    frames: FrameSet
    symbols: dict[int, np.ndarray]

    def goals(self, mel_size: int) -> tuple[Tensor, Tensor]:
        """Phonemes int64 `[frames, HALVES]`, 0 where unknown, and float16 `[frames, mel_size]` spectra less
        their mean over the utterance."""
        count = len(self.states)
        symbols, spectra = np.zeros((count, HALVES), np.int64), np.zeros((count, mel_size), np.float16)
        for i, (a, b) in enumerate(zip(self.states.starts, self.states.ends, strict=True)):
            if i in self.symbols:
                silent = np.isin(self.symbols[i], SILENT)
                symbols[a:b] = np.where(silent, SPACE, self.symbols[i]).reshape(-1, HALVES)
            bands = self.frames.features[a:b, :mel_size].astype(np.float32).reshape(-1, PATCH_BANDS)
            spectra[a:b] = (bands - bands.mean(0)).reshape(b - a, -1)
        return torch.from_numpy(symbols), torch.from_numpy(spectra)


def train_semantic(
    data: Sequence[SemanticData],
    every: Sequence[Sequence[WhisperStates]],
    sizes: tuple[int, int, int],
    settings: SemanticTraining,
    progress: ProgressCallback = ignore_progress,
) -> SemanticNetwork:
    """The network, learned from `data`, and its codebook, of as many frames of each kind of speech in
    `every`.

    sizes: mel bands of a frame, size of a latent, codes.
    """
    rng = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = SemanticNetwork(data[0].states.states.shape[1], *sizes, settings)
        _learn(network, data, rng, settings, progress)
    _make_codebook(network, every, rng, settings, progress)
    return network.requires_grad_(False)


def _learn(
    network: SemanticNetwork,
    data: Sequence[SemanticData],
    rng: np.random.Generator,
    settings: SemanticTraining,
    progress: ProgressCallback,
) -> None:
    some = np.concatenate([one.states.states[::7] for one in data]).astype(np.float32)
    network.mean.copy_(torch.from_numpy(some.mean(0)))
    network.scale.copy_(torch.from_numpy(some.std(0) + 1e-3))
    goals = [one.goals(cast(nn.Linear, network.spectra[-1]).out_features) for one in data]
    deviation = torch.cat([spectra[::7].float() for _, spectra in goals]).std()
    counts = [len(one.states) for one in data]
    optimizer = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    steps, step = settings.epochs * sum(-(-n // settings.batch) for n in counts), 0
    for epoch in range(settings.epochs):
        batches = [
            (k, part)
            for k, n in enumerate(counts)
            for part in np.array_split(rng.permutation(n), -(-n // settings.batch))
        ]
        for k in rng.permutation(len(batches)):
            which, chosen = batches[k]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, step / 100, 1.02 - step / steps)
            latents = network(data[which].states.around(chosen))
            symbols, spectra = (goal[chosen] for goal in goals[which])
            loss = settings.spectra * (network.spectra(latents) - spectra.float() / deviation).abs().mean()
            if (symbols > 0).any():
                logits = network.phonemes(latents).unflatten(-1, (HALVES, SYMBOLS))
                loss = loss + functional.cross_entropy(logits[symbols > 0], symbols[symbols > 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        progress(Progress("epochs of the semantic network", epoch + 1, settings.epochs))


@torch.no_grad()
def _make_codebook(
    network: SemanticNetwork,
    every: Sequence[Sequence[WhisperStates]],
    rng: np.random.Generator,
    settings: SemanticTraining,
    progress: ProgressCallback,
) -> None:
    network.eval()
    most, parts = settings.clustered, []
    for kind in every:
        counts = [min(len(one), round(most * len(one) / sum(map(len, kind)))) for one in kind]
        for one, frames in zip(kind, counts, strict=True):
            chosen = np.sort(rng.choice(len(one), frames, replace=False))
            parts += [network(one.around(part)) for part in np.array_split(chosen, -(-frames // 4096))]
    latents = torch.cat(parts)
    few = len(latents) < len(network.rows)
    rows = latents[torch.from_numpy(rng.choice(len(latents), len(network.rows), replace=few))]
    for done in range(1, settings.rounds + 1):
        nearest = torch.cat([torch.cdist(part, rows).argmin(-1) for part in latents.split(8192)])
        count = torch.bincount(nearest, minlength=len(rows)).float()
        sums = torch.zeros_like(rows).index_add_(0, nearest, latents)
        other = latents[torch.from_numpy(rng.integers(len(latents), size=len(rows)))]
        rows = torch.where(count[:, None] > 0, sums / count[:, None].clamp_min(1), other)
        progress(Progress("rounds of clustering", done, settings.rounds))
    network.rows.copy_(rows)
    least = torch.cat([torch.cdist(part, rows).min(-1).values for part in latents.split(8192)])
    network.distance.copy_(least.square().mean().clamp_min(1e-6))


def semantic_codes(network: SemanticNetwork, states: WhisperStates) -> np.ndarray:
    """Codes int16 `[frames]` of a set of speech."""
    return torch.cat([network.codes(part) for part in states.parts()]).numpy().astype(np.int16)
