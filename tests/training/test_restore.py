"""A run put together from a checkpoint's folder and folders of speech."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from conftest import preset_codes, write_speakers
from revox.checkpoint.encoder_file import ENCODER_FILE, decoder_sha256, read_record
from revox.checkpoint.load import load_model
from revox.checkpoint.voices import Voice
from revox.cli import train_command
from revox.coding.find import MODEL_PARTS
from revox.progress import Progress
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import Prompt
from revox.training.data import SpeechSource, find_sources
from revox.training.errors import TrainingError
from revox.training.pseudo_labels import pseudo_labeled
from revox.training.restore import (
    SETTINGS_FILE,
    TRAINING,
    RunOptions,
    _check_resumed,
    divided_sources,
    hold_out,
    hold_out_names,
    restore_encoder,
    texts_of,
)
from revox.training.sentences import drawn_sentences
from revox.training.settings import EncoderTraining
from revox.training.spoken import (
    SpokenSettings,
    Utterance,
    interpolated_voice,
    read_sentences,
    spoken_utterances,
)
from revox.training.student import StudentTraining
from revox.training.world import World

SETTINGS: dict[str, Any] = {
    "steps": 4, "clips": 2, "pairs": 2, "seconds": 0.64, "save_every": 2, "report_every": 1,
    "validate_every": 4, "resolutions": [[256, 20]], "sentences": 0,
    "discriminator": {"start": 100},
}  # fmt: skip


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty speakers of one clip each, 16 kHz."""
    return write_speakers(tmp_path_factory.mktemp("speech"), 16000)


def options(cache: Path, **changes: Any) -> RunOptions:
    return RunOptions(workers=0, device="cpu", cache=cache, tensorboard=False, **changes)


def settings(**changes: Any) -> EncoderTraining:
    return EncoderTraining.model_validate(SETTINGS | changes)


def test_a_run_told_to_stop_saves_and_goes_on_to_the_same_encoder(
    tiny_checkpoint: Path, speech: Path, tmp_path: Path
):
    whole = restore_encoder(
        tiny_checkpoint, [str(speech)], tmp_path / "whole", settings(), options(tmp_path / "cache")
    )

    def stop(at: Progress) -> None:
        if at.what == TRAINING and at.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        restore_encoder(
            tiny_checkpoint, [str(speech)], out, settings(), options(tmp_path / "cache", progress=stop)
        )
    said: list[str] = []
    again = options(tmp_path / "cache", resume=True, message=said.append)
    resumed = restore_encoder(tiny_checkpoint, [str(speech)], out, settings(), again)
    assert "continuing from step 2" in said
    assert any("none is used: weights.feature is 0" in sentence for sentence in said)
    assert resumed.read_bytes() == whole.read_bytes()
    record = read_record(whole)
    assert record["decoder_sha256"] == decoder_sha256(tiny_checkpoint)
    assert record["steps"] == 4
    assert record["data"] == [str(speech)]
    with pytest.raises(TrainingError, match="--resume"):
        restore_encoder(tiny_checkpoint, [str(speech)], out, settings(), options(tmp_path / "cache"))
    with pytest.raises(TrainingError, match="another learning_rate"):
        restore_encoder(tiny_checkpoint, [str(speech)], out, settings(learning_rate=1e-5), again)
    faster = settings(compile=True, steps=4)
    assert (
        restore_encoder(tiny_checkpoint, [str(speech)], out, faster, again) == resumed
    )  # the steps are done
    begun = json.loads((out / SETTINGS_FILE).read_text())
    begun["weights"]["adversarial"] = 1.0
    (out / SETTINGS_FILE).write_text(json.dumps(begun))
    restore_encoder(tiny_checkpoint, [str(speech)], out, settings(), again)
    assert any("weights.adversarial 1, by version 0.1" in sentence for sentence in said)
    with pytest.raises(TrainingError, match="not hold a run to continue"):
        restore_encoder(tiny_checkpoint, [str(speech)], tmp_path / "new", settings(), again)


