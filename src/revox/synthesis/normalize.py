"""Text as people and language models write it -> text to read aloud: no markup, no emoji, pauses as silence.

"basic" changes only what is not words: Markdown, HTML and SSML tags, URLs, emoji, decorative quotation marks,
`[pause:1s]`. Plain prose comes out as it is. "full" spells numbers as well (`revox.synthesis.numbers`),
"none" changes nothing. A lexicon applies to all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from revox.speech.files import read_text
from revox.synthesis.errors import SpeakError
from revox.synthesis.numbers import spell_numbers
from revox.synthesis.split import TextPiece

if TYPE_CHECKING:
    from markdown_it.token import Token

Normalization = Literal["basic", "full", "none"]
NORMALIZATIONS = ("basic", "full", "none")
LONGEST_PAUSE = 10.0

_PAUSE = re.compile(
    r"\[pause(?:\s*[:= ]\s*(?P<time>\d+(?:\.\d+)?)\s*(?P<unit>ms|s)?)?\s*\]"
    r"|<break\b(?P<attributes>[^<>]*)>(?:\s*</break\s*>)?",
    re.IGNORECASE,
)
_BREAK_TIME = re.compile(r"\btime\s*=\s*[\"']?\s*\+?(\d*\.?\d+)\s*(ms|s)", re.IGNORECASE)
_BREAK_STRENGTH = re.compile(r"\bstrength\s*=\s*[\"']?([a-z-]+)", re.IGNORECASE)
STRENGTHS = {"none": 0.0, "x-weak": 0.1, "weak": 0.2, "medium": 0.4, "strong": 0.7, "x-strong": 1.0}
"""Seconds of SSML's strengths of a break, which the standard leaves open."""

_SUBSTITUTE = re.compile(
    r"<sub\b[^<>]*\balias\s*=\s*[\"']([^\"'<>]*)[\"'][^<>]*>[^<>]*</sub\s*>", re.IGNORECASE
)
_LINE_TAG = re.compile(r"<(?:br|/p|/s|/li|/h[1-6]|/div|/tr)\s*/?>", re.IGNORECASE)
_TAG = re.compile(  # `x < a or y > b` is no tag
    r"</?(?:speak|p|s|w|token|emphasis|prosody|say-as|phoneme|voice|lang|audio|mark|sub|sup|desc|lexicon|"
    r"b|i|u|em|strong|del|ins|code|pre|span|div|a|ul|ol|li|h[1-6]|table|tr|td|th|img|small|blockquote)"
    r"(?:\s+[\w:-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s<>\"']+))*\s*/?>",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"[*_`~#>|\[\]\\&]|^[ \t]*(?:[-+]|\d+[.)])\s|^[ \t]*(?:[-=][ \t]*){3,}$", re.MULTILINE)
_TIMES_SIGN = re.compile(r"(?<=\d)\*(?=\d)")
_TABLE_ROW = re.compile(r"^[ \t]*\|(.*)\|[ \t]*$", re.MULTILINE)
_NOT_IN_URLS = r"\s<>()\[\]\"'，。、；：！？؟।॥…—“”„»«「」『』（）"
_URL = re.compile(
    rf"(?:https?://(?:www\.)?|www\.)([^/?#{_NOT_IN_URLS}]+)(?:[/?#][^{_NOT_IN_URLS}]*)?", re.IGNORECASE
)
_EMOJI = re.compile(
    "(?:[\U0001f000-\U0001faff\u2600-\u27bf\u2b05-\u2b55\u23e9-\u23fa\u231a\u231b]"
    "[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*\u200d?)+|[0-9#*]\ufe0f?\u20e3"
)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u275d\u275e\u301d\u301e\u201f\uff02\u2e42", '"'),
        **dict.fromkeys("\u275b\u275c\u201b", "'"),
        **dict.fromkeys("\u200b\ufeff\u00ad\u2060\ufe0f", ""),
    }
)
_SPACES = str.maketrans(dict.fromkeys("\u00a0\u202f\u2007", " "))  # they may group the digits of a number
_STOPPED = re.compile(r"[.!?…:;,。．！？；：।॥؟۔][\"'”’»)\]」』）】]*$")


def normalize_text(
    text: str,
    how: Normalization = "basic",
    lexicon: Mapping[str, str] | None = None,
    language: str = "en",
) -> list[TextPiece]:
    """Stretches of text to speak, each with the silence that was asked for after it, 10 s at most.

    A stretch may be empty, where text begins with a pause. Raises SpeakError on another `how`, and on a
    language whose numbers cannot be spelled.
    """
    if how not in NORMALIZATIONS:
        raise SpeakError(f"text normalization {how!r} is not offered; give {', '.join(NORMALIZATIONS)}")
    if how == "none":
        return [TextPiece(_pronounced(text, lexicon))]
    pieces, start = [], 0
    for match in _PAUSE.finditer(text):
        pieces.append(TextPiece(_plain(text[start : match.start()], lexicon), _pause_seconds(match)))
        start = match.end()
    pieces.append(TextPiece(_plain(text[start:], lexicon)))
    if how == "full":
        pieces = [TextPiece(spell_numbers(piece.text, language), piece.pause) for piece in pieces]
    pieces = [TextPiece(piece.text.translate(_SPACES), piece.pause) for piece in pieces]
    return [piece for piece in pieces if piece.text.strip() or piece.pause]


