"""An encoder into a checkpoint and out again: what is written, what is refused, what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TINY, tiny_model
from revox.checkpoint import CheckpointError, rewrite
from revox.checkpoint import inject as library
from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.inject import eject, inject
from revox.checkpoint.inspect import inspect
from revox.checkpoint.load import load_model
from revox.checkpoint.share import export_encoder, push_encoder

WEIGHTS = "consolidated.safetensors"
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


def give_an_odd_header(weights: Path) -> None:
    """Other spacing, other order, metadata of somebody's: nothing that revox would write."""
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    odd = json.dumps(dict(reversed(header.items())) | {"__metadata__": {"by": "müller"}}, indent=1).encode()
    odd += b" " * 3
    weights.write_bytes(len(odd).to_bytes(8, "little") + odd + raw[8 + length :])


# ---- what is written


@pytest.mark.parametrize("prefix", ["", "audio_tokenizer."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_the_old_ones_and_the_encoder_rounded_as_torch_rounds(
    folder, encoder, tmp_path, prefix, dtype
):
    before = load_file(folder / WEIGHTS)
    stored = {prefix + name: tensor.to(dtype) for name, tensor in encoder.items()}
    report = inject(folder, save_encoder(tmp_path / "e.safetensors", stored), None)
    after = load_file(folder / WEIGHTS)
    assert set(after) == set(before) | set(full(encoder))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name, tensor in full(encoder).items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor.to(dtype).to(torch.bfloat16)), name
    assert (report.added, report.verified) == (114, len(after))


def test_an_injected_folder_loads_with_its_encoder_and_inspect_tells_whose_it_is(folder, run, encoder):
    assert inspect(folder).encoder == "absent"
    inject(folder, run, None)
    report = inspect(folder)
    assert (report.encoder, report.unknown, report.mismatched, report.problems) == ("complete", [], [], [])
    assert any("revox injected this encoder (first)" in note for note in report.notes)
    loaded = load_model(folder, parts=("audio_tokenizer",)).audio_tokenizer.state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in encoder.items())


def test_data_begin_where_in_a_page_they_began_so_that_a_file_system_can_share_the_blocks(folder, run):
    def data_start(path: Path) -> int:
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")

    before = data_start(folder / WEIGHTS)
    inject(folder, run, None)
    after = data_start(folder / WEIGHTS)
    assert after > before
    assert after % 4096 == before % 4096


def test_a_new_folder_has_the_same_voices_and_leaves_the_old_one_as_it_was(folder, run, tmp_path):
    (folder / "README.md").write_text("somebody's")
    (folder / "more").mkdir()
    before = contents(folder)
    report = inject(folder, run, tmp_path / "new")
    assert contents(folder) == before
    after = contents(tmp_path / "new")
    same = {name for name in before if after.get(name) == before[name]}
    assert set(before) - same == {WEIGHTS}
    assert report.left_out == ["more/"]
    assert inspect(tmp_path / "new").encoder == "complete"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_writing_into_a_file_of_the_new_folder_changes_nothing_in_the_old_one(folder, run, tmp_path):
    # As `cp`, an editor or torch.save do, which do not rename.
    before = contents(folder)
    inject(folder, run, tmp_path / "new")
    for path in (tmp_path / "new").rglob("*"):
        if path.is_file():
            assert path.stat().st_nlink == 1, path
            with open(path, "r+b") as file:
                file.write(b"changed!")
    assert contents(folder) == before


