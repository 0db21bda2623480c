from __future__ import annotations

import math

import pytest

from revox.compare.errors import CompareError
from revox.compare.rule import Measured, RuleFigure, parse_rule

EXAMPLE = """
# Written before anything was heard.
require n_rating(A) >= 20
require apart(mean_rating)
mean_rating(A) >= mean_rating(B) + 0.5 and p50_first_audio(A) <= 500 ms -> swap_candidate, else keep
"""
BOTH = "mean_rating(A) >= mean_rating(B) + 0.5 and p50_first_audio(A) <= 500 ms -> swap_candidate"


def values(a: float, b: float, first_audio: float = 0.3, count: int = 30, wide: float = 0.1):
    return {
        RuleFigure("n", "rating", "A"): Measured(count, count, count, count),
        RuleFigure("mean", "rating", "A"): Measured(a, a - wide, a + wide, count),
        RuleFigure("mean", "rating", "B"): Measured(b, b - wide, b + wide, count),
        RuleFigure("p50", "first_audio", "A"): Measured(first_audio, first_audio, first_audio, count),
    }


@pytest.mark.parametrize(
    ("made", "outcome", "clause"),
    [
        (values(4.2, 3.6), "swap_candidate", BOTH),
        (values(4.0, 3.6), "keep", "else keep"),
        (values(4.2, 3.6, first_audio=0.501), "keep", "else keep"),
        (values(4.2, 3.6, count=19), None, "require n_rating(A) >= 20"),
        (values(4.2, 3.6, wide=0.31), None, "require apart(mean_rating)"),
        (values(math.nan, 3.6), None, "mean_rating(A)"),
    ],
)  # fmt: skip
def test_the_examples_rule_swaps_keeps_and_refuses(made, outcome, clause):
    verdict = parse_rule(EXAMPLE).decide(made)
    assert verdict.outcome == outcome
    assert verdict.clause == clause
    assert bool(verdict.reason) == (outcome is None)


def test_a_rule_names_its_figures():
    assert {str(figure) for figure in parse_rule(EXAMPLE).figures} == {
        "n_rating(A)", "mean_rating(A)", "mean_rating(B)", "p50_first_audio(A)",
    }  # fmt: skip


def decided(text: str, a: float, b: float = 0.0, name: str = "naturalness") -> str | None:
    made = {RuleFigure("mean", name, side): Measured(x, x, x, 9) for side, x in (("A", a), ("B", b))}
    return parse_rule(text).decide(made).outcome


@pytest.mark.parametrize(
    ("condition", "a", "b", "holds"),
    [
        ("mean_naturalness(A) > 2 and mean_naturalness(A) < 3 or mean_naturalness(A) > 4", 5, 0, True),
        ("mean_naturalness(A) > 4 and (mean_naturalness(A) < 3 or mean_naturalness(A) > 1)", 5, 0, True),
        ("mean_naturalness(A) > 2 and (mean_naturalness(A) < 3 or mean_naturalness(A) > 6)", 5, 0, False),
        ("not mean_naturalness(A) > 2", 1, 0, True),
        ("not (mean_naturalness(A) > 2 or mean_naturalness(B) > 2)", 1, 3, False),
        ("mean_naturalness(A) - mean_naturalness(B) - 0.5 >= -1", 1, 1.5, True),
        ("mean_naturalness(A) - mean_naturalness(B) - 0.5 > -1", 1, 1.5, False),
        ("2.5 <= mean_naturalness(A)", 2.5, 0, True),
        ("apart(mean_naturalness)", 1, 1, False),
        ("apart(mean_naturalness)", 1, 2, True),
    ],
)
def test_conditions_mean_what_they_say(condition, a, b, holds):
    assert decided(f"{condition} -> yes, else no", a, b) == ("yes" if holds else "no")


def test_units_are_read_and_the_first_clause_that_holds_decides():
    assert (
        decided(
            "mean_word_error_rate(A) <= 5 % -> good\nmean_word_error_rate(A) <= 20% -> fair\nelse bad",
            0.2,
            name="word_error_rate",
        )
        == "fair"
    )
    assert decided("mean_first_audio(A) < 0.5 s -> fast else slow", 0.4, name="first_audio") == "fast"
    assert (
        decided("mean_loudness(A) - mean_loudness(B) > 2 LU -> louder, else like", -19, -22, "loudness")
        == "louder"
    )
    assert (
        decided("mean_loudness(A) >= mean_loudness(B) + 2 dB -> louder, else like", -19, -20, "loudness")
        == "like"
    )
    assert (
        parse_rule("mean_pitch(A) > 200 Hz -> high")
        .decide({RuleFigure("mean", "pitch", "A"): Measured(150, 1, 1, 3)})
        .reason.startswith("no clause holds")
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "decides nothing"),
        ("keep", "'keep' is not a figure"),
        ("mean_rating(A) >= 3", "expected '->'"),
        ("mean_rating(A) -> keep", "expected one of >= <= > <"),
        ("mean_rating(C) > 3 -> keep", "of A or of B"),
        ("mean_beauty(A) > 3 -> keep", "'mean_beauty' is not a figure"),
        ("sum_rating(A) > 3 -> keep", "'sum_rating' is not a figure"),
        ("p50_first_audio(A) <= 500 -> keep", "write 500 ms or 2 s"),
        ("mean_rating(A) > 3 ms -> keep", "compare like with like"),
        ("mean_loudness(A) > mean_loudness(B) + 3 -> keep", "cannot be added"),
        ("mean_loudness(A) + mean_loudness(B) > 3 LUFS -> keep", "cannot be added"),
        ("mean_rating(A) == 3 -> keep", "expected one of"),
        ("mean_rating(A) > 3 -> and", "expected an outcome"),
        ("mean_rating(A) > 3 -> a else b c", "line 1 of the rule: nothing comes after"),
        ("mean_rating(A) > 3 -> a\nrequire n_rating(A) > 3", "line 2 of the rule: `require` comes before"),
        ("apart(n_rating) -> a", "a count has no interval"),
        ("mean_rating(A) > 3; import os -> a", "'; import os -> a' is not understood"),
        ("__import__('os').system('true') -> a", "is not understood"),
        ("mean_rating(A) > 1e999 -> a", "expected '->'"),
        ("(" * 500 + "mean_rating(A) > 1" + ")" * 500 + " -> a", "nested too deeply"),
        ("not " * 500 + "mean_rating(A) > 1 -> a", "nested too deeply"),
        ("# x\n" * 9000, "characters"),
    ],
)
def test_what_is_not_a_rule_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(CompareError) as refused:
        parse_rule(text)
    assert sentence in str(refused.value)
