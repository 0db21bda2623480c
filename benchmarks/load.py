"""`revox serve` under load: does everybody get an answer, in time, and is nothing left behind?

    python benchmarks/load.py [CHECKPOINT] [--clients 1 2 4 8 16 32] [--seconds 60] [--soak-minutes 30]

Starts a server of its own and asks it as many clients would: whole files, streams played as they come, slow
readers, some that hang up in the middle, some that send nonsense. For each number of clients:

- answered: share of well-formed requests that got all of their audio (a 429 is asked again when it says so).
- first audio: seconds until the first samples of a stream. Without streams to spare that is the queue.
- ran dry: share of streams whose player, started at the first chunk, was left without samples: a gap longer
  than the lead. Nobody can keep up who speaks slower than real time, so `speech a second` stands beside it.
- nonsense: share of malformed requests answered with a 4xx in OpenAI's shape.
- left: streams, waiting requests and tasks of the event loop once all clients are gone, less those before.

Then memory over `--soak-minutes` at `--soak-clients`, and SIGTERM while streams are being spoken: what was
begun must be finished. Exits with 1 when an answer is missing, something is left, memory grows, or the server
does not drain. Wall times are this machine's, with whatever else it does; the shares are what is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx

from revox.checkpoint.voices import list_voices
from revox.demo import checkpoint_folder

RATE = 24_000
KINDS = {"whole": 0.3, "stream": 0.4, "slow": 0.1, "hang up": 0.1, "nonsense": 0.1}
PAUSE = 0.3  # seconds that a slow reader waits after each chunk
GROWTH = 0.05  # of memory over a soak, that is still called flat

TEXTS = (
    "Good evening, doctor.",
    "The train leaves at ten past seven.",
    "I spent nineteen pounds and seventy five cents for the book.",
    "The sandwich costs sixty four euros.",
    "It is half past four on the second of May.",
)

NONSENSE: tuple[tuple[str, Any], ...] = (
    ("/v1/audio/speech", b"{"),
    ("/v1/audio/speech", {"input": "", "voice": "nobody"}),
    ("/v1/audio/speech", {"input": "Hello.", "voice": "nobody"}),
    ("/v1/audio/speech", {"input": 5, "voice": []}),
    ("/v1/audio/speech", {"input": "Hello.", "speed": 1e9}),
    ("/v1/audio/speech", {"input": "Hello.", "response_format": "exe"}),
    ("/v1/audio/speech", {"input": "a" * 100_000}),
    ("/v1/audio/speech", {"input": "Hello.", "ref_audio": "data:audio/wav;base64,AAAA", "consent": "mine"}),
    ("/v1/audio/speech/batch", {"items": []}),
    ("/v1/audio/voices", {"name": "../../etc"}),
)


@dataclass
class Told:
    """What the clients of one stage were told."""

    asked: int = 0
    answered: int = 0
    nonsense: int = 0
    refused: int = 0
    hung_up: int = 0
    asked_again: int = 0
    first: list[float] = field(default_factory=list)
    dry: list[bool] = field(default_factory=list)
    speech: float = 0.0
    problems: list[str] = field(default_factory=list)


class Server:
    """`revox serve` as a process of its own, watched through /proc."""

    def __init__(self, checkpoint: Path, options: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        command = [
            sys.executable, "-m", "revox", "serve", str(checkpoint), "--port", "0",
            "--voices-folder", f"{self.folder.name}/voices", *options,
        ]  # fmt: skip
        state = {"REVOX_STATE": f"{self.folder.name}/state"}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, env={**os.environ, **state})
        deadline = time.monotonic() + 300
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.1)
        self.url = found[0]
        while True:
            try:
                if httpx.get(f"{self.url}/ready", timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                sys.exit("the server is not ready after 5 minutes")
            time.sleep(0.1)

    def megabytes(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def held(self) -> dict[str, float]:
        """What a request that is over should have given back."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        names = {"streams": "revox_active_streams", "waiting": "revox_queue_length", "tasks": "revox_tasks"}
        return {
            what: float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0]) for what, name in names.items()
        }


