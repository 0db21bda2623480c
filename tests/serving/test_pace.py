"""What the engine takes a machine's pace to be."""

from __future__ import annotations

import pytest

from revox.serving.pace import Pace


def pace(*rounds):
    found = Pace(0.08)
    for streams, seconds in rounds:
        found.observe(streams, seconds)
    return found


def test_before_anything_is_known_one_may_try():
    assert pace().expected(1) is None
    assert pace().holds(1)
    assert pace().holds(50)


def test_a_round_of_more_takes_longer_in_proportion_at_most():
    known = pace((2, 0.03), (4, 0.05))
    assert known.expected(8) == pytest.approx(0.1)
    assert known.expected(3) == pytest.approx(0.045)
    assert known.expected(4) == pytest.approx(0.05)
    assert known.expected(1) is None


def test_what_was_slow_on_a_busy_day_is_tried_again_when_fewer_are_quick():
    known = pace((5, 0.09), (4, 0.05))
    assert known.expected(5) == pytest.approx(0.0625)


def test_an_average_follows_what_happens_lately():
    known = pace((1, 0.01))
    for _ in range(50):
        known.observe(1, 0.05)
    assert known.expected(1) == pytest.approx(0.05, abs=0.001)
    assert pace((1, 0.01), (1, 0.02)).expected(1) == pytest.approx(0.011)


def test_it_holds_up_to_a_share_of_real_time():
    assert pace((4, 0.05)).holds(5)
    assert not pace((5, 0.06)).holds(6)


def test_a_machine_too_slow_for_one_is_not_held_back():
    assert pace((1, 0.07)).holds(9)
    assert not pace((1, 0.06)).holds(9)


def test_a_player_is_dry_soon_when_two_rounds_are_all_it_has():
    known = pace((1, 0.05))
    assert known.soon_dry(0.4, 0.31, 1)
    assert not known.soon_dry(0.4, 0.29, 1)
    assert not pace().soon_dry(0.4, 0.39, 1)
