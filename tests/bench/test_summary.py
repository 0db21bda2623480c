"""Statistics against closed forms; limits; what makes a run fail; the report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from revox.bench.errors import BenchError
from revox.bench.models import ModelEntry, model_entry, read_models
from revox.bench.plan import BenchResult, RequestResult
from revox.bench.report import write_bench
from revox.bench.summary import (
    BenchLimit,
    default_limits,
    failures,
    statistics,
    summarize_levels,
)


def request(number, seconds, mode="stream", streams=1, **changes):
    values = dict(first_audio=seconds / 10, speech=2.0, ran_dry=number == 0) | changes
    return RequestResult("a|b", mode, streams, number, "Ten chars.", "ada", "pcm", 200, seconds, **values)


@pytest.fixture
def result():
    found = BenchResult(
        {"revox": "1"}, {"a|b": {"kind": "mistral", "model": "voxtral-mini-tts-2603", "voices": 1}}
    )
    found.requests = [request(0, 9.0, mode="warm-up")]
    found.requests += [request(i, float(i + 1)) for i in range(4)]
    found.walls["a|b", "stream", 1] = 8.0
    return found


def test_statistics_are_those_of_the_numbers():
    found = statistics([4.0, 1.0, None, 2.0, 3.0, 5.0])
    assert found == {"mean": 3.0, "min": 1.0, "p50": 3.0, "p95": pytest.approx(4.8), "max": 5.0}
    assert set(statistics([None]).values()) == {None}


def test_a_level_has_its_figures(result):
    (level,) = summarize_levels(result)
    assert (level.requests, level.statuses) == (4, {"200": 4})
    figures = level.figures
    assert figures["latency.p50"] == 2.5
    assert figures["first_audio.max"] == 0.4
    assert figures["real_time_factor.mean"] == 1.25
    assert figures["characters_per_second"] == 5.0  # 4 texts of 10 in 8 s
    assert (figures["failed"], figures["faulty"], figures["ran_dry"]) == (0, 0, 0.25)
    assert figures["word_errors_percent"] is None


def test_words_are_counted_over_all_files(result):
    result.requests[1:] = [
        request(0, 1.0, mode="whole", transcript="ten chars"),
        request(1, 1.0, mode="whole", transcript="ten cars"),
    ]
    assert summarize_levels(result)[0].figures["word_errors_percent"] == 25.0


@pytest.mark.parametrize(
    ("text", "at_most", "broken"),
    [
        ("latency.p50=2.5", True, False),
        ("latency.p50=2.4", True, True),
        ("characters_per_second=5", False, False),
        ("characters_per_second@1=5.1", False, True),
        ("latency.p50@4=9", True, True),  # not measured
        ("word_errors_percent=9", True, True),
    ],
)
def test_a_limit_is_kept_or_broken(result, text, at_most, broken):
    sentences = BenchLimit.parse(text, at_most).broken(summarize_levels(result))
    assert bool(sentences) is broken
    assert bool(failures(result, [BenchLimit.parse(text, at_most)])) is broken


@pytest.mark.parametrize("text", ["latency=1", "latency.p50", "latency.p50=x", "latency.p50=-1", "nothing=1"])
def test_other_limits_are_refused(text):
    with pytest.raises(BenchError):
        BenchLimit.parse(text, True)


def test_by_default_a_failed_request_or_a_faulty_file_fails_the_run(result):
    assert failures(result, default_limits([])) == []
    result.requests.append(request(9, 1.0, problems=("clipped: 9 samples at full scale",)))
    assert "faulty is 0.2" in failures(result, default_limits([]))[0]
    assert failures(result, default_limits([BenchLimit.parse("faulty=0.2", True)])) == []
    result.requests.append(request(10, 1.0, speech=None, problems=("status 500: no",)))
    assert "failed is 0.167" in " ".join(failures(result, default_limits([])))


def test_a_limit_for_one_number_of_streams_leaves_the_others_their_default(result):
    result.requests.append(request(10, 1.0, speech=None, problems=("status 500: no",)))
    result.requests += [request(i, 1.0, streams=2) for i in range(3)]
    limits = default_limits([BenchLimit.parse("failed@2=0", True)])
    assert ["1 streams: failed is 0.2" in one for one in failures(result, limits)] == [True]
    assert failures(result, default_limits([BenchLimit.parse("failed@1=0.2", True)])) == []


def test_words_of_a_text_without_words_are_no_errors(result):
    silent, *others = [replace(one, transcript="ten chars") for one in result.requests[1:]]
    result.requests = [replace(silent, text="(...)", transcript="oh"), *others]
    assert summarize_levels(result)[0].figures["word_errors_percent"] == 0
    result.requests = result.requests[:1]
    assert summarize_levels(result)[0].figures["word_errors_percent"] is None


def test_a_run_that_was_stopped_or_measured_nothing_fails(result):
    result.stopped = "the neighbor is slow"
    assert failures(result, []) == ["the neighbor is slow"]
    assert failures(BenchResult({}, {}), []) == ["nothing was measured"]


def test_a_neighbor_that_stays_slow_fails_the_run(result):
    result.neighbor = {"harmed": True, "before_p50": 0.01, "after_p50": 0.02}
    assert failures(result, []) == ["the neighbor's median was 10.0 ms before and is 20.0 ms after"]


def test_the_report_holds_every_figure_and_escapes_names(result, tmp_path):
    result.requests.append(request(0, 1.0, mode="formats", problems=("44100 Hz, promised 24000",)))
    paths = write_bench(result, default_limits([]), read_models(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| a\\|b | stream | 1 | 2500 | 1000 | 2500 | 3850 | 4000 |" in text
    assert "0.016" in text
    assert "https://" in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["levels"][0]["figures"]["latency.p95"] == pytest.approx(3.85)
    assert found["failures"] == ["a|b, format pcm: 44100 Hz, promised 24000"]
    assert (tmp_path / "report.png") in paths
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_machine_of_ones_own_costs_by_the_hour(result, tmp_path):
    result.endpoints["a|b"] = {"kind": "revox", "model": "other", "voices": 1}
    write_bench(result, [], read_models(), tmp_path, usd_per_hour=1.8)
    found = json.loads((tmp_path / "report.json").read_text())
    # 5 characters a second: 1000 take 200 s.
    assert found["models"]["a|b"]["usd_per_1000_characters"] == pytest.approx(0.1)


def test_every_entry_of_the_table_has_sources():
    for entry in read_models():
        assert entry.sources
        assert entry.license


@pytest.mark.parametrize(
    ("facts", "price"),
    [
        ({"kind": "mistral", "model": "voxtral-mini-tts-3-0"}, 0.013),
        ({"kind": "mistral", "model": "voxtral-mini-tts-2603"}, 0.016),
        ({"kind": "vllm-omni", "model": "mistralai/Voxtral-4B-TTS-2603"}, None),
    ],
)
def test_the_first_entry_that_fits_counts(facts, price):
    assert model_entry(read_models(), facts).usd_per_1000_characters == price
    assert model_entry(read_models(), {"kind": "openai", "model": "unheard of"}) is None


def test_an_own_table_is_read_and_a_wrong_one_is_a_sentence(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(
        "- {kind: revox, usd_per_1000_characters: 0.001, license: mine, cloning: yes, sources: [me]}"
    )
    assert read_models(path)[0] == ModelEntry(
        kind="revox", usd_per_1000_characters=0.001, license="mine", cloning=True, sources=["me"]
    )
    for text in ("- {kind: revox}", "a: [", "- !!python/object:os.system {}", "7"):
        path.write_text(text)
        with pytest.raises(BenchError, match="not a table"):
            read_models(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_models(tmp_path / "none.yaml")
