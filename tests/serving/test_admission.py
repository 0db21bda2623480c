"""What the engine takes a machine's pace to be."""

from __future__ import annotations

import pytest

from revox.serving.admission import REMEMBERED, AdmissionControl


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def admission(clock):
    def made(*rounds):
        found = AdmissionControl(0.08, clock)
        for streams, seconds in rounds:
            found.observe(streams, seconds)
        return found

    return made


def test_before_anything_is_known_everybody_may_try(admission):
    assert admission().expected(1) is None
    assert admission().allows(1)
    assert admission().allows(50)


def test_a_step_is_expected_to_take_what_one_of_as_many_took_or_lie_on_the_line_of_others(admission):
    known = admission((2, 0.03), (4, 0.05))
    assert known.expected(4) == pytest.approx(0.05)
    assert known.expected(8) == pytest.approx(0.09)
    assert known.expected(3) == pytest.approx(0.04)
    assert known.expected(1) == pytest.approx(0.02)
    assert admission((2, 0.05), (4, 0.03)).expected(8) == pytest.approx(0.05), "more never takes less"


def test_an_average_follows_what_happens_lately(admission):
    known = admission((1, 0.01))
    for _ in range(50):
        known.observe(1, 0.05)
    assert known.expected(1) == pytest.approx(0.05, abs=0.001)
    assert admission((1, 0.01), (1, 0.02)).expected(1) == pytest.approx(0.011)


def test_reading_a_prompt_counts_among_other_rounds_and_tells_nothing_alone(admission):
    known = admission()
    known.observe(1, 0.5, joined=True)
    assert known.expected(1) is None
    known.observe(1, 0.02)
    known.observe(1, 0.12, joined=True)
    assert known.expected(1) == pytest.approx(0.03)


def test_one_more_is_tried_while_there_is_time_left(admission):
    assert admission((4, 0.067)).allows(5)
    assert not admission((1, 0.02), (4, 0.069)).allows(5)
    assert admission((1, 0.02), (4, 0.03)).allows(5, speed=2.0)
    assert not admission((1, 0.02), (4, 0.035)).allows(5, speed=2.0)


def test_what_was_too_many_is_not_tried_again_for_a_while(admission, clock):
    known = admission((4, 0.06), (5, 0.09))
    assert not known.allows(5)
    clock.now += REMEMBERED - 1
    assert not known.allows(5)
    clock.now += 2
    assert known.allows(5)


def test_a_machine_too_slow_for_one_is_not_held_back(admission):
    assert admission((1, 0.07)).allows(9)
    assert admission((1, 0.07), (2, 0.1)).allows(3)
    assert not admission((1, 0.06), (2, 0.1)).allows(3)


def test_a_first_chunk_has_one_to_five_frames_as_the_pace_requires(admission):
    assert admission().first_frames(1, 1.0) == 5, "nothing is known"
    assert admission((1, 0.01)).first_frames(1, 1.0) == 1
    assert admission((1, 0.01), (2, 0.05)).first_frames(2, 1.0) == 2
    assert admission((1, 0.05)).first_frames(1, 2.0) == 4, "a player at double speed"
    assert admission((1, 0.5)).first_frames(1, 1.0) == 5


def test_a_player_needs_two_steps_and_a_delay_in_hand(admission):
    assert admission((1, 0.03)).margin(1) == pytest.approx(0.1)
    assert admission().margin(1) == pytest.approx(0.2), "a step is taken for real time"


def test_a_player_needs_more_in_hand_after_a_step_in_which_much_came_together(admission):
    known = admission((1, 0.03))
    known.observe(1, 0.03, whole=0.2)
    assert known.margin(1) == pytest.approx(0.44)
    assert known.first_frames(1, 1.0) == 2, "its own second chunk comes as before"
    for _ in range(200):
        known.observe(1, 0.03)
    assert known.margin(1) == pytest.approx(0.1)
