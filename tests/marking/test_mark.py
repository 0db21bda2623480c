from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
from itertools import pairwise

import av
import c2pa
import mutagen.flac
import mutagen.id3
import mutagen.mp4
import mutagen.oggopus
import numpy as np
import pytest
import soundfile

from revox.marking import (
    MarkError,
    how_marked,
    load_signer,
    mark_bytes,
    verify_bytes,
    verify_file,
    write_marked,
    write_marked_parts,
)
from revox.marking.record import SENTENCE, SYNTHETIC
from revox.speech import FORMATS, Audio, AudioError, read_audio

MARKABLE = [name for name in FORMATS if name != "pcm"]
SIGNED = ["wav", "wav-float", "flac", "mp3", "m4a"]


def decoded(data: bytes) -> tuple[int, np.ndarray]:
    """Rate and every sample as FFmpeg decodes them, nothing converted."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return container.streams.audio[0].rate, np.concatenate(frames, axis=-1)


@pytest.mark.parametrize("name", MARKABLE)
def test_every_sample_is_unchanged(name, encoded, marked):
    (rate, before), (same_rate, after) = decoded(encoded[name]), decoded(marked[name])
    assert marked[name] != encoded[name]
    assert (rate, before.dtype, before.shape) == (same_rate, after.dtype, after.shape)
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("name", ["wav", "wav-float", "flac", "mp3", "opus"])
def test_libsndfile_reads_a_marked_file_as_it_read_the_unmarked_one(name, encoded, marked):
    before, rate = soundfile.read(io.BytesIO(encoded[name]))
    after, same_rate = soundfile.read(io.BytesIO(marked[name]))
    assert rate == same_rate
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("name", SIGNED)
def test_c2pa_reads_a_valid_manifest_that_says_what_the_record_says(name, marked, record):
    with c2pa.Reader(FORMATS[name].media_type, io.BytesIO(marked[name])) as reader:
        report = json.loads(reader.json())
    assert report["validation_state"] == "Valid"
    # Nobody vouches for a certificate made on the spot; that is the only thing that fails.
    assert [item["code"] for item in report["validation_status"]] == ["signingCredential.untrusted"]
    manifest = report["manifests"][report["active_manifest"]]
    (actions,) = [a["data"]["actions"] for a in manifest["assertions"] if a["label"] == "c2pa.actions.v2"]
    (created,) = actions
    assert created["action"] == "c2pa.created"
    assert (
        created["digitalSourceType"]
        == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert f"{created['softwareAgent']['name']} {created['softwareAgent']['version']}" == record.software
    assert created["when"] == "2026-11-21T12:30:05Z"
    (mark,) = [a["data"] for a in manifest["assertions"] if a["label"] == "revox.mark"]
    assert (mark["model"], mark["voice"], mark["synthetic"]) == ("lab", "pt_male", True)
    assert manifest["claim_generator_info"][0]["name"] == "revox"


def _icmt(data: bytes) -> str:
    """The comment of a RIFF file's INFO list, by walking its chunks."""
    at = 12
    while at < len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"LIST" and data[at + 8 : at + 12] == b"INFO":
            inner = at + 12
            while inner < at + 8 + size:
                key, length = struct.unpack_from("<4sI", data, inner)
                if key == b"ICMT":
                    return data[inner + 8 : inner + 8 + length].rstrip(b"\0").decode()
                inner += 8 + length + length % 2
        at += 8 + size + size % 2
    raise AssertionError("no comment")


def _comment(name: str, data: bytes) -> str:
    """A file's comment by mutagen."""
    file = io.BytesIO(data)
    if name in ("mp3", "aac"):
        return str(mutagen.id3.ID3(file).getall("TXXX:comment")[0].text[0])
    if name == "flac":
        return mutagen.flac.FLAC(file)["description"][0]
    if name == "opus":
        return mutagen.oggopus.OggOpus(file)["description"][0]
    if name == "m4a":
        return mutagen.mp4.MP4(file)["\xa9cmt"][0]
    return _icmt(data)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", MARKABLE)
def test_other_readers_find_the_record_in_the_containers_comment(name, signed, encoded, marked, record):
    data = marked[name] if signed else mark_bytes(encoded[name], name, record=record, signer=None)
    sentence, note = _comment(name, data).split("{", 1)
    assert sentence.strip() == "Synthetic speech, made by a machine."
    note = json.loads("{" + note)
    assert note["source_type"] == SYNTHETIC
    assert (note["synthetic"], note["model"], note["voice"]) == (True, "lab", "pt_male")
    assert note["created_at"] == "2026-11-21T12:30:05Z"
    assert note["manifest"] is (signed and name in SIGNED)


@pytest.mark.parametrize("name", ["mp3", "aac", "flac", "opus"])
def test_containers_that_take_any_key_have_the_source_type_under_its_own(name, marked):
    file = io.BytesIO(marked[name])
    if name in ("mp3", "aac"):
        values = [
            str(f.text[0])
            for f in mutagen.id3.ID3(file).getall("TXXX")
            if f.desc.lower() == "digitalsourcetype"
        ]
    else:
        reader = {"flac": mutagen.flac.FLAC, "opus": mutagen.oggopus.OggOpus}[name]
        values = reader(file)["digitalsourcetype"]
    assert values == [SYNTHETIC]


