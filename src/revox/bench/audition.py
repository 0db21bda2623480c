"""One phrase in every voice, as WAV files with a page to listen to them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import quote

from revox.bench.checks import check_answer
from revox.bench.errors import BenchError
from revox.endpoints import Endpoint, ReferenceClip, SpeechAnswer, SpeechQuery
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file

PHRASE = "Good morning. This is how I sound when I read a sentence or two."

_TITLE = "<title>Audition</title>"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:56rem;padding:0 1rem}"
    "table{border-collapse:collapse}th,td{text-align:left;padding:.3rem .8rem;border-bottom:1px solid #8884}"
)
WriteSound = Callable[[Endpoint, SpeechAnswer, str, Path], None]


def write_answer(endpoint: Endpoint, answer: SpeechAnswer, voice: str, path: Path) -> None:
    """Write an answer's file as it came: a server's own marks stay in it."""
    replace_file(path, answer.content)


def audition(
    endpoints: list[tuple[Endpoint, list[str]]],
    out: Path,
    phrase: str = PHRASE,
    reference: ReferenceClip | None = None,
    write: WriteSound = write_answer,
    progress: ProgressCallback = ignore_progress,
) -> tuple[Path, int]:
    """Speak `phrase` in each voice of each endpoint; returns the index page, with what failed on it too, and
    the number of voices that failed.

    write: writes one answer as WAV. Raises BenchError when there is no voice, or `out` holds other things.
    """
    rows: list[tuple[str, str, str | None, str]] = []
    asked = [(endpoint, voice) for endpoint, voices in endpoints for voice in voices or [""]]
    if not asked:
        raise BenchError(
            "no endpoint clones a reference, and no voices were asked for; leave --reference out."
        )
    _check_folder(out)
    try:
        for done, (endpoint, voice) in enumerate(asked):
            progress(Progress("audition", done, len(asked)))
            clip = reference if not voice else None
            answer = endpoint.speak(SpeechQuery(phrase, voice or None, clip, seed=0))
            audio, problems = check_answer(answer, phrase, endpoint.rate)
            shown = voice or ("cloned" if clip else "its own voice")
            path = None
            if audio is not None:
                path = f"{_file_name(endpoint.name)}/{done + 1:03}-{_file_name(shown)}.wav"
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                write(endpoint, answer, shown, out / path)
            rows.append((endpoint.name, shown, path, "; ".join(problems)))
        progress(Progress("audition", len(asked), len(asked)))
    finally:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "index.html", _page(phrase, rows))
    return out / "index.html", sum(bool(problems) for *_, problems in rows)


def _check_folder(out: Path) -> None:
    """Raises BenchError when `out` is not empty and is not an earlier audition."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    page = out / "index.html"
    if not page.is_file() or _TITLE.encode() not in page.read_bytes():
        raise BenchError(f"{out} is not empty and holds no audition; give another --out.")


def _page(phrase: str, rows: list[tuple[str, str, str | None, str]]) -> str:
    lines = []
    for endpoint, voice, path, problems in rows:
        sound = f'<audio controls preload="none" src="{quote(path)}"></audio>' if path else ""
        cells = (escape(endpoint), escape(voice), sound, escape(problems))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; media-src 'self' file:; style-src 'unsafe-inline'\">\n"
        f"{_TITLE}\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Audition</h1>\n"
        f"<p>{escape(phrase)}</p>\n<p>All of it is synthetic speech.</p>\n<table>\n"
        "<tr><th>endpoint</th><th>voice</th><th></th><th>found</th></tr>\n"
        + "\n".join(lines)
        + "\n</table>\n</body>\n</html>\n"
    )


def _file_name(text: str) -> str:
    """A name without what a path or a shell would take for its own."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")[:100] or "voice"
