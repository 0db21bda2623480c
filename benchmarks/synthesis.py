"""What speaking costs here: first audio, real-time factor, characters a second, memory, and where time goes.

    python benchmarks/synthesis.py [--checkpoint C | --size full] [--device cuda] [--weights int8]
        [--streams 1,16,32] [--text-chars 500] [--reference-seconds 10] [--parts ...] [--all]
        [--budget 420] [--beside CPORT_BINARY] [--words N] [--out NAME]

Without a checkpoint the lab's; `--size full` makes random weights of the release's sizes on the device, whose
cost is that of the real ones. Every request speaks as many frames as its text takes to read (15 characters a
second), whatever the model would say.

- streams: so many requests at once through the server's engine, their chunks taken as they come. First audio
  (p50, p95), real-time factor (seconds a second of speech, from asking to the last chunk), characters a
  second of all together, peak memory, and a step of the engine with the floor of it: the bytes that it must
  read by the bandwidth that a copy (GPU) or a sum (processor) measures here. With graphs too on CUDA.
- shares: a frame's time by part.
- growth: reading prompts with references of 3 to 30 s, a frame with 1 to 64 streams, a frame after 1 to 150 s
  of speech, texts of 1 to 5 minutes (with a checkpoint).
- flow: 1 to 16 Euler steps, their time and, with a checkpoint, their codes compared with those of 64 steps
  given the same past; `--words N`: word errors in N held-out sentences of the lab's grammar too.
- variants: fixed shapes (graphs on CUDA) and torch.compile compared with the plain frame.

`--all` takes every part in this order; each has a share of the budget (seconds on the wall), what does not
fit is cut short or left out and said so, and what is measured is written at once: NAME.json and NAME.md, by
default in the working folder. On CUDA times are the wall's; on a processor they are processor time of one
thread, so that a busy machine changes them little. `--beside` runs the C port (mudler/voxtral-tts.c) on the
same folder and frames, with one thread; it takes no number of frames (`--max-frames` is read and not used,
commit be031f4), so build it after
`sed -i 's/int max_frames = 2000/int max_frames = atoi(getenv("MAX_FRAMES"))/' voxtral_tts.c`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import itertools
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import revox
from revox.api import Revox, find_device
from revox.bench.environment import environment
from revox.checkpoint.params import Params
from revox.checkpoint.release import release_params
from revox.demo import checkpoint_folder
from revox.metrics.agreement import ComparedUtterance, next_codes
from revox.model.config import N_SPECIAL_CODES, VoxtralConfig
from revox.model.voxtral import Voxtral
from revox.serving.engine import EngineThread
from revox.serving.metrics import Metrics
from revox.serving.settings import ServeSettings
from revox.synthesis.engine import Engine, Request, noise_of
from revox.synthesis.prompt import make_prompt
from streaming import Played, ProcessorClock, percentile, simulate
from training import Stopwatch
from weights import bandwidth, memory

PARTS = {"streams": 0.5, "shares": 0.08, "growth": 0.17, "flow": 0.1, "variants": 0.15}
"""Shares of the budget."""
TEXT = (
    "The train leaves at ten past seven. I spent nineteen pounds and seventy five cents for the book. Good "
    "evening, doctor. It is half past four on the second of May. The sandwich costs sixty four euros. "
)
CHARACTERS_A_SECOND = 15.0
FLOW_STEPS = (1, 2, 3, 4, 5, 7, 10, 16)
CONVERGED = 64


class WallClock:
    """Seconds on the wall."""

    def __call__(self) -> float:
        return time.perf_counter()

    def skip_to(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self()))


class Watch(Stopwatch):
    """The wall's time on a GPU, after all that was asked of it; else processor time."""

    def now(self) -> float:
        return super().now() if self.device.startswith("cuda") else time.process_time()


