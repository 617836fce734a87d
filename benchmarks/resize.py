#!/usr/bin/env python3
"""From images to pixels: transformers' image processors against PIL and torch alone
(`vlm/families/images/resizing.py`).

python benchmarks/resize.py --output resize.json

Both sides take turns in one process, on the same images of noise, one at a time, with the settings of a training run.
In the same run the largest difference of a pixel is compared with what the program tolerates.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers import Idefics3ImageProcessorPil, Qwen2VLImageProcessorPil

from vlm.families import idefics3, qwen2_vl
from vlm.families.images.resizing import TOLERANCE, native_patches, one_tile

LONGEST = (64, 512, 1024, 3000)  # pixels; three quarters of it in the other direction


def _smolvlm(edge: int) -> Idefics3ImageProcessorPil:
    return Idefics3ImageProcessorPil(
        size={"longest_edge": edge}, max_image_size={"longest_edge": edge}, do_image_splitting=False
    )


def _qwen() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": qwen2_vl.MIN_PIXELS, "longest_edge": qwen2_vl.MAX_PIXELS})


# Name, image processor, our way and that of the processor.
SIDES = [
    ("SmolVLM, 512 px", _smolvlm(512), one_tile, idefics3.by_processor),
    ("SmolVLM, 256 px", _smolvlm(256), one_tile, idefics3.by_processor),
    ("Qwen2-VL", _qwen(), native_patches, qwen2_vl.by_processor),
]


def main() -> int:
    """Print one line a case; exit code 1 where the pixels differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each side, after one to warm up (default: 9, least: 5)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers there too, as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds: expected at least 5")
    torch.set_num_threads(1)  # as in a loader process
    versions = {module.__name__: module.__version__ for module in (torch, transformers, PIL)}
    print(f"{versions}, CPU ({platform.machine()}), 1 thread, medians of {arguments.rounds} rounds\n")
    print("| processor / ours | processor ms | ours ms | model | image | difference |\n|---:|---:|---:|---|---|---:|")
    cases = []
    for side in SIDES:
        for longest in LONGEST:
            cases.append(compare(*side, longest, arguments.rounds))
            print(line(cases[-1]), flush=True)
    if arguments.output:
        values = {"versions": versions, "machine": platform.machine(), "rounds": arguments.rounds, "cases": cases}
        arguments.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    wrong = sum(not case["agrees"] for case in cases)
    if wrong:
        print(f"\n{wrong} of {len(cases)} cases are wrong", file=sys.stderr)
    return 1 if wrong else 0


def compare(name: str, image_processor: Any, ours: Any, processor: Any, longest: int, rounds: int) -> dict[str, Any]:
    """Times and differences of one case."""
    noise = np.random.default_rng(0).integers(0, 256, (longest * 3 // 4, longest, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)]
    seconds, results = {ours: [], processor: []}, {}
    for number in range(rounds + 1):
        for encode in seconds:
            start = time.perf_counter()
            results[encode] = encode(image_processor, images)
            if number:  # the first is to warm up
                seconds[encode].append(time.perf_counter() - start)
    medians = {encode: statistics.median(times) * 1000 for encode, times in seconds.items()}
    difference = float((results[ours]["pixel_values"] - results[processor]["pixel_values"]).abs().max())
    return {
        "ratio": medians[processor] / medians[ours],
        "processor_ms": medians[processor],
        "ours_ms": medians[ours],
        "model": name,
        "image": f"{longest} x {longest * 3 // 4}",
        "difference": difference,
        "agrees": difference <= TOLERANCE,
    }


def line(case: dict[str, Any]) -> str:
    """One row of the table."""
    times = f"| {case['ratio']:.1f} | {case['processor_ms']:.1f} | {case['ours_ms']:.1f} "
    return (
        times
        + f"| {case['model']} | {case['image']} | {case['difference']:.1e} |"
        + ("" if case["agrees"] else " WRONG")
    )


if __name__ == "__main__":
    sys.exit(main())
