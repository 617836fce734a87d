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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from filelock import FileLock

from vlm.common import Bar, UsageError, brief, cache_folder, listed, note, printable, reason
from vlm.data.finding import is_hidden
from vlm.data.sources.foreign import AGAIN

ZIP = (".zip",)
TAR = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
MOST_FILES = 10_000_000
# Images and tables do not become smaller by more than this; the largest factor of deflate is 1,032.
MOST_TIMES_LARGER = 200
SMALL = 100 * 10**6  # bytes that are unpacked however much smaller the archive is
ROOM_LEFT = 500 * 10**6  # bytes of the disk that stay free
DAYS_KEPT = 30  # since an unpacked archive was last used
CHUNK = 1 << 20
ARCHIVES = "archives"  # the folder in that of the caches
PART = ".part"  # of the name of a folder that is being filled
COUNT = ".count"  # how many files an unpacked folder has
UTF8_NAME = 0x800  # the flag of names in UTF-8 in a zip file


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


def is_unpacked(folder: Path) -> bool:
    """Whether a folder has what was in an archive."""
    return folder.resolve().is_relative_to((cache_folder() / ARCHIVES).resolve())


def has_any(archive: Path, names: Collection[str]) -> bool:
    """Whether an archive has a file of one of these names, with or without the ending.

    Raises:
        UsageError: it cannot be read.
    """
    with _members(archive) as members:
        return any(member.path.name in names or member.path.stem in names for member in members)


def stem_of(archive: Path) -> str:
    """The name of an archive without its ending."""
    name = archive.name
    ending = max((end for end in ZIP + TAR if name.lower().endswith(end)), key=len)
    return name[: -len(ending)] or "archive"


def unpacked(archives: Mapping[Path, Path], others: Sequence[Path] = ()) -> Path:
    """The folder with the content of some archives.

    Args:
        archives: the place of the content of each, relative to that folder. Not in the folder itself, what an archive
            holds is without a folder of the archive's name around it.
        others: files next to them, such as tables, which are copied there.

    Raises:
        UsageError: an archive cannot be read, is encrypted, or would not fit.
    """
    root = cache_folder() / ARCHIVES
    folder = root / _stamp([*archives, *others])
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one process unpacks, the others wait
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _drop_unused(root)
                _fill(folder, archives, others)
                what = "is" if len(archives) == 1 else "are"
                note(f"note: {listed((path.name for path in archives), 3)} {what} unpacked in {folder}.")
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
            days = 1 if path.suffix == PART else DAYS_KEPT
            if time.time() - path.stat().st_mtime > 24 * 3600 * days and path.is_dir():
                shutil.rmtree(path)


def _is_whole(folder: Path) -> bool:
    """Whether an archive is unpacked in a folder, and no file was deleted since."""
    try:
        return int((folder / COUNT).read_text()) == _count(folder) - 1
    except (OSError, ValueError):
        return False


def _count(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def _fill(folder: Path, archives: Mapping[Path, Path], others: Sequence[Path]) -> None:
    part = folder.with_suffix(PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for archive, place in archives.items():
            _unpack(archive, part / place, stem_of(archive) if place.parts else None)
        for path in others:
            shutil.copy2(path, part / path.name)
        (part / COUNT).write_text(str(_count(part)))
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _unpack(archive: Path, folder: Path, wrapper: str | None) -> None:
    """Unpack an archive into a folder; without the folder of this name that holds everything in it, if there is one."""
    with _members(archive) as members:
        total = sum(member.size for member in members)
        _check_room(archive, total)
        if any(member.path.parts[0] != wrapper or len(member.path.parts) < 2 for member in members):
            wrapper = None
        with Bar(total, f"unpacking {printable(archive.name)}", unit="bytes") as bar:
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


def _check_size(archive: Path, total: int, count: int) -> None:
    size = archive.stat().st_size
    if total > max(SMALL, MOST_TIMES_LARGER * size) or count > MOST_FILES:
        raise UsageError(
            f"{archive}: at least {count:,} files of {total / 1e9:.1f} GB, {total / max(size, 1):,.0f} times as large "
            "as the archive, which images cannot be. Unpack it yourself if you trust it, and give the folder."
        )


def _check_room(archive: Path, total: int) -> None:
    place = cache_folder()
    free = shutil.disk_usage(place).free - ROOM_LEFT
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
    except (UsageError, MemoryError):
        raise
    except NotImplementedError as error:
        raise UsageError(f"{archive} is not read here ({reason(error)}). Unpack it, and give the folder.") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{archive} has several files of one name, or a file and a folder. Unpack it, and give the folder."
        ) from error
    except Exception as error:  # zipfile, tarfile and the decompressors each have their own
        if isinstance(error, OSError) and error.errno:  # those of decompressors have no number
            raise
        raise UsageError(f"{archive} is damaged ({_fault(error)}). {AGAIN}") from error


def _fault(error: Exception) -> str:
    """What is wrong with an archive, in a few words. tarfile lists what each decompressor says to a file."""
    return "no tar file" if "file could not be opened successfully" in str(error) else reason(error)


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
            yield _name_in_zip(info), what, info.file_size, partial(zipped.open, info)


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """The name of a file. macOS writes UTF-8 without saying so, which zipfile takes for the code page 437."""
    with suppress(UnicodeError):
        if not info.flag_bits & UTF8_NAME:
            return info.filename.encode("cp437").decode()
    return info.filename


def whole_tar(tar: Any, size: int | None, keep: bool = True) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, which has to be whole: Python's reader takes a cut or a damaged header for its end.

    Args:
        tar: opened for reading.
        size: of the file in bytes; None if it is compressed, where a cut is found by itself.
        keep: members for later reading.

    Raises:
        ReadError: it was cut off, or is damaged.
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
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


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
    total = 0
    for count, (name, what, size, read) in enumerate(found, 1):
        total += size
        _check_size(archive, total, count)
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
