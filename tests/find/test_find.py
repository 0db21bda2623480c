import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("silero_vad")

from revox.find import FindError, FindRequest, find_references
from revox.find.export import CONSENT, prepare_folder, write_findings
from revox.speech import Audio, AudioError, loudness, read_audio, true_peak, write_audio
from revox.speech.activity import speech_activity

EXAMPLES = Path(__file__).parents[2] / "src" / "revox" / "demo" / "examples"
MAN, WOMAN, OTHER_WOMAN = "2159-179154-0000.flac", "4680-16026-0000.flac", "5867-48852-0000.flac"
RATE = 16000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A man, a woman twice as long, a second woman: the file, and each one's seconds."""
    parts, spans, at = [np.zeros(RATE, np.float32)], {}, 1.0
    rng = np.random.default_rng(0)
    for name in (MAN, WOMAN, OTHER_WOMAN):
        samples = read_audio(EXAMPLES / name, RATE).samples
        active = np.flatnonzero(speech_activity(samples, RATE).active) * 0.01
        spans[name] = (at + active[0], at + active[-1] + 0.01)
        parts += [samples, np.zeros(RATE // 4, np.float32)]
        at += len(samples) / RATE + 0.25
    samples = np.concatenate(parts)
    samples = samples + rng.normal(scale=1e-4, size=len(samples)).astype(np.float32)
    path = tmp_path_factory.mktemp("made") / "film.m4a"
    write_audio(path, Audio(samples, RATE))
    return path, spans


@pytest.fixture(scope="module")
def found(made):
    return find_references(FindRequest((made[0],), pitch=(75, 150), seconds=(5, 40)))


def others_inside(span, spans, name):
    return sum(
        max(0.0, min(span[1], b) - max(span[0], a)) for other, (a, b) in spans.items() if other != name
    )


def test_pitch_finds_the_man_and_nobody_else(made, found):
    best = found.candidates[0]
    span = made[1][MAN]
    assert min(best.end, span[1]) - max(best.start, span[0]) > 5
    assert others_inside((best.start, best.end), made[1], MAN) <= 0.2
    assert 75 < best.scores["pitch_hz"] < 150
    assert best.scores["other_speaker"] == 0


def test_a_clip_of_the_second_woman_finds_her_and_not_the_first(made, tmp_path):
    like = tmp_path / "like.wav"
    samples = read_audio(EXAMPLES / OTHER_WOMAN).samples
    write_audio(like, Audio(0.3 * samples[: len(samples) // 2], RATE))
    best = find_references(FindRequest((made[0],), like=like, seconds=(5, 40))).candidates[0]
    assert others_inside((best.start, best.end), made[1], OTHER_WOMAN) <= 0.2
    assert best.end - best.start > 5


def test_a_recording_at_minus_60_db_gives_the_same_clip(made, found, tmp_path):
    quiet = tmp_path / "quiet.wav"
    samples = read_audio(made[0]).samples
    write_audio(quiet, Audio(0.001 * samples / np.abs(samples).max(), RATE), "wav-float")
    best = find_references(replace(found.request, media=(quiet,))).candidates[0]
    assert best.start == pytest.approx(found.candidates[0].start, abs=0.3)
    assert best.end == pytest.approx(found.candidates[0].end, abs=0.3)


def test_only_what_has_subtitles_is_taken(made, found, tmp_path):
    start, end = made[1][MAN]
    middle = (start + end) / 2
    subtitles = tmp_path / "film.srt"
    subtitles.write_text(f"1\n00:00:{start:06.3f} --> 00:00:{middle:06.3f}\nWords\n".replace(".", ","))
    request = replace(found.request, subtitles=(subtitles,), seconds=(3, 40))
    assert all(one.end <= middle + 0.45 for one in find_references(request).candidates)


def test_clips_are_24_khz_at_minus_16_lufs_under_the_ceiling_with_reasons(made, found, tmp_path):
    out = tmp_path / "out"
    clips = write_findings(found, out)
    report = json.loads((out / "find.json").read_text())
    assert report["source"] == str(made[0])
    assert report["consent"] == CONSENT
    assert [one["rank"] for one in report["candidates"]] == list(range(1, len(clips) + 1))
    assert (out / "find.png").read_bytes()[:4] == b"\x89PNG"
    for one in report["candidates"]:
        audio = read_audio(out / one["file"])
        assert audio.rate == 24000
        assert audio.seconds == pytest.approx(one["end_s"] - one["start_s"], abs=0.03)
        assert true_peak(audio.samples, 24000) <= -1.45
        level = loudness(audio.samples, 24000)
        assert level == pytest.approx(-16, abs=0.5) or any("LUFS" in reason for reason in one["reasons"])
        assert level == pytest.approx(one["scores"]["lufs"], abs=0.1)
        assert len(one["reasons"]) >= 4


def test_a_second_run_replaces_the_first_and_foreign_files_are_left_alone(found, tmp_path):
    out = tmp_path / "out"
    write_findings(found, out)
    report = json.loads((out / "find.json").read_text())
    report["candidates"].append({**report["candidates"][0], "file": "clip-9.wav"})
    (out / "find.json").write_text(json.dumps(report))
    for name in ("clip-9.wav", "clip-1-denoised.wav", "clip-8.wav"):
        (out / name).write_bytes(b"old")
    write_findings(found, out)
    assert not (out / "clip-9.wav").exists()
    assert (out / "clip-1-denoised.wav").exists()
    assert (out / "clip-8.wav").exists()
    with pytest.raises(FindError, match=r"clip-1\.wav would be replaced"):
        prepare_folder(out, ["film.mp4", out / "clip-1.wav"])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "clip-1.wav").write_bytes(b"mine")
    with pytest.raises(FindError, match="holds other files"):
        write_findings(found, foreign)
    assert (foreign / "clip-1.wav").read_bytes() == b"mine"


def test_a_band_in_which_nobody_speaks_names_who_does(made):
    with pytest.raises(FindError, match=r"nobody's median pitch lies between 300-400 Hz; it is \d+ Hz"):
        find_references(FindRequest((made[0],), pitch=(300, 400)))


def test_a_recording_without_speech_is_a_sentence(tmp_path):
    noise = np.random.default_rng(0).normal(scale=0.01, size=3 * RATE)
    write_audio(tmp_path / "noise.wav", Audio(noise, RATE))
    with pytest.raises(FindError, match="no speech was found"):
        find_references(FindRequest((tmp_path / "noise.wav",)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"media": ()}, "no recording"),
        ({"subtitles": ("a.srt", "b.srt")}, "one for each"),
        ({"seconds": (1.0, 40.0)}, "out of range"),
        ({"pitch": (260.0, 160.0)}, "out of range"),
    ],
)
def test_a_wrong_request_is_a_sentence(wrong, message):
    with pytest.raises(FindError, match=message):
        FindRequest(**{"media": ("film.mp4",), **wrong})


def test_what_is_missing_is_said_before_the_search(made, tmp_path, monkeypatch):
    def search(*_):
        raise AssertionError("the recording was read")

    monkeypatch.setattr("revox.find.find._listen_to_all", search)
    with pytest.raises(AudioError, match="There is no file"):
        find_references(FindRequest((made[0],), like=tmp_path / "none.wav"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FindError, match="matplotlib"):
        prepare_folder(tmp_path / "out")


@pytest.mark.parametrize("given", [["--pitch", "high"], ["--seconds", "40-10"], []])
def test_a_users_mistake_is_one_sentence_and_exit_code_2(tmp_path, given):
    command = [
        sys.executable,
        "-m",
        "revox",
        "find",
        str(tmp_path / "none.mp4"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, *given], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
