"""Can a million cuts be drawn from: how long it takes, how much memory, and is the balance and resume exact?

    python benchmarks/million_cuts.py [--cuts 1000000] [--out FILE]

Times are processor time. The manifest is synthetic: 5,000 speakers of 7 languages, both of very unequal size
(Zipf), with transcripts of 80 characters; no audio is read. For comparison, the script measures lhotse's own
means on a part of it: cuts in memory, and `CutSet.mux` over speakers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from lhotse import CutSet

from revox.training.data import ClipSampler, Manifest, SpeechSource
from revox.training.data.manifest import cut_line, cut_record

SPEAKERS, LANGUAGES = 5000, 7
PART = 100_000  # cuts that lhotse's own means are tried on


def memory_mb() -> float:
    """What this process holds, MB (Linux), without mapped files, whose pages the system can drop."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1e3


def write(path: Path, cuts: int) -> None:
    """A manifest whose speaker k has a share of 1 / k."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, SPEAKERS + 1)
    speakers = rng.choice(SPEAKERS, size=cuts, p=weights / weights.sum())
    seconds = rng.uniform(1, 20, cuts)
    with open(path, "wb") as file:
        for i, (speaker, length) in enumerate(zip(speakers.tolist(), seconds.tolist(), strict=True)):
            language = f"l{speaker % LANGUAGES}"
            name = f"/speech/{speaker}/{i}.flac"
            file.write(
                cut_line(
                    cut_record(
                        name, name, f"s{speaker}", language, "x" * 80, seconds=round(length, 3), rate=24000
                    )
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=20_480)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, float | bool] = {"cuts": options.cuts, "imports_mb": round(memory_mb())}
    began = time.process_time()

    def lap(name: str, per: float = 1.0, digits: int = 2) -> None:
        nonlocal began
        found[name] = round((time.process_time() - began) / per, digits)
        began = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cuts.jsonl"
        write(path, options.cuts)
        found["manifest_mb"] = round(path.stat().st_size / 1e6)
        began = time.process_time()
        with open(path, "rb") as file:
            manifest = Manifest.parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        lap("load_s")
        found["rows_mb"] = round(manifest.rows.nbytes / 1e6)
        source = SpeechSource("million", manifest)

        def sampler() -> ClipSampler:
            return ClipSampler([source], seconds=4.0, batch=16, seed=1)

        first = sampler()
        lap("sampler_s")
        languages = Counter(cut.supervisions[0].language for cut in itertools.islice(first, options.draws))
        lap("draw_us", options.draws / 1e6, 0)
        clips = Counter(manifest.rows["language"].tolist())
        weight = {manifest.languages[k]: n**0.5 for k, n in clips.items()}
        error = max(abs(languages[k] / options.draws - w / sum(weight.values())) for k, w in weight.items())
        found["largest_error_of_a_language_share"] = round(error, 4)
        list(itertools.islice(first, 100))  # into a block
        state = json.loads(json.dumps(first.state_dict()))
        found["state_bytes"] = len(json.dumps(state))
        expected = [(cut.id, cut.start) for cut in itertools.islice(first, 1000)]
        began = time.process_time()
        resumed = sampler()
        resumed.load_state_dict(state)
        next(resumed)
        lap("resume_s")
        resumed.load_state_dict(state)
        again = [(cut.id, cut.start) for cut in itertools.islice(resumed, 1000)]
        found["resumed_exactly"] = expected == again
        found["memory_mb"] = round(memory_mb())

        before, began = memory_mb(), time.process_time()
        cuts = CutSet.from_cuts(itertools.islice(CutSet.from_jsonl_lazy(path), PART))
        lap("lhotse_in_memory_s_per_million", PART / 1e6)
        found["lhotse_in_memory_mb_per_million"] = round((memory_mb() - before) * 1e6 / PART)
        of_speaker = defaultdict(list)
        for cut in cuts:
            of_speaker[cut.supervisions[0].speaker].append(cut)
        muxed = CutSet.mux(
            *map(CutSet, of_speaker.values()), weights=[len(c) ** 0.5 for c in of_speaker.values()]
        )
        began = time.process_time()
        list(itertools.islice(muxed, 1000))
        lap("lhotse_mux_of_speakers_us", 1000 / 1e6, 0)
        found["lhotse_mux_speakers"] = len(of_speaker)
    print(json.dumps(found, indent=1))
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        date = datetime.now(timezone.utc).date().isoformat()
        options.out.write_text(json.dumps({"date": date, "machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
