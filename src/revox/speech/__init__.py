"""Audio as files and arrays: decode, encode, resample, loudness, pitch, speech activity, selection."""

from revox.speech.activity import SpeechActivity, speech_activity
from revox.speech.audio import Audio, resample
from revox.speech.errors import AudioError
from revox.speech.loudness import limit_peaks, loudness, normalize_loudness, true_peak
from revox.speech.pitch import Pitch, pitch_track
from revox.speech.read import audio_header, read_audio, read_span, stream_audio
from revox.speech.selection import Selection, select_reference, whole_frames
from revox.speech.write import FORMATS, encode_audio, format_for, write_audio

__all__ = [
    "FORMATS",
    "Audio",
    "AudioError",
    "Pitch",
    "Selection",
    "SpeechActivity",
    "audio_header",
    "encode_audio",
    "format_for",
    "limit_peaks",
    "loudness",
    "normalize_loudness",
    "pitch_track",
    "read_audio",
    "read_span",
    "resample",
    "select_reference",
    "speech_activity",
    "stream_audio",
    "true_peak",
    "whole_frames",
    "write_audio",
]
