"""`revox speak --batch`: each line is what it is alone; a second run speaks what is left."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import revox
import revox.api
from revox.cli import main
from revox.marking import verify_file
from revox.speech import Audio, read_audio

ROWS = [
    {"text": "ten to five", "voice": "pt_male", "seed": 3, "output": "first.wav"},
    {"text": "seven, eight", "voice": "neutral_male", "output": "second.flac"},
    {"text": "six"},
    {"text": "Five. Four!", "seed": 9},
]
OPTIONS = ("--voice", "de_male", "--seed", 1, "--takes", 1, "--max-seconds", 1.6)


@pytest.fixture
def speak(monkeypatch, capfd, tiny_checkpoint, tmp_path):
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("speak", "voice")})
    monkeypatch.setenv("COLUMNS", "4000")

    def run(*arguments, folder=tiny_checkpoint):
        given = ["revox", "speak", "-c", folder, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        capfd.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        err = capfd.readouterr().err
        assert "Traceback" not in err
        return SimpleNamespace(code=code, err=err)

    return run


@pytest.fixture
def table(tmp_path):
    def write(rows, name="lines.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def alone(checkpoint, text, voice, seed):
    tts = revox.load(checkpoint, device="cpu")
    return tts.speak(text, voice, seed=seed, takes=1, max_seconds=1.6, report=lambda warning: None).samples


def test_each_line_is_what_it_is_alone_and_is_marked(speak, table, tmp_path, tiny_checkpoint):
    done = speak("--batch", table(ROWS), *OPTIONS)
    assert done.code in (0, 4), done.err
    files = {
        "first.wav": ("ten to five", "pt_male", 3),
        "second.flac": ("seven, eight", "neutral_male", 1),
        "00003.wav": ("six", "de_male", 1),
        "00004.wav": ("Five. Four!", "de_male", 9),
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "batch.jsonl"])
    for name, line in files.items():
        heard = read_audio(tmp_path / "out" / name).samples
        expected = np.clip(alone(tiny_checkpoint, *line), -1, 1)
        assert len(heard) == len(expected), name
        np.testing.assert_allclose(heard, expected, atol=3e-3)
        found = verify_file(tmp_path / "out" / name)
        assert found.state == "marked"
        assert found.tag.says["voice"] == line[1]
    record = [json.loads(line) for line in (tmp_path / "out" / "batch.jsonl").read_text().splitlines()]
    assert {entry["output"] for entry in record} == set(files)
    warnings = sum(len(entry["warnings"]) for entry in record)
    assert done.err.count("warning: ") == warnings
    assert done.code == (4 if warnings else 0)


def test_csv_says_the_same_as_json(speak, table, tmp_path, tiny_checkpoint):
    csv = 'text,voice,seed,output\n"seven, eight",neutral_male,,a.wav\nsix,,7,\n'
    assert speak("--batch", table(csv, "lines.csv"), *OPTIONS).code in (0, 4)
    heard = read_audio(tmp_path / "out" / "a.wav").samples
    assert len(heard) == len(alone(tiny_checkpoint, "seven, eight", "neutral_male", 1))
    assert len(read_audio(tmp_path / "out" / "00002.wav").samples) == len(
        alone(tiny_checkpoint, "six", "de_male", 7)
    )


def test_a_second_run_speaks_what_is_left_or_has_changed(speak, table, tmp_path, monkeypatch):
    out = tmp_path / "out"
    speak("--batch", table(ROWS), *OPTIONS)
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    (out / "second.flac").unlink()
    changed = [{**ROWS[0], "text": "nine"}, *ROWS[1:]]
    again = speak("--batch", table(changed), *OPTIONS)
    assert "2 of 4 lines are spoken already" in again.err
    assert f"{out}: 2 files" in again.err
    now = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name for name in now if now[name] != first.get(name)} == {
        "first.wav", "second.flac", "batch.jsonl",
    }  # fmt: skip

    quantized = speak("--batch", table(changed), *OPTIONS, "--weights", "bf16")
    assert "spoken already" not in quantized.err
    speak("--batch", table(changed), *OPTIONS)

    refused = speak("--batch", table(changed), *OPTIONS, "--adapter", tmp_path / "none")
    assert (refused.code, "none/adapter_config.json is missing" in refused.err) == (2, True)

    monkeypatch.setattr(revox, "load", lambda *_, **__: pytest.fail("nothing is left to speak"))
    nothing = speak("--batch", table(changed), *OPTIONS)
    assert nothing.err.splitlines()[0] == "4 of 4 lines are spoken already"
    assert nothing.code == (4 if "warning: " in nothing.err else 0)


def test_a_second_run_names_the_bad_takes_of_the_first(speak, table, tmp_path):
    lines = table(ROWS[:2])
    speak("--batch", lines, *OPTIONS)
    record = tmp_path / "out" / "batch.jsonl"
    entries = [{**json.loads(line), "warnings": []} for line in record.read_text().splitlines()]
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert speak("--batch", lines, *OPTIONS).code == 0
    entries[0]["warnings"] = ["the end is missing"]
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    again = speak("--batch", lines, *OPTIONS)
    assert again.code == 4
    assert "2 of 2 lines are spoken already" in again.err
    assert f"warning: {entries[0]['output']}: the end is missing" in again.err


@pytest.mark.parametrize("name", ["lines.csv", "lines.jsonl"])
def test_a_line_ends_where_the_format_says(table, name):
    from revox.cli.speak_batch import _rows

    text = "one\u2028two\u0085three"
    rows = f"text,voice\n{text},it_male\n"
    if name.endswith("jsonl"):
        rows = json.dumps({"text": text, "voice": "it_male"}, ensure_ascii=False) + "\n"
    [(_, row)] = _rows(table(rows, name))
    assert (row.text, row.voice) == (text, "it_male")


def test_an_interrupted_run_keeps_what_it_wrote(speak, table, tmp_path, monkeypatch):
    from revox.cli import speak_batch

    write, written = speak_batch._write, []

    def stop_at_the_second(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(speak_batch, "_write", stop_at_the_second)
    assert speak("--batch", table(ROWS), *OPTIONS).code == 130
    monkeypatch.setattr(speak_batch, "_write", write)
    assert "1 of 4 lines are spoken already" in speak("--batch", table(ROWS), *OPTIONS).err


def test_a_line_without_a_sound_is_named_and_not_written(speak, table, tmp_path, monkeypatch):
    speak_batch = revox.api.Revox.speak_batch

    def first_is_silent(self, lines, **options):
        for spoken in speak_batch(self, lines, **options):
            empty = Audio(spoken.audio.samples[:0], spoken.audio.rate)
            yield replace(spoken, audio=empty) if spoken.number == 0 else spoken

    monkeypatch.setattr(revox.api.Revox, "speak_batch", first_is_silent)
    done = speak("--batch", table(ROWS[:2]), *OPTIONS)
    assert done.code == 4
    assert "first.wav: not written, the model ended at its first frame; allow more takes" in done.err
    assert not (tmp_path / "out" / "first.wav").exists()
    assert (tmp_path / "out" / "second.flac").exists()


@pytest.mark.parametrize(
    ("rows", "name", "sentence"),
    [
        ([{"text": "a", "voice": "neutral_mail"}], "a.jsonl", "did you mean neutral_male"),
        ([{"text": "a"}, {"text": " "}], "a.jsonl", "a.jsonl, line 2: the text is empty"),
        ([{"text": "a", "speed": 2}], "a.jsonl", "line 1: speed: Extra inputs are not permitted; lines have"),
        ([{"voice": "pt_male"}], "a.jsonl", "line 1: text: Field required"),
        ([{"text": "a", "seed": "x"}], "a.jsonl", "line 1: seed:"),
        ([{"text": "a", "output": "../a.wav"}], "a.jsonl", "'../a.wav' is not a plain file name"),
        ([{"text": "a", "output": "/tmp/a.wav"}], "a.jsonl", "is not a plain file name"),
        ([{"text": "a", "output": "a.xyz"}], "a.jsonl", "line 1: 'a.xyz' ends in '.xyz'"),
        ([{"text": "a", "output": "a.wav"}] * 2, "a.jsonl", "line 2 writes to a.wav, as line 1 does"),
        ("not json\n", "a.jsonl", "a.jsonl, line 1: Invalid JSON"),
        ("", "a.jsonl", "a.jsonl has no lines"),
        ("text;voice\na;b\n", "a.csv", "a.csv, line 2: text: Field required"),
        ("text\n", "a.txt", "a.txt is not a table that is read; end it in .csv or .jsonl"),
    ],
)
def test_what_cannot_be_spoken_is_said_before_anything_is(
    speak, table, tmp_path, monkeypatch, rows, name, sentence
):
    monkeypatch.setattr(revox, "load", lambda *_, **__: pytest.fail("the weights were read"))
    done = speak("--batch", table(rows, name), *OPTIONS)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_options_of_one_text_and_of_many_exclude_each_other(speak, table, tmp_path):
    lines = table(ROWS)
    assert "--file belongs to one text" in speak("--batch", lines, "--file", lines).err
    assert "TEXT belongs to one text" in speak("Hello.", "--batch", lines).err
    assert "--times belongs to one text" in speak("--batch", lines, "--times", "a.vtt").err
    assert "--out is the folder of --batch" in speak("Hello.", "--voice", "pt_male").err
    assert "names no voice; give it one, or all of them with --voice" in speak("--batch", lines).err
