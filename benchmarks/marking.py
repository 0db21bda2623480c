"""What marking costs, by format and length: processor seconds and bytes with and without, side by side.

    python benchmarks/marking.py [--clip FILE] [--seconds 3 30] [--rounds 15] [--out FILE]

Each round encodes the same audio, marks it by tags, and marks it by tags and a manifest, one after the other,
so that other work on the machine slows all of them alike. Figures are medians over the rounds of processor
time of this process: encoding alone, what each kind of marking adds, and verifying. The ratio is (encoding +
marking) / encoding. Every marked file is decoded and its samples compared with the unmarked file's, bit for
bit.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import av
import numpy as np

from revox.demo.demo import EXAMPLES
from revox.marking import how_marked, load_signer, mark_bytes, new_record, verify_bytes
from revox.speech import FORMATS, Audio, encode_audio, read_audio

RATE = 24_000


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Processor seconds of a call, and its result."""
    began = time.process_time()
    result = work(*arguments, **options)
    return time.process_time() - began, result


def samples(data: bytes) -> bytes:
    """All samples as FFmpeg decodes them."""
    with av.open(io.BytesIO(data)) as container:
        return b"".join(frame.to_ndarray().tobytes() for frame in container.decode(audio=0))


def measure(audio: Audio, name: str, signer: Any, rounds: int) -> dict[str, Any]:
    """Medians of one format at one length."""
    record = new_record("lab", "pt_male")
    took: dict[str, list[float]] = {"encode": [], "tags": [], "full": [], "verify": []}
    for _ in range(rounds):
        seconds, (data, _) = timed(encode_audio, audio, name)
        took["encode"].append(seconds)
        seconds, tagged = timed(mark_bytes, data, name, record=record, signer=None)
        took["tags"].append(seconds)
        seconds, marked = timed(mark_bytes, data, name, record=record, signer=signer)
        took["full"].append(seconds)
        seconds, verdict = timed(verify_bytes, marked)
        took["verify"].append(seconds)
    if verdict.state != "marked" or samples(marked) != samples(data) or samples(tagged) != samples(data):
        raise SystemExit(f"{name}: the mark does not hold, or samples changed")
    middle = {key: statistics.median(values) for key, values in took.items()}
    ratios = [(e + f) / e for e, f in zip(took["encode"], took["full"], strict=True)]
    return {
        "format": name,
        "mark": how_marked(name, signer),
        "seconds": round(audio.seconds, 3),
        "encode_ms": round(1e3 * middle["encode"], 3),
        "tags_ms": round(1e3 * middle["tags"], 3),
        "mark_ms": round(1e3 * middle["full"], 3),
        "mark_ms_per_second_of_audio": round(1e3 * middle["full"] / audio.seconds, 3),
        "ratio": round(statistics.median(ratios), 3),
        "verify_ms": round(1e3 * middle["verify"], 3),
        "bytes": len(data),
        "bytes_added": len(marked) - len(data),
        "samples_unchanged": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clip", type=Path, help="speech to encode; else a bundled clip")
    parser.add_argument("--seconds", type=float, nargs="+", default=[3.0, 30.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    clip = options.clip or sorted(EXAMPLES.glob("*.flac"))[0]
    speech = read_audio(clip, rate=RATE).samples
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REVOX_STATE"] = folder
        first_use, signer = timed(load_signer)
        print("format     mark          s   encode    tags    mark  ratio  verify +bytes  (milliseconds)")
        for seconds in options.seconds:
            length = round(seconds * RATE)
            audio = Audio(np.tile(speech, -(-length // len(speech)))[:length], RATE)
            for name in FORMATS:
                if name == "pcm":
                    continue
                row = measure(audio, name, signer, options.rounds)
                rows.append(row)
                print(
                    f"{name:10} {row['mark']:9} {seconds:5g} {row['encode_ms']:8.2f} {row['tags_ms']:7.2f} "
                    f"{row['mark_ms']:7.2f} {row['ratio']:6.2f} {row['verify_ms']:7.2f} {row['bytes_added']}",
                    flush=True,
                )
    if options.out:
        report = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "under_load": os.getloadavg()[0] > 1,
            "rounds": options.rounds,
            "first_use_with_making_a_key_ms": round(1e3 * first_use, 1),
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
