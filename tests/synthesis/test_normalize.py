from __future__ import annotations

import time

import pytest

from revox.synthesis.errors import SpeakError
from revox.synthesis.longform import SpeechSettings, language_of, pieces_of
from revox.synthesis.normalize import LONGEST_PAUSE, load_lexicon, normalize_text


def plain(text, **options):
    return " | ".join(piece.text for piece in normalize_text(text, **options))


PROSE = [
    "Good morning. How are you?",
    "One. Two,  three!\nA new line - with a dash; 3.14 (and 2 + 2 = 4), 50 % of it: $5, a/b, #1?",
    "« Bonjour ! » dit-il. “Yes,” she said – ‘no’ …",
    "今日は。「元気？」 नमस्ते। كيف حالك؟ क्\u200dष",
    "It is 5 < 6 and 7 > 3, R&D, snake_case and 2 * 3 * 4.",
    "1986 was a year. I have 2.\n\nA second paragraph",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_not_changed(text):
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# The **big** title\n\nText", "The big title.\n\nText"),
        ("- one\n- *two*!\n1. three\n2. four", "one.\ntwo!\n\n1. three.\n2. four."),
        ("Take `code`, ~~not~~ __this__ and [that](https://example.org/x).", "Take code, not this and that."),
        ("> quoted\n\n---\n\n![A dog](dog.png) barks", "quoted\n\nA dog barks"),
        ("| Name | Age |\n|---|:-:|\n| Ada | 36 |", "Name, Age.\n\nAda, 36."),
        ("```python\nprint(1)\n```", "print(1)"),
        (
            "See https://www.example.org/a/b?c=d#e. Or www.revox.dev, ok?",
            "See example.org. Or revox.dev, ok?",
        ),
        ("Well done 👍🏽! ❤️ Bye 👨‍👩‍👧 🇫🇷", "Well done! Bye"),
        ("❝Yes❞ he\u00adsaid\u200b", '"Yes" hesaid'),
        ("<speak><p>Hello <emphasis level='strong'>you</emphasis></p></speak>", "Hello you"),
        ('<sub alias="World Wide Web">WWW</sub> rules', "World Wide Web rules"),
        ("Salt &amp; pepper<br/>now", "Salt & pepper\nnow"),
        ("## 見出し\n\nनमस्ते", "見出し。\n\nनमस्ते"),
        ("---", ""),
        ("👍", ""),
        ("[Anna]: Ja.\n[Ben]: Nein.", "[Anna]: Ja.\n[Ben]: Nein."),
        ("**Answer:**\n\n42.", "Answer:\n\n42."),
        ("A box of **10*20*30** cm, $5*2", "A box of 10*20*30 cm, $5*2"),
        (
            "1. Install:\n   ```\n   pip install x\n   ```\n2. Run it.",
            "1. Install:\npip install x\n2. Run it.",
        ),
        ("1. ```\n   run\n   ```\n2. Then.", "1. run\n2. Then."),
        ("See https://example.org/a—it works.", "See example.org—it works."),
        ("请访问https://example.org/help，谢谢。再见", "请访问example.org，谢谢。再见"),
        ("if x<a or y>b then **stop**", "if x<a or y>b then stop"),
        ('<p class="x" >Hi <b>you</b></p>', "Hi you"),
    ],
)
def test_markup_urls_and_emoji_are_taken_out(text, expected):
    assert plain(text) == expected
    assert plain(text, how="none") == text


@pytest.mark.parametrize(
    ("mark", "seconds"),
    [
        ("[pause:1s]", 1.0),
        ("[pause: 250ms]", 0.25),
        ("[PAUSE 1.5s]", 1.5),
        ("[pause]", 0.4),
        ('<break time="500ms"/>', 0.5),
        ("<break time='2s'></break>", 2.0),
        ('<break strength="x-strong"/>', 1.0),
        ("<break/>", 0.4),
        ("[pause:3600s]", LONGEST_PAUSE),
    ],
)
def test_pauses_are_silence_between_pieces(mark, seconds):
    pieces = normalize_text(f"One. {mark} Two.")
    assert [piece.text.strip() for piece in pieces] == ["One.", "Two."]
    assert pieces[0].pause == pytest.approx(seconds)
    assert plain(f"One. {mark}", how="none") == f"One. {mark}"


def test_pieces_of_a_text_have_its_pauses_and_are_no_longer_than_allowed():
    text = "[pause:2s]One two three. Four five six.[pause:1s] **Seven**"
    pieces = pieces_of(text, SpeechSettings(max_chars=20))
    assert [piece.text for piece in pieces] == ["", "One two three.", "Four five six.", "Seven"]
    assert [piece.pause for piece in pieces] == [2.0, 0.25, 1.0, 0.0]


@pytest.mark.parametrize("text", ["👍", "---", "[pause:1s]"])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(SpeakError, match="at least one word"):
        pieces_of(text, SpeechSettings())


