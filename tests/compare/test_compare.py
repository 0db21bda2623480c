from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from revox.cli import main
from revox.compare.artifacts import count_clicks, repeats_itself
from revox.compare.compare import store_rule
from revox.compare.errors import CompareError
from revox.compare.figures import SampleScorer, read_ratings, statistic
from revox.compare.rule import RuleFigure, parse_rule
from revox.compare.samples import Sample, read_index
from revox.demo import checkpoint_folder
from revox.endpoints import SpeechAnswer
from revox.speech import Audio, encode_audio, read_audio, write_audio

RATE = 24000
TEXTS = [f"This is sentence number {word}." for word in ("one", "two", "three", "four")]
RULE = (
    "require n_rating(A) >= 3\n"
    "mean_rating(A) >= mean_rating(B) + 0.5 and p50_first_audio(A) <= 500 ms -> swap_candidate, else keep\n"
)


def hum(seconds: float = 2.0, pitch: float = 150.0, level: float = 0.2) -> Audio:
    at = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * pitch * k * at) / k for k in range(1, 8)) * (
        1 + 0.5 * np.sin(2 * np.pi * 3 * at)
    )
    return Audio((level / 2 * wave).astype(np.float32), RATE)


class Server:
    """An endpoint that hums, and counts what it is asked."""

    kind, rate, streams, clones, formats, max_streams = "openai", RATE, True, False, ("wav",), None

    def __init__(self, first_audio: float, fails: tuple[str, ...] = ()) -> None:
        self.name, self.first_audio, self.fails, self.asked = "server", first_audio, fails, []

    def facts(self):
        return {"model": "hum"}

    def voices(self):
        return ["ada"]

    def speak(self, query):
        self.asked.append(query)
        if query.text in self.fails:
            return SpeechAnswer(500, message="broken")
        content = encode_audio(hum(), "pcm")[0]
        return SpeechAnswer(200, "pcm", RATE, content, 1.0, self.first_audio)

    def close(self):
        pass


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a rule, sentences, and a server each at http://fast and http://slow."""
    servers = {"http://fast": Server(0.2), "http://slow": Server(0.9)}
    monkeypatch.setattr(
        "revox.compare.samples.open_endpoint", lambda address, key_from=None: servers[address]
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.txt").write_text(RULE)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return servers


def run_compare(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("compare", "voice")})
        words = ["revox", "compare", *arguments, "--texts", "texts.txt", "--no-naturalness"]
        patch.setattr(sys, "argv", words)
        patch.delenv("REVOX_CHECKPOINT", raising=False)
        try:
            main.main()
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0


def write_ratings(path, pairs, after: float = 60.0) -> None:
    when = (datetime.now(timezone.utc) + timedelta(seconds=after)).isoformat()
    rows = [f"{when},phrase,1,a,,ada,{a},,ada,{b}" for a, b in pairs]
    path.write_text(
        "time,phrase,seed,first,server_a,voice_a,rating_a,server_b,voice_b,rating_b\n" + "\n".join(rows)
    )


