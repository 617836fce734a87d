#!/usr/bin/env python3
"""One training step of this program against one of TRL's SFTTrainer: how many times as long TRL takes.

python benchmarks/train_vs_trl.py --output benchmarks/results/train_vs_trl.json

Same weights, pictures, texts, trained parameters, batch size and optimizer; loading and processing of the pictures and the update are part
of both. The steps take turns inside TRL's own loop. Loss and gradients of one batch are compared first, without dropout. Needs
`pip install -r requirements-bench.txt -c constraints.txt`.
"""

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import common
import workload

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
GOALS = {"lora": (8, 5), "connector": (8, 5), "full": (1.8, 1.4)}  # wished, least
# A full fine-tune keeps four copies of the weights on each side, and the vision tower's activations on top.
BATCH_SIZES = {"full": {"lora": 8, "connector": 8, "full": 2}, "quick": dict.fromkeys(GOALS, 2), "tiny": dict.fromkeys(GOALS, 2)}


def compare(options: argparse.Namespace, tune: str, cached: bool) -> dict[str, Any]:
    """One row of the table."""
    import trl_side

    batch_size = options.batch_size or BATCH_SIZES[options.size][tune]
    ours = workload.OurTraining(options, tune, batch_size, cached)
    seconds: dict[str, list[float]] = {"TRL": [], "ours": []}
    mark = time.perf_counter()

    def after_step() -> None:
        """Between two of TRL's steps; what TRL does between two calls is its step, with loading the pictures."""
        nonlocal mark
        seconds["TRL"].append(time.perf_counter() - mark)
        gc.collect()
        seconds["ours"].append(common.timed(ours.step))
        gc.collect()
        mark = time.perf_counter()

    trainer = trl_side.build_trainer(
        options, ours.run.settings, ours.run.data.train, ours.classifier.prompts, options.rounds + 1, after_step
    )
    differences = trl_side.compare(trainer, ours)
    with common.small_heap():
        trainer.train()
    seconds = {side: times[1:] for side, times in seconds.items()}  # the first is to warm up
    return row(tune, batch_size, cached, seconds, differences, "TRL")


def row(tune: str, batch_size: int, cached: bool, seconds: dict[str, list[float]], differences: dict[str, float], other: str) -> dict:
    """What a comparison of two training steps says."""
    ours, theirs = statistics.median(seconds["ours"]), statistics.median(seconds[other])
    return {
        **common.ratio(seconds[other], seconds["ours"]),
        "tuning": tune,
        "feature cache": "no" if not cached or tune == "full" else "yes",
        "batch": batch_size,
        "ours s": ours,
        f"{other} s": theirs,
        "ours pictures/s": batch_size / ours,
        f"{other} pictures/s": batch_size / theirs,
        "loss differs": f"{differences['loss']:.1e}",
        "gradients differ": f"{differences['gradients']:.1e}",
        "agrees": differences["loss"] < LOSS_TOLERANCE and differences["gradients"] < GRADIENT_TOLERANCE,
    }


def cases(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """Tuning modes, each with the feature cache where there can be one, and without it where that was asked for."""
    found = []
    for tune in options.tune or (["lora"] if options.size == "quick" else list(GOALS)):
        found += [(tune, True)] if tune != "full" else []
        found += [(tune, False)] if tune == "full" or options.uncached else []
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tune", nargs="+", choices=list(GOALS), help="modes to compare (default: all; --quick: lora)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures of a step (default: 8; full: 2; --quick: 2)")
    parser.add_argument("--uncached", action="store_true", help="also without the cache of vision features")


def main() -> int:
    parser = common.parser(__doc__)
    add_options(parser)
    options = common.start(parser.parse_args())
    try:
        import trl
    except ImportError:
        parser.error("trl is not installed: pip install -r requirements-bench.txt -c constraints.txt")
    rows = [compare(options, *case) for case in cases(options)]
    return common.report(options, rows, all(r["agrees"] for r in rows), trl=trl.__version__, goals=GOALS)


if __name__ == "__main__":
    sys.exit(main())
