"""Scores of a way to find codes, compared with the reference encoder. For scoring only."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.data import KINDS, RATE, SpeechSet
from lab.errors import LabError
from lab.recover_arms import Arm
from lab.sentences import jsgf, sentences
from lab.sources import SPEECH
from lab.speech.plan import read_plan
from revox.api import load
from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.voices import Voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.student import STUDENT_FILE, StudentEncoder, load_student
from revox.evaluation.reference_encoder import original_codec
from revox.evaluation.subject import random_codes
from revox.evaluation.tables import rank
from revox.losses.spectral import mel_distance, multi_resolution_stft_loss
from revox.metrics.codes import embedding_cosine, score_codes
from revox.metrics.intelligibility import PocketsphinxRecognizer, Recognizer, word_errors
from revox.metrics.likelihood import likelihood
from revox.metrics.speaker import SpeakerVerifier
from revox.metrics.whisper import WhisperRecognizer
from revox.model.codec import Codec
from revox.speech import Audio
from revox.synthesis.prompt import make_prompt
from revox.training.initial import transpose_decoder

TEXTS = tuple(islice(sentences("heldout", 5), 3))
"""Spoken in every cloned voice: sentences of the domain that training does not use."""

PAUSE = 0.2  # seconds between the texts of a clip


@dataclass(frozen=True)
class HeldOutClip:
    """A clip `samples` `[n]` of a held-out speaker, whole frames at 24 kHz; `text` if it is known."""

    kind: str
    speaker: str
    samples: Tensor
    text: str | None


def held_out_clips(data: Path, kind: str, seconds: float, frame: int) -> list[HeldOutClip]:
    """One clip of every held-out speaker: the longest utterance, of a human the longest of at most `seconds`.

    So its words are known. Where a human has none so short, the longest is cut, and its words are not. A
    synthetic one is a sentence of the lab's grammar if the speaker has one. Only the held-out split is read.
    """
    speech = SpeechSet(data, "heldout", kind)
    grammar = {item.written for item in read_plan(SPEECH / "plan.tsv") if item.kind == "plan"}
    found = []
    for speaker in speech.speakers:
        mine = [i for i in speech.of(speaker) if speech.utterances[i].preset is None]
        if not mine:  # a preset's own speaker: known to the model
            continue
        mine = [i for i in mine if speech.utterances[i].text in grammar] or mine
        if kind == "human":
            mine = [i for i in mine if speech.utterances[i].samples <= round(seconds * RATE)] or mine
        longest = max(mine, key=lambda i: speech.utterances[i].samples)
        samples, text = speech.waveform(longest), speech.utterances[longest].text
        if kind == "human" and len(samples) > round(seconds * RATE):
            samples, text = samples[: round(seconds * RATE)], None
        whole = len(samples) // frame * frame
        found.append(HeldOutClip(kind, speaker, torch.from_numpy(samples[:whole].copy()), text))
    return found


def evenly(count: int, of: int) -> list[int]:
    """`count` evenly spaced indices of a list of length `of`."""
    count = min(count, of)
    return [i * of // count for i in range(count)]


class Scoring:
    """The checkpoint, its reference encoder, the models that score, and the held-out clips.

    Without a `whisper` to recognize words, those of humans, which the lab's grammar lacks, are not known.
    """

    def __init__(
        self, checkpoint: Path, encoder: Path, data: Path, seconds: float, whisper: Path | None = None
    ) -> None:
        self.whisper = whisper
        self.checkpoint, self.encoder = checkpoint, encoder
        self.original = original_codec(checkpoint, encoder)
        self.tts = load(checkpoint, device="cpu", dtype=torch.float32)
        self.coder = Coder(self.original, self.tts.coder.preset_codes)
        rows = [self._rows(codes) for codes in self.coder.preset_codes()]
        self.mean_row = torch.cat(rows).mean(dim=0)
        self.verifier = SpeakerVerifier()
        frame = self.original.samples_per_frame
        self.clips = {kind: held_out_clips(data, kind, seconds, frame) for kind in KINDS}
        if whisper is None:
            self.clips["human"] = [replace(clip, text=None) for clip in self.clips["human"]]
        self._truth: dict[tuple[str, int], Tensor] = {}
        self._voices: dict[str, np.ndarray] = {}

    @cached_property
    def recognizer(self) -> Recognizer:
        """The Whisper, or pocketsphinx with the lab's grammar, rejection on."""
        return (
            PocketsphinxRecognizer(jsgf()) if self.whisper is None else WhisperRecognizer(str(self.whisper))
        )

    def _rows(self, codes: Tensor) -> Tensor:
        """The voice embedding `[frames, dim]`, without the end frame."""
        return self.tts.model.mm_audio_embeddings.voice_embedding(codes)[:-1].float()

    def truth(self, kind: str, i: int) -> Tensor:
        """The reference encoder's codes `[37, frames]` of a clip, as served."""
        if (kind, i) not in self._truth:
            samples = self.clips[kind][i].samples
            self._truth[kind, i] = find_codes(self.coder, samples, CodingSettings("encoder")).codes
        return self._truth[kind, i]

    def voices(self, kind: str) -> np.ndarray:
        """The speaker embeddings `[clips, 256]` of all clips of a kind."""
        if kind not in self._voices:
            audio = (Audio(clip.samples.numpy(), RATE) for clip in self.clips[kind])
            self._voices[kind] = np.stack([self.verifier.embed(one) for one in audio])
        return self._voices[kind]

    def restored(self, made: Path) -> Coder:
        """The coder of a restored encoder, or of a student."""
        if made.name == STUDENT_FILE:
            student = load_student(made, decoder_sha256(self.checkpoint), self.original)
            if student is None:
                raise LabError(f"{made} is damaged: delete its folder, and the same command trains it again")
            return self._coder(self.original, student)
        return self._coder(original_codec(self.checkpoint, made))

    def transposed(self) -> Coder:
        """The coder of the decoder's weights transposed."""
        codec = original_codec(self.checkpoint, self.encoder)
        transpose_decoder(codec)
        return self._coder(codec)

    def _coder(self, codec: Codec, student: StudentEncoder | None = None) -> Coder:
        model = self.tts.model, self.tts.prompter
        return Coder(codec, self.coder.preset_codes, lambda: model, student=lambda codec: student)

    def codes(self, arm: Arm, kind: str, i: int, seed: int, restored: Coder | None = None) -> Tensor:
        """The codes `[37, frames]` that an arm finds for a clip, with its `restored` encoder if any."""
        target, transcript = self.clips[kind][i].samples, None
        if arm.by == "ceiling":
            target = self.coder.decode(self.truth(kind, i))[: len(target)]
        if arm.by == "random":
            return random_codes(
                self.original, len(target) // self.original.samples_per_frame, 1000 * seed + i
            )
        if arm.by == "inversion":
            settings = CodingSettings("inversion", steps=arm.steps, seed=seed)
        else:
            refine = (arm.steps or 0) if arm.by == "refinement" else 0
            method = "encoder" if restored is None or restored.student is None else "student"
            settings = CodingSettings(method, refine=refine, seed=seed, beam=arm.beam)
            transcript = self.clips[kind][i].text if arm.beam else None
        coder = self.coder if arm.by in ("original", "ceiling", "inversion") else restored
        assert coder is not None
        found = find_codes(coder, target, settings, transcript=transcript)
        if found.stopped:  # by Ctrl-C: a search that was not finished is not a measurement
            raise KeyboardInterrupt
        return found.codes

    def score(
        self, arm: Arm, kind: str, i: int, seed: int, restored: Coder | None = None, whole: bool = True
    ) -> dict[str, Any]:
        """All scores of one clip; without `whole`, only those of the codes and their decoded audio."""
        clip, began = self.clips[kind][i], time.process_time()
        codes = self.codes(arm, kind, i, seed, restored)
        found: dict[str, Any] = {"coding_seconds": round(time.process_time() - began, 3)}
        found |= self._code_scores(kind, i, codes) | self._sound_scores(kind, i, codes, whole)
        if whole:
            found |= self._cloning_scores(kind, i, codes, seed)
            if clip.text is not None:
                found["clip_nll"] = self._nll(clip.text, codes, codes)[0]
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}

    def _code_scores(self, kind: str, i: int, codes: Tensor) -> dict[str, Any]:
        truth = self.truth(kind, i)
        other = self.truth(kind, (i + 1) % len(self.clips[kind]))
        return {
            **score_codes(codes, truth),
            "row_cosine": embedding_cosine(self._rows(codes), self._rows(truth), self.mean_row),
            "row_cosine_others": embedding_cosine(self._rows(truth), self._rows(other), self.mean_row),
            "semantic": codes[0].tolist(),
        }

    @torch.no_grad()
    def _sound_scores(self, kind: str, i: int, codes: Tensor, whole: bool) -> dict[str, Any]:
        clip = self.clips[kind][i]
        decoded = self.original.decode(codes[None])[0][: len(clip.samples)]
        audio = Audio(decoded.numpy(), RATE)
        found: dict[str, Any] = {
            "mel": mel_distance(decoded, clip.samples, RATE),
            "stft": float(multi_resolution_stft_loss(decoded, clip.samples, RATE)),
            **self._likeness(kind, i, audio),
        }
        if whole and clip.text is not None:
            found["transcript"] = self.recognizer.transcribe(audio)
            found["word_errors"], found["words"] = word_errors(clip.text, found["transcript"])
        return found

    def _likeness(self, kind: str, i: int, audio: Audio) -> dict[str, Any]:
        voices = self.voices(kind)
        embedding = self.verifier.embed(audio)
        place = rank(embedding, voices, [clip.speaker for clip in self.clips[kind]], i)
        return {"similarity": float(voices[i] @ embedding), "rank": place}

    def _nll(self, text: str, voice: Tensor, codes: Tensor) -> tuple[float, float]:
        """Nats a frame and flow-matching error of `codes` as `text` in the voice of other codes."""
        tts = self.tts
        prompt = make_prompt(tts.model, tts.prompter, text, self._voice(voice)).embeddings
        found = likelihood(tts.model, prompt, codes)
        return float(found.semantic_nll), float(found.flow_error)

    def _voice(self, codes: Tensor) -> Voice:
        embedding = self.tts.model.mm_audio_embeddings.voice_embedding(codes)
        return Voice(name="clone", codes=codes, embedding=embedding, provenance={})

    def _cloning_scores(self, kind: str, i: int, codes: Tensor, seed: int) -> dict[str, Any]:
        voice = self._voice(codes)
        pieces: list[np.ndarray] = []
        wrong = count = missing = 0
        likelihoods = []
        for text in TEXTS:
            spoken = self.tts.synthesize(text, voice, seed=seed, max_seconds=3 + len(text) / 5)
            pieces += [spoken.audio.samples, np.zeros(round(PAUSE * RATE), np.float32)]
            missing += spoken.audio.truncated
            of_text = word_errors(text, self.recognizer.transcribe(spoken.audio))
            wrong, count = wrong + of_text[0], count + of_text[1]
            if spoken.codes.shape[1]:
                likelihoods.append(self._nll(text, codes, spoken.codes))
        audio = Audio(np.concatenate(pieces), RATE)
        # Under half a second of speech, there is no voice to compare.
        silent = sum(len(piece) for piece in pieces[::2]) < 0.5 * RATE
        likeness = {"similarity": 0.0, "rank": len(self.clips[kind])}
        found: dict[str, Any] = {} if silent else self._likeness(kind, i, audio)
        nll = np.mean(likelihoods, axis=0) if likelihoods else None
        return {
            **{f"cloned_{name}": value for name, value in (likeness | found).items()},
            "cloned_word_errors": wrong,
            "cloned_words": count,
            "cloned_missing": missing / len(TEXTS),
            "cloned_nll": None if nll is None else float(nll[0]),
            "cloned_flow": None if nll is None else float(nll[1]),
        }


def data_identity(data: Path, splits: Sequence[str] = ("train", "heldout")) -> dict[str, str]:
    """The speech in a folder: the checksummed names of its sets."""
    found = {}
    for kind in KINDS:
        for split in splits:
            index = data / f"{kind}-{split}.json"
            if index.is_file():
                found[index.stem] = json.loads(index.read_text())["samples"]
    return found
