"""Known failures are told, once, with what to try."""

from __future__ import annotations

from revox.training.watch import Expected, Watch

EXPECTED = Expected(perplexity=200.0, saturated=0.04, embedding_norm=4.4, embedding_norm_deviation=0.1)
HEALTHY = {"perplexity": 150.0, "mel": 0.5, "acoustic": 2.0, "discriminator": 1.5}
CHECKED = {"valid_saturated": 0.05, "valid_embedding_norm": 4.5, "valid_levels": 1.1, "trained_levels": 1.0}


def told(rows: list[dict[str, float]]) -> list[str]:
    watch = Watch(EXPECTED)
    return [sentence for row in rows for sentence in watch.update(row)]


def improving(count: int, **more: float) -> list[dict[str, float]]:
    return [HEALTHY | {"mel": 0.5 * 0.98**i, "acoustic": 2 * 0.98**i} | CHECKED | more for i in range(count)]


def test_a_healthy_run_hears_nothing():
    assert told(improving(100)) == []


def test_collapse_saturation_and_strange_rows_are_told_once_each():
    for more, word in (
        ({"perplexity": 5.0}, "collapses"),
        ({"valid_saturated": 0.4}, "first or last level"),
        ({"valid_embedding_norm": 7.0}, "norm of 7.00"),
        ({"valid_levels": 2.0, "trained_levels": 1.5}, "held out, 1.50 in those"),
    ):
        found = told(improving(30, **more))
        assert len(found) == 1
        assert word in found[0]


def test_a_warning_comes_again_when_its_cause_went_and_came_back():
    bad, good = improving(10, perplexity=5.0), improving(30)[10:]
    assert len(told([*bad, *good, *bad])) >= 2


def test_a_loss_that_no_longer_falls_is_told_after_some_patience():
    flat = [HEALTHY] * (Watch.PATIENCE - 1)
    assert told(flat) == []
    assert "has not fallen" in told([HEALTHY] * (Watch.PATIENCE + 2))[0]


def test_a_discriminator_that_always_wins_is_told_and_one_good_report_is_not():
    lost = improving(20, discriminator=0.05)
    assert "have won" in told(lost)[0]
    mixed = [row | {"discriminator": 0.05 if i % 3 else 1.0} for i, row in enumerate(improving(20))]
    assert told(mixed) == []
