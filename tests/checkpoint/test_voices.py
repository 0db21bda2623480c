"""Voices in a folder: what other loaders see at every moment, what is guarded, and what a mistake is told."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from revox.checkpoint import consent_log, voice_journal
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.release import PRESETS
from revox.checkpoint.voice_codes import embedding_of_codes, read_table
from revox.checkpoint.voice_journal import check_writable, recover_journal
from revox.checkpoint.voices import (
    add_voice,
    check_voice_name,
    export_voice,
    find_voice,
    list_voices,
    load_voice,
    read_embedding,
    remove_voice,
)

RECORD = {"method": "test", "consent": {"statement": "a synthetic voice"}}


@pytest.fixture
def folder(tiny_checkpoint_copy) -> Path:
    return tiny_checkpoint_copy


@pytest.fixture(scope="module")
def make(tiny_checkpoint, tiny_config, tiny_preset_codes):
    """(rows, codes) of a voice of so many frames, the end frame included in the rows."""
    table = read_table(tiny_checkpoint)

    def voice(frames: int, preset: str = "hi_female") -> tuple[Tensor, Tensor]:
        codes = tiny_preset_codes[preset][:, :frames]
        return embedding_of_codes(codes, table, tiny_config), codes

    return voice


def seen_by_loaders(folder: Path) -> tuple[set[str], dict[str, Tensor]]:
    """What vllm-omni lists (params.json) and what mistral-common lists (tekken.json), each with its .pt.

    Reads the files as those loaders do, with nothing of ours, and fails on half a voice.
    """
    listed = json.loads((folder / "params.json").read_text())["multimodal"]["audio_tokenizer_args"]["voice"]
    promised = json.loads((folder / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"]
    assert set(listed) <= set(promised), "vllm-omni offers a voice that its tokenizer refuses"
    assert len(set(listed.values())) == len(listed)
    rows = {}
    for name, count in promised.items():
        path = folder / "voice_embedding" / f"{name}.pt"
        rows[name] = torch.load(path, map_location="cpu", weights_only=True)
        assert rows[name].dtype == torch.bfloat16
        assert rows[name].shape == (count, 256), (
            f"{name}: the prompt has {count} places for {len(rows[name])} rows"
        )
    return set(listed), rows


def files(folder: Path) -> dict[str, bytes]:
    """Every file a loader could look at, by content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".revox" not in path.parts and path.suffix != ".tmp"
    }


# ---- adding, loading, removing


def test_an_added_voice_loads_with_its_codes_rows_and_record_and_the_presets_stay(folder, make):
    before = seen_by_loaders(folder)[1]
    rows, codes = make(12)
    add_voice(folder, "ada", rows, codes, RECORD)
    voice = load_voice(folder, "ada")
    assert torch.equal(voice.embedding, rows)
    assert torch.equal(voice.codes, codes)
    assert voice.codes.dtype == torch.int64
    assert voice.provenance == RECORD
    assert voice.frames == 12
    listed, after = seen_by_loaders(folder)
    assert listed == set(before) | {"ada"}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not [path for path in folder.rglob("*.tmp")]


def test_an_overwritten_voice_is_the_new_one_whether_or_not_its_length_changes(folder, make):
    add_voice(folder, "ada", *make(12), RECORD)
    add_voice(folder, "bob", *make(11, "ar_male"), RECORD)
    for frames in (12, 20, 5):
        rows, codes = make(frames, "hi_male")
        add_voice(folder, "ada", rows, codes if frames != 5 else None, RECORD | {"n": frames}, overwrite=True)
        voice = load_voice(folder, "ada")
        assert torch.equal(voice.embedding, rows)
        assert torch.equal(voice.codes, codes) if frames != 5 else voice.codes is None
        assert voice.provenance["n"] == frames
        assert torch.equal(seen_by_loaders(folder)[1]["ada"], rows)
    assert torch.equal(load_voice(folder, "bob").embedding, make(11, "ar_male")[0])


