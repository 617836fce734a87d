#!/usr/bin/env python3
"""Peak resident memory of a training run: TRL's SFTTrainer, and the plain loop, against this program. Linux only.

python benchmarks/memory_vs_trl.py --output benchmarks/results/memory_vs_trl.json

Each side is a process of its own that loads model and images and makes two optimizer steps, without a comparison or
anything of another side. What is given is the peak of the whole process (VmHWM), libraries and all. Ours includes the
filling of the feature cache, which is emptied before each process. One round unless more are asked for: the peak of the
same work hardly varies.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from typing import Any

import common
import workload
from train_vs_trl import BATCH_SIZES, GOALS

SIDES, STEPS = ("TRL", "plain", "ours"), 2
MEMORY_GOAL = {"TRL": 2}  # half of TRL's


def measure(options: argparse.Namespace, side: str, tune: str) -> dict[str, float]:
    """Two steps of one side in this process: peak bytes."""
    batch_size = options.batch_size or BATCH_SIZES[options.size][tune]
    if side == "ours":
        ours = workload.OurTraining(options, tune, batch_size, cached=True)
        for _ in range(STEPS):
            ours.step()
    else:
        other(options, side, tune, batch_size)
    return {
        "peak": common.resident()["VmHWM"]
    }  # `ru_maxrss` of a child begins with the peak of the process that started it


def other(options: argparse.Namespace, side: str, tune: str, batch_size: int) -> None:
    """Two steps of another side, with nothing of ours loaded but data and texts."""
    settings, images, texts = workload.given(options, tune, batch_size)
    if side == "TRL":
        import trl_side

        trl_side.build_trainer(options, settings, images, texts, STEPS, lambda: None).train()
    else:
        from train_vs_plain import PlainTraining

        plain = PlainTraining(options, settings)
        rendered = plain.family.render(texts)
        for _ in range(STEPS):
            plain.step(rendered, [images[i] for i in range(batch_size)])


def peak(options: argparse.Namespace, side: str, tune: str) -> float:
    """Peak bytes of a process that runs one side."""
    command = [sys.executable, __file__, "--measure", side, tune, *common.size_flag(options)]
    command += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {tune}: the process failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--tune", nargs="+", choices=list(GOALS), help="modes to compare (default: all; --quick: lora)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images of a step (default: 8; full: 2; --quick: 2)"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="(default: all)")
    parser.add_argument(
        "--measure", nargs=2, metavar=("SIDE", "TUNE"), help="one measurement, in this process, as JSON"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or 1  # the peak of the same work hardly varies
    options = common.start(options)
    if options.measure:
        print("\n" + json.dumps(measure(options, *options.measure)))
        return 0
    workload.model_folder(options)  # before the processes that need it
    rows: list[dict[str, Any]] = []
    for tune in options.tune or (["lora"] if options.size == "quick" else list(GOALS)):
        peaks: dict[str, list[float]] = {side: [] for side in options.sides}
        for _ in range(options.rounds):
            shutil.rmtree(options.cache / "features", ignore_errors=True)
            for side in options.sides:
                peaks[side].append(peak(options, side, tune))
        for side in options.sides:
            if side != "ours" and "ours" in peaks:
                figures = {
                    f"{s} MiB": round(statistics.median(peaks[p]) / common.MIB)
                    for s, p in (("ours", "ours"), ("their", side))
                }
                batch_size = options.batch_size or BATCH_SIZES[options.size][tune]
                rows.append(
                    {
                        **common.ratio(peaks[side], peaks["ours"]),
                        "side": side,
                        "tuning": tune,
                        "batch": batch_size,
                        **figures,
                    }
                )
    return common.report(options, rows, goals=MEMORY_GOAL)


if __name__ == "__main__":
    sys.exit(main())
