"""What goes wrong in a run: it is killed at a file operation, or the disk has no room.

Installed in the process of the run, so the program knows nothing of it.
"""

import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.common import folders

AUDITED = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.link": "link",
    "shutil.rmtree": "rmtree",
}
# All of them, in the order in which the table shows them. A write is cut short by the system.
OPERATIONS = (*AUDITED.values(), "fsync", "exchange", "write")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """Counts the file operations of a run, and kills the process before one of them.

    Args:
        output: its output folder. The feature cache lies next to it; operations elsewhere are not counted.
        kind, number: the operation that never happens; None counts only.
    """

    def __init__(self, output: Path, kind: str | None = None, number: int = 0) -> None:
        self.folder, self.kind, self.number = str(output.parent), kind, number
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._audit)
        os.fsync = self._watched("fsync", os.fsync)
        folders.exchange = self._watched("exchange", folders.exchange)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = AUDITED.get(event)
        if kind is None or (kind == "open" and not self._is_write(arguments)):
            return
        if self._is_inside(arguments[0], arguments[-1]):
            self._happens(kind)

    def _is_write(self, arguments: tuple[Any, ...]) -> bool:
        return isinstance(arguments[2], int) and bool(arguments[2] & WRITES)

    def _is_inside(self, path: Any, folder: Any) -> bool:
        if isinstance(path, int):
            return False
        path = os.fsdecode(path)
        if not os.path.isabs(path) and isinstance(folder, int) and folder > 2:  # shutil.rmtree works in open folders
            try:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            except OSError:
                return False
        return path.startswith(self.folder)

    def _watched(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self._happens(kind)
            return original(*arguments)

        return operation

    def _happens(self, kind: str) -> None:
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(size: int) -> None:
    """Kill the process in the middle of the write by which a file becomes larger than this, in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_room(size: int) -> None:
    """Let every write fail by which a file becomes larger than this, in bytes; needs no right to mount."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
