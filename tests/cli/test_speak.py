from __future__ import annotations

import inspect
import io
import json
import sys
from typing import NamedTuple

import numpy as np
import pytest

import revox
from revox.cli import main, speak_command
from revox.speech import read_audio
from revox.synthesis.longform import SpeechSettings

SENTENCE = "ten to five"


class Done(NamedTuple):
    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture
def speak(monkeypatch, capfdbinary):
    """`revox speak` with these arguments, in this process."""
    # Only this command and none of the others' imports.
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("speak", "voice")})

    def run(*arguments, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["revox", "speak", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Done(code, *capfdbinary.readouterr())

    return run


def refused(done, *sentence: str) -> None:
    message = done.stderr.decode()
    assert done.returncode == 2, message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1, message
    for part in sentence:
        assert part in message


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    audio = revox.load(tiny_checkpoint, device="cpu").speak(
        SENTENCE, "pt_male", seed=3, takes=1, max_seconds=20
    )
    assert not audio.truncated, "the fixture should end by itself here"
    return audio


@pytest.fixture
def usual(tiny_checkpoint):
    return ["--checkpoint", tiny_checkpoint, "--voice", "pt_male", "--seed", 3, "--takes", 1]


def test_a_wav_holds_what_the_library_speaks_and_the_figures_come_last(speak, usual, tmp_path, expected):
    done = speak(SENTENCE, *usual, "-o", tmp_path / "out.wav")
    assert done.returncode == 0, done.stderr.decode()
    heard = read_audio(tmp_path / "out.wav")
    assert heard.rate == 24000
    np.testing.assert_allclose(heard.samples, np.clip(expected.samples, -1, 1), atol=2 / 32768)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert f"out.wav: {expected.seconds:.2f} s of speech in " in last
    assert "real-time factor" in last
    assert done.stdout == b""


def test_the_format_of_the_weights_is_chosen_and_named(speak, usual, tmp_path):
    last = {}
    for weights in ("auto", "int8"):
        done = speak("Hello.", *usual, "-o", tmp_path / "out.wav", "--weights", weights)
        assert done.returncode == 0, done.stderr.decode()
        last[weights] = done.stderr.decode().strip().splitlines()[-1]
    assert "(cpu, float32)" in last["auto"], "a small checkpoint is fastest in float32"
    assert "(cpu, int8)" in last["int8"]


@pytest.mark.parametrize("name", ["out.flac", "out.mp3", "out.opus", "out.aac", "out.m4a"])
def test_every_format_by_extension(speak, usual, tmp_path, name, expected):
    done = speak(SENTENCE, *usual, "-o", tmp_path / name)
    assert done.returncode == 0, done.stderr.decode()
    heard = read_audio(tmp_path / name, rate=24000)
    # Lossy codecs pad; what matters is that the speech is in there, at its place and loudness.
    assert expected.seconds - 0.03 <= heard.seconds <= expected.seconds + 0.2
    assert heard.samples.std() == pytest.approx(expected.samples.std(), rel=0.25)


def test_pcm_goes_to_standard_output_while_it_is_spoken(speak, usual, expected):
    done = speak(SENTENCE, *usual, "-o", "-", "--format", "pcm")
    samples = np.frombuffer(done.stdout, "<i2") / 32768
    np.testing.assert_allclose(samples, np.clip(expected.samples, -1, 1), atol=2 / 32768)
    assert f"standard output: {expected.seconds:.2f} s" in done.stderr.decode()


def test_standard_output_is_wav_unless_told(speak, usual, expected):
    done = speak(SENTENCE, *usual, "-o", "-")
    assert done.stdout[:4] == b"RIFF"
    assert read_audio(done.stdout).samples.shape == expected.samples.shape


def test_the_text_may_come_from_a_file_or_from_standard_input(speak, usual, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + SENTENCE.encode() + b"\r\n")
    said = [
        read_audio(speak(*usual, "-o", "-", *source, stdin=stdin).stdout).samples.tobytes()
        for source, stdin in (
            ([SENTENCE], b""),
            (["--file", file], b""),
            (["-"], SENTENCE.encode() + b"\n"),
            (["--file", "-"], SENTENCE.encode()),
        )
    ]
    assert len(said[0]) > 1000
    assert said[1:] == said[:1] * 3


def test_a_voice_that_is_not_there_is_said_before_the_weights_are_read(
    speak, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("revox.load", lambda *_, **__: pytest.fail("the weights were read"))
    done = speak(SENTENCE, "--voice", "pt_mal", "-c", tiny_checkpoint, "-o", tmp_path / "x.wav")
    refused(done, "did you mean pt_male")


def test_no_time_at_all_is_a_sentence(speak, tiny_checkpoint, tmp_path):
    options = ("-c", tiny_checkpoint, "-o", tmp_path / "x.wav", "--max-seconds=-inf")
    refused(speak(SENTENCE, "--voice", "pt_male", *options), "below one frame")


def test_the_checkpoint_may_come_from_the_environment(speak, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("REVOX_CHECKPOINT", str(tiny_checkpoint))
    done = speak(
        SENTENCE, "--voice", "pt_male", "--seed", 5, "--max-seconds", 0.4, "-o", tmp_path / "out.wav"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_meeting_a_limit_is_said(speak, usual, expected, tmp_path, monkeypatch):
    options = [*usual, "-o", tmp_path / "out.wav", "--max-seconds", expected.seconds - 0.08]
    said = speak(SENTENCE, *options).stderr.decode()
    assert f"stopped at --max-seconds {expected.seconds - 0.08:g}: the model had not finished" in said

    frames = round(expected.seconds * 12.5)
    monkeypatch.setattr("revox.synthesis.engine.MAX_FRAMES", frames - 1)
    done = speak(SENTENCE, *usual, "-o", "-")
    assert f"warning: piece 1 ('{SENTENCE}') did not end within" in done.stderr.decode()
    assert done.returncode == 4


def test_a_long_text_is_spoken_whole_and_what_goes_wrong_in_it_is_exit_code_4(speak, usual, tmp_path):
    # Random weights end when they like: every take of a sentence this long is too short or has no end.
    text = "He waited in the hall until the rain had stopped, and then he left. " * 12
    for target, format in ((tmp_path / "out.wav", "wav"), ("-", "pcm")):
        done = speak(text, *usual, "--max-chars", 200, "--max-seconds", 6, "-o", target, "--format", format)
        said = done.stderr.decode()
        assert done.returncode == 4, said
        assert "warning: piece 1 ('He waited" in said
        assert "parts of the text may be wrong: listen to them (--takes 3 speaks such pieces again)" in said
        assert "Traceback" not in said
    assert read_audio(tmp_path / "out.wav").seconds > 1


def test_markup_is_not_spoken_and_the_lexicon_is_unless_the_text_is_to_stay_as_it_is(
    speak, usual, tmp_path, expected
):
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("10 = ten\n5 = five\n")
    done = speak("**10** to 5", *usual, "--lexicon", lexicon, "-o", "-")
    assert read_audio(done.stdout).samples.shape == expected.samples.shape
    asis = speak("**10** to 5", *usual, "--text-normalization", "none", "--max-seconds", 1, "-o", "-")
    assert not np.array_equal(read_audio(asis.stdout).samples[:9600], expected.samples[:9600])


def test_the_options_defaults_are_the_librarys(speak):
    defaults = {
        name: one.default for name, one in inspect.signature(speak_command.command).parameters.items()
    }
    settings = SpeechSettings()
    for name, value in vars(settings).items():
        if name == "by_sentence":
            continue  # --times says so
        assert defaults[name] == value


def test_mistakes_are_one_sentence_and_exit_2(speak, tiny_checkpoint, tmp_path):
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
    refused(speak("a", "-c", tiny_checkpoint, "--voice", "pt_male"), "name a file with -o")
    refused(speak("a", "-c", tiny_checkpoint, "-o", tmp_path / "out.wav"), "name one with --voice")
    refused(attempt("a", file="b"), "given twice")
    refused(attempt(file=tmp_path / "nothing.txt"), "nothing.txt cannot be read")
    refused(attempt("a", voice="neutral_mail"), "neutral_male")
    refused(attempt("a", takes=0), "0 takes are out of range")
    refused(attempt("a", text_normalization="all"), "basic, full, none")
    refused(attempt("a", lexicon=tmp_path / "none.txt"), "none.txt cannot be read")
    refused(attempt("👍"), "text is empty")
    refused(attempt("a", max_chars=5), "pieces of 5 characters are out of range")
    refused(attempt("a", cfg=-1), "cfg -1 is out of range")
    refused(attempt("a", flow_steps=0), "0 flow steps are out of range")
    refused(attempt("a", max_seconds=0.01), "below one frame")
    refused(attempt("a", format="mp5"), "mp5")
    refused(attempt("a", o=tmp_path / "out.xyz"), "xyz")
    refused(attempt("a", o=tmp_path / "no" / "out.wav"), "there is no folder")
    refused(attempt("a", o=tmp_path), "is a folder")
    refused(attempt("a", checkpoint=tmp_path / "nowhere"), "nowhere")
    refused(attempt("a", device="warp"), "device 'warp' is not available")
    refused(attempt("a", adapter=tmp_path / "none"), "none/adapter_config.json is missing")
    assert not (tmp_path / "out.wav").exists()


# ------------------------------------------------------------------------------------------ sentence times

SENTENCES = "Ten to five. Seven, eight! And then?"


@pytest.mark.parametrize("ending", ["vtt", "srt", "json"])
def test_times_say_when_each_sentence_is_heard(speak, usual, tmp_path, tiny_checkpoint, ending):
    times = tmp_path / f"times.{ending}"
    done = speak(SENTENCES, *usual, "-o", tmp_path / "out.wav", "--times", times)
    assert done.returncode in (0, 4), done.stderr.decode()
    audio = read_audio(tmp_path / "out.wav").samples
    # Each sentence alone has the length that it has in the whole, from where the times say.
    tts, at, expected = revox.load(tiny_checkpoint, device="cpu"), 0.0, []
    for text in ("Ten to five.", "Seven, eight!", "And then?"):
        alone = tts.speak(text, "pt_male", seed=3, takes=1, report=lambda warning: None).samples
        expected.append((text, at, at + len(alone) / 24000))
        found = audio[round(24000 * at) : round(24000 * at) + len(alone)]
        # Levels are evened out, ends fade: the shape is the same.
        assert np.corrcoef(found[480:-480], alone[480:-480])[0, 1] > 0.999
        at += len(alone) / 24000 + 0.25
    assert len(audio) / 24000 == pytest.approx(at - 0.25)
    content = times.read_text()
    if ending == "json":
        read = [(entry["text"], entry["start"], entry["end"]) for entry in json.loads(content)]
    else:
        assert content.startswith("WEBVTT\n\n" if ending == "vtt" else "1\n00:00:00,000 --> ")
        cues = [block.splitlines()[-2:] for block in content.removeprefix("WEBVTT\n").strip().split("\n\n")]
        read = [(text, *map(_seconds, clocks.split(" --> "))) for clocks, text in cues]
    assert [text for text, _, _ in read] == [text for text, _, _ in expected]
    np.testing.assert_allclose([one[1:] for one in read], [one[1:] for one in expected], atol=6e-4)


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def test_a_cut_off_sentence_ends_where_the_file_does(speak, usual, tmp_path):
    times = tmp_path / "times.json"
    speak(SENTENCES, *usual, "-o", tmp_path / "out.wav", "--times", times, "--max-seconds", 2)
    heard = json.loads(times.read_text())
    assert heard[-1]["end"] == pytest.approx(read_audio(tmp_path / "out.wav").seconds)
    assert [entry["start"] for entry in heard] == sorted(entry["start"] for entry in heard)


def test_times_that_cannot_be_written_are_said_before_the_weights_are_read(
    speak, usual, tmp_path, monkeypatch
):
    monkeypatch.setattr("revox.load", lambda *_, **__: pytest.fail("the weights were read"))
    said = (SENTENCES, *usual, "-o", tmp_path / "out.wav", "--times")
    refused(speak(*said, tmp_path / "a.txt"), "a.txt cannot hold times", ".vtt, .srt or .json")
    refused(speak(*said, tmp_path / "no" / "a.vtt"), "there is no folder")
