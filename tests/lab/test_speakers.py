"""The committed lists of who speaks in the lab."""

from collections import Counter

import numpy as np
import pytest

from lab import LabError
from lab.speakers import (
    PRESETS,
    cast_presets,
    draw_speakers,
    find_human_clips,
    from_json,
    human_clips,
    preset_speakers,
    split_speakers,
    synthetic_speakers,
    to_json,
)


def test_hundreds_of_speakers_and_twenty_held_out_ten_of_each_sex():
    speakers = synthetic_speakers()
    assert len({speaker.name for speaker in speakers}) == len(speakers) >= 300
    by_split = Counter((speaker.split, speaker.sex) for speaker in speakers)
    for split in ("validation", "heldout"):
        assert by_split[split, "F"] == by_split[split, "M"] == 10


def test_every_preset_has_a_training_speaker_of_its_sex():
    presets = preset_speakers()
    assert tuple(presets) == PRESETS
    assert len(presets) == 20
    for name, speaker in presets.items():
        assert speaker.split == "train"
        assert speaker.sex == ("F" if "female" in name else "M")


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


def test_the_same_seed_draws_the_same_speakers_and_the_file_keeps_them():
    speakers = draw_speakers(30, 5)
    assert speakers == draw_speakers(30, 5) != draw_speakers(30, 6)
    assert from_json(to_json(speakers)) == speakers


def test_groups_are_unalike_and_training_holds_nobody_in_disguise():
    speakers = draw_speakers(200, 1)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(200, 32))
    embeddings[150:] = embeddings[100:150] + 0.01 * rng.normal(size=(50, 32))  # fifty twins
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    number = {speaker.name: i for i, speaker in enumerate(speakers)}
    kept = split_speakers(speakers, embeddings, 0)
    checks = [number[s.name] for s in kept if s.split != "train"]
    train = [number[s.name] for s in kept if s.split == "train"]
    assert len(checks) == 40
    assert (embeddings[train] @ embeddings[checks].T).max() <= 0.95


def test_presets_are_cast_by_sex_from_training_speakers_who_sound_unalike():
    speakers = draw_speakers(300, 2)
    embeddings = np.eye(300)
    twins = [*range(0, 120, 2), *range(1, 120, 2)]
    embeddings[twins] = embeddings[twins[0]]  # half of them sound the same: only one of these may play
    cast = cast_presets(speakers, embeddings, 0)
    playing = [i for i, speaker in enumerate(cast) if speaker.preset]
    assert sorted(cast[i].preset or "" for i in playing) == sorted(PRESETS)
    assert all(("female" in (cast[i].preset or "")) == (cast[i].sex == "F") for i in playing)
    assert len(set(playing) & set(twins)) <= 2  # one of each sex
