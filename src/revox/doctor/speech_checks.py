"""Checks of the model's speech: sound, length, speaker similarity and words."""

from __future__ import annotations

import re

import numpy as np

from revox.doctor.checkpoint_under_test import CHARACTERS_A_SECOND, SENTENCES, CheckpointUnderTest
from revox.doctor.findings import CheckResult, Figure, Value, Verdict
from revox.metrics.intelligibility import (
    PocketsphinxRecognizer,
    Recognizer,
    load_recognizer,
    word_error_rate,
)

PITCH_STEP = 6.0
"""Semitones between a sentence's median pitch and its reference's above which it is another voice."""
MOST = "1 (0.8 and more passes)"


def speaking(subject: CheckpointUnderTest) -> CheckResult:
    """One sentence by every voice: does it end, at a sensible length, as speech?"""
    low, high = CHARACTERS_A_SECOND
    rows: list[dict[str, Value]] = []
    good, ended, timed, steps = 0, 0, 0, []
    for voice in subject.names:
        speech, figures = subject.spoken(voice), subject.spoken_figures(voice)
        text = subject.sentence_of(voice)
        rate = len(text) / max(speech.audio.seconds, 1e-3)
        good += figures.is_speech
        ended += not speech.audio.truncated
        timed += low <= rate <= high
        own = subject.decoded_figures(voice).pitch
        step = 12 * float(np.log2(figures.pitch / own)) if figures.pitch > 0 and own > 0 else None
        if step is not None:
            steps.append(abs(step))
        rows.append(
            {
                "voice": voice,
                "text": text,
                **figures.as_row(),
                "ended": not speech.audio.truncated,
                "characters a second": round(rate, 1),
                "semitones off its reference": None if step is None else round(step, 1),
                "not as speech": ", ".join(figures.faults),
            }
        )
    count = max(1, len(rows))
    off = float(np.median(steps)) if steps else None
    results = (
        Figure("sentences that are speech", good / count, MOST),
        Figure("that ended by themselves", ended / count, MOST),
        Figure(f"at {low:g} to {high:g} characters a second", timed / count, MOST),
        Figure("semitones off the reference, median", off, f"under {PITCH_STEP:g}"),
    )
    worst = min(good, ended, timed) / count
    if worst < 0.5:
        problems = {"do not sound like speech": good, "do not end by themselves": ended}
        problems["are far too short or too long"] = timed
        what = " and ".join(text for text, number in problems.items() if number / count < 0.5)
        verdict = Verdict.FAIL
        sentence = (
            f"Most sentences {what}. If the decoded presets are speech, the language model is at fault, not "
            "the codec: see the checks of the text, the tokenizer and the layout."
        )
    elif worst < 0.8 or (off is not None and off > PITCH_STEP):
        verdict = Verdict.WARN
        sentence = (
            "Some sentences are unlike speech or have another voice's pitch; listen to them (--sounds)."
        )
    else:
        verdict = Verdict.PASS
        sentence = "The sentences sound like speech, end by themselves and have a sensible length."
    return CheckResult(verdict, sentence, results, rows)


def similarity(subject: CheckpointUnderTest) -> CheckResult:
    """Is a voice's sentence nearer to its own decoded reference than to the others'?"""
    verifier = subject.verifier
    if isinstance(verifier, str):
        return CheckResult(Verdict.SKIPPED, verifier)
    if len(subject.names) < 2:
        return CheckResult(Verdict.SKIPPED, "One voice cannot be compared with others; examine two or more.")
    references = [verifier.embed(subject.decoded(voice)) for voice in subject.names]
    rows: list[dict[str, Value]] = []
    own, others, ranks = [], [], []
    for i, voice in enumerate(subject.names):
        subject.update(f"{voice}: similarity")
        spoken = verifier.embed(subject.spoken(voice).audio)
        scores = [verifier.similarity(spoken, reference) for reference in references]
        own.append(scores[i])
        others.append(float(np.median(scores[:i] + scores[i + 1 :])))
        ranks.append(1 + sum(score > scores[i] for score in scores))
        rows.append(
            {
                "voice": voice,
                "own reference": round(scores[i], 3),
                "other references, median": round(others[-1], 3),
                "rank": ranks[-1],
                "nearest": subject.names[int(np.argmax(scores))],
            }
        )
    margin = float(np.median(np.array(own) - np.array(others)))
    figures = (
        Figure(
            "similarity to the own reference, median", float(np.median(own)), "above 0.75 for clear speech"
        ),
        Figure("to the others', median", float(np.median(others))),
        Figure("own above others, median", margin, "above 0.05"),
        Figure("median rank of the own reference", float(np.median(ranks)), f"1 of {len(ranks)}"),
    )
    if margin <= 0:
        verdict = Verdict.FAIL
        sentence = "Sentences are no nearer to their own voice than to others: the embedding has no effect."
    elif margin < 0.05:
        verdict, sentence = Verdict.WARN, "Sentences are hardly nearer to their own voice than to others."
    else:
        verdict, sentence = Verdict.PASS, "Sentences are in their own voices, by Resemblyzer's measure."
    return CheckResult(verdict, sentence, figures, rows)


def words(subject: CheckpointUnderTest) -> CheckResult:
    """Are the words right? pocketsphinx picks one of the sentences, Whisper transcribes freely."""
    recognizer = subject.recognizer
    if recognizer is None:
        return CheckResult(
            Verdict.SKIPPED,
            "No recognizer was given; use --recognizer whisper:MODEL or pocketsphinx to check the words.",
        )
    picks = isinstance(recognizer, PocketsphinxRecognizer)
    rows: list[dict[str, Value]] = []
    errors = []
    for voice in subject.names:
        subject.update(f"{voice}: words")
        text, transcript = subject.sentence_of(voice), recognizer.transcribe(subject.spoken(voice).audio)
        if picks:
            errors.append(float(transcript != _plain_words(text)))
            rows.append({"voice": voice, "text": text, "picked": transcript})
        else:
            errors.append(word_error_rate(text, transcript))
            row = {"voice": voice, "text": text, "transcript": transcript}
            rows.append({**row, "word error rate": round(errors[-1], 2)})
    if picks:
        share = 1 - float(np.mean(errors))
        figures = [
            Figure(f"right sentence picked of {len(SENTENCES)}", share, "above 0.7"),
            Figure("by chance", 1 / len(SENTENCES)),
        ]
    else:
        share = 1 - float(np.median(errors))
        figures = [Figure("word error rate, median", 1 - share, "under 0.3")]
    if share >= 0.7:
        verdict, sentence = Verdict.PASS, "The recognizer finds the right words."
    elif share >= 0.3:
        verdict = Verdict.WARN
        sentence = "The recognizer misses part of the words; listen to the sentences (--sounds)."
    else:
        verdict = Verdict.FAIL
        sentence = (
            "The words are wrong. If the sentences sound like speech, the tokenizer is not this model's "
            "(tekken.json) or the model cannot speak English."
        )
    return CheckResult(verdict, sentence, figures, rows)


def find_recognizer(name: str, device: str = "cpu") -> Recognizer | None:
    """As `load_recognizer`; pocketsphinx gets a grammar of the sentences. Raises MetricError."""
    if name != "pocketsphinx":
        return load_recognizer(name, device=device)
    sentences = " | ".join(map(_plain_words, SENTENCES))
    grammar = f"#JSGF V1.0;\ngrammar doctor;\npublic <sentence> = {sentences};\n"
    return PocketsphinxRecognizer(grammar, reject=False)


def _plain_words(sentence: str) -> str:
    return re.sub(r"[^a-z' ]", "", sentence.lower())
