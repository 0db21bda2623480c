"""Rules of a decision: parsed, typed and evaluated here, never by Python's own evaluation.

    require n_rating(A) >= 20
    mean_rating(A) >= mean_rating(B) + 0.5 and p50_first_audio(A) <= 500 ms -> swap_candidate, else keep

A figure is a statistic of what is measured, of A or B; `apart(mean_rating)` says that the intervals of A and
B do not overlap. Every value has a kind (time, share, loudness ...), and only equal kinds are compared or
added. `require` comes first: where it does not hold there is no verdict.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from revox.compare.errors import CompareError

STATISTICS = ("mean", "p50", "p95", "min", "max", "n")
KINDS = {
    "similarity": "number",
    "word_error_rate": "share",
    "naturalness": "number",
    "rating": "number",
    "loudness": "loudness",
    "pitch": "pitch",
    "pitch_spread": "interval",
    "clicks": "number",
    "repeats": "share",
    "early_stops": "share",
    "missing_stops": "share",
    "silences": "share",
    "failures": "share",
    "first_audio": "time",
    "seconds": "time",
    "real_time_factor": "number",
}
"""The figures and their kinds; `docs/comparing.md` says what each is."""
UNITS = {
    "ms": (0.001, "time"), "s": (1.0, "time"), "%": (0.01, "share"), "hz": (1.0, "pitch"),
    "lufs": (1.0, "loudness"), "lu": (1.0, "loudness step"), "db": (1.0, "loudness step"),
    "semitones": (1.0, "interval"),
}  # fmt: skip
_STEPS = {"loudness": "loudness step", "pitch": "pitch"}  # the kind of a difference, where it is another
LONGEST_RULE = 20_000  # characters
_DEEPEST = 40
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<mark>->|>=|<=|==|!=|[<>+\-(),%\n]))"
)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_RESERVED = {"and", "or", "not", "else", "require", "apart"}


@dataclass(frozen=True)
class RuleFigure:
    """A statistic of one figure, of A or B: `p50_first_audio(A)`."""

    statistic: str
    name: str
    side: str

    @property
    def kind(self) -> str:
        """What may be compared with it."""
        return "number" if self.statistic == "n" else KINDS[self.name]

    def __str__(self) -> str:
        return f"{self.statistic}_{self.name}({self.side})"


@dataclass(frozen=True)
class Measured:
    """A figure's value with its 95 % interval, over `count` samples."""

    value: float
    low: float
    high: float
    count: int


Values = Mapping[RuleFigure, Measured]


@dataclass(frozen=True)
class Quantity:
    """A number with a kind, or a sum of quantities."""

    kind: str
    text: str
    figures: tuple[RuleFigure, ...]
    value: Callable[[Values], float]


@dataclass(frozen=True)
class Condition:
    """What is true or false of measured figures."""

    text: str
    figures: tuple[RuleFigure, ...]
    holds: Callable[[Values], bool]


@dataclass(frozen=True)
class Clause:
    """An outcome and what leads to it; None leads to it in any case."""

    outcome: str
    condition: Condition | None

    @property
    def text(self) -> str:
        """As in the rule."""
        condition = self.condition
        return f"else {self.outcome}" if condition is None else f"{condition.text} -> {self.outcome}"


@dataclass(frozen=True)
class RuleVerdict:
    """What a rule says: an outcome and the clause that decided, or why there is none."""

    outcome: str | None
    clause: str
    reason: str = ""


@dataclass(frozen=True)
class Rule:
    """A parsed rule: what it requires, and its clauses in order."""

    text: str
    requirements: tuple[Condition, ...]
    clauses: tuple[Clause, ...]

    @property
    def figures(self) -> tuple[RuleFigure, ...]:
        """Every figure that it names."""
        conditions = [*self.requirements, *(one.condition for one in self.clauses if one.condition)]
        return tuple(dict.fromkeys(figure for one in conditions for figure in one.figures))

    def decide(self, values: Values) -> RuleVerdict:
        """The verdict for measured figures, which must have all that the rule names."""
        for figure in self.figures:
            if figure.statistic != "n" and not math.isfinite(values[figure].value):
                return RuleVerdict(None, str(figure), f"{figure} has no value: nothing was measured")
        for requirement in self.requirements:
            if not requirement.holds(values):
                return RuleVerdict(None, f"require {requirement.text}", "the rule's requirement is not met")
        for clause in self.clauses:
            if clause.condition is None or clause.condition.holds(values):
                return RuleVerdict(clause.outcome, clause.text)
        return RuleVerdict(None, "", "no clause holds, and the rule has no else")


