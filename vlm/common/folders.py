"""Folders that are written whole or not at all, and read while another program may replace them."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vlm.common.checksums import CHECKSUMS, read_checksums, write_checksums
from vlm.common.errors import UsageError
from vlm.common.files import sync, writing

Result = TypeVar("Result")
# Per system: the function of the C library that exchanges two names in one step, what comes before each of the two
# paths, and its flag (AT_FDCWD and RENAME_EXCHANGE; RENAME_SWAP).
EXCHANGE = {"linux": ("renameat2", (-100,), 2), "darwin": ("renamex_np", (), 2)}
TRIES = 5  # to read a folder that is replaced again and again


def write_folder(
    folder: Path,
    write: Callable[[Path], None],
    previous: Path | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Fill a new folder, then put it in the place of the old one, so that a reader always finds a whole one.

    It is filled under the name NAME.new, gets checksums, and is on the disk before both are exchanged. If the system
    cannot exchange them in one step, the old one has the name NAME.old for a moment (`existing` finds it).

    Args:
        folder: what is replaced.
        write: fills the new folder, whose path it is given.
        previous: where the replaced folder is kept, in the place of the one that was kept before; None deletes it.
        known: checksums of files in it that need not be computed.

    Raises:
        WriteError: it cannot be written. The old one is unharmed.
    """
    new = folder.with_name(folder.name + ".new")
    with writing(folder):
        for place in (folder, previous or folder):
            recover(place)
        remove(new)
        try:
            new.mkdir(parents=True)
            write(new)
            usual_modes(new)
            write_checksums(new, known or {})
            _carry_over(folder, new)
            for path in (*new.rglob("*"), new):
                sync(path)
            replaced = _put(new, folder)
        except BaseException:
            with suppress(OSError):  # what is half written would only take room
                remove(new)
            raise
        if replaced and previous is not None:
            replaced = _put(new, previous)
        if replaced:
            remove(new)


def files_of_others(folder: Path) -> list[str]:
    """The visible files in a folder that its `CHECKSUMS` do not name; none if that has none or is damaged.

    Without them it is unknown who wrote a file. They are damaged, too, if they name a file that is not there: a bit
    that flipped in a name must not make a file of our own one of somebody else's.
    """
    try:
        own = read_checksums(folder)
    except (UsageError, OSError):
        return []
    if not own or not all((folder / name).exists() for name in own):
        return []
    folders = {name.partition("/")[0] for name in own if "/" in name}
    inside = {path.relative_to(folder).as_posix() for name in folders for path in (folder / name).rglob("*")}
    names = inside | {path.name for path in folder.iterdir()} - folders
    return sorted(name for name in names if name not in own and name != CHECKSUMS and not name.startswith("."))


def _carry_over(folder: Path, new: Path) -> None:
    """Copy what others have put into a folder that is replaced."""
    for name in files_of_others(folder) if folder.is_dir() else []:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, new / name, symlinks=True, dirs_exist_ok=True)
        elif not (new / name).exists():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copy2(folder / name, new / name, follow_symlinks=False)


def existing(folder: Path) -> Path:
    """Where the content of a folder is: in it or, while `write_folder` replaces it or was killed in it, in NAME.old."""
    if folder.exists():  # as . and / do, which have no name
        return folder
    old = _old(folder)
    return old if old.is_dir() else folder


def recover(folder: Path) -> None:
    """Undo what a killed `write_folder` left. Only for those who may write the folder; others read `existing`."""
    source = existing(folder)
    if source != folder:
        os.replace(source, folder)


def read_folder(folder: Path, read: Callable[[Path], Result]) -> Result:
    """Read a folder that may be replaced meanwhile: all that is read belongs together.

    Args:
        read: reads the folder whose path it is given; called again if that was replaced.
    """
    for _ in range(TRIES - 1):
        source = existing(folder)
        before = _identity(source)
        try:
            result = read(source)
        except Exception:
            if before == _identity(existing(folder)):
                raise
            continue
        if before == _identity(existing(folder)):
            return result
    return read(existing(folder))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def usual_modes(folder: Path) -> None:
    """Give the files of a folder the user's usual mode: safetensors writes them readable by their owner only."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _put(new: Path, folder: Path) -> bool:
    """Put `new` in the place of `folder`; returns whether there was one before, which is `new` now."""
    replaced = os.path.lexists(folder)
    if not replaced:
        os.rename(new, folder)
    elif not exchange(new, folder):
        old = _old(folder)
        remove(old)
        os.rename(folder, old)
        os.rename(new, folder)
        os.rename(old, new)
    sync(folder.parent)
    return replaced


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot."""
    if sys.platform not in EXCHANGE:
        return False
    name, at, flag = EXCHANGE[sys.platform]
    function = getattr(ctypes.CDLL(None), name, None)
    return function is not None and function(*at, os.fsencode(one), *at, os.fsencode(other), flag) == 0


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        about = folder.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns
