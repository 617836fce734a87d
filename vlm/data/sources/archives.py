"""Archives (.zip, .tar and compressed ones): unpacked once into the cache folder, and read as the folder they hold.

An archive may be made by anybody: nothing is written outside of its folder, links and devices are left out, and what
would not fit onto the disk, or is far larger than its archive, is not unpacked.
"""

import hashlib
import os
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from filelock import FileLock

from vlm.common import Bar, UsageError, brief, cache_folder, listed, note, printable, reason
from vlm.data.finding import is_hidden
from vlm.data.sources.rows import role_of

ZIP = (".zip",)
TAR = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
MOST_FILES = 10_000_000
# Images and tables do not become smaller by more than this; the largest factor of deflate is 1,032.
MOST_TIMES_LARGER = 200
SMALL = 100 * 10**6  # bytes that are unpacked however much smaller the archive is
ROOM_LEFT = 500 * 10**6  # bytes of the disk that stay free
DAYS_KEPT = 30  # since an unpacked archive was last used
CHUNK = 1 << 20


class Member(NamedTuple):
    """A file in an archive. path: its place, checked; size: bytes; open: reads it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


# Of a file in an archive: its name there, what it is, its size in bytes, and what opens it.
Found = tuple[str, str, int, Callable[[], IO[bytes]]]


def is_archive(path: Path) -> bool:
    """Whether a file is an archive that can be unpacked, by its ending."""
    return path.name.lower().endswith(ZIP + TAR)


def unpacked(archives: Sequence[Path], others: Sequence[Path] = ()) -> Path:
    """The folder with the content of some archives: each in a folder of its name if there are several.

    Args:
        others: files next to them, such as tables, which are copied there.

    Raises:
        UsageError: an archive cannot be read, is encrypted, or would not fit.
    """
    root = cache_folder() / "archives"
    folder = root / _stamp([*archives, *others])
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one process unpacks, the others wait
            if not folder.is_dir():
                _drop_unused(root)
                _fill(folder, archives, others)
            os.utime(folder)
    except OSError as error:
        raise UsageError(
            f"{listed(map(str, archives), 3)} cannot be unpacked into {root} ({reason(error)}). Make room or set "
            "VLM_CACHE to another folder, or unpack it yourself and give the folder."
        ) from error
    return folder


def _stamp(files: Sequence[Path]) -> str:
    """A name for files as they are now."""
    about = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _drop_unused(root: Path) -> None:
    """Delete what no run has used for long, and what killed runs have left."""
    for path in root.iterdir():
        with suppress(OSError):
            # A half unpacked folder may be one that another process works on.
            days = 1 if path.name.endswith(".part") else DAYS_KEPT
            if time.time() - path.stat().st_mtime > 24 * 3600 * days and path.is_dir():
                shutil.rmtree(path)


def _fill(folder: Path, archives: Sequence[Path], others: Sequence[Path]) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _unpack_all(part, archives, others)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    note(f"note: {listed((str(path) for path in archives), 3)} is unpacked in {folder}.")


def _unpack_all(part: Path, archives: Sequence[Path], others: Sequence[Path]) -> None:
    for archive in archives:
        alone = len(archives) == 1 and not others and not role_of(_stem(archive))
        _unpack(archive, part if alone else part / _stem(archive), unwrap=not alone)
    for path in others:
        shutil.copy2(path, part / path.name)


def _stem(archive: Path) -> str:
    name = archive.name
    ending = max((end for end in ZIP + TAR if name.lower().endswith(end)), key=len)
    return name[: -len(ending)] or "archive"


def _unpack(archive: Path, folder: Path, unwrap: bool) -> None:
    """Unpack an archive into a folder; without the only folder in it that holds everything, if `unwrap`."""
    with _members(archive) as members:
        wrapper = _wrapper(members) if unwrap else None
        total = sum(member.size for member in members)
        _check_size(archive, total, len(members), folder.parent)
        with Bar(total, f"unpacking {printable(archive.name)}") as bar:
            for member in members:
                path = member.path.relative_to(wrapper) if wrapper else member.path
                _write(member, folder.joinpath(*path.parts))
                bar.update(member.size)


def _write(member: Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, target.open("xb") as file:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise ValueError(f"{brief(str(member.path))} is larger than its archive says")
            file.write(chunk)


def _wrapper(members: Sequence[Member]) -> str | None:
    """The only folder at the top of an archive, if all files are in it."""
    tops = {member.path.parts[0] for member in members if len(member.path.parts) > 1}
    return tops.pop() if len(tops) == 1 and all(len(member.path.parts) > 1 for member in members) else None


def _check_size(archive: Path, total: int, count: int, place: Path) -> None:
    if total > max(SMALL, MOST_TIMES_LARGER * archive.stat().st_size) or count > MOST_FILES:
        raise UsageError(
            f"{archive}: {count:,} files of {total / 1e9:.1f} GB, {total / archive.stat().st_size:,.0f} times as large "
            "as the archive, which images cannot be. Unpack it yourself if you trust it, and give the folder."
        )
    free = shutil.disk_usage(place if place.exists() else place.parent).free - ROOM_LEFT
    if total > free:
        raise UsageError(
            f"{archive}: {total / 1e9:.1f} GB unpacked, and {place} has room for {max(0, free) / 1e9:.1f} GB. "
            "Make room, or set VLM_CACHE to a folder on another disk."
        )


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Turn what damaged archives raise into one line."""
    try:
        yield
    except (UsageError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, tarfile and the decompressors each have their own
        raise UsageError(f"{archive} is damaged ({reason(error)}). Copy or download it again.") from error


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    """The files of an archive that may be unpacked; what is left out is said."""
    with _damage_named(archive):
        if archive.name.lower().endswith(ZIP):
            with zipfile.ZipFile(archive) as zipped:
                yield _checked(archive, _of_zip(archive, zipped))
        else:
            size = archive.stat().st_size if archive.name.lower().endswith(".tar") else None
            with tarfile.open(archive) as tar:
                yield _checked(archive, _of_tar(tar, size))


def _of_zip(archive: Path, zipped: zipfile.ZipFile) -> Iterator[Found]:
    for info in zipped.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.flag_bits & 1:
            raise UsageError(f"{archive} is encrypted. Unpack it with its password, and give the folder.")
        if not info.is_dir():
            what = "file" if kind in (0, stat.S_IFREG) else "link or device"
            yield info.filename, what, info.file_size, partial(zipped.open, info)


def whole_tar(tar: Any, size: int | None, keep: bool = True) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, which has to be whole: Python's reader takes one that was cut off for its end.

    Args:
        tar: opened for reading.
        size: of the file in bytes; None if it is compressed, where a cut is found by itself.
        keep: members for later reading.

    Raises:
        ReadError: it was cut off.
    """
    end = 0
    while (info := tar.next()) is not None:
        end = info.offset_data + (-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if info.isreg() else 0)
        if size is not None and end > size:
            break
        if not keep:
            tar.members = []
        yield info
    if size is not None and end + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("it ends too early, as if it was cut off")


def _open_in_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "it is a regular file"
    return file


def _of_tar(tar: tarfile.TarFile, size: int | None) -> Iterator[Found]:
    for info in whole_tar(tar, size):
        if not info.isdir():
            what = "file" if info.isreg() else "link or device"
            yield info.name, what, info.size, partial(_open_in_tar, tar, info)


def _checked(archive: Path, found: Iterator[Found]) -> list[Member]:
    members: dict[PurePosixPath, Member] = {}
    left_out: list[str] = []
    for name, what, size, read in found:
        path = PurePosixPath(name.replace("\\", "/"))
        parts = [part for part in path.parts if part != "."]
        outside = path.is_absolute() or ".." in parts or (":" in name and os.name == "nt") or "\0" in name
        if what != "file" or outside:
            left_out.append(f"{brief(printable(name))} ({'outside of the archive' if outside else what})")
            continue
        if not parts or any(map(is_hidden, parts)):
            continue
        members[PurePosixPath(*parts)] = Member(PurePosixPath(*parts), size, read)  # of equal names the last counts
    if left_out:
        note(f"warning: {archive}: {len(left_out):,} files are not unpacked: {listed(left_out, 3)}.")
    if not members:
        raise UsageError(f"{archive} has no files that can be unpacked.")
    return list(members.values())
