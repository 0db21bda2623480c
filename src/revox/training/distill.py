"""Whisper distillation: semantic latents should hold what a recognizer hears (arXiv 2603.25551, section 2).

For a clip with text tokens y_1..y_L, codec frames 1..F and semantic latents z_f (after quantization,
straight-through):

    L_ASR = 1 - (1/L) sum_l cos(h_l, sum_f A_lf W z_f)

- h_l: Whisper's last decoder hidden state (after the final LayerNorm, what its logits are made of) at the
  position that predicts y_l, the tokens before it given. openai-whisper's timing (`whisper/timing.py`) takes
  the attention of the same position for the time of y_l.
- A_lf: that position's cross-attention: the softmax over encoder positions, averaged over the alignment heads
  that the generation config names, or over all heads of the last half of the layers where it names none
  (openai-whisper's own default, `whisper/model.py`); cut to the positions of the clip, brought from
  Whisper's 50 positions a second to the codec's frames by overlap in time, and divided by its sum.
- W: a linear map without bias, learned with the encoder. Sum and map commute, so W is applied to the sums.

The timing code also normalises each head over tokens and applies a median filter of 7 positions (140 ms).
Neither is done here: they prepare a matrix for dynamic time warping, and the first gives weights below zero,
the second erases a head that looks at fewer than four positions, so that neither leaves a weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revox.training.errors import TrainingError, library
from revox.training.resampling import Resampler

_RATE = 16000
_FRAME_RATE = 12.5  # of the codec, Hz
_POSITIONS = 50  # of Whisper's encoder, a second
LONGEST = 30  # seconds that Whisper hears at once
_TOKENS_A_SECOND = 25  # more than any language's speech; a longer transcript is a loop


@dataclass(frozen=True)
class TokenStates:
    """What Whisper gives for one stretch of sound, float32: `hidden` `[tokens, width]` and its
    cross-attention `[tokens, positions]`, of the stretch's positions only (50 a second)."""

    hidden: Tensor
    attention: Tensor


@dataclass(frozen=True)
class DistillTargets:
    """What Whisper gives for each clip of a batch, float32 and without gradient.

    `hidden[i]` is `[tokens, width]`, `alignment[i]` `[tokens, frames]` with rows that sum to 1; special
    tokens are not among them, and a clip without words has no tokens.
    """

    hidden: list[Tensor]
    alignment: list[Tensor]


