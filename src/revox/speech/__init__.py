"""Audio as files and arrays: decode, encode, resample, loudness, pitch, speech activity, reference selection."""

from revox.speech.audio import Audio, resample
from revox.speech.errors import AudioError
from revox.speech.read import read_audio, stream_audio
from revox.speech.write import FORMATS, encode_audio, format_for, write_audio

__all__ = [
    "FORMATS",
    "Audio",
    "AudioError",
    "encode_audio",
    "format_for",
    "read_audio",
    "resample",
    "stream_audio",
    "write_audio",
]
