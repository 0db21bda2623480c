import pytest

from revox.find.errors import FindError
from revox.find.subtitles import read_monologues


def test_cues_are_joined_over_gaps_and_apart_where_somebody_else_begins(tmp_path):
    file = tmp_path / "film.srt"
    file.write_text(
        "1\n00:00:01,000 --> 00:00:03,500\n<i>The letters</i> are\n\n"
        "2\n00:00:04,000 --> 00:00:06,000\non the table.\n\n"
        "3\n00:00:09,000 --> 00:00:10,000\nAfter a gap.\n\n"
        "4\n00:00:10,200 --> 00:00:12,000\n- Another one.\n\n"
        "5\n00:00:12,100 --> 00:00:13,000\n- Who?\n- Me.\n\n"
        "6\n00:00:13,100 --> 00:00:14,000\n[door slams]\n\n"
        "7\n01:00:00,000 --> 01:00:02,000\n{\\an8}The end (sighs).\n"
    )
    found = read_monologues(file)
    assert [(one.start, one.end, one.text) for one in found] == [
        (1.0, 6.0, "The letters are on the table."),
        (9.0, 10.0, "After a gap."),
        (10.2, 12.0, "Another one."),
        (3600.0, 3602.0, "The end ."),
    ]
    assert found[0].words == 6


def test_web_subtitles_with_settings_notes_and_short_times(tmp_path):
    file = tmp_path / "film.vtt"
    file.write_text(
        "WEBVTT\n\nNOTE made by hand\n\nintro\n00:01.000 --> 00:02.000 align:start position:0%\nHello\n\n"
        "00:02.500 --> 00:04.000\n>> Good day.\n"
    )
    assert [(one.start, one.end, one.text) for one in read_monologues(file)] == [
        (1.0, 2.0, "Hello"),
        (2.5, 4.0, "Good day."),
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("Hello", "no cues"), ("1\n00:00:01,000 --> 00:00:02,000\n♪\n", "no speech")]
)
def test_a_file_without_speech_is_a_sentence(tmp_path, text, message):
    (tmp_path / "film.srt").write_text(text)
    with pytest.raises(FindError, match=message):
        read_monologues(tmp_path / "film.srt")


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(FindError, match="cannot be read"):
        read_monologues(tmp_path / "film.srt")