def test_links_into_a_hub_cache_are_replaced_and_their_blobs_stay(folder, run, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = contents(blobs)
    inject(folder, run, tmp_path / "new")
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    inject(folder, run, None)
    assert not (folder / WEIGHTS).is_symlink()
    assert contents(blobs) == before


def test_without_the_systems_copying_the_file_is_the_same(folder, run, tmp_path, monkeypatch):
    inject(folder, run, tmp_path / "one")

    def unsupported(*_: object, **__: object) -> int:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    inject(folder, run, tmp_path / "two")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- adaptation


@pytest.fixture
def adaptation(folder: Path, tmp_path: Path) -> Path:
    """Two matrices of the backbone, changed, in float32."""
    tensors = load_file(folder / WEIGHTS)
    names = ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight")
    save_file({name: tensors[name].float() * 1.5 for name in names}, tmp_path / "adaptation.safetensors")
    return tmp_path / "adaptation.safetensors"


def test_an_adaptation_takes_the_place_of_its_tensors_and_of_no_other(folder, run, adaptation):
    before, wanted = load_file(folder / WEIGHTS), load_file(adaptation)
    report = inject(folder, run, None, adaptation=adaptation)
    after = load_file(folder / WEIGHTS)
    assert report.adapted == sorted(wanted)
    for name, tensor in before.items():
        assert torch.equal(after[name], wanted.get(name, tensor).bfloat16()), name
    assert "2 tensors of the model were replaced" in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("where", ["in place", "another folder"])
def test_eject_gives_back_the_file_byte_for_byte_with_an_adaptation_too(
    folder, run, adaptation, tmp_path, where
):
    before = contents(folder)
    inject(folder, run, None, adaptation=adaptation)
    assert sha(folder / WEIGHTS) != before[WEIGHTS]
    out = None if where == "in place" else tmp_path / "ejected"
    report = eject(folder, out)
    assert contents(out or folder) == before
    assert report.byte_for_byte
    assert len(report.restored) == 2


def test_replacing_an_encoder_undoes_the_adaptation_that_came_with_the_old_one(
    folder, run, adaptation, encoder, tmp_path
):
    give_an_odd_header(folder / WEIGHTS)
    before = contents(folder)
    inject(folder, run, None, adaptation=adaptation)
    other = {name: tensor * 2 for name, tensor in encoder.items()}
    report = inject(folder, save_encoder(tmp_path / "other.safetensors", other), None, replace=True)
    assert (report.removed, report.added, len(report.restored)) == (114, 114, 2)
    after = load_file(folder / WEIGHTS)
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in full(other).items())
    assert len(list((folder / ".revox").glob("*-*"))) == 1
    assert eject(folder, None).byte_for_byte
    assert contents(folder) == before


def test_without_what_an_adaptation_replaced_eject_says_what_to_copy(folder, run, adaptation):
    inject(folder, run, None, adaptation=adaptation)
    shutil.rmtree(folder / ".revox")
    before = contents(folder)
    with pytest.raises(CheckpointError, match="keeps the 2 tensors that an adaptation replaced"):
        eject(folder, None)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {"base_model.layers.0.wq.lora_A.weight": torch.zeros(2, 2)}, "LoRA factors"),
        (lambda t: {"layers.9.attention.wq.weight": torch.zeros(2, 2)}, "has no tensor layers.9"),
        (lambda t: {"norm.weight": torch.zeros(3)}, r"norm.weight is \[3\]"),
        (lambda t: {"norm.weight": torch.full((256,), torch.nan)}, "not finite"),
        (lambda t: {k: v for k, v in t.items() if k.endswith("cluster_usage")}, "the codec is what"),
    ],
)
def test_a_wrong_adaptation_is_refused_before_anything_is_written(folder, run, tmp_path, change, sentence):
    save_file(change(load_file(folder / WEIGHTS)), tmp_path / "a.safetensors")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=sentence):
        inject(folder, run, None, adaptation=tmp_path / "a.safetensors")
    assert contents(folder) == before


# ---- out again


def test_eject_gives_back_headers_that_revox_would_not_write(folder, run):
    give_an_odd_header(folder / WEIGHTS)
    before = sha(folder / WEIGHTS)
    inject(folder, run, None)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata()["by"] == "müller"
    assert eject(folder, None).byte_for_byte
    assert sha(folder / WEIGHTS) == before


def test_without_its_kept_hashes_eject_still_gives_back_the_file_and_says_that_nothing_proves_it(folder, run):
    before = sha(folder / WEIGHTS)
    inject(folder, run, None)
    shutil.rmtree(folder / ".revox")
    report = eject(folder, None)
    assert sha(folder / WEIGHTS) == before
    assert not report.byte_for_byte
    assert "not there to compare with" in report.notes[0]


def test_what_was_changed_since_is_told_and_kept(folder, run):
    inject(folder, run, None)
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    raw = (folder / WEIGHTS).read_bytes()
    value = tensors["norm.weight"].view(torch.uint8).numpy().tobytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    at = 8 + int.from_bytes(raw[:8], "little") + header["norm.weight"]["data_offsets"][0]
    changed = bytes(len(value))
    (folder / WEIGHTS).write_bytes(raw[:at] + changed + raw[at + len(value) :])
    assert metadata
    report = eject(folder, None)
    assert not report.byte_for_byte
    assert "1 tensors were changed" in report.notes[0]
    assert not load_file(folder / WEIGHTS)["norm.weight"].any()


