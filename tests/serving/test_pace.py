"""What the engine takes a machine's pace to be."""

from __future__ import annotations

import pytest

from revox.serving.pace import REMEMBERED, Pace


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    def made(*rounds):
        found = Pace(0.08, clock)
        for streams, seconds in rounds:
            found.observe(streams, seconds)
        return found

    return made


def test_before_anything_is_known_everybody_may_try(pace):
    assert pace().expected(1) is None
    assert pace().holds(1)
    assert pace().holds(50)


def test_a_round_is_expected_to_take_what_one_of_as_many_or_a_little_fewer_took(pace):
    known = pace((2, 0.03), (4, 0.05))
    assert known.expected(8) == pytest.approx(0.05)
    assert known.expected(3) == pytest.approx(0.03)
    assert known.expected(1) is None


def test_an_average_follows_what_happens_lately(pace):
    known = pace((1, 0.01))
    for _ in range(50):
        known.observe(1, 0.05)
    assert known.expected(1) == pytest.approx(0.05, abs=0.001)
    assert pace((1, 0.01), (1, 0.02)).expected(1) == pytest.approx(0.011)


def test_reading_a_prompt_counts_among_other_rounds_and_tells_nothing_alone(pace):
    known = pace()
    known.observe(1, 0.5, joined=True)
    assert known.expected(1) is None
    known.observe(1, 0.02)
    known.observe(1, 0.12, joined=True)
    assert known.expected(1) == pytest.approx(0.03)


def test_one_more_is_tried_while_there_is_time_left(pace):
    assert pace((4, 0.067)).holds(5)
    assert not pace((1, 0.02), (4, 0.069)).holds(5)
    assert pace((1, 0.02), (4, 0.033)).holds(5, speed=2.0)
    assert not pace((1, 0.02), (4, 0.035)).holds(5, speed=2.0)


def test_what_was_too_many_is_not_tried_again_for_a_while(pace, clock):
    known = pace((4, 0.06), (5, 0.09))
    assert not known.holds(5)
    clock.now += REMEMBERED - 1
    assert not known.holds(5)
    clock.now += 2
    assert known.holds(5)


def test_a_machine_too_slow_for_one_is_not_held_back(pace):
    assert pace((1, 0.07)).holds(9)
    assert pace((1, 0.07), (2, 0.1)).holds(3)
    assert not pace((1, 0.06), (2, 0.1)).holds(3)


def test_a_player_is_dry_soon_when_two_rounds_are_all_it_has(pace):
    known = pace((1, 0.05))
    assert known.soon_dry(0.4, 0.31, 1)
    assert not known.soon_dry(0.4, 0.29, 1)
    assert not pace().soon_dry(0.4, 0.39, 1)
