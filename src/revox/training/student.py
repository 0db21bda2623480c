"""`revox train student`: the model speaks, and a small encoder learns the codes of what it said.

The codes of the model's own speech are known, so it teaches an encoder without any recording. Sentences are
spoken in the presets' voices and in voices interpolated between and around them: a student that heard
only the presets is right in a third as many semantic codes (docs/cloning.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.find import MODEL_PARTS
from revox.coding.pairs import PairSettings, PresetPairs
from revox.coding.presets import preset_codes
from revox.coding.student import STUDENT_FILE, StudentEncoder, load_student, save_student, student_folder
from revox.model.codec import Codec
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import stamp_of
from revox.training.augment import Augmentation, augmented, draw_seeds
from revox.training.errors import TrainingError
from revox.training.run import Run, saved_state
from revox.training.sentences import drawn_sentences
from revox.training.spoken import SpokenSettings, spoken_utterances

STUDENT_TRAINING = "training the student encoder"
"""The phase of its training, as `Progress.what` names it."""

INTERPOLATED = 0.9  # share of the sentences in interpolated voices
PAIRS = PairSettings(shortest=16, longest=64, mixed=0.0, offset=0.15, jitter=0.05, replace=0.0)
"""Codes are changed little: the sound of codes that nobody would say tells less (docs/recovery.md)."""
AUGMENTATION = Augmentation(gain_db=3.0)
HELD_OUT = 50  # one utterance in so many is not learned from
TIMED_STEPS = 20  # between estimates of how many steps the time allows


@dataclass(frozen=True)
class StudentTraining:
    """Settings of one training: `steps` of `batch` items of `frames`; `seconds` ends it earlier."""

    steps: int = 4000
    seconds: float | None = None
    batch: int = 12
    frames: int = 24
    learning_rate: float = 2e-3
    warmup: int = 50
    width: int = 256
    blocks: int = 2
    augmentation: Augmentation = AUGMENTATION
    seed: int = 0
    save_every: int = 200

    @property
    def decay_steps(self) -> int:
        """The learning rate falls over the second half."""
        return max(1, self.steps // 2)


class StudentTrainer(Run):
    """A run on pairs of `codes` `[37, frames]`; the codec's weights must be float32."""

    def __init__(
        self,
        codec: Codec,
        codes: Sequence[Tensor],
        training: StudentTraining,
        folder: Path,
        stamp: str,
        pairs: PairSettings = PAIRS,
    ) -> None:
        self.weight = codec.output_proj.conv.weight
        super().__init__(STUDENT_FILE, training, folder, str(self.weight.device))
        self.training, self.stamp = training, stamp
        self.source = PresetPairs(codec, codes, pairs)
        self.rate = codec.config.sampling_rate
        self.half = (codec.config.acoustic_codebook_size - 1) / 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.student = StudentEncoder.for_codec(codec, training.width, training.blocks)
        self.student.to(self.weight.device)
        with torch.no_grad():
            sample = self.student.features(self.source.draw(24, training.frames, self.rng)[1])
            self.student.mean.copy_(sample.mean(dim=(0, 1)))
            self.student.scale.copy_(sample.std(dim=(0, 1)) + 0.05)
        self.optimizer = torch.optim.AdamW(
            self.student.net.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.optimizer.add_param_group({"params": [self.student.sharpness], "weight_decay": 0.0})

    def take_step(self) -> dict[str, float]:
        """Losses: `semantic` in nats, `acoustic` in levels."""
        training = self.training
        if training.seconds is not None and self.step_count and self.step_count % TIMED_STEPS == 0:
            self._fit_schedule(self.step_count + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        codes, audio = self.source.draw(training.batch, training.frames, self.rng)
        seeds = draw_seeds(len(audio), self.rng)
        features = self.student.features(augmented(audio, self.rate, training.augmentation, seeds))
        log_probabilities, values = self.student(features)
        semantic = functional.nll_loss(log_probabilities.flatten(0, 1), codes[:, 0].flatten())
        wanted = codes[:, 1:].transpose(1, 2) / self.half - 1
        acoustic = (values - wanted).abs().mean() * self.half
        loss = 0.5 * semantic + acoustic
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), "semantic": semantic.item(), "acoustic": acoustic.item()}

    def _fit_schedule(self, least: int) -> None:
        """As many steps as fit into the time, by what those so far took, and not fewer than `least`."""
        training = self.training
        assert training.seconds is not None
        possible = max(least, int(training.seconds * self.step_count / self.seconds))
        self.schedule = dataclasses.replace(training, steps=min(training.steps, possible))

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, and the stamp of what they learn from."""
        weights = self.student.state_dict()
        return {"student": weights, "optimizer": self.optimizer.state_dict(), "stamp": self.stamp}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])

    def resume(self) -> bool:
        """Go on from the saved state, unless it learns from something else."""
        if not self.state_path.is_file():
            return False
        with saved_state(self.state_path, mmap=True) as state:
            same = state["stamp"] == self.stamp
        if not (same and super().resume()):
            return False
        if self.training.seconds is not None and self.step_count:
            self._fit_schedule(self.step_count)
        return True


def train_student(
    codec: Codec,
    codes: Sequence[Tensor],
    training: StudentTraining,
    folder: Path,
    *,
    stamp: str = "",
    progress: ProgressCallback = ignore_progress,
) -> StudentEncoder:
    """A student that learned from pairs of `codes`, each `[37, frames]`; the codec's weights must be float32.

    The state is saved in `folder`; a run that was stopped goes on there if `stamp` is the same. The facts of
    its progress are `semantic`, in nats, and `acoustic`, in levels. Raises KeyboardInterrupt when stopped.
    """
    trainer = StudentTrainer(codec, codes, training, folder, stamp)
    trainer.resume()

    def report(row: dict[str, float]) -> None:
        facts = {name: row[name] for name in ("semantic", "acoustic")}
        facts["seconds_left"] = trainer.seconds_left()
        progress(Progress(STUDENT_TRAINING, trainer.step_count, trainer.schedule.steps, facts))

    trainer.run(report, report_every=10, validate_every=10)
    trainer.student.record = {"steps": trainer.step_count, "seconds": round(trainer.seconds, 1)}
    return trainer.student.eval().requires_grad_(False)


@dataclass(frozen=True)
class HeldOutScores:
    """A student on speech that it did not learn from, and the model's usual codes on the same (`usual`).

    `agreement` is the share of equal semantic codes, `levels` the mean error of acoustic ones.
    """

    agreement: float
    levels: float
    usual_agreement: float
    usual_levels: float

    @property
    def useful(self) -> bool:
        """Whether it is clearly better than the most frequent codes."""
        return self.agreement > self.usual_agreement + 0.02 and self.levels < 0.8 * self.usual_levels


@torch.no_grad()
def held_out_scores(
    student: StudentEncoder, codec: Codec, codes: Sequence[Tensor], held_out: Sequence[Tensor]
) -> HeldOutScores:
    """Scores on `held_out` utterances `[37, frames]`; the usual codes are those of `codes`."""
    device = codec.output_proj.conv.weight.device
    together = torch.cat(list(codes), dim=1)
    frequent = together[0].bincount().argmax()
    median = together[1:].float().median(dim=1).values[:, None]
    coder, rows = Coder(codec, student=lambda codec: student), []
    for true in held_out:
        sound = codec.decode(true[None].to(device))[0].float()
        found = find_codes(coder, sound, CodingSettings("student")).codes
        rows.append((
            float((found[0] == true[0]).float().mean()), float((found[1:] - true[1:]).abs().float().mean()),
            float((frequent == true[0]).float().mean()), float((median - true[1:]).abs().mean()),
        ))  # fmt: skip
    return HeldOutScores(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


@dataclass(frozen=True)
class StudentRequest:
    """What `make_student` does: `sentences` to speak, of `texts` (else of our own), in `dtype` (None:
    `revox.checkpoint.load.default_dtype`), and the training, which is in float32."""

    sentences: int = 10_000
    texts: Sequence[str] = ()
    training: StudentTraining = StudentTraining()
    device: str = "cpu"
    dtype: torch.dtype | None = None


def make_student(
    checkpoint: Path, request: StudentRequest, progress: ProgressCallback = ignore_progress
) -> tuple[Path, StudentEncoder, HeldOutScores]:
    """Let the model of the folder `checkpoint` speak, train a student on it and keep it for this checkpoint.

    What was spoken and learned before is taken up again. Gives the file, the student and its scores. Raises
    TrainingError without a preset or when the student learned nothing, KeyboardInterrupt when stopped.
    """
    decoder = decoder_sha256(checkpoint)
    folder = student_folder(checkpoint)
    training = request.training
    sentences = request.texts or drawn_sentences(request.sentences, training.seed)
    settings = SpokenSettings(
        request.sentences, sentences, interpolated=INTERPOLATED, seed=training.seed, dtype=request.dtype
    )
    cache = folder / "spoken"
    utterances = spoken_utterances(checkpoint, settings, cache, device=request.device, progress=progress)
    spoken = [one.codes for one in utterances]
    if not spoken:
        raise TrainingError(f"{checkpoint} ended none of its sentences: check it with `revox doctor`")
    model = load_model(checkpoint, request.device, torch.float32, MODEL_PARTS)
    codec = model.audio_tokenizer
    held_out = spoken[::HELD_OUT]
    learned = [codes for i, codes in enumerate(spoken) if i % HELD_OUT] + preset_codes(checkpoint, model)
    stamp = stamp_of(decoder, request.sentences, list(sentences), dataclasses.replace(training, seconds=None))
    student = train_student(codec, learned, training, folder, stamp=stamp, progress=progress)
    scores = held_out_scores(student, codec, learned, held_out)
    if not scores.useful:
        raise TrainingError(
            f"the student learned too little to be used ({scores.agreement:.0%} of the semantic codes beside "
            f"{scores.usual_agreement:.0%} for the most frequent one): give more --sentences or --minutes"
        )
    student.record |= {"sentences": len(spoken), "scores": dataclasses.asdict(scores)}
    path = folder / STUDENT_FILE
    save_student(path, decoder, student)
    return path, student, scores


def student_for(
    codec: Codec,
    codes: Sequence[Tensor],
    folder: Path,
    stamp: str,
    progress: ProgressCallback = ignore_progress,
    training: StudentTraining | None = None,
) -> StudentEncoder:
    """A student of `codes` that are at hand, cached in `folder` for `stamp`; `training` is by default that of
    pseudo-labels."""
    path = folder / STUDENT_FILE
    student = load_student(path, stamp, codec)
    if student is None:
        student = train_student(
            codec, codes, training or pseudo_label_training(codec), folder, stamp=stamp, progress=progress
        )
        save_student(path, stamp, student)
    return student


def pseudo_label_training(codec: Codec) -> StudentTraining:
    """Ten minutes at most at the release's size, the whole number of steps at the lab's."""
    big = sum(p.numel() for p in codec.parameters()) > 30e6
    return StudentTraining(steps=1500, seconds=600.0 if big else None)