def test_raw_samples_come_back_as_they_are(encoded, record, signer):
    assert mark_bytes(encoded["pcm"], "pcm", record=record, signer=signer) == encoded["pcm"]
    assert how_marked("pcm", signer) == "none"


@pytest.mark.parametrize("name", MARKABLE)
def test_marking_twice_leaves_one_mark_that_holds(name, encoded, marked, record, signer):
    later = record.model_copy(update={"voice": "nl_male"})
    again = mark_bytes(marked[name], name, record=later, signer=signer)
    verdict = verify_bytes(again)
    assert verdict.state == "marked"
    assert "voice nl_male" in verdict.sentences[0]
    assert again.count(b"pt_male") == 0
    assert decoded(again)[1].tobytes() == decoded(encoded[name])[1].tobytes()


@pytest.mark.parametrize("data", [b"", b"no sound in here", b"RIFF\xff\xff\xff\xffWAVEfmt ", b"\0" * 5000])
def test_what_is_no_audio_is_refused(data, record, signer):
    with pytest.raises(MarkError) as refused:
        mark_bytes(data, "wav", record=record, signer=signer)
    assert len(str(refused.value).splitlines()) == 1


def test_data_of_another_format_than_it_is_called_is_refused(encoded, record, signer):
    for told in MARKABLE:
        for name in MARKABLE:
            if FORMATS[told].container != FORMATS[name].container:
                with pytest.raises(MarkError, match="name its own format"):
                    mark_bytes(encoded[name], told, record=record, signer=signer)


def test_audio_is_encoded_marked_and_written_in_one_call(audio, record, signer, tmp_path):
    file = io.BytesIO()
    assert write_marked(file, audio, "flac", record=record, signer=signer) == (file.getvalue(), 0)
    np.testing.assert_allclose(read_audio(file.getvalue()).samples, audio.samples, atol=2 / 32768)
    data, _ = write_marked(tmp_path / "a.opus", audio, record=record, signer=signer)
    assert (tmp_path / "a.opus").read_bytes() == data
    assert verify_bytes(data).state == verify_bytes(file.getvalue()).state == "marked"
    with pytest.raises(AudioError, match="no folder"):
        write_marked(tmp_path / "none" / "a.wav", audio, record=record, signer=signer)


@pytest.mark.parametrize("name", ["wav", "mp3", "opus", "pcm"])
def test_parts_are_written_as_the_whole_is(audio, record, signer, tmp_path, name):
    cuts = [0, 100, 100, 20_000, len(audio.samples)]
    parts = (Audio(audio.samples[a:b], audio.rate) for a, b in pairwise(cuts))
    target = tmp_path / f"a.{name}"
    digest, clipped = write_marked_parts(target, parts, record=record, signer=signer)
    assert clipped == 0
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    if name != "pcm":
        assert verify_bytes(target.read_bytes()).state == "marked"
        whole, _ = write_marked(io.BytesIO(), audio, name, record=record, signer=signer)
        np.testing.assert_array_equal(read_audio(target).samples, read_audio(whole).samples)


def test_memory_does_not_grow_with_what_is_written_in_parts_but_for_c2pa_which_reads_it_all(record, tmp_path):
    part = Audio(np.zeros(24_000 * 60, np.float32), 24_000)  # 2.9 MB of WAV
    tracemalloc.start()
    try:
        write_marked_parts(tmp_path / "a.wav", (part for _ in range(20)), record=record, signer=None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.wav").stat().st_size > 57_000_000
    assert peak < 20_000_000
    assert verify_file(tmp_path / "a.wav").state == "marked"


def test_without_the_libraries_marks_are_tags(encoded, record, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)  # importing it raises ImportError
    assert load_signer(folder=tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    data = mark_bytes(encoded["wav"], "wav", record=record, signer=None)
    verdict = verify_bytes(data)
    assert verdict.state == "marked"
    assert any("pip install" in sentence for sentence in verdict.sentences)
    with pytest.raises(MarkError, match="not installed"):
        load_signer(tmp_path / "a.pem", tmp_path / "b.pem")


@pytest.mark.parametrize("container", ["flac", "ogg", "mp3", "wav"])
def test_a_stream_tagged_while_it_is_written_is_marked_and_says_that_changes_do_not_show(container, record):
    codec, file = (
        {"flac": "flac", "ogg": "libopus", "mp3": "libmp3lame", "wav": "pcm_s16le"}[container],
        io.BytesIO(),
    )
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=24000, layout="mono")
        metadata = stream.metadata if container == "ogg" else out.metadata
        metadata["comment"] = f"{SENTENCE} {json.dumps(record.plain())}"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 24000
        for packets in (stream.encode(frame), stream.encode(None)):
            out.mux(packets)
    verdict = verify_bytes(file.getvalue())
    assert verdict.state == "marked"
    assert verdict.tag.sound is None
    assert any("changes do not show" in sentence for sentence in verdict.sentences)


def test_a_long_or_strange_name_of_a_voice_survives_every_container(encoded, record, signer):
    strange = record.model_copy(update={"voice": 'é"\\{}; 声 ' + "x" * 180})
    for name in MARKABLE:
        verdict = verify_bytes(mark_bytes(encoded[name], name, record=strange, signer=signer))
        assert verdict.state == "marked", name
        assert verdict.tag.says["voice"] == strange.voice, name
