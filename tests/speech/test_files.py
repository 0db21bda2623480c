"""A file is the old one or the new one, and a cache is valid for exactly its stamp."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from revox.speech import files
from revox.speech.files import load_or_build, load_stamped, replace_file, replacing, save_stamped, stamp_of


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A snapshot folder laid out as by huggingface_hub: files are links into blobs that revisions share."""
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "abc").write_bytes(b"the release's")
    for revision in ("1111", "2222"):
        folder = home / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "params.json").symlink_to(Path("../../blobs/abc"))
    return home


def test_a_link_into_a_hub_cache_is_broken_and_its_blob_stays(hub_cache: Path) -> None:
    ours, others = (hub_cache / "snapshots" / revision / "params.json" for revision in ("1111", "2222"))
    replace_file(ours, b"changed")
    assert not ours.is_symlink()
    assert ours.read_bytes() == b"changed"
    assert (hub_cache / "blobs" / "abc").read_bytes() == b"the release's"
    assert others.is_symlink()
    assert others.read_bytes() == b"the release's"


def test_hard_links_and_dangling_links_are_replaced_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "gone")
    replace_file(tmp_path / "b", b"new")
    replace_file(tmp_path / "c", b"new")
    assert (tmp_path / "a").read_bytes() == b"a"
    assert (tmp_path / "c").read_bytes() == b"new"
    assert not (tmp_path / "gone").exists()


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_while_it_is_written_readers_see_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    seen = []

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        seen.append((tmp_path / "a").read_bytes())

    replace_file(tmp_path / "a", write)
    assert seen == [b"old"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_text_is_utf8_and_permissions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    replace_file(tmp_path / "a", "é")
    assert (tmp_path / "a").read_bytes() == "é".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    with replacing(tmp_path / "a") as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o640
    umask = os.umask(0)
    os.umask(umask)
    replace_file(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_a_library_writes_to_the_temporary_path_takes_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_library_that_makes_the_file_anew_does_not_change_its_permissions(tmp_path: Path) -> None:
    def library(temporary: Path) -> None:
        temporary.unlink()
        temporary.touch(0o600)

    umask = os.umask(0)
    os.umask(umask)
    with replacing(tmp_path / "a") as temporary:
        library(temporary)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk_is_the_systems_sentence_whatever_the_library_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"), replacing(tmp_path / "a") as temporary:
        library(temporary)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with (
        pytest.raises(OSError, match="No space left on device") as full,
        replacing(tmp_path / "a") as temporary,
    ):
        library(temporary)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert os.listdir(tmp_path) == []


def test_a_cached_file_is_built_once_for_a_stamp_and_again_for_another(tmp_path: Path) -> None:
    built = []

    def build() -> bytes:
        built.append(1)
        return b"line\nline" * len(built)

    path = tmp_path / "folder" / "cache"
    stamp, other = stamp_of("codec", 1.5, path), stamp_of("codec", 2.5, path)
    assert load_or_build(path, stamp, build) == load_or_build(path, stamp, build) == b"line\nline"
    assert load_or_build(path, other, build) == b"line\nline" * 2
    assert load_stamped(path, stamp) is None
    assert len(built) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_damaged_cached_file_is_not_used(tmp_path: Path, damage) -> None:
    path = tmp_path / "cache"
    save_stamped(path, "stamp", b"content")
    assert load_stamped(path, "stamp") == b"content"
    path.write_bytes(damage(path.read_bytes()))
    assert load_stamped(path, "stamp") is None
