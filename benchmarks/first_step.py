#!/usr/bin/env python3
"""From the command to the first optimizer step: seconds and resident memory, by the rows of a CSV file.

python benchmarks/first_step.py --output benchmarks/results/first_step.json

The rows are links to 300 images, with the demo's model and a new cache of features for each run. The row list is what
the process grows by while the dataset is read. The ratio is the resident memory without the row list, compared with
that of the fewest rows. Linux only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from vlm.common import Stopped
from vlm.config import resolve

ROWS = {"full": [1_000, 50_000, 1_000_000], "quick": [1_000, 50_000], "tiny": [100, 6_000]}
IMAGES = {"full": 300, "quick": 300, "tiny": 40}
CLASSES = 10


def make(folder: Path, rows: int, count: int) -> Path:
    """A CSV file with so many rows, and the images that it names."""
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    table = folder / f"{rows}.csv"
    table.write_text("image,label\n" + "".join(f"{i % count}.png,class {i % CLASSES}\n" for i in range(rows)))
    return table


def train(model: str, table: str, output: str, started: float) -> None:
    """In a process of its own: train until the first step is done, and print what it took."""
    from vlm.training import setup
    from vlm.training.running import fit

    found: dict[str, float] = {}
    load_data = setup.load_data

    def load(*arguments: Any) -> Any:
        before = common.resident()["VmRSS"]
        data = load_data(*arguments)
        found["of_rows"] = common.resident()["VmRSS"] - before
        return data

    def stop() -> bool:
        found.update(seconds=time.time() - started, resident=common.resident()["VmRSS"])
        return True

    setup.load_data = load
    flags = {"model": model, "dataset": table, "output_dir": output, "device": "cpu", "batch_size": 8}
    try:
        fit(resolve(flags), stop)
    except Stopped:
        print(json.dumps(found))


def run(folder: Path, table: Path) -> dict[str, float]:
    """What one process took.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        environment = os.environ | {"VLM_CACHE": str(Path(scratch) / "cache")}
        arguments = [str(folder / "model"), str(table), str(Path(scratch) / "out"), repr(time.time())]
        command = [sys.executable, __file__, "--child", *arguments]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        model, table, output, started = sys.argv[2:]
        train(model, table, output, float(started))
        return 0
    options = common.start(common.parser(__doc__).parse_args())
    sizes, count = ROWS[options.size], IMAGES[options.size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from vlm.families import build_demo_model

        names = [f"class {i}" for i in range(CLASSES)]
        build_demo_model(folder / "model", resolve({"demo": True}), names)
        tables = {rows: make(folder, rows, count) for rows in sizes}
        found: dict[int, list[dict[str, float]]] = {rows: [] for rows in sizes}
        for _ in range(options.rounds):
            for rows, table in tables.items():
                found[rows].append(run(folder, table))
    middle = {
        rows: {key: statistics.median(one[key] for one in taken) for key in taken[0]} for rows, taken in found.items()
    }
    fewest = middle[sizes[0]]
    lines = [
        {
            "ratio": (taken["resident"] - taken["of_rows"]) / (fewest["resident"] - fewest["of_rows"]),
            "rows": rows,
            "seconds": taken["seconds"],
            "resident MiB": taken["resident"] / common.MIB,
            "row list MiB": taken["of_rows"] / common.MIB,
            "bytes a row": round((taken["resident"] - fewest["resident"]) / (rows - sizes[0]))
            if taken != fewest
            else 0,
        }
        for rows, taken in middle.items()
    ]
    return common.report(options, lines)


if __name__ == "__main__":
    sys.exit(main())
