"""Ask endpoints, one after another, each at every level of streams."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from revox.bench.checks import check_answer
from revox.bench.errors import BenchError
from revox.bench.plan import BenchPlan, BenchResult, RequestResult
from revox.endpoints import Endpoint, SpeechAnswer, SpeechQuery
from revox.metrics.intelligibility import Recognizer
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file

REQUESTS_FILE = "requests.jsonl"
_LATE = 0.005  # seconds by which a player may wait unnoticed


class BenchRun:
    """One run: what is measured is in `result` at any time, and a line each in `out`/requests.jsonl.

    should_stop: asked several times a second; a sentence ends the run.
    """

    def __init__(
        self,
        plan: BenchPlan,
        result: BenchResult,
        out: Path,
        recognizer: Recognizer | None = None,
        should_stop: Callable[[], str | None] = lambda: None,
        progress: ProgressCallback = ignore_progress,
    ) -> None:
        """Raises BenchError when `out` holds another run."""
        if (out / REQUESTS_FILE).exists():
            raise BenchError(f"{out} holds another run; give --out another folder.")
        out.mkdir(parents=True, exist_ok=True)
        self.plan, self.result, self.out = plan, result, out
        self.recognizer, self.should_stop, self.progress = recognizer, should_stop, progress

    def measure(self, endpoints: list[Endpoint]) -> None:
        """Measure all; ends early, with `result.stopped`, when `should_stop` says so."""
        voices = {endpoint.name: self.plan.voices_of(endpoint) for endpoint in endpoints}
        for endpoint in endpoints:
            names = voices[endpoint.name]
            self.result.endpoints[endpoint.name] = endpoint.facts() | {"voices": len(names)}
            if self.plan.reference is not None and not endpoint.clones:
                self.result.endpoints[endpoint.name]["left out"] = "it takes no reference clip"
                continue
            first = self.plan.levels(endpoint)[0][0]
            for number in range(self.plan.warmup):
                self._level(endpoint, [self.plan.query(number, names, first)], "warm-up", 1)
            for mode, streams in self.plan.levels(endpoint):
                count = max(self.plan.requests, streams)
                queries = [self.plan.query(number, names, mode) for number in range(count)]
                self._level(endpoint, queries, mode, streams)
            if self.plan.formats:
                queries = [self.plan.query(0, names, "whole", name) for name in endpoint.formats]
                self._level(endpoint, queries, "formats", 1)
            if self.result.stopped:
                return

    def _level(self, endpoint: Endpoint, queries: list[SpeechQuery], mode: str, streams: int) -> None:
        """Keep `streams` requests under way until all `queries` are answered."""
        if self.result.stopped:
            return
        waiting: queue.SimpleQueue[tuple[int, SpeechQuery]] = queue.SimpleQueue()
        answered: queue.SimpleQueue[tuple[int, SpeechQuery, SpeechAnswer]] = queue.SimpleQueue()
        for one in enumerate(queries):
            waiting.put(one)
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                try:
                    number, query = waiting.get_nowait()
                except queue.Empty:
                    return
                answered.put((number, query, endpoint.speak(query)))

        started = time.perf_counter()
        # Daemons: Ctrl-C must not wait for an answer.
        for _ in range(min(streams, len(queries))):
            threading.Thread(target=ask, daemon=True).start()
        what = f"{endpoint.name}, {mode}" + (f", {streams} streams" if streams > 1 else "")
        answers: list[tuple[int, SpeechQuery, SpeechAnswer]] = []
        try:
            while len(answers) < len(queries):
                self.progress(Progress(what, len(answers), len(queries)))
                self.result.stopped = self.should_stop()
                if self.result.stopped:
                    return
                try:
                    answers.append(answered.get(timeout=0.1))
                except queue.Empty:
                    continue
            self.result.walls[endpoint.name, mode, streams] = time.perf_counter() - started
            self.progress(Progress(what, len(answers), len(queries)))
        finally:
            ended.set()
            # Decoding and checking wait until the level is over: they would take time from its requests.
            for number, query, answer in answers:
                self._note(endpoint, mode, streams, number, query, answer)

    def _note(
        self,
        endpoint: Endpoint,
        mode: str,
        streams: int,
        number: int,
        query: SpeechQuery,
        answer: SpeechAnswer,
    ) -> None:
        audio, problems = check_answer(answer, query.text, endpoint.rate)
        noted = RequestResult(
            endpoint.name, mode, streams, number, query.text, query.voice, answer.response_format,
            answer.status, round(answer.seconds, 4), problems=tuple(problems), size=len(answer.content),
        )  # fmt: skip
        if audio is not None:
            first = None if answer.first_audio is None else round(answer.first_audio, 4)
            seconds = round(audio.seconds, 3)
            noted = replace(noted, speech=seconds, first_audio=first, ran_dry=_ran_dry(answer))
            if self.recognizer is not None and mode == "whole":
                noted = replace(noted, transcript=self.recognizer.transcribe(audio))
        if problems and answer.content:
            self._save_faulty(noted, answer)
        self.result.requests.append(noted)
        with open(self.out / REQUESTS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(noted), ensure_ascii=False) + "\n")

    def _save_faulty(self, noted: RequestResult, answer: SpeechAnswer) -> None:
        """Keep an answer with a problem for listening."""
        folder = self.out / "faulty"
        folder.mkdir(exist_ok=True)
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in noted.endpoint)
        name = f"{plain}-{noted.mode}-{noted.streams}-{noted.number}.{noted.response_format}"
        replace_file(folder / name, answer.content)


def _ran_dry(answer: SpeechAnswer) -> bool | None:
    """Whether a player that starts with the first audio is ever left without."""
    if not answer.arrivals:
        return None
    started, played = answer.arrivals[0][0], 0.0
    for when, speech in answer.arrivals:
        if when - started > played + _LATE:
            return True
        played = speech
    return False
