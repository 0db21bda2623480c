"""Numbers, times, percentages, amounts of money and units as words, by num2words and Babel (`pip install
'revox[text]'`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from revox.synthesis.errors import SpeakError

_LONGEST = 15  # digits; more, and numbers that begin with a zero, are read digit by digit

_UNITS = {
    "mm": "length-millimeter", "cm": "length-centimeter", "m": "length-meter", "km": "length-kilometer",
    "m²": "area-square-meter", "km²": "area-square-kilometer", "m³": "volume-cubic-meter",
    "mg": "mass-milligram", "g": "mass-gram", "kg": "mass-kilogram", "lb": "mass-pound", "lbs": "mass-pound",
    "ml": "volume-milliliter", "mL": "volume-milliliter", "l": "volume-liter", "L": "volume-liter",
    "ms": "duration-millisecond", "km/h": "speed-kilometer-per-hour", "mph": "speed-mile-per-hour",
    "°C": "temperature-celsius", "°F": "temperature-fahrenheit", "kWh": "energy-kilowatt-hour",
    "W": "power-watt", "kW": "power-kilowatt", "MW": "power-megawatt", "V": "electric-volt",
    "kB": "digital-kilobyte", "MB": "digital-megabyte", "GB": "digital-gigabyte", "TB": "digital-terabyte",
    "Hz": "frequency-hertz", "kHz": "frequency-kilohertz", "MHz": "frequency-megahertz",
    "GHz": "frequency-gigahertz",
}  # fmt: skip
"""CLDR's name of a unit, by the symbol after a number. Symbols that are words too (in, h, t) are left out."""


@dataclass(frozen=True)
class _Language:
    """How a language writes numbers, and the words that num2words does not have.

    clock: between hours and minutes, and after full hours. money: name and plural by sign. scales: name and
    plural of what may stand between an amount and its sign, by how it is written; of: what follows them. one:
    before a euro or dollar, before a pound, before a scale.
    """

    decimal: str
    percent: str
    clock: tuple[str, str]
    money: dict[str, tuple[str, str]]
    scales: dict[str, tuple[str, str]]
    one: tuple[str, str, str]
    of: str = ""


def _scales(*given: str) -> dict[str, tuple[str, str]]:
    """From "million m mn" or "Million/Millionen Mio.": name, plural if another, how else it is written."""
    found: dict[str, tuple[str, str]] = {}
    for names, *symbols in (one.split() for one in given):
        one, _, many = names.replace("_", " ").partition("/")
        found |= {written: (one, many or one) for written in (one, many, *symbols) if written}
    return found


_HOURS = {
    "de": {1: "ein"}, "fr": {1: "une", 21: "vingt et une"}, "es": {1: "una", 21: "veintiuna"},
    "it": {1: "una"}, "pt": {1: "uma", 2: "duas", 21: "vinte e uma", 22: "vinte e duas"},
}  # fmt: skip
"""Hours whose number is not that of counting."""
_DOLLARS = {"US": "US", "A": "Australian", "C": "Canadian", "HK": "Hong Kong", "NZ": "New Zealand"}

