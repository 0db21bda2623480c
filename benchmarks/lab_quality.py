"""Is a lab checkpoint good enough? Its goals beside their values, on held-out speakers and sentences.

    python benchmarks/lab_quality.py speak --checkpoint OUT --encoder OUT-encoder/encoder.safetensors \
        --data RUN/data --out SCORED
    PYTHONPATH=src:. JUDGES/bin/python benchmarks/lab_quality.py judge SCORED --models runs/models

`speak` needs revox; `judge` needs the recognizers' environment (lab/speech/README.md) and no model of ours.
Both resume. `--quick` takes a third of the validation items: held-out ones are for the build that ships.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    speak = parts.add_parser("speak", help="write the speech to score and its manifest")
    speak.add_argument("--checkpoint", type=Path, required=True, help="the lab's folder, without an encoder")
    speak.add_argument("--encoder", type=Path, required=True, help="its reference encoder's file")
    speak.add_argument("--data", type=Path, required=True, help="where the build put its speech")
    speak.add_argument("--out", type=Path, required=True, help="the folder to write")
    speak.add_argument(
        "--quick", action="store_true", help="a third of the validation speakers and sentences"
    )
    speak.add_argument(
        "--inversion",
        type=int,
        default=0,
        metavar="N",
        help="clone N human voices and bundled clips by it too",
    )
    speak.add_argument("--limit", type=int, help="at most so many items of each list, to see it run")
    judge = parts.add_parser("judge", help="score that speech; writes results.json and results.md beside it")
    judge.add_argument("out", type=Path, help="the folder that `speak` wrote")
    judge.add_argument("--models", type=Path, default=Path("runs/models"), help="whisper-NAME-ct2 of each")
    return parser.parse_args()


def _show(progress) -> None:
    if progress.done % 20 == 0 or progress.done == progress.total:
        minutes = time.process_time() / 60
        now = progress.facts.get("now", "done")
        print(f"{progress.done} of {progress.total}, {now}, {minutes:.1f} min of CPU", flush=True)


def main() -> None:
    asked = _arguments()
    if asked.part == "speak":
        from lab.quality.speak import SpeakRequest, speak

        options = {name: value for name, value in vars(asked).items() if name != "part"}
        print(speak(SpeakRequest(**options), _show))
        return
    from lab.quality.measures import Models, report
    from lab.quality.tables import RECOGNIZERS

    folders = {name: asked.models / f"whisper-{name}-ct2" for name in RECOGNIZERS}
    print(report(asked.out, Models(folders), _show))


if __name__ == "__main__":
    main()