@dataclasses.dataclass
class Subject:
    """What is measured. tts: None where the weights are random and there is no tokenizer."""

    model: Voxtral
    tts: Revox | None
    bits: int
    text_chars: int
    reference_seconds: float

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def clock(self) -> Any:
        return WallClock() if self.device.type == "cuda" else ProcessorClock()

    @property
    def frames(self) -> int:
        """Frames that the text takes to read."""
        rate = self.model.config.codec.frame_rate
        return max(1, round(self.text_chars / CHARACTERS_A_SECOND * rate))

    def request(
        self, i: int, frames: int, reference: float | None = None, text_chars: int | None = None
    ) -> Request:
        """The prompt of the text and a reference of so many seconds; exactly so many frames."""
        config, characters = self.model.config, text_chars or self.text_chars
        rows = round((reference or self.reference_seconds) * config.codec.frame_rate) + 1
        if self.tts is None:
            # Voxtral's tokenizer has about 4.2 characters of English a token.
            positions = rows + round(characters / 4.2) + 5
            generator = torch.Generator().manual_seed(0)
            prompt = 0.1 * torch.randn(positions, config.backbone.dim, generator=generator)
            prompt = prompt.to(self.device, self.model.dtype)
            prefix = rows + 2
        else:
            names = self.tts.voices()
            voice = self.tts.voice(names[i % len(names)])
            own = voice.embedding
            repeated = own[:-1].repeat(math.ceil(rows / max(1, len(own) - 1)), 1)[: rows - 1]
            voice = dataclasses.replace(voice, codes=None, embedding=torch.cat((repeated, own[-1:])))
            text = (TEXT * math.ceil(characters / len(TEXT)))[:characters]
            made = make_prompt(self.model, self.tts.prompter, text, voice)
            prompt, prefix = made.embeddings, made.voice_positions
        return Request(prompt, i, frames, min_frames=frames, prefix=prefix)


class Budget:
    """Seconds on the wall until a deadline."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()


def speed_of(call: Callable[[], Any], watch: Watch, seconds: float, most: int = 20) -> float:
    """The least time of a call (seconds), after one that does not count, within a budget."""
    budget, best = Budget(seconds), float("inf")
    call()
    for _ in range(most):
        began = watch.now()
        call()
        best = min(best, watch.now() - began)
        if budget.left < 0:
            break
    return best


def frame_bytes(config: VoxtralConfig, bits: int, streams: int = 1, positions: int = 0) -> float:
    """Bytes that one frame of so many streams must read: every weight of the backbone's layers once, of the
    acoustic transformer's once a step of the flow, the heads once, and the keys and values of the past."""

    def layer(c: Any) -> int:
        return c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.hidden_dim

    backbone, acoustic = config.backbone, config.acoustic
    weights = backbone.n_layers * layer(backbone)
    weights += acoustic.n_decoding_steps * acoustic.n_layers * layer(acoustic)
    heads = acoustic.dim * (config.codec.semantic_codebook_size + 3 * acoustic.dim)
    cache_bytes = 2 if bits == 16 else 4
    past = streams * positions * 2 * backbone.n_layers * backbone.n_kv_heads * backbone.head_dim * cache_bytes
    return weights * bits / 8 + heads * max(bits, 16) / 8 + past


def read_rate(device: torch.device) -> float:
    """GB/s: of a copy on the device, read and written bytes together; else of a sum by one thread."""
    if device.type != "cuda":
        return bandwidth()
    data = torch.empty(1 << 30, dtype=torch.int32, device=device)
    other = torch.empty_like(data)
    seconds = speed_of(lambda: other.copy_(data), Watch("cuda"), 3.0)
    return 2 * data.nbytes / seconds / 1e9


