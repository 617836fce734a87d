#!/usr/bin/env python3
"""One training step of this program against one of TRL's SFTTrainer: how many times as long TRL takes.

python benchmarks/train_vs_trl.py --output benchmarks/results/train_vs_trl.json

Same weights, images, texts, trained parameters, batch size and optimizer; loading and processing of the images and the
update are part of both. The steps take turns inside TRL's own loop. Loss and gradients of one batch are compared first,
without dropout. Needs `pip install -r requirements-bench.txt -c constraints.txt`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import workload

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
GOALS = {"lora": (8, 5), "connector": (8, 5), "full": (1.8, 1.4)}  # wished, least
# A full fine-tune keeps four copies of the weights on each side, and the vision encoder's activations on top.
BATCH_SIZES = {
    "full": {"lora": 8, "connector": 8, "full": 2},
    "quick": dict.fromkeys(GOALS, 2),
    "tiny": dict.fromkeys(GOALS, 2),
}


class Turns:
    """Seconds of a step of both sides, which take turns inside TRL's own loop: what TRL does between two of our turns
    is its turn.

    Args:
        ours: one of our steps. steps: of a turn. unmeasured: how many more a turn begins with: on a GPU memory goes
            from side to side between two turns, and the first step has to ask for all of it. look: is told whose turn
            has ended.
    """

    def __init__(
        self,
        ours: Callable[[], Any],
        steps: int = 1,
        unmeasured: int = 0,
        look: Callable[[str], None] = lambda side: None,
    ):
        self.ours, self.steps, self.unmeasured, self.look = ours, steps, unmeasured, look
        self.seconds: dict[str, list[float]] = {"TRL": [], "ours": []}

    def run(self, trainer: Any) -> None:
        """All steps of a trainer that calls `after_step` after each."""
        with common.small_heap():
            self._begin()
            trainer.train()

    def _begin(self) -> None:
        """A turn of TRL's."""
        self.number = 0  # of its steps that were made
        common.release()
        self.mark = common.clock()

    def after_step(self) -> None:
        """Between two of TRL's steps: what TRL does between two calls is its step, with loading the images."""
        self.number += 1
        if self.number == self.unmeasured:
            self.mark = common.clock()
        if self.number < self.unmeasured + self.steps:
            return
        self.seconds["TRL"].append((common.clock() - self.mark) / self.steps)
        self.look("TRL")
        common.release()
        self.seconds["ours"].append(self.our_turn())
        self.look("ours")
        self._begin()

    def our_turn(self) -> float:
        """Seconds of a step in a turn of ours."""
        for _ in range(self.unmeasured):
            self.ours()
        return common.timed(lambda: [self.ours() for _ in range(self.steps)]) / self.steps

    def measured(self) -> dict[str, list[float]]:
        """Without the first turns, which are to warm up."""
        return {side: times[1:] for side, times in self.seconds.items()}


def compare(options: argparse.Namespace, tune: str, cached: bool) -> dict[str, Any]:
    """One row of the table."""
    import trl_side

    batch_size = options.batch_size or BATCH_SIZES[options.size][tune]
    ours = workload.OurTraining(options, tune, batch_size, cached, gradient_accumulation_steps=options.accumulation)
    turns, run = Turns(ours.step), ours.run
    trainer = trl_side.build_trainer(
        options, run.settings, run.data.train, ours.classifier.prompts, options.rounds + 1, turns.after_step
    )
    differences = trl_side.compare(trainer, ours)
    turns.run(trainer)
    return row(tune, options.accumulation * batch_size, cached, turns.measured(), differences, "TRL")


def row(
    tune: str, batch_size: int, cached: bool, seconds: dict[str, list[float]], differences: dict[str, float], other: str
) -> dict:
    """What a comparison of two training steps says."""
    ours, theirs = statistics.median(seconds["ours"]), statistics.median(seconds[other])
    return {
        **common.ratio(seconds[other], seconds["ours"]),
        "tuning": tune,
        "feature cache": "no" if not cached or tune == "full" else "yes",
        "batch": batch_size,
        "ours s": ours,
        f"{other} s": theirs,
        "ours images/s": batch_size / ours,
        f"{other} images/s": batch_size / theirs,
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
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images of a step (default: 8; full: 2; --quick: 2)"
    )
    parser.add_argument("--uncached", action="store_true", help="also without the cache of vision features")


def main() -> int:
    parser = common.parser(__doc__)
    add_options(parser)
    parser.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="batches of a step, on both sides (default: 1)"
    )
    options = common.start(parser.parse_args())
    try:
        import trl
    except ImportError:
        parser.error("trl is not installed: pip install -r requirements-bench.txt -c constraints.txt")
    rows = [compare(options, *case) for case in cases(options)]
    return common.report(options, rows, all(r["agrees"] for r in rows), trl=trl.__version__, goals=GOALS)


if __name__ == "__main__":
    sys.exit(main())
