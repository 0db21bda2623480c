import io
import struct
import wave

import av
import numpy as np
import pytest

from revox.speech import FORMATS, Audio, AudioError, encode_audio, format_for, read_audio, write_audio
from revox.speech.write import EXTENSIONS

RATES = (8000, 16000, 22050, 24000, 44100, 48000)


def speechlike(rate, seconds=1.5):
    """A gliding harmonic tone under a slow envelope: lossy codecs keep it, and it has one best alignment."""
    t = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (150 * t + 40 * t**2)
    wave_ = sum(np.sin(k * phase) / k for k in range(1, 8))
    return (0.15 * wave_ * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def codec_of(data, container=None):
    with av.open(io.BytesIO(data)) as file:
        return file.format.name, file.streams.audio[0].codec_context.name


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", [n for n in FORMATS if n != "pcm"])
def test_every_format_comes_back_as_it_went(name, rate):
    x = speechlike(rate)
    back = read_audio(encode_audio(Audio(x, rate), name)[0], rate=rate)
    lossless = name in ("wav", "wav-float", "flac")
    assert back.rate == rate
    # AAC pads to whole packets, and in ADTS nothing says how much of the start is the encoder's own delay.
    delay = 1024 if name == "aac" else 0
    read_rate = FORMATS[name].rates and min(r for r in FORMATS[name].rates if r >= rate)
    delay = round(delay * rate / read_rate) if read_rate else 0
    got = back.samples[delay : delay + len(x)]
    assert abs(len(got) - len(x)) <= 2
    n = min(len(got), len(x))
    error = np.sqrt(np.mean((got[:n] - x[:n]) ** 2) / np.mean(x**2))
    assert error < (1e-3 if lossless else 0.15)


def test_the_containers_and_codecs_are_the_ones_named():
    audio = Audio(speechlike(24000), 24000)
    found = {name: codec_of(encode_audio(audio, name)[0]) for name in FORMATS if name != "pcm"}
    assert found["wav"] == ("wav", "pcm_s16le")
    assert found["wav-float"] == ("wav", "pcm_f32le")
    assert found["flac"] == ("flac", "flac")
    assert found["mp3"][0] == "mp3"
    assert found["opus"] == ("ogg", "opus")
    assert found["aac"] == ("aac", "aac")
    assert found["m4a"][0].startswith("mov,mp4,m4a")
    assert found["m4a"][1] == "aac"


def test_a_wav_is_what_the_standard_library_reads():
    pcm = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    data, clipped = encode_audio(Audio(pcm / 32768, 22050), "wav")
    assert clipped == 0
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (22050, 1, 2)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(4000), "<i2"), pcm)
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8


def test_raw_pcm_is_little_endian_sixteen_bit():
    data, _ = encode_audio(Audio(np.array([0.0, 0.5, -1.0, 1.0]), 24000), "pcm")
    assert struct.unpack("<4h", data) == (0, 16384, -32768, 32767)


def test_samples_past_full_scale_are_limited_and_counted_but_kept_in_float():
    x = np.array([0.5, 1.5, -2.0, 1.0, -1.0] * 100, dtype=np.float32)
    data, clipped = encode_audio(Audio(x, 24000), "wav")
    assert clipped == 200
    assert read_audio(data).samples.max() == pytest.approx(1.0, abs=1e-4)
    assert read_audio(data).samples.min() == -1.0
    data, clipped = encode_audio(Audio(x, 24000), "wav-float")
    assert clipped == 0
    np.testing.assert_array_equal(read_audio(data).samples, x)


def test_the_same_audio_gives_the_same_bytes():
    audio = Audio(speechlike(24000), 24000)
    for name in ("wav", "flac", "mp3", "aac", "pcm"):
        assert encode_audio(audio, name)[0] == encode_audio(audio, name)[0]


def test_the_extension_chooses_and_a_format_overrides(tmp_path):
    audio = Audio(speechlike(24000), 24000)
    write_audio(tmp_path / "a.FLAC", audio)
    assert codec_of((tmp_path / "a.FLAC").read_bytes())[1] == "flac"
    write_audio(tmp_path / "a.bin", audio, format="mp3")
    assert codec_of((tmp_path / "a.bin").read_bytes())[0] == "mp3"
    buffer = io.BytesIO()
    write_audio(buffer, audio, format="wav")
    assert buffer.getvalue() == encode_audio(audio, "wav")[0]
    assert {format_for(f"x{extension}") for extension in EXTENSIONS} <= set(FORMATS)


def test_unknown_names_and_places_are_sentences(tmp_path):
    audio = Audio(speechlike(24000), 24000)
    (tmp_path / "folder.wav").mkdir()
    cases = [
        (tmp_path / "a.xyz", None, "names no audio format"),
        (tmp_path / "a", None, "has no extension"),
        (tmp_path / "a.wav", "wma", "Unknown audio format 'wma'"),
        (io.BytesIO(), None, "needs a format"),
        (tmp_path / "none" / "a.wav", None, "There is no folder"),
        (tmp_path / "folder.wav", None, "cannot be written"),
    ]
    for target, name, said in cases:
        with pytest.raises(AudioError, match=said):
            write_audio(target, audio, name)
    with pytest.raises(AudioError, match="no samples"):
        write_audio(tmp_path / "a.wav", Audio(np.zeros(0), 24000))
    with pytest.raises(AudioError, match="not finite"):
        write_audio(tmp_path / "a.wav", Audio(np.array([np.nan]), 24000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.wav"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(AudioError, match="No space left"):
        write_audio(path, Audio(speechlike(24000), 24000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_over_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "shared").write_bytes(b"blob")
    (tmp_path / "a.wav").symlink_to(tmp_path / "shared")
    write_audio(tmp_path / "a.wav", Audio(speechlike(24000), 24000))
    assert (tmp_path / "shared").read_bytes() == b"blob"
    assert not (tmp_path / "a.wav").is_symlink()
