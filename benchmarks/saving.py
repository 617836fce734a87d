#!/usr/bin/env python3
"""What it costs that a saved model is on the disk, and that its checksum is compared: writing and reading weights.

python benchmarks/saving.py --output benchmarks/results/saving.json
"""

import shutil
import statistics
import sys
from pathlib import Path

import common
import torch
from safetensors.torch import load_file, save_file

from vlm.common import check_checksums, write_folder

BYTES = {"full": 10**9, "quick": 10**8, "tiny": 10**6}
NAME = "model.safetensors"


def main() -> int:
    options = common.start(common.parser(__doc__).parse_args())
    size = BYTES[options.size]
    weights = {"weight": torch.ones(size // 4)}
    folder = options.cache / "saving"
    shutil.rmtree(folder, ignore_errors=True)
    plain, whole = folder / "plain", folder / "whole"
    plain.mkdir(parents=True)

    def write_plain() -> None:
        save_file(weights, plain / NAME)

    def write_whole() -> None:
        write_folder(whole, lambda new: save_file(weights, new / NAME))

    def read(place: Path) -> float:
        return float(load_file(place / NAME)["weight"].sum())

    def read_whole() -> float:
        check_checksums(whole, "")
        return read(whole)

    write_plain()
    write_whole()
    pairs = {
        "write, on the disk, with checksums": (write_plain, write_whole),
        "read, checksums compared": (lambda: read(plain), read_whole),
    }
    rows = []
    for name, (without, with_all) in pairs.items():
        seconds = common.take_turns({"without": without, "with": with_all}, options.rounds)
        without_all, ours = (statistics.median(times) for times in seconds.values())
        rows.append(
            {
                **common.ratio(seconds["with"], seconds["without"]),
                "step": name,
                "seconds": ours,
                "seconds without": without_all,
                "more seconds a GB": (ours - without_all) / (size / 1e9),
            }
        )
    shutil.rmtree(folder)
    return common.report(options, rows)


if __name__ == "__main__":
    sys.exit(main())
