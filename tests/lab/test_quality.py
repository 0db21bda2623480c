"""Scoring the lab: words however they are written, ranks, the committed lists, the tables."""

import json

import numpy as np
import pytest

from lab.errors import LabError
from lab.quality import lists, tables
from lab.quality.tables import Wanted, is_met, markdown, rank
from lab.sources import SPEECH, human_clips
from lab.speech.plan import plain_words, read_plan, read_speakers

SPLITS = ("heldout", "validation")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("We will be back at four forty five.", "We'll be back at 4:45."),
        ("at four forty five", "at 4.45"),
        ("at four forty five", "at 4 45"),
        ("at two oh five", "at 2:05"),
        ("twelve o'clock", "12 o'clock."),
        ("at eight", "at 8:00"),
        ("It was fifteen dollars and now twenty dollars and fifty cents.", "It was $15 and now $20.50"),
        ("Eighty seven minus four is eighty one.", "87 - 4 = 81"),
        ("the twenty eighth of January", "the 28th of January"),
        ("Today is Monday the twenty eighth of January.", "Today is Monday, 28 January."),
        ("on the second of March", "on March 2nd"),
        ("five forty five", "545"),
        ("one hundred and five", "105"),
        ("ten percent", "10%"),
        ("a well-known man, sir", "a well known man sir"),
        ("It was nineteen pounds.", "It was £19.00"),
        ("eighteen pounds and ninety nine cents", "£18.99"),
        ("on May 9th", "on the ninth of May"),
        ("My number is four two seven one nine.", "My number is 4-2-7-1-9."),
        ("nine minus four is five", "9-4=5"),
        ("nine minus four minus two is three", "9-4-2=3"),
    ],
)  # fmt: skip
def test_one_thing_written_in_two_ways_is_the_same_words(one, other):
    pytest.importorskip("transformers")
    from lab.quality.words import normalize_words

    assert normalize_words(one) == normalize_words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("at 4:45", "at 4:50"),
        ("twenty dollars", "twenty cents"),
        ("the fifth", "five"),
        ("the fifth of May", "the sixth of May"),
        ("20.5", "205"),
        ("£19.75", "£1975"),
        ("€19.75", "€1975"),
    ],
)
def test_other_words_stay_other_words(one, other):
    pytest.importorskip("transformers")
    from lab.quality.words import normalize_words

    assert normalize_words(one) != normalize_words(other)


def test_words_wrong_counts_edits_per_word_of_all_references():
    pytest.importorskip("transformers")
    pytest.importorskip("jiwer")
    from lab.quality.words import words_wrong

    # Of 4 + 4 words one is replaced, one added and, in the second, all four are missing.
    assert words_wrong(["see you at five", "turn on the heating"], ["see her at 5 then", ""]) == 6 / 8


def test_a_rank_is_one_where_all_others_are_lower_and_last_for_silence():
    assert rank(0.9, [0.1, 0.5]) == 1
    assert rank(0.4, [0.1, 0.5]) == 2
    assert rank(0.0, [0.0, 0.0]) == 3


def test_a_count_of_fewer_items_is_held_to_the_same_share():
    goal = {"least": 12, "of": 20}
    assert [is_met(goal, count, 20) for count in (11, 12)] == [False, True]
    assert [is_met(goal, count, 10) for count in (5, 6)] == [False, True]
    assert [is_met({"most": 0.05}, rate) for rate in (0.05, 0.051)] == [True, False]


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_that_is_scored_was_trained_on(split):
    speakers = read_speakers(SPEECH / "speakers.json")
    plan = read_plan(SPEECH / "plan.tsv")
    trained = {plain_words(item.written) for item in plan if speakers[item.speaker].split == "train"}
    one = lists.read_lists()[split]
    sentences = {s["text"] for s in one["sentences"]}
    assert len(sentences) == 60
    assert not {plain_words(text) for text in sentences} & trained
    assert {speakers[v["speaker"]].split for v in one["voices"]["synthetic"]} == {split}
    split_of = {f"librispeech-{clip.speaker}": clip.split for clip in human_clips()}
    assert {split_of[v["speaker"]] for v in one["voices"]["human"]} == {split}
    by_file = {clip.file: clip.split for clip in human_clips()}
    assert {by_file[clip["file"]] for clip in one["bundled"]} <= {"heldout"}


