"""Draws are balanced as asked, the same every time, and shared out between processes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from revox.training.data import Clip, ClipSampler, DataError, Source

# clips by (language, speaker)
MANY = {("en", "a"): 30, ("en", "b"): 6, ("de", "c"): 8, ("de", "d"): 2, (None, "e"): 4}


def speech(counts=MANY) -> list[Source]:
    clips = [
        Clip(f"/{language}/{speaker}/{i}", speaker, language)
        for (language, speaker), count in counts.items()
        for i in range(count)
    ]
    return [Source("one", clips[::2]), Source("two", clips[1::2])]


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
    sampler = ClipSampler(speech(), balance={"language": powers[0], "speaker": powers[1]}, seed=3)
    rounds = 40
    drawn = Counter(draw.clip.speaker for draw in islice(sampler, rounds * 50))
    for speaker, share in expected_shares(*powers).items():
        # Each round has a speaker's quota rounded up or down.
        assert abs(drawn[speaker] - rounds * 50 * share) <= rounds, speaker
        assert drawn[speaker] / (rounds * 50) == pytest.approx(share, abs=0.008)


def test_within_a_speaker_all_clips_come_alike():
    sampler = ClipSampler(speech(), balance={"language": 0, "speaker": 0}, seed=1)
    drawn = Counter(draw.clip.key for draw in islice(sampler, 50 * 200) if draw.clip.speaker == "a")
    assert len(drawn) == 30
    mean = sum(drawn.values()) / 30
    assert max(abs(n - mean) for n in drawn.values()) < 6 * mean**0.5


def test_as_the_data_lie_a_round_draws_each_clip_once_in_another_order():
    sampler = ClipSampler(speech(), balance={"language": 1, "speaker": 1}, seed=1)
    first, second = ([draw.clip.key for draw in islice(sampler, 50)] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 50
    assert first != second
    assert first != sorted(first)


def test_the_sequence_is_the_seeds_and_processes_share_it_out():
    whole = [d for d in islice(ClipSampler(speech(), seed=5), 330)]
    again = [d for d in islice(ClipSampler(speech(), seed=5), 330)]
    other = [d for d in islice(ClipSampler(speech(), seed=6), 330)]
    assert whole == again
    assert whole != other
    parts = [list(islice(ClipSampler(speech(), seed=5, rank=r, world=3), 110)) for r in range(3)]
    assert [draw for together in zip(*parts, strict=True) for draw in together] == whole


def test_a_state_goes_on_with_the_very_same_draws():
    import json

    sampler = ClipSampler(speech(), seed=2, rank=1, world=2)
    list(islice(sampler, 77))
    state = json.loads(json.dumps(sampler.state_dict()))
    after = list(islice(sampler, 60))
    resumed = ClipSampler(speech(), seed=2, rank=1, world=2)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 60)) == after
    assert list(islice(sampler.copy(), 5)) == list(islice(sampler, 5))


def test_with_another_number_of_processes_the_sequence_goes_on_where_it_was():
    whole = [d for d in islice(ClipSampler(speech(), seed=5), 200)]
    sampler = ClipSampler(speech(), seed=5, rank=0, world=4)
    list(islice(sampler, 20))  # of each: 80 in all
    fewer = [ClipSampler(speech(), seed=5, rank=r, world=2) for r in range(2)]
    for one in fewer:
        one.load_state_dict(sampler.state_dict())
    assert [next(fewer[0]), next(fewer[1]), next(fewer[0])] == whole[80:83]


def test_a_state_of_other_speech_is_refused():
    state = ClipSampler(speech(), seed=2).state_dict()
    with pytest.raises(DataError, match="not what the run began with"):
        ClipSampler(speech({("en", "a"): 3}), seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="not what the run began with"):
        ClipSampler(speech(), seed=2, balance={"speaker": 1.0}).load_state_dict(state)


def test_places_are_spread_over_the_clip():
    places = np.array([draw.place for draw in islice(ClipSampler(speech(), seed=0), 2000)])
    assert 0 <= places.min() < 0.01
    assert 0.99 < places.max() < 1
    assert np.abs(np.quantile(places, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.05


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 2, "world": 2}, "rank 2 is none of 2"),
        ({"balance": {"accent": 1.0}}, "balanced by accent"),
        ({"balance": {"speaker": -1.0}}, "a power from 0"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(asked, said):
    with pytest.raises(DataError, match=said):
        ClipSampler(speech(), **asked)
    with pytest.raises(DataError, match="no clips to draw from"):
        ClipSampler([Source("none", [])])


def test_a_million_clips_are_prepared_in_seconds_and_drawn_from_columns():
    from revox.training.data import ClipTable
    from revox.training.data.table import Strings

    n = 1_000_000
    empty = np.zeros(n, np.int64)
    table = ClipTable(
        "/x",
        Strings(np.frombuffer(b"abcdefgh" * (n // 8), np.uint8), np.arange(1, n + 1)),
        (np.arange(n) % 5000).astype(np.int32),
        (np.arange(n) % 7).astype(np.int32),
        Strings(np.zeros(0, np.uint8), empty),
        np.full(n, 5, np.float32),
        np.full(n, 24000, np.int32),
        empty,
        [f"s{i}" for i in range(5000)],
        [f"l{i}" for i in range(7)],
    )
    sampler = ClipSampler([Source("big", table)], seed=0)
    drawn = Counter(draw.clip.language for draw in islice(sampler, 7000))
    assert set(drawn) == {f"l{i}" for i in range(7)}
    assert sampler.shares().sum() == pytest.approx(1.0)
    assert min(drawn.values()) > 850
