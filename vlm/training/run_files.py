"""Which files of an output folder belong to the run in it: only those are ever deleted or moved.

A run that overwrites another one sets its files aside when it begins, and deletes them when it has a model. A folder
is always in one of these states, and each step to another one is a single renaming, so that `settle` can tell after
a crash which run has to be kept:

    no .previous_run*       the files are those of the newest run
    .previous_run.moving    some of the files of a run are in there, the others still outside; there is no newer run
    .previous_run           all of the files of the earlier run; those outside are of a newer one
    .previous_run.deleted   files that nobody needs

Imported before torch, so it needs no package.
"""

import itertools
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from vlm.common import UsageError, files_of_others, note, read_json, write_json
from vlm.config import (
    BEST_MODEL,
    DEMO_IMAGES,
    DEMO_MODEL,
    FINAL_MODEL,
    FOLDERS,
    LOG,
    MANIFEST,
    METADATA,
    PREDICTIONS,
    PREVIOUS_RUN,
    PREVIOUS_STATE,
    RESULTS,
    STATE,
    WRITTEN,
)

NEW_DEMO_MODEL = f".{DEMO_MODEL}.new"  # until the run begins
MOVING, DELETED = f"{PREVIOUS_RUN}.moving", f"{PREVIOUS_RUN}.deleted"
AT_THE_END = (
    *(name for name in WRITTEN if name not in (*FOLDERS, METADATA, LOG)),
    DEMO_IMAGES,
    "demo_pictures",
    PREDICTIONS,
)
FOLD = re.compile(r"fold_[1-9][0-9]{0,3}")  # the folder of a fold, which is that of a run
# What trackers write into their folders, which may hold other files too.
TRACKED = {
    "tensorboard": ("events.out.tfevents.*", "[0-9]*.[0-9]*"),
    "wandb": ("run-*", "offline-run-*", "latest-run", "debug*.log"),
    "trackio": ("*.db*", "*.lock", "*.parquet", "media"),
    "mlflow": ("mlflow.db*", "artifacts"),
}


def files_of_run(output: Path) -> list[str]:
    """The files and folders of the run in an output folder, by names relative to it; none if there is no run.

    Raises:
        UsageError: the manifest of the run is damaged.
    """
    if (output / MANIFEST).is_file():
        listed = _read_manifest(output)["files"]
        names = [name for name in listed if isinstance(name, str) and _may_be_written(output, name)]
    elif (output / METADATA).is_file():  # a run of a version without manifests
        names = [*WRITTEN, *_tracked(output)]
    else:
        return []
    # What a run leaves that is killed while it replaces a folder.
    names += [name + end for name in names if name in FOLDERS for end in (".new", ".old")]
    return [name for name in dict.fromkeys(names) if os.path.lexists(output / name)]


def folds_of(output: Path) -> list[Path]:
    """The folders of the folds of the cross-validation in an output folder; none of any other run."""
    return [output / name for name in files_of_run(output) if FOLD.fullmatch(name) and _is_folder(output / name)]


def foreign_files(output: Path, written: Sequence[str] = WRITTEN) -> list[str]:
    """What no run of this program has written, but a run would overwrite that writes files of these names."""
    own = files_of_run(output)
    return [name for name in written if name not in own and os.path.lexists(output / name)]


def files_of_others_in_folders(output: Path) -> list[str]:
    """What is in the folders of a run but was not written by it, as far as that is known, such as best_model/a.txt."""
    found = [f"{name}/{file}" for name in FOLDERS for file in files_of_others(output / name)]
    for name in (DEMO_IMAGES, "demo_pictures"):
        inside = (output / name).iterdir() if _is_folder(output / name) else ()
        found += [f"{name}/{path.name}" for path in inside if not fnmatchcase(path.name, "digit_[0-9]*.png")]
    for fold in folds_of(output):
        own = files_of_run(fold)
        names = [path.name for path in fold.iterdir() if path.name not in TRACKED] + _children(fold, TRACKED)
        others = [name for name in names if name not in own] + files_of_others_in_folders(fold)
        found += [f"{fold.name}/{name}" for name in others]
    return sorted(name for name in found if not name.rpartition("/")[2].startswith("."))


def is_unsettled(output: Path) -> bool:
    """Whether a run was killed and left something that `settle` cleans up."""
    left = any(os.path.lexists(output / name) for name in (PREVIOUS_RUN, MOVING, DELETED, NEW_DEMO_MODEL))
    return left or _never_began(output)


def begin(output: Path, resume: bool, overwrite: bool, names: Sequence[str] = WRITTEN) -> None:
    """The run begins: an earlier run is set aside, and what the new one writes is its own from now on.

    Call it after everything that could be wrong was checked, and before the run writes anything but `NEW_DEMO_MODEL`.

    Args:
        names: what the run writes, see `written_by`.
    """
    if overwrite:
        if _is_folder(output / PREVIOUS_RUN):  # the run that is overwritten never had a model
            _put_back(output)
        _set_aside(output)
    own = files_of_run(output) if resume else []
    if resume:
        (output / RESULTS).unlink(missing_ok=True)  # of a run that goes on after its time limit: it is not finished
    written = [name for name in names if name not in AT_THE_END or name in own]
    _write_manifest(output, written, [name for name in _tracked(output) if name not in own])
    if (output / NEW_DEMO_MODEL).exists():
        _remove(output, [DEMO_MODEL])
        os.replace(output / NEW_DEMO_MODEL, output / DEMO_MODEL)


def list_tracked(output: Path) -> None:
    """Add what trackers have written since to the manifest of the run."""
    if (output / MANIFEST).is_file():
        manifest = _read_manifest(output)
        written = [name for name in manifest["files"] if "/" not in name and _may_be_written(output, name)]
        _write_manifest(output, written, manifest["not_ours"])


