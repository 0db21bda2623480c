"""What the tests of marking share: speech-like audio in every format, a record and a made signer."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from revox.marking import MarkRecord, Signer, load_signer, new_record
from revox.speech import FORMATS, Audio, encode_audio

MARKABLE = [name for name in FORMATS if name != "pcm"]


@pytest.fixture(scope="session")
def audio() -> Audio:
    """1.3 s at 24 kHz, with noise, so that every packet differs."""
    rng = np.random.default_rng(7)
    t = np.arange(31_200) / 24_000
    voice = 0.3 * np.sin(2 * np.pi * 180 * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2
    return Audio((voice + 0.02 * rng.standard_normal(t.size)).astype(np.float32), 24_000)


@pytest.fixture(scope="session")
def encoded(audio: Audio) -> dict[str, bytes]:
    """The audio as a file of each format."""
    return {name: encode_audio(audio, name)[0] for name in FORMATS}


@pytest.fixture(scope="session")
def record() -> MarkRecord:
    """What the mark is to say."""
    return new_record("lab", "pt_male", now=datetime(2026, 11, 21, 12, 30, 5, 987, tzinfo=timezone.utc))


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A made pair in a folder of its own."""
    made = load_signer(folder=tmp_path_factory.mktemp("signer"))
    assert made is not None
    return made


@pytest.fixture(scope="session")
def marked(encoded: dict[str, bytes], record: MarkRecord, signer: Signer) -> dict[str, bytes]:
    """The files, marked."""
    from revox.marking import mark_bytes

    return {name: mark_bytes(encoded[name], name, record=record, signer=signer) for name in MARKABLE}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder."""
    monkeypatch.setenv("REVOX_STATE", str(tmp_path / "state"))
    return tmp_path / "state"