@pytest.mark.parametrize(
    ("side", "ratings", "code", "verdict"),
    [
        ("http://fast", [(5, 4), (4, 3), (4, 4)], 0, "swap_candidate"),
        ("http://slow", [(5, 4), (4, 3), (4, 4)], 0, "keep"),
        ("http://fast", [(4, 4), (4, 3), (4, 4)], 0, "keep"),
        ("http://fast", [(5, 1), (5, 1)], 5, "refused"),
    ],
)
def test_the_rule_swaps_keeps_or_refuses(place, tmp_path, capsys, side, ratings, code, verdict):
    write_ratings(tmp_path / "ratings.csv", ratings)
    other = "http://slow" if side == "http://fast" else "http://fast"
    assert run_compare(side, other, "--rule", "rule.txt", "--ratings", "ratings.csv", "--out", "out") == code
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert result["verdict"] == verdict
    stored = json.loads((tmp_path / "out/rule.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert {result["rule_sha256"], *(one["rule_sha256"] for one in samples)} == {stored["sha256"]}
    assert all(stored["stored_at"] <= one["at"] for one in samples)
    assert result["rule_stored_at"] == stored["stored_at"]
    printed = capsys.readouterr().out
    assert f"Verdict: {verdict}" in printed
    assert RULE.splitlines()[1] in printed
    assert result["clause"] in printed
    assert "| mean_rating(B) |" in printed


def test_ratings_may_come_later_but_not_from_before_the_rule(place, tmp_path, capsys):
    begin = ("http://fast", "http://slow", "--rule", "rule.txt", "--ratings", "ratings.csv", "--out", "out")
    assert run_compare(*begin) == 5
    assert "no verdict yet" in capsys.readouterr().err
    write_ratings(tmp_path / "ratings.csv", [(5, 3)] * 3, after=-3600)
    assert run_compare(*begin, "--resume") == 2
    assert "before the rule was stored" in capsys.readouterr().err
    write_ratings(tmp_path / "ratings.csv", [(5, 3)] * 3)
    assert run_compare(*begin, "--resume") == 0
    assert len(place["http://fast"].asked) == 5, "one to warm up, and no sample is taken again"


def test_another_rule_is_refused_and_so_is_one_that_was_changed_on_disk(place, tmp_path, capsys):
    (tmp_path / "rule.txt").write_text("mean_clicks(A) <= mean_clicks(B) -> keep, else look")
    begin = ("http://fast", "http://slow", "--rule", "rule.txt", "--out", "out")
    assert run_compare(*begin) == 0
    assert run_compare(*begin) == 2
    assert "say --resume" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("mean_clicks(A) < mean_clicks(B) -> keep, else look")
    assert run_compare("http://fast", "http://slow", "--rule", "other.txt", "--out", "out", "--resume") == 2
    assert "begun with another rule" in capsys.readouterr().err
    stored = tmp_path / "out/rule.json"
    stored.write_text(stored.read_text().replace("<=", "<"))
    assert run_compare("http://fast", "http://slow", "--rule", "other.txt", "--out", "out", "--resume") == 2
    assert "changed or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("mean_similarity(A) > 0.5 -> keep", "give --reference"),
        ("mean_word_error_rate(A) < 5 % -> keep", "give --recognizer"),
        ("mean_rating(B) > 3 -> keep", "give --ratings"),
        ("mean_naturalness(A) > 3 -> keep", "distillmos"),
        ("p50_first_audio(B) < 1 s -> keep", "sounds does not tell it"),
        ("p50_first_audio(B) < 1 -> keep", "write 500 ms"),
    ],
)
def test_a_rule_for_what_is_not_measured_is_refused_before_anything_is_asked(
    place, tmp_path, capsys, rule, sentence
):
    (tmp_path / "rule.txt").write_text(rule)
    (tmp_path / "sounds").mkdir()
    for number in range(4):
        write_audio(tmp_path / f"sounds/{number}.wav", hum())
    assert run_compare("http://fast", "sounds", "--rule", "rule.txt", "--out", "out") == 2
    assert sentence in capsys.readouterr().err
    assert not place["http://fast"].asked
    assert not (tmp_path / "out").exists()


def test_an_interrupted_comparison_goes_on_and_failures_are_counted(place, tmp_path, capsys):
    (tmp_path / "rule.txt").write_text("mean_failures(A) <= 25 % -> keep, else look")
    fast, slow = place["http://fast"], place["http://slow"]
    fast.fails = (TEXTS[1],)
    slow.speak, speak = stop_at(TEXTS[2], slow.speak), slow.speak
    begin = ("ada@http://fast", "http://slow", "--rule", "rule.txt", "--out", "out")
    assert run_compare(*begin) == 130
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 5
    slow.speak = speak
    assert run_compare(*begin, "--resume") == 0
    assert [query.text for query in fast.asked[1:4]] == TEXTS[:3]
    assert [query.text for query in fast.asked[4:]] == [TEXTS[3]] * 2, "warm again, then the missing one"
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert result["figures"]["failures"]["A"]["mean"]["value"] == 0.25
    assert result["figures"]["clicks"]["A"]["mean"]["n"] == 3
    assert read_audio(tmp_path / "out/a/0001.wav").seconds == pytest.approx(2.0)


def test_a_side_that_fails_on_every_sentence_is_counted_and_can_be_resumed(place, tmp_path, capsys):
    (tmp_path / "rule.txt").write_text("mean_failures(A) <= 25 % -> keep, else look")
    place["http://fast"].fails = tuple(TEXTS)
    begin = ("http://fast", "http://slow", "--rule", "rule.txt", "--out", "out")
    assert run_compare(*begin) == 0
    assert json.loads((tmp_path / "out/comparison.json").read_text())["verdict"] == "look"
    assert run_compare(*begin, "--resume") == 0


def test_a_baseline_with_failures_is_not_a_success_and_an_interrupted_one_has_its_index(
    place, tmp_path, capsys
):
    slow = place["http://slow"]
    slow.fails = tuple(TEXTS)
    assert run_compare("--baseline", "http://slow", "--out", "none") == 1
    assert "4 samples of http://slow, 4 without speech" in capsys.readouterr().err
    slow.fails, slow.speak = (), stop_at(TEXTS[2], slow.speak)
    assert run_compare("--baseline", "http://slow", "--out", "base") == 130
    assert [one.text for one in read_index(tmp_path / "base")] == TEXTS[:2]