def claim_results(output: Path, names: Sequence[str] = WRITTEN) -> None:
    """The run is about to write what it writes at its end. Files of that name that it has not written are renamed.

    Args:
        names: see `begin`.
    """
    if not (output / MANIFEST).is_file():
        return
    manifest = _read_manifest(output)
    for name in AT_THE_END:
        if name in names and name not in manifest["files"] and os.path.lexists(output / name):
            kept = next(f"{name}.{n}" for n in itertools.count(1) if not os.path.lexists(output / f"{name}.{n}"))
            os.rename(output / name, output / kept)
            note(f"{output / name} was not written by this run: it is called {kept} now.")
    _write_manifest(output, list(names), manifest["not_ours"])


def drop_previous(output: Path) -> None:
    """The run has a model: delete the run that it overwrites."""
    if _is_folder(output / PREVIOUS_RUN):
        _remove(output, [DELETED])
        os.replace(output / PREVIOUS_RUN, output / DELETED)
    _remove(output, [DELETED])


def settle(output: Path) -> None:
    """Clean up after a run that was killed or failed: no run is lost, and none that never began is left.

    An earlier run is put back unless the run that overwrites it has a model, or a state to resume from.
    """
    _remove(output, [DELETED, NEW_DEMO_MODEL])
    if _is_folder(output / MOVING):
        _move_back(output)
    if not _is_folder(output / PREVIOUS_RUN):
        if _never_began(output):
            _remove(output, [*files_of_run(output), MANIFEST])
    elif any(_is_folder(run / BEST_MODEL) for run in (output, *folds_of(output))):
        drop_previous(output)
    elif not (output / METADATA).is_file() or not any(map(_is_folder, _states(output))):
        _put_back(output)
        note(f"The earlier run in {output} is back: the one that was to overwrite it ended before it had a model.")


def _states(output: Path) -> list[Path]:
    names = (STATE, f"{STATE}.old", PREVIOUS_STATE)
    return [run / name for run in (output, *folds_of(output)) for name in names]


def _never_began(output: Path) -> bool:
    there = os.path.lexists(output / METADATA) or has_work(output)
    return (output / MANIFEST).is_file() and not there


def has_work(output: Path) -> bool:
    """Whether a run has left a model, a state or results, even if its metadata are gone."""
    names = (BEST_MODEL, FINAL_MODEL, STATE, PREVIOUS_STATE, RESULTS)
    return any(os.path.lexists(run / name) for run in (output, *folds_of(output)) for name in names)


def _set_aside(output: Path) -> None:
    names = files_of_run(output)
    if not names:
        return
    (output / MOVING).mkdir()
    _move([*names, MANIFEST], output, output / MOVING)
    os.replace(output / MOVING, output / PREVIOUS_RUN)


def _put_back(output: Path) -> None:
    """Delete the files of the newer run, and move those of the earlier one back."""
    newer = files_of_run(output)
    _remove(output, sorted(newer, key=lambda name: name != METADATA))  # first: without it, the rest is no run
    _remove(output, [MANIFEST])
    os.replace(output / PREVIOUS_RUN, output / MOVING)
    _move_back(output)


def _move_back(output: Path) -> None:
    moving = output / MOVING
    names = [path.name for path in moving.iterdir() if path.name not in TRACKED]
    _move([*names, *_children(moving, TRACKED)], moving, output)
    with suppress(OSError):  # not empty: somebody has put a file of the same name into the output folder
        moving.rmdir()


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if os.path.lexists(source / name) and not os.path.lexists(target / name):
            (target / name).parent.mkdir(exist_ok=True)
            os.rename(source / name, target / name)
    _remove_empty(source)


def _remove(output: Path, names: Iterable[str]) -> None:
    for name in names:
        path = output / name
        if _is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    _remove_empty(output)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove_empty(folder: Path) -> None:
    """Remove the folders of trackers that have become empty."""
    for name in TRACKED:
        with suppress(OSError):
            (folder / name).rmdir()


def _tracked(output: Path) -> list[str]:
    """What trackers have written into their folders, by names such as wandb/run-1."""
    return [name for name in _children(output, TRACKED) if _may_be_written(output, name)]


def _children(folder: Path, names: Iterable[str]) -> list[str]:
    return sorted(
        f"{name}/{path.name}" for name in names if (folder / name).is_dir() for path in (folder / name).iterdir()
    )


def _may_be_written(output: Path, name: str) -> bool:
    """Whether a run may write a file of this name: manifests that somebody else has made cannot name other files."""
    tracker, _, inner = name.partition("/")
    if not inner:
        return name in WRITTEN or name == PREDICTIONS or FOLD.fullmatch(name) is not None
    fits = any(fnmatchcase(inner, pattern) for pattern in TRACKED.get(tracker, ()))
    return fits and "/" not in inner and not (output / tracker).is_symlink()


def _write_manifest(output: Path, written: list[str], not_ours: list[str]) -> None:
    """List what a run writes.

    Args:
        written: names as of `written_by`. not_ours: what was in the folders of trackers before.
    """
    files = [*written, *(name for name in _tracked(output) if name not in not_ours)]
    write_json(output / MANIFEST, {"files": files, "not_ours": not_ours})


def _read_manifest(output: Path) -> dict[str, list[str]]:
    path = output / MANIFEST
    cure = "Delete it: the files of the run are then those that this program usually writes."
    found = read_json(path, cure)
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in ("files", "not_ours")):
        raise UsageError(f"{path} does not list the files of a run. {cure}")
    return found