def test_an_encoder_that_others_put_there_is_taken_out_and_the_other_tensors_keep_their_bytes(
    tiny_checkpoint_with_encoder, tmp_path
):
    report = eject(tiny_checkpoint_with_encoder, tmp_path / "out")
    before, after = (load_file(f / WEIGHTS) for f in (tiny_checkpoint_with_encoder, tmp_path / "out"))
    assert set(before) - set(after) == {
        name for name in before if name.split(".")[1] in ("input_proj", "encoder_blocks")
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not report.byte_for_byte
    assert "written anew" in report.notes[0]
    assert inspect(tmp_path / "out").encoder == "absent"


def test_there_is_nothing_to_take_out_of_a_folder_as_released(folder):
    with pytest.raises(CheckpointError, match="no encoder"):
        eject(folder, None)


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
        (lambda t: t | {"encoder_blocks.8.layers.0.ffn_scale": torch.ones(3)}, "another codec"),
        (lambda t: t | {"decoder_blocks.0.conv.weight": torch.ones(3)}, "more than an encoder"),
        (lambda t: {"layers.0.weight": torch.ones(3)}, "no encoder of this codec"),
        (lambda t: t | {f"audio_tokenizer.{NORM}": t[NORM].clone()}, "twice"),
        (without_pairs, "weight-norm pairs"),
        (lambda t: without(GAIN)(t) | {"input_proj.conv.weight_g": t[GAIN]}, "weight-norm pairs"),
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
    for out in (None, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=sentence):
            inject(folder, path, out)
    assert contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "e"]


def test_the_encoder_of_a_codec_of_other_sizes_is_refused(folder, tmp_path, encoder):
    wider = {
        name: torch.cat([tensor, tensor]) if name.startswith("input_proj") else tensor
        for name, tensor in encoder.items()
    }
    with pytest.raises(CheckpointError, match=r"is \[64, .*params.json asks for \[32, "):
        inject(folder, save_encoder(tmp_path / "e.safetensors", wider), None)


def test_an_encoder_of_another_decoder_is_refused_unless_forced(folder, encoder, tmp_path):
    record = {**RECORD, "decoder_sha256": "0" * 64}
    path = save_encoder(tmp_path / "e.safetensors", encoder, record)
    with pytest.raises(CheckpointError, match="another decoder"):
        inject(folder, path, None)
    assert inject(folder, path, None, force=True).decoder_agrees is False
    assert "by force" in (folder / "MODEL_CARD.md").read_text()


def test_the_hash_of_the_decoder_is_that_of_decoder_and_quantizer_and_of_nothing_else(folder, run):
    before = decoder_sha256(folder)
    inject(folder, run, None)
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


def test_a_second_encoder_is_refused_without_replace_and_a_partial_one_too(folder, run):
    inject(folder, run, None)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"an encoder already.*--replace"):
        inject(folder, run, None)
    assert contents(folder) == before
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"audio_tokenizer.{NORM}"]
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="part of an encoder"):
        inject(folder, run, None)
    inject(folder, run, None, replace=True)
    assert inspect(folder).encoder == "complete"


@pytest.mark.parametrize("out", [True, False])
def test_no_room_on_the_disk_is_said_before_anything_is_written(folder, run, tmp_path, monkeypatch, out):
    need = inject(folder, run, tmp_path / "new" if out else None, dry_run=True).written
    usage = namedtuple("usage", "total used free")
    before = sorted(p.name for p in tmp_path.iterdir()), contents(folder)

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 50, 0, free))

    with_free(need)
    with pytest.raises(CheckpointError, match="free; make room"):
        inject(folder, run, tmp_path / "new" if out else None)
    assert (sorted(p.name for p in tmp_path.iterdir()), contents(folder)) == before
    with_free(int(need * 1.02))
    inject(folder, run, tmp_path / "new" if out else None)


def test_what_a_dry_run_says_will_be_written_is_what_is_written_and_it_writes_nothing(folder, run, tmp_path):
    before = contents(folder)
    said = inject(folder, run, tmp_path / "new", dry_run=True)
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()
    done = inject(folder, run, tmp_path / "new")
    new = contents(tmp_path / "new")
    ours = {name for name in new if name.startswith((".revox", "MODEL_CARD"))}
    assert (
        said.written
        == done.written
        == sum((tmp_path / "new" / name).stat().st_size for name in set(new) - ours)
    )


