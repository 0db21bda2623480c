"""An encoder into a checkpoint and out again: what is written, what is read of it, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TINY, in_shards, tiny_model
from revox.checkpoint import encoder_file
from revox.checkpoint.encoder_file import decoder_sha256, read_record, released_sha256
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.inject import InjectionOptions, eject, inject
from revox.checkpoint.inspect import inspect
from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.quantize import write_quantized
from revox.checkpoint.release import EMBEDDING_TABLE
from revox.checkpoint.share import export_encoder, injection_of
from revox.checkpoint.tensors import weight_files
from revox.checkpoint.voice_codes import embedding_of_codes, read_table
from revox.checkpoint.voices import add_voice, list_voices, load_voice
from revox.cli import inject_command
from revox.model.config import N_SPECIAL_CODES

WEIGHTS = "consolidated.safetensors"
ENCODER = "consolidated.encoder.safetensors"
CARD = "consolidated.encoder.md"
PARTS = ("input_proj.", "encoder_blocks.")
RECORD = {"revox_run": "/home/somebody/runs/first", "data": ["/data/librispeech", "own|clips"], "steps": 1234}


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing guards against power cuts, which no test makes; a killed process loses nothing without it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def encoder() -> dict[str, Tensor]:
    """Another encoder of the tiny sizes, float32, named as in the codec."""
    state = tiny_model(with_encoder=True, seed=7).audio_tokenizer.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name.startswith(PARTS)}


def save_encoder(path: Path, tensors: dict[str, Tensor], record: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=None if record is None else {"revox": json.dumps(record)})
    return path


@pytest.fixture
def folder(tiny_checkpoint_copy: Path) -> Path:
    return tiny_checkpoint_copy


@pytest.fixture
def run(tmp_path: Path, encoder, tiny_checkpoint: Path) -> Path:
    """A training run's folder, whose encoder names the tiny checkpoint's decoder."""
    record = {**RECORD, "decoder_sha256": decoder_sha256(tiny_checkpoint)}
    save_encoder(tmp_path / "run" / "encoder.safetensors", encoder, record)
    return tmp_path / "run"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Every file with its hash, those of `.revox` too, locks left out."""
    return {
        str(path.relative_to(folder)): sha(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")
    }


def full(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"audio_tokenizer.{name}": tensor for name, tensor in encoder.items()}


def merged(out: Path, **more: Any) -> InjectionOptions:
    return InjectionOptions(out=out, merge=True, **more)


# ---- what is written


@pytest.mark.parametrize("prefix", ["", "audio_tokenizer."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_encoder_goes_into_a_file_of_its_own_rounded_as_torch_rounds(
    folder, encoder, tmp_path, prefix, dtype
):
    before = contents(folder)
    stored = {prefix + name: tensor.to(dtype) for name, tensor in encoder.items()}
    report = inject(folder, save_encoder(tmp_path / "e.safetensors", stored))
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {ENCODER, CARD}
    written = load_file(folder / ENCODER)
    assert set(written) == set(full(encoder))
    for name, tensor in full(encoder).items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], tensor.to(dtype).to(torch.bfloat16)), name
    assert (report.added, report.file) == (114, ENCODER)


@pytest.mark.parametrize("sharded", [False, True])
def test_an_injected_folder_loads_with_its_encoder_and_inspect_tells_whose_it_is(
    folder, run, encoder, sharded
):
    if sharded:
        in_shards(folder)
    assert inspect(folder).encoder == "absent"
    inject(folder, run)
    report = inspect(folder)
    assert (report.encoder, report.unknown, report.mismatched, report.problems) == ("complete", [], [], [])
    assert any(f"revox injected this encoder (first) into {ENCODER}" in note for note in report.notes)
    loaded = load_model(folder, parts=("audio_tokenizer",)).audio_tokenizer.state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in encoder.items())


