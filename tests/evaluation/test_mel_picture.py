import struct
import zlib

import numpy as np
import pytest

from revox.evaluation.mel_picture import mel_picture
from revox.speech import Audio, AudioError


def tone(hz, seconds=1.0, rate=24000):
    return Audio(0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate), rate)


def size_of(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_picture_grows_by_one_row_a_clip_and_is_the_same_each_time(tmp_path):
    one = mel_picture(tmp_path / "one.png", [("a", tone(440))])
    three = mel_picture(
        tmp_path / "three.png", [("a", tone(440)), ("b", tone(880, 0.3)), ("c", tone(3000, rate=16000))]
    )
    (width, low), (same_width, high) = size_of(one), size_of(three)
    assert width == same_width
    assert high - low == 2 * 1.9 * 120
    again = mel_picture(tmp_path / "again.png", [("a", tone(440))])
    assert zlib.crc32(again.read_bytes()) == zlib.crc32(one.read_bytes())


def test_a_tone_is_bright_at_its_own_height(tmp_path):
    from matplotlib.image import imread

    heights = []
    for hz in (500, 2000, 8000):
        picture = imread(mel_picture(tmp_path / "tone.png", [("tone", tone(hz))]))
        column = picture[60:-60, picture.shape[1] // 2, :3].sum(-1)  # middle of the plot, without titles
        heights.append(int(column.argmax()))
    assert heights[0] > heights[1] > heights[2]


def test_silence_can_be_drawn_and_nothing_cannot(tmp_path):
    mel_picture(tmp_path / "silence.png", [("silence", Audio(np.zeros(5000), 24000))])
    for clips in ([], [("nothing", Audio(np.zeros(0), 24000))]):
        with pytest.raises(AudioError, match="no audio to draw"):
            mel_picture(tmp_path / "none.png", clips)
    with pytest.raises(FileNotFoundError):
        mel_picture(tmp_path / "missing" / "a.png", [("a", tone(440))])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["silence.png"]
