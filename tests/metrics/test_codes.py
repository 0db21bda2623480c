import pytest
import torch

from revox.metrics.codes import (
    acoustic_exact_share,
    acoustic_level_error,
    codebook_use,
    embedding_cosine,
    perplexity,
    saturated_share,
    score_codes,
    semantic_agreement,
    semantic_variety,
)


def random_codes(frames, seed):
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randint(512, (1, frames), generator=generator)
    return torch.cat([semantic, torch.randint(21, (36, frames), generator=generator)])


def test_equal_codes_score_perfectly():
    codes = random_codes(50, 0)
    scores = score_codes(codes, codes)
    assert scores["semantic_agreement"] == scores["acoustic_exact_share"] == 1.0
    assert scores["acoustic_level_error"] == 0.0


def test_random_codes_score_as_chance_says():
    a, b = random_codes(20000, 0), random_codes(20000, 1)
    assert semantic_agreement(a, b) == pytest.approx(1 / 512, rel=0.5)
    assert acoustic_exact_share(a, b) == pytest.approx(1 / 21, rel=0.02)
    # E|i - j| for two uniform levels of n is (n^2 - 1) / (3 n).
    assert acoustic_level_error(a, b) == pytest.approx((21**2 - 1) / 63, rel=0.01)
    assert saturated_share(a) == pytest.approx(2 / 21, rel=0.02)
    assert perplexity(a) == pytest.approx(512, rel=0.03)


def test_a_known_difference_is_counted():
    a = torch.zeros(37, 10, dtype=torch.int64) + 5
    b = a.clone()
    b[0, :3] = 6
    b[1, :] = 9
    assert semantic_agreement(a, b) == pytest.approx(0.7)
    assert acoustic_exact_share(a, b) == pytest.approx(35 / 36)
    assert acoustic_level_error(a, b) == pytest.approx(4 / 36)
    a[1:19] = 20
    assert saturated_share(a) == pytest.approx(0.5)


def test_the_semantic_codebook_does_not_count_as_acoustic():
    a = torch.full((37, 4), 7)
    a[0] = 20
    assert saturated_share(a) == 0.0


def test_perplexity_of_uneven_use_is_the_exponential_of_entropy():
    codes = torch.zeros(37, 4, dtype=torch.int64)
    codes[0] = torch.tensor([3, 3, 3, 8])
    assert codebook_use(codes) == 2
    assert codebook_use(codes, 5) == 1
    assert perplexity(codes) == pytest.approx(4 / 3**0.75)  # exp(0.75 log(4/3) + 0.25 log 4)


def test_lengths_may_differ_and_the_longer_is_cut():
    codes = random_codes(30, 0)
    assert semantic_agreement(codes, codes[:, :20]) == 1.0


def test_the_mean_row_is_removed_before_the_cosine():
    mean = torch.full((4,), 100.0)
    e = torch.eye(4)
    assert embedding_cosine(e + mean, e + mean, mean) == pytest.approx(1.0, abs=1e-6)
    assert embedding_cosine(e + mean, e.flip(0) + mean, mean) == pytest.approx(0.0, abs=1e-6)
    assert embedding_cosine(e + mean, mean - e, mean) == pytest.approx(-1.0, abs=1e-6)
    assert torch.cosine_similarity(e + mean, mean - e).min() > 0.99
    assert embedding_cosine((e + mean).bfloat16(), torch.cat([e + mean, mean[None]]), mean) <= 1.0


def test_variety_is_the_share_of_different_semantic_codes():
    codes = torch.zeros(37, 4, dtype=torch.long)
    codes[0] = torch.tensor([7, 7, 9, 7])
    assert semantic_variety(codes) == 0.5
