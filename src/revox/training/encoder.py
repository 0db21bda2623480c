"""Restoring the codec's encoder: the run that learns from pairs and from recordings (phase 1).

The checkpoint's decoder, codebook and language model stay as they are. Two kinds of items share every batch.
**Pairs** are codes and the audio decoded from them: the right answer is known, and the encoder is told it.
**Recordings** go through encoder, stochastic quantizer and frozen decoder, and are compared with themselves:
spectra, waveform, discriminators, a speaker network, Whisper. All losses meet at the latents, where their
gradients are balanced; the backward pass through the encoder is a single one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from revox.checkpoint.encoder_file import ENCODER_FILE, RECORD_KEY
from revox.coding import find_codes
from revox.coding.pairs import PairSettings, PresetPairs
from revox.losses.codes import (
    acoustic_loss,
    commitment_loss,
    diversity_loss,
    semantic_log_probabilities,
    semantic_loss,
    sharpness_of,
    soft_acoustic_loss,
    soft_semantic_loss,
)
from revox.losses.discriminator import (
    Discriminators,
    discriminator_loss,
    feature_matching_loss,
)
from revox.losses.spectral import SpectralObjective
from revox.losses.stft import stft
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral, tensor_name
from revox.speech.files import replace_file
from revox.training.all_pass import all_pass, draw_phases
from revox.training.augment import augmented, draw_seeds
from revox.training.average import moving_average
from revox.training.balance import GradientBalancer
from revox.training.data import ClipBatch, ClipBatches
from revox.training.errors import TrainingError
from revox.training.hidden_states import HiddenStates, captured
from revox.training.initial import initialize, scale_latents, transpose_decoder
from revox.training.optimizers import encoder_optimizer
from revox.training.quantize import acoustic_draws, quantize_drawn, quantize_semantic
from revox.training.run import Run
from revox.training.settings import EncoderTraining
from revox.training.soft_labels import Ensemble
from revox.training.spoken import Utterance
from revox.training.validation import (
    ENCODER,
    UTTERANCES,
    Validation,
    as_served,
    clip_figures,
    decoded_figures,
    mean_likelihood,
)
from revox.training.world import World

PADDING = -1  # in place of the codes of frames after the end of a recording
_WAVEFORM_LOSSES = ("mel", "stft", "waveform", "feature", "speaker")
_LATENT_LOSSES = (
    "reconstruction", "semantic", "acoustic", "commitment", "diversity", "distillation", "soft_semantic",
    "soft_acoustic",
)  # fmt: skip


@dataclass
class TrainingData:
    """What a run learns from.

    `codes` `[37, frames]` each are the model's own, its presets' and its speech, for pairs. `recordings` are
    endless. `pseudo_labeled` are recordings `[samples]` with the codes `[37, frames]` that inversion found;
    short ones have fewer frames than an item.
    """

    codes: Sequence[Tensor]
    recordings: ClipBatches | None = None
    pseudo_labeled: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass
class Teachers:
    """Networks that losses ask.

    `speaker(fake, real, lengths)` is a loss of waveforms `[clips, samples]`. `asr(semantic, recordings)`,
    which has parameters of its own, is one of semantic latents `[clips, frames, dim]` and the recordings.
    `soft` gives soft labels.
    """

    speaker: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    asr: nn.Module | None = None
    soft: Ensemble | None = None


@dataclass
class _Losses:
    """Losses by name, and the gradients of those that count with respect to `at`."""

    at: Tensor
    weights: dict[str, float]
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, loss: Tensor) -> None:
        """Take `loss` in."""
        self.values[name] = loss
        if self.weights[name] > 0:
            (self.gradients[name],) = torch.autograd.grad(loss, self.at, retain_graph=True)


def _encoder_of(codec: Codec) -> nn.ModuleDict:
    """Its encoder, with the codec's names."""
    return nn.ModuleDict({"input_proj": codec.input_proj, "encoder_blocks": codec.encoder_blocks})