def peak(device: torch.device) -> float:
    """The most memory used since the last reset, GB; the process's where the device has none of its own."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else memory()["peak"]


def fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def stream_row(subject: Subject, streams: int, graphs: bool, seconds: float) -> dict[str, Any]:
    """So many requests at once, until all are spoken; shorter ones where the budget requires it."""
    model, watch = subject.model, Watch(str(subject.device))
    fresh(subject.device)
    clock = subject.clock
    settings = ServeSettings(checkpoint="unused", max_streams=streams, marking=False, admission_control=False)

    def requests(frames: int, first: int) -> list[tuple[float, Request]]:
        return [(0.0, subject.request(first + i, frames)) for i in range(streams)]

    async def everything() -> tuple[list[Played], float, int]:
        engine = EngineThread(model, settings, Metrics(), clock)
        engine._closing = engine._over = False
        if graphs:
            engine._engine = Engine(model, graphs=True)
        began = time.perf_counter()
        await simulate(engine, clock, requests(12, 0))  # kernels, graphs, and what a frame takes
        frame = (time.perf_counter() - began) / 12
        frames = max(12, min(subject.frames, int(seconds / frame)))
        started = watch.now()
        played, _ = await simulate(engine, clock, requests(frames, 1000))
        return played, watch.now() - started, frames

    played, took, frames = asyncio.run(everything())
    rate = model.config.codec.frame_rate
    first = [one.first_sound for one in played]
    factors = [(one.came[-1] - one.asked) / sum(one.seconds) for one in played]
    engine, _ = speaking(subject, streams, 60)
    step = speed_of(engine.step, watch, 0.1 * seconds, 30)
    positions = len(subject.request(0, 1).prompt)
    return {
        "streams": streams,
        "graphs": graphs,
        "frames": frames,
        "first_audio_p50": percentile(first, 0.5),
        "first_audio_p95": percentile(first, 0.95),
        "real_time_factor": sum(factors) / len(factors),
        "characters_per_second": streams * frames / rate * CHARACTERS_A_SECOND / took,
        "ran_dry": sum(one.least_in_hand < 0 for one in played),
        "GB": peak(subject.device),
        "step": step,
        "floor_bytes": frame_bytes(model.config, subject.bits, streams, positions),
    }


def measure_streams(subject: Subject, asked: argparse.Namespace, budget: Budget, found: dict) -> None:
    rate = found["bandwidth_GB_per_second"] = read_rate(subject.device)
    rows = found["streams"] = []
    kinds = [(n, False) for n in asked.streams]
    if subject.device.type == "cuda":
        kinds += [(n, True) for n in asked.streams]
    for i, (streams, graphs) in enumerate(kinds):
        seconds = budget.left / (len(kinds) - i)
        if seconds < 1:
            found["left_out"].append(f"{streams} streams{', graphs' if graphs else ''}: no time")
            continue
        try:
            row = stream_row(subject, streams, graphs, 0.6 * seconds)
        except RuntimeError as error:  # no memory, or a graph that cannot be captured
            found["left_out"].append(f"{streams} streams{', graphs' if graphs else ''}: {str(error)[:300]}")
            continue
        row["floor"] = row["floor_bytes"] / rate / 1e9
        row["times_floor"] = row["step"] / row["floor"]
        rows.append(row)
        found["save"]()


def speaking(
    subject: Subject, streams: int, frames: int, past: int = 0, graphs: bool = False
) -> tuple[Engine, Any]:
    """An engine in which so many speak, `past` frames into it, and have `frames` left."""
    engine = Engine(subject.model, graphs=graphs)
    extra = torch.zeros(past, subject.model.config.backbone.dim)
    requests = []
    for i in range(streams):
        one = subject.request(i, frames)
        prompt = torch.cat((one.prompt, extra.to(one.prompt)))
        requests.append(dataclasses.replace(one, prompt=prompt))
    generations = engine.join(requests)
    engine.step()
    return engine, generations


def measure_shares(subject: Subject, asked: argparse.Namespace, budget: Budget, found: dict) -> None:
    rows = found["shares"] = []
    for streams in sorted({1, max(asked.streams)}):
        part = Budget(budget.left / 2)
        model, watch = subject.model, Watch(str(subject.device))
        engine, generations = speaking(subject, streams, 400)
        acoustic, codec = model.acoustic_transformer, model.audio_tokenizer
        timed = (
            (model, "feed_frames", "backbone, embedding sum"),
            (acoustic, "semantic_logits", "semantic head"),
            (acoustic, "flow", "flow of the acoustic codes"),
            (codec, "decode", "codec"),
        )
        engine.decode(generations)
        for owner, name, what in timed:
            setattr(owner, name, watch.around(what, getattr(owner, name)))
        began, frames = watch.now(), 0
        try:
            while part.left > 0 and frames < 100 and engine.speaking:
                for _ in range(5):
                    engine.step()
                engine.decode(generations)
                frames += 5
        finally:
            for owner, name, _ in timed:
                delattr(owner, name)
        if not frames:
            found["left_out"].append(f"shares of {streams} streams: no time")
            continue
        took = watch.now() - began
        shares = {what: watch.seconds[what] / took for _, _, what in timed}
        shares["the rest"] = 1 - sum(shares.values())
        rows.append({"streams": streams, "frame": took / frames, "shares": shares})


def measure_growth(subject: Subject, asked: argparse.Namespace, budget: Budget, found: dict) -> None:
    watch, growth = Watch(str(subject.device)), found.setdefault("growth", {})
    cuda = subject.device.type == "cuda"

    def frame(streams: int, past: int = 0) -> float:
        engine, _ = speaking(subject, streams, 60, past)
        return speed_of(engine.step, watch, min(4.0, budget.left / 6), 30)

    def prompt(reference: float) -> dict[str, float]:
        request = subject.request(0, 1, reference)

        def read() -> None:
            Engine(subject.model).join([request])

        return {"positions": len(request.prompt), "seconds": speed_of(read, watch, budget.left / 12, 5)}

    rows = growth["reference"] = []
    for reference in (3.0, 10.0, 30.0):
        if budget.left > 0:
            rows.append({"reference_seconds": reference, **prompt(reference)})
    rows = growth["streams"] = []
    for streams in (1, 2, 4, 8, 16, 32, 64):
        if budget.left > 0:
            try:
                row = {"streams": streams, "frame": frame(streams)}
                rows.append({**row, "GB": peak(subject.device) if cuda else resident()})
            except RuntimeError as error:
                found["left_out"].append(f"a frame of {streams} streams: {str(error)[:200]}")
    rows = growth["past"] = []
    for seconds in (1, 60, 150):
        if budget.left > 0:
            past = round(seconds * subject.model.config.codec.frame_rate)
            rows.append({"seconds_spoken": seconds, "frame": frame(1, past)})
    rows = growth["text"] = []
    for minutes in (1, 2, 5) if subject.tts is not None else ():
        characters = round(60 * minutes * CHARACTERS_A_SECOND)
        if rows and budget.left < 1.2 * minutes / rows[-1]["minutes"] * rows[-1]["wall"]:
            found["left_out"].append(f"a text of {minutes} minutes: no time")
            continue
        if budget.left < 0:
            continue
        fresh(subject.device)
        text = (TEXT * math.ceil(characters / len(TEXT)))[:characters]
        began, wall, speech = watch.now(), time.perf_counter(), 0.0
        options = {"takes": 1, "max_chars": 100, "report": lambda _: None}
        for part in subject.tts.speak_parts(text, subject.tts.voices()[0], **options):
            speech += part.seconds
        took, wall = watch.now() - began, time.perf_counter() - wall
        row = {"minutes": minutes, "speech": speech, "seconds": took, "wall": wall}
        rows.append(
            {**row, "real_time_factor": took / speech, "GB": peak(subject.device) if cuda else resident()}
        )
    for name, measured in growth.items():
        if not measured:
            found["left_out"].append(f"growth with {name}: no time or no checkpoint")


def resident() -> float:
    """Resident memory of the process now, GB."""
    return sum(value for name, value in memory().items() if name != "peak")


def measure_flow(subject: Subject, asked: argparse.Namespace, budget: Budget, found: dict) -> None:
    model, watch = subject.model, Watch(str(subject.device))
    acoustic = model.acoustic_transformer
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, model.config.backbone.dim, generator=generator).to(subject.device, model.dtype)
    noise = torch.randn(1, model.config.codec.acoustic_dim, generator=generator).to(hidden)
    rows = found["flow"] = [{"steps": steps} for steps in FLOW_STEPS]
    with torch.inference_mode():
        for row in rows:
            steps = row["steps"]
            row["seconds"] = speed_of(
                lambda steps=steps: acoustic.flow(hidden, noise, steps=steps), watch, 0.02 * budget.left, 30
            )
    found["save"]()
    if subject.tts is None or budget.left < 0:
        found["left_out"].append("quality of the flow's steps: no checkpoint or no time")
        return
    spoken = spoken_utterances(subject.tts, 12, budget)
    converged = [chosen(model, one, CONVERGED) for one in spoken]
    for row in rows:
        levels = [
            chosen(model, one, row["steps"]) - best for one, best in zip(spoken, converged, strict=True)
        ]
        off = torch.cat(levels)[:, 1:].abs().float()
        row["acoustic_equal"], row["levels_off"] = float((off == 0).float().mean()), float(off.mean())
    found["flow_frames"] = sum(map(len, converged))
    if asked.words:
        words_of_flow(subject.tts, rows, asked.words, found)


def chosen(model: Voxtral, utterance: ComparedUtterance, steps: int) -> Tensor:
    """`next_codes` with so many steps, on the host."""
    acoustic = model.acoustic_transformer
    own = acoustic.config
    acoustic.config = dataclasses.replace(own, n_decoding_steps=steps)
    try:
        with torch.inference_mode():
            return next_codes(model, utterance).cpu()
    finally:
        acoustic.config = own


def spoken_utterances(tts: Revox, count: int, budget: Budget) -> list[ComparedUtterance]:
    """What the model says, at most 4 s each, in its voices in turn."""
    voices, found = tts.voices(), []
    sentences = [sentence.strip() + "." for sentence in TEXT.split(".") if sentence.strip()]
    for i in range(count):
        if found and budget.left < 0:
            break
        text, voice = sentences[i % len(sentences)], tts.voice(voices[i % len(voices)])
        speech = tts.synthesize(text, voice, seed=i, max_seconds=4.0)
        device = tts.model.device
        found.append(
            ComparedUtterance(
                torch.tensor(tts.prompter.tokens(text, len(voice.embedding)), device=device),
                tts.prompter.audio_token,
                voice.embedding.to(device),
                (speech.codes.T + N_SPECIAL_CODES).to(device),
                noise_of(i, len(speech.codes) - 1)[: speech.codes.shape[1] + 1].to(device, tts.model.dtype),
            )
        )
    return found


def grammar_texts(count: int) -> list[str]:
    """Held-out sentences of the lab's grammar, which the recognizer is held to."""
    from lab.sentences import sentences

    return list(itertools.islice(sentences("heldout", 0), count))


