"""Who speaks in the lab, and what: human clips cut at pauses, presets, splits."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from lab import LabError, sources
from lab.sizes import PRESETS
from lab.sources import (
    LONGEST,
    PAUSE,
    SHORTEST,
    SPEECH,
    SPEEDS,
    HumanClip,
    changed_voices,
    find_human_clips,
    human_clips,
    human_utterances,
    preset_speakers,
    sex_of,
    synthetic_utterances,
)
from lab.speech.plan import SPLITS, read_plan, read_speakers

SECONDS = 30.0


def random_words(seed, seconds=SECONDS):
    """Words of a clip as a recognizer writes them, with pauses: [start, end, word, probability]."""
    rng = np.random.default_rng(seed)
    words, at = [], 0.0
    while at < seconds - 1.0:
        end = at + rng.uniform(0.1, 0.6)
        mark = rng.choice(["", "", "", ",", "."])
        words.append([round(at, 2), round(end, 2), f"word{len(words)}{mark}", 0.9])
        at = end + rng.choice([0.0, 0.0, 0.05, 0.2, 0.5])
    return words


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Six human clips of two splits; the second one's words are doubtful."""
    found = tuple(HumanClip(f"{i}-1.flac", str(i), "FM"[i % 2], SPLITS[i % 2]) for i in range(6))
    lines = []
    for i, clip in enumerate(found):
        (tmp_path / clip.file).touch()
        lines.append(
            {
                "file": clip.file,
                "seconds": SECONDS,
                "logprob": -0.7 if i == 2 else -0.3,
                "words": random_words(i),
            }
        )
    (tmp_path / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sources, "human_clips", lambda: found)
    return tmp_path


def test_the_utterances_of_a_human_clip_cover_it_and_keep_all_its_words(clips):
    found = human_utterances(clips, "train")
    by_clip = {path: [one for one in found if one.path == path] for path in {one.path for one in found}}
    assert {path.name for path in by_clip} == {"0-1.flac", "2-1.flac", "4-1.flac"}
    for path, mine in by_clip.items():
        edges = [one.span for one in mine]
        assert edges[0][0] == 0
        assert edges[-1][1] == SECONDS
        assert [end for _, end in edges[:-1]] == [start for start, _ in edges[1:]]
        assert len(mine) > 3
        if path.name != "2-1.flac":
            words = [word for _, _, word, _ in random_words(int(path.name[0]))]
            assert " ".join(one.text for one in mine).split() == words


def test_human_clips_are_cut_in_the_middle_of_pauses_and_neither_short_nor_much_too_long(clips):
    for one in human_utterances(clips, "train"):
        words = random_words(int(one.path.name[0]))
        start, end = one.span
        assert end - start >= SHORTEST
        assert end - start < LONGEST + 3
        if end < SECONDS:
            (cut,) = [i for i, (a, b) in enumerate(pairwise(words)) if a[1] <= end <= b[0]]
            pause = words[cut][1], words[cut + 1][0]
            assert pause[1] - pause[0] >= PAUSE - 1e-9
            assert end == pytest.approx(sum(pause) / 2)


def test_doubtful_words_are_left_out_and_the_speech_is_kept(clips):
    texts = {(one.speaker, one.text is None) for one in human_utterances(clips, "train")}
    assert texts == {("librispeech-0", False), ("librispeech-2", True), ("librispeech-4", False)}


def test_changed_voices_are_of_utterances_with_words_and_other_speakers(clips):
    plain = human_utterances(clips, "train")
    changed = changed_voices(plain)
    assert {one.speaker for one in changed} == {
        f"librispeech-{i}-{speed}" for i in (0, 4) for speed in SPEEDS
    }
    known = [(one.path, one.span, one.text) for one in plain if one.text is not None]
    for speed in SPEEDS:
        assert [(one.path, one.span, one.text) for one in changed if one.speed == speed] == known


def test_a_clip_without_words_and_a_folder_without_transcripts_are_named(clips):
    path = clips / "transcripts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(LabError, match=r"transcripts\.jsonl has no words of 0-1\.flac"):
        human_utterances(clips, "train")
    path.unlink()
    with pytest.raises(LabError, match=r"transcripts\.jsonl is missing"):
        human_utterances(clips, "train")


def test_human_clips_are_split_by_speaker_with_ten_women_and_ten_men_held_out():
    clips = human_clips()
    assert len({clip.speaker for clip in clips}) == len(clips) == 251
    assert all(clip.file.split("-")[0] == clip.speaker for clip in clips)
    counts = Counter((clip.split, clip.sex) for clip in clips)
    assert counts["heldout", "F"] == counts["heldout", "M"] == 10
    assert counts["validation", "F"] == counts["validation", "M"] == 10
    assert counts["train", "F"] + counts["train", "M"] == 211


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(LabError, match=r"103-1240-0000\.flac is missing"):
        find_human_clips(tmp_path)


def test_every_preset_has_a_training_speaker_of_its_own_and_of_its_sex():
    speakers, cast = read_speakers(SPEECH / "speakers.json"), preset_speakers()
    assert tuple(cast) == PRESETS
    assert len(set(cast.values())) == 20
    for preset, name in cast.items():
        assert speakers[name].split == "train"
        assert sex_of(name) == ("F" if "female" in preset else "M")


def test_the_sex_of_a_speaker_is_that_of_most_of_its_mixture():
    # The synthesizer names its voices af_heart, bm_lewis: accent, sex, name.
    for name, speaker in read_speakers(SPEECH / "speakers.json").items():
        women = sum(weight for voice, weight in speaker.mix.items() if voice[1] == "f")
        assert sex_of(name) == ("F" if women > 0.5 else "M"), name


def _index(folder, items):
    folder.mkdir()
    lines = [{"file": item.file, "speaker": item.speaker, "written": item.written} for item in items]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_splits_are_disjoint_in_speakers_and_hold_what_the_folders_have_in_the_plans_order(tmp_path):
    plan = read_plan(SPEECH / "plan.tsv")
    _index(tmp_path / "one", reversed(plan[::3]))
    _index(tmp_path / "two", plan[1::3])
    found = {split: synthetic_utterances([tmp_path / "one", tmp_path / "two"], split) for split in SPLITS}
    speakers = [{one.speaker for one in found[split]} for split in SPLITS]
    assert sum(map(len, speakers)) == len(set().union(*speakers)) == 400
    made = [item for i, item in enumerate(plan) if i % 3 < 2]
    assert sum(map(len, found.values())) == len(made)
    train = set(found["train"])
    written = [one.text for one in found["train"]]
    assert written == [item.written for item in made if item.speaker in speakers[0]]
    assert {one.path.parent.parent.name for one in train} == {"one", "two"}
    presets = {one.preset: one.speaker for one in train if one.preset}
    assert presets == preset_speakers()


def test_a_folder_without_speech_says_what_makes_some(tmp_path):
    with pytest.raises(LabError, match=r"holds no speech \(index\.jsonl\): make it with"):
        synthetic_utterances([tmp_path], "train")