def test_adding_and_removing_leaves_every_other_byte_of_the_folder_as_it_was(folder, make):
    before = files(folder)
    add_voice(folder, "ada", *make(12), RECORD)
    after = files(folder)
    assert set(after) - set(before) == {
        "voice_embedding/ada.pt",
        "voice_embedding/ada.codes.safetensors",
        "voice_embedding/ada.voice.json",
    }
    assert {name for name in before if before[name] != after[name]} == {"params.json", "tekken.json"}
    remove_voice(folder, "ada")
    assert {k: v for k, v in files(folder).items() if ".json" not in k} == {
        k: v for k, v in before.items() if ".json" not in k
    }
    for name in ("params.json", "tekken.json"):
        assert json.loads((folder / name).read_text()) == json.loads(before[name])


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_the_lists_keep_their_layout_and_gain_one_entry(folder, make, indent):
    for name in ("params.json", "tekken.json"):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data, indent=indent, ensure_ascii=False))
    before = {name: (folder / name).read_text() for name in ("params.json", "tekken.json")}
    add_voice(folder, "ada", *make(12), RECORD)
    for name, entry in (("params.json", '"ada": 20'), ("tekken.json", '"ada": 13')):
        after = (folder / name).read_text()
        assert entry in after
        if indent:
            new = set(after.splitlines()) - set(before[name].splitlines())
            # The entry, and the one before it that gained a comma.
            assert len(new) == 2
        else:
            assert after.replace(f", {entry}", "") == before[name]


def test_a_folder_without_any_voice_takes_its_first(folder, make):
    params = json.loads((folder / "params.json").read_text())
    del params["multimodal"]["audio_tokenizer_args"]["voice"]
    (folder / "params.json").write_text(json.dumps(params))
    tekken = json.loads((folder / "tekken.json").read_text())
    del tekken["audio"]["voice_num_audio_tokens"]
    (folder / "tekken.json").write_text(json.dumps(tekken))
    shutil.rmtree(folder / "voice_embedding")
    rows, codes = make(12)
    add_voice(folder, "ada", rows, codes, RECORD)
    assert seen_by_loaders(folder)[0] == {"ada"}


def test_the_export_of_a_voice_that_is_replaced_goes_with_it(folder, make):
    add_voice(folder, "bob", *make(21), RECORD)
    export = folder / "voice_embedding" / "bob.safetensors"
    save_file({"embedding": load_voice(folder, "bob").embedding}, export)
    add_voice(folder, "bob", *make(10, "hi_male"), RECORD, overwrite=True)
    assert not export.exists()
    assert len(load_voice(folder, "bob").embedding) == 11 or len(load_voice(folder, "bob").embedding) == 10


# ---- killed at every step


def add_new(folder: Path, make: Any) -> None:
    add_voice(folder, "ada", *make(12), RECORD)


def overwrite_longer(folder: Path, make: Any) -> None:
    add_voice(folder, "bob", *make(21), RECORD | {"new": True}, overwrite=True)


def overwrite_same_length(folder: Path, make: Any) -> None:
    add_voice(folder, "bob", *make(10, "hi_male"), RECORD | {"new": True}, overwrite=True)


def overwrite_without_codes(folder: Path, make: Any) -> None:
    add_voice(folder, "bob", make(15)[0], None, RECORD | {"new": True}, overwrite=True)


def replace_a_preset(folder: Path, make: Any) -> None:
    add_voice(folder, "casual_male", *make(15), RECORD, force=True)


def remove(folder: Path, make: Any) -> None:
    remove_voice(folder, "bob")


CHANGES = [
    add_new,
    overwrite_longer,
    overwrite_same_length,
    overwrite_without_codes,
    replace_a_preset,
    remove,
]


def killed_at(step: int, change: Any, folder: Path, make: Any) -> str | None:
    """Run `change` in a process of its own that dies after the step-th change to the disk; the step's name.

    None when the change was through before it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        done, write = 0, os.write

        def dying(name: str) -> Any:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal done
                result = real(*arguments, **options)
                if done == step:
                    write(writer, f"{name} {arguments}".encode())
                    os._exit(9)
                done += 1
                return result

            return call

        for name in ("replace", "unlink", "mkdir", "symlink", "rmdir", "write"):
            setattr(os, name, dying(name))
        try:
            change(folder, make)
        except BaseException as error:
            write(writer, f"failed: {error!r}".encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        name = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), name
    return name if code == 9 else None


def killed_where(reached: Callable[[Path], bool], start: Path, folder: Path, make: Any) -> None:
    """Make `folder` a copy of `start` where overwriting bob was killed at the first step with `reached`."""
    for step in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder, symlinks=True)
        assert killed_at(step, overwrite_longer, folder, make)
        if reached(folder):
            return
    raise AssertionError("no step like that")


def with_few_presets(checkpoint: Path, folder: Path) -> Path:
    """A copy without weights and with three presets: copied and read dozens of times below."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("consolidated.safetensors"))
    keep = {"casual_male", "ar_male", "hi_male"}
    for path in (folder / "voice_embedding").glob("*.pt"):
        if path.stem not in keep:
            path.unlink()
    for name, keys in (
        ("params.json", ("multimodal", "audio_tokenizer_args", "voice")),
        ("tekken.json", ("audio", "voice_num_audio_tokens")),
    ):
        data = holder = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = {voice: n for voice, n in holder[keys[-1]].items() if voice in keep}
        (folder / name).write_text(json.dumps(data, indent=1))
    return folder


