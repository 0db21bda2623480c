import hashlib
import json
from datetime import datetime, timezone

import pytest

from revox.cloning.consent import Consent, provenance, record_consent
from revox.cloning.errors import CloneError

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize("statement", ["", "   ", "\n\t", None, "--", "1"])
def test_consent_that_says_nothing_is_refused_with_a_sentence(statement):
    with pytest.raises(CloneError, match=r"consent is required.*whose voice.*agreed"):
        record_consent(statement)


def test_consent_is_kept_word_for_word_on_one_line_with_its_date():
    consent = record_consent("  my own\nvoice ", subject=" Ada ", now=NOW)
    assert consent == Consent(statement="my own voice", subject="Ada", recorded_at=NOW)


def test_consent_in_any_language_is_accepted():
    assert record_consent("आवाज़ मेरी है").statement == "आवाज़ मेरी है"


def test_the_record_names_clip_method_settings_date_and_consent(tmp_path):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    record = provenance(
        "my own voice",
        "inversion",
        {"seed": 3, "budget": 60.0},
        source=clip,
        start_s=1.5,
        seconds=8.0,
        now=NOW,
    )
    assert json.loads(json.dumps(record)) == record
    assert record["source"] == {
        "file": "clip.wav",
        "sha256": hashlib.sha256(b"sound").hexdigest(),
        "start_s": 1.5,
        "seconds": 8.0,
    }
    assert record["method"] == "inversion"
    assert record["settings"] == {"seed": 3, "budget": 60.0}
    assert datetime.fromisoformat(record["created_at"].replace("Z", "+00:00")) == NOW
    assert record["consent"]["statement"] == "my own voice"
    assert str(tmp_path) not in json.dumps(record)


def test_a_record_without_consent_or_with_an_unreadable_clip_is_refused(tmp_path):
    with pytest.raises(CloneError, match="consent is required"):
        provenance(" ", "inversion")
    with pytest.raises(CloneError, match=r"absent\.wav cannot be read"):
        provenance("mine, yes", "inversion", source=tmp_path / "absent.wav")
