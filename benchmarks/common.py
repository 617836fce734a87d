"""What the benchmarks share: options, turns, medians, the machine, and results as JSON.

Importing it finds the program in the folder above and sets how threads wait, before torch is imported: both sides have
the same.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT))

from vlm.machine import wait_politely

wait_politely()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from report import figures

from vlm.common import format_table
from vlm.machine import pick_threads

ROUNDS, QUICK_ROUNDS, TINY_ROUNDS = 5, 3, 1
MIB = 2**20


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every benchmark has. `defaults` replaces some of theirs."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file")
    result.add_argument(
        "--rounds",
        type=int,
        help=f"turns of each side, after one to warm up (default: {ROUNDS}; --quick: {QUICK_ROUNDS})",
    )
    result.add_argument(
        "--threads", type=int, help="CPU threads of both sides (default: the program's, physical cores)"
    )
    result.add_argument("--question-first", action="store_true", help="on all sides the question before the image")
    size = result.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        action="store_const",
        dest="size",
        const="quick",
        help="a sixth of the model: 5 + 2 layers of 30 + 12",
    )
    size.add_argument(
        "--tiny",
        action="store_const",
        dest="size",
        const="tiny",
        help="a model without any use but to test the benchmark",
    )
    result.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vlm_benchmarks",
        metavar="FOLDER",
        help="where models and features are kept between benchmarks (default: %(default)s)",
    )
    # What no option of most benchmarks changes: SmolVLM-256M in float32 on the CPU, images read by the process itself,
    # once an epoch.
    result.set_defaults(size="full", shape="256M", device="cpu", dtype="float32", workers=None, repeats=1, **defaults)
    return result


def start(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other options, and apply what concerns the whole process."""
    if options.rounds is None:
        options.rounds = {"full": ROUNDS, "quick": QUICK_ROUNDS, "tiny": TINY_ROUNDS}[options.size]
    torch.set_num_threads(pick_threads(options.threads))  # as the program does; the other sides have them too
    options.cache.mkdir(parents=True, exist_ok=True)
    os.environ["VLM_CACHE"] = str(options.cache)  # features of benchmarks stay out of the user's own cache
    return options


def size_flag(options: argparse.Namespace) -> list[str]:
    """The options that make another process measure the same model."""
    flags = [] if options.size == "full" else [f"--{options.size}"]
    flags += ["--question-first"] * options.question_first
    return [*flags, "--cache", str(options.cache), *(["--threads", str(options.threads)] if options.threads else [])]


# Time


def clock() -> float:
    """Seconds of a clock that is read when a GPU in use has done all that it was told to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(side: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = clock()
    side()
    return clock() - started


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every side in every round. The sides take turns, in the other direction in every second round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with small_heap():
        for number in range(warm_up + rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                gc.collect()
                taken = timed(sides[name])
                if number >= warm_up:
                    seconds[name].append(taken)
    return seconds


@contextmanager
def small_heap() -> Iterator[None]:
    """Python's garbage collector looks at new objects only inside: a side does not pay for the other's, and
    `gc.collect` is quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def ratio(others: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as long the others take: the median of the rounds' ratios, each of neighbors in time, with
    smallest and largest."""
    ratios = [theirs / own for theirs, own in zip(others, ours, strict=True)]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def exponent(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The k of values ~ sizes^k: the slope of a line through their logarithms."""
    return statistics.linear_regression(
        [float(torch.tensor(x).log()) for x in sizes], [float(torch.tensor(y).log()) for y in values]
    ).slope


# Memory (of a process: Linux)


def resident() -> dict[str, int]:
    """Bytes of memory that this process has now (VmRSS) and had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(VmRSS|VmHWM|RssAnon):\s+(\d+) kB", status)}


def forget_peak() -> None:
    """Count the most memory again, without what the allocator keeps of the phase before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Give back what nothing holds any more; a GPU's memory too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# Results


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on next to the program."""
    import transformers

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text()
        names = re.findall(r"model name\s*:\s*(.+)", text)
        instructions = [
            name for name in ("avx2", "avx512f", "amx_tile") if re.search(rf"^flags.*\b{name}\b", text, re.MULTILINE)
        ]
        model = f"{names[0] if names else model} ({', '.join(instructions) or platform.machine()})"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    }


def report(options: argparse.Namespace, rows: list[dict[str, Any]], correct: bool = True, **more: Any) -> int:
    """Print the rows, write them as JSON, and return the exit code: 1 where a check failed.

    Args:
        rows: one dict a row, the same keys in each, the ratio first.
        more: what else belongs into the file; about: what the rows are, if they have no medians.
    """
    script = Path(sys.argv[0]).name
    arguments = [a.replace(f"{ROOT}{os.sep}", "") for a in sys.argv[1:] if a not in ("--cache", str(options.cache))]
    where = machine(options.device)
    chips = ", ".join(where[name] for name in ("gpu", "cpu") if name in where)
    print(
        f"{chips}, {where['threads']} threads, load {where['load']}, torch {where['torch']}, "
        f"{more.get('about') or figures(rows, options.rounds)}\n"
    )
    print(format_table([list(row.values()) for row in rows], list(rows[0])))
    if not correct:
        print("\nA check failed: the sides do not compute the same.", file=sys.stderr)
    values = {
        "benchmark": script.removesuffix(".py"),
        "command": shlex.join(["python", f"benchmarks/{script}", *arguments]),
        "machine": where,
        "size": options.size,
        "rounds": options.rounds,
        "correct": correct,
        **more,
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return 0 if correct else 1
