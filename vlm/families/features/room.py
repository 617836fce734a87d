"""The size of the cache: what is deleted to make room, and how much there is."""

import math
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DAY = 24 * 3600.0
# Of the disk, what features leave for models and checkpoints: so many bytes, or this share of a smaller disk.
LEFT_FREE, SHARE_LEFT_FREE = 7e9, 0.05


class Room(NamedTuple):
    """How much may be written.

    free: bytes; all_gb: a `limit_gb` with which there would be room for all that was wanted, a whole number;
    disk_gb: what is free on the disk, in 10^9 bytes, if that is less than the limit allows.
    """

    free: float
    all_gb: int
    disk_gb: float | None


class _Unused(NamedTuple):
    """A file that no run has used for a day; sorted, the longest unused come first."""

    used: float
    size: int
    file: Path


def make_room(folder: Path, wanted: float, limit_gb: float) -> Room:
    """Make a model's folder, and room for new files in the cache, as far as that is possible.

    A file that any run has read or looked up within the last day is never deleted. Of the other files, in this folder
    or another model's, the longest unused go first, and only as many as needed. Two runs that write at the same time do
    not see each other's plans. They may exceed the limit together by what the smaller one writes.

    Args:
        folder: the features of one model; its parent holds those of all models.
        wanted: bytes to be written.
        limit_gb: the largest size of all features, in 10^9 bytes.

    Raises:
        OSError: the folder cannot be made or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    used, unused = _look_around(folder.parent, now)
    disk = shutil.disk_usage(folder)
    by_limit = limit_gb * 1e9 - used - sum(each.size for each in unused)
    by_disk = disk.free - min(LEFT_FREE, SHARE_LEFT_FREE * disk.total)
    freed = 0
    for each in sorted(unused):
        if min(by_limit, by_disk) + freed >= wanted:
            break
        each.file.unlink(missing_ok=True)
        freed += each.size
    for other in folder.parent.iterdir():
        with suppress(OSError):  # not empty, or another run was faster
            if other != folder and now - other.stat().st_mtime > DAY:
                other.rmdir()
    free = max(0.0, min(by_limit, by_disk) + freed)
    return Room(free, math.ceil((used + wanted) / 1e9), (disk.free + freed) / 1e9 if by_disk < by_limit else None)


def _look_around(root: Path, now: float) -> tuple[int, list[_Unused]]:
    """The bytes of files that were used within the last day, and the other files.

    Deletes what a killed run left half written, after a day.
    """
    used, unused = 0, []
    for file in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another run was faster
            about = file.stat()
            if now - about.st_mtime <= DAY:
                used += about.st_size
            elif file.suffix == ".tmp":
                file.unlink()
            else:
                unused.append(_Unused(about.st_mtime, about.st_size, file))
    return used, unused