def test_deleting_the_file_takes_the_encoder_out_again(folder, run):
    before = contents(folder)
    inject(folder, run)
    (folder / ENCODER).unlink()
    assert {name: sha for name, sha in contents(folder).items() if name != CARD} == before
    assert inspect(folder).encoder == "absent"
    assert not load_model(folder, parts=("audio_tokenizer",)).audio_tokenizer.has_encoder


def test_deleting_the_file_of_a_folder_in_shards_takes_it_out_too(folder, run):
    inject(in_shards(folder), run)
    (folder / ENCODER).unlink()
    assert inspect(folder).encoder == "absent"
    inject(folder, run)
    assert inspect(folder).encoder == "complete"


def test_an_encoder_stands_beside_weights_of_a_converted_checkpoint(folder, run):
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    inject(folder, run)
    assert [path.name for path in weight_files(folder)] == [ENCODER, "model.safetensors"]
    assert inspect(folder).encoder == "complete"
    eject(folder)
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize("sharded", [False, True])
def test_eject_leaves_the_folder_as_it_was(folder, run, sharded):
    if sharded:
        in_shards(folder)
    before = contents(folder)
    inject(folder, run)
    report = eject(folder)
    assert contents(folder) == before
    assert (report.removed, report.written) == (114, 0)


def test_an_index_lists_the_encoder_since_vllm_reads_nothing_else(folder, run):
    inject(in_shards(folder), run)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    assert sum(file == ENCODER for file in index["weight_map"].values()) == 114
    assert [path.name for path in weight_files(folder)] == [
        "consolidated-00001-of-00002.safetensors",
        "consolidated-00002-of-00002.safetensors",
        ENCODER,
    ]


def test_a_file_that_the_index_does_not_list_is_told_and_injected_anew(folder, run):
    # As after a command that was killed between the two files.
    inject(in_shards(folder), run)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file != ENCODER}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    report = inspect(folder)
    assert report.encoder == "absent"
    assert any("the index does not list its tensors" in note for note in report.notes)
    inject(folder, run)
    assert inspect(folder).encoder == "complete"