async def whole(client: httpx.AsyncClient, body: dict[str, Any], told: Told) -> None:
    """One answer, decoded by its length: pcm."""
    answer = await asking(client, "/v1/audio/speech", body, told)
    if answer.status_code != 200 or not answer.content or len(answer.content) % 3840:
        told.problems.append(f"whole: {answer.status_code} {answer.text[:200]}")
        return
    told.answered += 1
    told.speech += len(answer.content) / 2 / RATE


async def asking(client: httpx.AsyncClient, path: str, body: Any, told: Told) -> httpx.Response:
    """The answer; a 429 is asked again when it says."""
    while True:
        answer = await client.post(path, json=body)
        if answer.status_code != 429:
            return answer
        told.asked_again += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))


async def stream(client: httpx.AsyncClient, body: dict[str, Any], told: Told, pause: float) -> None:
    """Play as it comes: the player starts with the first chunk and must never be without samples."""
    began = time.monotonic()
    while True:
        async with client.stream(
            "POST", "/v1/audio/speech", json=body | {"stream_format": "audio"}
        ) as answer:
            if answer.status_code == 429:
                told.asked_again += 1
                await answer.aread()
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            if answer.status_code != 200:
                told.problems.append(f"stream: {answer.status_code} {(await answer.aread())[:200]!r}")
                return
            started, had, dry = 0.0, 0, False
            async for data in answer.aiter_raw():
                now = time.monotonic()
                if not started:
                    started = now
                    if not pause:
                        told.first.append(now - began)
                elif now - started > had / 2 / RATE:
                    dry = True
                had += len(data)
                if pause:
                    await asyncio.sleep(pause)
            if not had or had % 3840:
                told.problems.append(f"stream: {had} bytes")
                return
            if not pause:
                told.dry.append(dry)
            told.answered += 1
            told.speech += had / 2 / RATE
            return


async def hang_up(client: httpx.AsyncClient, body: dict[str, Any], told: Told) -> None:
    """Leave after the first chunk."""
    async with client.stream("POST", "/v1/audio/speech", json=body | {"stream_format": "audio"}) as answer:
        async for _ in answer.aiter_raw():
            break
    told.hung_up += 1


async def nonsense(client: httpx.AsyncClient, chance: random.Random, told: Told) -> None:
    """Something that no server should fall over."""
    path, body = chance.choice(NONSENSE)
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    told.nonsense += 1
    answer = await client.post(path, **given)
    if answer.status_code == 429:  # the queue is full: that is said before the body is looked at
        told.refused += 1
        return
    try:
        shaped = "message" in answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        shaped = False
    if 400 <= answer.status_code < 500 and shaped:
        told.refused += 1
    else:
        told.problems.append(f"nonsense {str(body)[:60]}: {answer.status_code} {answer.text[:200]}")


async def one_client(url: str, voices: list[str], seed: int, until: float, told: Told) -> None:
    """Ask one thing after the other until the time is over."""
    chance = random.Random(seed)
    kinds, shares = list(KINDS), list(KINDS.values())
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600)) as client:
        while time.monotonic() < until:
            (kind,) = chance.choices(kinds, shares)
            body = {
                "input": chance.choice(TEXTS), "voice": chance.choice(voices), "response_format": "pcm",
                "seed": chance.randrange(1000), "max_new_tokens": 100,
            }  # fmt: skip
            try:
                if kind == "nonsense":
                    await nonsense(client, chance, told)
                elif kind == "hang up":
                    await hang_up(client, body, told)
                else:
                    told.asked += 1
                    if kind == "whole":
                        await whole(client, body, told)
                    else:
                        await stream(client, body, told, PAUSE if kind == "slow" else 0.0)
            except httpx.HTTPError as error:
                told.problems.append(f"{kind}: {type(error).__name__} {error}")


