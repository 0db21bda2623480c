from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys

import numpy as np
import pytest

from revox.cli import doctor_command, main
from revox.cli.marked import who_signs
from revox.doctor.findings import DoctorReport
from revox.marking import verify_bytes
from revox.speech import Audio, read_audio

SENTENCE = "ten to five"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("REVOX_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def revox(monkeypatch, capfdbinary, tiny_checkpoint):
    """`revox speak` or `revox verify` with these arguments, in this process."""
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("speak", "verify")})

    def run(command, *arguments):
        if command == "speak":
            usual = ("--checkpoint", tiny_checkpoint, "--voice", "pt_male", "--seed", 3)
            usual = (*usual, "--max-seconds", 0.64)
            arguments = (SENTENCE, *usual, *arguments)
        monkeypatch.setattr(sys, "argv", ["revox", command, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        capfdbinary.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, said = capfdbinary.readouterr()
        assert b"Traceback" not in said
        return code, out, said.decode()

    return run


def logged(state) -> list[dict]:
    return [json.loads(line) for line in (state / "marked.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.opus", "a.aac", "a.m4a"])
def test_what_speak_writes_verify_knows_and_the_log_has(name, revox, tmp_path, state):
    code, _, said = revox("speak", "-o", tmp_path / name)
    assert code == 0, said
    assert "marked as synthetic" in said.splitlines()[-1]
    code, out, said = revox("verify", tmp_path / name)
    assert code == 0, said
    assert "Marked as synthetic" in out.decode()
    assert "voice pt_male" in out.decode()
    (line,) = logged(state)
    assert line["voice"] == "pt_male"
    assert line["mark"] == ("tags" if name in ("a.opus", "a.aac") else "manifest")
    import hashlib

    assert line["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert "text" not in line
    assert SENTENCE not in (tmp_path / "state" / "marked.jsonl").read_text()


def test_a_changed_file_is_exit_1_and_an_unmarked_one_3(revox, tmp_path):
    revox("speak", "-o", tmp_path / "a.wav")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "b.wav").write_bytes(data)
    code, out, said = revox("verify", tmp_path / "b.wav")
    assert (code, said) == (1, "")
    assert "changed after it was signed" in out.decode()
    assert "The sound was changed" in out.decode()
    revox("speak", "--no-mark", "-o", tmp_path / "c.wav")
    code, out, said = revox("verify", tmp_path / "c.wav")
    assert (code, said) == (3, "")
    assert "no mark" in out.decode()
    code, out, said = revox("verify", tmp_path / "none.wav")
    assert (code, out, len(said.splitlines())) == (2, b"", 1)


def test_json_has_the_same_verdict(revox, tmp_path):
    revox("speak", "-o", tmp_path / "a.mp3")
    code, out, _ = revox("verify", tmp_path / "a.mp3", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["file"], found["state"]) == ("a.mp3", "marked")
    assert found["manifest"]["intact"]
    assert found["manifest"]["own"]
    assert found["manifest"]["source_types"] == [
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    ]
    assert found["tag"]["sound"] is True
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[:-300])
    code, out, _ = revox("verify", tmp_path / "a.mp3", "--json")
    assert (code, json.loads(out)["state"]) == (1, "broken")


def test_no_mark_is_said_and_logged_and_changes_no_sample(revox, tmp_path, state):
    revox("speak", "-o", tmp_path / "marked.wav")
    code, _, said = revox("speak", "--no-mark", "-o", tmp_path / "bare.wav")
    assert code == 0
    assert "not marked as synthetic, because of --no-mark" in said
    assert [line["mark"] for line in logged(state)] == ["manifest", "none"]
    bare, marked = read_audio(tmp_path / "bare.wav"), read_audio(tmp_path / "marked.wav")
    assert np.array_equal(bare.samples, marked.samples)


def test_raw_samples_carry_no_mark_and_that_is_said_and_logged(revox, tmp_path, state):
    code, out, said = revox("speak", "-o", "-", "--format", "pcm")
    assert code == 0
    assert "no place for a mark" in said
    import hashlib

    (line,) = logged(state)
    assert (line["mark"], line["format"]) == ("none", "pcm")
    assert line["sha256"] == hashlib.sha256(out).hexdigest()


def test_the_text_is_logged_where_that_is_asked_for(revox, tmp_path, state):
    revox("speak", "--log-text", "-o", tmp_path / "a.wav")
    assert logged(state)[0]["text"] == SENTENCE


def test_standard_output_is_marked_too(revox):
    code, out, _ = revox("speak", "-o", "-")
    assert code == 0
    assert verify_bytes(out).manifest.own


def test_a_signing_certificate_that_cannot_be_read_is_said_before_anything_is_spoken(
    revox, tmp_path, monkeypatch
):
    monkeypatch.setattr("revox.load", lambda *_, **__: pytest.fail("the weights were read"))
    code, _, said = revox("speak", "--signing-certificate", tmp_path / "x.pem", "-o", tmp_path / "a.wav")
    assert (code, len(said.splitlines())) == (2, 1)
    monkeypatch.setenv("REVOX_SIGNING_CERTIFICATE", str(tmp_path / "x.pem"))
    monkeypatch.setenv("REVOX_SIGNING_KEY", str(tmp_path / "y.pem"))
    code, _, said = revox("speak", "-o", tmp_path / "a.wav")
    assert code == 2
    assert "x.pem cannot be read" in said


def test_without_a_place_for_a_key_speech_is_marked_by_tags_and_that_is_said(revox, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REVOX_STATE", str(tmp_path / "file"))
    code, _, said = revox("speak", "-o", tmp_path / "a.wav")
    assert code == 0
    assert "marked by tags only" in said
    assert "not logged" in said
    assert verify_bytes((tmp_path / "a.wav").read_bytes()).manifest is None


def test_without_the_libraries_speech_is_marked_by_tags_and_that_is_said_once(revox, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    code, _, said = revox("speak", "-o", tmp_path / "a.wav")
    assert code == 0
    assert said.count("tags only") == 1
    assert "revox[mark]" in said
    monkeypatch.delitem(sys.modules, "c2pa")
    assert verify_bytes((tmp_path / "a.wav").read_bytes()).tag.manifest is False


def test_what_a_voice_decodes_to_is_marked_like_speech_wherever_it_goes(
    tiny_checkpoint, tmp_path, state, monkeypatch, capfdbinary
):
    monkeypatch.setattr(main, "COMMANDS", {"voice": main.COMMANDS["voice"]})
    heard = {}
    for name in ("it.wav", "it.opus", "-"):
        out = name if name == "-" else str(tmp_path / name)
        arguments = ["voice", "decode", "it_male", "-c", str(tiny_checkpoint), "-o", out]
        monkeypatch.setattr(sys, "argv", ["revox", *arguments])
        capfdbinary.readouterr()
        with contextlib.suppress(SystemExit):
            main.main()
        piped = capfdbinary.readouterr().out
        heard[name] = piped if name == "-" else (tmp_path / name).read_bytes()
    lines = logged(state)
    for (name, data), line in zip(heard.items(), lines, strict=True):
        verdict = verify_bytes(data)
        assert verdict.state == "marked", name
        assert "voice it_male" in verdict.sentences[0]
        assert (line["voice"], line["model"]) == ("it_male", tiny_checkpoint.name)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["mark"] == ("tags" if name == "it.opus" else "manifest")


def test_the_doctors_sounds_are_marked(tiny_checkpoint, tmp_path, state):
    sound = Audio(np.full(2400, 0.1, np.float32), 24000)
    sounds = {"decoded": {"pt_male": sound}, "spoken": {"it_male": sound, "quiet": Audio([], 24000)}}
    report = DoctorReport("lab", {}, [], sounds=sounds)
    doctor_command._write_sounds(report, tmp_path / "sounds", str(tiny_checkpoint), who_signs())
    files = sorted((tmp_path / "sounds").iterdir())
    assert [file.name for file in files] == ["it_male.spoken.wav", "pt_male.decoded.wav"]
    for file in files:
        verdict = verify_bytes(file.read_bytes())
        assert verdict.state == "marked"
        assert verdict.manifest.says["voice"] == file.name.partition(".")[0]
    assert len(logged(state)) == 2
