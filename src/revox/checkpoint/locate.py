"""A checkpoint is named by a folder or by a hub id; either way it becomes a folder on this machine."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from revox.checkpoint.errors import CheckpointError

FILES = (
    "params.json",
    "config.json",
    "tekken.json",
    "consolidated*.safetensors",
    "consolidated*.safetensors.index.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "voice_embedding/*",
)
"""What a checkpoint is made of; nothing else of a hub repository is fetched."""

CHANGES = (".revox/consent.jsonl", "consolidated.encoder.safetensors")
"""What a folder has to which revox added a voice or an encoder."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def user_cache() -> Path:
    """Where what can be made again is kept: `$REVOX_CACHE`, or revox's folder in the user's cache."""
    if own := os.environ.get("REVOX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "revox"


def locate(checkpoint: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint, fetched from the hub with progress if it is not there yet.

    Args:
        checkpoint: a folder, or a hub id such as `mistralai/Voxtral-4B-TTS-2603`, with `@REVISION` behind it
            if one is to be pinned. A folder of that name wins.
        revision: branch, tag or commit, for a hub id only.

    Returns:
        The folder. In the hub's cache its files are links into blobs that revisions share: write with
        `revox.speech.files.replace_file`, which breaks the link first.

    Raises:
        CheckpointError: no such folder, repository or revision, no access, or no connection.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{folder} is a folder, which has no revisions; leave --revision out or name a hub id."
            )
        return folder
    name = os.fspath(checkpoint)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file, where a checkpoint's folder was expected; name {folder.parent}."
        )
    if "@" in name and revision is None:
        name, revision = name.split("@", 1)
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{os.fspath(checkpoint)} is neither a folder nor a hub id (owner/name); name a checkpoint's "
            "folder."
        )
    found = fetch(name, FILES, revision)
    if revision is None:
        _say_where_changes_are(name, found)
    return found


def _say_where_changes_are(name: str, snapshot: Path) -> None:
    """A voice or an encoder that was added to the hub's copy of a revision is not in that of the next one."""
    changed = [
        one.name
        for one in snapshot.parent.glob("*")
        if one != snapshot and any((one / path).exists() for path in CHANGES)
    ]
    if changed and not any((snapshot / path).exists() for path in CHANGES):
        warnings.warn(
            f"{name} has a new revision, and what was added to the one before (voices, an encoder) is not in "
            f"it: name it as {name}@{changed[0]}, or copy that folder",
            UserWarning,
            stacklevel=3,
        )


def fetch(name: str, files: Iterable[str], revision: str | None = None) -> Path:
    """The folder with those of a hub repository's `files` (patterns) that it has, in the hub's cache.

    Raises CheckpointError when they cannot be fetched and are not in the cache.
    """
    from huggingface_hub import errors, snapshot_download

    at = f"{name} at revision {revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        why = "its terms must be accepted first: accept them on the hub and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = (
            "the hub has no such repository, or it is private: check the name, or log in with `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        why = "the hub has no such revision: check --revision"
    except errors.LocalEntryNotFoundError:
        why = "it is not in the local cache and the hub cannot be reached: connect, or name a folder"
    except errors.HfHubHTTPError as error:
        why = f"the hub answered with an error ({str(error).splitlines()[0]}): try again later"
    except errors.HFValidationError:
        why = "it is not a valid hub id: name a folder or owner/name"
    except Exception as error:  # the hub library's http errors are of another package in each of its versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        why = f"the download failed ({reason}): check the connection and the free space, and try again"
    raise CheckpointError(f"{at} is not a folder here and could not be fetched; {why}.") from None