def words_of_flow(tts: Revox, rows: list[dict[str, Any]], count: int, found: dict) -> None:
    """Of `count` utterances with each number of steps: word errors (%) by pocketsphinx within the lab's
    grammar, and, where Resemblyzer is installed, the median similarity to what the voice was made from."""
    from revox.demo import grammar_file
    from revox.metrics.errors import MetricError
    from revox.metrics.intelligibility import load_recognizer, word_errors
    from revox.metrics.speaker import SpeakerVerifier

    listener = load_recognizer("pocketsphinx", grammar_file().read_text(encoding="utf-8"))
    texts = grammar_texts(count)
    voices = [tts.voices()[i % len(tts.voices())] for i in range(count)]
    try:
        verifier = SpeakerVerifier()
    except MetricError as error:
        found["left_out"].append(f"similarity: {error}")
        verifier = None
    references = [verifier.embed(tts.decode(name)) for name in voices] if verifier else []
    for row in rows:
        options = {"takes": 1, "flow_steps": row["steps"], "report": lambda _: None}
        audios = [
            tts.speak(text, name, seed=i, **options)
            for i, (text, name) in enumerate(zip(texts, voices, strict=True))
        ]
        errors, words = word_errors(texts, [listener.transcribe(audio) for audio in audios])
        row["word_errors_percent"] = 100 * errors / words
        if verifier:
            likenesses = [float(verifier.embed(a) @ r) for a, r in zip(audios, references, strict=True)]
            row["similarity"] = median(likenesses)
        found["save"]()


