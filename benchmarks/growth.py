#!/usr/bin/env python3
"""How time and memory grow with images, classes, prefix length and batch: the exponent k of cost ~ size^k.

python benchmarks/growth.py --output benchmarks/results/growth.json

The sizes of a series take turns. The exponent is the slope of a line through the logarithms: 1 is proportional, 0 does
not grow. Memory is the peak of the resident memory above what the process had before the call. Linux only.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
import workload
from classify_vs_generate import predict

from vlm.inference import predict_batch

SERIES = {
    "full": {
        "images": [4, 8, 16, 32],
        "classes": [5, 20, 50, 100],
        "prefix": [100, 200, 400, 800],
        "batch": [1, 2, 4, 8],
    },
    "quick": {"images": [2, 4, 8], "classes": [5, 20, 80], "prefix": [100, 300, 900], "batch": [1, 2, 4]},
    "tiny": {"images": [2, 4], "classes": [2, 10], "prefix": [30, 90], "batch": [1, 2]},
}


def predicting(options: argparse.Namespace, images: int, classes: int, tokens: int | None = None) -> Callable[[], Any]:
    """Classifying so many new images, at most 4 in one pass, each time with the prefix read again."""
    classifier = workload.classifier(options, classes, tokens=tokens)
    files = workload.image_files(options, images)
    metadata = {"class_names": list(classifier.class_names), "prompts": classifier.prompts.to_json()}

    def work() -> None:
        classifier.eval()  # forgets the prefix
        predict_batch(classifier, classifier.family.processor, files, metadata, 4, explain=False, show_progress=False)

    return work


def predicting_at_once(options: argparse.Namespace, batch: int) -> Callable[[], Any]:
    classifier, files = workload.classifier(options, 15), workload.image_files(options, batch)
    return lambda: predict(classifier, files)


def training(options: argparse.Namespace, batch: int) -> Callable[[], Any]:
    return workload.OurTraining(options, "lora", batch, cached=True).step


def training_with_prefix(options: argparse.Namespace, tokens: int) -> Callable[[], Any]:
    text = workload.system_text(options.size, tokens)
    return workload.OurTraining(options, "lora", 2, cached=True, system_instructions=text).step


WORKS: dict[str, tuple[str, Callable[[argparse.Namespace, int], Callable[[], Any]]]] = {
    "classify, by images": ("images", lambda options, n: predicting(options, n, 15)),
    "classify, by classes": ("classes", lambda options, n: predicting(options, 2, n)),
    "classify, by prefix tokens": ("prefix", lambda options, n: predicting(options, 2, 15, n)),
    "classify, by batch": ("batch", predicting_at_once),
    "train, by batch": ("batch", training),
    "train, by prefix tokens": ("prefix", training_with_prefix),
}
QUICK_WORKS = ["classify, by classes", "train, by batch"]


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that a call takes at most above what there was before."""
    common.forget_peak()
    before = common.resident()["VmRSS"]
    work()
    return max(1, common.resident()["VmHWM"] - before)


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One row: a series of sizes."""
    series, make = WORKS[name]
    sizes = SERIES[options.size][series]
    works = {str(size): make(options, size) for size in sizes}
    seconds = common.take_turns(works, options.rounds)
    medians = [statistics.median(seconds[str(size)]) for size in sizes]
    peaks = [peak_of(works[str(size)]) for size in sizes]
    return {
        "exponent of time": common.exponent(sizes, medians),
        "of memory": common.exponent(sizes, peaks),
        "work": name,
        "sizes": ", ".join(map(str, sizes)),
        "seconds": ", ".join(f"{value:.3g}" for value in medians),
        "peak MiB": ", ".join(f"{value / common.MIB:.0f}" for value in peaks),
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--works", nargs="+", choices=list(WORKS), metavar="WORK", help="which ones (default: all; --quick: two)"
    )
    options = common.start(parser.parse_args())
    works = options.works or (QUICK_WORKS if options.size == "quick" else list(WORKS))
    torch.manual_seed(0)
    return common.report(options, [measure(options, name) for name in works])


if __name__ == "__main__":
    sys.exit(main())
