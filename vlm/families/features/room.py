"""The size of the cache: what is deleted to make room."""

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DAY = 24 * 3600.0


class _Unused(NamedTuple):
    """A file that no run has used for a day; sorted, the longest unused come first."""

    used: float
    size: int
    file: Path


def make_room(folder: Path, wanted: float, limit_gb: float) -> float:
    """Make a model's folder, and room for new files in the cache.

    A file that any run has read or looked up within the last day is never deleted. Of the other files, in this folder
    or another model's, the longest unused go first, and only as many as needed. None goes if that would not be enough.
    Two runs that write at the same time do not see each other's plans. They may exceed the limit together by what the
    smaller one writes.

    Args:
        folder: the features of one model; its parent holds those of all models.
        wanted: bytes to be written.
        limit_gb: the largest size of all features, in 10^9 bytes.

    Returns:
        the bytes that may be written; fewer than `wanted` if there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    used, unused = _look_around(folder.parent, now)
    room = limit_gb * 1e9 - used - sum(each.size for each in unused)
    if room < wanted <= limit_gb * 1e9 - used:
        for each in sorted(unused):
            if room >= wanted:
                break
            each.file.unlink(missing_ok=True)
            room += each.size
    for other in folder.parent.iterdir():
        with suppress(OSError):  # not empty, or another run was faster
            if other != folder and now - other.stat().st_mtime > DAY:
                other.rmdir()
    return room


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