def logged(folder: Path) -> list[tuple[str, str]]:
    """The events of the folder's log."""
    lines = consent_log.read(voice_journal.consent_log_path(folder))
    return [(line["event"], line["voice"]) for line in lines]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linked", [False, True], ids=["own folder", "linked voice folder"])
def test_killed_at_any_step_loaders_see_whole_voices_and_the_next_command_finishes_or_rolls_back(
    tiny_checkpoint, tmp_path, make, change, linked
):
    start = with_few_presets(tiny_checkpoint, tmp_path / "start")
    add_voice(start, "bob", *make(10), RECORD)
    elsewhere = tmp_path / "elsewhere"
    if linked:
        (start / "voice_embedding").rename(elsewhere)
        (start / "voice_embedding").symlink_to(elsewhere)
        kept = files(elsewhere)
    untouched = {
        name: rows for name, rows in seen_by_loaders(start)[1].items() if name not in ("bob", "casual_male")
    }
    finished = Path(shutil.copytree(start, tmp_path / "finished", symlinks=True))
    change(finished, make)
    old, new = seen_by_loaders(start)[1], seen_by_loaders(finished)[1]
    before, after = files(start), files(finished)
    logged_before, logged_after = logged(start), logged(finished)
    assert len(logged_after) == len(logged_before) + 1

    steps, decided = [], False
    while True:
        folder = Path(shutil.copytree(start, tmp_path / f"killed-{len(steps)}", symlinks=True))
        step = killed_at(len(steps), change, folder, make)
        _, rows = seen_by_loaders(folder)
        assert all(torch.equal(rows[name], untouched[name]) for name in untouched), step
        if step is None:
            break
        steps.append(step)
        # In between, a voice that loaders see is the old one or the new one.
        for name in set(rows) - set(untouched):
            assert any(name in set_ and torch.equal(rows[name], set_[name]) for set_ in (old, new)), step
        decided = decided or (folder / ".revox" / "journal.json").exists()
        recover_journal(folder)
        assert files(folder) == (after if decided else before), step
        assert logged(folder) == (logged_after if decided else logged_before), step  # once, not twice
        assert recover_journal(folder) is None
        add_voice(folder, "eve", *make(7), RECORD)
        assert "eve" in seen_by_loaders(folder)[0]
        shutil.rmtree(folder)
    assert decided
    assert len(steps) > 6
    if linked:
        assert files(elsewhere) == kept


def unlisted(folder: Path) -> bool:
    return "bob" not in seen_by_loaders(folder)[0]


def test_a_killed_recovery_is_recovered_too(folder, make, tmp_path):
    add_voice(folder, "bob", *make(10), RECORD)
    killed_where(unlisted, folder, tmp_path / "killed", make)
    for step in range(50):
        name = killed_at(step, lambda folder, _: recover_journal(folder), tmp_path / "killed", make)
        seen_by_loaders(tmp_path / "killed")
        if name is None:
            break
    assert torch.equal(load_voice(tmp_path / "killed", "bob").embedding, make(21)[0])


def test_loading_a_voice_finishes_a_killed_change_first(folder, make, tmp_path):
    add_voice(folder, "bob", *make(10), RECORD)
    killed_where(unlisted, folder, tmp_path / "killed", make)
    assert torch.equal(load_voice(tmp_path / "killed", "bob").embedding, make(21)[0])


def test_a_folder_that_only_others_may_write_is_still_read(folder, make, tmp_path):
    add_voice(folder, "bob", *make(10), RECORD)
    killed = tmp_path / "killed"
    killed_where(lambda folder: (folder / ".revox" / "stage").is_dir(), folder, killed, make)
    (killed / ".revox" / "lock").unlink()
    (killed / ".revox" / "lock").mkdir()  # as good as no permission, also for root
    with pytest.raises(VoiceError, match="cannot be written"):
        recover_journal(killed)
    assert torch.equal(load_voice(killed, "bob").embedding, make(10)[0])


