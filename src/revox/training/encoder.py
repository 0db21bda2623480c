"""Restoring the codec's encoder: the run that learns from pairs and from recordings (phase 1).

The decoder, the codebook and the language model of the checkpoint stay as they are. Two kinds of items share
every batch. **Pairs** are codes and the audio that the decoder makes of them: the right answer is known, and
the encoder is told it. **Recordings** go through encoder, stochastic quantizer and frozen decoder, and are
compared with themselves: spectra, waveform, discriminators, a speaker network, Whisper. All losses meet at
the latents, where their gradients are balanced; the encoder is gone through backwards once.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from revox.checkpoint.encoder_file import ENCODER_FILE, RECORD_KEY
from revox.coding.pairs import PairSettings, PresetPairs
from revox.losses.codes import (
    acoustic_loss,
    commitment_loss,
    diversity_loss,
    semantic_log_probabilities,
    semantic_loss,
    sharpness_of,
)
from revox.losses.discriminator import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from revox.losses.spectral import SpectralObjective, mel_distance
from revox.losses.stft import stft
from revox.metrics.codes import codebook_use, perplexity, saturated_share
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral, tensor_name
from revox.speech.files import replace_file
from revox.training.average import moving_average
from revox.training.balance import GradientBalancer
from revox.training.errors import TrainingError
from revox.training.initial import initialise
from revox.training.phases import draw_turns, turn_phases
from revox.training.quantize import acoustic_draws, quantize_drawn, quantize_semantic
from revox.training.run import Run
from revox.training.settings import EncoderTraining
from revox.training.world import World

_WAVEFORM_LOSSES = ("mel", "stft", "waveform", "feature", "adversarial", "speaker")
_LATENT_LOSSES = (
    "reconstruction", "semantic", "acoustic", "commitment", "diversity", "distillation", "acceptance",
)  # fmt: skip


@dataclass(frozen=True)
class Recordings:
    """A rank's part of a step's recordings: `waveforms` `[clips, samples]`, full scale 1, silent beyond
    `lengths` `[clips]` (samples), and where known what is said in each whole clip and in which language."""

    waveforms: Tensor
    lengths: Tensor
    transcripts: Sequence[str | None] = ()
    languages: Sequence[str | None] = ()


class RecordingSource(Protocol):
    """Endless recordings, the same ones again after `load_state`."""

    def draw(self) -> Recordings:
        """This rank's next."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it stands: numbers and strings."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@dataclass
class Teachers:
    """Networks that judge. `speaker(fake, real, lengths)` is a loss of waveforms; `asr` has parameters of its
    own and is a loss of semantic latents `[clips, frames, dim]` and recordings; `acceptance(probabilities,
    values, text, seed)` is one of a clip's soft codes, `[frames, size]` and `[36, frames]`."""

    speaker: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    asr: nn.Module | None = None
    acceptance: Callable[[Tensor, Tensor, str, int], Tensor] | None = None