def test_a_hub_cache_gains_one_file_and_its_links_and_blobs_stay(folder, run, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = contents(blobs)
    inject(folder, run)
    own = {path.name for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert own == {ENCODER, CARD}
    assert inspect(folder).encoder == "complete"
    inject(folder, run, InjectionOptions(out=tmp_path / "new", replace=True))
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    eject(folder)
    assert all(path.is_symlink() for path in folder.rglob("*") if path.is_file())
    assert contents(blobs) == before


def test_a_new_folder_has_the_same_files_and_leaves_the_old_one_as_it_was(folder, run, tmp_path):
    (folder / "README.md").write_text("somebody's")
    (folder / "more").mkdir()
    before = contents(folder)
    report = inject(folder, run, InjectionOptions(out=tmp_path / "new"))
    assert contents(folder) == before
    after = contents(tmp_path / "new")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {ENCODER, CARD}
    assert report.left_out == ["more/"]
    assert inspect(tmp_path / "new").encoder == "complete"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_writing_into_a_file_of_the_new_folder_changes_nothing_in_the_old_one(folder, run, tmp_path):
    # As `cp`, an editor or torch.save do, which do not rename.
    before = contents(folder)
    inject(folder, run, InjectionOptions(out=tmp_path / "new"))
    for path in (tmp_path / "new").rglob("*"):
        if path.is_file():
            assert path.stat().st_nlink == 1, path
            with open(path, "r+b") as file:
                file.write(b"changed!")
    assert contents(folder) == before


# ---- one file, and an adaptation


@pytest.mark.parametrize("sharded", [False, True])
def test_merged_weights_are_one_file_of_the_same_tensors_and_the_encoder(
    folder, run, encoder, tmp_path, sharded
):
    before = load_file(folder / WEIGHTS)
    report = inject(in_shards(folder) if sharded else folder, run, merged(tmp_path / "new"))
    assert [path.name for path in weight_files(tmp_path / "new")] == [report.file] == [WEIGHTS]
    after = load_file(tmp_path / "new" / WEIGHTS)
    assert set(after) == set(before) | set(full(encoder))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in full(encoder).items())


@pytest.fixture
def adaptation(folder: Path, tmp_path: Path) -> Path:
    """Two matrices of the backbone, changed, in float32."""
    tensors = load_file(folder / WEIGHTS)
    names = ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight")
    record = {"revox": json.dumps({"data": ["/home/ada/clips"], "consent": "Ada, who agreed by e-mail"})}
    changed = {name: tensors[name].float() * 1.5 for name in names}
    save_file(changed, tmp_path / "adaptation.safetensors", record)
    return tmp_path / "adaptation.safetensors"


def test_an_adaptation_takes_the_place_of_its_tensors_and_of_no_other(folder, run, adaptation, tmp_path):
    before, wanted = load_file(folder / WEIGHTS), load_file(adaptation)
    report = inject(folder, run, merged(tmp_path / "new", adaptation=adaptation))
    after = load_file(tmp_path / "new" / WEIGHTS)
    assert report.adapted == sorted(wanted)
    for name, tensor in before.items():
        assert torch.equal(after[name], wanted.get(name, tensor).bfloat16()), name
    card = (tmp_path / "new" / CARD).read_text()
    assert "2 tensors of the model were replaced" in card
    assert "Ada, who agreed by e-mail" in card
    assert injection_of(tmp_path / "new" / WEIGHTS)["adaptation_record"]["data"] == ["clips"]


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adaptation_does_not_go_into_fewer_bits(bits, folder, adaptation, tmp_path):
    write_quantized(folder, tmp_path / "small", bits)
    with pytest.raises(CheckpointError, match="in fewer bits, where an adaptation cannot go"):
        inject(tmp_path / "small", None, merged(tmp_path / "new", adaptation=adaptation))


def test_records_of_another_form_are_left_out(folder, run):
    inject(folder, run)
    tensors = load_file(folder / ENCODER)
    odd = json.dumps({"encoder": "x", "before": {"adaptation_record": 3, "adapted": ["a"]}, "at": "now"})
    save_file(tensors, folder / ENCODER, {"revox_injection": odd})
    assert injection_of(folder / ENCODER) == {"before": {"adapted": ["a"]}, "at": "now"}
    assert inspect(folder).encoder == "complete"


def test_consent_stays_with_adapted_weights(folder, run, adaptation, tmp_path):
    inject(folder, run, merged(tmp_path / "once", adaptation=adaptation))
    changed = {"norm.weight": torch.ones(256)}
    save_file(changed, tmp_path / "b.safetensors", {"revox": json.dumps({"consent": "Bob, who agreed"})})
    options = InjectionOptions(
        tmp_path / "twice", merge=True, replace=True, adaptation=tmp_path / "b.safetensors"
    )
    inject(tmp_path / "once", run, options)
    card = (tmp_path / "twice" / CARD).read_text()
    assert "Bob, who agreed" in card
    assert "Ada, who agreed by e-mail" in card
    before = injection_of(tmp_path / "twice" / WEIGHTS)["before"]
    assert before["adaptation_record"]["consent"] == "Ada, who agreed by e-mail"


def test_an_adaptation_alone_leaves_the_encoder_or_its_absence_as_it_is(folder, run, adaptation, tmp_path):
    alone = inject(folder, None, merged(tmp_path / "alone", adaptation=adaptation))
    assert (alone.added, len(alone.adapted)) == (0, 2)
    changed, before = load_file(tmp_path / "alone" / WEIGHTS), load_file(folder / WEIGHTS)
    assert changed.keys() == before.keys()
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    report = inspect(tmp_path / "alone")
    assert (report.encoder, report.problems) == ("absent", [])
    assert any("Ada, who agreed by e-mail" in note for note in report.notes)

    inject(folder, run, InjectionOptions(out=tmp_path / "with"))
    both = inject(tmp_path / "with", None, merged(tmp_path / "both", adaptation=adaptation))
    encoder = load_file(tmp_path / "with" / ENCODER)
    after = load_file(tmp_path / "both" / WEIGHTS)
    assert both.added == len(encoder)
    assert all(torch.equal(after[name], tensor) for name, tensor in encoder.items())
    assert not (tmp_path / "both" / ENCODER).exists()
    assert "run" in (tmp_path / "both" / CARD).read_text()
    with pytest.raises(CheckpointError, match="nothing to write"):
        inject(folder, None, InjectionOptions(out=tmp_path / "none"))


def test_an_adaptation_of_another_model_is_refused(folder, run, tmp_path):
    file = tmp_path / "a.safetensors"
    for base, agrees in ((released_sha256(folder), True), ("0" * 64, False)):
        save_file({"norm.weight": torch.ones(256)}, file, {"revox": json.dumps({"base_sha256": base})})
        options = merged(tmp_path / "new", adaptation=file, dry_run=True)
        if agrees:
            assert inject(folder, run, options).adapted == ["norm.weight"]
            continue
        with pytest.raises(CheckpointError, match="learned on another model"):
            inject(folder, run, options)
        inject(folder, run, dataclasses.replace(options, force=True))


def test_voices_are_summed_again_over_an_adapted_table(folder, run, tmp_path, capsys):
    config, old = read_params(folder).voxtral_config(), read_table(folder)
    sizes = torch.tensor(config.codebook_rows)[:, None] - N_SPECIAL_CODES
    codes = (torch.rand((len(sizes), 5), generator=torch.Generator().manual_seed(0)) * sizes).long()
    rows = embedding_of_codes(codes, old, config)
    preset = next(entry.name for entry in list_voices(folder) if entry.preset)
    unchanged = load_voice(folder, preset).embedding
    add_voice(folder, "ada", rows, codes, {"consent": "Ada, who agreed"})
    add_voice(folder, "tuned", rows + 1, codes, {"consent": "Ada, who agreed"})
    changed = {EMBEDDING_TABLE: old * 1.5}
    save_file(changed, tmp_path / "adaptation.safetensors", {"revox": "{}"})
    given = merged(tmp_path / "new", adaptation=tmp_path / "adaptation.safetensors")

    assert inject(folder, run, dataclasses.replace(given, dry_run=True)).rebuilt == ["ada"]
    report = inject(folder, run, given)

    assert report.rebuilt == ["ada"]
    assert report.outdated == ["tuned"]
    ada, tuned = load_voice(tmp_path / "new", "ada"), load_voice(tmp_path / "new", "tuned")
    assert torch.equal(ada.embedding, embedding_of_codes(codes, changed[EMBEDDING_TABLE].bfloat16(), config))
    assert torch.equal(ada.codes, codes)
    assert ada.provenance["consent"] == "Ada, who agreed"
    assert torch.equal(tuned.embedding, (rows + 1).bfloat16())
    assert torch.equal(load_voice(tmp_path / "new", preset).embedding, unchanged)
    assert torch.equal(load_voice(folder, "ada").embedding, rows)
    inject_command._print(report)
    assert "made again from their codes, for the adapted table: ada" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"merge": True}, {"adaptation": True}, {"adaptation": True, "out": True}]
)
def test_what_rewrites_the_weights_asks_for_a_new_folder(folder, run, adaptation, tmp_path, options):
    given = {"adaptation": adaptation} if "adaptation" in options else {"merge": True}
    given |= {"out": tmp_path / "new"} if "out" in options else {}
    with pytest.raises(CheckpointError, match="say --merge --out FOLDER"):
        inject(folder, run, InjectionOptions(**given))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {"base_model.layers.0.wq.lora_A.weight": torch.zeros(2, 2)}, "merge LoRA factors"),
        (lambda t: {"layers.9.attention.wq.weight": torch.zeros(2, 2)}, "has no tensor layers.9"),
        (lambda t: {"norm.weight": torch.zeros(3)}, r"norm.weight is \[3\]"),
        (lambda t: {"norm.weight": torch.full((256,), torch.nan)}, "not finite"),
        (lambda t: {k: v for k, v in t.items() if k.endswith("cluster_usage")}, "the codec as it is"),
    ],
)
def test_a_wrong_adaptation_is_refused_before_anything_is_written(folder, run, tmp_path, change, sentence):
    save_file(change(load_file(folder / WEIGHTS)), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        inject(folder, run, merged(tmp_path / "new", adaptation=tmp_path / "a.safetensors"))
    assert not (tmp_path / "new").exists()


# ---- folders of version 0.1 and of others


@pytest.fixture
def injected_by_0_1(tmp_path: Path) -> Path:
    """A folder that commit 73e8a5f injected into in place, with an adaptation of one tensor."""
    shutil.unpack_archive(Path(__file__).parent / "injected-0.1.tar.xz", tmp_path)
    return tmp_path / "injected-0.1"


ADAPTED_0_1 = "layers.0.attention.wq.weight"


def test_a_folder_that_version_0_1_merged_an_encoder_into_is_read(injected_by_0_1):
    report = inspect(injected_by_0_1)
    assert (report.encoder, report.problems) == ("complete", [])
    assert any("revox injected this encoder (first)" in note for note in report.notes)
    model = load_model(injected_by_0_1)
    assert model.audio_tokenizer.has_encoder
    assert bool((model.state_dict()[f"backbone.{ADAPTED_0_1}"] == 2).all())


@pytest.mark.parametrize("by", ["0.1", "merge"])
def test_an_encoder_inside_the_weights_is_not_taken_out_but_exported(
    injected_by_0_1, folder, run, encoder, tmp_path, by
):
    if by == "merge":
        inject(folder, run, merged(tmp_path / "new"))
    at = injected_by_0_1 if by == "0.1" else tmp_path / "new"
    before = contents(at)
    with pytest.raises(CheckpointError, match="download the release's file again or restore your backup"):
        eject(at)
    assert contents(at) == before
    export_encoder(at, tmp_path / "saved.safetensors")
    merged_in = load_file(at / WEIGHTS)
    saved = load_file(tmp_path / "saved.safetensors")
    assert set(saved) == set(full(encoder))
    assert all(torch.equal(saved[name], merged_in[name]) for name in saved)
    # The encoder in the folder of 0.1 named no decoder when it was injected.
    named = read_record(tmp_path / "saved.safetensors").get("decoder_sha256")
    assert named == (decoder_sha256(at) if by == "merge" else None)


def test_there_is_nothing_to_take_out_of_a_folder_as_released(folder):
    with pytest.raises(CheckpointError, match="no encoder"):
        eject(folder)


@pytest.mark.parametrize("second", [WEIGHTS, "consolidated.encoder-2.safetensors"])
def test_two_encoders_are_refused_by_everything_that_reads_the_folder(
    folder, run, tmp_path, tiny_checkpoint_with_encoder, second
):
    inject(folder, run)
    source = tiny_checkpoint_with_encoder / WEIGHTS if second == WEIGHTS else folder / ENCODER
    shutil.copy(source, folder / second)
    for read in (load_model, inspect, eject, lambda folder: inject(folder, run)):
        with pytest.raises(CheckpointError, match=r"holds an encoder twice, in consolidated\.enc") as refusal:
            read(folder)
        assert second in str(refusal.value)
    (folder / ENCODER).unlink()
    assert inspect(folder).encoder == "complete"


# ---- what is refused


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_value(name: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = tensors[name].clone()
        changed.view(-1)[-1] = value
        return tensors | {name: changed}

    return change


GAIN = "input_proj.conv.parametrizations.weight.original0"
DIRECTION = "input_proj.conv.parametrizations.weight.original1"
NORM = "encoder_blocks.0.layers.0.attention_norm.weight"
OTHER_NAN = 0x7FFFFFFF  # rounds to minus zero if only its bits are looked at


def odd_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = tensors[NORM].clone()
    changed.view(torch.int32)[0] = OTHER_NAN
    return tensors | {NORM: changed}


def without_pairs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    left = without(GAIN)(without(DIRECTION)(tensors))
    return left | {"input_proj.conv.weight": tensors[DIRECTION]}


def dead_channel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = tensors[DIRECTION].clone()
    changed[3] = -0.0
    return tensors | {DIRECTION: changed}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without(NORM), "holds 113 of the encoder's 114 tensors"),
        (without(GAIN), "holds 113 of the encoder's 114 tensors"),
        (lambda t: t | {GAIN: t[GAIN][:-1]}, "codec of other sizes"),
        (lambda t: t | {DIRECTION: t[DIRECTION].transpose(0, 1).contiguous()}, "codec of other sizes"),
        (lambda t: t | {"encoder_blocks.8.layers.0.ffn_scale": torch.ones(3)}, "not an encoder of this"),
        (lambda t: t | {"decoder_blocks.0.conv.weight": torch.ones(3)}, "not an encoder of this"),
        (lambda t: {"layers.0.weight": torch.ones(3)}, "not an encoder of this codec"),
        (lambda t: t | {f"audio_tokenizer.{NORM}": t[NORM].clone()}, "twice"),
        (without_pairs, "input_proj.conv.weight, .*weight norm as pairs"),
        (lambda t: without(GAIN)(t) | {"input_proj.conv.weight_g": t[GAIN]}, "weight norm as pairs"),
        (with_value(NORM, float("nan")), "not finite"),
        (with_value(NORM, float("inf")), "not finite"),
        (with_value(NORM, 3.4e38), "too large for BF16"),
        (odd_nan, "not finite"),
        (dead_channel, "all zero in channel 3"),
        (lambda t: t | {NORM: t[NORM].to(torch.int32)}, "is I32"),
    ],
)  # fmt: skip
def test_a_wrong_encoder_is_refused_in_a_sentence_before_anything_is_written(
    folder, encoder, tmp_path, change, sentence
):
    path = save_encoder(tmp_path / "e" / "e.safetensors", change(dict(encoder)))
    before = contents(folder)
    for options in (InjectionOptions(), merged(tmp_path / "new")):
        with pytest.raises(CheckpointError, match=sentence):
            inject(folder, path, options)
    assert contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "e"]


