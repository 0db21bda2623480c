"""The languages that the model speaks: their names, and which of them a text is written in."""

from __future__ import annotations

import re

LANGUAGES = {
    "en": "English", "fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "ar": "Arabic", "hi": "Hindi",
}  # fmt: skip

_SCRIPTS = {"ar": re.compile(r"[\u0600-\u06ff]"), "hi": re.compile(r"[\u0900-\u097f]")}
# Words that are frequent in one of the languages and not words of the others.
_WORDS = {
    "en": "the and of is was that with for you are this have be it my your will not hello good morning",
    "fr": "le les et est une du des que vous je il elle nous pas pour dans avec ce bonjour sur au c'est",
    "es": "el los las y es una del que usted yo por con para pero como muy hola buenos días está más",
    "de": "der die das und ist nicht ein eine ich sie wir mit für auf den dem zu guten hallo sich auch",
    "it": "il gli e è una della che di sono per con non questo buongiorno ciao anche più nel molto ho",
    "pt": "o os as e é uma do da que você não com para em um bom dia olá mais isso muito são eu",
    "nl": "de het een en is niet ik je wij met voor op van dat goedemorgen hallo ook zijn naar maar",
}
_SETS = {code: frozenset(words.split()) for code, words in _WORDS.items()}


def language_code(name: str) -> str | None:
    """The code of a language that the model speaks, by its code, name or tag (`de`, `German`, `de-AT`)."""
    given = name.strip().lower()
    code = re.split(r"[-_]", given)[0]
    names = {language.lower(): code for code, language in LANGUAGES.items()}
    return code if code in LANGUAGES else names.get(given)


def is_written_in(text: str, code: str) -> bool:
    """Whether a text is clearly in this language of `LANGUAGES`, by its script or its most frequent words."""
    letters = sum(character.isalpha() for character in text)
    in_script = {one: len(script.findall(text)) for one, script in _SCRIPTS.items()}
    if code in in_script or max(in_script.values()) > letters / 2:
        return in_script.get(code, 0) > letters / 2
    found = {one: 0 for one in _SETS}
    for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower()):
        for one, words in _SETS.items():
            found[one] += word in words
    return found[code] > max(count for one, count in found.items() if one != code)
