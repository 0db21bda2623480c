from __future__ import annotations

import numpy as np
import pytest

from revox.evaluation.tables import Column, candidates, make_row, rank, summarize


def test_a_clip_counts_once_with_the_mean_of_its_seeds():
    clips = [[{"x": 1.0}, {"x": 3.0}], [{"x": 10.0}, {"x": 10.0}], [{"x": 4.0}, {"x": 6.0}]]
    cell = summarize(clips, Column("x", "x"))
    assert cell.value == 5.0  # the median of 2, 10, 5
    assert cell.clips == 3
    assert cell.seed_range == 2.0  # medians 4 and 6 of the first and the second seeds


def test_scores_that_are_not_there_are_left_out():
    clips = [[{"x": None}], [{}], [{"x": 7.0}]]
    assert summarize(clips, Column("x", "x")).clips == 1
    assert summarize(clips[:2], Column("x", "x")) is None
    assert "x" not in make_row("row", "floor", clips[:2], [Column("x", "x")]).cells


def test_error_rates_are_all_errors_over_all_words():
    clips = [[{"e": 1, "w": 2}], [{"e": 1, "w": 8}], [{"w": 5}]]
    cell = summarize(clips, Column("e", "errors", statistic="ratio", per="w"))
    assert cell.value == pytest.approx(20.0)
    assert cell.clips == 2
    assert (cell.low, cell.high) == (pytest.approx(12.5), pytest.approx(50.0))


def test_the_interval_covers_the_median_in_about_95_of_100_draws():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sample = rng.normal(size=31)
        cell = summarize([[{"x": x}] for x in sample], Column("x", "x"))
        covered += cell.low <= 0 <= cell.high
    assert 180 <= covered <= 198


def test_the_interval_of_a_median_is_that_of_resampling_by_hand():
    sample = np.random.default_rng(1).exponential(size=40)
    cell = summarize([[{"x": x}] for x in sample], Column("x", "x"))
    drawn = sample[np.random.default_rng(0).integers(40, size=(2000, 40))]
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    assert (cell.low, cell.high) == (pytest.approx(low), pytest.approx(high))


def test_a_rank_is_among_one_clip_each_of_other_speakers():
    references = np.eye(6)
    speakers = ["a", "a", "b", "b", "c", "d"]
    voice = np.array([0.5, 0.9, 0.6, 0.9, 0.4, 0.7])
    # Own 0.5; b's first clip 0.6 and d 0.7 are nearer, the own second clip and b's second do not compete.
    assert rank(voice, references, speakers, own=0) == 3
    assert rank(voice, references, speakers, own=0, among=2) == 2  # b only
    assert rank(np.zeros(6), references, speakers, own=0) == 4  # silence is nobody
    assert candidates(speakers) == 4
