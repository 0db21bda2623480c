from __future__ import annotations

import io
import json
import random
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import c2pa
import numpy as np
import pytest

from revox.marking import MarkError, load_signer, manifest, mark_bytes, verify, verify_bytes, verify_file
from revox.marking.tags import add_tags
from revox.speech import FORMATS, Audio, encode_audio

MARKABLE = [name for name in FORMATS if name != "pcm"]
SIGNED = ["wav", "wav-float", "flac", "mp3", "m4a"]


def decoded(data: bytes) -> bytes:
    """Every sample as FFmpeg decodes them; what it cannot decode is empty."""
    try:
        with av.open(io.BytesIO(data)) as container:
            return b"".join(frame.to_ndarray().tobytes() for frame in container.decode(audio=0))
    except (av.error.FFmpegError, IndexError, ValueError):
        return b""


def state_of(data: bytes) -> str:
    """The verdict's state; "unreadable" where the file is none that plays."""
    try:
        return verify_bytes(data).state
    except MarkError:
        return "unreadable"


def packets(data: bytes) -> list[tuple[int, int]]:
    """Where the packets of sound lie in the file, as (start, end); found by their bytes."""
    places, at = [], 0
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(audio=0):
            if packet.size > 8:
                found = data.find(bytes(packet), at)
                if found >= 0:
                    places.append((found, found + packet.size))
                    at = found + packet.size
    return places


@pytest.mark.parametrize("name", MARKABLE)
def test_a_marked_file_is_told_and_an_unmarked_one_too(name, encoded, marked):
    told = verify_bytes(marked[name])
    assert told.state == "marked"
    assert "by revox" in told.sentences[0]
    assert "model lab, voice pt_male, at 2026-11-21T12:30:05Z" in told.sentences[0]
    assert (told.manifest is not None) == (name in SIGNED)
    assert told.tag.sound is True
    assert verify_bytes(encoded[name]).state == "unmarked"


@pytest.mark.parametrize("name", MARKABLE)
def test_one_changed_bit_of_sound_is_told_wherever_it_is(name, marked):
    places = packets(marked[name])
    assert len(places) > 1
    rng = random.Random(name)
    for start, end in [places[0], places[-1], *rng.sample(places, min(12, len(places)))]:
        data = bytearray(marked[name])
        data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        assert state_of(bytes(data)) in ("broken", "unreadable"), (name, start)


