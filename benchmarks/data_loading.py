"""How many seconds of audio a second the workers decode, cut, resample and level, by format and workers.

    python benchmarks/data_loading.py --clips FOLDER [--workers 0 1 2] [--batches 6] [--out FILE]

The clips are written as FLAC and MP3 files and packed as FLAC shards, into a temporary folder, and drawn
at random. Two figures each: by the clock, which other work on the machine slows down, and by the
processor time of all processes, which it does far less: the seconds of audio that one core gives in a second
of its own. An H200 is to be fed 1000 seconds a second; the last column says how many such cores that takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from lhotse import CutSet

from revox.speech import read_audio, write_audio
from revox.training.data import ClipBatches, ClipSampler, Manifest, SpeechSource, find_sources
from revox.training.data.manifest import cut_record, cut_source

NEEDED = 1000.0  # seconds of audio a second
RATE = 24_000


def as_files(source: SpeechSource, folder: Path, ending: str) -> SpeechSource:
    """The clips of `source` as files of another format, at 24 kHz."""
    folder.mkdir()
    clips = []
    for i, cut in enumerate(source.cuts):
        path = str(folder / f"{i}.{ending}")
        audio = read_audio(cut_source(cut), rate=RATE)
        write_audio(path, audio)
        clips.append(cut_record(path, path, cut.supervisions[0].speaker, seconds=audio.seconds, rate=RATE))
    return SpeechSource(ending, Manifest.of(clips))


def processor_seconds(pids: list[int]) -> float:
    """Processor time of this process and of `pids` so far (Linux; elsewhere of this process)."""
    own = time.process_time()
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own


def measure(source: SpeechSource, workers: int, seconds: float, batch: int, batches: int) -> dict[str, float]:
    """Audio seconds per second of clock and of processor over `batches`, after one to warm up."""
    sampler = ClipSampler([source], seconds=seconds, batch=batch, seed=0)
    with ClipBatches(sampler, RATE, workers=workers) as loader:
        for _ in range(1 + workers // 4):
            next(loader)
        pids = [process.pid or 0 for process in multiprocessing.active_children()]
        began, spent = time.perf_counter(), processor_seconds(pids)
        given = sum(float(next(loader).lengths.sum()) / RATE for _ in range(batches))
        clock, processor = time.perf_counter() - began, processor_seconds(pids) - spent
    return {"clock": given / clock, "core": given / max(processor, 1e-9)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=60, help="clips used")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        [found] = find_sources([str(options.clips)], cache=folder / "cache", workers=0)
        indexed = time.perf_counter() - began
        began = time.process_time()
        find_sources([str(options.clips)], cache=folder / "cache-2", workers=0)
        header = (time.process_time() - began) / len(found.cuts)
        began = time.process_time()
        find_sources([str(options.clips)], cache=folder / "cache-2", workers=0)
        again = (time.process_time() - began) / len(found.cuts)
        print(
            f"{len(found.cuts)} files indexed in {indexed:.2f} s; {1e3 * header:.2f} ms of a core each, "
            f"{1e3 * again:.3f} ms when nothing changed"
        )
        source = SpeechSource("clips", found.cuts.take(np.arange(min(options.most, len(found.cuts)))))
        began = time.process_time()
        sources = {"as they are": source}
        for ending in ("flac", "mp3"):
            sources[f"{ending} files, 24 kHz"] = as_files(source, folder / ending, ending)
        shards = folder / "shards"
        shards.mkdir()
        began = time.process_time()
        CutSet(sources["flac files, 24 kHz"].cuts).to_shar(shards, {"recording": "flac"})
        total = sum(cut.duration for cut in source.cuts)
        size = sum(path.stat().st_size for path in shards.iterdir())
        print(
            f"flac shards: {size / total / 1e3:.1f} kB a second of audio, packed at "
            f"{total / (time.process_time() - began):.0f} s a second of a core"
        )
        [sources["flac shards"]] = find_sources([str(shards)], cache=folder / "cache", workers=0)
        print(
            f"\n| cuts of {options.seconds:g} s from | workers | audio s/s, clock | a core | cores for 1000 |"
        )
        print("| --- | --- | --- | --- | --- |")
        for label, one in sources.items():
            for workers in options.workers:
                found_speed = measure(one, workers, options.seconds, options.batch, options.batches)
                rows.append({"from": label, "workers": workers, **found_speed})
                print(
                    f"| {label} | {workers} | {found_speed['clock']:.0f} | {found_speed['core']:.0f} | "
                    f"{NEEDED / found_speed['core']:.1f} |",
                    flush=True,
                )
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        said = {"date": datetime.now(timezone.utc).date().isoformat(), "machine": machine, "rows": rows}
        options.out.write_text(
            json.dumps({**said, "header_ms": 1e3 * header, "again_ms": 1e3 * again}, indent=1)
        )


if __name__ == "__main__":
    main()