def test_the_encoder_of_a_codec_of_other_sizes_is_refused(folder, tmp_path, encoder):
    wider = {
        name: torch.cat([tensor, tensor]) if name.startswith("input_proj") else tensor
        for name, tensor in encoder.items()
    }
    with pytest.raises(CheckpointError, match=r"is \[64, .*params.json asks for \[32, "):
        inject(folder, save_encoder(tmp_path / "e.safetensors", wider))


def test_an_encoder_of_another_decoder_is_refused_unless_forced(folder, encoder, tmp_path):
    record = {**RECORD, "decoder_sha256": "0" * 64}
    path = save_encoder(tmp_path / "e.safetensors", encoder, record)
    with pytest.raises(CheckpointError, match="another decoder"):
        inject(folder, path)
    assert inject(folder, path, InjectionOptions(force=True)).decoder_agrees is False
    assert "by force" in (folder / CARD).read_text()


def test_the_hash_of_the_decoder_is_that_of_decoder_and_quantizer_and_of_nothing_else(folder, run):
    before = decoder_sha256(folder)
    inject(folder, run)
    assert decoder_sha256(folder) == before
    # The definition, with another library's reader: lines of name, type, shape and hash, in order.
    lines = ""
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        if name.startswith(
            tuple(f"audio_tokenizer.{part}" for part in ("decoder_blocks", "output_proj", "quantizer"))
        ):
            data = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            lines += f"{name} BF16 {list(tensor.shape)} {data}\n"
    assert before == hashlib.sha256(lines.encode()).hexdigest()


