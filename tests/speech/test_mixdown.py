import numpy as np
import pytest

from revox.speech import Audio, read_audio, read_span, stream_audio
from revox.speech.mixdown import Mixdown

RATE = 16000


def voice(seconds=4.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * 150 * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2).astype(np.float32) + (
        rng.normal(scale=1e-3, size=len(t)).astype(np.float32)
    )


def stereo(left, right, path):
    import av

    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="stereo")
        data = np.stack([left, right], axis=1).reshape(1, -1).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format="flt", layout="stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("factor", [-1.0, -0.8, -1.2])
def test_inverted_channels_are_not_averaged_away_however_they_are_read(tmp_path, factor):
    x = voice()
    path = stereo(x, factor * x + voice(seed=1) * 0.02, tmp_path / "call.wav")
    for audio in (read_audio(path), read_span(path, 0.0, 4.0), Audio(np.stack([x, factor * x]), RATE)):
        assert audio.one_channel
        loudness = np.sqrt(np.mean(np.square(audio.samples)) / np.mean(np.square(x)))
        assert 0.7 < loudness < 1.3
    streamed = np.concatenate([block.samples for block in stream_audio(path, RATE)])
    np.testing.assert_allclose(streamed, read_audio(path).samples, atol=1e-6)


@pytest.mark.parametrize("right", ["same", "silent", "unlike"])
def test_channels_that_do_not_cancel_are_averaged(tmp_path, right):
    x = voice()
    noise = np.random.default_rng(5).normal(scale=0.1, size=len(x)).astype(np.float32)
    other = {"same": x, "silent": 0 * x, "unlike": noise}[right]
    audio = read_audio(stereo(x, other, tmp_path / "film.wav"))
    assert not audio.one_channel
    np.testing.assert_allclose(audio.samples, (x + other) / 2, atol=1e-6)


def test_a_part_that_cancels_is_one_channel_and_the_rest_the_mean_without_a_jump():
    mixdown, x = Mixdown(), voice(6)
    parts = [
        mixdown.mix(np.stack([part, sign * part]), RATE)
        for part, sign in zip(np.split(x, 3), (1.0, -1.0, 1.0), strict=True)
    ]
    assert mixdown.one_channel
    np.testing.assert_allclose(np.concatenate(parts), x, atol=1e-6)


def test_the_same_channel_is_taken_everywhere():
    mixdown, x = Mixdown(), voice(2)
    first = mixdown.mix(np.stack([x, -0.9 * x]), RATE)
    second = mixdown.mix(np.stack([0.9 * x, -x]), RATE)
    np.testing.assert_allclose(first, x, atol=1e-6)
    np.testing.assert_allclose(second, 0.9 * x, atol=1e-6)
