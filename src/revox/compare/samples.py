"""The two sides of a comparison: an endpoint, a voice of a checkpoint, or a folder of sounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from revox.compare.errors import CompareError
from revox.endpoints import EndpointError, SpeechQuery, key_variables, open_endpoint
from revox.speech import Audio, AudioError, read_audio
from revox.speech.files import read_text, replace_file

if TYPE_CHECKING:
    from revox.endpoints import Endpoint

INDEX = "samples.json"
"""In a folder that a comparison wrote: its sentences, files and times."""
SOUNDS = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".m4a", ".aac")
MOST_SENTENCES = 10_000
TIMES = ("seconds", "real_time_factor", "first_audio")
"""Figures that only a side that speaks can tell; the others are in the sound."""
_VOICE = re.compile(r"(?P<voice>[\w-]{1,64})@(?P<address>\S+)")


@dataclass
class Sample:
    """One sentence by one side: its file, and what was measured of it.

    file: its name in the folder of the side; None where there was no speech, and `problem` says why.
    figures: by name, see `revox.compare.rule.KINDS`; word errors as `word_errors` and `words`.
    """

    number: int
    text: str
    file: str | None = None
    problem: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    transcript: str | None = None


class ComparedSide(Protocol):
    """What gives the sound of a sentence. times: which of `TIMES` it knows of each."""

    name: str
    times: frozenset[str]

    def sound(self, number: int, text: str) -> tuple[Audio | None, bytes, Sample]:
        """The speech of a sentence; the bytes of its file, empty where there is none yet; its sample, with
        times and the name that a file should have."""

    def facts(self) -> dict[str, Any]:
        """What is known of it."""

    def close(self) -> None:
        """End it."""


class FolderSide:
    """A folder of sounds: one that a comparison wrote, or files in the order of the sentences by name."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        """Raises CompareError when the files are not those of the sentences."""
        self.name, self._folder = folder.name or str(folder), folder
        self._samples: dict[str, Sample] | None = None
        index = folder / INDEX
        if index.is_file():
            self._samples = {one.text: one for one in read_index(folder)}
            missing = [text for text in texts if text not in self._samples]
            if missing:
                raise CompareError(
                    f"{folder} has no sample of {missing[0][:40]!r}; compare the same sentences"
                )
        else:
            self._files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SOUNDS)
            if len(self._files) != len(texts):
                raise CompareError(
                    f"{folder} has {len(self._files)} sounds for {len(texts)} sentences; give one for each, "
                    "named in their order"
                )
        stored = (self._samples or {}).values()
        self.times = frozenset(key for one in stored for key in TIMES if key in one.figures)

    def sound(self, number: int, text: str) -> tuple[Audio | None, bytes, Sample]:
        """The sound of a sentence; times from the index where there is one."""
        sample = Sample(number, text)
        if self._samples is None:
            path = self._files[number - 1]
        else:
            stored = self._samples[text]
            sample.figures = {key: stored.figures[key] for key in TIMES if key in stored.figures}
            if stored.file is None:
                sample.problem = stored.problem
                return None, b"", sample
            path = _inside(self._folder, stored.file)
        sample.file = f"{number:04d}{path.suffix.lower()}"
        try:
            content = path.read_bytes()
            return read_audio(content), content, sample
        except (AudioError, OSError) as error:
            sample.problem = f"{path.name}: {error}"
            return None, b"", sample

    def facts(self) -> dict[str, Any]:
        """Its name."""
        return {"kind": "folder", "name": self.name}

    def close(self) -> None:
        """Nothing to end."""


class EndpointSide:
    """A voice of an endpoint. Where it can stream it is asked to, so that the first audio is timed."""

    def __init__(self, endpoint: Endpoint, voice: str | None, name: str, seed: int) -> None:
        """Raises CompareError for a voice that the endpoint does not list."""
        self.name = name
        self.times = frozenset(TIMES if endpoint.streams else (key for key in TIMES if key != "first_audio"))
        self._endpoint, self._seed, self._warm = endpoint, seed, False
        try:
            listed = endpoint.voices()
        except EndpointError as error:
            raise CompareError(f"{name}: {error}") from None
        if voice is not None and listed and voice.lower() not in {one.lower() for one in listed}:
            raise CompareError(f"{name} has no voice {voice!r}; it lists {', '.join(listed[:10])}")
        self._voice = voice or (listed[0] if listed else None)

    def sound(self, number: int, text: str) -> tuple[Audio | None, bytes, Sample]:
        """Ask for a sentence. The first is asked for twice, and what came at first does not count: it may
        have waited for a model to load."""
        streams = self._endpoint.streams
        query = SpeechQuery(text, self._voice, seed=self._seed + number, stream=streams)
        if not self._warm:
            self._warm = self._endpoint.speak(query).ok
        answer, sample = self._endpoint.speak(query), Sample(number, text, f"{number:04d}.wav")
        if not answer.ok:
            sample.problem = f"status {answer.status}: {answer.message}" if answer.status else answer.message
            return None, b"", sample
        try:
            audio = answer.audio()
        except AudioError as error:
            sample.problem = str(error)
            return None, b"", sample
        sample.figures["seconds"] = answer.seconds
        if audio.seconds:
            sample.figures["real_time_factor"] = answer.seconds / audio.seconds
        if answer.first_audio is not None:
            sample.figures["first_audio"] = answer.first_audio
        spoken_here = self._endpoint.kind == "checkpoint"  # not marked yet
        return audio, b"" if streams or spoken_here else answer.content, sample

    def facts(self) -> dict[str, Any]:
        """What the endpoint says of itself, and the voice."""
        return {**self._endpoint.facts(), "voice": self._voice}

    def close(self) -> None:
        """End it."""
        self._endpoint.close()


def open_sides(
    names: Sequence[str],
    checkpoint: str | None,
    texts: list[str],
    seed: int,
    keys: Sequence[str] = (),
) -> list[ComparedSide]:
    """Each `[VOICE@]ENDPOINT`, a folder of sounds, or (with a checkpoint) the name of one of its voices.

    An endpoint that comes twice is opened once. keys: as of `revox.endpoints.open_endpoints`. Raises
    CompareError, EndpointError or CheckpointError.
    """
    asked = {name: _endpoint_of(name, checkpoint) for name in names}
    addresses = list(dict.fromkeys(found[1] for found in asked.values() if found is not None))
    variables = key_variables(addresses, keys)
    opened: dict[str, Endpoint] = {}
    sides: list[ComparedSide] = []
    try:
        for name in names:
            found = asked[name]
            if found is None:
                sides.append(FolderSide(Path(name).expanduser(), texts))
                continue
            voice, address = found
            if address not in opened:
                opened[address] = open_endpoint(address, variables.get(address))
            sides.append(EndpointSide(opened[address], voice, name, seed))
    except BaseException:
        for endpoint in opened.values():
            endpoint.close()
        raise
    return sides


def _endpoint_of(name: str, checkpoint: str | None) -> tuple[str | None, str] | None:
    """The voice and the endpoint of a side; None for a folder of sounds."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "params.json").is_file():
        return None
    if match := _VOICE.fullmatch(name):
        return match["voice"], match["address"]
    if checkpoint is not None and re.fullmatch(r"[\w-]{1,64}", name) and not folder.exists():
        return name, f"checkpoint={checkpoint}"
    return None, name


def read_sentences(path: Path | None, default: tuple[str, ...], count: int | None) -> list[str]:
    """The sentences to compare, a line each; the first `count`. Raises CompareError."""
    lines = list(default) if path is None else read_text(path, CompareError).splitlines()
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[:count]
    if not texts:
        raise CompareError(f"{path} has no sentences; write one a line")
    if len(texts) > MOST_SENTENCES:
        raise CompareError(f"{len(texts):,} sentences are more than {MOST_SENTENCES:,}; give fewer with --n")
    return texts


def write_index(folder: Path, samples: list[Sample], facts: dict[str, Any]) -> None:
    """Write what is known of a side's samples beside them. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)  # not there yet where every sentence failed
    content = {"format": "revox compare 1", "side": facts, "samples": [vars(one) for one in samples]}
    replace_file(folder / INDEX, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: Path) -> list[Sample]:
    """The samples that `write_index` wrote. Raises CompareError when it cannot be read."""
    try:
        content = json.loads((folder / INDEX).read_bytes())
        return [Sample(**one) for one in content["samples"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise CompareError(
            f"{folder / INDEX} is not a list of samples; compare again into a new folder"
        ) from None


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CompareError(f"{folder / INDEX} names a file outside of its folder: {name}")
    return path