@pytest.mark.parametrize("name", SIGNED)
def test_a_change_anywhere_is_told_unless_it_changes_neither_the_sound_nor_what_the_mark_says(name, marked):
    """Padding inside the manifest, and little else, is not covered by its hash."""
    sound, said = decoded(marked[name]), verify_bytes(marked[name])
    rng = random.Random(name)
    missed = 0
    for _ in range(80):
        data = bytearray(marked[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if state_of(bytes(data)) == "marked":
            missed += 1
            assert decoded(bytes(data)) == sound
            assert verify_bytes(bytes(data)) == said
    assert missed < 10


@pytest.mark.parametrize("name", MARKABLE)
def test_sound_taken_away_or_added_or_swapped_is_told(name, encoded, marked, record, signer):
    places = packets(marked[name])
    (a, b), (c, d) = places[1], places[2]
    data = marked[name]
    assert state_of(data[:a] + data[b:]) in ("broken", "unreadable")
    assert state_of(data[:b] + data[a:b] + data[b:]) in ("broken", "unreadable")
    assert state_of(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]) in ("broken", "unreadable")


@pytest.mark.parametrize("name", MARKABLE)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_file_that_came_in_part_is_told(name, share, marked):
    cut = marked[name][: int(len(marked[name]) * share)]
    assert state_of(cut) in ("broken", "unreadable")


def other_sound_under_the_tag_of(name, marked):
    other = encode_audio(Audio(np.sin(np.arange(24_000) / 9).astype(np.float32) / 4, 24_000), name)[0]
    with av.open(io.BytesIO(marked[name])) as container:
        comment = {**container.metadata, **container.streams.audio[0].metadata}["comment"]
    file = io.BytesIO()
    kind = FORMATS[name]
    options = {"write_id3v2": "1"} if kind.container == "adts" else {}
    with av.open(io.BytesIO(other)) as source, av.open(file, "w", kind.container, options=options) as target:
        copy = target.add_stream_from_template(source.streams.audio[0])
        (copy if kind.container == "ogg" else target).metadata["comment"] = comment
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("name", MARKABLE)
def test_other_sound_under_the_same_tag_is_told(name, marked):
    told = verify_bytes(other_sound_under_the_tag_of(name, marked))
    assert told.state == "broken"
    assert "sound was changed" in told.sentences[0]


@pytest.mark.parametrize("name", SIGNED)
def test_a_manifest_that_was_taken_out_is_missed(name, encoded, marked, record):
    tags_of_a_signed_file = io.BytesIO()
    add_tags(io.BytesIO(encoded[name]), tags_of_a_signed_file, name, record, manifest=True)
    told = verify_bytes(tags_of_a_signed_file.getvalue())
    assert told.state == "broken"
    assert "there is none any more" in told.sentences[0]
    assert "still the one" in told.sentences[1]


def test_a_rate_that_was_changed_in_the_header_alone_changes_the_sound(encoded, record):
    data = bytearray(mark_bytes(encoded["wav"], "wav", record=record, signer=None))
    assert verify_bytes(bytes(data)).state == "marked"
    data[24:32] = (48_000).to_bytes(4, "little") + (96_000).to_bytes(4, "little")
    assert verify_bytes(bytes(data)).state == "broken"


@pytest.mark.parametrize("name", ["opus", "aac", "wav"])
def test_a_tag_whose_words_were_changed_is_told_where_it_is_signed(name, marked):
    data = marked[name].replace(b"pt_male", b"pt_mold")
    # Ogg has a checksum a page, so the change makes that page unreadable; a bare tag is just another tag.
    told = state_of(data)
    assert told == {"wav": "broken", "aac": "marked", "opus": told}[name]
    if name == "aac":
        assert any("anybody can write one" in sentence for sentence in verify_bytes(data).sentences)


@pytest.mark.parametrize(
    "note", ["", "{", "[1]", '{"format": "revox mark 1"}' * 2, "[" * 4000, '{"sound": {}}']
)
def test_a_tag_that_is_no_record_is_broken_and_not_believed(note, encoded):
    file = io.BytesIO()
    with av.open(io.BytesIO(encoded["flac"])) as source, av.open(file, "w", "flac") as target:
        copy = target.add_stream_from_template(source.streams.audio[0])
        target.metadata["comment"] = "Synthetic speech, made by a machine. " + note
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    assert verify_bytes(file.getvalue()).state == "broken"


def signed_by_hand(data, signer, actions, remote=None, voice="ada", label="revox.mark", kind="audio/wav"):
    """A manifest as any other program may write it."""
    definition = {
        "claim_generator_info": [{"name": "Other", "version": "1"}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": label, "data": {"voice": voice}},
        ],
    }
    info = c2pa.C2paSignerInfo(
        alg=signer.algorithm,
        sign_cert=signer.certificates.encode(),
        private_key=signer.key.encode(),
        ta_url=None,
    )
    out = io.BytesIO()
    with c2pa.Signer.from_info(info) as signs, c2pa.Builder(json.dumps(definition)) as builder:
        if remote:
            builder.set_no_embed()
            builder.set_remote_url(remote)
        builder.sign(signs, kind, io.BytesIO(data), out)
    return out.getvalue()


CAPTURED = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


def test_another_makers_manifest_counts_by_what_it_says(encoded, signer):
    captured = signed_by_hand(
        encoded["wav"], signer, [{"action": "c2pa.created", "digitalSourceType": CAPTURED}]
    )
    told = verify_bytes(captured)
    assert told.state == "unmarked"
    assert "does not say" in told.sentences[0]
    made = {"action": "c2pa.created", "digitalSourceType": COMPOSITE, "softwareAgent": {"name": "Elsewhere"}}
    told = verify_bytes(signed_by_hand(encoded["wav"], signer, [made], label="other.maker"))
    assert told.state == "marked"
    assert "by Elsewhere" in told.sentences[0]


def test_what_an_editor_made_of_marked_sound_is_marked(encoded, signer, monkeypatch):
    cut = [{"action": "c2pa.created", "digitalSourceType": CAPTURED}, {"action": "c2pa.trimmed"}]
    edited = signed_by_hand(encoded["wav"], signer, cut)
    assert verify_bytes(edited).state == "unmarked"
    read = verify.read_manifest

    def with_an_ingredient(*arguments: object) -> dict:
        report = read(*arguments)
        made = {"action": "c2pa.created", "digitalSourceType": COMPOSITE}
        older = {"assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}]}
        # Of itself: read once.
        older["ingredients"] = [{"relationship": "componentOf", "active_manifest": "older"}]
        report["manifests"]["older"] = older
        active = report["manifests"][report["active_manifest"]]
        active["ingredients"] = [{"relationship": relationship, "active_manifest": "older"}, "odd"]
        return report

    monkeypatch.setattr(verify, "read_manifest", with_an_ingredient)
    relationship = "inputTo"  # what a model was asked with
    assert verify_bytes(edited).state == "unmarked"
    relationship = "parentOf"
    told = verify_bytes(edited)
    assert told.state == "marked"
    assert "edited and signed since" in told.sentences[0]


@pytest.mark.parametrize(("name", "kind"), [("wav", "audio/wav"), ("flac", "audio/flac")])
def test_a_stale_tag_is_told_under_anybodys_signature_and_a_strangers_does_not_make_it_good(
    name, kind, marked, signer, state
):
    changed = other_sound_under_the_tag_of(name, marked)
    made = [{"action": "c2pa.created", "digitalSourceType": COMPOSITE}]
    told = verify_bytes(signed_by_hand(changed, signer, made, kind=kind))
    assert told.state == "broken"
    assert any("sound was changed or cut after it was marked" in one for one in told.sentences)
    assert "no known authority vouches" in told.sentences[-1]
    own = verify_bytes(signed_by_hand(changed, load_signer(), made, kind=kind))
    assert own.state == "marked"
    assert any("sound was changed or cut after it was marked" in one for one in own.sentences)
    # The same stranger's signature over the sound that was tagged leaves the mark as it is.
    assert verify_bytes(signed_by_hand(marked[name], signer, made, kind=kind)).state == "marked"


def test_a_signed_text_cannot_move_the_cursor_or_fill_the_screen(encoded, signer):
    created = {"action": "c2pa.created", "digitalSourceType": COMPOSITE}
    hostile = "\x1b[2J\u202egnp.\r\n" + "x" * 5000
    told = verify_bytes(signed_by_hand(encoded["wav"], signer, [created], voice=hostile))
    for sentence in told.sentences:
        assert sentence.isprintable()
        assert len(sentence) < 500


@pytest.fixture
def elsewhere():
    """An address of a manifest, and what was asked for there."""
    asked = []

    class Asked(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/manifest.c2pa", asked
    server.shutdown()
    server.server_close()


def with_a_manifest_at(address, encoded, signer):
    created = {"action": "c2pa.created", "digitalSourceType": COMPOSITE}
    return signed_by_hand(encoded["mp3"], signer, [created], remote=address, kind="audio/mpeg")


def test_nothing_is_fetched_whatever_a_file_asks_for(encoded, signer, state, elsewhere):
    address, asked = elsewhere
    data = with_a_manifest_at(address, encoded, signer)
    assert address.encode() in data
    assert verify_bytes(data).state != "marked"
    with pytest.raises(c2pa.C2paError):  # with c2pa's own settings it does ask
        c2pa.Reader("audio/mpeg", io.BytesIO(data))
    assert asked == ["/manifest.c2pa"]


@pytest.mark.parametrize("open_one", ["hosts", "fetching"])
def test_each_of_the_two_locks_alone_keeps_a_manifest_elsewhere_from_being_fetched(
    open_one, encoded, signer, state, elsewhere, monkeypatch
):
    address, asked = elsewhere
    if open_one == "hosts":
        host = address.removeprefix("http://").partition("/")[0]
        monkeypatch.setitem(manifest._SETTINGS["core"], "allowed_network_hosts", [host])
    else:
        monkeypatch.setitem(manifest._SETTINGS["verify"], "remote_manifest_fetch", True)
    assert verify_bytes(with_a_manifest_at(address, encoded, signer)).state != "marked"
    assert asked == []


@pytest.mark.parametrize("name", MARKABLE)
def test_damage_of_any_kind_costs_no_traceback_little_time_and_little_memory(name, marked):
    rng = random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(60):
        data = bytearray(marked[name])
        at = rng.randrange(min(len(data), 9000) if i % 2 else len(data))
        if i % 3 == 0:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
        elif i % 3 == 1:
            for _ in range(30):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 2000))
        began = time.process_time()
        assert state_of(bytes(data)) in ("marked", "broken", "unmarked", "unreadable")
        assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"words", "cannot be read as an audio file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "no sound in it"),
    ],
)
def test_what_is_no_audio_is_a_sentence(content, sentence, tmp_path):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MarkError, match=sentence):
        verify_file(tmp_path / "a.wav")