@pytest.mark.parametrize("option", [("--resume",), ("--ratings", "ratings.csv"), ("--rule", "rule.txt")])
def test_a_baseline_refuses_what_it_would_not_use(place, tmp_path, capsys, option):
    assert run_compare("--baseline", "http://slow", "--out", "base", *option) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_a_key_goes_to_the_side_that_it_is_for(place, tmp_path, monkeypatch, capsys):
    opened = {}

    def open_endpoint(address, key_from=None):
        opened[address] = key_from
        return place[address]

    monkeypatch.setattr("revox.compare.samples.open_endpoint", open_endpoint)
    (tmp_path / "rule.txt").write_text("mean_clicks(A) < 1 -> keep, else look")
    begin = ("ada@http://fast", "http://slow", "--rule", "rule.txt", "--out")
    assert run_compare(*begin, "one", "--key-from", "http://fast=KEY") == 0
    assert opened == {"http://fast": "KEY", "http://slow": None}
    assert run_compare(*begin, "two", "--key-from", "KEY") == 2
    assert "say whose key KEY holds" in capsys.readouterr().err
    assert run_compare("--baseline", "http://slow", "--out", "three", "--key-from", "KEY") == 0
    assert opened["http://slow"] == "KEY"


def stop_at(text, speak):
    def stopping(query):
        if query.text == text:
            raise KeyboardInterrupt
        return speak(query)

    return stopping


def test_a_baseline_is_recorded_once_and_compared_with_later(place, tmp_path, capsys):
    assert run_compare("--baseline", "http://slow", "--out", "base") == 0
    (tmp_path / "rule.txt").write_text("p50_first_audio(A) < p50_first_audio(B) -> faster, else keep")
    assert run_compare("http://fast", "base", "--rule", "rule.txt", "--out", "out") == 0
    assert json.loads((tmp_path / "out/comparison.json").read_text())["verdict"] == "faster"
    assert len(place["http://slow"].asked) == 5
    (tmp_path / "texts.txt").write_text("Something else.\n")
    assert run_compare("http://fast", "base", "--rule", "rule.txt", "--out", "out2") == 2
    assert "has no sample of 'Something else.'" in capsys.readouterr().err


def test_an_index_cannot_name_files_outside_its_folder(place, tmp_path, capsys):
    assert run_compare("--baseline", "http://slow", "--out", "base") == 0
    index = tmp_path / "base/samples.json"
    index.write_text(index.read_text().replace("0001.wav", "../texts.txt"))
    (tmp_path / "rule.txt").write_text("mean_clicks(A) < 1 -> keep")
    assert run_compare("http://fast", "base", "--rule", "rule.txt", "--out", "out") == 2
    assert "outside of its folder" in capsys.readouterr().err


def test_two_voices_of_the_lab_are_compared_and_what_they_say_is_marked(tmp_path, monkeypatch, capsys):
    from revox.marking import can_sign, verify_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("good morning\nit is ten to five\n")
    (tmp_path / "rule.txt").write_text("mean_pitch(A) > mean_pitch(B) -> higher, else lower")
    checkpoint = str(checkpoint_folder())
    assert (
        run_compare("casual_female", "casual_male", "-c", checkpoint, "--rule", "rule.txt", "--out", "out")
        == 0
    )
    assert json.loads((tmp_path / "out/comparison.json").read_text())["verdict"] == "higher"
    found = verify_file(tmp_path / "out/a/0002.wav")
    assert (found.state, found.manifest is None) == ("marked", not can_sign())


