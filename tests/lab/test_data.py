"""Making the lab's speech: what is planned, split and resumed."""

from dataclasses import replace

import numpy as np
import pytest

from lab import data
from lab.sentences import split_of
from lab.speakers import synthetic_speakers
from lab.synthesize import SynthesizedSpeech

COUNTS = data.SpeechCounts(per_speaker=3, per_preset=5, per_check=2)


@pytest.fixture
def spoken(monkeypatch):
    """Two training speakers (one a preset), one validation and one held-out, and a fast synthesizer."""
    everyone = synthetic_speakers()
    chosen = [
        next(s for s in everyone if s.preset),
        next(s for s in everyone if s.split == "train" and not s.preset),
    ]
    chosen += [next(s for s in everyone if s.split == split) for split in ("validation", "heldout")]
    monkeypatch.setattr(data, "synthetic_speakers", lambda: chosen)
    requests = []

    def synthesize(speaker, text, rate, flite):
        requests.append((speaker.name, text))
        return SynthesizedSpeech(np.full(100 + len(text), 0.25, np.float32), (("pau", 0.1),))

    monkeypatch.setattr(data, "synthesize", synthesize)
    return requests


def prepare(folder, per_speaker=3, **options):
    return data.prepare(folder, None, replace(COUNTS, per_speaker=per_speaker), **options)


def test_training_speakers_say_training_sentences_and_presets_say_some_of_every_split(tmp_path, spoken):
    prepare(tmp_path)
    counted = {}
    for split in ("train", "validation", "heldout"):
        speech = data.SpeechSet(tmp_path, split)
        assert {split_of(u.text) for u in speech.utterances} == {split}
        assert all(len(speech.waveform(i)) == 100 + len(u.text) for i, u in enumerate(speech.utterances))
        counted[split] = sorted((u.preset is not None, len(speech.of(u.speaker))) for u in speech.utterances)
    assert counted["train"] == [(False, 3)] * 3 + [(True, 5)] * 5
    assert counted["validation"] == counted["heldout"] == [(False, 2)] * 2 + [(True, 2)] * 2


def test_what_an_interrupted_run_made_is_not_made_again(tmp_path, spoken, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop_after_two(at):
        if "train" in at.what and at.done == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare(tmp_path, progress=stop_after_two)
    assert not (tmp_path / "synthetic-train.json").exists()
    assert len(spoken) == 5
    prepare(tmp_path)
    assert len(set(spoken)) == len(spoken) == 5 + 3 + 4 + 4


def test_several_workers_make_the_same_set(tmp_path, spoken):
    prepare(tmp_path / "one")
    prepare(tmp_path / "four", workers=4)
    one, four = (data.SpeechSet(tmp_path / name, "train").utterances for name in ("one", "four"))
    assert one == four


def test_a_larger_set_adds_to_the_smaller_one_and_starts_with_it(tmp_path, spoken):
    prepare(tmp_path)
    small = [u.text for u in data.SpeechSet(tmp_path, "train").utterances]
    prepare(tmp_path, per_speaker=6)
    large = data.SpeechSet(tmp_path, "train")
    texts = [u.text for u in large.utterances]
    assert len(set(spoken)) == len(spoken)
    assert set(small) < set(texts)
    assert len(texts) == 11
