#!/usr/bin/env python3
"""Vision features in shards, against one file an image: looking all images up, and reading them in batches of 16.

Both sides compare a checksum for each image. Files are in the memory of the system, as when a disk is no limit.

python benchmarks/shards.py --output benchmarks/results/shards.json
"""

import random
import shutil
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import common
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlm.families.features.shards import SHARD_BYTES, SHARD_IMAGES, Entry, Index, write_shards

BATCH = 16
# What is kept of an image -> its rows and numbers, and how many images there are.
CASES = {
    "CIFAR-10: 50,000 small ones": ((4, 64), 50_000),
    "after SmolVLM's connector": ((64, 576), 4_000),
    "before SmolVLM's connector": ((1024, 768), 400),
}


def main() -> int:
    options = common.start(common.parser(__doc__).parse_args())
    folder, rows, same = options.cache / "shards", [], True
    for name, (shape, count) in CASES.items():
        count = {"full": count, "quick": count // 10, "tiny": 20}[options.size]
        shutil.rmtree(folder, ignore_errors=True)
        whole = torch.randn(count, *shape)
        keys = [f"{i:064x}" for i in range(count)]
        write_files(folder / "files", keys, whole)
        write_in_shards(folder / "shards", keys, whole)
        order = random.Random(0).sample(keys, min(count, 3200))
        index = Index(folder / "shards")
        sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "look all up": (partial(look_up_files, folder / "files", keys), partial(look_up, folder / "shards", keys)),
            "read in batches": (
                partial(read, order, partial(read_file, folder / "files")),
                partial(read, order, index.entry),
            ),
        }
        same = same and all(
            torch.equal(read_file(folder / "files", key)["features"], index.entry(key)["features"])
            for key in order[:100]
        )
        for step, (theirs, ours) in sides.items():
            seconds = common.take_turns({"files": theirs, "shards": ours}, options.rounds)
            done = count if step == "look all up" else len(order)
            rows.append(
                {
                    **common.ratio(seconds["files"], seconds["shards"]),
                    "step": step,
                    "features": name,
                    "files": count,
                    "shards": len(list((folder / "shards").iterdir())),
                    "µs an image, files": statistics.median(seconds["files"]) / done * 1e6,
                    "µs an image, shards": statistics.median(seconds["shards"]) / done * 1e6,
                }
            )
    shutil.rmtree(folder)
    return common.report(options, rows, same)


def write_files(folder: Path, keys: list[str], whole: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for key, features in zip(keys, whole, strict=True):
        save_file({"features": features}, folder / key, {"checksum": str(zlib.crc32(features.numpy().data))})


def write_in_shards(folder: Path, keys: list[str], whole: torch.Tensor) -> None:
    most = max(1, min(SHARD_IMAGES, int(SHARD_BYTES / whole[0].nbytes)))
    for start in range(0, len(keys), most):
        some = range(start, min(start + most, len(keys)))
        list(write_shards(folder, {keys[i]: {"features": whole[i]} for i in some}))


def look_up_files(folder: Path, keys: list[str]) -> None:
    for key in keys:
        (folder / key).stat()


def look_up(folder: Path, keys: list[str]) -> None:
    index = Index(folder)
    if not all(key in index for key in keys):
        raise ValueError(f"{folder} lacks some")


def read_file(folder: Path, key: str) -> Entry:
    with safe_open(folder / key, "pt") as content:
        features = content.get_tensor("features")
        if str(zlib.crc32(features.numpy().data)) != content.metadata()["checksum"]:
            raise ValueError(f"{key} is damaged")
    return {"features": features}


def read(keys: list[str], one: Callable[[str], Entry | None]) -> None:
    """Make a batch of each 16."""
    for start in range(0, len(keys), BATCH):
        entries: Iterable[Entry | None] = map(one, keys[start : start + BATCH])
        torch.stack([entry["features"] for entry in entries if entry])


if __name__ == "__main__":
    sys.exit(main())