def measure_variants(subject: Subject, asked: argparse.Namespace, budget: Budget, found: dict) -> None:
    """The plain frame, a frame of fixed shapes (a graph on CUDA), and the same compiled."""
    watch, rows = Watch(str(subject.device)), []
    found["variants"] = rows
    model = subject.model
    for streams in sorted({1, max(asked.streams)}):
        for name in ("plain", "graphs", "compiled"):
            if budget.left < 0:
                found["left_out"].append(f"{name}, {streams} streams: no time")
                continue
            own = model.next_frame
            try:
                if name == "compiled":
                    model.next_frame = torch.compile(own, fullgraph=True)
                engine, _ = speaking(subject, streams, 60, graphs=name != "plain")
                engine.step()
                seconds = speed_of(engine.step, watch, budget.left / 4, 30)
            except Exception as error:  # whatever a compiler or a capture raises is a result here
                found["left_out"].append(
                    f"{name}, {streams} streams: {type(error).__name__}: {str(error)[:300]}"
                )
                continue
            finally:
                model.__dict__.pop("next_frame", None)
            rows.append({"variant": name, "streams": streams, "frame": seconds})
            found["save"]()


def beside(binary: Path, folder: Path, subject: Subject, frames: int = 3) -> dict[str, Any]:
    """The C port on the same folder: processor seconds of a frame and of all before the second, peak GB."""

    def run(count: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as scratch:
            command = [str(binary), "-d", str(folder), "-o", f"{scratch}/out.wav"]
            settings = {"MAX_FRAMES": str(count), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            text = (TEXT * math.ceil(subject.text_chars / len(TEXT)))[: subject.text_chars]
            messages = Path(scratch, "messages")
            with messages.open("w") as stderr:
                process = subprocess.Popen([*command, text], env={**os.environ, **settings}, stderr=stderr)
                _, status, used = os.wait4(process.pid, 0)
            if status or f"Generated {count} audio frames" not in messages.read_text():
                raise SystemExit(f"{binary} did not speak {count} frames: {messages.read_text()[-300:]}")
        return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9

    first, _ = run(1)
    more, peak_gb = run(1 + frames)
    return {"frame": (more - first) / frames, "loading, prompt, first frame": first, "GB": peak_gb}


MEASURES = {
    "streams": measure_streams,
    "shares": measure_shares,
    "growth": measure_growth,
    "flow": measure_flow,
    "variants": measure_variants,
}


def random_model(device: torch.device) -> Voxtral:
    """Random weights of the release's sizes in bf16, made on the device."""
    config = Params.model_validate(release_params()).voxtral_config()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Voxtral(config, with_encoder=False)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def markdown(found: dict[str, Any]) -> str:
    """The tables of what is there so far."""
    ms = lambda seconds: f"{1000 * seconds:.3g} ms"  # noqa: E731
    kind = "the wall's time" if found["clock"] == "wall" else "processor time, one thread"
    lines = [f"# Synthesis: {found['model']}, {found['weights']}, {found['device']}", ""]
    lines += [f"{key}: {value}  " for key, value in found["environment"].items()]
    lines += [f"Times are {kind}.", ""]
    if found.get("streams"):
        rate = found["bandwidth_GB_per_second"]
        lines += [
            f"## Streams of {found['text_chars']} characters, reference of {found['reference_seconds']:g} s",
            "",
        ]
        head = (
            "streams",
            "graphs",
            "first audio p50",
            "p95",
            "real-time factor",
            "characters/s",
            "ran dry",
            "GB",
        )
        lines += table(
            (*head, "a step", "its floor", "times the floor"),
            [
                (
                    row["streams"], "yes" if row["graphs"] else "no", ms(row["first_audio_p50"]),
                    ms(row["first_audio_p95"]), f"{row['real_time_factor']:.3f}",
                    f"{row['characters_per_second']:.0f}", row["ran_dry"], f"{row['GB']:.2f}",
                    ms(row["step"]),
                    ms(row["floor"]), f"{row['times_floor']:.1f}",
                )
                for row in found["streams"]
            ],
        )  # fmt: skip
        lines += [f"The floor is counted bytes by {rate:.0f} GB/s, measured here.", ""]
    for row in found.get("shares", ()):
        shares = ", ".join(f"{what} {100 * share:.0f} %" for what, share in row["shares"].items())
        lines += [f"{row['streams']} streams, {ms(row['frame'])} a frame: {shares}.", ""]
    growth = found.get("growth", {})
    for name, title in (
        ("reference", "Reading a prompt"), ("streams", "A frame by streams"),
        ("past", "A frame after so much speech"), ("text", "A long text"),
    ):  # fmt: skip
        if growth.get(name):
            keys = list(growth[name][0])
            rows = [[shown(key, row[key]) for key in keys] for row in growth[name]]
            lines += [f"## {title}", "", *table(keys, rows), ""]
    if found.get("flow"):
        keys = list(found["flow"][0])
        rows = [[shown(key, row.get(key)) for key in keys] for row in found["flow"]]
        lines += ["## Steps of the flow", "", *table(keys, rows), ""]
    if found.get("variants"):
        rows = [(row["variant"], row["streams"], ms(row["frame"])) for row in found["variants"]]
        lines += ["## Ways to run a frame", "", *table(("way", "streams", "a frame"), rows), ""]
    if found.get("beside"):
        port = found["beside"]
        lines += [f"The C port, one thread: {', '.join(f'{k} {v:.3g}' for k, v in port.items())}.", ""]
    if found["left_out"]:
        lines += ["Left out:", "", *(f"- {one}" for one in found["left_out"])]
    return "\n".join(lines) + "\n"


def shown(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key in ("frame", "seconds") and value < 10:
        return f"{1000 * value:.3g} ms"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(head: Any, rows: Any) -> list[str]:
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def picture(found: dict[str, Any], path: Path) -> None:
    """How a frame grows with streams, where matplotlib is installed."""
    rows = found.get("growth", {}).get("streams")
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    streams = [row["streams"] for row in rows]
    axis.loglog(streams, [1000 * row["frame"] for row in rows], "o-", label="a frame of all")
    axis.loglog(streams, [1000 * row["frame"] / row["streams"] for row in rows], ".--", label="of each")
    axis.set_xlabel("streams")
    axis.set_ylabel("ms")
    axis.legend()
    figure.savefig(path, metadata={"Software": None})


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: the lab checkpoint")
    parser.add_argument("--size", choices=["full"], help="random weights instead of a checkpoint")
    parser.add_argument("--device")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--streams", type=numbers, default=[1, 16, 32])
    parser.add_argument("--text-chars", type=int, default=500)
    parser.add_argument("--reference-seconds", type=float, default=10.0)
    parser.add_argument("--parts", default="streams")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--budget", type=float, default=420.0)
    parser.add_argument("--words", type=int, default=0)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--out", type=Path, default=Path("synthesis"))
    asked = parser.parse_args()
    everything, started = Budget(asked.budget), time.perf_counter()
    torch.set_num_threads(1)
    device = find_device(asked.device)
    if asked.size == "full":
        model, tts, bits, weights = random_model(device), None, 16, "bf16"
    else:
        folder = asked.checkpoint or checkpoint_folder()
        tts = revox.load(folder, device, weights=asked.weights)
        model, weights = tts.model, tts.weights
        bits = {"int4": 4, "int8": 8, "fp8": 8, "bf16": 16}.get(tts.weights, 32)
    subject = Subject(model, tts, bits, asked.text_chars, asked.reference_seconds)
    found: dict[str, Any] = {
        "model": "random weights of the release's sizes" if tts is None else tts.folder.name,
        "weights": weights,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "one processor thread",
        "clock": "wall" if device.type == "cuda" else "processor",
        "text_chars": asked.text_chars,
        "reference_seconds": asked.reference_seconds,
        "environment": environment(Path.cwd()),
        "left_out": [],
    }

    def save() -> None:
        plain = {key: value for key, value in found.items() if key != "save"}
        plain["seconds"] = round(time.perf_counter() - started, 1)
        asked.out.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(markdown(found))

    found["save"] = save
    parts = list(PARTS) if asked.all else asked.parts.split(",")
    for i, part in enumerate(parts):
        share = PARTS[part] / sum(PARTS[name] for name in parts[i:])
        with torch.inference_mode():
            MEASURES[part](subject, asked, Budget(share * everything.left), found)
        save()
        print(f"{part}: after {time.perf_counter() - started:.0f} s", flush=True)
    if asked.beside is not None and tts is not None:
        found["beside"] = beside(asked.beside, tts.folder, subject)
    save()
    picture(found, asked.out.with_suffix(".png"))
    print(asked.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