def test_a_second_encoder_takes_the_place_of_the_first_only_when_told(folder, run, encoder, tmp_path):
    inject(folder, run)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"an encoder already.*--replace"):
        inject(folder, run)
    assert contents(folder) == before
    other = {name: tensor * 2 for name, tensor in encoder.items()}
    path = save_encoder(tmp_path / "other.safetensors", other)
    report = inject(folder, path, InjectionOptions(replace=True))
    assert (report.removed, report.added) == (114, 114)
    written = load_file(folder / ENCODER)
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in full(other).items())


def test_a_partial_encoder_can_be_replaced(folder, run):
    inject(folder, run)
    tensors = load_file(folder / ENCODER)
    del tensors[f"audio_tokenizer.{NORM}"]
    (folder / ENCODER).unlink()
    save_file(tensors, folder / ENCODER)
    with pytest.raises(CheckpointError, match=f"an encoder already, in {ENCODER}"):
        inject(folder, run)
    inject(folder, run, InjectionOptions(replace=True))
    assert inspect(folder).encoder == "complete"


def test_an_encoder_inside_the_weights_is_not_replaced_by_a_file(folder, run, tmp_path):
    inject(folder, run, merged(tmp_path / "new"))
    with pytest.raises(CheckpointError, match=r"inside consolidated\.safetensors, expected"):
        inject(tmp_path / "new", run, InjectionOptions(replace=True))
    inject(tmp_path / "new", run, merged(tmp_path / "newer", replace=True))
    assert inspect(tmp_path / "newer").encoder == "complete"


