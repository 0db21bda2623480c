"""How progress is shown: bars on a terminal, lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from revox.cli.progress import duration, show_progress
from revox.progress import Progress


def test_a_log_gets_one_line_at_each_quarter_with_the_facts():
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with show_progress(console) as show:
        for step in range(1, 9):
            show(Progress("descent", step, 8, {"loss": 0.5, "seconds_left": 75}))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[1].split("%")[0].strip() for line in lines] == ["25", "50", "75", "100"]
    assert lines[0] == "  descent: 25 %, loss 0.5, 1 min 15 s left"


def test_a_phase_without_a_known_end_prints_no_line_in_a_log():
    console = Console(file=io.StringIO(), force_terminal=False)
    with show_progress(console) as show:
        show(Progress("speaking", 3))
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.4, "0 min 04 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")]
)
def test_durations_are_said_in_the_units_people_use(seconds, said):
    assert duration(seconds) == said