def frames_of_attention(
    attention: Tensor, samples: int, rate: int, samples_per_frame: int, first: int = 0
) -> Tensor:
    """Weights `[..., frames]` of the codec's frames, from Whisper's `attention` `[..., positions]`.

    Of `samples` (at `rate` Hz) from the sample `first` on. Encoder position j stands for the time from j/50 s
    on. What attends to other times is cut off, and each position's weight goes to the frames in proportion to
    the time they share. There are ceil(samples / samples_per_frame) frames; a last position or frame that is
    filled in part counts whole.
    """
    positions = min(attention.shape[-1], -(-(first + samples) * _POSITIONS // rate))
    frames = -(-samples // samples_per_frame)
    # In units of 1 / (50 * rate) seconds all edges are whole numbers.
    start = torch.arange(positions)[:, None] * rate - first * _POSITIONS
    edge = torch.arange(frames)[None, :] * samples_per_frame * _POSITIONS
    shared = (start + rate).minimum(edge + samples_per_frame * _POSITIONS) - start.maximum(edge)
    weights = shared.clamp(min=0).to(attention) / rate
    return attention[..., :positions] @ weights


def _samples_per_frame(rate: int) -> int:
    samples = round(rate / _FRAME_RATE)
    if samples * _FRAME_RATE != rate:
        raise TrainingError(f"{rate} Hz is not a whole number of samples for a frame of {_FRAME_RATE} Hz.")
    return samples


def targets_of_crop(states: TokenStates, first: int, samples: int, rate: int) -> tuple[Tensor, Tensor]:
    """Hidden states `[tokens, width]` and alignment `[tokens, frames]`, rows that sum to 1, of a crop.

    It is `samples` long (at `rate` Hz) and begins at the sample `first` of what `states` are of. Its tokens
    are those that pay it at least half of their attention. Raises TrainingError for a rate that does not
    divide into frames.
    """
    spread = frames_of_attention(states.attention, samples, rate, _samples_per_frame(rate), first)
    inside = spread.sum(-1)
    own = inside >= 0.5 * states.attention.sum(-1)
    return states.hidden[own], (spread / inside.clamp(min=1e-12)[..., None])[own]


class WhisperTeacher:
    """A frozen Whisper that gives a hidden state and a time for each text token.

    It is not a module of the training: nothing of it is trained, saved with a run or shared by processes.
    """

    def __init__(self, model: Any, tokenizer: Any, features: Any, name: str = "") -> None:
        """`model`, `tokenizer`, `features`: transformers' Whisper. `name`: where it is from.

        Raises TrainingError where the generation config names alignment heads that the model does not have.
        """
        self._model, self._tokenizer, self._features = model.eval().requires_grad_(False), tokenizer, features
        self._resamplers: dict[int, Resampler] = {}
        self.name = name
        config, generation = model.config, model.generation_config
        named = getattr(generation, "alignment_heads", None)
        layers, heads = config.decoder_layers, config.decoder_attention_heads
        self._heads = [(int(layer), int(head)) for layer, head in named or ()] or [
            (layer, head) for layer in range(layers // 2, layers) for head in range(heads)
        ]
        if any(not (0 <= layer < layers and 0 <= head < heads) for layer, head in self._heads):
            raise TrainingError(
                f"generation_config.json names alignment heads that this Whisper of {layers} layers of "
                f"{heads} heads does not have; take the model's own file, or remove alignment_heads."
            )
        self._languages: dict[str, int] = {}
        if getattr(generation, "is_multilingual", False):
            self._languages = dict(generation.lang_to_id)

    @classmethod
    def load(cls, source: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> WhisperTeacher:
        """Any Whisper by folder or hub id, through transformers; a folder is never looked up elsewhere.

        Weights are read from safetensors only and no code of the model's folder is run. Raises TrainingError
        when transformers is missing or the model cannot be loaded.
        """
        transformers = library("transformers")
        local = Path(source).is_dir()
        try:
            model = transformers.WhisperForConditionalGeneration.from_pretrained(
                source, use_safetensors=True, dtype=dtype, local_files_only=local
            )
            tokenizer = transformers.WhisperTokenizer.from_pretrained(source, local_files_only=local)
            features = transformers.WhisperFeatureExtractor.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise TrainingError(
                f"{source} cannot be loaded as a Whisper ({why}); name the folder or hub id of a Whisper "
                "with config.json, tokenizer and model.safetensors."
            ) from None
        return cls(model.to(torch.device(device)), tokenizer, features, source)

    @property
    def width(self) -> int:
        """Channels of its hidden states."""
        return int(self._model.config.d_model)

    @property
    def encoder(self) -> nn.Module:
        """Whisper's encoder."""
        encoder: nn.Module = self._model.model.encoder
        return encoder

    @torch.no_grad()
    def targets(
        self,
        waveforms: Tensor,
        rate: int,
        lengths: Tensor,
        transcripts: Sequence[str | None],
        languages: Sequence[str | None] | None = None,
    ) -> DistillTargets:
        """What `states` gives, in the codec's frames. Raises TrainingError also for a rate that does not
        divide into frames."""
        _samples_per_frame(rate)  # before the states, which take long
        states = self.states(waveforms, rate, lengths, transcripts, languages)
        found = [targets_of_crop(one, 0, int(n), rate) for one, n in zip(states, lengths, strict=True)]
        return DistillTargets([hidden for hidden, _ in found], [alignment for _, alignment in found])

    @torch.no_grad()
    def states(
        self,
        waveforms: Tensor,
        rate: int,
        lengths: Tensor,
        transcripts: Sequence[str | None],
        languages: Sequence[str | None] | None = None,
    ) -> list[TokenStates]:
        """States of clips `waveforms` `[batch, samples]` at `rate` Hz, of `lengths` `[batch]` samples each.

        `transcripts` are the words of exactly these clips; one in capitals only (LibriSpeech's) is taken in
        small letters, as Whisper never writes so, and what exceeds Whisper's 448 tokens is left out. None:
        the teacher writes its own (greedy). `languages` are codes like "en" for a multilingual Whisper, which
        finds out where it is None. Each clip's states are those it has alone, on the model's device.
        Raises TrainingError for clips over 30 s or an unknown language.
        """
        sizes = [int(n) for n in lengths]
        if max(sizes) > LONGEST * rate:
            raise TrainingError(
                f"A clip of {max(sizes) / rate:.1f} s cannot be distilled: Whisper takes {LONGEST} s at "
                "once; cut clips shorter, or train without distillation."
            )
        device = self._model.device
        with torch.autocast(device.type, enabled=False):
            features = self._mels(waveforms, rate, sizes)
            encoded = self._model.model.encoder(features)
            prompts = self._prompts(encoded, languages or [None] * len(sizes))
            tokens = self._tokens(features, sizes, rate, transcripts, prompts)
            # The last token is predicted, never fed.
            fed = [[*prompt, *t[:-1]] for prompt, t in zip(prompts, tokens, strict=True)]
            ids = torch.full((len(fed), max(map(len, fed))), self._tokenizer.eos_token_id)
            for row, item in zip(ids, fed, strict=True):
                row[: len(item)] = torch.tensor(item)
            states, attention = self._decode(ids.to(device), encoded.last_hidden_state)
        found = []
        for i, (prompt, t) in enumerate(zip(prompts, tokens, strict=True)):
            own = slice(len(prompt) - 1, len(prompt) - 1 + len(t))  # each position predicts the next token
            positions = -(-sizes[i] * _POSITIONS // rate)
            found.append(TokenStates(states[i, own], attention[i, own, :positions]))
        return found

    @torch.no_grad()
    def encode(self, waveforms: Tensor, rate: int, lengths: Tensor) -> Tensor:
        """The encoder's states `[batch, 1500, width]` of clips as `states` takes them, 50 a second.

        What a clip lacks of 30 s is silence.
        """
        features = self._mels(waveforms, rate, [int(n) for n in lengths])
        found: Tensor = self._model.model.encoder(features).last_hidden_state
        return found

    def _mels(self, waveforms: Tensor, rate: int, sizes: list[int]) -> Tensor:
        device = self._model.device
        inside = torch.arange(waveforms.shape[1]) < torch.tensor(sizes)[:, None]
        resampler = self._resamplers.setdefault(rate, Resampler(rate, _RATE).to(device))
        resampled = resampler(torch.where(inside.to(device), waveforms.detach().to(device).float(), 0.0))
        clips = [
            row[: min(resampler.length(n), LONGEST * _RATE)]
            for row, n in zip(resampled.cpu().numpy(), sizes, strict=True)
        ]
        found = self._features(clips, sampling_rate=_RATE, return_tensors="pt", device=str(device))
        return found.input_features.to(device, self._model.dtype)

    def _prompts(self, encoded: Any, languages: Sequence[str | None]) -> list[list[int]]:
        """The special tokens before the text: start, language and task (of a multilingual one), no times."""
        generation = self._model.generation_config
        start, silent = generation.decoder_start_token_id, self._special("<|notimestamps|>")
        if not self._languages:
            return [[start, *silent]] * len(languages)
        known: list[int | None] = []
        for language in languages:
            if language is not None and f"<|{language}|>" not in self._languages:
                raise TrainingError(
                    f"This Whisper does not know the language {language!r}; it knows "
                    f"{', '.join(sorted(name.strip('<|>') for name in self._languages))}."
                )
            known.append(None if language is None else self._languages[f"<|{language}|>"])
        if None in known:
            detected = self._model.detect_language(encoder_outputs=encoded).tolist()
            known = [d if k is None else k for k, d in zip(known, detected, strict=True)]
        task = self._special("<|transcribe|>")
        return [[start, language, *task, *silent] for language in known if language is not None]

    def _special(self, name: str) -> list[int]:
        found = self._tokenizer.get_vocab().get(name)
        return [] if found is None else [found]

    def _tokens(
        self,
        features: Tensor,
        sizes: list[int],
        rate: int,
        transcripts: Sequence[str | None],
        prompts: list[list[int]],
    ) -> list[list[int]]:
        """Text tokens of each clip, no special ones: of its transcript, or written by the teacher."""
        room = self._model.config.max_target_positions
        tokens: list[list[int] | None] = []
        for text in transcripts:
            if text is None:
                tokens.append(None)
                continue
            tokens.append(self.text_tokens(text))
        unknown = [i for i, found in enumerate(tokens) if found is None]
        if unknown:
            for i, ids in zip(
                unknown, self._transcribe(features[unknown], [prompts[i] for i in unknown]), strict=True
            ):
                limit = 8 + _TOKENS_A_SECOND * sizes[i] // rate
                tokens[i] = self._words_only(ids)[:limit]
        return [(found or [])[: room - len(prompt)] for found, prompt in zip(tokens, prompts, strict=True)]

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a transcript, no special ones; one in capitals only is taken in small letters."""
        text = text.strip()
        text = text.lower() if text.isupper() else text
        ids = self._tokenizer(f" {text}", add_special_tokens=False).input_ids if text else []
        return self._words_only(ids)

    def _words_only(self, ids: Sequence[int]) -> list[int]:
        # <|endoftext|> is the first special token of every Whisper; languages, tasks and times follow it.
        return [i for i in ids if i < self._tokenizer.eos_token_id]

    def _transcribe(self, features: Tensor, prompts: list[list[int]]) -> list[list[int]]:
        options: dict[str, Any] = {}
        if self._languages:
            names = {number: name for name, number in self._languages.items()}
            options = {"language": [names[prompt[1]] for prompt in prompts], "task": "transcribe"}
        mask = torch.ones(features.shape[0], features.shape[-1], dtype=torch.long, device=features.device)
        ids = self._model.generate(
            features, attention_mask=mask, do_sample=False, num_beams=1, return_timestamps=False, **options
        )
        return ids.tolist()

    def _decode(self, ids: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[batch, tokens, width]` and mean attention `[batch, tokens, positions]`, float32."""
        usual = self._model.config._attn_implementation
        # Only the plain attention shows its weights; the encoder keeps the fast one.
        self._model.set_attn_implementation("eager")
        try:
            out = self._model.model.decoder(
                input_ids=ids, encoder_hidden_states=encoded, use_cache=False, output_attentions=True
            )
        finally:
            self._model.set_attn_implementation(usual)
        chosen = [out.cross_attentions[layer][:, head].float() for layer, head in self._heads]
        return out.last_hidden_state.float(), torch.stack(chosen).mean(0)


class AsrDistillation(nn.Module):
    """L_ASR (see the module) with its learned projection, whose weights belong to the run's state."""

    def __init__(self, semantic_dim: int, whisper_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(semantic_dim, whisper_width, bias=False)

    def forward(self, latents: Tensor, targets: DistillTargets) -> Tensor:
        """Mean of L_ASR over the clips that have words; 0 (with a graph) when none has.

        `latents` `[batch, frames, semantic_dim]` after quantization, straight-through, of which each clip has
        as many as its targets. Computed in float32. Raises TrainingError when there are fewer.
        """
        batch, frames, _ = latents.shape
        sizes = [a.shape[1] for a in targets.alignment]
        if len(sizes) != batch or max(sizes) > frames:
            raise TrainingError(
                f"{batch} clips of {frames} frames do not fit targets of {sizes} frames; make both from the "
                "same clips, cut alike."
            )
        counts = [len(h) for h in targets.hidden]
        alignment = latents.new_zeros(batch, max(counts), frames, dtype=torch.float32)
        hidden = alignment.new_zeros(batch, max(counts), self.projection.out_features)
        for i, (tokens, size) in enumerate(zip(counts, sizes, strict=True)):
            alignment[i, :tokens, :size] = targets.alignment[i]
            hidden[i, :tokens] = targets.hidden[i]
        with torch.autocast(latents.device.type, enabled=False):
            placed = self.projection(alignment @ latents.float())
            cosine = F.cosine_similarity(placed, hidden, dim=-1)  # 0 where both are padding
        worded = torch.tensor(counts, device=latents.device)
        by_clip = torch.where(worded > 0, 1 - cosine.sum(1) / worded.clamp(min=1), 0 * cosine.sum(1))
        return by_clip.sum() / max(sum(count > 0 for count in counts), 1)
