from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from revox.checkpoint import replace_file


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
    umask = os.umask(0)
    os.umask(umask)
    replace_file(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
