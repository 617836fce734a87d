"""What a job that did not end has left, and whether this command may go on with it."""

import glob
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm.common import UsageError, note, printable, read_json
from vlm.inference.records import AGAIN
from vlm.inference.writing import about_file, lock_file

PART = re.compile(r"\.part\d*")
SHARE = re.compile(r"\.\d+of(\d+)\.(csv|jsonl)(\.part)?")


def parts_of(target: Path) -> list[Path]:
    """The files that rows of a file were written to by jobs that did not end, the newest last."""
    found = [path for path in _beside(target) if PART.fullmatch(path.name.removeprefix(target.name))]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def share_of(output: Path, number: int, size: int, ending: str) -> Path:
    """The file in which a process collects its rows. number: from 0."""
    return output.with_name(f"{output.name}.{number + 1}of{size}{ending}")


def check_processes(output: Path, size: int) -> None:
    """Check that no other number of processes has begun the same file.

    Raises:
        UsageError: one has.
    """
    for path in _beside(output):
        match = SHARE.fullmatch(path.name.removeprefix(output.name))
        if match and int(match[1]) != size:
            raise UsageError(
                f"{path} is of a job that did not end, by {match[1]} process{'es' if match[1] != '1' else ''}, and now "
                f"there {'are' if size > 1 else 'is'} {size}. Start it with VLM_PROCESSES={match[1]} and --resume, or "
                f"delete the files {output.name}.*of{match[1]}.*"
            )


def shares_of(output: Path) -> list[Path]:
    """The shares of a job that did not end, or has not ended yet."""
    return [path for path in _beside(output) if SHARE.fullmatch(path.name.removeprefix(output.name))]


def check_no_writer(paths: Iterable[Path]) -> None:
    """Check that no other process writes any of these files.

    Raises:
        UsageError: one does.
    """
    for path in paths:
        with path.open("rb") as file:
            lock_file(path, file.fileno())


def refuse_or_leave(left: list[Path], is_share: bool) -> None:
    """What becomes of the files that an earlier job has left, if this one does not go on with them.

    Raises:
        UsageError: they are shares, of which there can be only one.
    """
    if left and is_share:
        raise UsageError(
            f"{left[-1]} has rows of a job that did not end. Add --resume to go on, or delete it to start again."
        )
    if left and not _has_writer(left[-1]):
        note(f"note: {printable(str(left[-1]))} has rows of a job that did not end; --resume would go on with it.")


def _has_writer(path: Path) -> bool:
    try:
        check_no_writer([path])
    except UsageError:
        return True
    return False


class MadeBy(NamedTuple):
    """What the rows of a file depend on besides the images.

    names: what must be the same if a job is gone on with, by its name in messages; batch_size: images in one forward
    pass, which changes the rounding and is taken over.
    """

    names: Mapping[str, str]
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        """As the file next to the rows has it."""
        return self._asdict()


def read_made_by(part: Path, now: Mapping[str, str]) -> MadeBy | None:
    """What the rows of a file were made by; None if nothing says so.

    Args:
        now: the `names` of this command.

    Raises:
        UsageError: it is not the same.
    """
    path = about_file(part)
    if not path.exists():  # killed before it was written
        return None
    try:
        found = read_json(path, AGAIN)
        before = MadeBy(dict(found["names"]), int(found["batch_size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged. {AGAIN}") from error
    for name in {**now, **before.names}:
        was, given = before.names.get(name), now.get(name)
        if was != given:
            what = "by another model" if name == "the model" else f"with {name} {was}, and now it is {given}"
            raise UsageError(f"{part} was begun {what}. Give the same, or start again without --resume.")
    return before


def _beside(path: Path) -> list[Path]:
    """The files whose names begin with that of a file and go on with a dot."""
    return sorted(other for other in path.parent.glob(f"{glob.escape(path.name)}.*") if other.is_file())
