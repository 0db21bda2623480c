"""Sentences for the model to say where no texts are given: varied in sounds and length, not in meaning."""

from __future__ import annotations

import re

import numpy as np

_TEMPLATES = (
    "The {adjective} {noun} {past} {place}.",
    "{name} {past} the {noun} and the {adjective} {noun} {time}.",
    "Could you {verb} the {noun} {time}, please?",
    "I have never {participle} such {article} {noun} {place}.",
    "We {past} {number} {nouns} {place}, but nobody {past} the {noun}.",
    "{time}, {name} and {name} {past} {article} {noun}.",
    "Why did {name} {verb} the {adjective} {noun}?",
    "If you {verb} the {nouns}, {name} will {verb} the {noun} {time}.",
    "There are {number} {adjective} {nouns} {place}.",
    "{name} said that the {noun} was {adjective} and the {nouns} were {adjective}.",
    "What {article} {noun}!",
    "Please {verb} {number} {nouns} before {name} comes back.",
    "My {noun} is {adjective}, said {name}, and yours is {adjective}.",
    "Nobody {past} it.",
)
_WORDS = {
    "adjective": "quiet old broken yellow heavy useful strange gentle expensive narrow shiny thoughtful "
    "rough frozen enormous cheap wooden early jealous vague azure thick fragile cheerful dusty square royal",
    "noun": "bridge kettle garden letter village orchestra measure window thumb engine question pigeon ocean "
    "jacket theory mushroom church vision breath ladder uncle voyage shelf paper judge choir island puzzle "
    "fountain leather yacht thread earth hammer guitar zebra cushion bakery lawyer treasure",
    "nouns": "boats cousins apples bridges watches clouds mouths keys photographs fathers shoes wolves "
    "jewels garages questions youths doctors stairs feathers boxes lakes songs quarrels horses chairs",
    "past": "crossed painted measured forgot carried opened laughed-at followed watched described bought "
    "taught fixed threw mentioned repaired chose brushed sold judged heard wished-for closed found burned",
    "verb": "move describe finish repair choose watch carry hear throw measure buy join push enjoy show save "
    "bring imagine wash borrow reach judge weigh use call",
    "participle": "seen heard bought measured described carried found thrown chosen repaired imagined tasted",
    "name": "Martha Oliver George Yvonne Theo Hugh Joyce Victor Zoe Sheila Rajiv Ingrid Charlotte Amy Paul "
    "Kenji Beatrice Noah Ursula Walter",
    "place": "by-the-river in-the-north behind-the-church near-the-old-harbor on-the-way-home "
    "under-the-stairs at-the-museum beyond-the-hills outside-the-theater in-her-garage above-the-shop "
    "across-the-road",
    "time": "yesterday-evening on-Thursday before-lunch every-other-week after-the-concert this-morning "
    "at-half-past-nine in-February as-usual once-again three-years-ago for-the-first-time",
    "number": "two three five seven eight eleven twelve fourteen nineteen thirty-six ninety a-hundred four "
    "six",
}


def drawn_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different English sentences of 3 to 20 words; of a larger count the first ones are the same."""
    rng = np.random.default_rng(seed)
    words = {kind: [word.replace("-", " ") for word in text.split()] for kind, text in _WORDS.items()}
    found: dict[str, None] = {}
    while len(found) < count:
        template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
        found.setdefault(_filled(template, words, rng))
    return list(found)


def _filled(template: str, words: dict[str, list[str]], rng: np.random.Generator) -> str:
    text = re.sub(r"\{(?!article)(\w+)\}", lambda kind: str(rng.choice(words[kind.group(1)])), template)
    text = re.sub(r"\{article\} (\w)", lambda first: f"{_article(first.group(1))} {first.group(1)}", text)
    return text[0].upper() + text[1:]


def _article(letter: str) -> str:
    return "an" if letter.lower() in "aeiou" else "a"