# fmt: off
LANGUAGES = {
    "en": _Language(".", "percent", ("", "o'clock"),
                    {"$": ("dollar", "dollars"), "€": ("euro", "euros"), "£": ("pound", "pounds")},
                    _scales("thousand k", "million m mn M", "billion bn b B", "trillion tn T"),
                    ("one", "one", "one")),
    "fr": _Language(",", "pour cent", ("heures", "heures"),
                    {"$": ("dollar", "dollars"), "€": ("euro", "euros"), "£": ("livre", "livres")},
                    _scales("mille k", "million/millions M", "milliard/milliards Md Mds"),
                    ("un", "une", "un"), "de"),
    "es": _Language(",", "por ciento", ("y", "en punto"),
                    {"$": ("dólar", "dólares"), "€": ("euro", "euros"), "£": ("libra", "libras")},
                    _scales("mil", "millón/millones M mill."), ("un", "una", "un"), "de"),
    "de": _Language(",", "Prozent", ("Uhr", "Uhr"),
                    {"$": ("Dollar", "Dollar"), "€": ("Euro", "Euro"), "£": ("Pfund", "Pfund")},
                    _scales("Tausend Tsd.", "Million/Millionen Mio. Mio", "Milliarde/Milliarden Mrd. Mrd"),
                    ("ein", "ein", "eine")),
    "it": _Language(",", "per cento", ("e", "in punto"),
                    {"$": ("dollaro", "dollari"), "€": ("euro", "euro"), "£": ("sterlina", "sterline")},
                    _scales("mila", "milione/milioni mln", "miliardo/miliardi mld"),
                    ("un", "una", "un"), "di"),
    "pt": _Language(",", "por cento", ("e", "em ponto"),
                    {"$": ("dólar", "dólares"), "€": ("euro", "euros"), "£": ("libra", "libras")},
                    _scales("mil", "milhão/milhões mi M", "bilhão/bilhões bi"), ("um", "uma", "um"), "de"),
    "nl": _Language(",", "procent", ("uur", "uur"),
                    {"$": ("dollar", "dollar"), "€": ("euro", "euro"), "£": ("pond", "pond")},
                    _scales("duizend", "miljoen mln", "miljard mld"), ("één", "één", "één")),
}
# fmt: on


def spell_numbers(text: str, language: str) -> str:
    """`text` with its numbers in words of `language` (a key of `LANGUAGES`).

    Units are spelled after a number, by CLDR's names. Raises SpeakError for another language, and when
    num2words or Babel is not installed.
    """
    if language not in LANGUAGES:
        raise SpeakError(
            f"numbers cannot be spelled in {language!r}; the languages are {', '.join(LANGUAGES)}: use "
            "text normalization basic, or name another language"
        )
    try:
        from babel.units import format_unit
        from num2words import num2words
    except ImportError:
        raise SpeakError("spelling numbers needs num2words and Babel: pip install 'revox[text]'") from None
    return _Speller(language, num2words, format_unit).spell(text)