def test_development_uses_neither_speakers_nor_sentences_that_are_held_out():
    heldout, validation = (lists.read_lists()[split] for split in SPLITS)

    def names(one):
        return {v["speaker"] for found in one["voices"].values() for v in found}

    assert not names(heldout) & names(validation)
    assert not {s["text"] for s in heldout["sentences"]} & {s["text"] for s in validation["sentences"]}
    assert len(heldout["bundled"]) == 6
    assert validation["bundled"] == []


@pytest.mark.parametrize("split", SPLITS)
def test_no_voice_says_what_its_recording_says(split):
    for found in lists.read_lists()[split]["voices"].values():
        for voice in found:
            assert len(set(voice["sentences"])) == 3
            for text in voice["sentences"]:
                assert plain_words(text) not in plain_words(voice["text"] or "")


def test_twenty_speakers_are_held_out_and_every_preset_has_sentences():
    heldout = lists.read_lists()["heldout"]
    assert {kind: len(found) for kind, found in heldout["voices"].items()} == {"synthetic": 20, "human": 20}
    presets = [s["preset"] for s in heldout["sentences"]]
    assert {presets.count(preset) for preset in presets} == {3}
    assert len(set(presets)) == 20
    assert {text for v in heldout["voices"]["human"] for text in v["sentences"]} == {
        s["text"] for s in heldout["sentences"]
    }


def test_the_committed_goals_are_those_of_the_code():
    assert lists.read_lists()["goals"] == lists.GOALS


def test_a_quick_run_speaks_a_third_and_compares_with_everybody():
    one = lists.shorter(lists.read_lists()["validation"], every=3)
    assert [s["kind"] for s in one["sentences"]] == ["grammar"] * 10 + ["free"] * 10
    assert len(one["voices"]["synthetic"]) == 20
    assert sum(v["spoken"] for v in one["voices"]["synthetic"]) == 7


def test_a_limit_speaks_the_first_and_compares_with_everybody():
    one = lists.shorter(lists.read_lists()["heldout"], every=1, limit=2)
    assert len(one["sentences"]) == 4
    assert [v["spoken"] for v in one["voices"]["human"]] == [True] * 2 + [False] * 18
    assert [clip["spoken"] for clip in one["bundled"]] == [True] * 2 + [False] * 4


def test_a_reference_is_five_to_eight_seconds_and_leaves_five_where_it_can():
    assert [lists.reference_seconds(s) for s in (7.9, 11.5, 13.2, 20.0)] == pytest.approx(
        [5, 6.5, 8, 8], abs=0.05
    )


def test_a_stream_leaves_out_what_the_voice_will_say_and_speakers_of_too_little_speech():
    sentences = [{"text": f"{kind}{n}", "kind": kind} for kind in ("grammar", "free") for n in range(30)]
    utterances = {
        "a": [("grammar0", 4.0), ("x", 4.0), ("y", 4.0)],
        "b": [("z", 7.0)],
        "c": [("free1", 9.0), (None, 8.0)],
    }
    first, second = lists.make_voices(utterances, sentences, None)
    assert (first["speaker"], first["utterances"], first["text"]) == ("a", [1, 2], "x y")
    assert (second["speaker"], second["utterances"], second["text"]) == ("c", [1], None)


def manifest(places):
    """Two voices of each kind, a bundled clip, a sentence of each kind; `places` are the clones'."""
    voices = {
        kind: [{"speaker": f"{kind}{n}", "reference": 8.0, "spoken": True} for n in range(2)]
        for kind in ("synthetic", "human")
    }
    fact = {"text": "one", "ended": True, "seconds": 2.0, "cpu_seconds": 0.5}
    items = {}
    for group in ("preset", "preset-source", "preset-decoded"):
        items |= {f"{group}/0{n}": fact | {"kind": kind} for n, kind in enumerate(("grammar", "free"))}
    for kind, found in voices.items():
        for voice in found:
            place = f"voice/{kind}/{voice['speaker']}"
            for part in ("stream", "reference", "other", "decoded-stream"):
                items[f"{place}/{part}"] = {"text": "one" if "stream" in part else None}
            for method in places:
                items |= {f"{place}/{method}/decoded": {}, f"{place}/{method}/0": fact}
    items["bundled/7/source"] = {}
    items |= {
        f"bundled/7/{method}/{part}": fact for method in ("encoder", "inversion") for part in ("decoded", "0")
    }
    return {
        "items": items,
        "lists": {"voices": voices, "bundled": [{"file": "7-1-0000.flac"}]},
        "facts": {"megabytes": 17.0},
        "goals": lists.GOALS,
    }


