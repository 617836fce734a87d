#!/usr/bin/env python3
"""Which response format and objective classify best: the same training with each, over several seeds.

python benchmarks/objectives.py --output benchmarks/results/objectives_digits.json
python benchmarks/objectives.py --formats answer-only --output benchmarks/results/objectives_own.json -- --model MODEL
--dataset DATA

Each combination is a run of train_vlm.py in a process of its own, with the flags behind `--` (default: --demo). Runs
that are finished in the folder of a benchmark that was interrupted are not done again. Figures are those of the test
split: mean over the seeds, and standard deviation of the accuracy; "free texts" is the share of texts that agree with
the prediction though nothing constrains them.
"""

import argparse
import hashlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

from vlm.config import BOTH, LAYOUTS, POSTERIOR, RESPONSE

TUNES = {
    "lora": ["--tune", "lora"],
    "lora-alone": ["--tune", "lora", "--freeze-connector"],
    "connector": ["--tune", "connector"],
    "full": ["--tune", "full"],
}


def folder_name(flags: list[str]) -> str:
    """A name for the run with these flags, and with no others: the end of them, to be read, and a hash of all."""
    readable = re.sub(r"\W+", "_", " ".join(flags))[-100:].strip("_")
    return f"{readable}_{hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:8]}"


def run(options: argparse.Namespace, flags: list[str], seed: int) -> dict[str, Any]:
    """Train with some flags and a seed, where it is not done yet: the run's results."""
    command = [*options.flags, *flags, "--seed", str(seed)]
    folder = options.folder / folder_name(command)
    if not (folder / "results.json").is_file():
        script = [sys.executable, str(common.ROOT / "train_vlm.py")]
        done = subprocess.run(
            [*script, *command, "--overwrite", "--output-dir", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(flags)}, seed {seed}: the training failed\n{done.stderr[-2000:]}")
        print(f"{' '.join(flags)}, seed {seed}: done", file=sys.stderr, flush=True)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def row(flags: dict[str, str], found: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table, from the results of all seeds."""

    def mean(*keys: str | int) -> float:
        values = []
        for value in found:
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.fmean(values)

    accuracies = [result["test"]["accuracy"] for result in found]
    return {
        "accuracy": mean("test", "accuracy"),
        "deviation": statistics.stdev(accuracies) if len(found) > 1 else 0.0,
        "lowest": min(accuracies),
        **flags,
        "seeds": len(found),
        "NLL": mean("test", "calibration", "after", "nll", 0),
        "ECE": mean("test", "calibration", "after", "ece", 0),
        "ECE before": mean("test", "calibration", "before", "ece", 0),
        "free texts": mean("texts", "agree_with_prediction") / mean("texts", "texts"),
        "training s": mean("timings", "train_seconds"),
    }


def main() -> int:
    parser = common.parser(__doc__)
    formats = tuple(LAYOUTS)
    parser.add_argument(
        "--formats", nargs="+", choices=formats, default=formats, metavar="FORMAT", help="(default: all three)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=(RESPONSE, POSTERIOR, BOTH),
        default=(RESPONSE, POSTERIOR, BOTH),
        metavar="NAME",
        help="(default: response posterior both)",
    )
    parser.add_argument(
        "--tunes",
        nargs="+",
        choices=tuple(TUNES),
        metavar="MODE",
        help=f"{', '.join(TUNES)} (default: that of the flags)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: in --cache)")
    ours, flags = sys.argv[1:], []
    if "--" in ours:
        ours, flags = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    options = common.start(parser.parse_args(ours))
    options.flags = flags or ["--demo"]
    options.folder = options.folder or options.cache / "objectives"
    options.rounds = 1
    cases = [
        {"tuning": tune, "format": response_format, "objective": objective}
        for tune, response_format, objective in itertools.product(
            options.tunes or [None], options.formats, options.objectives
        )
    ]
    cases = [{name: value for name, value in case.items() if value} for case in cases]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            (i, seed): pool.submit(run, options, as_flags(case), seed)
            for seed in options.seeds
            for i, case in enumerate(cases)
        }
        rows = [row(case, [runs[i, seed].result() for seed in options.seeds]) for i, case in enumerate(cases)]
    return common.report(options, rows)


def as_flags(case: dict[str, str]) -> list[str]:
    """What train_vlm.py is told of a case."""
    flags = TUNES[case["tuning"]] if "tuning" in case else []
    return [*flags, "--response-format", case["format"], "--objective", case["objective"]]


if __name__ == "__main__":
    sys.exit(main())