def test_two_writers_wait_for_each_other(folder, make, monkeypatch):
    add_voice(folder, "ada", *make(12), RECORD)
    with open(folder / ".revox" / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(voice_journal, "_LOCK_SECONDS", 0.0)
        with pytest.raises(VoiceError, match=r"another command is changing the voices.*try again"):
            add_voice(folder, "bob", *make(12), RECORD)
        with pytest.raises(VoiceError, match="another command is changing the voices"):
            list_voices(folder)
    add_voice(folder, "bob", *make(12), RECORD)


def test_writers_at_once_lose_no_voice(folder, make):
    children = []
    for i in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                add_voice(folder, f"voice{i}", *make(8 + i), RECORD)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    listed, rows = seen_by_loaders(folder)
    assert {f"voice{i}" for i in range(6)} <= listed
    assert all(len(rows[f"voice{i}"]) == 9 + i for i in range(6))


# ---- links


def test_a_hub_caches_blobs_are_never_written_to(folder, make, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = files(blobs)
    rows, codes = make(12)
    add_voice(folder, "ada", rows, codes, RECORD)
    add_voice(folder, "casual_male", rows, codes, RECORD, force=True)
    remove_voice(folder, "neutral_male", force=True)
    assert files(blobs) == before
    listed, found = seen_by_loaders(folder)
    assert torch.equal(found["casual_male"], rows)
    assert "neutral_male" not in listed
    assert (folder / "voice_embedding" / "it_male.pt").is_symlink()


# ---- what is guarded


def test_presets_and_voices_without_a_record_are_neither_overwritten_nor_removed_without_force(folder, make):
    rows, codes = make(12)
    shutil.copy(folder / "voice_embedding" / "ar_male.pt", folder / "voice_embedding" / "stranger.pt")
    before = files(folder)
    for name in ("casual_male", "stranger"):
        with pytest.raises(VoiceError, match=f"'{name}'.*is a preset.*--force"):
            add_voice(folder, name, rows, codes, RECORD, overwrite=True)
        with pytest.raises(VoiceError, match=f"'{name}'.*is a preset.*--force"):
            remove_voice(folder, name)
    assert files(folder) == before
    add_voice(folder, "casual_male", rows, codes, RECORD, force=True)
    with pytest.raises(VoiceError, match="is a preset"):
        remove_voice(folder, "casual_male")
    remove_voice(folder, "casual_male", force=True)
    assert "casual_male" not in seen_by_loaders(folder)[0]


def test_the_guarded_presets_are_those_of_the_release(tiny_preset_codes):
    assert set(tiny_preset_codes) == set(PRESETS)
    assert len(PRESETS) == 20


def test_an_own_voice_is_replaced_only_when_asked(folder, make):
    add_voice(folder, "ada", *make(12), RECORD)
    before = files(folder)
    with pytest.raises(VoiceError, match=r"already has a voice 'ada'.*--overwrite"):
        add_voice(folder, "ada", *make(15), RECORD)
    assert files(folder) == before


@pytest.mark.parametrize(
    "name", ["", "Ada", "a b", "ada.pt", "../ada", "ä", "a" * 65, "a/b", "ada\n", "-ada"]
)
def test_names_that_requests_or_files_cannot_carry_are_refused(folder, make, name):
    with pytest.raises(VoiceError, match=r"cannot name a voice.*a-z, 0-9, _ and -"):
        add_voice(folder, name, *make(12), RECORD)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("Ada", "ada"), ("My Voice", "my_voice"), ("Zoë Müller", "zoe_muller"), ("-x-", "x"),
        ("a.b/c", "a_b_c"), ("小明", "voice_5c0f660e"), ("Straße 7", "strasse_7"), ("A" * 200, "a" * 64),
        ("", "voice_1"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused_with_one_that_can(name, like):
    with pytest.raises(VoiceError, match=f"such as {like}$"):
        check_voice_name(name)
    assert check_voice_name(like) == like


def test_all_the_allowed_characters_and_lengths_are_allowed():
    for name in ("a", "a" * 64, "abcdefghijklmnopqrstuvwxyz0123456789_-"):
        assert check_voice_name(name) == name


# ---- what a mistake is told


def test_an_unknown_voice_is_answered_with_the_nearest_names(folder):
    with pytest.raises(VoiceError, match=r"no voice 'casual_mal': did you mean casual_male"):
        load_voice(folder, "casual_mal")
    with pytest.raises(VoiceError, match="no voice 'zzz': there are "):
        remove_voice(folder, "zzz")


def test_rows_and_codes_of_another_model_or_another_length_are_refused_before_anything_is_written(
    folder, make
):
    rows, codes = make(12)
    before = files(folder)
    for bad_rows, bad_codes, sentence in (
        (rows[:, :100], codes, r"\[13, 100\], where bf16 \[frames \+ 1, 256\]"),
        (rows[:1], None, "empty or not finite"),
        (torch.full_like(rows, torch.inf), codes, "empty or not finite"),
        (rows, codes[:, :-1], r"\[37, 11\], where \[37, 12\]"),
        (rows, codes[:20], r"\[20, 12\], where \[37, 12\]"),
        (rows, codes + 500, "outside this checkpoint's codebooks"),
        (rows, codes - 600, "outside this checkpoint's codebooks"),
    ):
        with pytest.raises(VoiceError, match=sentence):
            add_voice(folder, "ada", bad_rows, bad_codes, RECORD)
    with pytest.raises(VoiceError, match="without provenance"):
        add_voice(folder, "ada", rows, codes, {})
    assert files(folder) == before
    assert recover_journal(folder) is None


def test_a_pt_that_disagrees_with_tekken_json_is_named_with_both_numbers(folder):
    torch.save(torch.zeros(9, 256, dtype=torch.bfloat16), folder / "voice_embedding" / "it_male.pt")
    sentence = r"tekken\.json gives the voice it_male 20 rows and .*it_male\.pt has 9"
    with pytest.raises(VoiceError, match=sentence):
        load_voice(folder, "it_male")
    assert "set audio.voice_num_audio_tokens.it_male to 9" in str(find_voice(folder, "it_male").problem)
    assert find_voice(folder, "it_female").problem is None


def test_a_missing_damaged_or_foreign_pt_is_one_sentence_naming_the_file(folder):
    home = folder / "voice_embedding"
    (home / "it_male.pt").unlink()
    data = (home / "it_female.pt").read_bytes()
    (home / "it_female.pt").write_bytes(data[: len(data) // 2])
    (home / "fr_male.pt").write_bytes(b"")
    torch.save(torch.zeros(22, 3072, dtype=torch.bfloat16), home / "fr_female.pt")
    torch.save({"rows": torch.zeros(22, 256)}, home / "de_male.pt")
    for name, sentence in {
        "it_male": "it_male.pt is missing",
        "it_female": "it_female.pt is not a .pt file with one tensor, or it is truncated",
        "fr_male": "fr_male.pt is empty",
        "fr_female": r"fr_female.pt holds BF16 \[22, 3072\], where BF16 \[rows, 256\] was expected",
        "de_male": "de_male.pt",
    }.items():
        with pytest.raises(VoiceError, match=sentence.replace(".", r"\.")) as caught:
            load_voice(folder, name)
        assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pt_with_code_in_it_is_refused_and_not_executed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "voice_embedding" / "it_male.pt"
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, pickle.dumps(Payload(), protocol=2) if name.endswith("data.pkl") else data)
    list_voices(folder)
    with pytest.raises(VoiceError, match=r"it_male\.pt"):
        load_voice(folder, "it_male")
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(VoiceError, match=r"it_male\.pt holds something else than one tensor"):
        load_voice(folder, "it_male")
    assert not (tmp_path / "executed").exists()


def test_a_small_file_that_claims_a_million_rows_is_refused_before_they_are_laid_out(tmp_path):
    path = tmp_path / "many.pt"
    torch.save(torch.zeros(1, 256, dtype=torch.bfloat16).expand(10**9, 256), path)
    with pytest.raises(VoiceError, match=r"many\.pt holds 1,000,000,000 rows, where at most 4,096"):
        read_embedding(path, 256)


def test_a_folder_that_cannot_be_written_is_known_before_there_is_anything_to_write(folder):
    before = files(folder)
    check_writable(folder)
    assert files(folder) == before
    (folder / ".revox").touch()  # no folder can be made here, whoever asks
    with pytest.raises(VoiceError, match="cannot be written"):
        check_writable(folder)


def test_a_full_disk_is_the_systems_own_sentence_and_changes_nothing(folder, make, monkeypatch):
    before = files(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # the rows of 20 frames take 10 kB
    try:
        with pytest.raises(OSError, match="too large"):
            add_voice(folder, "ada", *make(20), RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: data for path, data in files(folder).items() if ".revox" not in str(path)} == before


@pytest.mark.parametrize(
    "codes",
    [
        torch.full((37, 1), 30_000, dtype=torch.int16),
        torch.zeros(3, 1, dtype=torch.int16),
        torch.full((37, 1), 0.5),
    ],
)
def test_kept_codes_that_this_model_does_not_have_are_not_believed(folder, codes):
    # A preset's are then found again from its rows, as for any without kept codes.
    rows = load_voice(folder, "it_male").embedding
    codes = codes.expand(-1, len(rows) - 1).contiguous()
    save_file({"codes": codes}, folder / "voice_embedding" / "it_male.codes.safetensors")
    assert load_voice(folder, "it_male").codes is None


def test_a_list_that_names_files_elsewhere_reads_and_deletes_nothing_there(folder, tmp_path):
    outside = tmp_path / "outside.pt"
    torch.save(torch.zeros(3, 256, dtype=torch.bfloat16), outside)
    params = json.loads((folder / "params.json").read_text())
    params["multimodal"]["audio_tokenizer_args"]["voice"]["../../outside"] = 99
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(VoiceError, match="cannot be a file's name"):
        load_voice(folder, "../../outside")
    remove_voice(folder, "../../outside", force=True)
    assert outside.exists()
    assert "../../outside" not in seen_by_loaders(folder)[0]


@pytest.mark.parametrize("journal", ['{"operation": "add"', "[" * 100_000])
def test_a_damaged_journal_is_named_and_nothing_is_touched(folder, make, journal):
    add_voice(folder, "ada", *make(12), RECORD)
    before = files(folder)
    (folder / ".revox" / "journal.json").write_text(journal)
    with pytest.raises(VoiceError, match=r"journal\.json is damaged; delete it"):
        recover_journal(folder)
    assert files(folder) == before


def test_a_folder_whose_tekken_json_has_no_audio_section_is_refused_before_anything_is_written(folder, make):
    tekken = json.loads((folder / "tekken.json").read_text())
    del tekken["audio"]
    (folder / "tekken.json").write_text(json.dumps(tekken))
    before = files(folder)
    with pytest.raises(CheckpointError, match=r"tekken\.json has no section 'audio'"):
        add_voice(folder, "ada", *make(12), RECORD)
    assert files(folder) == before
    assert recover_journal(folder) is None


# ---- headers, formats


def test_listing_reads_every_presets_rows_without_torch(tiny_checkpoint):
    code = (
        "import sys; from revox.checkpoint.voices import list_voices;"
        f"print([(v.name, v.rows, v.problem) for v in list_voices({str(tiny_checkpoint)!r})]);"
        "assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    promised = json.loads((tiny_checkpoint / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"]
    assert out.strip() == str([(name, rows, None) for name, rows in promised.items()])


def test_exports_hold_the_same_rows_as_the_pt(folder, make, tmp_path):
    rows, codes = make(12)
    add_voice(folder, "ada", rows, codes, RECORD)
    exact = rows.float().numpy()

    export_voice(folder, "ada", tmp_path / "ada.pt")
    loaded = torch.load(tmp_path / "ada.pt", map_location="cpu", weights_only=True)
    assert loaded.dtype == torch.bfloat16
    assert np.array_equal(loaded.float().numpy(), exact)

    # The raw file, and the bytes behind a safetensors header, are the upper halves of float32 numbers.
    export_voice(folder, "ada", tmp_path / "ada.bin")
    raw = np.frombuffer((tmp_path / "ada.bin").read_bytes(), "<u2").astype(np.uint32) << 16
    assert np.array_equal(raw.view(np.float32).reshape(13, 256), exact)

    export_voice(folder, "ada", tmp_path / "ada.safetensors")
    data = (tmp_path / "ada.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["embedding"]
    assert (header["embedding"]["dtype"], header["embedding"]["shape"]) == ("BF16", [13, 256])
    assert data[8 + length :] == (tmp_path / "ada.bin").read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_an_export_that_cannot_be_written_is_the_systems_sentence_and_leaves_nothing(
    folder, tmp_path, suffix
):
    out = tmp_path / "out"
    out.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_voice(folder, "it_male", out / f"voice{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.iterdir())


def test_an_export_without_a_known_ending_is_refused_with_the_endings(folder, tmp_path):
    with pytest.raises(
        VoiceError, match=r"\.pt \(vllm-omni\).*\.safetensors \(mlx-audio\).*\.bin \(the C port\)"
    ):
        export_voice(folder, "it_male", tmp_path / "voice.wav")
    with pytest.raises(VoiceError, match="is not a folder"):
        export_voice(folder, "it_male", tmp_path / "absent" / "voice.pt")
