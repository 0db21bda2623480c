from __future__ import annotations

import pytest

from revox.render.errors import RenderError
from revox.render.script import HEADING_PAUSE, PARAGRAPH_PAUSE, Music, read_script

YAML = """
title: Morning
voices:
  Ada: neutral_female
  Bob: {voice: neutral_male, seed: 3}
gap: 0.5
music: {file: bed.mp3, duck: 9}
script:
  - chapter: One
  - Ada: Good morning.
  - Bob: No
  - pause: 1.5
  - {speaker: Ada, text: "Ten: five.", voice: pt_male, cfg: 1.4, pause: 0}
"""


def written(tmp_path, text, name="script.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_says_who_speaks_what_in_which_voice_and_when(tmp_path):
    script = read_script(written(tmp_path, YAML), {})
    first, second, third = script.segments
    assert (script.title, script.gap) == ("Morning", 0.5)
    assert (first.number, first.where, first.speaker, first.chapter) == (1, "entry 2", "Ada", "One")
    assert second.text == "No", "a word, not a value of YAML"
    assert (second.voice.voice, second.voice.seed, second.pause) == ("neutral_male", 3, 1.5)
    assert (third.voice.voice, third.voice.cfg, third.pause) == ("pt_male", 1.4, 0.0)
    assert third.chapter is None
    assert script.music == Music(file=str((tmp_path / "bed.mp3").resolve()), duck=9)


def test_the_command_line_replaces_voices_and_lends_one_to_those_without(tmp_path):
    script = read_script(
        written(tmp_path, YAML.replace("  Ada: neutral_female\n", "")), {"Bob": "de_male"}, "fr_male"
    )
    assert [one.voice.voice for one in script.segments] == ["fr_male", "de_male", "pt_male"]
    assert script.segments[1].voice.seed == 3


def test_lines_have_names_headings_pauses_and_what_goes_on_below(tmp_path):
    text = (
        "# One\nADA: Good morning.\nIt is late.\n\nO'Neil Jr: Ten: five.\n[pause:1500ms]\n# Two\n"
        "ADA: Good night.\n"
    )
    script = read_script(written(tmp_path, text, "talk.txt"), {"ADA": "a", "O'Neil Jr": "b"})
    assert [(one.speaker, one.text, one.chapter, one.pause, one.where) for one in script.segments] == [
        ("ADA", "Good morning.\nIt is late.", "One", None, "line 2"),
        ("O'Neil Jr", "Ten: five.", None, 1.5, "line 5"),
        ("ADA", "Good night.", "Two", None, "line 8"),
    ]


def test_a_chapter_is_read_block_by_block_in_one_voice(tmp_path):
    text = "# Title\n\nAda: said *nothing*.\nAnd left.\n\n---\n\n- one\n- two\n\n### Small\n\nEnd.\n"
    script = read_script(written(tmp_path, text, "chapter.md"), {}, "neutral_male")
    assert [(one.text, one.chapter, one.pause) for one in script.segments] == [
        ("# Title", "Title", HEADING_PAUSE),
        ("Ada: said *nothing*.\nAnd left.", None, None),
        ("- one\n- two", None, None),
        ("### Small", None, HEADING_PAUSE),
        ("End.", None, None),
    ]
    assert script.gap == PARAGRAPH_PAUSE
    assert {one.voice.voice for one in script.segments} == {"neutral_male"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a script"),
        ("- just\n- a list\n", "is not a script"),
        ("script:\n  - Ada: late: very\n", "line 2 is not YAML"),
        ("script:\n  - &a Ada: x\n  - *a\n", "references"),
        ("script:\n  - {Ada: x, Ada: y}\n", "stands twice"),
        ("script: []\n", "script"),
        ("script:\n  - Ada: ''\n", "entry 1 of script has no text"),
        ("script:\n  - pause: 3\n", "a pause comes after"),
        ("script:\n  - Ada: x\n  - pause: long\n", "a pause is 0 to 60 seconds"),
        ("script:\n  - Ada: x\n  - pause: nan\n", "a pause is 0 to 60 seconds"),
        ("script:\n  - {Ada: x, Bob: y}\n", "entry 1 of script has Ada, Bob"),
        ("script:\n  - Ada: {x: y}\n", "valid string"),
        ("volume: 3\nscript:\n  - Ada: x\n", "volume"),
        ("music: {file: ../bed.mp3}\nscript:\n  - Ada: x\n", "outside the script's folder"),
        ("music: {file: /etc/passwd}\nscript:\n  - Ada: x\n", "outside the script's folder"),
        ("script:\n  - Eve: x\n", "--voice 'Eve=VOICE'"),
        ("script:\n  - {speaker: Ada, text: x, seed: much}\n", "entry 1: seed"),
        ("[" * 2000, "nested too deeply"),
    ],
)
def test_what_is_not_a_script_is_refused_in_a_sentence_that_says_where(tmp_path, text, sentence):
    with pytest.raises(RenderError, match=r"script\.yaml") as refused:
        read_script(written(tmp_path, text), {"Ada": "neutral_female"})
    assert sentence in str(refused.value)


def test_lines_that_nobody_says_and_empty_files_are_refused(tmp_path):
    with pytest.raises(RenderError, match=r"line 2: nobody says 'Good morning\.'"):
        read_script(written(tmp_path, "\nGood morning.\nADA: Hello.", "a.txt"), {"ADA": "a"})
    with pytest.raises(RenderError, match="nothing to speak"):
        read_script(written(tmp_path, "---\n", "a.md"), {}, "a")
    with pytest.raises(RenderError, match="cannot be read"):
        read_script(tmp_path / "missing.yaml", {})
