"""The acoustic transformer is the published one: velocity, frames for given noise, end frames, masking."""

from __future__ import annotations

import pytest
import torch
from oracle import noise_injected, oracle_velocity, relative_error
from subject import Pair, noise_of

TOLERANCE = 1e-5


def their_frame(pair: Pair, hidden: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    with noise_injected(pair.oracle, noise):
        return pair.their_acoustic(hidden, alpha)


@pytest.mark.parametrize("time", [0.0, 1 / 7, 0.5, 6 / 7, 1.0])
def test_velocity_is_the_oracles_at_any_time(small: Pair, time: float):
    x, hidden = noise_of(1, 5, 36), noise_of(2, 5, small.config.acoustic.input_dim)
    times = torch.full((5,), time)
    ours = small.acoustic.velocity(x, times, hidden)
    assert relative_error(ours, oracle_velocity(small.their_acoustic, x, times, hidden)) < TOLERANCE


def test_velocity_takes_each_item_at_its_own_time(small: Pair):
    x, hidden = noise_of(3, 4, 36), noise_of(4, 4, small.config.acoustic.input_dim)
    times = torch.tensor([0.0, 0.2, 0.7, 0.9])
    ours = small.acoustic.velocity(x, times, hidden)
    assert relative_error(ours, oracle_velocity(small.their_acoustic, x, times, hidden)) < TOLERANCE
    alone = torch.cat(
        [small.acoustic.velocity(x[i, None], times[i, None], hidden[i, None]) for i in range(4)]
    )
    assert relative_error(ours, alone) < TOLERANCE


def test_velocity_without_a_condition_is_that_of_a_zero_hidden_state(small: Pair):
    x, zero = noise_of(3, 2, 36), torch.zeros(2, small.config.acoustic.input_dim)
    times = torch.tensor([0.1, 0.4])
    ours = small.acoustic.velocity(x, times, zero)
    assert relative_error(ours, oracle_velocity(small.their_acoustic, x, times, zero)) < TOLERANCE


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2, 2.5])
def test_a_frame_for_given_noise_is_the_oracles(small: Pair, alpha: float):
    hidden, noise = noise_of(5, 24, small.config.acoustic.input_dim), noise_of(6, 24, 36)
    theirs = their_frame(small, hidden, noise, torch.full((24,), alpha))
    ours = small.acoustic.frame(hidden, noise, cfg_alpha=alpha)
    assert_same_frames(small, hidden, noise, alpha, ours, theirs)
    assert theirs[:, 1:].unique().numel() > 15, "the sample exercises many levels"


def test_each_item_of_a_batch_may_have_its_own_guidance(small: Pair):
    hidden, noise = noise_of(7, 4, small.config.acoustic.input_dim), noise_of(8, 4, 36)
    alpha = torch.tensor([1.0, 1.2, 1.7, 0.5])
    theirs = their_frame(small, hidden, noise, alpha)
    ours = small.acoustic.frame(hidden, noise, cfg_alpha=alpha)
    assert_same_frames(small, hidden, noise, alpha, ours, theirs)


def test_a_frame_alone_is_the_frame_in_its_batch(small: Pair):
    hidden, noise = noise_of(9, 6, small.config.acoustic.input_dim), noise_of(10, 6, 36)
    together = small.acoustic.frame(hidden, noise)
    alone = torch.cat([small.acoustic.frame(hidden[i, None], noise[i, None]) for i in range(6)])
    assert_same_frames(small, hidden, noise, 1.2, together, alone)


def test_an_end_frame_carries_acoustic_ids_2(small: Pair):
    hidden, noise = noise_of(11, 2, small.config.acoustic.input_dim), noise_of(12, 2, 36)
    # A hidden state along the end row of the semantic head, long enough to win.
    end_row = small.acoustic.semantic_codebook_output.weight[1]
    hidden[1] = 100 * end_row
    theirs = their_frame(small, hidden, noise, torch.full((2,), 1.2))
    ours = small.acoustic.frame(hidden, noise)
    assert ours[1].tolist() == [1] + [2] * 36
    assert ours[0, 0] != 1
    assert_same_frames(small, hidden, noise, 1.2, ours, theirs)


def test_empty_audio_and_padding_rows_are_never_chosen(small: Pair):
    rows = small.config.codebook_rows[0]
    weight = small.acoustic.semantic_codebook_output.weight
    assert (rows, weight.shape[0]) == (514, 640)
    hidden = torch.stack([100 * weight[i] for i in (0, rows, rows + 5, weight.shape[0] - 1, rows - 1, 2)])
    noise = noise_of(13, len(hidden), 36)
    logits = small.acoustic.semantic_logits(hidden)
    forbidden = [0, *range(rows, weight.shape[0])]
    assert (logits[:, forbidden] == float("-inf")).all()
    assert logits[:, 1:rows].isfinite().all()
    theirs = their_frame(small, hidden, noise, torch.full((len(hidden),), 1.2))
    ours = small.acoustic.frame(hidden, noise)
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert ours[4:, 0].tolist() == [rows - 1, 2]


def test_semantic_logits_are_the_oracles(small: Pair):
    hidden = noise_of(14, 8, small.config.acoustic.input_dim)
    rows = small.config.codebook_rows[0]
    theirs = small.their_acoustic.semantic_codebook_output(hidden)
    assert relative_error(small.acoustic.semantic_logits(hidden)[:, 1:rows], theirs[:, 1:rows]) < TOLERANCE


def assert_same_frames(pair: Pair, hidden, noise, alpha, ours, theirs) -> None:
    """Ids equal but where the logits or the value to be rounded are within 1e-5 of a tie."""
    logits = pair.acoustic.semantic_logits(hidden)
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    tie = (best - second) <= 1e-5 * best.abs()
    assert ((ours[:, 0] == theirs[:, 0]) | tie).all()
    scaled = (pair.acoustic.flow(hidden, noise, alpha).clamp(-1, 1) + 1) / 2 * 20
    near_half = (scaled - scaled.floor() - 0.5).abs() <= 2e-4
    same = ours[:, 1:] == theirs[:, 1:]
    assert (same | near_half).all()
    assert same.float().mean() > 0.999
