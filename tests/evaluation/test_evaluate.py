"""The three tables, from a folder of clips to the report, on the tiny checkpoint."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from revox.cli.main import build_app, main
from revox.coding.errors import CodingError
from revox.coding.invert import InversionResult
from revox.evaluation import codec_table
from revox.evaluation.acceptance_table import CLIPS, OTHER_TEXT, OWN_SPEECH, PRESETS, preset_names
from revox.evaluation.clips import find_clips
from revox.evaluation.cloning_table import CLONED
from revox.evaluation.errors import EvaluationError
from revox.evaluation.evaluate import evaluate
from revox.evaluation.measured import NOISE, RANDOM_CODES, RECORDING, WRONG_SPEAKER
from revox.evaluation.subject import Setup, open_subject
from revox.metrics.errors import MetricError
from revox.speech import Audio, write_audio
from revox.synthesis.errors import SpeakError


@pytest.fixture(scope="module", autouse=True)
def _no_subject_is_kept(one_thread):
    yield
    open_subject.cache_clear()


PICKS = {"recognizer": "pocketsphinx", "grammar": "#JSGF V1.0;"}


class SameWords:
    """The same transcript of everything; the real recognizers have tests of their own."""

    def transcribe(self, audio):
        return "good day"


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tiny_preset_codes):
    monkeypatch.setattr("revox.metrics.intelligibility.PocketsphinxRecognizer", lambda grammar: SameWords())
    monkeypatch.setattr(
        "revox.coding.presets.preset_codes", lambda *_, **__: list(tiny_preset_codes.values())[:3]
    )
    monkeypatch.setattr("revox.evaluation.acceptance_table.MAX_PRESETS", 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three voiced clips of 1.2 s, two in a group of their own, one too short and one without audio."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("human/a.wav", "human/b.wav", "c.wav", "short.wav")):
        t = np.arange(int((0.4 if i == 3 else 1.2) * 24000)) / 24000
        sound = sum(np.sin(2 * np.pi * (110 + 40 * i) * k * t) / k for k in range(1, 9))
        sound = 0.1 * sound * np.clip(0.5 + np.sin(2 * np.pi * 3 * t), 0, None)
        (folder / name).parent.mkdir(exist_ok=True)
        write_audio(folder / name, Audio(sound + 1e-4 * rng.standard_normal(len(t)), 24000))
    (folder / "broken.wav").write_bytes(b"no audio at all")
    (folder / "said.txt").write_text("a good day to you\nc good morning\n")
    return folder


@pytest.fixture
def found(clips):
    return find_clips(clips, transcripts=clips / "said.txt")


def setup_of(checkpoint, out, **settings):
    return Setup(checkpoint, out, **{"seeds": 2, "texts": ("Good day.",), **settings})


def test_the_codec_tables(tiny_checkpoint_with_encoder, found, tmp_path):
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path, **PICKS)
    report = evaluate("codec", setup, found)
    assert [t.title for t in report.tables] == [
        "Codec: all clips (1 clip)", "Codes: all clips (1 clip)",
        "Codec: human (2 clips)", "Codes: human (2 clips)",
    ]  # fmt: skip
    sound = report.tables[2]
    assert [row.name for row in sound.rows] == [RECORDING, "decoded", WRONG_SPEAKER, RANDOM_CODES, NOISE]
    assert sound.cell(RECORDING, "mel").value == 0
    assert sound.cell("decoded", "mel").value > 0.1
    assert sound.cell(NOISE, "mel").seed_range > 0
    assert sound.cell("decoded", "mel").seed_range is None  # no chance in it
    # "good day" of "good day to you": two words are missing; b has no transcript, and is heard as itself.
    assert sound.cell(RECORDING, "word_errors").value == pytest.approx(50)
    assert sound.cell("decoded", "word_errors").value == pytest.approx(100 * 2 / 6)
    codes = report.tables[3]
    assert codes.cell("by encoder", "semantic_codes_used").value <= 30
    assert codes.cell(RANDOM_CODES, "saturated_share").value == pytest.approx(2 / 21, abs=0.03)
    assert len(report.left_out) == 2
    assert any("short.wav has 0.4 s" in reason for reason in report.left_out)
    for clip in report.clips:
        for path in clip.sounds.values():
            assert (tmp_path / path).stat().st_size > 500


def test_words_behind_the_part_that_is_measured_are_nobodys_errors(
    tiny_checkpoint_with_encoder, found, tmp_path
):
    spoken = [clip for clip in found if clip.text and clip.group == "human"]
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1, seconds=1.0, **PICKS)
    report = evaluate("codec", setup, spoken)
    # Of 1.2 s; the transcripts that there are do not count, and a recording is heard as itself.
    assert any("longer than the 1 s measured" in reason for reason in report.left_out)
    assert report.tables[0].cell(RECORDING, "word_errors") is None
    whole = evaluate("codec", setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1, **PICKS), spoken)
    assert whole.tables[0].cell(RECORDING, "word_errors").value == pytest.approx(50)
    sounds = [one.sounds[RECORDING] for report in (report, whole) for one in report.clips]
    assert len(set(sounds)) == len(sounds), "each measurement has sounds of its own"


def test_a_second_run_measures_nothing_again(tiny_checkpoint_with_encoder, found, tmp_path, monkeypatch):
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1)
    first = evaluate("codec", setup, found)
    monkeypatch.setattr(codec_table, "measure", lambda *_: pytest.fail("measured again"))
    again = evaluate("codec", setup, found)
    assert again.tables == first.tables
    with pytest.raises(pytest.fail.Exception):  # another setting is another measurement
        evaluate("codec", setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=2), found)


def test_the_acceptance_tables(tiny_checkpoint_with_encoder, found, tmp_path):
    report = evaluate("acceptance", setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1), found)
    spoken, rows = report.tables[2:]
    assert spoken.cell(CLIPS, "nll").clips == 1  # of two, one has a transcript
    assert spoken.cell(OWN_SPEECH, "nll").value < spoken.cell(CLIPS, "nll").value
    assert any("1 of 2 clips have no transcript" in note for note in spoken.notes)
    assert rows.cell(CLIPS, "frame_norm").clips == 2
    assert rows.cell(PRESETS, "spread").value == pytest.approx(1, abs=0.2)
    assert preset_names(setup_of(tiny_checkpoint_with_encoder, tmp_path)) == ["casual_female", "casual_male"]


def test_without_any_transcript_only_rows_are_claimed(tiny_checkpoint_with_encoder, clips, tmp_path):
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1)
    spoken, rows = evaluate(
        "acceptance", setup, find_clips(clips, limit=1)[:1] + find_clips(clips)[-1:]
    ).tables[-2:]
    assert spoken.cell(CLIPS, "nll") is None
    assert spoken.cell(OTHER_TEXT, "nll") is None
    assert rows.cell(CLIPS, "offset") is not None


def test_the_cloning_table_by_inversion(tiny_checkpoint, found, tmp_path, monkeypatch):
    def quick(codec, target, **_):
        codes = torch.zeros(37, target.numel() // codec.samples_per_frame, dtype=torch.long)
        return InversionResult(codes, (1.0,), 1, 0.0, False)

    monkeypatch.setattr("revox.coding.find.invert", quick)
    setup = setup_of(tiny_checkpoint, tmp_path, method="inversion", **PICKS)
    table = evaluate("cloning", setup, [c for c in found if c.group == "human"]).tables[0]
    assert table.cell(CLONED, "similarity").clips == 2
    assert table.cell(CLONED, "word_errors").value == 0  # it hears "good day" in all
    assert 0 <= table.cell(CLONED, "missing").value <= 1
    assert table.cell(CLONED, "spread_mismatch").value > 1  # codes that never move
    assert table.cell(RECORDING, "rank").value == 1


def test_what_cannot_be_measured_is_a_sentence(tiny_checkpoint, clips, found, tmp_path):
    with pytest.raises(CodingError, match=r"no whole encoder.*--method auto"):
        evaluate("codec", setup_of(tiny_checkpoint, tmp_path, method="encoder"), found)
    with pytest.raises(CodingError, match="no method 'magic'"):
        evaluate("codec", setup_of(tiny_checkpoint, tmp_path, method="magic"), found)
    bad = [clip for clip in found if clip.name in ("short.wav", "broken.wav")]
    with pytest.raises(EvaluationError, match="none of 2 clips can be measured"):
        evaluate("codec", setup_of(tiny_checkpoint, tmp_path, method="inversion"), bad)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "potato"}, "device 'potato' is not available"),
        ({"seconds": float("nan")}, "nan seconds of each clip cannot be used"),
        ({"seconds": float("inf")}, "give 1 to 600"),
        ({"seeds": 0}, "give 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(tiny_checkpoint, found, tmp_path, settings, sentence):
    with pytest.raises((EvaluationError, SpeakError), match=sentence):
        evaluate("codec", setup_of(tiny_checkpoint, tmp_path, **{"method": "inversion", **settings}), found)


@pytest.mark.parametrize("option", ["--limit=-1", "--jobs=0", "--seeds=0", "--steps=-1", "--grammar={big}"])
def test_options_that_cannot_be_are_refused_before_the_checkpoint_is_looked_for(clips, tmp_path, option):
    big = tmp_path / "big.jsgf"
    big.write_text("#JSGF V1.0; grammar g; public <g> = " + "one | " * 50_000 + "two;")
    arguments = ["codec", "nowhere", "--clips", str(clips), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), ["evaluate", *arguments, option.format(big=big)])
    refused = result.exit_code == 2 or "give a smaller grammar" in str(result.exception)
    assert refused, result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_judge_is_said_before_the_work(tiny_checkpoint, found, tmp_path, monkeypatch):
    def missing(_):
        raise MetricError("Recognizing words needs pocketsphinx; install it.")

    monkeypatch.setattr("revox.metrics.intelligibility.PocketsphinxRecognizer", missing)
    setup = setup_of(tiny_checkpoint, tmp_path, method="inversion", **PICKS)
    with pytest.raises(MetricError, match="needs pocketsphinx"):
        evaluate("codec", setup, found)


class Loudness:
    """In place of DistillMOS: the root mean square, which has an oracle."""

    def score(self, audio):
        return float(np.sqrt(np.mean(audio.samples**2))) if len(audio.samples) else 0.0


def test_naturalness_is_a_column_of_every_sound_when_it_is_asked_for(
    tiny_checkpoint_with_encoder, found, tmp_path, monkeypatch
):
    monkeypatch.setattr("revox.evaluation.subject.NaturalnessModel", Loudness)
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1, naturalness=True)
    human = [c for c in found if c.group == "human"]
    codec, cloning = (evaluate(kind, setup, human) for kind in ("codec", "cloning"))
    expected = np.median([Loudness().score(open_subject(setup).reference(clip)) for clip in human])
    for report in (codec, cloning):
        table = report.tables[0]
        assert table.cell(RECORDING, "naturalness").value == pytest.approx(expected)
        assert all("naturalness" in row.cells for row in table.rows)
        assert report.facts["naturalness"] == "DistillMOS, which is in no objective"


def test_naturalness_is_left_out_where_it_is_not_installed_and_refused_where_it_is_asked_for(
    tiny_checkpoint_with_encoder, found, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "distillmos", None)
    report = evaluate("codec", setup_of(tiny_checkpoint_with_encoder, tmp_path, seeds=1), found)
    assert "naturalness" not in {column.key for column in report.tables[0].columns}
    with pytest.raises(MetricError, match="pip install --no-deps distillmos"):
        evaluate("codec", setup_of(tiny_checkpoint_with_encoder, tmp_path, naturalness=True), found)


def test_another_recognizer_or_its_version_finds_no_codes_again(
    tiny_checkpoint_with_encoder, found, tmp_path, monkeypatch
):
    folder = tmp_path / "whisper"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"1")
    setup = setup_of(tiny_checkpoint_with_encoder, tmp_path).identified()
    whisper = setup_of(tiny_checkpoint_with_encoder, tmp_path, recognizer=f"whisper:{folder}").identified()
    monkeypatch.setattr("revox.evaluation.subject.installed", lambda package: "99")
    newer = setup_of(tiny_checkpoint_with_encoder, tmp_path).identified()
    assert setup.coding_key() == whisper.coding_key() == newer.coding_key()
    assert len({str(one.key()) for one in (setup, whisper, newer)}) == 3


@pytest.mark.parametrize(
    ("recognizer", "sentence"),
    [
        ("pocketsphinx", "give it one with --grammar FILE"),
        ("whisper:/no/such/folder", "there is no recognizer '/no/such/folder'"),
        ("whisper:openai/whisper-base", "Systran/faster-whisper-base"),
        ("Systran/faster-whisper-base", r"revox[whisper]"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "doctor"])
def test_a_recognizer_that_cannot_be_had_is_a_sentence_and_exit_code_2(
    tiny_checkpoint_with_encoder, clips, tmp_path, monkeypatch, capsys, command, recognizer, sentence
):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    if (command, recognizer) == ("doctor", "pocketsphinx"):
        pytest.skip("the doctor has its own grammar")
    checkpoint = str(tiny_checkpoint_with_encoder)
    arguments = ["doctor", checkpoint, "--out", str(tmp_path)]
    if command == "evaluate":
        arguments = ["evaluate", "codec", checkpoint, "--clips", str(clips), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["revox", *arguments, "--recognizer", recognizer])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in " ".join(printed.split())
    assert "Traceback" not in printed


def test_the_command_writes_the_report(tiny_checkpoint_with_encoder, clips, tmp_path):
    result = CliRunner().invoke(
        build_app(),
        ["evaluate", "codec", str(tiny_checkpoint_with_encoder), "--clips", str(clips),
         "-o", str(tmp_path / "out"), "--limit", "1", "--seeds", "1", "--by", "encoder"],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mel distance" in result.output
    assert "--by is now --method" in result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {clip["name"] for clip in found["clips"]} <= {"c.wav", "human/a.wav"}