@pytest.mark.parametrize("out", [True, False])
def test_no_room_on_the_disk_is_said_before_anything_is_written(folder, run, tmp_path, monkeypatch, out):
    options = InjectionOptions(out=tmp_path / "new" if out else None)
    need = inject(folder, run, dataclasses.replace(options, dry_run=True)).written
    usage = namedtuple("usage", "total used free")
    before = sorted(p.name for p in tmp_path.iterdir()), contents(folder)

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 50, 0, free))

    with_free(need)
    with pytest.raises(CheckpointError, match="free; make room"):
        inject(folder, run, options)
    assert (sorted(p.name for p in tmp_path.iterdir()), contents(folder)) == before
    with_free(int(need * 1.02))
    inject(folder, run, options)


@pytest.mark.parametrize("merge", [False, True])
def test_what_a_dry_run_says_will_be_written_is_what_is_written_and_it_writes_nothing(
    folder, run, tmp_path, merge
):
    before = contents(folder)
    options = InjectionOptions(out=tmp_path / "new", merge=merge)
    said = inject(folder, run, dataclasses.replace(options, dry_run=True))
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()
    assert inject(folder, run, options).written == said.written
    data = 0
    for path in weight_files(tmp_path / "new"):
        data += sum(tensor.nbytes for tensor in load_file(path).values())
    assert said.written == data


