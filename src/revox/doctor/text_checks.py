"""Does the speech depend on its text?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revox.checkpoint.voices import Voice
from revox.doctor.checkpoint_under_test import SENTENCES, CheckpointUnderTest
from revox.doctor.findings import CheckResult, Figure, TextDependence, Verdict
from revox.metrics.likelihood import likelihood
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import make_prompt

PROBES, QUICK_PROBES = SENTENCES[:4], 2
PROBE_FRAMES = 100
LEAST_DEPENDENCE = 0.05
"""Least nats a frame by which another text must fit worse. The small lab model, which babbles, has 0.2."""


def text_dependence(subject: CheckpointUnderTest) -> TextDependence:
    """Two voices speak `PROBES`, or some; then their speech is scored given each of the texts,
    teacher-forced."""
    model = subject.model.model
    texts = PROBES[:QUICK_PROBES] if subject.quick else PROBES
    own, other, lengths = [], [], []
    for name in subject.pair():
        voice = subject.voice(name)
        subject.update(f"{name}: {len(texts)} sentences")
        with torch.inference_mode():
            prompts = [_prompt(subject, text, voice) for text in texts]
            requests = [Request(prompt, subject.seed, PROBE_FRAMES) for prompt in prompts]
            for i, speech in enumerate(Engine(model).generate_batch(requests)):
                codes = speech.codes()
                lengths.append(codes.shape[1])
                if not codes.shape[1]:
                    continue
                subject.update(f"{name}: sentence {i + 1} of {len(texts)} as if it were each of them")
                costs = [_cost(subject, prompt, codes, speech.ended) for prompt in prompts]
                own.append(costs.pop(i))
                other.append(float(np.mean(costs)))
    if not own:
        return TextDependence(0.0, 0.0, 0.0, 0.0)
    error = float(np.std(np.array(other) - np.array(own)) / np.sqrt(len(own)))
    return TextDependence(float(np.mean(own)), float(np.mean(other)), error, float(np.mean(lengths)))


def _prompt(subject: CheckpointUnderTest, text: str, voice: Voice) -> Tensor:
    return make_prompt(subject.model.model, subject.model.prompter, text, voice).embeddings


def _cost(subject: CheckpointUnderTest, prompt: Tensor, codes: Tensor, ended: bool) -> float:
    """Nats a frame of the semantic codes (and of the end, if it came) after this prompt."""
    semantic = likelihood(subject.model.model, prompt, codes, draws=0).semantic
    return float((semantic if ended else semantic[:-1]).mean())


def follows_text(subject: CheckpointUnderTest) -> CheckResult:
    """Does the speech depend on the text?"""
    found = subject.text_dependence = text_dependence(subject)
    expected = f"above {LEAST_DEPENDENCE:g}, and above twice its error"
    figures = (
        Figure("nats a frame, own text", found.own),
        Figure("nats a frame, another text", found.other),
        Figure("another text fits worse by", found.difference, expected),
        Figure("standard error of that", found.error),
        Figure("frames a sentence, mean", found.frames),
    )
    if found.difference < max(LEAST_DEPENDENCE / 2, found.error):
        verdict = Verdict.FAIL
        sentence = (
            "The speech hardly depends on the text: the language model is at fault (its layout or its "
            "weights), or tekken.json is the wrong tokenizer."
        )
    elif found.difference < max(LEAST_DEPENDENCE, 2 * found.error):
        verdict, sentence = Verdict.WARN, "The speech depends little on the text."
    else:
        verdict, sentence = Verdict.PASS, "The speech depends on the text."
    return CheckResult(verdict, sentence, figures)