def test_a_lexicon_replaces_whole_words_in_their_case_or_in_any(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# comment\n\nsql\tsequel\nIT = I T\nNew York = Noo York\n")
    lexicon = load_lexicon(file)
    assert lexicon == {"sql": "sequel", "IT": "I T", "New York": "Noo York"}
    text = "SQL in New York: it is IT, not sqlite."
    assert plain(text, lexicon=lexicon) == "sequel in Noo York: it is I T, not sqlite."
    assert plain(text, lexicon=lexicon, how="none") == "sequel in Noo York: it is I T, not sqlite."


@pytest.mark.parametrize("line", ["sql", "= sequel", "sql ="])
def test_a_line_that_is_not_an_entry_is_refused_by_its_number(tmp_path, line):
    file = tmp_path / "words.txt"
    file.write_text(f"a = b\n{line}\n")
    with pytest.raises(SpeakError, match="line 2"):
        load_lexicon(file)
    with pytest.raises(SpeakError, match="cannot be read"):
        load_lexicon(tmp_path / "none.txt")


def test_another_normalization_is_refused():
    with pytest.raises(SpeakError, match="basic, full, none"):
        normalize_text("a", "all")


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "At 9:30, 9:05 or 12:00", "At nine thirty, nine oh five or twelve o'clock"),
        ("en", "In 1984 he paid $5, $12.50 and £1,234.", "In nineteen eighty-four he paid five dollars, "
         "twelve dollars fifty and one thousand two hundred and thirty-four pounds."),
        ("en", "$3.5 billion, £5m, US$ 2k and a $5 million deal for a $1 bill: 5 m", "three point five "
         "billion dollars, five million pounds, two thousand US dollars and a five million dollar deal for a "
         "one dollar bill: five meters"),
        ("de", "1 €, 1 Mrd. $ und 3,5 Mio. €", "ein Euro, eine Milliarde Dollar und drei Komma fünf "
         "Millionen Euro"),
        ("fr", "1 £, 2 millions € et 2 Md$", "une livre, deux millions d'euros et deux milliards de dollars"),
        ("nl", "1 € en 2 mln €", "één euro en twee miljoen euro"),
        ("es", "1,25 € y 2 mil €", "un euro veinticinco y dos mil euros"),
        ("en", "50% of 3.14, the 21st, -5", "fifty percent of three point one four, the twenty-first, "
         "minus five"),
        ("en", "room 007, 555-1234, v1.2.3, 3D, a/5", "room zero zero seven, 555-1234, v1.2.3, 3D, a/5"),
        ("de", "Um 9:30 Uhr: 1.234,5 und 3,50 €", "Um neun Uhr dreißig: eintausendzweihundertvierunddreißig "
         "Komma fünf und drei Euro fünfzig"),
        ("fr", "À 9:30, 1 234,5", "À neuf heures trente, mille deux cent trente-quatre virgule cinq"),
        ("en", "1 km, 2.5 km at 90 km/h, -5 °C, 1,500 kWh, 16GB, 3-5 m; 5 in, 9 m/s", "one kilometer, two "
         "point five kilometers at ninety kilometers per hour, minus five degrees Celsius, one thousand "
         "five hundred kilowatt-hours, sixteen gigabytes, 3-5 meters; five in, nine m/s"),
        ("de", "2,5 km mit 100 km/h bei 20 °C, 30 kWh", "zwei Komma fünf Kilometer mit einhundert Kilometer "
         "pro Stunde bei zwanzig Grad Celsius, dreißig Kilowattstunden"),
        ("fr", "2 km et 1 l", "deux kilomètres et un litre"),
        ("es", "3,5 % a las 9:05", "tres punto cinco por ciento a las nueve y cinco"),
        ("en", "−5 °C, -5%, 3:00 PM and 3:30 p.m.", "minus five degrees Celsius, minus five percent, three "
         "PM and three thirty p.m."),
        ("de", "12\u202f000 Euro, 1 km, 1 %, 1:30", "zwölftausend Euro, ein Kilometer, ein Prozent, ein Uhr "
         "dreißig"),
        ("es", "1\u00a0234\u00a0567 a la 1:30, 1 km", "un millón doscientos treinta y cuatro mil quinientos "
         "sesenta y siete a la una y treinta, un kilómetro"),
        ("fr", "1:30, 21:00", "une heure trente, vingt et une heures"),
        ("pt", "às 2:30", "às duas e trinta"),
        ("en", "1" * 30 + " m", " ".join(["one"] * 30) + " m"),
    ],
)  # fmt: skip
def test_numbers_are_spelled_in_the_voices_language(language, text, spoken):
    assert plain(text, how="full", language=language) == spoken


def test_a_text_of_white_space_costs_little():
    started = time.process_time()
    plain("\n" * 4000 + "a *b*")
    assert time.process_time() - started < 0.5


def test_numbers_of_a_language_without_words_are_refused():
    with pytest.raises(SpeakError, match="use text normalization basic"):
        normalize_text("3", "full", language="hi")
    assert language_of("de_male") == "de"
    assert language_of("neutral_male") == language_of("ada") == "en"