def test_a_folder_is_never_written_over(folder, run, tmp_path):
    for out, sentence in (
        (folder, "is the checkpoint itself"),
        (folder / "inside", "inside the checkpoint"),
        (tmp_path / "run", "is there already"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            inject(folder, run, out)
    (tmp_path / "empty").mkdir()
    inject(folder, run, tmp_path / "empty")


def test_a_checkpoint_that_is_not_whole_is_refused(folder, run, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    del tensors["norm.weight"]
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="lacks 1 of the"):
        inject(folder, run, None)
    (folder / WEIGHTS).rename(folder / "consolidated-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="of other names"):
        inject(folder, run, None)


def test_a_run_that_has_saved_no_encoder_and_a_file_that_is_not_there_are_told_apart(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no encoder\.safetensors"):
        inject(folder, folder / "voice_embedding", None)
    with pytest.raises(CheckpointError, match=r"nowhere is missing"):
        inject(folder, tmp_path / "nowhere", None)


def test_a_tensor_that_reads_back_otherwise_leaves_the_original(folder, run, monkeypatch):
    before = contents(folder)
    real = rewrite.write_layout

    def flips_a_bit(file, layout, told):
        real(file, layout, told)
        with open(file.name, "r+b") as again:
            again.seek(len(layout.header) + 1000)
            byte = again.read(1)
            again.seek(-1, 1)
            again.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(library, "write_layout", flips_a_bit)
    with pytest.raises(CheckpointError, match="reads back with another hash"):
        inject(folder, run, None)
    assert contents(folder) == before


# ---- killed


def killed_at(step: int, work: Callable[[], object]) -> str | None:
    """Do `work` in a process that gets SIGKILL at its `step`-th change to the disk; the step's name, or None
    when it was through before."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def die(name: str) -> None:
            nonlocal count
            if count == step:
                os.write(writer, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        library.reached = rewrite.reached = die
        try:
            work()
        except BaseException as error:
            os.write(writer, f"failed: {error!r}".encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        name = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), name
    return name if code else None


def few(names: list[str]) -> list[int]:
    """Steps worth dying at: each kind's first, and one in the middle."""
    steps = set()
    for kind in dict.fromkeys(names):
        at = [i for i, name in enumerate(names) if name == kind]
        steps |= {at[0], at[len(at) // 2]}
    return sorted(steps)


def steps_of(work: Callable[[], object], monkeypatch) -> list[int]:
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(library, "reached", names.append)
        patch.setattr(rewrite, "reached", names.append)
        work()
    return few(names)


def test_killed_at_any_moment_in_place_the_weights_are_the_old_ones_or_the_new_ones_whole(
    folder, run, adaptation, tmp_path, monkeypatch
):
    monkeypatch.setattr(rewrite, "_BLOCK", 1 << 20)
    for path in sorted((folder / "voice_embedding").glob("*.pt"))[1:]:
        path.unlink()
    whole, voice = load_file(folder / WEIGHTS), contents(folder / "voice_embedding")
    original = sha(folder / WEIGHTS)
    shutil.copytree(folder, tmp_path / "trial")
    steps = steps_of(lambda: inject(tmp_path / "trial", run, None, adaptation=adaptation), monkeypatch)
    assert len(steps) > 10
    outcomes = {}
    for step in steps:
        trial = tmp_path / f"in-{step}"
        shutil.copytree(folder, trial)
        name = killed_at(step, lambda trial=trial: inject(trial, run, None, adaptation=adaptation))
        assert name is not None
        assert contents(trial / "voice_embedding") == voice
        outcomes[name] = "old" if sha(trial / WEIGHTS) == original else "new"
        if outcomes[name] == "old":
            # As if nothing had been: the next attempt succeeds and clears what the dead one left.
            inject(trial, run, None, adaptation=adaptation)
        else:
            assert len(load_file(trial / WEIGHTS)) == len(whole) + 114
            with pytest.raises(CheckpointError, match="already"):
                inject(trial, run, None)
        assert (trial / "MODEL_CARD.md").exists()
        assert [path.name for path in trial.rglob("*.tmp")] == []
        assert len(list((trial / ".revox").glob("*-*"))) == 2
        assert eject(trial, None).byte_for_byte
        assert sha(trial / WEIGHTS) == original
        shutil.rmtree(trial)
    assert outcomes["copied"] == outcomes["added"] == outcomes[f"verified {WEIGHTS}"] == "old"
    assert outcomes["kept hashes"] == "old"
    assert outcomes[f"renamed {WEIGHTS}"] == outcomes["card"] == "new"


def test_killed_while_ejecting_the_weights_are_the_injected_ones_or_the_original(
    folder, run, adaptation, tmp_path, monkeypatch
):
    monkeypatch.setattr(rewrite, "_BLOCK", 1 << 20)
    original = sha(folder / WEIGHTS)
    inject(folder, run, None, adaptation=adaptation)
    injected = sha(folder / WEIGHTS)
    shutil.copytree(folder, tmp_path / "trial")
    outcomes = set()
    for step in steps_of(lambda: eject(tmp_path / "trial", None), monkeypatch):
        trial = tmp_path / f"out-{step}"
        shutil.copytree(folder, trial)
        assert killed_at(step, lambda trial=trial: eject(trial, None)) is not None
        found = sha(trial / WEIGHTS)
        assert found in (injected, original)
        outcomes.add(found)
        if found == injected:
            assert eject(trial, None).byte_for_byte
        else:
            with pytest.raises(CheckpointError, match="no encoder"):
                eject(trial, None)
        assert sha(trial / WEIGHTS) == original
        assert not (trial / "MODEL_CARD.md").exists()
        assert list((trial / ".revox").glob("*-*")) == []
        shutil.rmtree(trial)
    assert outcomes == {injected, original}


def test_killed_while_making_a_new_folder_there_is_none_and_the_next_attempt_clears_the_rest(
    folder, run, tmp_path, monkeypatch
):
    for path in sorted((folder / "voice_embedding").glob("*.pt"))[2:]:
        path.unlink()
    before = contents(folder)
    steps = steps_of(lambda: inject(folder, run, tmp_path / "trial"), monkeypatch)
    for step in steps:
        out = tmp_path / f"out{step}"
        name = killed_at(step, lambda out=out: inject(folder, run, out))
        assert contents(folder) == before
        if name != "renamed the folder":
            assert not out.exists()
            inject(folder, run, out)
        assert inspect(out).encoder == "complete"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_injections_at_once_do_not_meet(folder, run, monkeypatch):
    def second(step: str) -> None:
        if step == f"wrote {WEIGHTS}":
            monkeypatch.setattr(library, "reached", lambda step: None)
            with pytest.raises(CheckpointError, match="another injection"):
                inject(folder, run, None)
            told.append(step)

    told: list[str] = []
    monkeypatch.setattr(library, "reached", second)
    inject(folder, run, None)
    assert told == [f"wrote {WEIGHTS}"]
    assert inspect(folder).encoder == "complete"


def test_weights_that_change_while_the_encoder_is_checked_are_not_overwritten(folder, run):
    changed = []

    def progress(stage: str, done: int, of: int) -> None:
        if stage == "checking" and not changed:
            os.utime(folder / WEIGHTS, ns=(1, 1))
            changed.append(sha(folder / WEIGHTS))

    with pytest.raises(CheckpointError, match="changed by something else"):
        inject(folder, run, None, progress=progress)
    assert sha(folder / WEIGHTS) == changed[0]


# ---- cards, export, push


def test_the_card_names_run_data_and_licence_and_no_path_of_the_machine(folder, run):
    inject(folder, run, None)
    card = (folder / "MODEL_CARD.md").read_text()
    for words in (
        "| revox_run | first |",
        "| data | librispeech, own\\|clips |",
        "| steps | 1234 |",
        "CC BY-NC 4.0",
    ):
        assert words in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "/home" not in card + (folder / WEIGHTS).read_bytes()[:40000].decode(errors="replace")


def test_somebodys_card_is_left_alone(folder, run):
    (folder / "MODEL_CARD.md").write_text("somebody's")
    (folder / "README.md").write_text("somebody's")
    before = contents(folder)
    assert inject(folder, run, None).card == folder / "MODEL_CARD.revox.md"
    assert (folder / "MODEL_CARD.md").read_text() == (folder / "README.md").read_text() == "somebody's"
    eject(folder, None)
    assert contents(folder) == before


def test_an_encoder_goes_through_export_and_another_injection_unchanged(
    folder, run, tmp_path, tiny_checkpoint
):
    first = inject(folder, run, None)
    exported = export_encoder(tmp_path / "share" / "encoder.safetensors", checkpoint=folder)
    assert exported.sha256 == first.encoder_sha256
    tensors = load_file(exported.path)
    assert len(tensors) == 114
    assert all(
        name.startswith("audio_tokenizer.") and t.dtype == torch.bfloat16 for name, t in tensors.items()
    )
    second = inject(tiny_checkpoint, exported.path, tmp_path / "second")
    assert second.decoder_agrees
    assert (second.record["revox_run"], second.record["steps"]) == ("first", 1234)
    one, two = load_file(folder / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    from_run = export_encoder(tmp_path / "share" / "run.safetensors", run=run)
    assert from_run.sha256 == first.encoder_sha256
    assert "CC BY-NC 4.0" in from_run.card.read_text()


@pytest.mark.parametrize("which", ["checkpoint", "run"])
def test_what_is_no_whole_encoder_is_not_exported(tiny_checkpoint, encoder, tmp_path, which):
    if which == "checkpoint":
        given = {"checkpoint": tiny_checkpoint}
    else:
        given = {"run": save_encoder(tmp_path / "r" / "encoder.safetensors", without(NORM)(encoder)).parent}
    with pytest.raises(CheckpointError, match=r"no codec encoder|holds 113"):
        export_encoder(tmp_path / "x.safetensors", **given)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_runs_encoder_is_not_exported_beside_a_checkpoint_of_another_decoder(folder, encoder, tmp_path):
    path = save_encoder(tmp_path / "e.safetensors", encoder, {"decoder_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="another decoder"):
        export_encoder(tmp_path / "x.safetensors", checkpoint=folder, run=path)


class Hub:
    """Stands for huggingface_hub.HfApi; keeps what it was given."""

    def __init__(self, readme: Path | None = None, fails: Exception | None = None) -> None:
        self.readme, self.fails, self.calls = readme, fails, []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.fails:
            raise self.fails
        self.calls.append(("create", repo_id, private, exist_ok))

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return self.readme is not None and filename == "README.md"

    def hf_hub_download(self, repo_id: str, filename: str) -> str:
        return str(self.readme)

    def create_commit(self, repo_id: str, operations: list, *, commit_message: str):
        files = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}
        self.calls.append(("commit", repo_id, files, commit_message))
        return namedtuple("Commit", "commit_url")("https://hub.example/commit/1")


def test_push_commits_encoder_and_card_together_and_spares_somebodys_readme(run, tmp_path):
    exported = export_encoder(tmp_path / "mine.safetensors", run=run)
    somebodys = tmp_path / "README.md"
    somebodys.write_text("somebody's")
    for readme, name in ((None, "README.md"), (exported.card, "README.md"), (somebodys, "MODEL_CARD.md")):
        hub = Hub(readme)
        assert push_encoder(exported.path, "ada/encoder", private=True, api=hub).endswith("commit/1")
        assert hub.calls[0] == ("create", "ada/encoder", True, True)
        _, repository, files, _ = hub.calls[1]
        assert repository == "ada/encoder"
        assert files == {
            "encoder.safetensors": exported.path.read_bytes(),
            name: exported.card.read_bytes(),
        }


def test_push_says_in_a_sentence_what_the_hub_refused_and_asks_nothing_for_a_broken_file(run, tmp_path):
    exported = export_encoder(tmp_path / "mine.safetensors", run=run)
    with pytest.raises(CheckpointError, match=r"401 Unauthorized.*hf auth login"):
        push_encoder(exported.path, "ada/encoder", api=Hub(fails=RuntimeError("401 Unauthorized\nlong")))
    hub = Hub()
    with pytest.raises(CheckpointError, match="no name of a repository"):
        push_encoder(exported.path, "encoder", api=hub)
    exported.card.unlink()
    with pytest.raises(CheckpointError, match="card, is missing"):
        push_encoder(exported.path, "ada/encoder", api=hub)
    exported.path.write_bytes(exported.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        push_encoder(exported.path, "ada/encoder", api=hub)
    assert hub.calls == []


def test_the_tiny_codec_has_the_releases_structure_so_that_114_means_something(encoder):
    assert len(encoder) == 114
    assert TINY.codec.encoder_transformer_lengths == (2, 2, 2, 2)