def test_a_folder_is_never_written_over(folder, run, tmp_path):
    for out, sentence in (
        (folder / ".." / folder.name, "is the checkpoint itself"),
        (folder, "is the checkpoint itself"),
        (folder / "inside", "inside the checkpoint itself"),
        (tmp_path / "run", "is there already"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            inject(folder, run, InjectionOptions(out=out))
    (tmp_path / "empty").mkdir()
    inject(folder, run, InjectionOptions(out=tmp_path / "empty"))


def test_a_checkpoint_that_is_not_whole_is_refused(folder, run):
    tensors = load_file(folder / WEIGHTS)
    del tensors["norm.weight"]
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="lacks 1 of the"):
        inject(folder, run)


def test_a_run_that_has_saved_no_encoder_and_a_file_that_is_not_there_are_told_apart(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no encoder\.safetensors"):
        inject(folder, folder / "voice_embedding")
    with pytest.raises(CheckpointError, match=r"nowhere is missing"):
        inject(folder, tmp_path / "nowhere")


def test_an_encoder_that_reads_back_otherwise_leaves_the_folder_as_it_was(folder, run, monkeypatch):
    before = contents(folder)
    real = encoder_file.tensor_sha256
    monkeypatch.setattr(encoder_file, "tensor_sha256", lambda e: "0" if ENCODER in str(e.file) else real(e))
    with pytest.raises(OSError, match="reads back otherwise"):
        inject(folder, run)
    assert contents(folder) == before


def test_what_a_killed_command_left_is_cleared_away_by_the_next(folder, run, tmp_path):
    left = folder / f".{ENCODER}.123-abc.tmp"
    left.write_bytes(b"half")
    inject(folder, run)
    assert left.exists(), "it may be a command at work"
    os.utime(left, (0, 0))
    (tmp_path / ".new.revox.tmp").mkdir()
    (tmp_path / ".new.revox.tmp" / "half").write_bytes(b"half")
    eject(folder)
    inject(folder, run, InjectionOptions(out=tmp_path / "new"))
    assert not left.exists()
    assert [path.name for path in (tmp_path, tmp_path / "new") if list(path.glob(".*"))] == []
    assert not (tmp_path / "new" / "half").exists()


# ---- cards, export


def test_the_card_names_run_data_and_licence_and_no_path_of_the_machine(folder, run):
    inject(folder, run)
    card = (folder / CARD).read_text()
    for words in (
        "| revox_run | first |",
        "| data | librispeech, own\\|clips |",
        "| steps | 1234 |",
        "CC BY-NC 4.0",
    ):
        assert words in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "/home" not in card + (folder / ENCODER).read_bytes()[:40000].decode(errors="replace")


def test_an_encoder_goes_through_export_and_another_injection_unchanged(
    folder, run, tmp_path, tiny_checkpoint
):
    first = inject(folder, run)
    path = tmp_path / "share" / "encoder.safetensors"
    assert export_encoder(folder, path).sha256 == first.encoder_sha256
    tensors = load_file(path)
    assert len(tensors) == 114
    assert all(
        name.startswith("audio_tokenizer.") and t.dtype == torch.bfloat16 for name, t in tensors.items()
    )
    second = inject(tiny_checkpoint, path, InjectionOptions(out=tmp_path / "second"))
    assert second.decoder_agrees
    assert second.encoder_sha256 == first.encoder_sha256
    record = read_record(tmp_path / "second" / ENCODER)
    assert (record["revox_run"], record["steps"]) == ("first", 1234)
    one, two = load_file(folder / ENCODER), load_file(tmp_path / "second" / ENCODER)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "CC BY-NC 4.0" in path.with_suffix(".md").read_text()


def test_an_export_does_not_name_a_decoder_that_the_injected_encoder_did_not(
    folder, encoder, tmp_path, tiny_checkpoint
):
    unknown = tmp_path / "unknown" / "encoder.safetensors"
    save_encoder(unknown, encoder, RECORD)
    assert inject(folder, unknown).decoder_agrees is None
    export_encoder(folder, tmp_path / "exported.safetensors")
    second = inject(
        tiny_checkpoint, tmp_path / "exported.safetensors", InjectionOptions(out=tmp_path / "second")
    )
    assert second.decoder_agrees is None


def test_what_is_no_whole_encoder_is_not_exported(folder, run, tmp_path):
    with pytest.raises(CheckpointError, match="no codec encoder"):
        export_encoder(folder, tmp_path / "x.safetensors")
    inject(folder, run)
    save_file(without(f"audio_tokenizer.{NORM}")(load_file(folder / ENCODER)), folder / ENCODER)
    with pytest.raises(CheckpointError, match="holds 113"):
        export_encoder(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_file_that_injection_writes_can_be_injected_elsewhere_as_it_is(
    folder, run, tmp_path, tiny_checkpoint
):
    first = inject(folder, run)
    second = inject(tiny_checkpoint, folder / ENCODER, InjectionOptions(out=tmp_path / "second"))
    assert second.decoder_agrees
    assert second.encoder_sha256 == first.encoder_sha256
    assert read_record(tmp_path / "second" / ENCODER)["steps"] == 1234


def test_the_tiny_codec_has_the_releases_structure_so_that_114_means_something(encoder):
    assert len(encoder) == 114
    assert TINY.codec.encoder_transformer_lengths == (2, 2, 2, 2)
