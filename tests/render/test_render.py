from __future__ import annotations

import contextlib
import json
import sys
import tracemalloc
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from revox import load
from revox.checkpoint.errors import CheckpointError
from revox.cli import main
from revox.demo import checkpoint_folder
from revox.marking import new_record, verify_file, write_marked_parts
from revox.render.errors import RenderError
from revox.render.render import RenderSettings, render
from revox.render.script import Music, Script, Segment, SpeakerVoice
from revox.speech import Audio, loudness, read_audio, true_peak, write_audio
from revox.synthesis.longform import SpokenLine
from revox.synthesis.takes import TakeFault, TakeWarning

RATE = 24000
PLAY = """
title: Morning
voices: {Ada: neutral_female, Bob: {voice: neutral_male, seed: 3}}
script:
  - chapter: One
  - Ada: Good morning. It is ten to five.
  - Bob: It is half past nine.
  - chapter: Two
  - Ada: Good night.
"""


class Voices:
    """Speaks tones instead of words: the amplitude of each is in its text."""

    weights, adapter = "float32", None

    def __init__(self, folder, seconds: float = 3.0) -> None:
        self.folder, self.seconds, self.texts = folder, seconds, []

    def speak_batch(self, lines):
        for number, line in enumerate(lines):
            self.texts.append(line.text)
            bad = line.text.startswith("bad")
            warnings = [TakeWarning(1, line.text, TakeFault.LOOP, "repeats itself")] * bad
            # A cosine: it begins and ends at its full height, as a cut in the middle of a word does.
            at = np.arange(int(self.seconds * RATE)) / RATE if "silence" not in line.text else np.zeros(0)
            samples = float(line.text.split()[-1]) * np.cos(2 * np.pi * 440 * at)
            yield SpokenLine(number, Audio(samples.astype(np.float32), RATE), warnings, [])


def script(*lines: str, **options) -> Script:
    voices = {"Ada": SpeakerVoice(voice="neutral_female"), "Bob": SpeakerVoice(voice="neutral_male")}
    segments = [
        Segment(number, f"line {number}", name, text, voices[name])
        for number, (name, text) in enumerate((line.split(": ") for line in lines), 1)
    ]
    return Script(tuple(segments), **options)


def sound(rendering) -> np.ndarray:
    return np.concatenate([part.samples for part in rendering.parts()])


