from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import revox
from revox.speech import read_audio

SENTENCE = "ten to five"


def speak(*arguments, stdin: bytes | None = None, environment: dict[str, str] | None = None):
    """`revox speak` as a user runs it: another process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    env.pop("REVOX_CHECKPOINT", None) if environment is None else None
    # Only this command: the whole application is tests/cli's business, not this file's.
    program = (
        "import sys, typer, revox.cli.main as m\n"
        "m.COMMANDS = {'speak': m.COMMANDS['speak'], 'voice': m.COMMANDS['voice']}\n"
        "m.main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "speak", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=env,
    )


def refused(done, *sentence: str) -> None:
    message = done.stderr.decode()
    assert done.returncode == 2, message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1, message
    for part in sentence:
        assert part in message


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    return revox.load(tiny_checkpoint, device="cpu").speak(SENTENCE, "pt_male", seed=5, max_seconds=1.2)


@pytest.fixture
def usual(tiny_checkpoint):
    return ["--checkpoint", tiny_checkpoint, "--voice", "pt_male", "--seed", 5, "--max-seconds", 1.2]


def test_a_wav_holds_what_the_library_speaks_and_the_figures_come_last(usual, tmp_path, expected):
    done = speak(SENTENCE, *usual, "-o", tmp_path / "out.wav")
    assert done.returncode == 0, done.stderr.decode()
    heard = read_audio(tmp_path / "out.wav")
    assert heard.rate == 24000
    np.testing.assert_allclose(heard.samples, np.clip(expected.samples, -1, 1), atol=2 / 32768)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert "out.wav: 1.20 s of speech in " in last
    assert "real-time factor" in last
    assert done.stdout == b""


@pytest.mark.parametrize("name", ["out.flac", "out.mp3", "out.opus", "out.aac", "out.m4a"])
def test_every_format_by_extension(usual, tmp_path, name, expected):
    done = speak(SENTENCE, *usual, "-o", tmp_path / name)
    assert done.returncode == 0, done.stderr.decode()
    heard = read_audio(tmp_path / name, rate=24000)
    # Lossy codecs pad; what matters is that the speech is in there, at its place and loudness.
    assert expected.seconds - 0.03 <= heard.seconds <= expected.seconds + 0.2
    assert heard.samples.std() == pytest.approx(expected.samples.std(), rel=0.25)


def test_pcm_goes_to_standard_output_while_it_is_spoken(usual, expected):
    done = speak(SENTENCE, *usual, "-o", "-", "--format", "pcm")
    samples = np.frombuffer(done.stdout, "<i2") / 32768
    np.testing.assert_allclose(samples, np.clip(expected.samples, -1, 1), atol=2 / 32768)
    assert b"standard output: 1.20 s" in done.stderr


def test_standard_output_is_wav_unless_told(usual, expected):
    done = speak(SENTENCE, *usual, "-o", "-")
    assert done.stdout[:4] == b"RIFF"
    assert read_audio(done.stdout).samples.shape == expected.samples.shape


def test_the_text_may_come_from_a_file_or_from_standard_input(usual, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + SENTENCE.encode() + b"\r\n")
    said = [
        speak(*usual, "-o", "-", *source, stdin=stdin).stdout
        for source, stdin in (
            ([SENTENCE], None),
            (["--file", file], None),
            (["-"], SENTENCE.encode() + b"\n"),
            (["--file", "-"], SENTENCE.encode()),
        )
    ]
    assert len(said[0]) > 1000
    assert said[1:] == said[:1] * 3


def test_the_checkpoint_may_come_from_the_environment(tiny_checkpoint, tmp_path):
    done = speak(
        SENTENCE, "--voice", "pt_male", "--seed", 5, "--max-seconds", 0.4, "-o", tmp_path / "out.wav",
        environment={"REVOX_CHECKPOINT": str(tiny_checkpoint)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_meeting_the_limit_is_said(usual, tmp_path):
    done = speak(SENTENCE, *usual, "-o", tmp_path / "out.wav")
    assert "stopped at --max-seconds 1.2: the model had not finished" in done.stderr.decode()


def test_mistakes_are_one_sentence_and_exit_2(tiny_checkpoint, tmp_path):
    good = {"--checkpoint": tiny_checkpoint, "--voice": "pt_male", "-o": tmp_path / "out.wav"}

    def attempt(*text, stdin: bytes | None = None, **changes):
        options = {
            **good,
            **{("-o" if k == "o" else f"--{k.replace('_', '-')}"): v for k, v in changes.items()},
        }
        return speak(*text, *(x for pair in options.items() for x in pair), stdin=stdin)

    refused(attempt(" "), "text is empty")
    refused(attempt("-", stdin=b""), "text is empty")
    refused(attempt("-", stdin=b"caf\xe9"), "standard input is not UTF-8 text (byte 4)")
    refused(attempt(), "there is no text")
    refused(attempt("a", file="b"), "given twice")
    refused(attempt(file=tmp_path / "nothing.txt"), "nothing.txt cannot be read")
    refused(attempt("a", voice="neutral_mail"), "neutral_male")
    refused(attempt("a" * 5000), "the text has 5000 tokens", "4096 positions", "in parts")
    refused(attempt("a", cfg=-1), "cfg -1 is out of range")
    refused(attempt("a", flow_steps=0), "0 flow steps are out of range")
    refused(attempt("a", max_seconds=0.01), "below one frame")
    refused(attempt("a", format="mp5"), "mp5")
    refused(attempt("a", o=tmp_path / "out.xyz"), "xyz")
    refused(attempt("a", o=tmp_path / "no" / "out.wav"), "there is no folder")
    refused(attempt("a", o=tmp_path), "is a folder")
    refused(attempt("a", checkpoint=tmp_path / "nowhere"), "nowhere")
    refused(attempt("a", device="warp"), "device 'warp' is not available")
    assert not (tmp_path / "out.wav").exists()
