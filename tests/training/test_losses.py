"""Losses of training against hand-computed values."""

import math

import numpy as np
import torch

from revox.losses.discriminator import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from revox.training.objective import SpectralObjective

RESOLUTIONS = ((512, 40), (256, 20))


def test_a_waveform_has_no_distance_to_itself():
    objective = SpectralObjective(16000, RESOLUTIONS)
    spectra = objective.spectra(torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)))
    terms = objective(spectra, spectra)
    assert terms.mel == 0
    assert terms.magnitude == 0
    assert terms.complex == 0


def test_ten_decibels_quieter_is_half_a_decade_of_mel():
    objective = SpectralObjective(16000, RESOLUTIONS, floor=1e-12)
    loud = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    terms = objective(objective.spectra(loud), objective.spectra(loud * 10**-0.5))
    assert math.isclose(float(terms.mel), 0.5, rel_tol=1e-4)
    # ||a - sqrt(0.1) a|| / ||a||, phase or no phase
    assert math.isclose(float(terms.complex), 1 - 10**-0.5, rel_tol=1e-4)


def test_an_opposite_phase_is_heard_by_the_complex_term_alone():
    objective = SpectralObjective(16000, RESOLUTIONS)
    spectra = objective.spectra(torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)))
    terms = objective(spectra, [-s for s in spectra])
    assert terms.mel == 0
    assert math.isclose(float(terms.complex), 2.0, rel_tol=1e-5)


def test_what_lies_below_the_floor_costs_nothing():
    objective = SpectralObjective(16000, RESOLUTIONS)
    silence, hiss = torch.zeros(1, 8000), 1e-6 * torch.ones(1, 8000).cumsum(1).cos()
    assert float(objective(objective.spectra(silence), objective.spectra(hiss)).mel) == 0


def test_discriminator_losses_equal_their_formulas_on_given_scores_and_features():
    real = [(torch.tensor([2.0, 0.5]), [torch.tensor([[1.0, -3.0], [2.0, 2.0]])])]
    fake = [(torch.tensor([-0.5, 1.0]), [torch.tensor([[2.0, -1.0], [2.0, 1.0]])])]
    assert float(discriminator_loss(real, fake)) == np.mean([0, 0.5]) + np.mean([0.5, 2.0])
    assert float(adversarial_loss(fake)) == -0.25
    assert float(feature_matching_loss(real, fake)) == np.mean([1.5 / 2.0, 0.5 / 2.0])


def test_a_discriminator_reads_each_resolution_and_its_gradient_reaches_the_waveform():
    objective = SpectralObjective(16000, RESOLUTIONS)
    judges = Discriminators(2, channels=2)
    wave = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    judged = judges(objective.spectra(wave))
    assert len(judged) == 2
    adversarial_loss(judged).backward()
    assert torch.isfinite(wave.grad).all()
    assert float(wave.grad.abs().sum()) > 0