@dataclass(frozen=True)
class _Token:
    kind: Literal["number", "name", "mark", "end"]
    text: str
    line: int


def parse_rule(text: str) -> Rule:
    """The rule in a text. Raises CompareError, with the line, for what is not one."""
    if len(text) > LONGEST_RULE:
        raise CompareError(f"the rule has {len(text):,} characters; {LONGEST_RULE:,} are possible")
    return _Parser(text).rule()


def _tokens(text: str) -> Iterator[_Token]:
    for number, line in enumerate(text.splitlines(), 1):
        at, line = 0, line.partition("#")[0].rstrip()
        while at < len(line):
            match = _TOKEN.match(line, at)
            if match is None:
                raise CompareError(f"line {number} of the rule: {line[at:].strip()[:20]!r} is not understood")
            kind = match.lastgroup
            assert kind in ("number", "name", "mark")
            yield _Token(kind, match[kind], number)  # type: ignore[arg-type]
            at = match.end()


class _Parser:
    """Recursive descent. Each method reads one kind of thing and gives it typed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._list = list(_tokens(text))
        last = self._list[-1].line if self._list else 1
        self._list.append(_Token("end", "its end", last))
        self._at, self._depth = 0, 0

    def rule(self) -> Rule:
        requirements: list[Condition] = []
        clauses: list[Clause] = []
        while self._peek().kind != "end":
            if self._take("require"):
                if clauses:
                    raise self._error("`require` comes before the clauses")
                requirements.append(self._or())
            elif self._take("else"):
                clauses.append(Clause(self._name("an outcome"), None))
                break
            else:
                condition = self._or()
                self._expect("->")
                clauses.append(Clause(self._name("an outcome"), condition))
            self._take(",")
        if self._peek().kind != "end":
            raise self._error("nothing comes after `else OUTCOME`")
        if not clauses:
            raise CompareError("the rule decides nothing; write `CONDITION -> OUTCOME, else OUTCOME`")
        return Rule(self._text, tuple(requirements), tuple(clauses))

    def _or(self) -> Condition:
        parts = [self._and()]
        while self._take("or"):
            parts.append(self._and())
        return _joined(parts, "or", any)

    def _and(self) -> Condition:
        parts = [self._not()]
        while self._take("and"):
            parts.append(self._not())
        return _joined(parts, "and", all)

    def _not(self) -> Condition:
        if self._take("not"):
            denied = self._deeper(self._not)
            return Condition(f"not {denied.text}", denied.figures, lambda values: not denied.holds(values))
        if self._peek().text == "(":
            self._expect("(")
            inner = self._deeper(self._or)
            self._expect(")")
            return Condition(f"({inner.text})", inner.figures, inner.holds)
        if self._take("apart"):
            return self._apart()
        return self._comparison()

    def _apart(self) -> Condition:
        self._expect("(")
        statistic, name = self._statistic(self._name("a figure"))
        self._expect(")")
        if statistic == "n":
            raise self._error("a count has no interval")
        a, b = (RuleFigure(statistic, name, side) for side in "AB")

        def apart(values: Values) -> bool:
            if min(values[a].count, values[b].count) < 2:  # one sample has no interval
                return False
            return values[a].low > values[b].high or values[b].low > values[a].high

        return Condition(f"apart({statistic}_{name})", (a, b), apart)

    def _comparison(self) -> Condition:
        left = self._sum()
        token = self._next()
        if token.text not in _COMPARISONS:
            raise self._error(f"expected one of {' '.join(_COMPARISONS)}, found {token.text!r}", token)
        right = self._sum()
        if left.kind != right.kind:
            raise self._error(
                f"{left.text} is a {left.kind} and {right.text} a {right.kind}; compare like with like"
                + _hint(left.kind, right.kind),
                token,
            )
        compare = _COMPARISONS[token.text]
        return Condition(
            f"{left.text} {token.text} {right.text}",
            left.figures + right.figures,
            lambda values: compare(left.value(values), right.value(values)),
        )

    def _sum(self) -> Quantity:
        total = self._quantity()
        while self._peek().text in ("+", "-"):
            token = self._next()
            total = self._added(total, token, self._quantity())
        return total

    def _added(self, left: Quantity, token: _Token, right: Quantity) -> Quantity:
        step = _STEPS.get(left.kind, left.kind)
        if left.kind == right.kind == "loudness" and token.text == "-":
            kind = "loudness step"
        elif right.kind == step:
            kind = left.kind
        else:
            raise self._error(
                f"{right.text}, a {right.kind}, cannot be added to {left.text}, a {left.kind}"
                + _hint(step, right.kind),
                token,
            )
        sign = 1.0 if token.text == "+" else -1.0
        return Quantity(
            kind,
            f"{left.text} {token.text} {right.text}",
            left.figures + right.figures,
            lambda values: left.value(values) + sign * right.value(values),
        )

    def _quantity(self) -> Quantity:
        negative = self._take("-")
        token = self._next()
        if token.kind == "number":
            return self._number(token, negative)
        if token.kind != "name" or negative:
            raise self._error(f"expected a number or a figure, found {token.text!r}", token)
        statistic, name = self._statistic(token)
        self._expect("(")
        side = self._name("A or B")
        if side.upper() not in ("A", "B"):
            raise self._error(f"a figure is of A or of B, not of {side}")
        self._expect(")")
        figure = RuleFigure(statistic, name, side.upper())

        def value(values: Values) -> float:
            return values[figure].count if statistic == "n" else values[figure].value

        return Quantity(figure.kind, str(figure), (figure,), value)

    def _number(self, token: _Token, negative: bool) -> Quantity:
        number, text, kind = float(token.text), token.text, ""
        unit = self._peek().text
        if unit.lower() in UNITS:
            self._next()
            factor, kind = UNITS[unit.lower()]
            number, text = number * factor, f"{text}{unit}" if unit == "%" else f"{text} {unit}"
        number = -number if negative else number
        text = f"-{text}" if negative else text
        # A number without a unit is a count or a plain number: the other side says which.
        return Quantity(kind or "number", text, (), lambda values: number)

    def _statistic(self, found: str | _Token) -> tuple[str, str]:
        text = found if isinstance(found, str) else found.text
        statistic, _, name = text.partition("_")
        if statistic not in STATISTICS or name not in KINDS:
            raise self._error(
                f"{text!r} is not a figure; write one of {', '.join(STATISTICS)}, then _ and one of "
                f"{', '.join(KINDS)}"
            )
        return statistic, name

    def _deeper(self, read: Callable[[], Condition]) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error("parentheses are nested too deeply")
        found = read()
        self._depth -= 1
        return found

    def _peek(self) -> _Token:
        return self._list[self._at]

    def _next(self) -> _Token:
        token = self._list[self._at]
        self._at = min(self._at + 1, len(self._list) - 1)
        return token

    def _take(self, text: str) -> bool:
        if self._peek().kind != "end" and self._peek().text == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f"expected {text!r}, found {self._peek().text!r}")

    def _name(self, what: str) -> str:
        token = self._next()
        if token.kind != "name" or token.text in _RESERVED:
            raise self._error(f"expected {what}, found {token.text!r}", token)
        return token.text

    def _error(self, sentence: str, token: _Token | None = None) -> CompareError:
        return CompareError(f"line {(token or self._peek()).line} of the rule: {sentence}")


def _joined(parts: list[Condition], word: str, how: Callable[[Iterator[bool]], bool]) -> Condition:
    if len(parts) == 1:
        return parts[0]
    return Condition(
        f" {word} ".join(one.text for one in parts),
        tuple(figure for one in parts for figure in one.figures),
        lambda values: how(one.holds(values) for one in parts),
    )


def _hint(*kinds: str) -> str:
    units = {"time": "500 ms or 2 s", "share": "5 %", "pitch": "200 Hz", "loudness": "-19 LUFS",
             "loudness step": "1 LU", "interval": "2 semitones"}  # fmt: skip
    wanted = next((units[kind] for kind in kinds if kind in units), None)
    return f" (write {wanted})" if wanted and "number" in kinds else ""
