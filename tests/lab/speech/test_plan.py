from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.speech.plan import (
    SPLITS,
    PlannedUtterance,
    Speaker,
    assemble,
    plain_words,
    read_plan,
    read_speakers,
    speaker_order,
    write_plan,
    write_speakers,
)

SPEECH = Path(__file__).parents[3] / "lab" / "speech"


def _speaker(name: str, split: str = "train", preset: bool = False) -> Speaker:
    return Speaker(name, split, preset, mix={"af_x": 1.0}, spread=1.0, speed=1.0)


SPEAKERS = [
    _speaker("p", preset=True),
    _speaker("a"),
    _speaker("b"),
    _speaker("v", "validation"),
    _speaker("h", "heldout"),
]
GRAMMAR = [
    PlannedUtterance(0, "p", "Made."),
    PlannedUtterance(1, "a", "One."),
    PlannedUtterance(2, "h", "Two."),
    PlannedUtterance(3, "b", "Three."),
    PlannedUtterance(4, "v", "Four."),
]
SENTENCES = {"train": ["A b.", "C d."], "validation": ["E f."], "heldout": ["G h."]}


def test_training_alternates_grammar_and_free_after_what_is_made_and_the_checks():
    plan = assemble(SPEAKERS, GRAMMAR, GRAMMAR[:1], SENTENCES, seed=0)
    assert [item.written for item in plan] == [
        "Made.",
        "Two.",
        "Four.",
        "E f.",
        "G h.",
        "One.",
        "A b.",
        "Three.",
        "C d.",
    ]
    assert len({item.number for item in plan}) == len(plan)
    assert [item.kind for item in plan[-2:]] == ["plan", "free"]


def test_a_split_is_spoken_by_its_own_speakers_only():
    splits = {speaker.name: speaker.split for speaker in SPEAKERS}
    plan = assemble(SPEAKERS, [], [], SENTENCES, seed=0)
    said = {split: [i.written for i in plan if splits[i.speaker] == split] for split in SPLITS}
    assert said["validation"] == SENTENCES["validation"]
    assert said["heldout"] == SENTENCES["heldout"]


def test_each_round_holds_every_speaker_once_and_presets_three_times():
    order = speaker_order(SPEAKERS[:3], 10, seed=5)
    for one_round in (order[:5], order[5:]):
        assert sorted(one_round) == ["a", "b", "p", "p", "p"]
    assert order == speaker_order(SPEAKERS[:3], 10, seed=5)


def test_a_plan_and_speakers_come_back_as_written(tmp_path):
    write_plan(tmp_path / "plan.tsv", GRAMMAR)
    write_speakers(tmp_path / "speakers.json", SPEAKERS)
    assert read_plan(tmp_path / "plan.tsv") == GRAMMAR
    assert list(read_speakers(tmp_path / "speakers.json").values()) == SPEAKERS


def test_a_number_twice_or_a_line_without_sentence_is_named(tmp_path):
    path = tmp_path / "plan.tsv"
    write_plan(path, [GRAMMAR[0], GRAMMAR[0]])
    with pytest.raises(ValueError, match=r"line 2: number 0 stands in the plan twice"):
        read_plan(path)
    path.write_text("0\tp\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: expected number, speaker and sentence"):
        read_plan(path)


def test_a_voice_over_half_british_is_read_as_british_english():
    half = replace(SPEAKERS[0], mix={"bf_x": 0.5, "af_x": 0.5})
    assert half.language == "en-us"
    assert replace(half, mix={"bf_x": 0.51, "af_x": 0.49}).language == "en-gb"


def test_the_committed_plan_keeps_what_judges_the_lab_out_of_training():
    speakers = read_speakers(SPEECH / "speakers.json")
    plan = read_plan(SPEECH / "plan.tsv")
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    for item in plan:
        texts[speakers[item.speaker].split].add(item.text)
    assert not texts["train"] & (texts["validation"] | texts["heldout"])
    judged = json.loads((SPEECH / "heldout.json").read_text(encoding="utf-8"))
    assert {kind: len(sentences) for kind, sentences in judged.items()} == {"grammar": 30, "free": 30}
    assert {plain_words(s) for sentences in judged.values() for s in sentences} <= texts["heldout"]


def test_the_committed_plan_teaches_3000_words_and_is_half_free_sentences():
    speakers = read_speakers(SPEECH / "speakers.json")
    training = [i for i in read_plan(SPEECH / "plan.tsv") if speakers[i.speaker].split == "train"]
    assert len({word for item in training for word in item.text.split()}) >= 3000
    words = {kind: sum(len(i.text.split()) for i in training if i.kind == kind) for kind in ("plan", "free")}
    assert 0.45 < words["free"] / sum(words.values()) < 0.55
