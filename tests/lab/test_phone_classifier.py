"""The phone classifier: its labels, its accuracy, and the gradient of its loss."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lab.data import SpeechSet, write_set
from lab.phone_classifier import (
    HOP,
    PhoneClassifier,
    PhoneClassifierTrainer,
    PhoneClassifierTraining,
    phone_labels,
)
from lab.phones import PHONES, phone_index

TONES = {"aa": 300.0, "iy": 900.0, "s": 3000.0}


def test_labels_follow_the_synthesisers_times_and_end_in_a_pause():
    labels = phone_labels([("aa", 0.03), ("axr", 0.05)], 8)
    aa, er = PHONES.index("aa"), PHONES.index("er")
    assert labels.tolist() == [aa, aa, aa, er, er, 0, 0, 0]
    assert PHONES[0] == "pau"
    with pytest.raises(KeyError):
        phone_index("xx")


def _speech(folder: Path) -> SpeechSet:
    """Tones in place of phones: 0.2 s each, in any order."""
    rng = np.random.default_rng(0)
    pieces, index = [], []
    for _ in range(24):
        names = rng.permutation(list(TONES)).tolist() * 2
        time = np.arange(int(0.2 * 24000)) / 24000
        wave = np.concatenate([0.2 * np.sin(2 * np.pi * TONES[n] * time) for n in names])
        pieces.append((wave * 32767).astype(np.int16))
        phones = [(name, 0.2 * (i + 1)) for i, name in enumerate(names)]
        index.append(
            {"speaker": "a", "sex": "F", "preset": None, "text": "x", "samples": len(wave), "phones": phones}
        )
    folder.mkdir()
    write_set(folder, "synthetic-train", iter([(np.concatenate(pieces), index)]))
    return SpeechSet(folder, "train", "synthetic")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PhoneClassifierTrainer:
    folder = tmp_path_factory.mktemp("classifier")
    settings = PhoneClassifierTraining(
        steps=40, batch=6, width=16, warmup=5, decay_steps=20, learning_rate=1e-2
    )
    trainer = PhoneClassifierTrainer(settings, _speech(folder / "data"), folder)
    trainer.run(lambda row: None, report_every=1000, validate_every=1000)
    return trainer


def test_it_classifies_the_phones_it_was_trained_on(trained: PhoneClassifierTrainer):
    waves, labels = trained.batch()
    with torch.no_grad():
        read = trained.classifier(waves)[0][..., : labels.shape[1]].argmax(dim=1)
    assert (read == labels).float().mean() > 0.9


def test_the_difference_is_zero_for_equal_sound_and_larger_for_another_phone_than_another_level(
    trained: PhoneClassifierTrainer,
):
    time = torch.arange(24000) / 24000
    aa, iy = (0.2 * torch.sin(2 * torch.pi * TONES[n] * time)[None] for n in ("aa", "iy"))
    classifier = trained.classifier
    with torch.no_grad():
        same, louder, another = (float(classifier.difference(aa, x)) for x in (aa, 0.8 * aa, iy))
    assert same == pytest.approx(0.0, abs=1e-5)
    assert another > 4 * louder


def test_its_gradient_points_from_one_phone_to_the_other(trained: PhoneClassifierTrainer):
    time = torch.arange(12000) / 24000
    wanted, other = (0.2 * torch.sin(2 * torch.pi * TONES[n] * time)[None] for n in ("aa", "iy"))
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    trained.classifier.difference(wanted, weights[0] * wanted + weights[1] * other).backward()
    assert weights.grad is not None
    assert weights.grad[1] > 0  # less of the other phone reads more like the one wanted


def test_an_interrupted_run_goes_on_exactly(tmp_path: Path):
    speech = _speech(tmp_path / "data")
    settings = PhoneClassifierTraining(
        steps=6, batch=2, width=8, warmup=1, decay_steps=2, save_every=3, seconds=0.3
    )
    whole = PhoneClassifierTrainer(settings, speech, tmp_path / "whole")
    losses = [whole.step()["loss"] for _ in range(6)]
    first = PhoneClassifierTrainer(settings, speech, tmp_path / "parts")
    again = [first.step()["loss"] for _ in range(3)]
    first.save()
    second = PhoneClassifierTrainer(settings, speech, tmp_path / "parts")
    assert second.resume()
    again += [second.step()["loss"] for _ in range(3)]
    assert again == losses


def test_it_reads_every_ten_milliseconds():
    classifier = PhoneClassifier(8)
    logits, states = classifier(torch.zeros(2, 50 * HOP))
    assert logits.shape == (2, len(PHONES), 51)
    assert [s.shape for s in states] == [(2, 8, 51)] * 4