def test_steps_too_short_to_be_told_have_a_pace_all_the_same(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks), process_time=time.process_time)
    monkeypatch.setattr("revox.training.run.time", clock)
    rows: list[Mapping[str, Any]] = []
    restore_encoder(
        tiny_checkpoint, [], tmp_path / "out", settings(clips=0, steps=2),
        options(tmp_path, progress=lambda at: rows.append(at.facts)),
    )  # fmt: skip
    assert rows[0]["seconds"] == 0.0
    assert rows[0]["audio_seconds_per_second"] == pytest.approx(2 * 0.64 / 0.01)


def test_recordings_are_inverted_once_and_kept_as_they_are_found(
    tiny_checkpoint: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import revox.training.pseudo_labels as module

    codec = load_model(tiny_checkpoint, dtype=torch.float32, parts=MODEL_PARTS).audio_tokenizer
    sources = find_sources([str(speech)], cache=tmp_path / "cache", workers=0)
    asked, real = [], module.find_codes

    def counted(coder: Any, samples: torch.Tensor, settings: Any) -> Any:
        asked.append(samples)
        return real(coder, samples, settings)

    monkeypatch.setattr(module, "find_codes", counted)
    monkeypatch.setattr(
        "revox.training.student.pseudo_label_training", lambda codec: StudentTraining(steps=2)
    )
    cache = tmp_path / "pseudo-labels"

    def inverted(count: int, stamp: str = "a", **changes: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        asked.clear()
        wanted = settings(**{"pseudo_labels": 2, "pseudo_labeled": count, "inversion_steps": 3} | changes)
        return pseudo_labeled(codec, list(preset_codes().values()), sources, wanted, cache, stamp=[stamp])

    two = inverted(2)
    assert len(asked) == 2
    assert all(w.shape == (15360,) and c.shape == (37, 8) for w, c in two)
    assert not torch.equal(two[0][0], two[1][0])
    four = inverted(4)
    assert len(asked) == 2  # the first two were there
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(two, four, strict=False))
    assert len(inverted(3)) == 3
    assert not asked
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_stamped", lambda *_: None)  # the cache stays as it is
        for changes in ({"stamp": "b"}, {"seed": 1}, {"inversion_steps": 2}):
            inverted(1, **changes)
            assert len(asked) == 1, changes
    whole = inverted(1, seconds=3.2)
    [(wave, codes)] = whole
    assert len(wave) == 1920 * codes.shape[1] < 3.2 * 24000  # the clips are shorter: no silence after them
    first = cache / "000000.safetensors"
    inverted(1)
    first.write_bytes(first.read_bytes()[:200])
    inverted(1)
    assert len(asked) == 1  # damaged: inverted again
    monkeypatch.setattr(module, "find_codes", lambda *_, **__: SimpleNamespace(stopped=True))
    with pytest.raises(KeyboardInterrupt):
        inverted(5)
    assert len(inverted(4)) == 4


def test_a_run_with_pseudo_labels_goes_on_to_the_same_encoder(
    tiny_checkpoint: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "revox.training.student.pseudo_label_training", lambda codec: StudentTraining(steps=2)
    )
    asked = {"pseudo_labels": 2, "pseudo_labeled": 2, "inversion_steps": 2, "seconds": 1.28}

    def restored(out: Path, stop: bool = False, **changes: Any) -> Path:
        def progress(at: Progress) -> None:
            if stop and at.what == TRAINING and at.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        told = options(tmp_path / "cache", progress=progress, **changes)
        return restore_encoder(tiny_checkpoint, [str(speech)], out, settings(**asked), told)

    whole = restored(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        restored(tmp_path / "stopped", stop=True)
    # A run begun before a setting was there goes on with its default; settings of 0.1 have older names.
    path = tmp_path / "stopped" / "settings.json"
    begun = json.loads(path.read_text())
    assert begun.pop("compile") is False
    begun |= {"labels": begun.pop("pseudo_labels"), "inverted": begun.pop("pseudo_labeled")}
    begun |= {"strangers": begun.pop("interpolated"), "acceptance_clips": 1}
    begun["pair"]["phases"] = begun["pair"].pop("all_pass")
    begun["weights"]["acceptance"] = 0.0
    path.write_text(json.dumps(begun))
    assert restored(tmp_path / "stopped", resume=True).read_bytes() == whole.read_bytes()


def speakers_of(sources: list[SpeechSource]) -> set[str]:
    return {cut.supervisions[0].speaker for source in sources for cut in source.cuts}


def test_speakers_that_are_looked_at_are_not_learnt_from(speech: Path, tmp_path: Path):
    sources = find_sources([str(speech)], cache=tmp_path, workers=0)
    train, held = hold_out(sources, 12)
    kept, out = speakers_of(train), speakers_of(held)
    assert len(out) == 2  # a tenth of twenty
    assert not kept & out
    assert len(kept) == 18
    assert speakers_of(hold_out(sources, 12)[1]) == out
    # The same people in another folder, and the clips that are validated on, are not learned from either.
    again = find_sources([str(speech)], cache=tmp_path / "again", workers=0)
    train, held = hold_out([*sources, *again], 2)
    assert not speakers_of(train) & speakers_of(held)
    some = next(path for path in sorted(speech.rglob("*")) if path.is_file()).parent
    checked = RunOptions(validation=[str(some)], cache=tmp_path / "some")
    train, held = divided_sources(sources, checked)
    learned = {address for source in train for address in source.cuts.addresses()}
    assert learned
    assert not learned & {address for source in held for address in source.cuts.addresses()}
    assert len(learned) + sum(len(one.cuts) for one in held) == sum(len(one.cuts) for one in sources)


def test_a_run_goes_on_with_its_own_checkpoint_and_sentences_only(tmp_path: Path):
    record = {"decoder_sha256": "a", "sentences_sha256": "b"}
    _check_resumed(tmp_path, record)
    save_file({"x": torch.zeros(1)}, tmp_path / ENCODER_FILE, metadata={"revox": json.dumps(record)})
    _check_resumed(tmp_path, record)
    with pytest.raises(TrainingError, match="begun with another checkpoint"):
        _check_resumed(tmp_path, {**record, "decoder_sha256": "c"})
    with pytest.raises(TrainingError, match="begun with other --texts"):
        _check_resumed(tmp_path, {"decoder_sha256": "a"})


def test_what_the_presets_say_is_kept_and_taken_up_where_it_stopped(
    tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("revox.training.spoken.SHARD", 2)
    monkeypatch.setattr("revox.training.spoken.MAX_FRAMES", 80)
    checkpoint, cache, told = tiny_checkpoint_copy, tmp_path / "spoken", []

    def spoken(count: int, **changes: Any) -> list[Utterance]:
        told.clear()
        asked = SpokenSettings(count, **{"sentences": drawn_sentences(count)} | changes)
        return spoken_utterances(checkpoint, asked, cache, progress=lambda at: told.append(at.done))

    two = spoken(2)
    assert told == [2]
    [first] = cache.iterdir()
    written = first.stat().st_ino, first.stat().st_mtime_ns
    four = spoken(4)
    assert told == [4]  # the first two were there
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == written  # and their file is left alone
    assert len(two) >= 1  # those that ended by themselves
    for a, b in zip(two, four, strict=False):
        assert torch.equal(a.codes, b.codes)
        assert a.text == b.text
        assert a.codes.shape[0] == 37
    spoken(4)
    assert told == []
    last = max(cache.iterdir())
    last.write_bytes(last.read_bytes()[:100])
    spoken(4)
    assert told == [4]  # the last one was cut off: spoken again
    spoken(2, seed=1)
    assert told == [2]  # another seed
    spoken(2, sentences=["Good.", "Bye."])
    assert told == [2]  # other sentences
    spoken(4)
    assert told == []  # which do not take the place of the first
    weights = checkpoint / "consolidated.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1  # one bit of one weight; the size is the same
    weights.write_bytes(data)
    spoken(2)
    assert told == [2]  # another checkpoint


def test_processes_share_the_sentences_and_all_of_them_get_all(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("revox.training.spoken.SHARD", 1)
    monkeypatch.setattr("revox.training.spoken.MAX_FRAMES", 20)
    monkeypatch.setattr(World, "wait", lambda _: None)
    done: dict[int, list[float]] = {0: [], 1: []}

    def spoken(rank: int) -> list[Utterance]:
        return spoken_utterances(
            tiny_checkpoint, SpokenSettings(4, drawn_sentences(4)), tmp_path / "spoken", world=World(rank, 2),
            progress=lambda at: done[rank].append(at.done),
        )  # fmt: skip

    with pytest.raises(TrainingError, match="another process"):
        spoken(0)
    all_of_them = spoken(1)
    assert done == {0: [1, 3], 1: [2, 4]}
    assert len(list((tmp_path / "spoken").iterdir())) == 4
    assert len(spoken(0)) == len(all_of_them)


def test_there_are_enough_sentences_for_the_steps_by_default_and_in_the_documented_recipe():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    recipes = [
        EncoderTraining.model_validate(yaml.safe_load(part))
        for part in re.findall(r"```yaml\n(.*?)```", text, re.S)
    ]
    assert len(recipes) == 2
    for asked in (EncoderTraining(), *recipes):
        heard = asked.steps * asked.pairs * asked.seconds
        assert heard / (asked.sentences * 4.5) < 150, "a sentence takes about 4.5 s to say"


def test_sentences_and_voices_that_are_validated_on_are_not_learnt_from(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[SpokenSettings] = []

    def spoken(_: Path, of: SpokenSettings, **__: Any) -> list[Utterance]:
        asked.append(of)
        return [Utterance(of.sentences[0], codes) for codes in list(preset_codes().values())[:3]]

    monkeypatch.setattr("revox.training.restore.spoken_utterances", spoken)
    texts = [f"Sentence number {i}." for i in range(40)]
    rows: list[Mapping[str, Any]] = []
    told = options(tmp_path, sentences=texts, progress=lambda at: rows.append(at.facts))
    restore_encoder(tiny_checkpoint, [], tmp_path / "run", settings(clips=0, sentences=100), told)
    train, held = asked
    assert (len(train.sentences), len(held.sentences)) == (36, 4)
    assert sorted([*train.sentences, *held.sentences]) == sorted(texts)
    assert (len(train.voices), len(held.voices)) == (18, 2)
    assert not set(train.voices) & set(held.voices)
    assert held.interpolated > 0
    assert held.seed != train.seed
    assert rows[-1].keys() >= {"valid_agreement", "valid_levels", "trained_agreement", "trained_levels"}
    assert hold_out_names(texts[:9], 32) == (texts[:9], [])
    assert hold_out_names(texts * 100, 32)[1] != []


def test_each_sentence_is_another_and_some_are_said_in_interpolated_voices(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[tuple[str, str, torch.Tensor]] = []

    def make_prompt(model: Any, prompter: Any, text: str, voice: Voice) -> Prompt:
        said.append((text, voice.name, voice.embedding))
        return Prompt(torch.zeros(1, 1), 1)

    def generate_batch(engine: Engine, requests: list[Request]) -> list[Any]:
        codes = torch.zeros(37, 2, dtype=torch.long)
        return [SimpleNamespace(codes=lambda: codes, ended=True) for _ in requests]

    monkeypatch.setattr("revox.training.spoken.make_prompt", make_prompt)
    monkeypatch.setattr(Engine, "generate_batch", generate_batch)
    monkeypatch.setattr("revox.training.spoken.SHARD", 2)

    def spoken(count: int, share: float, name: str = "a") -> list[tuple[str, str, torch.Tensor]]:
        said.clear()
        texts = [f"sentence {i}" for i in range(24)]
        spoken_utterances(tiny_checkpoint, SpokenSettings(count, texts, (), share), tmp_path / name)
        return list(said)

    presets = spoken(24, 0.0)
    assert len({text for text, *_ in presets}) == 24
    assert len({name for _, name, _ in presets}) == 20
    others = spoken(30, 1.0)
    assert {name for _, name, _ in others} == {"interpolated"}
    assert len({float(embedding.float().sum()) for *_, embedding in others}) == 30
    pairs = [(text, float(embedding.float().sum())) for text, _, embedding in others]
    assert len(set(pairs)) == 30, "when the sentences are over, others say them"
    some = spoken(30, 0.5)
    assert 5 < sum(name == "interpolated" for _, name, _ in some) < 25
    half = spoken(16, 0.5, "b") + spoken(30, 0.5, "b")
    assert [(text, name) for text, name, _ in half] == [(text, name) for text, name, _ in some]


def test_an_interpolated_voice_keeps_the_words_and_lies_between_and_around_the_presets(tiny_checkpoint: Path):
    rng = torch.Generator().manual_seed(0)
    presets = [torch.randint(0, 21, (37, 12), generator=rng) for _ in range(3)]
    made = [interpolated_voice(presets, 21, rng) for _ in range(40)]
    for codes in made:
        (one,) = [p for p in presets if torch.equal(p[0], codes[0])]
        assert int(codes.min()) >= 0
        assert int(codes[1:].max()) <= 20
        moved = (codes[1:] - one[1:]).float()
        assert float(moved.abs().max()) > 0
        inside = (codes[1:] > 0) & (codes[1:] < 20)  # what is not cut off is moved alike in all frames
        spread = moved.masked_fill(~inside, torch.nan)
        for row in spread:
            assert len(row[~row.isnan()].unique()) <= 2  # halves are rounded to either side
    assert len({tuple(codes.flatten().tolist()) for codes in made}) == 40


def test_what_is_said_in_the_data_is_what_the_model_says(tmp_path: Path):
    (tmp_path / "data").mkdir()
    speakers = write_speakers(tmp_path / "data", 16000)
    said = ["HELLO THERE", "Hello there", "abc", "x" * 201, "Good evening, doctor.", " ten past two "]
    for clip, text in zip(sorted(speakers.rglob("*.flac")), said, strict=False):
        clip.with_suffix(".txt").write_text(text)
    found = texts_of(find_sources([str(speakers)]))
    assert sorted(found) == ["Good evening, doctor.", "Hello there", "ten past two"]
    assert texts_of(find_sources([str(speakers)]), 2) == found[:2]
    assert texts_of([]) == []


def test_pairs_are_spoken_from_the_datas_words_and_from_texts_where_they_are_given(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    speech = write_speakers(tmp_path / "data", 16000)
    next(speech.rglob("*.flac")).with_suffix(".txt").write_text("Ten past two.")
    told: list[SpokenSettings] = []

    def spoken(folder: Path, asked: SpokenSettings, **_: Any) -> list[Utterance]:
        told.append(asked)
        return []

    monkeypatch.setattr("revox.training.restore.spoken_utterances", spoken)
    few = settings(steps=1, sentences=3, interpolated=0.25)
    restore_encoder(tiny_checkpoint, [str(speech)], tmp_path / "a", few, options(tmp_path / "cache"))
    given = options(tmp_path / "cache", sentences=("Mine.",))
    restore_encoder(tiny_checkpoint, [str(speech)], tmp_path / "b", few, given)
    assert [tuple(one.sentences) for one in told] == [("Ten past two.",)] * 2 + [("Mine.",)] * 2
    assert {one.interpolated for one in told if len(one.voices) > 2} == {0.25}


def test_texts_that_are_empty_or_missing_are_a_sentence(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TrainingError, match="one sentence a line"):
        read_sentences(tmp_path / "empty.txt")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_sentences(tmp_path / "none.txt")


def test_stopped_by_a_signal_the_command_exits_with_0_and_says_how_to_go_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("revox.training.restore.restore_encoder", stopped)
    app = typer.Typer()
    app.add_typer(train_command.app, name="train")
    result = CliRunner().invoke(
        app, ["train", "encoder", "-c", str(tiny_checkpoint), "-o", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert "stopped before anything was written" in result.output
    for name, sentence in ((SETTINGS_FILE, "before the first step"), (ENCODER_FILE, "The encoder so far")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
        result = CliRunner().invoke(
            app, ["train", "encoder", "-c", str(tiny_checkpoint), "-o", str(tmp_path / "run")]
        )
        assert sentence in result.output
        assert "--resume" in result.output


def test_without_speech_or_presets_the_sentence_says_so(tiny_checkpoint_copy: Path, tmp_path: Path):
    with pytest.raises(TrainingError, match="no speech is named"):
        restore_encoder(tiny_checkpoint_copy, [], tmp_path / "a", settings(), options(tmp_path))
    assert not (tmp_path / "a").exists()
    for file in (tiny_checkpoint_copy / "voice_embedding").iterdir():
        file.unlink()
    with pytest.raises(TrainingError, match="no preset"):
        restore_encoder(tiny_checkpoint_copy, [], tmp_path / "b", settings(clips=0), options(tmp_path))


def test_a_missing_library_is_named_before_anything_is_computed(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(TrainingError, match="needs the library `lhotse`"):
        restore_encoder(tmp_path / "no checkpoint", [str(speech)], tmp_path / "run", EncoderTraining())
    assert not (tmp_path / "run").exists()