def test_a_path_that_is_no_file_or_too_large_a_file_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(MarkError, match="folder"):
        verify_file(tmp_path)
    with pytest.raises(MarkError, match="cannot be read"):
        verify_file(tmp_path / "none.wav")
    with (tmp_path / "large.wav").open("wb") as file:
        file.truncate(2_000)
    monkeypatch.setattr("revox.marking.verify.MAX_BYTES", 1_000)
    with pytest.raises(MarkError, match="larger than"):
        verify_file(tmp_path / "large.wav")


def test_a_file_to_trust_that_is_none_is_a_sentence(tmp_path, marked):
    (tmp_path / "a.wav").write_bytes(marked["wav"])
    (tmp_path / "root.pem").write_text("nothing")
    with pytest.raises(MarkError, match="holds no PEM certificate"):
        verify_file(tmp_path / "a.wav", tmp_path / "root.pem")
    (tmp_path / "root.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(MarkError, match="holds no PEM certificate"):
        verify_file(tmp_path / "a.wav", tmp_path / "root.pem")


def test_a_damaged_own_pair_does_not_keep_anyone_from_verifying(state, marked):
    load_signer()
    (state / "signing.pem").write_text("-----BEGIN CERTIFICATE-----")
    assert verify_bytes(marked["wav"]).state == "marked"