async def stage(server: Server, voices: list[str], clients: int, seconds: float, seed: int) -> Told:
    """So many clients, for so long, and until their last answers are there."""
    told, until = Told(), time.monotonic() + seconds
    await asyncio.gather(
        *(one_client(server.url, voices, seed * 1000 + i, until, told) for i in range(clients))
    )
    return told


def row_of(told: Told, clients: int, seconds: float, left: dict[str, float]) -> dict[str, Any]:
    """The figures of a stage."""
    first = sorted(told.first)
    return {
        "clients": clients,
        "asked": told.asked,
        "answered": told.answered / max(1, told.asked),
        "first_audio_median_s": statistics.median(first) if first else None,
        "first_audio_95_s": first[math.ceil(0.95 * (len(first) - 1))] if first else None,
        "ran_dry": sum(told.dry) / max(1, len(told.dry)),
        "speech_a_second": told.speech / seconds,
        "hung_up": told.hung_up,
        "nonsense": told.refused / told.nonsense if told.nonsense else 1.0,
        "asked_again": told.asked_again,
        "left": left,
        "problems": told.problems[:10],
    }


def left_behind(server: Server, before: dict[str, float]) -> dict[str, float]:
    """What is still held when all are gone; up to 15 s are given for it to be let go."""
    deadline = time.monotonic() + 15
    while True:
        now = server.held()
        left = {what: now[what] - before[what] for what in now}
        if not any(value > 0 for value in left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


async def soak(server: Server, voices: list[str], clients: int, minutes: float) -> tuple[Told, list[Any]]:
    """Clients for minutes, with the server's memory every few seconds."""
    memory: list[tuple[float, float]] = []
    began = time.monotonic()
    task = asyncio.ensure_future(stage(server, voices, clients, minutes * 60, 99))
    while not task.done():
        memory.append((round(time.monotonic() - began, 1), round(server.megabytes(), 1)))
        await asyncio.wait({task}, timeout=min(5.0, minutes * 2))
    return task.result(), memory


def growth(memory: list[tuple[float, float]]) -> float:
    """By how much of itself memory grew from the second fifth of a soak to its last."""
    fifth = max(1, len(memory) // 5)
    early = statistics.median(mb for _, mb in memory[fifth : 2 * fifth] or memory)
    return statistics.median(mb for _, mb in memory[-fifth:]) / early - 1


async def drain(server: Server, voices: list[str]) -> dict[str, Any]:
    """SIGTERM with four streams begun: all of them must be whole, and the process end by itself."""
    begun = asyncio.Semaphore(0)

    async def listen(i: int) -> int:
        body = {
            "input": TEXTS[2], "voice": voices[i % len(voices)], "response_format": "pcm", "seed": i,
            "stream_format": "audio", "max_new_tokens": 60,
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            whole = await client.post("/v1/audio/speech", json=body)
            async with client.stream("POST", "/v1/audio/speech", json=body) as answer:
                had = 0
                async for data in answer.aiter_raw():
                    if not had:
                        begun.release()
                    had += len(data)
        return had - len(whole.content)

    tasks = [asyncio.ensure_future(listen(i)) for i in range(4)]
    for _ in tasks:
        await begun.acquire()
    server.process.send_signal(signal.SIGTERM)
    missing = await asyncio.gather(*tasks, return_exceptions=True)
    code = await asyncio.to_thread(server.process.wait, 120)
    return {"whole": sum(m == 0 for m in missing), "of": len(tasks), "exit": code}


def plot(rows: list[dict[str, Any]], memory: list[Any], path: Path) -> None:
    """First audio and speech a second by clients; memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (a, b, c) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    clients = [str(row["clients"]) for row in rows]
    a.plot(clients, [row["first_audio_median_s"] for row in rows], "o-", label="median")
    a.plot(clients, [row["first_audio_95_s"] for row in rows], "o--", label="95 of 100")
    a.set(xlabel="clients", ylabel="seconds to first audio", ylim=(0, None))
    a.legend()
    b.plot(clients, [row["speech_a_second"] for row in rows], "o-")
    b.axhline(1, color="0.7", lw=0.8)
    b.set(xlabel="clients", ylabel="seconds of speech a second", ylim=(0, None))
    if memory:
        c.plot([t / 60 for t, _ in memory], [mb for _, mb in memory])
    top = 1.2 * max((mb for _, mb in memory), default=1.0)
    c.set(xlabel="minutes", ylabel="server's memory, MB", ylim=(0, top))
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| clients | asked | answered | first audio, median | 95 of 100 | ran dry | speech a second "
        "| hung up | nonsense refused | left |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first = [row["first_audio_median_s"], row["first_audio_95_s"]]
        told = ["–" if value is None else f"{value:.2f} s" for value in first]
        left = ", ".join(f"{v:g} {k}" for k, v in row["left"].items() if v > 0) or "nothing"
        lines.append(
            f"| {row['clients']} | {row['asked']} | {row['answered']:.0%} | {told[0]} | {told[1]} "
            f"| {row['ran_dry']:.0%} | {row['speech_a_second']:.2f} s | {row['hung_up']} "
            f"| {row['nonsense']:.0%} | {left} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=None)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients")
    parser.add_argument("--soak-minutes", type=float, default=30.0)
    parser.add_argument("--soak-clients", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of `revox serve`")
    asked = parser.parse_args()
    checkpoint = asked.checkpoint or checkpoint_folder()
    voices = [entry.name for entry in list_voices(checkpoint) if not entry.problem]
    server = Server(checkpoint, asked.serve)
    try:
        asyncio.run(stage(server, voices, 2, 1.0, 0))  # what is loaded at first use is loaded now
        before = server.held()
        rows = []
        for i, clients in enumerate(asked.clients):
            began = time.monotonic()
            told = asyncio.run(stage(server, voices, clients, asked.seconds, i + 1))
            took = time.monotonic() - began
            rows.append(row_of(told, clients, took, left_behind(server, before)))
            print(json.dumps(rows[-1]), flush=True)
        told, memory = asyncio.run(soak(server, voices, asked.soak_clients, asked.soak_minutes))
        soaked = row_of(told, asked.soak_clients, memory[-1][0] or 1.0, left_behind(server, before))
        soaked |= {"minutes": asked.soak_minutes, "memory_growth": growth(memory)}
        print(json.dumps(soaked), flush=True)
        drained = asyncio.run(drain(server, voices))
        traceback = "Traceback" in server.log.read_text()
    finally:
        server.process.kill()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(), "machine": machine, "serve": asked.serve,
        "stages": rows, "soak": soaked, "memory_mb": memory, "drain": drained, "traceback": traceback,
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    name = f"{report['date']}-load"
    (asked.out / f"{name}.json").write_text(json.dumps(report) + "\n")
    plot(rows, memory, asked.out / f"{name}.png")
    faults = [
        what
        for what, found in {
            "an answer is missing": any(row["answered"] < 1 for row in [*rows, soaked]),
            "nonsense got no 4xx": any(row["nonsense"] < 1 for row in [*rows, soaked]),
            "something is left behind": any(v > 0 for row in [*rows, soaked] for v in row["left"].values()),
            "memory grows": soaked["memory_growth"] > GROWTH,
            "the server did not drain": drained["whole"] < drained["of"] or drained["exit"] != 0,
            "the log has a traceback": traceback,
        }.items()
        if found
    ]
    text = (
        f"# Load, {report['date']}\n\n{machine}. `python benchmarks/load.py`.\n\n{table([*rows, soaked])}\n\n"
        f"The last row is the soak: {asked.soak_minutes:g} minutes, memory {soaked['memory_growth']:+.1%}. "
        f"SIGTERM with {drained['of']} streams begun: {drained['whole']} whole, exit code {drained['exit']}."
        "\n\n"
        f"{'; '.join(faults) or 'Nothing amiss.'}\n"
    )
    (asked.out / f"{name}.md").write_text(text)
    print(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
