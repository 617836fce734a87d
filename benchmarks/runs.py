"""Runs of train_vlm.py in processes of their own, and the figures of several seeds in one line."""

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that compares runs; what is behind `--` goes to every run."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: in --cache)")


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The options of this process, with `flags` for those behind `--` (default: --demo).

    Args:
        name: of the folder in --cache in which the runs are kept.
    """
    ours, flags = sys.argv[1:], []
    if "--" in ours:
        ours, flags = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    options = common.start(parser.parse_args(ours))
    options.flags = flags or ["--demo"]
    options.folder = options.folder or options.cache / name
    options.rounds = 1
    return options


def rows(options: argparse.Namespace, cases: Sequence[tuple[dict[str, str], list[str]]]) -> list[dict[str, Any]]:
    """One line of the table for each case, from a run with each seed.

    Args:
        cases: what the table says of a case, and its flags.
    """
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            (i, seed): pool.submit(run, options, flags, seed)
            for seed in options.seeds
            for i, (_, flags) in enumerate(cases)
        }
        return [row(case, [runs[i, seed].result() for seed in options.seeds]) for i, (case, _) in enumerate(cases)]


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