def test_every_speaker_is_as_loud_from_the_first_second_on(tiny_checkpoint, tmp_path):
    tts = Voices(tiny_checkpoint)
    loud_and_quiet = script("Ada: says 0.9", "Bob: says 0.003", "Ada: says 0.02", "Bob: says 0.3")
    rendering = render(tts, loud_and_quiet, RenderSettings(tmp_path))
    out = sound(rendering)
    assert len(out) == rendering.length
    for one in rendering.placed:
        assert loudness(out[one.start : one.end], RATE) == pytest.approx(-19, abs=0.3)
        first = loudness(out[one.start : one.start + RATE // 2], RATE)
        last = loudness(out[one.end - RATE // 2 : one.end], RATE)
        assert first == pytest.approx(last, abs=0.1), "the beginning is not eaten"
    assert rendering.loudness_of_speakers()["Ada"] == pytest.approx((-19, -19), abs=0.1)


def test_joints_have_no_clicks_and_gaps_are_as_long_as_asked(tiny_checkpoint, tmp_path):
    rendering = render(
        Voices(tiny_checkpoint), script("Ada: says 0.5", "Bob: says 0.5", gap=0.25), RenderSettings(tmp_path)
    )
    out = sound(rendering)
    first, second = rendering.placed
    assert second.start - first.end == RATE // 4
    assert not out[first.end : second.start].any()
    inside = np.abs(np.diff(out[RATE : 2 * RATE])).max()
    assert np.abs(np.diff(np.pad(out, 1))).max() <= 1.05 * inside


def test_an_edit_speaks_one_line_again_and_drops_the_old_one(tiny_checkpoint, tmp_path):
    tts, settings = Voices(tiny_checkpoint), RenderSettings(tmp_path, own_cache=True)
    render(tts, script("Ada: says 0.1", "Bob: says 0.2", "Ada: says 0.3"), settings)
    assert len(tts.texts) == 3
    changed = render(tts, script("Ada: says 0.1", "Bob: says 0.25", "Ada: says 0.3"), settings)
    assert tts.texts[3:] == ["says 0.25"]
    assert [one.cached for one in changed.placed] == [True, False, True]
    assert len(list(tmp_path.iterdir())) == 3
    sound(changed)
    other_voice = script("Bob: says 0.1", "Bob: says 0.25", "Ada: says 0.3")
    render(tts, other_voice, settings)
    assert tts.texts[4:] == ["says 0.1"]


def test_an_interrupted_script_goes_on_where_it_stopped(tiny_checkpoint, tmp_path):
    lines = ("Ada: says 0.1", "Bob: says 0.2", "Ada: says stop")
    tts = Voices(tiny_checkpoint)
    with pytest.raises(ValueError, match="stop"):
        render(tts, script(*lines), RenderSettings(tmp_path))
    render(tts, script(*lines[:2], "Ada: says 0.3"), RenderSettings(tmp_path))
    assert tts.texts[3:] == ["says 0.3"]


def test_a_segment_without_a_sound_costs_no_other(tiny_checkpoint, tmp_path):
    tts, lines = Voices(tiny_checkpoint), ("Ada: silence 0.1", "Bob: says 0.2", "Ada: says 0.3")
    for _ in range(2):
        with pytest.raises(RenderError, match=r"line 1.* came out without a sound"):
            render(tts, script(*lines), RenderSettings(tmp_path))
    assert tts.texts == ["silence 0.1", "says 0.2", "says 0.3", "silence 0.1"]


def test_segments_are_spoken_as_they_are_alone(tmp_path):
    tts = load(checkpoint_folder(), "cpu", torch.float32)
    play = script("Ada: Good morning.", "Bob: It is half past nine.", "Ada: Good night.")
    for one in render(tts, play, RenderSettings(tmp_path)).placed:
        alone = tts.speak(one.segment.text, one.segment.voice.voice)
        assert one.end - one.start == len(alone.samples)
        assert one.level.loudness == pytest.approx(loudness(alone.samples, RATE), abs=0.01)


def test_an_adapter_is_part_of_what_a_segment_depends_on(tiny_checkpoint, tmp_path):
    tts, talk, folder = Voices(tiny_checkpoint), script("Ada: says 0.1"), tmp_path / "adapter"
    tts.adapter = folder
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        render(tts, talk, RenderSettings(tmp_path / "cache"))
    folder.mkdir()
    for content in (b"one", b"other", b"other"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes(content)
        render(tts, talk, RenderSettings(tmp_path / "cache"))
    assert len(tts.texts) == 2


def test_a_damaged_segment_is_spoken_again_and_a_lost_one_is_missed(tiny_checkpoint, tmp_path):
    tts, talk = Voices(tiny_checkpoint), script("Ada: says 0.1")
    render(tts, talk, RenderSettings(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    rendering = render(tts, talk, RenderSettings(tmp_path))
    assert len(tts.texts) == 2
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(RenderError, match="lost segment 1"):
        sound(rendering)


def test_bad_takes_are_listed_also_when_they_come_from_the_cache(tiny_checkpoint, tmp_path):
    for cached in (False, True):
        rendering = render(Voices(tiny_checkpoint), script("Ada: bad 0.1"), RenderSettings(tmp_path))
        (entry,) = rendering.report()["segments"]
        assert entry["cached"] is cached
        assert "repeats itself" in entry["warnings"][0]


def test_music_under_speech_stays_under_the_ceiling_and_leaves_speech_as_loud(tiny_checkpoint, tmp_path):
    wave = 0.5 * np.random.default_rng(0).standard_normal(2 * RATE).clip(-1, 1)
    write_audio(tmp_path / "bed.wav", Audio(wave.astype(np.float32), RATE))
    music = Music(file=str(tmp_path / "bed.wav"), loudness=-35, duck=15, lead=1.0, tail=2.0)
    talk = script("Ada: says 0.9", "Bob: says 0.01", music=music)
    rendering = render(Voices(tiny_checkpoint), talk, RenderSettings(tmp_path / "cache"))
    out = sound(rendering)
    assert rendering.placed[0].start == RATE
    assert len(out) == rendering.placed[-1].end + 2 * RATE
    assert true_peak(out, RATE) <= -1.5
    for one in rendering.placed:
        assert loudness(out[one.start : one.end], RATE) == pytest.approx(-19, abs=0.5)
    loud_music = Music(file=music.file, loudness=-10, duck=0)
    with pytest.raises(RenderError, match="no room"):
        render(
            Voices(tiny_checkpoint),
            script("Ada: says 1", music=loud_music),
            RenderSettings(tmp_path / "cache"),
        )


@pytest.mark.parametrize("name", ["book.m4b", "book.mp3", "book.wav"])
def test_chapters_are_in_files_that_have_a_place_for_them_and_the_mark_holds(tiny_checkpoint, tmp_path, name):
    talk = script("Ada: says 0.1", "Bob: says 0.2", "Ada: says 0.3")
    first, second, third = talk.segments
    book = Script((replace(first, chapter="One"), second, replace(third, chapter="Two")))
    rendering = render(Voices(tiny_checkpoint), book, RenderSettings(tmp_path / "cache"))
    record = new_record("model", "voices")
    write_marked_parts(
        tmp_path / name, rendering.parts(), record=record, signer=None, chapters=rendering.chapters
    )
    assert verify_file(tmp_path / name).state == "marked"
    with av.open(str(tmp_path / name)) as file:
        found = [
            (one["metadata"]["title"], float(one["start"] * one["time_base"])) for one in file.chapters()
        ]
    start = rendering.placed[2].start / RATE
    assert found == ([] if name.endswith("wav") else [("One", 0.0), ("Two", pytest.approx(start, abs=0.002))])


def test_the_command_lines_loudness_comes_before_the_scripts(tiny_checkpoint, tmp_path):
    talk = script("Ada: says 0.1", loudness=-25.0)
    for own, expected in ((None, -25.0), (-30.0, -30.0)):
        rendering = render(Voices(tiny_checkpoint), talk, RenderSettings(tmp_path, loudness=own))
        assert loudness(sound(rendering), RATE) == pytest.approx(expected, abs=0.3)


def test_memory_does_not_grow_with_the_script(tiny_checkpoint, tmp_path):
    peaks = []
    for count in (3, 12):
        talk = script(*(f"Ada: says 0.{number + 1:03}" for number in range(count)))
        rendering = render(Voices(tiny_checkpoint, 5.0), talk, RenderSettings(tmp_path))
        tracemalloc.start()
        for _ in rendering.parts():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A play by the lab's checkpoint, through the command."""
    folder = tmp_path_factory.mktemp("play")
    (folder / "play.yaml").write_text(PLAY)
    return folder, run_render(folder, PLAY)


def run_render(folder, text) -> int:
    (folder / "play.yaml").write_text(text)
    files = {
        "-o": "play.flac",
        "--subtitles": "play.vtt",
        "--chapters": "play.json",
        "--report": "report.json",
    }
    options = [str(word) for name, file in files.items() for word in (name, folder / file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("render", "voice")})
        patch.setattr(
            sys,
            "argv",
            ["revox", "render", str(folder / "play.yaml"), "-c", str(checkpoint_folder()), *options],
        )
        try:
            main.main()
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0


def test_the_command_writes_speech_subtitles_chapters_and_a_marked_file(rendered):
    folder, code = rendered
    assert code == 0
    audio = read_audio(folder / "play.flac")
    report = json.loads((folder / "report.json").read_text())
    assert audio.seconds == pytest.approx(report["seconds"], abs=0.01)
    for one in report["segments"]:
        part = audio.samples[int(one["start_s"] * RATE) : int(one["end_s"] * RATE)]
        assert loudness(part, RATE) == pytest.approx(-19, abs=1.0)
    assert true_peak(audio.samples, RATE) <= -1.4
    captions = (folder / "play.vtt").read_text()
    assert captions.count(" --> ") == 4
    assert "<v Ada>It is ten to five." in captions
    chapters = json.loads((folder / "play.json").read_text())["chapters"]
    assert [one["title"] for one in chapters] == ["One", "Two"]
    assert chapters[1]["startTime"] == report["segments"][2]["start_s"]
    mark = verify_file(folder / "play.flac")
    assert (mark.state, mark.tag.sound) == ("marked", True)
    assert mark.tag.says["voice"] == "neutral_female, neutral_male"


def test_an_edit_of_the_file_speaks_one_line_again(rendered):
    folder, _ = rendered
    before = read_audio(folder / "play.flac").samples
    assert run_render(folder, PLAY.replace("half past nine", "ten past six")) == 0
    report = json.loads((folder / "report.json").read_text())
    assert [one["cached"] for one in report["segments"]] == [True, False, True]
    end = int(report["segments"][0]["end_s"] * RATE)
    np.testing.assert_array_equal(read_audio(folder / "play.flac").samples[:end], before[:end])


def test_a_tilde_is_the_home_folder_in_every_option(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "play.txt").write_text("ADA: One.\nADA: ...\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("render", "voice")})
    given = ["play.txt", "--output=~/play.wav", "--subtitles=~/play.vtt", "--voice=ADA=neutral_male"]
    monkeypatch.setattr(sys, "argv", ["revox", "render", *given, "-c", str(tiny_checkpoint)])
    with contextlib.suppress(SystemExit):
        main.main()
    assert not (tmp_path / "~").exists()
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"play.wav", "play.vtt"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["play.yaml", "-o", "gone/play.wav"], "there is no folder"),
        (["play.yaml", "-o", "play.pcm"], "no place for a mark"),
        (["play.yaml", "-o", "play.wav", "--subtitles", "play.txt"], "end it in .vtt or .srt"),
        (["play.yaml", "-o", "play.wav", "--loudness", "3"], "out of range"),
        (["play.yaml", "-o", "play.wav", "--voice", "Ada=nobody"], "has no voice 'nobody'"),
        (["play.yaml", "-o", "play.wav", "--music", "gone.mp3"], "There is no file"),
        (["gone.yaml", "-o", "play.wav"], "cannot be read"),
        (["play.yaml", "-o", "play.wav", "--subtitles", "a.vtt", "--report", "./a.vtt"], "--report is"),
        (["play.yaml", "-o", "play.wav", "--report", "play.yaml"], "--report is the same file as the script"),
        (["play.yaml", "-o", "play.wav", "--chapters", "a.mp3", "--music", "a.mp3"], "same file as --music"),
        (["play.yaml", "-o", "play.wav", "--chapters", "play.wav"], "same file as --output"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(tiny_checkpoint, tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "play.yaml").write_text(PLAY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("render", "voice")})
    monkeypatch.setattr(sys, "argv", ["revox", "render", *arguments, "-c", str(tiny_checkpoint)])
    with pytest.raises(SystemExit) as exit:
        main.main()
    message = capsys.readouterr().err
    assert exit.value.code == 2, message
    assert sentence in message
    assert not (tmp_path / "play.wav").exists()