def test_a_certificate_that_cannot_sign_is_refused_before_anything_is_asked(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("REVOX_SIGNING_CERTIFICATE", str(tmp_path / "none.pem"))
    assert run_compare("--baseline", "http://slow", "--out", "base") == 2
    assert "revox: " in capsys.readouterr().err
    assert not place["http://slow"].asked


def test_figures_of_made_sounds_are_what_was_put_in():
    scorer, sample = SampleScorer(), Sample(1, "a b c d e f g h i j k l m n o p q r s t u v w x y z" * 2)
    scorer.score(sample, hum(3.0, 200.0))
    assert sample.figures["pitch"] == pytest.approx(200, rel=0.01)
    assert sample.figures["pitch_spread"] < 0.2
    assert [sample.figures[key] for key in ("early_stops", "missing_stops", "silences", "failures")] == [
        0,
        0,
        0,
        0,
    ]
    early, late = Sample(1, sample.text), Sample(1, "Hello.")
    scorer.score(early, hum(1.0))
    scorer.score(late, hum(9.0))
    assert (early.figures["early_stops"], early.figures["missing_stops"]) == (1, 0)
    assert (late.figures["early_stops"], late.figures["missing_stops"]) == (0, 1)
    gap = Audio(np.concatenate((hum().samples, np.zeros(2 * RATE, np.float32), hum().samples)), RATE)
    paused = Sample(1, sample.text)
    scorer.score(paused, gap)
    assert paused.figures["silences"] == 1


def test_clicks_and_repeats_are_found_in_speech_and_rarely_where_there_are_none():
    from importlib.resources import files

    clip = read_audio(str(files("revox.demo") / "examples/1034-121119-0000.flac"), RATE)
    clean = count_clicks(clip)
    spiked = clip.samples.copy()
    places = range(RATE // 2, len(spiked) - RATE // 2, RATE)
    for at in places:
        spiked[at : at + 3] += np.array([0.3, -0.3, 0.15], np.float32)
    assert clean <= 1
    assert count_clicks(Audio(spiked, RATE)) >= clean + 0.8 * len(places)
    assert not repeats_itself(clip)
    loop = np.concatenate((clip.samples[: 2 * RATE], np.tile(clip.samples[2 * RATE : 3 * RATE], 4)))
    assert repeats_itself(Audio(loop, RATE))
    assert not repeats_itself(Audio(np.zeros(10, np.float32), RATE))


def test_statistics_and_intervals():
    samples = [{"clicks": float(x), "word_errors": 1.0, "words": 2.0 + 8 * (x > 5)} for x in range(1, 11)]
    mean = statistic(RuleFigure("mean", "clicks", "A"), samples)
    assert (mean.value, mean.count) == (5.5, 10)
    # 1.96 standard errors of the mean of 1 to 10 are 1.78.
    assert (mean.low, mean.high) == pytest.approx((3.72, 7.28), abs=0.2)
    assert statistic(RuleFigure("p50", "clicks", "A"), samples).value == 5.5
    assert statistic(RuleFigure("mean", "word_error_rate", "A"), samples).value == pytest.approx(10 / 60)
    assert statistic(RuleFigure("max", "word_error_rate", "A"), samples).value == 0.5
    assert statistic(RuleFigure("mean", "rating", "A"), samples).count == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,b\n1,2\n", "line 2"),
        ("rating_a,rating_b\n6,2\n", "line 2"),
        ("rating_a,rating_b\n5,2\n5\n", "line 3"),
        ("rating_a,rating_b,time\n5,2,noon\n", "line 2"),
        ("rating_a,rating_b,voice_a,voice_b\n5,2,x,y\n5,2,x,z\n", "2 pairs"),
    ],
)
def test_other_csv_files_are_refused(tmp_path, text, sentence):
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(CompareError, match=sentence):
        read_ratings(tmp_path / "ratings.csv")


def test_a_folder_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CompareError, match="not empty"):
        store_rule("mean_clicks(A) < 1 -> keep", tmp_path, False, {})


def test_a_comparison_goes_on_with_the_same_sides_sentences_and_scores_only(place, tmp_path, capsys):
    (tmp_path / "rule.txt").write_text("mean_clicks(A) <= mean_clicks(B) -> keep, else look")
    rest = ("--rule", "rule.txt", "--out", "out")
    assert run_compare("http://fast", "http://slow", "--n", "3", *rest) == 0
    for given, what in (
        (("http://slow", "http://fast", "--n", "3"), "side A"),
        (("http://fast", "http://slow", "--n", "4"), "list of sentences"),
        (("http://fast", "http://slow", "--n", "3", "--seed", "5"), "--seed"),
    ):
        assert run_compare(*given, *rest, "--resume") == 2
        assert f"begun with another {what}" in capsys.readouterr().err
    assert run_compare("http://fast", "http://slow", "--n", "3", *rest, "--resume") == 0


def test_ratings_are_given_to_the_voices_that_were_rated(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("server_a,voice_a,rating_a,server_b,voice_b,rating_b\nx,Ada,5,x,bob,3\n")
    assert (read_ratings(path)[0].a, read_ratings(path, ("ada", "bob"))[0].a) == (5, 5)
    turned = read_ratings(path, ("bob", "ada"))[0]
    assert (turned.a, turned.b) == (3, 5)
    with pytest.raises(CompareError, match="ratings of Ada and bob, and ada and eve are compared"):
        read_ratings(path, ("ada", "eve"))


def test_one_sample_is_not_apart_from_another_and_counts_are_counts():
    rule = parse_rule("require apart(mean_rating), mean_rating(A) > mean_rating(B) -> a, else b")
    one, two = [{"rating": 5.0}], [{"rating": 5.0}] * 2

    def decided(of_a, of_b):
        samples = {"A": of_a, "B": of_b}
        return rule.decide({figure: statistic(figure, samples[figure.side]) for figure in rule.figures})

    assert decided(one, [{"rating": 4.0}]).outcome is None
    assert decided(two, [{"rating": 4.0}] * 2).outcome == "a"
    words = [{"word_errors": 1.0, "words": 4.0}] * 5
    assert statistic(RuleFigure("n", "word_error_rate", "A"), words).value == 5
