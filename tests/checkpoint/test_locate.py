from __future__ import annotations

import warnings
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.locate import FILES, locate


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with owner/name at two commits, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    for commit in ("1" * 40, "2" * 40):
        (home / "blobs" / commit).write_text("{}")
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "snapshots" / commit / "params.json").symlink_to(Path("../../blobs") / commit)
    (home / "refs" / "main").write_text("2" * 40)
    return home


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path


def test_a_folder_named_like_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revisions; leave --revision out"):
        locate(tmp_path, "main")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such/folder", "owner/", "../x", "owner/na me"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        locate(name)


def test_a_file_is_refused_with_the_folder_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"is a file, .* name {tmp_path}\."):
        locate(tmp_path / "consolidated.safetensors")


def test_a_hub_id_is_found_in_the_cache_without_network(offline_cache: Path) -> None:
    assert locate("owner/name") == offline_cache / "snapshots" / ("2" * 40)


def test_what_was_added_to_the_revision_before_is_pointed_to(offline_cache: Path) -> None:
    before = offline_cache / "snapshots" / ("1" * 40)
    (before / ".revox").mkdir()
    (before / ".revox" / "consent.jsonl").write_text("{}")
    with pytest.warns(UserWarning, match=f"name it as owner/name@{'1' * 40}"):
        locate("owner/name")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert locate(f"owner/name@{'1' * 40}") == before


def test_a_revision_can_be_pinned(offline_cache: Path) -> None:
    first = offline_cache / "snapshots" / ("1" * 40)
    assert locate("owner/name", "1" * 40) == locate("owner/name@" + "1" * 40) == first


@pytest.mark.usefixtures("offline_cache")
def test_a_hub_id_that_is_not_cached_says_what_to_do() -> None:
    with pytest.raises(
        CheckpointError, match="not in the local cache and the hub cannot be reached: connect"
    ):
        locate("owner/other")
    with pytest.raises(CheckpointError, match="at revision 3333"):
        locate("owner/name", "3333")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.GatedRepoError, "its terms must be accepted"),
        (errors.RevisionNotFoundError, "no such revision: check --revision"),
        (errors.HfHubHTTPError, "the hub answered with an error"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise kind("404\nlong text", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=words) as error:
        locate("owner/name")
    assert "\n" not in str(error.value)


def test_a_download_that_breaks_off_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        """Stands for those of the hub's http library, which changes between versions."""

    def breaks(*args: object, **kwargs: object) -> None:
        raise TransportError("connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks)
    with pytest.raises(
        CheckpointError, match=r"the download failed \(connection reset\): check the connection"
    ):
        locate("owner/name")


def test_only_a_checkpoints_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **settings: object) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate("owner/name", "v1")
    assert asked == {"name": "owner/name", "revision": "v1", "allow_patterns": list(FILES)}
    wanted = ["params.json", "tekken.json", "consolidated.safetensors", "voice_embedding/ar_male.pt"]
    other = ["README.md", "pytorch_model.bin", "demo.wav", "tf_model.h5"]
    assert [name for name in wanted + other if any(fnmatch(name, p) for p in FILES)] == wanted
