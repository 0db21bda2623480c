"""Checks of what the model says: sound, length, likeness, words, and whether it follows the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revox.checkpoint.voices import Voice
from revox.doctor.findings import NO_RANGE, Figure, Finding, Value, Verdict
from revox.doctor.patient import SENTENCES, Patient
from revox.metrics.errors import MetricError
from revox.metrics.intelligibility import normalize_text
from revox.metrics.likelihood import likelihood
from revox.progress import Progress
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import make_prompt

PACE = (5.0, 30.0)
"""Characters a second; read speech has 10 to 20, and languages and moods differ."""
PITCH_STEP = 6.0
"""Semitones by which a sentence's median pitch may lie off its reference's before it is another voice."""
PROBES = SENTENCES[:4]
PROBE_FRAMES = 100
GRIP = 0.05
"""Least nats a frame by which another text must fit worse. The small lab model, which babbles, has 0.2."""


def speaking(patient: Patient) -> Finding:
    """One sentence by every voice: does it end, at a sensible length, as speech?"""
    name = "speaking"
    rows: list[dict[str, Value]] = []
    good, ended, paced, near = 0, 0, 0, []
    for voice in patient.names:
        speech, figures = patient.spoken(voice), patient.spoken_figures(voice)
        text = patient.sentence_of(voice)
        pace = len(text) / max(speech.audio.seconds, 1e-3)
        in_pace = PACE[0] <= pace <= PACE[1]
        good, ended, paced = good + figures.is_speech, ended + (not speech.audio.truncated), paced + in_pace
        own = patient.decoded_figures(voice).pitch
        step = 12 * np.log2(figures.pitch / own) if figures.pitch > 0 and own > 0 else float("nan")
        if np.isfinite(step):
            near.append(abs(step))
        rows.append(
            {
                "voice": voice,
                "says": text,
                **figures.as_row(),
                "ended": not speech.audio.truncated,
                "characters a second": round(pace, 1),
                "semitones off its reference": round(float(step), 1) if np.isfinite(step) else None,
                "not as speech": ", ".join(figures.faults),
            }
        )
    count = max(1, len(rows))
    figures_ = (
        Figure("sentences that are speech", good / count, "1 (0.8 and more passes)"),
        Figure("that ended by themselves", ended / count, "1 (0.8 and more passes)"),
        Figure(
            f"at {PACE[0]:g} to {PACE[1]:g} characters a second", paced / count, "1 (0.8 and more passes)"
        ),
        Figure(
            "semitones off the reference, median",
            float(np.median(near)) if near else None,
            f"under {PITCH_STEP:g}",
        ),
    )
    worst = min(good, ended, paced) / count
    if worst < 0.5:
        what = [
            text
            for text, n in (
                ("do not sound like speech", good),
                ("do not end by themselves", ended),
                ("are far too short or too long", paced),
            )
            if n / count < 0.5
        ]
        sentence = (
            f"Most sentences {' and '.join(what)}. If the decoded presets are speech, the language model is "
            "at fault, not the codec: see the checks of the text, the tokenizer and the layout."
        )
        return Finding(name, Verdict.FAIL, sentence, figures_, tuple(rows))
    off = bool(near) and float(np.median(near)) > PITCH_STEP
    if worst < 0.8 or off:
        sentence = (
            "Some sentences are not as speech should be, or not in their voice's pitch; listen to them "
            "(--sounds)."
        )
        return Finding(name, Verdict.WARN, sentence, figures_, tuple(rows))
    sentence = "The sentences sound like speech, end by themselves and have a sensible length."
    return Finding(name, Verdict.PASS, sentence, figures_, tuple(rows))


def similarity(patient: Patient) -> Finding:
    """Is a voice's sentence nearer to its own decoded reference than to the others'?"""
    name = "similarity"
    judge = patient.judge
    if isinstance(judge, str):
        return Finding(name, Verdict.SKIPPED, judge)
    if len(patient.names) < 2:
        return Finding(
            name, Verdict.SKIPPED, "One voice cannot be compared with others; examine two or more."
        )
    references = [judge.embed(patient.decoded(voice)) for voice in patient.names]
    rows: list[dict[str, Value]] = []
    own, others, ranks = [], [], []
    for i, voice in enumerate(patient.names):
        patient.say(f"{voice}: likeness")
        spoken = judge.embed(patient.spoken(voice).audio)
        scores = [judge.similarity(spoken, reference) for reference in references]
        rest = [score for j, score in enumerate(scores) if j != i]
        own.append(scores[i])
        others.append(float(np.median(rest)))
        ranks.append(judge.rank(spoken, references, i))
        nearest = patient.names[int(np.argmax(scores))]
        rows.append(
            {
                "voice": voice,
                "own reference": round(scores[i], 3),
                "other references, median": round(others[-1], 3),
                "rank": ranks[-1],
                "nearest": nearest,
            }
        )
    margin = float(np.median(np.array(own) - np.array(others)))
    figures = (
        Figure(
            "similarity to the own reference, median", float(np.median(own)), "above 0.75 for clear speech"
        ),
        Figure("to the others', median", float(np.median(others)), NO_RANGE),
        Figure("own above others, median", margin, "above 0.05"),
        Figure("median rank of the own reference", float(np.median(ranks)), f"1 of {len(ranks)}"),
    )
    if margin <= 0:
        sentence = (
            "Sentences are no nearer to their own voice than to others: the voice's rows are not heard."
        )
        return Finding(name, Verdict.FAIL, sentence, figures, tuple(rows))
    if margin < 0.05:
        sentence = "Sentences are hardly nearer to their own voice than to others."
        return Finding(name, Verdict.WARN, sentence, figures, tuple(rows))
    sentence = "Sentences are in their own voices, as the judge (Resemblyzer) hears them."
    return Finding(name, Verdict.PASS, sentence, figures, tuple(rows))


def words(patient: Patient) -> Finding:
    """Does a recognizer hear the right words?

    pocketsphinx picks one of the sentences, Whisper writes freely.
    """
    name = "words"
    kind, _, model = patient.recognizer.partition(":")
    if kind == "none":
        sentence = "No recognizer was given; --recognizer pocketsphinx or whisper:MODEL hears the words."
        return Finding(name, Verdict.SKIPPED, sentence)
    if kind == "pocketsphinx":
        return _chosen_sentences(patient)
    return _written_words(patient, model)


def _chosen_sentences(patient: Patient) -> Finding:
    from revox.metrics.intelligibility import PocketsphinxRecognizer

    spoken = [normalize_text(text) for text in SENTENCES]
    grammar = f"#JSGF V1.0;\ngrammar doctor;\npublic <said> = {' | '.join(spoken)};\n"
    recognizer = PocketsphinxRecognizer(grammar, reject_below=None)
    rows: list[dict[str, Value]] = []
    right = 0
    for voice in patient.names:
        patient.say(f"{voice}: words")
        heard, said = (
            recognizer.transcribe(patient.spoken(voice).audio),
            normalize_text(patient.sentence_of(voice)),
        )
        right += heard == said
        rows.append({"voice": voice, "said": said, "picked": heard})
    share, chance = right / max(1, len(rows)), 1 / len(SENTENCES)
    figures = (
        Figure(f"right sentence picked of {len(SENTENCES)}", share, "above 0.7"),
        Figure("by chance", chance),
    )
    return _words_verdict("words", share, 0.7, 0.3, figures, rows)


def _written_words(patient: Patient, model: str) -> Finding:
    from revox.metrics.intelligibility import word_error_rate
    from revox.metrics.whisper import WhisperRecognizer

    if not model:
        raise MetricError("Whisper needs a model: --recognizer whisper:FOLDER_OR_HUB_ID")
    whisper = WhisperRecognizer(model)
    rows: list[dict[str, Value]] = []
    rates = []
    for voice in patient.names:
        patient.say(f"{voice}: words")
        said, heard = patient.sentence_of(voice), whisper.transcribe(patient.spoken(voice).audio)
        rates.append(word_error_rate(said, heard))
        rows.append({"voice": voice, "said": said, "heard": heard, "word error rate": round(rates[-1], 2)})
    rate = float(np.median(rates))
    figures = (Figure("word error rate, median", rate, "under 0.3"),)
    return _words_verdict("words", 1 - rate, 0.7, 0.3, figures, rows)


def _words_verdict(
    name: str,
    share: float,
    good: float,
    poor: float,
    figures: tuple[Figure, ...],
    rows: list[dict[str, Value]],
) -> Finding:
    if share >= good:
        return Finding(name, Verdict.PASS, "The recognizer hears what was asked for.", figures, tuple(rows))
    if share >= poor:
        sentence = "The recognizer mishears part of the sentences; listen to them (--sounds)."
        return Finding(name, Verdict.WARN, sentence, figures, tuple(rows))
    sentence = (
        "The words are not those asked for. If the sentences sound like speech, the tokenizer is not this "
        "model's (tekken.json) or the model cannot speak English."
    )
    return Finding(name, Verdict.FAIL, sentence, figures, tuple(rows))


@dataclass(frozen=True)
class Grip:
    """How the speech depends on the text, over several sentences (nats a frame).

    `own` is the negative log-likelihood of what the model said given what it was asked to say, `other` given
    another sentence; `respelt` given the same words spelt otherwise. `error` is the standard error of
    `grip`.
    """

    own: float
    other: float
    respelt: float
    error: float
    frames: float
    ended: float

    @property
    def grip(self) -> float:
        """Nats a frame by which another text fits worse."""
        return self.other - self.own

    @property
    def kept(self) -> float:
        """Share of the grip that is left when the text is spelt otherwise; nan without a grip."""
        return 1 - (self.respelt - self.own) / self.grip if self.grip > 0.02 else float("nan")


def text_grip(patient: Patient, texts: tuple[str, ...] = PROBES, frames: int = PROBE_FRAMES) -> Grip:
    """Let two voices say `texts`, then score what they said given each of the texts, teacher-forced."""
    model, prompter = patient.model.model, patient.model.prompter
    own, other, respelt, differences, lengths, ended = [], [], [], [], [], []
    for name in patient.pair():
        voice = patient.voice(name)
        with torch.inference_mode():
            prompts = [make_prompt(model, prompter, text, voice).embeddings for text in texts]
            requests = [Request(prompt, patient.seed, frames) for prompt in prompts]
            spoken = Engine(model).generate_batch(requests, _Frames(patient, name, len(texts)))
            for i, speech in enumerate(spoken):
                codes = speech.codes()
                lengths.append(codes.shape[1])
                ended.append(speech.ended)
                if not codes.shape[1]:
                    continue
                costs = [_cost(patient, prompt, codes, speech.ended) for prompt in prompts]
                rest = [cost for j, cost in enumerate(costs) if j != i]
                own.append(costs[i])
                other.append(float(np.mean(rest)))
                differences.append(other[-1] - own[-1])
                respelt.append(_cost(patient, _respelt(patient, texts[i], voice), codes, speech.ended))
    if not own:
        return Grip(0.0, 0.0, 0.0, 0.0, 0.0, float(np.mean(ended)))
    error = float(np.std(differences) / np.sqrt(len(differences)))
    return Grip(
        float(np.mean(own)), float(np.mean(other)), float(np.mean(respelt)), error,
        float(np.mean(lengths)), float(np.mean(ended)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Frames:
    """Tells the frame that several sentences have come to."""

    patient: Patient
    voice: str
    sentences: int

    def __call__(self, at: Progress) -> None:
        self.patient.say(f"{self.voice}: frame {at.done:g} of {self.sentences} sentences")


def _respelt(patient: Patient, text: str, voice: Voice) -> Tensor:
    spelling = " ".join(word[:1].upper() + word[1:] for word in text.split())
    return make_prompt(patient.model.model, patient.model.prompter, spelling, voice).embeddings


def _cost(patient: Patient, prompt: Tensor, codes: Tensor, ended: bool) -> float:
    """Nats a frame of the semantic codes (and of the end, if it came) after this prompt."""
    semantic = likelihood(patient.model.model, prompt, codes, draws=1).semantic
    return float((semantic if ended else semantic[:-1]).mean())


def follows_text(patient: Patient) -> Finding:
    """Does what is said depend on the text, and is a word in capitals still the same word?"""
    name = "text"
    grip = patient.grip = text_grip(patient)
    figures = (
        Figure("nats a frame, own text", grip.own, NO_RANGE),
        Figure("nats a frame, another text", grip.other, NO_RANGE),
        Figure("another text fits worse by", grip.grip, f"above {GRIP:g}, and above twice its error"),
        Figure("standard error of that", grip.error),
        Figure(
            "kept when respelt with capitals",
            grip.kept,
            "above 0.5" if patient.is_release_sized else NO_RANGE,
        ),
        Figure("frames a sentence, mean", grip.frames),
    )
    if grip.grip < max(GRIP / 2, grip.error):
        sentence = (
            "What is said hardly depends on the text: the language model is at fault (its layout or its "
            "weights), or tekken.json is the wrong tokenizer."
        )
        return Finding(name, Verdict.FAIL, sentence, figures)
    if patient.is_release_sized and np.isfinite(grip.kept) and grip.kept < 0.3:
        sentence = (
            "The speech follows the tokens but not the words: the same words with capitals are other words "
            "to the model. tekken.json is the wrong tokenizer; take the one released with the weights."
        )
        return Finding(name, Verdict.FAIL, sentence, figures)
    if grip.grip < max(GRIP, 2 * grip.error):
        return Finding(name, Verdict.WARN, "What is said depends little on the text.", figures)
    return Finding(name, Verdict.PASS, "What is said depends on the text.", figures)
