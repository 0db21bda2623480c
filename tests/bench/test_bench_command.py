"""`revox bench` itself: exit codes, what runs before and after, the audition's page."""

from __future__ import annotations

import json

import pytest

from revox.cli.main import main
from revox.endpoints import SpeechAnswer


@pytest.fixture
def bench(made, monkeypatch, tmp_path, capsys):
    """Run the command on made endpoints; returns its exit code, what it printed, and the endpoints."""

    def run(*words, endpoints=None):
        opened = endpoints or [made()]
        monkeypatch.setattr("revox.endpoints.open_endpoints", lambda texts, keys: opened)
        arguments = [
            "revox",
            "bench",
            "http://made",
            "--n",
            "2",
            "--streams",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
        monkeypatch.setattr("sys.argv", [*arguments, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().err, opened

    return run


def test_a_sound_endpoint_passes(bench, tmp_path):
    code, _, opened = bench()
    assert code == 0
    assert opened[0].closed
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["failures"] == []
    assert {"revox", "commit", "python", "processor", "disk"} <= set(found["environment"])
    assert "/" not in found["environment"]["disk"]


def test_a_broken_limit_is_exit_code_1_and_a_mistake_2(bench, tmp_path):
    code, printed, _ = bench("--at-most", "first_audio.p50=0.05")
    assert code == 1
    assert "first_audio.p50 is 0.1" in printed
    code, printed, _ = bench("--at-most", "first_audio.p50@3=1", "--out", str(tmp_path / "b"))
    assert code == 2
    assert "--streams has no 3" in printed
    code, printed, _ = bench()
    assert code == 2
    assert "another run" in printed


def test_after_runs_whatever_happens(bench, made, tmp_path):
    log = tmp_path / "log"
    words = ("--before", f"echo before >> {log}", "--after", f"echo after >> {log}")
    assert bench(*words)[0] == 0

    def interrupted(query):
        return SpeechAnswer(None, message="lost")

    broken = made()
    broken.voices = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    assert bench(*words, "--out", str(tmp_path / "b"), endpoints=[broken])[0] == 130
    assert bench(*words, "--voices", "eve", "--out", str(tmp_path / "c"))[0] == 2
    assert log.read_text().split() == ["before", "after"] * 3
    assert (tmp_path / "b" / "report.json").exists()


def test_a_command_that_fails_is_a_sentence(bench, tmp_path):
    code, printed, opened = bench("--before", "exit 3", "--after", f"touch {tmp_path}/after")
    assert code == 2
    assert "--before ended with 3" in printed
    assert opened[0].asked == []
    assert (tmp_path / "after").exists()
    code, printed, _ = bench("--after", "exit 4", "--out", str(tmp_path / "not" / "yet"))
    assert code == 2
    assert "do by hand" in printed
    assert (tmp_path / "not" / "yet" / "report.json").is_file()


def test_an_audition_has_every_voice_on_a_page(bench, made, tmp_path):
    endpoint = made(name="<b>x</b>")
    endpoint.voices = lambda: ["ada", "../../etc", "<script>"]

    def tell(query):
        return SpeechAnswer(500, message="a & b") if query.voice == "<script>" else endpoint.answer(query)

    endpoint.tell = tell
    code, printed, _ = bench("--audition", "Good <morning>.", endpoints=[endpoint])
    assert code == 1
    assert "1 of 3 voices failed" in printed
    out = tmp_path / "out"
    sounds = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.wav"))
    assert sounds == ["_b_x__b_/001-ada.wav", "_b_x__b_/002-_.._etc.wav"]
    page = (out / "index.html").read_text()
    assert "Good &lt;morning&gt;." in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "status 500: a &amp; b" in page
    assert all(f'src="{sound}"' in page for sound in sounds)


def test_an_audition_is_written_over_an_audition_only(bench, made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    endpoint = made()
    code, printed, _ = bench("--audition", "-", endpoints=[endpoint])
    assert (code, "is not empty and holds no audition" in printed) == (2, True)
    assert (out / "index.html").read_text() == "mine"
    assert not endpoint.asked
    (out / "index.html").unlink()
    assert [bench("--audition", "-")[0] for _ in range(2)] == [0, 0]