def score(request):
    """New speech is in the voice of the first speaker, everything else in its own: an axis for each."""
    if request.measure != "embedding":
        return 3.0 if request.measure == "naturalness" else "one"
    is_second = request.names[0].split("/")[2].endswith("1") and not request.names[0].endswith("/0")
    return np.eye(2)[int(is_second)].tolist()


@pytest.fixture
def results(monkeypatch):
    monkeypatch.setattr(tables, "words_wrong", lambda references, hypotheses: 0.25)
    one = manifest(("encoder-3", "encoder-8", "inversion-8"))
    return one, tables.tables(one, {request: score(request) for request in tables.wanted(one)})


def test_a_voice_is_ranked_by_another_stretch_among_all_speakers(results):
    found = results[1]["voices"]["human"]["encoder"]
    assert (found["first"], found["voices"], found["speakers"]) == (1, 2, 2)
    assert (found["first_of_decoded"], found["first_of_reference"]) == (2, 2)
    assert found["similarity"] == pytest.approx(0.5)  # one is 1, one is 0
    assert found["below_decoded"] == pytest.approx(0.5)
    assert (found["ended"], found["sentences"]) == (2, 2)
    assert list(results[1]["voices"]["human"]["by_length"]) == ["3", "8"]


def test_speed_is_speech_by_processor_time(results):
    assert results[1]["folder"]["times_real_time"] == pytest.approx(4.0)


def test_every_goal_stands_in_the_tables_beside_its_value(results):
    shown = {row.goal for _, rows in tables._sections(results[1]) for row in rows if row.value is not None}
    assert set(lists.GOALS) <= shown
    text = markdown(results[1], lists.GOALS, "heldout")
    assert "| words wrong, grammar (tiny.en) | 25.0 % | at most 5 % | NO |" in text
    assert "| megabytes | 17 | at most 50 | yes |" in text


def test_what_another_checkpoint_said_is_not_gone_on_with(tmp_path):
    from lab.quality.speak import SpeakRequest, speak

    out, checkpoint, encoder = tmp_path / "out", tmp_path / "checkpoint", tmp_path / "encoder"
    out.mkdir()
    checkpoint.mkdir()
    encoder.write_bytes(b"encoder")
    (out / "manifest.json").write_text(json.dumps({"stamp": "another", "items": {}}))
    with pytest.raises(LabError, match="another checkpoint"):
        speak(SpeakRequest(checkpoint, encoder, tmp_path, out))


def test_wanted_scores_are_asked_for_once():
    requests = tables.wanted(manifest(("encoder-3", "encoder-8")))
    assert len(set(requests)) == len(requests)
    assert Wanted("embedding", ("voice/human/human1/encoder-3/0",)) in requests
    assert Wanted("naturalness", ("voice/human/human1/encoder-3/0",)) not in requests


class CountingModels:
    """Stands for the models; scores with the length of the audio."""

    def __init__(self):
        self.measures = []

    def score(self, measure, audio):
        self.measures.append(measure)
        return [1.0, 0.0] if measure == "embedding" else audio.seconds


def test_a_second_run_scores_only_what_has_changed(tmp_path):
    from lab.quality.measures import measure
    from revox.speech import Audio, write_audio

    def write(seconds):
        write_audio(tmp_path / "0.wav", Audio(np.full(int(24000 * seconds), 0.1, np.float32), 24000))

    items = {"preset/00": {"file": "0.wav", "text": "one"}}
    lists_ = {"voices": {}, "bundled": []}
    (tmp_path / "manifest.json").write_text(json.dumps({"items": items, "lists": lists_}))
    models, expected = CountingModels(), ["words base", "words tiny.en", "naturalness"]
    write(1.0)
    _, first = measure(tmp_path, models)
    assert models.measures == expected
    with (tmp_path / "measures.jsonl").open("a") as file:
        file.write('["words ba')  # a run that was killed while it wrote
    assert measure(tmp_path, models)[1] == first
    assert models.measures == expected
    write(2.0)
    _, changed = measure(tmp_path, models)
    assert models.measures == expected * 2
    assert changed[Wanted("naturalness", ("preset/00",))] == pytest.approx(2.0, abs=0.01)


def test_speech_that_was_never_made_is_a_sentence(tmp_path):
    from lab.quality.measures import measure

    with pytest.raises(LabError, match=r"lab_quality\.py speak"):
        measure(tmp_path, CountingModels())