class _Speller:
    def __init__(self, language: str, num2words: Callable[..., str], format_unit: Callable[..., str]) -> None:
        self._code, self._language, self._num2words = language, LANGUAGES[language], num2words
        self._format_unit = format_unit
        self._decimal = self._language.decimal
        marks = {"en": ",", "fr": " \u00a0\u202f"}.get(language, ".\u00a0\u202f")
        between = f"[{marks}'’]"
        self._group = re.compile(rf"(?<=\d){between}(?=\d{{3}}(?!\d))")
        fraction = rf"(?:{re.escape(self._decimal)}\d+)?"
        number = rf"\d{{1,3}}(?:{between}\d{{3}})+{fraction}|\d+{fraction}"
        # Neither within words and versions (3D, v2, 1.2.3) nor within addresses.
        start, end = r"(?<![\w.,:/-])", r"(?![\w/]|[.,:]\d|-\d)"
        signs = "[$€£]"
        oclock = rf"(?:\s*{self._language.clock[1]}\b)?"
        self._time = re.compile(rf"{start}([01]?\d|2[0-4]):([0-5]\d){end}{oclock}", re.IGNORECASE)
        scales = "|".join(map(re.escape, sorted(self._language.scales, key=len, reverse=True)))
        scale = rf"(?:[\s-]?({scales})(?!\w))?"
        self._money = re.compile(
            rf"(\ban?\s)?(?<![^\W_])({'|'.join(_DOLLARS)})?({signs})\s?({number}){scale}{end}"
            rf"|{start}({number}){scale}\s?({signs})(?!\w)"
        )
        self._percent = re.compile(rf"(?<![\w.,:/])({number})\s?%")
        symbols = "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))
        self._unit = re.compile(rf"(?<![\w.,:/])({number})\s?({symbols})(?![\w/²³])")
        self._ordinal = re.compile(rf"{start}(\d+)(?:st|nd|rd|th)\b")
        self._number = re.compile(rf"((?<!\S)[-−])?{start}({number}){end}|(?<!\S)[-−]({number}){end}")

    def spell(self, text: str) -> str:
        text = self._time.sub(self._clock, text)
        text = self._money.sub(self._amount, text)
        text = self._unit.sub(self._measure, text)
        text = self._percent.sub(self._share, text)
        if self._code == "en":
            text = self._ordinal.sub(lambda m: self._num2words(int(m[1]), lang="en", to="ordinal"), text)
        return self._number.sub(lambda m: self._words(m[2] or m[3], negative=bool(m[1] or m[3])), text)

    def _share(self, match: re.Match[str]) -> str:
        # The number stays, with its sign, to be spelled like all others.
        one = self._language.one[0] if self._code == "de" and match[1] == "1" else match[1]
        return f"{one} {self._language.percent}"

    def _clock(self, match: re.Match[str]) -> str:
        hours, minutes = int(match[1]), int(match[2])
        between, sharp = self._language.clock
        words = _HOURS.get(self._code, {}).get(hours) or self._say(hours)
        if self._code == "fr" and hours < 2:
            between = sharp = "heure"
        if re.match(r"\s*[ap]\.?m\b", match.string[match.end() :], re.IGNORECASE):
            sharp = ""
        if minutes == 0:
            return f"{words} {sharp}".strip()
        zero = f"{'oh' if self._code == 'en' else ''} " if minutes < 10 else ""
        return " ".join(f"{words} {between} {zero}{self._say(minutes)}".split())

    def _amount(self, match: re.Match[str]) -> str:
        article, country, sign, number, scale, *after = match.groups()
        if sign is None:
            number, scale, sign = after
        language, plain = self._language, self._group.sub("", number)
        one, many = language.money[sign]
        if article and self._code == "en":  # a five dollar bill
            many = one
        whole, _, cents = plain.partition(language.decimal)
        single = plain == "1" or (whole == "1" and not scale and len(cents) <= 2)
        if single:
            words = language.one[2 if scale else sign == "£"]
        else:
            words = self._words(number) if scale or len(cents) > 2 else self._say(int(whole))
        if scale:
            name, names = language.scales[scale]
            words += f" {name if single else names}"
            if language.of and name != names:
                words += f" {language.of}"
        if country:
            words += f" {_DOLLARS[country] if self._code == 'en' else country}"
        words += f" {one if single and not scale else many}"
        if self._code == "fr":
            words = words.replace(" de euro", " d'euro")
        if not scale and len(cents) <= 2 and cents.strip("0"):
            words += f" {self._say(int(cents.ljust(2, '0')))}"
        return f"{article or ''}{words}"

    def _measure(self, match: re.Match[str]) -> str:
        number, unit = match.groups()
        plain = self._group.sub("", number)
        if len(plain) > _LONGEST:
            return match.group()
        value = float(plain.replace(self._decimal, "."))
        if plain == "1" and not _UNITS[unit].startswith(("duration", "mass-pound", "speed")):
            number = self._language.one[0]  # ein Kilometer, not eins
        # The number stays as it is written, to be spelled like all others.
        spoken = self._format_unit(value, _UNITS[unit], format="0", locale=self._code)
        return re.sub(r"\d+", lambda _: number, spoken.replace("\u00a0", " "), count=1)

    def _words(self, number: str, negative: bool = False) -> str:
        whole, _, fraction = self._group.sub("", number).partition(self._decimal)
        if len(whole) > _LONGEST or (len(whole) > 1 and whole.startswith("0")):
            words = " ".join(self._say(int(digit)) for digit in whole + fraction)
        elif fraction:
            # Digit by digit, which num2words does not do for every language.
            point = self._num2words(0.5, lang=self._code).split()[1]
            words = " ".join([self._say(int(whole)), point, *(self._say(int(digit)) for digit in fraction)])
        elif len(number) == 4 and 1100 <= int(number) < 2100 and not (2000 <= int(number) < 2010):
            words = self._num2words(int(number), lang=self._code, to="year")
        else:
            words = self._say(int(whole))
        if negative:
            words = f"{self._num2words(-1, lang=self._code).split()[0]} {words}"
        return words

    def _say(self, number: int) -> Any:
        return self._num2words(number, lang=self._code).replace(",", "")
