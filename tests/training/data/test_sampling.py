"""Draws are balanced as asked, of similar length side by side, the same every time, and resumed exactly."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, source

from revox.training.data import ClipSampler, DataError, SpeechSource
from revox.training.data.sampling import BLOCK

# clips by (language, speaker)
MANY = {("en", "a"): 30, ("en", "b"): 6, ("de", "c"): 8, ("de", "d"): 2, (None, "e"): 4}


def speech(counts=MANY) -> list[SpeechSource]:
    clips = [
        clip(f"/{language}/{speaker}/{i}", speaker, language, seconds=1 + i % 7)
        for (language, speaker), count in counts.items()
        for i in range(count)
    ]
    return [source("one", clips[::2]), source("two", clips[1::2])]


def sampler_of(sources=None, *, seconds: float = 4.0, batch: int = 4, **options) -> ClipSampler:
    return ClipSampler(speech() if sources is None else sources, seconds=seconds, batch=batch, **options)


def draws(sampler: ClipSampler, count: int) -> list[tuple[str, float]]:
    return [(cut.id, cut.start) for cut in islice(sampler, count)]


def speaker(cut) -> str:
    return cut.supervisions[0].speaker


def expected_shares(language_power: float, speaker_power: float) -> dict[str, float]:
    """By hand from the definition: p(language) p(speaker | language)."""
    languages: dict[str | None, int] = {}
    for (language, _), n in MANY.items():
        languages[language] = languages.get(language, 0) + n
    total = sum(n**language_power for n in languages.values())
    return {
        speaker: languages[language] ** language_power / total
        * n**speaker_power / sum(m**speaker_power for (other, _), m in MANY.items() if other == language)
        for (language, speaker), n in MANY.items()
    }  # fmt: skip


@pytest.mark.parametrize("powers", [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.25, 0.75)])
def test_each_speaker_is_drawn_as_often_as_the_balance_asks(powers):
    sampler = sampler_of(balance={"language": powers[0], "speaker": powers[1]}, seed=3)
    drawn = Counter(map(speaker, islice(sampler, 4 * BLOCK)))
    for name, share in expected_shares(*powers).items():
        # Each round of 50 has a speaker's quota rounded up or down.
        assert abs(drawn[name] - 4 * BLOCK * share) <= 4 * BLOCK / 50 + 1, name
        assert drawn[name] / (4 * BLOCK) == pytest.approx(share, abs=0.008)


def test_within_a_speaker_all_clips_are_drawn_alike():
    sampler = sampler_of(balance={"language": 0, "speaker": 0}, seed=1)
    drawn = Counter(cut.id for cut in islice(sampler, 16 * BLOCK) if speaker(cut) == "a")
    assert len(drawn) == 30
    mean = sum(drawn.values()) / 30
    assert max(abs(n - mean) for n in drawn.values()) < 6 * mean**0.5


def test_without_balance_every_clip_is_drawn_equally_often_in_random_order():
    clips = [clip(f"/{i}", f"s{i % 3}", seconds=2) for i in range(BLOCK // 2)]
    sampler = sampler_of([source("one", clips)], balance={"language": 1, "speaker": 1}, seed=1)
    ids = [cut.id for cut in islice(sampler, 2 * BLOCK)]
    assert set(Counter(ids[:BLOCK]).values()) == {2}
    assert set(Counter(ids[BLOCK:]).values()) == {2}
    assert ids[:BLOCK] != ids[BLOCK:]
    assert ids[: BLOCK // 2] != sorted(ids[: BLOCK // 2])


def test_the_sequence_depends_on_the_seed_only_and_processes_share_it_out():
    assert draws(sampler_of(seed=5), 330) == draws(sampler_of(seed=5), 330)
    assert draws(sampler_of(seed=5), 330) != draws(sampler_of(seed=6), 330)
    whole = draws(sampler_of(seed=5), 4 * BLOCK)
    parts = [draws(sampler_of(seed=5, rank=r, world=4), BLOCK) for r in range(4)]
    assert sorted(draw for part in parts for draw in part) == sorted(whole)


@pytest.mark.parametrize("used", [0, 1, 77, BLOCK, BLOCK + 9])
def test_a_state_continues_with_the_very_same_draws(used):
    sampler = sampler_of(seed=2, rank=1, world=2)
    draws(sampler, used)
    state = json.loads(json.dumps(sampler.state_dict()))
    after = draws(sampler, BLOCK)
    resumed = sampler_of(seed=2, rank=1, world=2)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert draws(resumed, BLOCK) == after
    sampler.load_state_dict(state)
    assert draws(sampler, BLOCK) == after


def test_with_another_number_of_processes_it_continues_with_draws_that_none_has_used():
    whole = draws(sampler_of(seed=5), 6 * BLOCK)
    sampler = sampler_of(seed=5, rank=0, world=4)
    draws(sampler, 20)  # all four are in the first four blocks of the whole
    fewer = [sampler_of(seed=5, rank=r, world=2) for r in range(2)]
    for one in fewer:
        one.load_state_dict(sampler.state_dict())
    both = [draw for one in fewer for draw in draws(one, BLOCK)]
    assert sorted(both) == sorted(whole[4 * BLOCK :])


def test_a_state_of_other_speech_or_settings_is_refused():
    state = sampler_of(seed=2).state_dict()
    with pytest.raises(DataError, match="differs from what the run began with"):
        sampler_of(seed=2).load_state_dict({"position": 7, "world": 1, "of": "0" * 16, "streams": []})  # 0.1
    for other in (
        sampler_of(speech({("en", "a"): 3}), seed=2),
        sampler_of(seed=2, balance={"speaker": 1.0}),
        sampler_of(seed=3),
        sampler_of(seed=2, seconds=2.0),
    ):
        with pytest.raises(DataError, match="differs from what the run began with"):
            other.load_state_dict(state)


def test_neighbors_have_similar_lengths():
    sampler = sampler_of(seed=0, batch=8, seconds=4.0)
    lengths = np.array([cut.duration for cut in islice(sampler, BLOCK)]).reshape(-1, 8)
    assert set(lengths.ravel()) == {1.0, 2.0, 3.0, 4.0}  # of 1 to 7 seconds, at most 4 are used
    assert (np.ptp(lengths, axis=1) == 0).mean() > 0.9


def test_cuts_are_spread_over_the_whole_clip():
    clips = [clip(f"/{i}", "s", seconds=11.0) for i in range(50)]
    cuts = list(islice(sampler_of([source("one", clips)], seconds=1.0, seed=0), 4 * BLOCK))
    assert {cut.duration for cut in cuts} == {1.0}
    starts = np.array([cut.start for cut in cuts])
    assert 0 <= starts.min() < 0.1
    assert 9.9 < starts.max() < 10
    assert np.abs(np.quantile(starts, [0.25, 0.5, 0.75]) - [2.5, 5, 7.5]).max() < 0.5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 2, "world": 2}, "rank 2 is not one of 2"),
        ({"balance": {"accent": 1.0}}, "balanced by accent"),
        ({"balance": {"speaker": -1.0}}, "a power from 0"),
        ({"batch": 0}, "at least one clip"),
        ({"sources": [source("none", [])]}, "no clips to draw from"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(asked, said):
    with pytest.raises(DataError, match=said):
        sampler_of(**asked)


def test_a_thousand_clips_of_many_speakers_give_every_language_its_share():
    clips = [clip(f"/{i}", f"s{i % 100}", f"l{i % 7 if i % 100 else 0}", seconds=5) for i in range(1000)]
    sampler = sampler_of([source("big", clips)], balance={"language": 0}, seed=0)
    drawn = Counter(cut.supervisions[0].language for cut in islice(sampler, 2 * BLOCK))
    assert set(drawn) == {f"l{i}" for i in range(7)}
    assert max(drawn.values()) / min(drawn.values()) < 1.2
