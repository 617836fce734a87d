#!/usr/bin/env python3
"""Every benchmark, one after the other, each in a process of its own; then the tables of docs/performance.md.

python benchmarks/all.py            (the true model: an hour or two on 2 cores, nothing else running)
python benchmarks/all.py --quick    (a sixth of the model, three benchmarks, 3 minutes; no tables without --report)
python benchmarks/all.py --quick --only peak levers    (others)

train_on_gpu.py, objectives.py, many_classes.py and other_programs.py are run by themselves: the first needs a GPU, the
next two would take hours in the true shape, and the last needs the network.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = (
    "startup",
    "first_step",
    "train_vs_trl",
    "train_vs_plain",
    "classify_vs_generate",
    "peak",
    "levers",
    "growth",
    "memory_vs_trl",
    "saving",
    "shards",
    "big_job",
    "serve",
)
EVERYDAY = ("startup", "train_vs_trl", "classify_vs_generate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixth of the model")
    parser.add_argument(
        "--folder", type=Path, help="where the JSON files go (default: benchmarks/results; --quick: results_quick)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"these benchmarks (default: all; --quick: {', '.join(EVERYDAY)})",
    )
    parser.add_argument("--report", action="store_true", help="write the tables with --quick too")
    options = parser.parse_args()
    folder = options.folder or HERE / ("results_quick" if options.quick else "results")
    failed = []
    for name in options.only or (EVERYDAY if options.quick else NAMES):
        started = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(folder / f"{name}.json")]
        print(f"\n== {name}", flush=True)
        if subprocess.run(command + ["--quick"] * options.quick, stderr=subprocess.DEVNULL).returncode:
            failed.append(name)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    if options.report or not options.quick:
        subprocess.run([sys.executable, str(HERE / "report.py"), str(folder)], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}; run only these to see why", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
