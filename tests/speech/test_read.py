import io
import math
import os
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.signal

from revox.speech import (
    Audio,
    AudioError,
    audio_header,
    encode_audio,
    read_audio,
    read_span,
    resample,
    stream_audio,
    write_audio,
)

CLIPS = Path(__file__).parent / "clips"


def tone(rate=24000, seconds=1.0, hz=440.0, amplitude=0.3):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def wav_bytes(samples, rate):
    """16-bit WAV by the standard library: `[channels, n]` int16."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(samples.shape[0])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.ascontiguousarray(samples.T).astype("<i2").tobytes())
    return file.getvalue()


def test_sixteen_bit_wav_is_read_exactly_from_path_bytes_and_file(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32767, (1, 5000))
    data = wav_bytes(pcm, 22050)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), data, io.BytesIO(data)):
        audio = read_audio(source)
        assert audio.rate == 22050
        np.testing.assert_array_equal(audio.samples, (pcm[0] / 32768).astype(np.float32))


def test_audio_is_the_mean_of_the_channels():
    pcm = np.random.default_rng(1).integers(-9000, 9000, (3, 4000))
    data = wav_bytes(pcm, 48000)
    np.testing.assert_allclose(read_audio(data).samples, pcm.mean(0) / 32768, atol=1e-6)
    np.testing.assert_allclose(Audio(pcm / 32768, 48000).samples, pcm.mean(0) / 32768, atol=1e-6)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_every_sample_format_has_full_scale_one(codec):
    x = tone(amplitude=0.5)
    file = io.BytesIO()
    formats = {"pcm_u8": "u8", "pcm_s16le": "s16", "pcm_s24le": "s32", "pcm_s32le": "s32"}
    with av.open(file, "w", format="wav") as container:
        name = formats.get(codec, {"pcm_f32le": "flt", "pcm_f64le": "dbl"}.get(codec))
        stream = container.add_stream(codec, rate=24000, layout="mono", format=name)
        frame = av.AudioFrame.from_ndarray(x[None], format="flt", layout="mono")
        frame.sample_rate = 24000
        for converted in av.AudioResampler(format=name, layout="mono", rate=24000).resample(frame):
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    read = read_audio(file.getvalue()).samples
    np.testing.assert_allclose(read, x, atol=1 / 128 if codec == "pcm_u8" else 1 / 32768)


def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold():
    x = tone(48000, hz=1000.0) + tone(48000, hz=11000.0)
    y = resample(x, 48000, 16000)
    assert len(y) == 16000
    np.testing.assert_allclose(y[500:-500], tone(16000, hz=1000.0)[500:-500], atol=2e-4)


def test_read_at_another_rate_equals_scipys_band_limited_resampling_inside_the_band():
    x = tone(16000, hz=300.0) + tone(16000, hz=2500.0)
    y = read_audio(encode_audio(Audio(x, 16000), "wav-float")[0], rate=24000)
    assert y.rate == 24000
    oracle = scipy.signal.resample_poly(x, 3, 2)
    np.testing.assert_allclose(y.samples[500:-500], oracle[500:-500], atol=2e-3)


def test_the_sound_of_a_video_is_read():
    file = io.BytesIO()
    x = tone(44100)
    with av.open(file, "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("flac", rate=44100, layout="mono")
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray((x * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        container.mux(video.encode(None))
    audio = read_audio(file.getvalue())
    assert audio.rate == 44100
    np.testing.assert_allclose(audio.samples, x, atol=1e-4)


def silent_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        container.mux(
            video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24"))
        )
        container.mux(video.encode(None))
    return file.getvalue()


def test_what_is_not_audio_is_refused_with_a_sentence_that_names_the_file(tmp_path):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    cases = [
        (write("text.wav", b"dear diary\n" * 200), "text.wav is not an audio"),
        (write("empty.wav", b""), "empty.wav is empty"),
        (write("noise.mp3", np.random.default_rng(0).bytes(50000)), "noise.mp3 is not an audio"),
        (write("film.mp4", silent_video()), "film.mp4 has no audio stream"),
        (write("header.wav", wav_bytes(np.zeros((1, 0)), 24000)), "header.wav holds no audio samples"),
        (tmp_path / "missing.wav", "There is no file"),
        (tmp_path, "is a folder"),
        (b"", "empty"),
        (b"RIFF", "not an audio"),
    ]
    for source, said in cases:
        with pytest.raises(AudioError, match=said) as caught:
            read_audio(source)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
    ],
)
def test_a_playlist_cannot_make_the_decoder_open_another_file(tmp_path, playlist):
    write_audio(tmp_path / "secret.mp3", Audio(tone(), 24000))
    (tmp_path / "list.wav").write_text(playlist.format(tmp_path / "secret.mp3"))
    with pytest.raises(AudioError, match="not an audio"):
        read_audio(tmp_path / "list.wav")


def test_a_truncated_file_gives_what_is_there():
    x = tone(seconds=2.0)
    data = encode_audio(Audio(x, 24000), "mp3")[0]
    half = read_audio(data[: len(data) // 2])
    assert 0.9 < half.seconds < 1.1
    np.testing.assert_allclose(half.samples[2000:20000], x[2000:20000], atol=0.02)


def test_a_pipe_that_cannot_seek_is_read():
    data = wav_bytes((tone(seconds=0.2) * 32767).astype(np.int16)[None], 24000)
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert len(read_audio(pipe).samples) == 4800


def test_max_seconds_cuts_and_says_so():
    data = encode_audio(Audio(tone(16000, 5.0), 16000), "flac")[0]
    cut = read_audio(data, rate=24000, max_seconds=2.0)
    assert cut.truncated
    assert len(cut.samples) == 48000
    whole = read_audio(data, max_seconds=5.0)
    assert not whole.truncated
    assert len(whole.samples) == 80000


def test_a_three_hour_recording_is_read_in_bounded_memory(tmp_path):
    hours = 3 * 3600
    silence = encode_audio(Audio(np.zeros(24000 * 60), 24000), "aac")[0]
    (tmp_path / "long.aac").write_bytes(silence * (hours // 60))
    tracemalloc.start()
    audio = read_audio(tmp_path / "long.aac", rate=16000, max_seconds=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert audio.truncated
    assert audio.seconds == pytest.approx(20, abs=0.01)
    assert peak < 15e6  # 20 seconds of float32 are 2 MB; three hours would be a gigabyte


def test_streamed_blocks_joined_equal_the_whole():
    x = np.random.default_rng(0).normal(scale=0.1, size=44100 * 3).astype(np.float32)
    data = encode_audio(Audio(x, 44100), "wav-float")[0]
    blocks = list(stream_audio(data, 24000))
    assert max(b.seconds for b in blocks) < 1.1
    joined = np.concatenate([b.samples for b in blocks])
    whole = read_audio(data, rate=24000).samples
    assert abs(len(joined) - len(whole)) <= 1
    n = min(len(joined), len(whole))
    np.testing.assert_allclose(joined[:n], whole[:n], atol=1e-5)


def encoded(codec, samples, rate, header=True):
    """MP3 or 24-bit FLAC, whose frames each say their rate and channels, so that several files' can be
    joined."""
    file = io.BytesIO()
    layout, form = {1: "mono", 2: "stereo"}[samples.shape[0]], {"mp3": "fltp", "flac": "s32"}[codec]
    with av.open(file, "w", format=codec) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout, format=form)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate = rate
        for piece in av.AudioResampler(form, layout, rate, frame_size=stream.frame_size).resample(frame):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    data, at, last = file.getvalue(), 4, codec != "flac"
    while not header and not last:  # RFC 9639, section 8: blocks of metadata, then frames
        last, at = bool(data[at] & 128), at + 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    return data if header or codec != "flac" else data[at:]


def off_a_sine(samples, rate, hz):
    """What a least-squares sine of that frequency leaves, as a share of the whole."""
    at = 2 * np.pi * hz * np.arange(len(samples)) / rate
    basis = np.stack([np.sin(at), np.cos(at)], axis=1)
    rest = samples - basis @ np.linalg.lstsq(basis, samples, rcond=None)[0]
    return math.sqrt(np.mean(rest**2) / np.mean(samples**2))


@pytest.mark.parametrize(
    ("first", "second"), [((48000, 1), (44100, 1)), ((44100, 2), (22050, 1)), ((8000, 1), (48000, 2))]
)
def test_a_sound_whose_rate_or_channels_change_midway_goes_on_without_a_break(first, second, tmp_path):
    data = b"".join(
        encoded("mp3", np.repeat(tone(rate, 2.0)[None], channels, 0), rate)
        for rate, channels in (first, second)
    )
    (tmp_path / "joined.mp3").write_bytes(data)
    heard = {
        "whole": read_audio(data),
        "streamed": Audio(np.concatenate([b.samples for b in stream_audio(data, 16000)]), 16000),
        "span": read_span(tmp_path / "joined.mp3", 0.0, 60.0),
    }
    for name, audio in heard.items():
        assert audio.seconds == pytest.approx(4.0, abs=0.2), name  # an encoder adds up to a tenth of a second
        assert audio.rate == (16000 if name == "streamed" else first[0])
        for start, end in ((0.2, 1.9), (2.3, 3.9)):
            part = audio.samples[round(start * audio.rate) : round(end * audio.rate)]
            assert off_a_sine(part, audio.rate, 440.0) < 1e-3, (name, start)


def test_a_rate_that_no_recording_has_is_refused_midway_too(tmp_path):
    data = encoded("flac", tone(48000, 1.0)[None], 48000) + encoded(
        "flac", tone(20, 400.0, hz=1.0)[None], 20, header=False
    )
    (tmp_path / "joined.flac").write_bytes(data)
    for read in (read_audio, lambda source: read_span(source, 0.0, 60.0)):
        with pytest.raises(AudioError, match="claims a sample rate of 20 Hz"):
            read(tmp_path / "joined.flac")


def test_a_low_rate_after_a_high_one_is_read_in_bounded_memory():
    data = encoded("flac", tone(600_000, 0.1)[None], 600_000)
    data += encoded("flac", tone(1000, 1000.0, hz=1.0)[None], 1000, header=False)
    tracemalloc.start()
    audio = read_audio(data, max_seconds=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert audio.truncated
    assert peak < 40e6  # two seconds at 600 kHz are 5 MB; a frame of 4.6 s becomes 11 MB, all of it 2.4 GB


def test_samples_that_are_not_numbers_are_read_as_silence():
    x = tone(seconds=0.1)
    data = bytearray(encode_audio(Audio(x, 24000), "wav-float")[0])
    data[-4:] = np.float32(math.nan).tobytes()
    assert read_audio(bytes(data)).samples[-1] == 0.0


def test_a_human_clip_has_the_length_its_header_says():
    audio = read_audio(CLIPS / "1183-124566-0000.flac")
    with av.open(str(CLIPS / "1183-124566-0000.flac")) as container:
        assert audio.seconds == pytest.approx(container.duration / 1e6, abs=1e-4)


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "opus", "m4a"])
def test_a_span_is_what_lies_there_in_the_whole(tmp_path, ending):
    rng = np.random.default_rng(0)
    path = tmp_path / f"long.{ending}"
    write_audio(path, Audio(rng.normal(scale=0.1, size=24000 * 50).astype(np.float32), 24000))
    whole = read_audio(path)
    for start in (0.0, 3.0, 31.7, 49.5):  # the later ones are sought
        span = read_span(path, start, 1.0)
        first = round(start * whole.rate)
        expected = whole.samples[first : first + whole.rate]
        assert span.rate == whole.rate
        assert span.truncated == (first + whole.rate < len(whole.samples))
        assert len(span.samples) == len(expected)
        # A lossy codec has settled after what is decoded ahead; the others are exact.
        off = np.abs(span.samples - expected).max()
        assert off <= (0 if ending in ("wav", "flac") else 0.02), (ending, start, off)
    with pytest.raises(AudioError, match=r"ends before 60\.00 s"):
        read_span(path, 60.0, 1.0)


@pytest.mark.parametrize("ending", ["wav", "flac", "opus", "m4a", "mp3"])
def test_a_header_tells_seconds_and_rate_without_decoding(tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    write_audio(path, Audio(np.zeros(24000 * 3, np.float32), 24000))
    seconds, rate = audio_header(path)
    assert rate == (48000 if ending == "opus" else 24000)
    assert seconds == pytest.approx(read_audio(path).seconds, abs=0.1)
    assert audio_header(path.read_bytes()) == (seconds, rate)
    (tmp_path / "x.wav").write_text("no audio")
    with pytest.raises(AudioError, match="is not an audio or video file"):
        audio_header(tmp_path / "x.wav")


def with_a_gap(path, codec, container, gap=10.0, seconds=60):
    """Second i of what is there holds a tone of its own; after half of it the timestamps jump ahead."""
    rate = 48000 if codec == "libopus" else 24000
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        form = {"libopus": "flt", "pcm_s16le": "s16", "aac": "fltp"}[codec]
        resampler = av.AudioResampler(
            format=form, layout="mono", rate=rate, frame_size=stream.frame_size or 960
        )
        for i in range(seconds):
            samples = (16000 * tone(rate, 1.0, 200.0 + 20 * i)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, i * rate, Fraction(1, rate)
            for part in resampler.resample(frame):
                part.pts += round(gap * rate) * (part.pts >= seconds * rate // 2)
                out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def pitch_at(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


@pytest.mark.parametrize(
    ("codec", "container"), [("libopus", "webm"), ("pcm_s16le", "matroska"), ("aac", "mpegts")]
)
def test_a_gap_in_the_timestamps_is_silence_for_whole_streams_and_spans_alike(codec, container, tmp_path):
    path = tmp_path / "call"
    with_a_gap(path, codec, container)
    whole = read_audio(path)
    assert whole.seconds == pytest.approx(70.0, abs=0.2)
    streamed = np.concatenate([block.samples for block in stream_audio(path, whole.rate)])
    assert np.array_equal(streamed, whole.samples)
    for second in (10, 28, 35, 45, 60):
        span = read_span(path, second + 0.2, 0.6)
        expected = whole.samples[round((second + 0.2) * whole.rate) :][: len(span.samples)]
        assert len(span.samples) == round(0.6 * whole.rate)
        if second == 35:
            assert not span.samples.any()
            continue
        heard = 200.0 + 20 * (second - 10 * (second > 30))
        assert pitch_at(expected, whole.rate) == pytest.approx(heard, abs=3)
        assert pitch_at(span.samples, whole.rate) == pytest.approx(heard, abs=3)
    early = tmp_path / "early"  # read from the beginning, not sought
    with_a_gap(early, codec, container, gap=4.0, seconds=24)
    assert pitch_at(read_span(early, 18.2, 0.6).samples, whole.rate) == pytest.approx(480.0, abs=3)
    across = read_span(path, 29.5, 11.0)
    assert across.samples[: whole.rate // 3].any()
    assert not across.samples[whole.rate : 10 * whole.rate].any()
    assert across.samples[-whole.rate // 3 :].any()
