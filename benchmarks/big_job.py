#!/usr/bin/env python3
"""Images per second of `inference_vlm.py` with --output, by one and by two processes, against a loop over
`predict_single_image`; and the memory of a short and of a long job.

python benchmarks/big_job.py --threads 1 --output benchmarks/results/big_job.json

The model is that of the demo, the images are its digits of 8 x 8 pixels, by links. Commands are whole processes, from
their start to their end; seconds of the loop are without the start of Python and loading the model. The memory is the
most that a process has in RAM.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import common
import numpy as np
import psutil
from PIL import Image
from sklearn.datasets import load_digits

import train_vlm
from inference_vlm import load_model_and_metadata, predict_single_image

ROWS = {"full": 1000, "quick": 500, "tiny": 12}
LONG = {"full": 100_000, "quick": 5_000, "tiny": 24}
DIGITS = 100  # different images
LOOP = "loop over predict_single_image"
SAME = 1e-4  # of confidences
SECONDS_BETWEEN_LOOKS = 0.1  # at the memory


def trained_model(options: argparse.Namespace) -> Path:
    """The demo's model after a short training, made once."""
    output = options.cache / "big_job_model"
    if not (output / "best_model").is_dir():
        flags = ["--demo", "--max-samples", "200", "--epochs", "2", "--device", "cpu", "--output-dir", str(output)]
        if train_vlm.main(flags):
            raise SystemExit("the model could not be trained")
    return output / "best_model"


def make_links(folder: Path, count: int) -> Path:
    """A folder of links to a few images."""
    folder = folder / f"images_{count}"
    (folder / ".digits").mkdir(parents=True, exist_ok=True)
    for i, digit in enumerate(load_digits().images[:DIGITS]):
        Image.fromarray((digit * 15).astype(np.uint8)).save(folder / ".digits" / f"{i}.png")
    for i in range(count):
        link = folder / f"{i:06}.png"
        if not link.is_symlink():
            link.symlink_to(Path(".digits") / f"{i % DIGITS}.png")
    return folder


def largest(pid: int) -> float:
    """The most memory, in MiB, that a process or one that it started has had. It inherits none from its parent."""
    found = [0.0]
    with suppress(psutil.Error, OSError):
        for process in (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))):
            status = Path(f"/proc/{process}/status").read_text()
            found += [int(line.split()[1]) * 1024 / common.MIB for line in status.splitlines() if "VmHWM" in line]
    return max(found)


class Command:
    """`run_vlm_inference.sh` as a user starts it.

    Attributes:
        mebibytes: the most memory of a process, of the last call.
    """

    def __init__(self, options: argparse.Namespace, model: Path, processes: int) -> None:
        self.options, self.model, self.processes = options, model, processes
        self.mebibytes = 0.0

    def __call__(self, images: Path) -> float:
        """Seconds of a whole command."""
        self.output.unlink(missing_ok=True)
        flags = ["--model-dir", str(self.model), "--device", "cpu", "--batch-size", "16", "--output", str(self.output)]
        threads = ["--threads", str(self.options.threads)] if self.options.threads else []
        program = [str(common.ROOT / "run_vlm_inference.sh"), *flags, *threads, str(images)]
        surroundings = os.environ | {"VLM_PYTHON": sys.executable, "VLM_PROCESSES": str(self.processes)}
        started = time.perf_counter()
        process, self.mebibytes = subprocess.Popen(program, env=surroundings, stderr=subprocess.DEVNULL), 0.0
        while process.poll() is None:
            self.mebibytes = max(self.mebibytes, largest(process.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if process.returncode:
            raise SystemExit(f"{' '.join(program)} ended with exit code {process.returncode}")
        return time.perf_counter() - started

    @property
    def output(self) -> Path:
        """The file that it writes."""
        return self.options.cache / f"big_job_{self.processes}.jsonl"


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--model-dir", type=Path, help="a trained model (default: one of the demo is trained)")
    options = common.start(parser.parse_args())
    model_dir, count, long = options.model_dir or trained_model(options), ROWS[options.size], LONG[options.size]
    images = make_links(options.cache, count)
    model, processor, metadata = load_model_and_metadata(model_dir, device="cpu")
    paths = sorted(str(path) for path in images.glob("*.png"))
    confidences: list[float] = []

    def loop() -> float:
        confidences[:] = [predict_single_image(model, processor, path, metadata, explain=False)[1] for path in paths]
        return 0.0

    commands = {f"{n} process{'es' * (n > 1)}": Command(options, model_dir, n) for n in (1, 2)}
    sides: dict[str, Callable[[], float]] = {LOOP: loop}
    sides |= {name: partial(command, images) for name, command in commands.items()}
    seconds = common.take_turns(sides, options.rounds, warm_up=0)
    rows, same = [], True
    for name, taken in seconds.items():
        memory = commands[name].mebibytes if name in commands else common.resident()["VmHWM"] / common.MIB
        rows.append(row(name, count, seconds[LOOP], taken, memory))
    for command in commands.values():
        found = [json.loads(line) for line in command.output.read_text(encoding="utf-8").splitlines()]
        same = same and [result["path"] for result in found] == paths
        same = same and np.allclose([result["confidence"] for result in found], confidences, atol=SAME)
    loops = [statistics.median(seconds[LOOP]) * long / count]
    for name, command in commands.items():
        taken = command(make_links(options.cache, long))
        rows.append(row(name, long, loops, [taken], command.mebibytes))
    return common.report(options, rows, bool(same))


def row(name: str, count: int, loops: list[float], seconds: list[float], memory: float) -> dict[str, object]:
    """A row of the table."""
    median = statistics.median(seconds)
    rate = {"images": count, "seconds": median, "images/s": count / median, "MiB": memory}
    return {**common.ratio(loops, seconds), "side": name, **rate}


if __name__ == "__main__":
    sys.exit(main())
