"""Discriminator losses against hand-computed values."""

import numpy as np
import torch

from revox.losses.discriminator import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from revox.losses.stft import stft


def test_discriminator_losses_equal_their_formulas_on_given_scores_and_features():
    real = [(torch.tensor([2.0, 0.5]), [torch.tensor([[1.0, -3.0], [2.0, 2.0]])])]
    fake = [(torch.tensor([-0.5, 1.0]), [torch.tensor([[2.0, -1.0], [2.0, 1.0]])])]
    assert float(discriminator_loss(real, fake)) == np.mean([0, 0.5]) + np.mean([0.5, 2.0])
    assert float(adversarial_loss(fake)) == -0.25
    assert float(feature_matching_loss(real, fake)) == np.mean([1.5 / 2.0, 0.5 / 2.0])


def test_a_discriminator_reads_each_resolution_and_its_gradient_reaches_the_waveform():
    discriminators = Discriminators(2, channels=2)
    wave = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    outputs = discriminators([stft(wave, n, n // 4) for n in (512, 256)])
    assert len(outputs) == 2
    adversarial_loss(outputs).backward()
    assert torch.isfinite(wave.grad).all()
    assert float(wave.grad.abs().sum()) > 0
