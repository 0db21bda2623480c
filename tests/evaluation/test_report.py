from __future__ import annotations

import json
from html.parser import HTMLParser

from revox.evaluation.report import ClipScores, EvaluationReport, html, markdown, write_report
from revox.evaluation.tables import Cell, Column, Row, Table

WICKED = '<script>alert("x")</script> | a & b'


def report():
    columns = [
        Column("mel", "mel distance", "less"),
        Column("pesq", "PESQ", "more", unavailable="not installed"),
    ]
    rows = [
        Row("decoded", "subject", {"mel": Cell(0.5, 0.41, 0.6, 3)}),
        Row("noise", "floor", {"mel": Cell(2.0, 2.0, 2.0, 1)}),
        Row(WICKED, "floor"),
    ]
    clip = ClipScores(
        WICKED, "ada", "human", WICKED, {"decoded": [{"mel": 0.5, "transcript": WICKED}, {"mel": 0.6}]},
        {"decoded": "sounds/a.mp3"},
    )  # fmt: skip
    return EvaluationReport(
        "revox evaluate codec", {"clips": WICKED}, [Table("Codec", columns, rows, [WICKED])], [clip], [WICKED]
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_names_as_they_are_and_runs_none_of_them():
    page = Page(html(report()))
    assert "script" not in page.tags
    assert page.text.count(WICKED) >= 6  # fact, row, note, left out, clip's name, text, transcript
    assert page.sources == ["sounds/a.mp3"]
    assert "0.50 [0.41, 0.60]" in page.text
    assert "0.55" in page.text  # the clip's mean over seeds
    assert "not installed" in page.text


def test_markdown_tables_keep_their_columns_whatever_a_name_holds():
    text = markdown(report())
    table = [line for line in text.split("## Codec")[1].splitlines() if line.startswith("|")]
    bare = [line.replace("\\|", "") for line in table]
    assert len({line.count("|") for line in bare}) == 1
    assert "| decoded | 0.50 [0.41, 0.60] | not installed |" in table
    assert "| noise (floor) | 2.00 | not installed |" in table
    assert "<script>" not in text


def test_json_holds_every_figure(tmp_path):
    paths = write_report(report(), tmp_path)
    assert sorted(p.name for p in paths) == ["report.html", "report.json", "report.md"]
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["tables"][0]["rows"][0]["cells"]["mel"] == {
        "value": 0.5, "low": 0.41, "high": 0.6, "clips": 3, "seed_range": None
    }  # fmt: skip
    assert [s["mel"] for s in found["clips"][0]["rows"]["decoded"]] == [0.5, 0.6]
