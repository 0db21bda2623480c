"""A script: who says what, in which voice. YAML, lines of "NAME: text", or a chapter for one voice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from revox.render.errors import RenderError
from revox.speech.files import read_text
from revox.synthesis.normalize import markdown_parser
from revox.synthesis.split import PAUSES

TURN_PAUSE = PAUSES["line"]
PARAGRAPH_PAUSE = PAUSES["paragraph"]
HEADING_PAUSE = 1.0
"""Seconds after a turn, a chapter's paragraph and its heading, unless the script says otherwise."""
LONGEST_PAUSE = 60.0
LARGEST_SCRIPT = 10 << 20  # bytes
_NAMED = re.compile(r"(?P<name>[^\W\d_](?:[\w .'’-]{0,38}\w)?)\s*:\s+(?P<text>\S.*)")
_PAUSE_LINE = re.compile(r"\[pause(?:\s*[:= ]\s*(\d+(?:\.\d+)?)\s*(ms|s)?)?\s*\]", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")


class SpeakerVoice(BaseModel):
    """The voice of a speaker of the script, by its name in the checkpoint, and how it speaks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    voice: str
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    cfg: float | None = Field(default=None, ge=0, le=10)


class Music(BaseModel):
    """A recording under the speech.

    loudness: LUFS where nobody speaks; duck: dB by which it goes down where somebody does, within `attack`
    seconds before and `release` seconds after. lead, tail: seconds of it before the first and after the last
    word; fade: seconds of its fades at both ends. It repeats until the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    loudness: float = Field(default=-30.0, ge=-60, le=-10)
    duck: float = Field(default=12.0, ge=0, le=60)
    attack: float = Field(default=0.5, gt=0, le=10)
    release: float = Field(default=1.5, gt=0, le=10)
    lead: float = Field(default=2.0, ge=0, le=60)
    tail: float = Field(default=3.0, ge=0, le=60)
    fade: float = Field(default=1.0, ge=0, le=30)


@dataclass(frozen=True)
class Segment:
    """What one speaker says in one go: a turn, or a paragraph.

    number: its place among the segments, from 1. where: in the script's file, "line 3" or (YAML) "entry 3".
    chapter: the title of the chapter that begins with it. pause: seconds of silence after it; None is the
    script's gap.
    """

    number: int
    where: str
    speaker: str
    text: str
    voice: SpeakerVoice
    chapter: str | None = None
    pause: float | None = None


@dataclass(frozen=True)
class Script:
    """What is rendered. gap: seconds between two segments that say nothing else."""

    segments: tuple[Segment, ...]
    title: str | None = None
    loudness: float | None = None
    gap: float = TURN_PAUSE
    music: Music | None = None


@dataclass
class _Draft:
    """A segment whose voice is not known yet."""

    where: str
    speaker: str
    text: str
    chapter: str | None = None
    pause: float | None = None
    own: dict[str, str] = field(default_factory=dict)  # voice, seed, cfg of this segment alone

    def segment(self, number: int, voice: SpeakerVoice) -> Segment:
        return Segment(number, self.where, self.speaker, self.text, voice, self.chapter, self.pause)


class _ScriptFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str | None = None
    voices: dict[str, SpeakerVoice | str] = Field(default_factory=dict)
    loudness: float | None = Field(default=None, ge=-40, le=-10)
    gap: float = Field(default=TURN_PAUSE, ge=0, le=LONGEST_PAUSE)
    music: Music | None = None
    script: list[dict[str, str]] = Field(min_length=1)


class _Loader(yaml.BaseLoader):
    """Every scalar stays the text it is ("No" is a word to speak); references are refused, and so are keys
    that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="references (*name) are not read", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            if str(key.value) in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands twice in one mapping", problem_mark=key.start_mark
                )
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_script(path: Path, voices: Mapping[str, str], narrator: str | None = None) -> Script:
    """The script in a file: `.yaml` or `.yml`; else a chapter where there is a `narrator`, else lines.

    voices: speaker -> voice, which replaces what a YAML file says. narrator: the one voice of a chapter, or
    of every speaker without one. Raises RenderError, with the place, on a file that is not a script, a
    speaker without a voice, or nothing to say.
    """
    path = path.expanduser()
    if path.is_file() and path.stat().st_size > LARGEST_SCRIPT:
        raise RenderError(f"{path} has more than {LARGEST_SCRIPT >> 20} MiB; render its chapters one by one")
    text = read_text(path, RenderError)
    script = Script(())
    known: dict[str, SpeakerVoice] = {}
    if path.suffix.lower() in (".yaml", ".yml"):
        file = _yaml_file(path, text)
        known = {
            name: SpeakerVoice(voice=voice) if isinstance(voice, str) else voice
            for name, voice in file.voices.items()
        }
        script = Script((), file.title, file.loudness, file.gap, _music_near(file.music, path))
        drafts = _yaml_drafts(path, file.script)
    elif narrator is not None and not voices:
        drafts, script = list(_chapter(text)), replace(script, gap=PARAGRAPH_PAUSE)
    else:
        drafts = list(_lines(path, text))
    known |= {
        name: known[name].model_copy(update={"voice": voice}) if name in known else SpeakerVoice(voice=voice)
        for name, voice in voices.items()
    }
    if not drafts:
        raise RenderError(f"{path} has nothing to speak; write a line such as `ADA: Good morning.`")
    segments = (
        one.segment(number, _voice_of(path, one, known, narrator)) for number, one in enumerate(drafts, 1)
    )
    return replace(script, segments=tuple(segments))


def _voice_of(
    path: Path, draft: _Draft, known: Mapping[str, SpeakerVoice], narrator: str | None
) -> SpeakerVoice:
    voice = known.get(draft.speaker)
    if voice is None and narrator is not None:
        voice = SpeakerVoice(voice=narrator)
    if voice is None and "voice" not in draft.own:
        raise RenderError(
            f"{path}, {draft.where}: {draft.speaker!r} has no voice; add --voice '{draft.speaker}=VOICE', or "
            "one --voice VOICE for all who have none"
        )
    try:
        return SpeakerVoice.model_validate({**(voice.model_dump() if voice else {}), **draft.own})
    except ValidationError as error:
        raise RenderError(f"{path}, {draft.where}: {_first(error)}") from None


def _yaml_file(path: Path, text: str) -> _ScriptFile:
    try:
        content = yaml.load(text, _Loader)  # a BaseLoader: text, lists and mappings only
        if not isinstance(content, dict):
            raise RenderError(
                f"{path} is not a script: it needs `script:` and a list of lines, each `- NAME: what is said`"
            )
        return _ScriptFile.model_validate(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise RenderError(
            f"{path}{where} is not YAML ({problem}); put text with a colon or a # in it in quotes"
        ) from None
    except RecursionError:
        raise RenderError(f"{path} is nested too deeply; a script has two levels") from None
    except ValidationError as error:
        raise RenderError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    one = error.errors()[0]
    where = ".".join(str(part) for part in one["loc"] if part not in ("SpeakerVoice", "str"))
    return f"{where + ': ' if where else ''}{one['msg']}"


_SECONDS = TypeAdapter(float)


def _yaml_drafts(path: Path, entries: list[dict[str, str]]) -> list[_Draft]:
    """Segments of a list of entries: {NAME: text}, {chapter: title}, {pause: seconds} or
    {speaker, text, voice, seed, cfg, pause}."""
    drafts: list[_Draft] = []
    chapter: str | None = None
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number} of script"
        if set(entry) == {"chapter"}:
            chapter = entry["chapter"].strip() or None
        elif set(entry) == {"pause"}:
            if not drafts:
                raise RenderError(f"{where}: a pause comes after something that is said; move it down")
            drafts[-1].pause = _pause(where, entry["pause"])
        elif {"speaker", "text"} <= set(entry) <= {"speaker", "text", "voice", "seed", "cfg", "pause"}:
            pause = _pause(where, entry["pause"]) if "pause" in entry else None
            own = {key: text for key, text in entry.items() if key in ("voice", "seed", "cfg")}
            drafts.append(_Draft(f"entry {number}", entry["speaker"], entry["text"], chapter, pause, own))
            chapter = None
        elif len(entry) == 1 and not {"speaker", "text", "voice"} & set(entry):
            ((speaker, line),) = entry.items()
            drafts.append(_Draft(f"entry {number}", speaker, line, chapter))
            chapter = None
        else:
            raise RenderError(
                f"{where} has {', '.join(entry)}; write `NAME: text`, `chapter: title`, `pause: seconds`, or "
                "speaker and text with voice, seed, cfg or pause"
            )
        if drafts and not drafts[-1].text.strip():
            raise RenderError(f"{where} has no text; write what {drafts[-1].speaker} says, or remove it")
    return drafts


def _pause(where: str, text: str) -> float:
    try:
        seconds = _SECONDS.validate_python(text)
    except ValidationError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_PAUSE:
        raise RenderError(f"{where}: a pause is 0 to {LONGEST_PAUSE:g} seconds, not {text!r}")
    return seconds


def _lines(path: Path, text: str) -> Iterator[_Draft]:
    """Turns of "NAME: text" lines; a line without a name goes on with the turn before it.

    A heading (`# Title`) begins a chapter, `[pause:2s]` alone on its line is the silence after a turn.
    """
    draft: _Draft | None = None
    chapter: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        named, heading, pause = _NAMED.fullmatch(line), _HEADING.fullmatch(line), _PAUSE_LINE.fullmatch(line)
        if named or heading:
            if draft is not None:
                yield draft
            draft = None
        if named:
            draft, chapter = _Draft(f"line {number}", named["name"], named["text"], chapter), None
        elif heading:
            chapter = heading[1]
        elif pause and draft is not None:
            seconds = float(pause[1] or PAUSES["line"]) * (0.001 if (pause[2] or "").lower() == "ms" else 1)
            draft.pause = min(seconds, LONGEST_PAUSE)
        elif line and draft is None:
            raise RenderError(
                f"{path}, line {number}: nobody says {line[:40]!r}; begin it with a name and a colon, "
                "or give one --voice VOICE for a whole chapter"
            )
        elif line and draft is not None:
            draft.text += f"\n{line}"
    if draft is not None:
        yield draft


def _chapter(text: str) -> Iterator[_Draft]:
    """The blocks of a Markdown or plain text as segments; headings of levels 1 and 2 begin chapters."""
    lines, chapter = text.splitlines(), None
    tokens = markdown_parser().parse(text)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.level or token.map is None or token.type == "hr" or token.nesting < 0:
            continue
        first, last = token.map
        block = "\n".join(lines[first:last]).strip()
        heading = token.type == "heading_open" and following is not None
        if heading and token.tag in ("h1", "h2"):
            chapter = following.content.strip() or None
        if any(character.isalnum() for character in block):
            yield _Draft(f"line {first + 1}", "narrator", block, chapter, HEADING_PAUSE if heading else None)
            chapter = None


def _music_near(music: Music | None, script: Path) -> Music | None:
    """The music with its file found beside the script, from where no path leads out. Raises RenderError."""
    if music is None:
        return None
    folder = script.resolve().parent
    file = (folder / music.file).resolve()
    if not file.is_relative_to(folder):
        raise RenderError(
            f"{script}: the music {music.file!r} is outside the script's folder; copy it there, or name it "
            "with --music"
        )
    return music.model_copy(update={"file": str(file)})