@dataclass
class Validation:
    """What is looked at every so often: `clips`, each `[samples]`; `sounds` receives name -> waveform."""

    clips: Sequence[Tensor] = ()
    sounds: Callable[[int, dict[str, Tensor]], None] | None = None
    histogram: Callable[[int, Tensor], None] | None = None


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

    `bank` are codes `[37, frames]` that the model made: its presets' and its speech. `labelled` are
    recordings `[samples]` with the codes `[37, frames]` that inversion found for them. `about` goes into the
    encoder file's metadata. Raises TrainingError when settings and world do not fit.
    """

    def __init__(
        self,
        model: Voxtral,
        bank: Sequence[Tensor],
        settings: EncoderTraining,
        folder: Path,
        *,
        recordings: RecordingSource | None = None,
        labelled: Sequence[tuple[Tensor, Tensor]] = (),
        teachers: Teachers | None = None,
        validation: Validation | None = None,
        world: World | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.world = world or World()
        super().__init__("encoder", settings, folder, self.world.device)
        for name in ("clips", "pairs", "labels"):
            if getattr(settings, name) % self.world.size:
                raise TrainingError(
                    f"{name} is {getattr(settings, name)} and there are {self.world.size} processes: make it "
                    "a multiple"
                )
        if settings.clips and recordings is None:
            raise TrainingError("there are no recordings to learn from: give --data, or set clips to 0")
        if settings.labels and not labelled:
            raise TrainingError("no recording has been inverted to learn from: set labels and inverted to 0")
        self.settings, self.recordings, self.labelled = settings, recordings, labelled
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
        self.frames = max(1, round(settings.seconds * config.sampling_rate / self.codec.samples_per_frame))
        self.table = self.codec.quantizer.semantic_codebook.embedding.detach()
        self.sharpness = sharpness_of(self.table)
        self.pairs = PresetPairs(
            self.codec, bank, PairSettings(**settings.pair.model_dump(exclude={"phases"}))
        )
        self.averaged: AveragedModel | None = None
        if settings.average:
            self.averaged = moving_average(_encoder_of(self.codec), settings.average)
        self.encoder = [*self.codec.input_proj.parameters(), *self.codec.encoder_blocks.parameters()]
        if self.teachers.asr is not None:
            self.teachers.asr.to(self.device)
            self.encoder += [p for p in self.teachers.asr.parameters() if p.requires_grad]
        matrices = [p for p in self.encoder if p.dim() > 1]
        vectors = [p for p in self.encoder if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate, betas=settings.betas,
        )  # fmt: skip
        rate, judged = config.sampling_rate, settings.discriminator
        self.objective = SpectralObjective(rate, settings.resolutions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.judges = Discriminators(len(judged.n_ffts), judged.channels).to(self.device)
        self.judge_optimizer = torch.optim.AdamW(
            self.judges.parameters(), lr=judged.learning_rate, betas=settings.betas
        )
        weights = settings.weights.model_dump()
        self.balancers = {
            kind: GradientBalancer({k: weights[k] for k in names}, self.world, balance=settings.balance)
            for kind, names in (("waveform", _WAVEFORM_LOSSES), ("latent", _LATENT_LOSSES))
        }
        self.use = torch.zeros(len(self.table))

    def _fresh_codec(self, released: Codec) -> Codec:
        codec = Codec(released.config, with_encoder=True)
        initialise(codec, self.settings.seed)
        for name in ("decoder_blocks", "output_proj", "quantizer"):
            getattr(codec, name).load_state_dict(getattr(released, name).state_dict())
            getattr(codec, name).requires_grad_(False)
        return codec.float()

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
        real, codes, recordings = self._batch()
        with self.arithmetic():
            latents = self._encode_latents(real).transpose(1, 2)
        z = latents.detach().float().requires_grad_()
        clips = len(real) - len(codes)
        with torch.no_grad():
            nearest = torch.cdist(self._split(z)[0].flatten(0, 1), self.table).argmin(-1).view(z.shape[:2])
        found: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        if len(codes):
            self._pair_losses(z, clips, codes, found, gradients)
            found["agreement"] = (nearest[clips:] == codes[:, 0]).float().mean()
        if clips:
            self._recording_losses(z, clips, real[:clips], recordings, found, gradients)
        if settings.weights.commitment > 0:
            # Towards the right row where it is known, else the nearest.
            rows = torch.cat((nearest[:clips], codes[:, 0]))
            self._add("commitment", commitment_loss(self._split(z)[0], rows, self.table), z, found, gradients)
        total = self.balancers["latent"].combine(gradients)
        latents.backward(total.to(latents.dtype))
        self.world.average_gradients(self.encoder)
        norm = nn.utils.clip_grad_norm_(self.encoder, settings.clip_norm)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(_encoder_of(self.codec))
        counts = torch.bincount(nearest.flatten(), minlength=len(self.table)).float()
        self.use = 0.95 * self.use + self.world.sum(counts).cpu()
        names = list(found)
        values = self.world.mean(torch.stack([found[name].detach().float() for name in names])).tolist()
        row = dict(zip(names, values, strict=True))
        weights = self.settings.weights
        row["loss"] = sum(getattr(weights, k) * row[k] for k in _LATENT_LOSSES if k in row)
        share = self.use / self.use.sum()
        row["perplexity"] = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
        return row | {"norm": float(norm)}

    def _batch(self) -> tuple[Tensor, Tensor, Recordings | None]:
        """Waveforms `[clips + known, samples]`, codes `[known, 37, frames]` of the pairs and then of the
        inverted recordings, and the step's recordings."""
        settings, samples = self.settings, self.frames * self.codec.samples_per_frame
        recordings, parts = None, []
        if settings.clips:
            assert self.recordings is not None
            recordings = self.recordings.draw()
            parts.append(recordings.waveforms[:, :samples].to(self.device))
        codes = torch.zeros((0, self.codec.config.n_codebooks, self.frames), dtype=torch.long)
        if settings.pairs:
            codes = self.pairs.draw_codes(settings.pairs, self.frames, self.rng)
            codes = codes[self.world.part(settings.pairs)].to(self.device)
            with torch.no_grad(), self.arithmetic():
                made = self._decode_latents(self.codec.quantizer.decode(codes)).float()
            if settings.pair.phases:
                rate = self.codec.config.sampling_rate
                turns = draw_turns(settings.pairs, rate, settings.pair.phases, self.rng)
                made = turn_phases(made, rate, turns[self.world.part(settings.pairs)])
            parts.append(made)
        if settings.labels:
            drawn = torch.randint(len(self.labelled), (settings.labels,), generator=self.rng)
            chosen = [self.labelled[int(i)] for i in drawn[self.world.part(settings.labels)]]
            parts.append(torch.stack([wave for wave, _ in chosen]).float().to(self.device))
            codes = torch.cat((codes.to(self.device), torch.stack([c for _, c in chosen]).to(self.device)))
        return torch.cat(parts), codes.to(self.device), recordings

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.codec.config.semantic_dim
        return z[..., :dim], z[..., dim:]

    def _add(
        self, name: str, loss: Tensor, z: Tensor, found: dict[str, Tensor], to: dict[str, Tensor]
    ) -> None:
        found[name] = loss
        if getattr(self.settings.weights, name) > 0:
            (to[name],) = torch.autograd.grad(loss, z, retain_graph=True)

    def _pair_losses(
        self, z: Tensor, clips: int, codes: Tensor, found: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> None:
        semantic, acoustic = self._split(z[clips:])
        loss = semantic_loss(semantic, codes[:, 0], self.table, self.sharpness)
        self._add("semantic", loss, z, found, gradients)
        levels = self.codec.config.acoustic_codebook_size
        self._add("acoustic", acoustic_loss(acoustic, codes[:, 1:], levels), z, found, gradients)

    def _recording_losses(
        self,
        z: Tensor,
        clips: int,
        real: Tensor,
        recordings: Recordings | None,
        found: dict[str, Tensor],
        gradients: dict[str, Tensor],
    ) -> None:
        settings, weights = self.settings, self.settings.weights
        semantic, acoustic = self._split(z[:clips])
        # Every rank draws for the whole batch and takes its part: the same numbers however many there are.
        whole = (settings.clips, *acoustic.shape[1:])
        part = self.world.part(settings.clips)
        noise, chance = acoustic_draws(whole, self.rng)
        semantic_chance = torch.rand(settings.clips, generator=self.rng)
        if weights.reconstruction > 0:
            levels = self.codec.config.acoustic_codebook_size
            heard = torch.cat(
                (
                    quantize_semantic(semantic, self.table, semantic_chance[part]),
                    quantize_drawn(torch.tanh(acoustic), levels, noise[part], chance[part]),
                ),
                dim=-1,
            )
            with self.arithmetic():
                fake = self._decode_latents(heard.transpose(1, 2))
            assert recordings is not None
            gradient = self._waveform_gradient(fake.detach().float(), real, recordings.lengths, found)
            found["reconstruction"] = torch.stack([found[k] for k in ("mel", "stft")]).sum()
            (gradients["reconstruction"],) = torch.autograd.grad(fake, z, gradient.to(fake.dtype))
        if weights.diversity > 0:
            p = semantic_log_probabilities(semantic, self.table, self.sharpness).exp().mean(dim=(0, 1))
            p = p + (self.world.mean(p) - p.detach())
            self._add("diversity", diversity_loss(p), z, found, gradients)
        if weights.acceptance > 0 and self.teachers.acceptance is not None:
            assert recordings is not None
            self._add("acceptance", self._acceptance(semantic, acoustic, recordings), z, found, gradients)
        if weights.distillation > 0 and self.teachers.asr is not None:
            loss = self.teachers.asr(semantic, recordings)
            found["distillation"] = loss
            own = [p for p in self.teachers.asr.parameters() if p.requires_grad]
            gradients["distillation"], *rest = torch.autograd.grad(loss, [z, *own], retain_graph=True)
            for parameter, gradient in zip(own, rest, strict=True):
                parameter.grad = gradient

    def _acceptance(self, semantic: Tensor, acoustic: Tensor, recordings: Recordings) -> Tensor:
        """Of the first few recordings whose words are known; nought when none are, so that all ranks agree on
        what is there."""
        assert self.teachers.acceptance is not None
        seed = int(torch.randint(2**31, (), generator=self.rng))
        known = [(i, text) for i, text in enumerate(recordings.transcripts) if text]
        total = semantic.sum() * 0.0
        for i, text in known[: self.settings.acceptance_clips]:
            frames = min(self.frames, -(-int(recordings.lengths[i]) // self.codec.samples_per_frame))
            p = semantic_log_probabilities(semantic[i, :frames], self.table, self.sharpness).exp()
            total = total + self.teachers.acceptance(p, torch.tanh(acoustic[i, :frames]).T, text, seed)
        return total / self.settings.acceptance_clips

    def _waveform_gradient(
        self, fake: Tensor, real: Tensor, lengths: Tensor, found: dict[str, Tensor]
    ) -> Tensor:
        """The balanced gradient with respect to the reconstruction `[clips, samples]`."""
        settings, weights = self.settings, self.settings.weights
        fake.requires_grad_()
        terms = self.objective(self.objective.spectra(real), self.objective.spectra(fake))
        fading = settings.decay**self.step_count
        losses = {
            "mel": terms.mel,
            "stft": (terms.magnitude + terms.complex) * fading,
            "waveform": (fake - real).abs().mean() * fading,
        }
        if self.teachers.speaker is not None:
            losses["speaker"] = self.teachers.speaker(fake, real, lengths.to(self.device))
        if self.step_count >= settings.discriminator.start and (weights.feature or weights.adversarial):
            window = self._window(fake.shape[1])
            views_real, views_fake = (
                [stft(x[:, window], n, n // 4) for n in settings.discriminator.n_ffts] for x in (real, fake)
            )
            if self.step_count % settings.discriminator.every == 0:
                found["discriminator"] = self._judge(views_real, [v.detach() for v in views_fake])
            self.judges.requires_grad_(False)
            with torch.no_grad():
                judged_real = self.judges(views_real)
            judged = self.judges(views_fake)
            losses["feature"] = feature_matching_loss(judged_real, judged)
            losses["adversarial"] = adversarial_loss(judged)
            self.judges.requires_grad_(True)
        gradients = {}
        for name, loss in losses.items():
            found[name] = loss
            if getattr(weights, name) > 0:
                (gradients[name],) = torch.autograd.grad(loss, fake, retain_graph=True)
        return self.balancers["waveform"].combine(gradients)

    def _window(self, samples: int) -> slice:
        length = round(self.settings.discriminator.seconds * self.codec.config.sampling_rate)
        start = int(torch.randint(max(1, samples - length + 1), (), generator=self.rng))
        return slice(start, start + length)

    def _judge(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        loss = discriminator_loss(self.judges(real), self.judges(fake))
        self.judge_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.world.average_gradients(self.judges.parameters())
        nn.utils.clip_grad_norm_(self.judges.parameters(), 10.0)
        self.judge_optimizer.step()
        return loss

    # Looking at it

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Codes as serving would give them: of decoded presets (the right ones are known), and of clips."""
        if not self.world.is_main:
            return {}
        served = copy.deepcopy(self.codec)
        served.load_state_dict(self.encoder_state(), strict=False)
        served = served.to(torch.bfloat16).eval()
        levels = self.codec.config.acoustic_codebook_size
        agreement, error = [], []
        for codes in self.pairs.bank[:20]:
            codes = codes[:, : 4 * self.frames].to(self.device)
            audio = self.codec.decode(codes[None])
            given = served.encode_as_served(audio.to(torch.bfloat16))[0]
            agreement.append(float((given[0] == codes[0]).float().mean()))
            error.append(float((given[1:] - codes[1:]).abs().float().mean()))
        row = {"valid_agreement": float(np.mean(agreement)), "valid_levels": float(np.mean(error))}
        said, distances, norms = [], [], []
        sounds: dict[str, Tensor] = {}
        for i, clip in enumerate(self.validation.clips):
            clip = clip.to(self.device)
            codes = served.encode_as_served(clip[None].to(torch.bfloat16))
            decoded = self.codec.decode(codes)[0, : len(clip)]
            distances.append(mel_distance(decoded[None], clip[None], self.codec.config.sampling_rate))
            said.append(codes[0].cpu())  # where the table is
            norms.append(float(self.embeddings.voice_embedding(said[-1])[:-1].float().norm(dim=-1).mean()))
            if i < 4:
                sounds |= {f"{i}-original": clip.cpu(), f"{i}-decoded": decoded.cpu()}
        if said:
            together = torch.cat(said, dim=1)
            row |= {
                "valid_mel": float(np.median(distances)),
                "valid_codes_used": float(codebook_use(together)),
                "valid_perplexity": perplexity(together),
                "valid_saturated": saturated_share(together, levels),
                "valid_row_norm": float(np.mean(norms)),
            }
            if self.validation.sounds is not None:
                self.validation.sounds(self.step_count, sounds)
        if self.validation.histogram is not None:
            self.validation.histogram(self.step_count, self.use)
        return {name: round(value, 4) for name, value in row.items()}

    # Keeping it

    def state(self) -> dict[str, Any]:
        """Encoder, discriminators, teachers' own weights, optimizers, averages, and where the data stands."""
        found = {
            "encoder": _encoder_of(self.codec).state_dict(),
            "judges": self.judges.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judge_optimizer": self.judge_optimizer.state_dict(),
            "balancers": {name: one.state_dict() for name, one in self.balancers.items()},
            "use": self.use,
        }
        if self.averaged is not None:
            found["averaged"] = self.averaged.state_dict()
        if self.recordings is not None:
            found["recordings"] = json.dumps(self.world.gather(self.recordings.state()))
        if self.teachers.asr is not None:
            found["asr"] = {k: v for k, v in self.teachers.asr.named_parameters() if v.requires_grad}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.codec.load_state_dict(state["encoder"], strict=False)
        self.judges.load_state_dict(state["judges"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        for name, one in self.balancers.items():
            one.load_state_dict(state["balancers"][name])
        self.use = state["use"].cpu()
        if self.averaged is not None and "averaged" in state:  # else it begins with the next step
            self.averaged.load_state_dict(state["averaged"])
        if self.recordings is not None and "recordings" in state:
            # Each rank goes on with its own: clips that could not be decoded set them apart.
            states = json.loads(state["recordings"])
            self.recordings.load_state(states[self.world.rank if len(states) == self.world.size else 0])
        if self.teachers.asr is not None:
            self.teachers.asr.load_state_dict(state["asr"], strict=False)

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's 114 tensors, float32, by their names in the codec; of the average if one is kept."""
        kept: nn.Module = _encoder_of(self.codec)
        if self.averaged is not None and self.averaged.n_averaged > 0:
            kept = self.averaged.module
        return {k: v.detach() for k, v in kept.state_dict().items()}

    def save(self) -> None:
        """The state, the encoder as it would be injected, and the last few of those; main rank only."""
        state = self.state()  # every rank takes part in it
        if self.world.is_main:
            self.write_state(state)
            tensors = {
                tensor_name(f"audio_tokenizer.{k}"): v.to(torch.bfloat16).cpu().contiguous()
                for k, v in self.encoder_state().items()
            }
            about = self.about | {"steps": self.step_count, "settings": self.settings.model_dump(mode="json")}
            folder = self.state_path.parent
            replace_file(folder / ENCODER_FILE, save(tensors, metadata={RECORD_KEY: json.dumps(about)}))
            kept = folder / "checkpoints"
            kept.mkdir(exist_ok=True)
            mine = kept / f"encoder-{self.step_count:08d}.safetensors"
            mine.unlink(missing_ok=True)
            os.link(folder / ENCODER_FILE, mine)
            for old in sorted(kept.glob("encoder-*.safetensors"))[: -self.settings.keep]:
                old.unlink()
        self.world.wait()

    def agreed(self, stop: bool) -> bool:
        """All ranks stop when one of them was told to."""
        return self.world.any(stop)
