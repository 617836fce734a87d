"""One run at a time in an output folder. Imported before torch, so it needs no package."""

import errno
import fcntl
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from vlm.common import UsageError, note, printable, reason
from vlm.config import LOCK

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what flock answers if another program has the lock
TRIES, SECONDS_BETWEEN = 4, 0.1  # `check_unlocked` has the lock for a moment too
_held: set[int] = set()  # descriptors of the locks of this process


class Holder(NamedTuple):
    """Who has a lock, or had it when it was killed. started: local time."""

    process: int
    host: str
    started: str

    def __str__(self) -> str:
        where = "on this machine" if self.host == platform.node() else f"on {printable(self.host)}"
        return f"process {self.process} {where}, since {printable(self.started)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that exists. The system releases the lock if the process dies.

    Raises:
        UsageError: another run works in the folder, or the lock cannot be made.
    """
    descriptor = _take(folder / LOCK)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        me = Holder(os.getpid(), platform.node(), datetime.now().isoformat(" ", "seconds"))
        os.pwrite(descriptor, json.dumps(me._asdict()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Check that no run works in a folder. Nothing is written.

    Raises:
        UsageError: one does.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        _check_regular(folder / LOCK, descriptor)
        _lock(folder, descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """The descriptor of the lock, which this process has from now on."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({reason(error)}): choose another --output-dir.") from error
        try:
            _check_regular(path, descriptor)
            before = _lock(path.parent, descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                if before:
                    note(f"note: a run in {path.parent} was killed ({before}); its lock is taken over.")
                return descriptor
        os.close(descriptor)  # the run that had it has ended and deleted it meanwhile


def _check_regular(path: Path, descriptor: int) -> None:
    """Refuse what is no file. `O_NONBLOCK` keeps a pipe from waiting until somebody writes into it."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UsageError(f"{path} is not a file: delete it, or choose another --output-dir.")


def _lock(folder: Path, descriptor: int, kind: int) -> Holder | None:
    """Lock an open file; returns who was killed while it had the lock.

    Raises:
        UsageError: another run has it, on this machine or on another one that shares the folder.
    """
    supported = True
    for _ in range(TRIES):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except OSError as error:
            supported = error.errno in HELD
            if not supported:  # a file system without locks: only what is written in the file counts
                break
        time.sleep(SECONDS_BETWEEN)
    else:
        who = _read(descriptor) or "another process"
        raise UsageError(f"{folder} is in use by {who}: wait until it ends, or choose another --output-dir.")
    holder = _read(descriptor)
    if holder and holder.host != platform.node():  # a network drive does not always pass on locks
        raise UsageError(
            f"{folder} is in use by {holder}: wait until it ends, or choose another --output-dir. If it was killed, "
            f"delete {folder / LOCK}."
        )
    if holder and not supported and _is_running(holder.process):
        raise UsageError(f"{folder} is in use by {holder}: wait until it ends, or delete {folder / LOCK}.")
    return holder


def _read(descriptor: int) -> Holder | None:
    """What the file says; None if it is empty or damaged."""
    try:
        found = json.loads(os.pread(descriptor, 10_000, 0))
        return Holder(int(found["process"]), str(found["host"]), str(found["started"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _close_all() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# Processes that prepare images outlive a run that is killed by some seconds: they must not have its lock.
os.register_at_fork(after_in_child=_close_all)
