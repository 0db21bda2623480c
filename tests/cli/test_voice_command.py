"""`revox voice` from the command line: what a user types, hears and is told."""

from __future__ import annotations

import hashlib
import json
import sys
import wave
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from revox.checkpoint.load import load_model
from revox.checkpoint.voices import load_voice
from revox.cli import main as cli
from revox.cli.voice_command import app

CONSENT = "a synthetic voice, nobody's"


@pytest.fixture
def folder(tiny_checkpoint_copy):
    return tiny_checkpoint_copy


def voice(*arguments, folder):
    result = CliRunner().invoke(app, [*map(str, arguments), "--checkpoint", str(folder)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def refused(monkeypatch, capsys, *arguments) -> str:
    """The sentence on stderr of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["revox", "voice", *map(str, arguments)])
    monkeypatch.setattr(cli, "COMMANDS", {"voice": cli.COMMANDS["voice"]})
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in error
    return error


def test_a_presets_decode_is_the_decoder_on_the_codes_it_was_made_of(folder, tiny_preset_codes, tmp_path):
    result = voice("decode", "it_male", "-o", tmp_path / "it.wav", folder=folder)
    assert "19 of 19 frames explained exactly" in result.output
    codes = tiny_preset_codes["it_male"]
    codec = load_model(folder, dtype=torch.float32, parts=("audio_tokenizer",)).audio_tokenizer
    expected = codec.decode(codes[None])[0].numpy()
    with wave.open(str(tmp_path / "it.wav")) as file:
        assert file.getframerate() == 24000
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    assert len(heard) == codes.shape[1] * 1920
    assert np.abs(heard - np.clip(expected, -1, 1)).max() < 1e-3


def test_a_voice_added_from_codes_keeps_them_and_one_added_from_its_export_finds_them_again(
    folder, tiny_preset_codes, tmp_path
):
    codes = tiny_preset_codes["hi_female"][:, :8].contiguous()
    save_file({"codes": codes.to(torch.int16)}, tmp_path / "ada.codes.safetensors")
    voice("add", "ada", tmp_path / "ada.codes.safetensors", "--consent", CONSENT, folder=folder)
    for ending in ("pt", "safetensors", "bin"):
        voice("export", "ada", "-o", tmp_path / f"ada.{ending}", folder=folder)
        voice("add", f"ada-{ending}", tmp_path / f"ada.{ending}", "--consent", CONSENT, folder=folder)
        again = load_voice(folder, f"ada-{ending}")
        assert torch.equal(again.codes, codes)
        assert torch.equal(again.embedding, load_voice(folder, "ada").embedding)
    voice("remove", "ada-bin", folder=folder)
    names = [entry["name"] for entry in json.loads(voice("list", "--json", folder=folder).stdout)]
    assert names[20:] == ["ada", "ada-pt", "ada-safetensors"]


def test_show_tells_whose_voice_it_is_how_it_was_made_and_their_consent(folder, tiny_preset_codes, tmp_path):
    save_file({"codes": tiny_preset_codes["hi_female"][:, :8].contiguous()}, tmp_path / "v.safetensors")
    voice("add", "ada", tmp_path / "v.safetensors", "--consent", CONSENT, "--subject", "Ada", folder=folder)
    record = json.loads(voice("show", "ada", "--json", folder=folder).stdout)
    assert (record["rows"], record["seconds"], record["preset"], record["problem"]) == (9, 0.64, False, None)
    assert record["provenance"]["consent"]["statement"] == CONSENT
    assert record["provenance"]["consent"]["subject"] == "Ada"
    assert len(record["provenance"]["source"]["sha256"]) == 64
    shown = voice("show", "ada", folder=folder).stdout
    assert CONSENT in shown
    assert "added from a file" in shown
    assert "no record of how it was made" in voice("show", "it_male", folder=folder).stdout


def test_the_record_of_consent_is_one_json_with_who_when_hash_and_method_and_removal_leaves_a_tombstone(
    folder, tiny_preset_codes, tmp_path
):
    clip = tmp_path / "v.safetensors"
    save_file({"codes": tiny_preset_codes["hi_female"][:, :8].contiguous()}, clip)
    voice("add", "ada", clip, "--consent", CONSENT, "--subject", "Ada", folder=folder)
    voice("add", "bob", clip, "--consent", "Bob agreed", folder=folder)
    voice("add", "bob", clip, "--consent", "Bob agreed again", "--overwrite", folder=folder)
    voice("remove", "bob", folder=folder)
    document = json.loads(voice("consent", folder=folder).stdout)
    ada, bob = document["voices"]
    sha256 = hashlib.sha256(clip.read_bytes()).hexdigest()
    assert (ada["voice"], ada["status"], ada["sha256"]) == ("ada", "present", sha256)
    assert (ada["consent"]["statement"], ada["consent"]["subject"]) == (CONSENT, "Ada")
    assert ada["method"] == "added from a file"
    when = datetime.fromisoformat(ada["consent"]["recorded_at"].replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - when).total_seconds()) < 60
    assert (bob["voice"], bob["status"]) == ("bob", "removed")
    assert [line["event"] for line in bob["log"]] == ["added", "replaced", "removed"]
    assert bob["log"][-1]["consent"]["statement"] == "Bob agreed again"
    assert bob["log"][-1]["sha256"] == sha256
    assert not list((folder / "voice_embedding").glob("bob*"))
    # One voice, a removed one, and as a file.
    assert json.loads(voice("consent", "bob", folder=folder).stdout)["voices"] == [bob]
    voice("export", "ada", "--consent", "-o", tmp_path / "ada.json", folder=folder)
    assert json.loads((tmp_path / "ada.json").read_text())["voices"] == [ada]
    shown = json.loads(voice("show", "ada", "--json", folder=folder).stdout)
    assert [line["event"] for line in shown["log"]] == ["added"]
    assert " added" in voice("show", "ada", folder=folder).stdout


def test_a_record_that_is_gone_from_the_folder_stays_in_the_log_of_who_forced_a_preset_out(folder):
    voice("remove", "it_male", "--force", folder=folder)
    [gone] = json.loads(voice("consent", folder=folder).stdout)["voices"]
    assert (gone["voice"], gone["status"]) == ("it_male", "removed")


def test_list_shows_every_preset_with_its_rows(folder, tiny_preset_codes):
    shown = voice("list", folder=folder).stdout
    lines = {line.split()[0]: line.split()[1] for line in shown.splitlines()[1:] if line.strip()}
    assert lines == {name: str(codes.shape[1] + 1) for name, codes in tiny_preset_codes.items()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "ada", "{pt}", "-c", "{folder}"), "consent is required"),
        (("add", "ada", "{pt}", "-c", "{folder}", "--consent", " "), "consent is required"),
        (("add", "Ada", "{pt}", "-c", "{folder}", "--consent", "mine, yes"), "cannot name a voice"),
        (("add", "ada", "{folder}/none.pt", "-c", "{folder}", "--consent", "mine, yes"), "is missing"),
        (("add", "it_male", "{pt}", "-c", "{folder}", "--consent", "mine, yes"), "is a preset"),
        (
            ("add", "ada", "{long}", "-c", "{folder}", "--consent", "mine, yes"),
            "100,000 frames of codes are too",
        ),
        (("remove", "it_male", "-c", "{folder}"), "is a preset"),
        (("show", "it_mal", "-c", "{folder}"), "did you mean it_male"),
        (("consent", "it_mal", "-c", "{folder}"), "did you mean it_male"),
        (("consent", "it_male", "-c", "{folder}"), "no record of consent"),
        (("consent", "-c", "{folder}", "-o", "{folder}/no/where.json"), "No such file"),
        (("decode", "it_mal", "-c", "{folder}", "-o", "{folder}/x.wav"), "did you mean it_male"),
        (("decode", "it_male", "-c", "{folder}", "-o", "{folder}/x.xyz"), "xyz"),
        (("export", "it_male", "-c", "{folder}", "-o", "{folder}/x.wav"), "ending"),
        (("list", "-c", "{folder}/nowhere"), "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(folder, monkeypatch, capsys, arguments, sentence):
    pt = folder / "voice_embedding" / "it_male.pt"
    long = folder.parent / "long.safetensors"
    save_file({"codes": torch.zeros(37, 100_000, dtype=torch.int16)}, long)
    error = refused(monkeypatch, capsys, *(a.format(pt=pt, folder=folder, long=long) for a in arguments))
    assert sentence in error
    assert error.startswith("revox: ")
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        '{"consent": 5, "created_at": [1]}',
        '{"consent": {"statement": "[/nope]"}, "method": "[red"}',
    ],
)
def test_a_record_from_anywhere_does_not_stop_the_list(folder, record):
    (folder / "voice_embedding" / "it_male.voice.json").write_text(record)
    shown = voice("list", folder=folder).stdout
    assert "it_female" in shown
    assert ("[/nope]" in shown) == ("[/nope]" in record)


def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(folder, tiny_preset_codes, tmp_path):
    folder = folder.rename(tmp_path / "[red]")
    save_file({"codes": tiny_preset_codes["hi_female"][:, :8].contiguous()}, tmp_path / "v.safetensors")
    said = voice("add", "ada", tmp_path / "v.safetensors", "--consent", CONSENT, folder=folder).stderr
    assert f"added to {folder}" in said
    assert f"ada of {folder}" in voice("show", "ada", folder=folder).stdout
    assert f"removed from {folder}" in voice("remove", "ada", folder=folder).stderr


def test_the_next_command_says_that_it_finished_an_interrupted_one(folder):
    work = folder / ".revox"
    work.mkdir()
    (work / "journal.json").write_text(json.dumps({"operation": "remove", "name": "it_male"}))
    result = voice("list", "--json", folder=folder)
    assert "an interrupted change was finished: voice 'it_male' is removed" in result.stderr
    assert "it_male" not in [entry["name"] for entry in json.loads(result.stdout)]


def test_a_mix_carries_the_consent_and_the_records_of_all_its_voices(folder, tmp_path):
    codes = load_voice(folder, "it_male").embedding
    torch.save(codes, tmp_path / "own.pt")
    voice("add", "ada", tmp_path / "own.pt", "--consent", CONSENT, "--subject", "Ada", folder=folder)
    voice("mix", "between", "ada=3", "pt_male=1", folder=folder)
    shown = json.loads(voice("show", "between", "--json", folder=folder).output)
    record = shown["provenance"]
    assert record["method"] == "mix"
    assert [(one["voice"], one["weight"]) for one in record["mixed"]] == [("ada", 0.75), ("pt_male", 0.25)]
    assert record["mixed"][0]["record"]["consent"]["statement"] == CONSENT
    assert f"ada: {CONSENT}" in record["consent"]["statement"]
    assert "pt_male: a voice that came with the checkpoint" in record["consent"]["statement"]
    assert record["consent"]["subject"] == "Ada"
    assert CONSENT in str(shown["log"][-1]["consent"])
    mixed = load_voice(folder, "between")
    assert mixed.codes is not None
    torch.testing.assert_close(mixed.codes[0], load_voice(folder, "ada").codes[0])
    assert mixed.embedding.shape == codes.shape


def test_a_tuned_voice_is_not_mixed_by_the_codes_it_had_before(folder, tmp_path, monkeypatch, capsys):
    torch.save(load_voice(folder, "it_male").embedding, tmp_path / "own.pt")
    voice("add", "ada", tmp_path / "own.pt", "--consent", CONSENT, folder=folder)
    voice("mix", "plain", "ada=1", "pt_male=1", folder=folder)
    path = next(folder.rglob("plain.pt"))
    torch.save((torch.load(path, weights_only=True).float() + 0.5).bfloat16(), path)
    command = ("mix", "between", "plain=1", "pt_male=1", "--checkpoint", folder)
    assert "plain is not the sum of its codes" in refused(monkeypatch, capsys, *command)


def test_a_mix_of_what_is_not_there_is_refused(folder, monkeypatch, capsys):
    for arguments, sentence in (
        (["between", "nobody=1", "pt_male=1"], "no voice 'nobody'"),
        (["pt_male", "it_male=1", "nl_male=1"], "is a preset"),
        (["between", "pt_male=1"], "two voices"),
    ):
        assert sentence in refused(monkeypatch, capsys, "mix", *arguments, "--checkpoint", folder)