def load_lexicon(path: str | os.PathLike[str]) -> dict[str, str]:
    """A pronunciation table: lines of a word or phrase, a tab or `=`, and how to write it so that it is read
    rightly. Lines that are empty or begin with `#` are left out. Raises SpeakError.
    """
    table = {}
    for number, line in enumerate(read_text(path, SpeakError).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        written, separator, spoken = line.partition("\t" if "\t" in line else "=")
        if not separator or not written.strip() or not spoken.strip():
            raise SpeakError(
                f"{path}, line {number}, is not `written = spoken`; give a word, a tab or =, and how to "
                "write it to be read rightly"
            )
        table[written.strip()] = spoken.strip()
    return table


def _pause_seconds(match: re.Match[str]) -> float:
    attributes = match["attributes"]
    if attributes is None:
        seconds = float(match["time"] or STRENGTHS["medium"])
        seconds *= 0.001 if (match["unit"] or "").lower() == "ms" else 1
    elif time := _BREAK_TIME.search(attributes):
        seconds = float(time[1]) * (0.001 if time[2].lower() == "ms" else 1)
    else:
        strength = _BREAK_STRENGTH.search(attributes)
        seconds = STRENGTHS.get(strength[1].lower() if strength else "medium", STRENGTHS["medium"])
    return min(seconds, LONGEST_PAUSE)


def _plain(text: str, lexicon: Mapping[str, str] | None) -> str:
    plain = text.translate(_CHARACTERS) if not text.isascii() else text
    if "<" in plain:
        plain = _TAG.sub("", _LINE_TAG.sub("\n", _SUBSTITUTE.sub(r"\1", plain)))
    plain = _URL.sub(_host, _TABLE_ROW.sub(_row, plain))
    if _MARKDOWN.search(plain):
        plain = _without_markdown(plain)
    if not plain.isascii():
        plain = _EMOJI.sub("", plain)
    if plain != text:
        plain = re.sub(r"[ \t]+", " ", plain)
        plain = re.sub(r" +([.,!?;:])(?=\s|$)", r"\1", plain)
        plain = re.sub(r" *\n *", "\n", plain).strip()
    return _pronounced(plain, lexicon)


def _host(match: re.Match[str]) -> str:
    """A URL's host; the full stop of the sentence after it stays."""
    whole = match.group()
    end = whole[len(whole.rstrip(".,!?;:")) :]
    return match[1].rstrip(".,!?;:") + end


def _row(match: re.Match[str]) -> str:
    cells = [cell.strip() for cell in match[1].split("|")]
    if all(re.fullmatch(r":?-+:?", cell) for cell in cells):
        return ""
    return _with_stop(", ".join(cell for cell in cells if cell))


@cache
def markdown_parser() -> Any:
    """What reads the Markdown of texts: CommonMark with strikethrough, HTML as text."""
    from markdown_it import MarkdownIt

    # `[Anna]: Yes.` is a line of a script more often than the address of a link.
    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough").disable("reference")


def _without_markdown(text: str) -> str:
    """The text of a Markdown document: paragraphs apart by an empty line, headings and items with a stop."""
    text = _TIMES_SIGN.sub(r"\*", text)  # 10*20 cm is no emphasis
    return "\n\n".join(_blocks(markdown_parser().parse(text))).strip()


def _blocks(tokens: list[Token]) -> Iterator[str]:
    numbers: list[str | None] = []
    items: list[str] = []
    inside: list[str] = []
    for token in tokens:
        if token.nesting == 1:
            inside.append(token.type)
        elif token.nesting == -1:
            inside.pop()
        if token.type == "list_item_open":
            numbers.append(token.info + token.markup if token.info else None)
        elif token.type == "list_item_close":
            if number := numbers.pop():  # nothing followed it: it is what is said
                items.append(_with_stop(number))
        elif token.type in ("fence", "code_block"):
            if numbers:
                number, numbers[-1] = numbers[-1], None
                items.append(f"{number or ''} {token.content}".strip())
                continue
            yield token.content.strip()
        elif token.type == "inline":
            block = "".join(_inline(token.children or []))
            if numbers or "heading_open" in inside:
                if numbers and numbers[-1]:
                    block, numbers[-1] = f"{numbers[-1]} {block}", None
                block = _with_stop(block)
            if numbers:
                items.append(block)  # a list's lines stay together
                continue
            yield block
        if items and not numbers and token.type.endswith("list_close"):
            yield "\n".join(items)
            items.clear()


def _inline(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type in ("softbreak", "hardbreak"):
            yield "\n"
        else:
            yield token.content  # of an image, its description


def _with_stop(line: str) -> str:
    if not line or _STOPPED.search(line):
        return line
    last = line[-1]
    stop = "।" if "\u0900" <= last <= "\u097f" else "。" if "\u3040" <= last <= "\u9fff" else "."
    return line + stop


def _pronounced(text: str, lexicon: Mapping[str, str] | None) -> str:
    """With the lexicon's words replaced: whole words, in the given case unless an entry is all lower case."""
    if not lexicon:
        return text
    longest = sorted(lexicon, key=len, reverse=True)
    exact = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in longest), re.IGNORECASE)

    def spoken(match: re.Match[str]) -> str:
        word = match.group()
        return lexicon.get(word, lexicon.get(word.lower(), word))

    return exact.sub(spoken, text)
