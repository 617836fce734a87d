#!/usr/bin/env python3
"""Qwen2-VL's patch embedding: transformers' Conv3d against the same weights as a matrix product
(`vlm/families/qwen2_vl.py`).

python benchmarks/patch_embed.py --json patch_embed.json

Both sides take turns in one process, on the same patches, at the size of the published models. In the same run the
features, or in training the gradients of the weight, are compared with each other and with what float64 makes of the
same numbers.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from vlm.common import dtype_name
from vlm.families.qwen2_vl import PatchLinear

WIDTH, PATCH = 1280, (3, 2, 14, 14)  # Qwen2-VL and Qwen2.5-VL of every size
PATCHES = 196  # of an image of 196 x 196 pixels: 49 image tokens
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
}  # largest error of the matrix product, relative, of the whole result
CASES = [(dtype, images, train) for dtype in TOLERANCE for images, train in ((1, False), (8, False), (1, True))]


def main() -> int:
    """Print one line a case; exit code 1 where the matrix product is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each side, after one to warm up (default and least: 5)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: a GPU if any)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds: expected at least 5")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}, medians of {arguments.rounds} rounds\n")
    print(
        "| Conv3d / Linear | Conv3d ms | Linear ms | images | what | number format | difference | error of Conv3d "
        "| of Linear |"
    )
    print("|---:|---:|---:|---:|---|---|---:|---:|---:|")
    cases = []
    for case in CASES:
        cases.append(compare(*case, arguments.rounds, device))
        print(line(cases[-1]), flush=True)
    if arguments.json:
        values = {"torch": torch.__version__, "device": where, "rounds": arguments.rounds, "cases": cases}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    wrong = [case for case in cases if not case["agrees"]]
    if wrong:
        print(f"\n{len(wrong)} of {len(cases)} cases are wrong", file=sys.stderr)
    return 1 if wrong else 0


def compare(dtype: torch.dtype, images: int, train: bool, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times and differences of one case. Both sides have the very same weight."""
    torch.manual_seed(0)
    embed = [PatchEmbed(PATCH[2], PATCH[1], PATCH[0], WIDTH).to(device, dtype) for _ in range(2)]
    embed[1].proj = PatchLinear(embed[0].proj)
    patches = torch.randn(images * PATCHES, math.prod(PATCH), device=device, dtype=dtype)
    upstream = torch.randn(len(patches), WIDTH, device=device, dtype=dtype) if train else None
    seconds, results = [[], []], [None, None]
    for number in range(rounds + 1):
        for side, module in enumerate(embed):
            taken, results[side] = timed(module, patches, upstream)
            if number:  # the first is to warm up
                seconds[side].append(taken)
    conv3d, linear = (statistics.median(times) for times in seconds)
    weight, rows = embed[0].proj.weight.detach().double().flatten(1), patches.double()
    exact = upstream.double().T @ rows if train else rows @ weight.T
    error = relative(results[1], exact)
    return {
        "ratio": conv3d / linear,
        "conv3d_ms": conv3d * 1000,
        "linear_ms": linear * 1000,
        "images": images,
        "train": train,
        "dtype": dtype_name(dtype),
        "difference": relative(*results),
        "conv3d_error": relative(results[0], exact),
        "linear_error": error,
        "agrees": error < TOLERANCE[dtype],
    }


def timed(module: nn.Module, patches: Tensor, upstream: Tensor | None) -> tuple[float, Tensor]:
    """Seconds of one pass, and its result: the features or, with the gradient of the features, that of the weight."""
    module.zero_grad()
    _wait(patches.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(upstream is not None):
        result = module(patches)
        if upstream is not None:
            result.backward(upstream)
            result = module.proj.weight.grad.flatten(1)
    _wait(patches.device)
    return time.perf_counter() - start, result.clone()


def relative(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference, as a share of the norm of what was expected."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def line(case: dict[str, Any]) -> str:
    """One row of the table."""
    what = "forward and backward" if case["train"] else "forward"
    times = f"| {case['ratio']:.1f} | {case['conv3d_ms']:.1f} | {case['linear_ms']:.1f} | {case['images']} | {what} "
    times += f"| {case['dtype']} "
    errors = f"| {case['difference']:.1e} | {case['conv3d_error']:.1e} | {case['linear_error']:.1e} |"
    return times + errors + ("" if case["agrees"] else " WRONG")


if __name__ == "__main__":
    sys.exit(main())