def _compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch._dynamo.exc import TorchDynamoException

    fast = torch.compile(function, dynamic=False)

    def call(given: Tensor) -> Tensor:
        try:
            made: Tensor = fast(given)
        except TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
            raise TrainingError(
                f"the codec cannot be compiled here ({reason}): set compile to false, or install what it "
                "needs"
            ) from error
        return made

    return call


class EncoderTrainer(Run):
    """One run on `model` (its codec float32), in `folder`: log, state, `encoder.safetensors`, `checkpoints/`.

    `about` goes into the encoder file's metadata. Raises TrainingError when settings do not fit the data or
    the number of processes.
    """

    def __init__(
        self,
        model: Voxtral,
        data: TrainingData,
        settings: EncoderTraining,
        folder: Path,
        *,
        teachers: Teachers | None = None,
        validation: Validation | None = None,
        world: World | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.world = world or World()
        super().__init__("encoder", settings, folder, self.world.device)
        for name in ("clips", "pairs", "pseudo_labels"):
            if getattr(settings, name) % self.world.size:
                raise TrainingError(
                    f"{name} is {getattr(settings, name)} and there are {self.world.size} processes: make it "
                    "a multiple"
                )
        if settings.clips and data.recordings is None:
            raise TrainingError("there are no recordings to learn from: give --data, or set clips to 0")
        if settings.pseudo_labels and not data.pseudo_labeled:
            raise TrainingError(
                "no recording has pseudo-labels to learn from: set pseudo_labels and pseudo_labeled to 0"
            )
        self.settings, self.data = settings, data
        self.teachers, self.validation = teachers or Teachers(), validation or Validation()
        self.about = about or {}
        self.embeddings = model.mm_audio_embeddings
        self.codec = self._fresh_codec(model.audio_tokenizer).to(self.device)
        # Not in the codec's own place: a copy of it would go on computing with the original.
        self._encode_latents: Callable[[Tensor], Tensor] = self.codec.encode_latents
        self._decode_latents: Callable[[Tensor], Tensor] = self.codec.decode_latents
        if settings.compile:
            self._encode_latents = _compiled(self._encode_latents)
            self._decode_latents = _compiled(self._decode_latents)
        config = self.codec.config
        self.rate, self.levels = config.sampling_rate, config.acoustic_codebook_size
        self.frames = settings.frames(config)
        self.table = self.codec.quantizer.semantic_codebook.embedding.detach()
        self.sharpness = sharpness_of(self.table)
        pair = settings.pair
        self.pairs = PresetPairs(
            self.codec,
            data.codes,
            PairSettings(pair.shortest, pair.longest, pair.mixed, pair.offset, pair.jitter, pair.replace),
        )
        self.frequencies = (self.pairs.counts / self.pairs.counts.sum()).to(self.device)
        if settings.scaled_start:
            of_pairs = self.pairs.draw(16, self.frames, torch.Generator().manual_seed(settings.seed))
            scale_latents(self.codec, *of_pairs)
        self.averaged: AveragedModel | None = None
        if settings.average:
            self.averaged = moving_average(_encoder_of(self.codec), settings.average)
        self.encoder = [*self.codec.input_proj.parameters(), *self.codec.encoder_blocks.parameters()]
        if self.teachers.asr is not None:
            self.teachers.asr.to(self.device)
            self.encoder += [p for p in self.teachers.asr.parameters() if p.requires_grad]
        self.hidden: HiddenStates | None = None
        if settings.weights.hidden:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.hidden = HiddenStates(self.codec).to(self.device)
            self.encoder += self.hidden.parameters()
        self.optimizer = encoder_optimizer(self.encoder, settings)
        self.objective = SpectralObjective(self.rate, settings.resolutions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            n_ffts, channels = settings.discriminator.n_ffts, settings.discriminator.channels
            self.discriminators = Discriminators(len(n_ffts), channels).to(self.device)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminators.parameters(), lr=settings.discriminator.learning_rate, betas=settings.betas
        )
        self.weights = settings.weights.model_dump()
        self.balancers = {
            kind: GradientBalancer({k: self.weights[k] for k in names}, self.world, balance=settings.balance)
            for kind, names in (("waveform", _WAVEFORM_LOSSES), ("latent", _LATENT_LOSSES))
        }
        if self.hidden is not None:
            share = settings.weights.hidden / len(self.hidden.maps)
            for i in range(len(self.hidden.maps)):
                self.balancers[f"hidden {i}"] = GradientBalancer(
                    {"hidden": share}, self.world, balance=settings.balance
                )
        self.use = torch.zeros(len(self.table))
        self.own_likelihood: dict[str, float] = {}  # of the model's own speech: it does not change

    def _fresh_codec(self, released: Codec) -> Codec:
        codec = Codec(released.config, with_encoder=True)
        initialize(codec, self.settings.seed)
        for name in ("decoder_blocks", "output_proj", "quantizer"):
            getattr(codec, name).load_state_dict(getattr(released, name).state_dict())
            getattr(codec, name).requires_grad_(False)
        codec = codec.float()
        if self.settings.start == "decoder":
            transpose_decoder(codec)
        return codec

    def arithmetic(self) -> torch.autocast:
        """bf16 on a GPU, or where it was asked for: what serving computes in."""
        kind = torch.device(self.device).type
        wanted = kind == "cuda" if self.settings.autocast is None else self.settings.autocast
        return torch.autocast(kind, torch.bfloat16, enabled=wanted)

    # One step

    def take_step(self) -> dict[str, float]:
        """One update of the encoder, and of the discriminators where it is their turn."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        with self._captured(self.codec.decoder_blocks, lowest_first=True) as of_decoder:
            real, codes, recordings = self._batch()
        with self.arithmetic(), self._captured(self.codec.encoder_blocks) as of_encoder:
            latents = self._encode_latents(real).transpose(1, 2)
        z = latents.detach().float().requires_grad_()
        losses = _Losses(z, self.weights)
        clips = len(real) - len(codes)
        with torch.no_grad():
            nearest = torch.cdist(self._split(z)[0].flatten(0, 1), self.table).argmin(-1).view(z.shape[:2])
        if len(codes):
            semantic, acoustic = self._split(z[clips:])
            known = codes[:, 0] != PADDING
            right, levels = codes[:, 0][known], codes[:, 1:].transpose(1, 2)[known]
            losses.add("semantic", semantic_loss(semantic[known], right, self.table, self.sharpness))
            losses.add("acoustic", acoustic_loss(acoustic[known][None], levels.T[None], self.levels))
            losses.values["agreement"] = (nearest[clips:][known] == right).float().mean()
        if recordings is not None:
            self._recording_losses(losses, real[:clips], recordings)
        inside = self._inside(recordings, self.frames)
        if inside is None and settings.pseudo_labels:
            inside = torch.ones((clips, self.frames), dtype=torch.bool, device=self.device)
        if inside is not None:
            inside = torch.cat((inside, codes[:, 0] != PADDING))
        if settings.weights.commitment > 0:
            # Towards the right row where it is known, else the nearest.
            latent, rows = self._split(z)[0], torch.cat((nearest[:clips], codes[:, 0]))
            if inside is not None:
                latent, rows = latent[inside], rows[inside]
            losses.add("commitment", commitment_loss(latent, rows, self.table))
        if self.teachers.soft is not None and settings.weights.soft:
            self._soft_losses(losses, real, inside)
        total = self.balancers["latent"].combine(losses.gradients)
        pairs = slice(clips, clips + settings.pairs // self.world.size)
        roots = {latents: total.to(latents.dtype)}
        if self.hidden is not None:
            roots |= self._hidden_gradients(self.hidden, losses, of_encoder, of_decoder, pairs)
        torch.autograd.backward(list(roots), list(roots.values()))
        self.world.average_gradients(self.encoder)
        norm = nn.utils.clip_grad_norm_(self.encoder, settings.clip_norm)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(_encoder_of(self.codec))
        used = nearest.flatten() if inside is None else nearest[inside]
        counts = torch.bincount(used, minlength=len(self.table)).float()
        self.use = 0.95 * self.use + self.world.sum(counts).cpu()
        return self._figures(losses.values) | {"norm": float(norm)}

    def _figures(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over all processes, the weighted `loss`, and the perplexity of recent codes."""
        means = self.world.mean(torch.stack([value.detach().float() for value in values.values()])).tolist()
        row = dict(zip(values, means, strict=True))
        row["loss"] = sum(self.weights[k] * row[k] for k in (*_LATENT_LOSSES, "hidden") if k in row)
        share = self.use / self.use.sum()
        row["perplexity"] = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
        return row

    def _batch(self) -> tuple[Tensor, Tensor, ClipBatch | None]:
        """Waveforms `[clips + known, samples]`, the codes `[known, 37, frames]` of the last `known` of them
        (pairs and pseudo-labeled recordings; PADDING after a short one), and the step's recordings."""
        settings, samples = self.settings, self.frames * self.codec.samples_per_frame
        recordings, parts = None, []
        if settings.clips:
            assert self.data.recordings is not None
            recordings = next(self.data.recordings).fitted(samples)
            parts.append(recordings.waveforms.to(self.device))
        codes = torch.zeros((0, self.codec.config.n_codebooks, self.frames), dtype=torch.long)
        if settings.pairs:
            codes = self.pairs.draw_codes(settings.pairs, self.frames, self.rng)
            codes = codes[self.world.part(settings.pairs)].to(self.device)
            with torch.no_grad(), self.arithmetic():
                made = self._decode_latents(self.codec.quantizer.decode(codes)).float()
            if settings.pair.all_pass:
                phases = draw_phases(settings.pairs, self.rate, settings.pair.all_pass, self.rng)
                made = all_pass(made, self.rate, phases[self.world.part(settings.pairs)])
            parts.append(made)
        if settings.pseudo_labels:
            labeled = self.data.pseudo_labeled
            drawn = torch.randint(len(labeled), (settings.pseudo_labels,), generator=self.rng)
            chosen = [labeled[int(i)] for i in drawn[self.world.part(settings.pseudo_labels)]]
            waves = [functional.pad(wave, (0, samples - len(wave))) for wave, _ in chosen]
            found = [functional.pad(one, (0, self.frames - one.shape[1]), value=PADDING) for _, one in chosen]
            parts.append(torch.stack(waves).float().to(self.device))
            codes = torch.cat((codes.to(self.device), torch.stack(found).to(self.device)))
        return self._augmented(torch.cat(parts)), codes.to(self.device), recordings

    def _augmented(self, real: Tensor) -> Tensor:
        settings, mine = self.settings, []
        if not settings.augmentation.changes:
            return real
        for count in filter(None, (settings.clips, settings.pairs, settings.pseudo_labels)):
            mine.append(draw_seeds(count, self.rng)[self.world.part(count)])
        return augmented(real, self.rate, settings.augmentation, torch.cat(mine))

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.codec.config.semantic_dim
        return z[..., :dim], z[..., dim:]

    def _inside(self, recordings: ClipBatch | None, units: int) -> Tensor | None:
        """Which frames or samples `[clips, units]` are of recordings and not of their padding; None: all."""
        samples = self.frames * self.codec.samples_per_frame
        inside = None if recordings is None else recordings.inside(units, samples)
        return None if inside is None else inside.to(self.device)

    def _soft_losses(self, losses: _Losses, real: Tensor, inside: Tensor | None) -> None:
        assert self.teachers.soft is not None
        probabilities, values = self.teachers.soft.posterior(real)
        semantic, acoustic = self._split(losses.at)
        if inside is not None:
            semantic, acoustic, probabilities, values = (
                x[inside] for x in (semantic, acoustic, probabilities, values)
            )
        losses.add("soft_semantic", soft_semantic_loss(semantic, probabilities, self.table, self.sharpness))
        losses.add("soft_acoustic", soft_acoustic_loss(acoustic, values, self.levels))

    def _captured(
        self, blocks: nn.ModuleList, *, lowest_first: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        if self.hidden is None:
            return nullcontext([])
        return captured(blocks, lowest_first=lowest_first)

    def _hidden_gradients(
        self,
        hidden: HiddenStates,
        losses: _Losses,
        encoder: list[Tensor],
        decoder: list[Tensor],
        pairs: slice,
    ) -> dict[Tensor, Tensor]:
        """The gradients of the encoder's hidden states, balanced; those of the maps are put in place."""
        leaves = [states.detach().float().requires_grad_() for states in encoder]
        found = hidden.losses([leaf[pairs] for leaf in leaves], decoder)
        losses.values["hidden"] = torch.stack(found).mean()
        balanced = {}
        for i, (states, leaf, loss) in enumerate(zip(encoder, leaves, found, strict=True)):
            (weight,) = hidden.maps[i].parameters()
            gradient, weight.grad = torch.autograd.grad(loss, [leaf, weight])
            combined = self.balancers[f"hidden {i}"].combine({"hidden": gradient})
            balanced[states] = combined.to(states.dtype)
        return balanced

    def _recording_losses(self, losses: _Losses, real: Tensor, recordings: ClipBatch) -> None:
        settings, weights = self.settings, self.settings.weights
        semantic, acoustic = self._split(losses.at[: len(real)])
        # Every process draws for the whole batch and takes its part: the same numbers however many there are.
        part = self.world.part(settings.clips)
        noise, chance = acoustic_draws((settings.clips, *acoustic.shape[1:]), self.rng)
        semantic_chance = torch.rand(settings.clips, generator=self.rng)
        if weights.reconstruction > 0:
            quantized = torch.cat(
                (
                    quantize_semantic(semantic, self.table, semantic_chance[part]),
                    quantize_drawn(torch.tanh(acoustic), self.levels, noise[part], chance[part]),
                ),
                dim=-1,
            )
            with self.arithmetic():
                fake = self._decode_latents(quantized.transpose(1, 2))
            waveform = _Losses(fake.detach().float().requires_grad_(), self.weights)
            self._waveform_losses(waveform, real, recordings)
            fading = settings.decay**self.step_count
            factors = {"stft": fading, "waveform": fading}
            gradient = self.balancers["waveform"].combine(waveform.gradients, factors)
            losses.values |= waveform.values
            losses.values["reconstruction"] = torch.stack([waveform.values[k] for k in ("mel", "stft")]).sum()
            (losses.gradients["reconstruction"],) = torch.autograd.grad(
                fake, losses.at, gradient.to(fake.dtype)
            )
        if weights.diversity > 0:
            p = semantic_log_probabilities(semantic, self.table, self.sharpness).exp()
            inside = self._inside(recordings, self.frames)
            p = p.mean(dim=(0, 1)) if inside is None else p[inside].mean(dim=0)
            p = p + (self.world.mean(p) - p.detach())
            losses.add("diversity", diversity_loss(p, self.frequencies))
        if weights.distillation > 0 and self.teachers.asr is not None:
            always = torch.zeros(len(real))  # straight through the codebook, in all clips
            loss = self.teachers.asr(quantize_semantic(semantic, self.table, always), recordings)
            losses.values["distillation"] = loss
            own = [p for p in self.teachers.asr.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, [losses.at, *own], retain_graph=True)
            losses.gradients["distillation"] = gradients[0]
            for parameter, gradient in zip(own, gradients[1:], strict=True):
                parameter.grad = gradient

    def _waveform_losses(self, losses: _Losses, real: Tensor, recordings: ClipBatch) -> None:
        """The losses of a reconstruction `[clips, samples]` beside the original, `real`."""
        fake, settings = losses.at, self.settings
        inside = self._inside(recordings, fake.shape[1])
        if inside is not None:  # the padding is silence that nobody recorded: nothing is learned from it
            fake = fake * inside
        terms = self.objective(self.objective.spectra(real), self.objective.spectra(fake))
        losses.add("mel", terms.mel)
        losses.add("stft", terms.magnitude + terms.complex)
        losses.add("waveform", (fake - real).abs().mean())
        if self.teachers.speaker is not None:
            losses.add("speaker", self.teachers.speaker(fake, real, recordings.lengths.to(self.device)))
        if settings.weights.feature and self.step_count >= settings.discriminator.start:
            self._discriminator_losses(losses, real, fake)

    def _discriminator_losses(self, losses: _Losses, real: Tensor, fake: Tensor) -> None:
        settings = self.settings.discriminator
        length = round(settings.seconds * self.rate)
        start = int(torch.randint(max(1, real.shape[1] - length + 1), (), generator=self.rng))
        real_spectra, fake_spectra = (
            [stft(x[:, start : start + length], n, n // 4) for n in settings.n_ffts] for x in (real, fake)
        )
        if self.step_count % settings.every == 0:
            detached = [spectrum.detach() for spectrum in fake_spectra]
            losses.values["discriminator"] = self._update_discriminators(real_spectra, detached)
        self.discriminators.requires_grad_(False)
        with torch.no_grad():
            real_outputs = self.discriminators(real_spectra)
        fake_outputs = self.discriminators(fake_spectra)
        losses.add("feature", feature_matching_loss(real_outputs, fake_outputs))
        self.discriminators.requires_grad_(True)

    def _update_discriminators(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        loss = discriminator_loss(self.discriminators(real), self.discriminators(fake))
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.world.average_gradients(self.discriminators.parameters())
        nn.utils.clip_grad_norm_(self.discriminators.parameters(), 10.0)
        self.discriminator_optimizer.step()
        return loss

    # Validation and state

    def validate(self) -> dict[str, float]:
        """Figures of what serving would give (`revox.training.validation`); of the main process only."""
        if not self.world.is_main:
            return {}
        served, asked = as_served(self.codec, self.encoder_state()), self.validation
        row: dict[str, float] = {}
        own = {"valid": [one.codes for one in asked.utterances], "trained": self._some_trained()}
        for name, codes in own.items():
            if own["valid"]:  # else there is nothing to compare with
                agreement, levels = decoded_figures(
                    self.codec, served, codes, 4 * self.frames, self.settings.pair.all_pass
                )
                row |= {f"{name}_agreement": agreement, f"{name}_levels": levels}
        found = [find_codes(served, clip.samples.to(self.device), ENCODER).codes for clip in asked.clips]
        figures, sounds = clip_figures(self.codec, self.embeddings, asked.clips, found)
        row |= self._likelihood_figures(found)
        if (writer := self.validation.writer) is not None:
            for name, samples in sounds.items():
                writer.add_audio(name, samples.clamp(-1, 1)[None], self.step_count, sample_rate=self.rate)
            # Codes as often as they were used, for a histogram over codes.
            counts = (self.use / self.use.sum().clamp_min(1e-9) * 10_000).round().long()
            spread = torch.repeat_interleave(torch.arange(len(counts)), counts)
            writer.add_histogram("semantic codes", spread, self.step_count)
        return {name: round(value, 4) for name, value in (row | figures).items()}

    def _some_trained(self) -> list[Tensor]:
        """As many utterances that are learnt from as are validated on, from all over."""
        count = min(UTTERANCES, len(self.data.codes))
        return [self.data.codes[i * len(self.data.codes) // count] for i in range(count)]

    def _likelihood_figures(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Of the codes `found` in the clips whose words are known; and, for comparison, of the model's own
        speech."""
        asked = self.validation
        known = [
            Utterance(clip.transcript, codes)
            for clip, codes in zip(asked.clips, found, strict=True)
            if clip.transcript
        ]
        if not known or asked.language_model is None:
            return {}
        try:
            model, prompter = asked.language_model()
            row = dict(zip(("valid_nll", "valid_flow"), mean_likelihood(model, prompter, known), strict=True))
            own = [one for one in asked.utterances if one.text][: len(known)]
            if own and not self.own_likelihood:
                names, of_own = ("own_nll", "own_flow"), mean_likelihood(model, prompter, own)
                self.own_likelihood = dict(zip(names, of_own, strict=True))
        except torch.OutOfMemoryError:
            warnings.warn(
                "the language model does not fit beside the training: its likelihood of recordings is left"
                " out this time (`likelihood: false` leaves it out)",
                stacklevel=2,
            )
            return {}
        return row | self.own_likelihood

    def state(self) -> dict[str, Any]:
        """Encoder, discriminators, teachers' own weights, optimizers, averages, and where the data stands."""
        found = {
            "encoder": _encoder_of(self.codec).state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "balancers": {name: one.state_dict() for name, one in self.balancers.items()},
            "use": self.use,
        }
        if self.hidden is not None:
            found["hidden"] = self.hidden.state_dict()
        if self.averaged is not None:
            found["averaged"] = self.averaged.state_dict()
        if self.data.recordings is not None:
            found["recordings"] = json.dumps(self.world.gather(self.data.recordings.state()))
        if self.teachers.asr is not None:
            found["asr"] = {k: v for k, v in self.teachers.asr.named_parameters() if v.requires_grad}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave, or the state of a run by version 0.1."""
        for old, new in (("judges", "discriminators"), ("judge_optimizer", "discriminator_optimizer")):
            if old in state:
                state[new] = state.pop(old)
        self.codec.load_state_dict(state["encoder"], strict=False)
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        for name, one in self.balancers.items():
            one.load_state_dict(state["balancers"][name])
        self.use = state["use"].cpu()
        if self.hidden is not None:
            self.hidden.load_state_dict(state["hidden"])
        if self.averaged is not None and "averaged" in state:  # else it begins with the next step
            self.averaged.load_state_dict(state["averaged"])
        if self.data.recordings is not None and "recordings" in state:
            # Each process goes on with its own: clips that could not be decoded set them apart.
            states = json.loads(state["recordings"])
            self.data.recordings.load_state(states[self.world.rank if len(states) == self.world.size else 0])
        if self.teachers.asr is not None:
            self.teachers.asr.load_state_dict(state["asr"], strict=False)

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's 114 tensors, float32, by their names in the codec; of the average if there is one."""
        encoder: nn.Module = _encoder_of(self.codec)
        if self.averaged is not None and self.averaged.n_averaged > 0:
            encoder = self.averaged.module
        return {k: v.detach() for k, v in encoder.state_dict().items()}

    def save(self) -> None:
        """The state, the encoder as it would be injected, and the last few of those; main process only."""
        state = self.state()  # every process takes part in it
        if self.world.is_main:
            self.write_state(state)
            tensors = {
                tensor_name(f"audio_tokenizer.{k}"): v.to(torch.bfloat16).cpu().contiguous()
                for k, v in self.encoder_state().items()
            }
            about = self.about | {"steps": self.step_count, "settings": self.settings.model_dump(mode="json")}
            folder = self.state_path.parent
            replace_file(folder / ENCODER_FILE, save(tensors, metadata={RECORD_KEY: json.dumps(about)}))
            checkpoints = folder / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            latest = checkpoints / f"encoder-{self.step_count:08d}.safetensors"
            latest.unlink(missing_ok=True)
            try:
                os.link(folder / ENCODER_FILE, latest)
            except OSError:  # a file system without hard links
                shutil.copyfile(folder / ENCODER_FILE, latest)
            for old in sorted(checkpoints.glob("encoder-*.safetensors"))[: -self.settings.keep]:
                old.unlink()
        self.world.wait()

    def agreed(self, stop: bool) -> bool:
        """All processes stop when one of them was asked to."""
        return self.world.any(stop)
