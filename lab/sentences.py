"""The lab's narrow text domain: numbers, dates, times, prices and short everyday phrases.

One grammar serves two purposes: it draws sentences, and is handed to a recognizer as JSGF. Half of the
sentences of the lab's speech are its own (`lab/speech/plan.tsv`). Sentences are lower-case words without
digits or punctuation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache

import numpy as np

SPLITS = ("train", "validation", "heldout")

_UNITS = "one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth"
_ORDINAL_TEENS = (
    "tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
)
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday"
_MONTHS = "january february march april may june july august september october november december"


def _either(words: str) -> str:
    return " | ".join(words.split())


# JSGF rule bodies: sequences, alternatives `|`, groups `( )` and optional parts `[ ]`. No two derivations
# give the same sentence, so that sentences are drawn as evenly as derivations.
_RULES = {
    "sentence": """
        <travel> | <meeting> | <shopping> | <dates> | <telephone> | <home> | <weather> | <counting>
        | <smalltalk>
    """,
    "travel": """
        (the | our | your) (train | bus | plane | boat) (leaves | arrives | stops here) at <time>
        | the (next | last) (train | bus | plane) to the (city | airport | station | coast) leaves at <time>
        | turn (left | right) at the <place> and (walk | drive) for <number> minutes
        | take the number <number> bus to the <place>
        | we will (arrive | be back) on <weekday> at <time>
    """,
    "meeting": """
        (the | our | my | your) <event> (starts | ends | is) at <time>
        | (can | could) we (meet | talk) on <weekday> at <time>
        | (please | do) come to the <place> at <time>
        | the <event> is on <weekday> the <ordinal>
    """,
    "shopping": """
        (the | this | that) <thing> costs <price>
        | i (paid | spent) <price> for (the | this | that) <thing>
        | <number> <things> (please | for my friend | and a <thing>)
        | can i have <number> <things> and <small> <things>
        | it was <price> and now it is <price>
    """,
    "dates": """
        today is <weekday> the <ordinal> of <month>
        | (my | her | his) birthday is on the <ordinal> of <month>
        | we are closed from the <ordinal> of <month>
        | see you on <weekday> the <ordinal>
    """,
    "telephone": """
        (my | the | her | his) number is <digit> <digit> <digit> <digit> <digit>
        | please call <digit> <digit> <digit> <digit>
        | call me (back | again) on <weekday> at <time>
        | your room is number <number> on the <ordinal> floor
    """,
    "home": """
        please (open | close) the (door | window | curtain) (in the <room> | at <time>)
        | (turn on | turn off | dim) the (light | radio | heating) in the <room>
        | (dinner | breakfast | lunch) is ready at <time>
        | set (a timer | an alarm) for <number> minutes
        | the (keys | glasses | letters) are (on | under) the (table | chair | bed) in the <room>
    """,
    "weather": """
        it will be <number> degrees on <weekday>
        | (today | tomorrow) will be (warm | cold | wet | dry | sunny | cloudy) (and | but) (windy | calm)
        | (rain | snow | wind | fog) is expected on <weekday> (morning | afternoon | evening)
    """,
    "counting": """
        <number> (plus | minus | times) <number> is <number>
        | page <number> of <number>
        | there are <number> <things> and <small> <things> on the table
        | (the score is | we won by | they lost by) <number> to <number>
    """,
    "smalltalk": """
        (good morning | good evening | hello) (my friend | everyone | doctor)
            (how are you today | nice to see you)
        | thank you (very much | so much) for the <thing>
        | (i am sorry | excuse me) (where is | how far is) the <place>
        | i would like (a | another) <thing> and <small> <things>
        | (have you seen | do you like) my (new | old | red | blue) <thing>
    """,
    "time": """
        <hour> <minutes> | half past <hour> | quarter to <hour> | quarter past <hour>
        | <hour> (o'clock | thirty)
    """,
    "minutes": "fifteen | forty five | twenty | ten",
    "hour": _either(_UNITS + " ten eleven twelve"),
    "price": """
        <number> (dollars | pounds | euros) | <number> (dollars | pounds | euros) and <cents> cents
    """,
    "cents": "five | ten | twenty | twenty five | fifty | seventy five | ninety nine",
    "number": f"{_either(_UNITS)} | {_either(_TEENS)} | <tens> | <tens> <digits>",
    "digits": _either(_UNITS),
    "small": "two | three | four | five | six",
    "tens": _either(_TENS),
    "digit": _either("zero " + _UNITS),
    "ordinal": f"{_either(_ORDINALS)} | {_either(_ORDINAL_TEENS)} | twentieth "
    f"| twenty ({_either(_ORDINALS)}) | thirtieth | thirty first",
    "weekday": _either(_WEEKDAYS),
    "month": _either(_MONTHS),
    "place": "station | bridge | market | hospital | museum | library | school | church | hotel | corner",
    "room": "kitchen | bedroom | garden | office | bathroom | hall",
    "event": "meeting | concert | lesson | party | game | film",
    "thing": "book | coat | ticket | bottle | lamp | chair | camera | cake | coffee | sandwich",
    "things": "apples | oranges | tickets | books | bottles | cups | chairs | flowers | eggs | lemons",
}

_TOKEN = re.compile(r"<(\w+)>|([a-z']+)|([|()\[\]])")

# A parsed expression: a word, ("rule", name), ("all", parts) or ("any", alternatives).
_Node = str | tuple[str, object]


def _parse(body: str) -> _Node:
    tokens = list(_TOKEN.finditer(body))
    position = 0

    def alternatives() -> _Node:
        nonlocal position
        options: list[_Node] = []
        parts: list[_Node] = []
        while position < len(tokens):
            rule, word, mark = tokens[position].groups()
            if mark in (")", "]"):
                break
            position += 1
            if rule:
                parts.append(("rule", rule))
            elif word:
                parts.append(word)
            elif mark == "|":
                options.append(("all", tuple(parts)))
                parts = []
            else:
                inner = alternatives()
                position += 1  # the closing mark
                parts.append(inner if mark == "(" else ("any", (("all", ()), inner)))
        options.append(("all", tuple(parts)))
        return options[0] if len(options) == 1 else ("any", tuple(options))

    return alternatives()


@cache
def _rule(name: str) -> _Node:
    return _parse(_RULES[name])


@cache
def _count(node: _Node) -> int:
    if isinstance(node, str):
        return 1
    kind, content = node
    if kind == "rule":
        return _count(_rule(content))
    counts = [_count(part) for part in content]  # type: ignore[attr-defined]
    if kind == "any":
        return sum(counts)
    product = 1
    for count in counts:
        product *= count
    return product


def _draw(node: _Node, rng: np.random.Generator, words: list[str]) -> None:
    if isinstance(node, str):
        words.append(node)
        return
    kind, content = node
    if kind == "rule":
        _draw(_rule(content), rng, words)
    elif kind == "any":
        # Short lists are drawn evenly; alternatives of very different sizes (numbers below twenty and above)
        # by the square root of their size, so that neither rare nor frequent words dominate.
        weights = np.sqrt([min(_count(option), 100) for option in content])  # type: ignore[attr-defined]
        choice = rng.choice(len(weights), p=weights / weights.sum())
        _draw(content[choice], rng, words)  # type: ignore[index]
    else:
        for part in content:  # type: ignore[attr-defined]
            _draw(part, rng, words)


def draw(rng: np.random.Generator) -> str:
    """One sentence of the grammar, of whatever split it belongs to."""
    words: list[str] = []
    _draw(("rule", "sentence"), rng, words)
    return " ".join(words)


def split_of(sentence: str) -> str:
    """Which split a sentence belongs to, by its hash: 80 % "train", 10 % "validation", 10 % "heldout".

    Case and punctuation do not matter, so a sentence and its written form are of the same split.
    """
    plain = " ".join(re.findall(r"[a-z']+", sentence.lower()))
    bucket = hashlib.sha256(plain.encode()).digest()[0] * 10 // 256
    return "heldout" if bucket == 9 else "validation" if bucket == 8 else "train"


def sentences(split: str, seed: int) -> Iterator[str]:
    """Endless different sentences of one split, the same for the same seed."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    seen: set[str] = set()
    while True:
        sentence = draw(rng)
        if split_of(sentence) == split and sentence not in seen:
            seen.add(sentence)
            yield sentence


def jsgf() -> str:
    """The domain as a JSGF grammar, for a recognizer that must accept exactly these sentences."""
    lines = ["#JSGF V1.0;", "grammar domain;"]
    for name, body in _RULES.items():
        scope = "public " if name == "sentence" else ""
        lines.append(f"{scope}<{name}> = {' '.join(body.split())};")
    return "\n".join(lines) + "\n"
