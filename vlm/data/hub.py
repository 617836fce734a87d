"""Models and datasets on the hub: found or refused in seconds, and taken from the cache if the hub does not answer."""

import fnmatch
import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from vlm.common import RunError, UsageError, did_you_mean, note, one_line
from vlm.config import DEMO_MODEL, TRAIN_DEMO_MODEL, Settings
from vlm.data.hub_errors import TOO_MANY, Trouble, again, failure, refusal, trouble_of, within
from vlm.data.hub_names import HubName, Kind, hub_name, looks_like_path
from vlm.data.model_files import MissingFiles, check_file_names, check_model_files

REQUEST_SECONDS = 15  # for one answer
PATIENCE_SECONDS = 35  # for all answers to a question: an old name is answered twice
MAIN = "main"
# Nothing that runs code when it is loaded: no *.py, and no pickles (*.bin, *.pt).
MODEL_FILES = ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
# What says how a dataset is to be read, and no data.
CARD_FILES = ("README.md", ".huggingface.yaml", "dataset_infos.json")
NOT_DATA = ("*.py", "*.pyc", "*.ipynb", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.safetensors", "*.md", ".*")

Info = TypeVar("Info", ModelInfo, DatasetInfo)


class NotCached(UsageError):
    """A model or dataset that is not in the cache, and the hub does not answer. It advises somebody who trains.

    Attributes:
        found: without the advice.
    """

    def __init__(self, found: str) -> None:
        self.found = found
        demo = TRAIN_DEMO_MODEL.format(folder=f"{Settings.output_dir}/{DEMO_MODEL}")
        super().__init__(
            f"{found}\n       Without the hub, give folders to --model and --dataset. If you have no model, run --demo "
            f"once, then give {demo}"
        )


def model_folder(
    name: str, revision: str | None = None, needed: Mapping[str, str] | None = None
) -> tuple[Path, str | None]:
    """The folder of a model; a model on the hub is downloaded, or taken from the cache.

    Args:
        name: a folder, or a model on the hub as `hub_name` understands it.
        revision: branch, tag or commit on the hub; None: the one in the name, or the main branch.
        needed: further files that a model on the hub must have, and what to say if it has not.

    Returns:
        The folder with config.json and safetensors weights.
        The commit on the hub; None for a folder that was given.

    Raises:
        UsageError: there is no such model, or it cannot be used.
        UsageError: the hub cannot be reached, and the model is not in the cache.
        RunError: the hub fails, or the download broke off.
    """
    if looks_like_path(name):
        folder = Path(os.path.expanduser(name))
        if not os.path.isdir(folder):
            found = "a file, not a folder" if os.path.exists(folder) else "no such folder"
            expected = _like_it(folder) or " Expected the folder of a model, such as vlm_results/best_model."
            raise UsageError(f"model {name}: {found}.{expected}")
        check_model_files(folder, name)
        return folder, None
    asked = hub_name(name, "model")
    asked = asked if revision is None else asked._replace(revision=revision)
    info, silence = _ask(HfApi().model_info, "model", asked)
    if info is not None:
        files = [file.rfilename for file in info.siblings or []]
        check_file_names(name, files, needed)  # before gigabytes are downloaded
        asked = asked._replace(id=_new_id("model", asked.id, info.id))
    try:
        folder = _snapshot("model", asked, MODEL_FILES, silence, ignored=["*/*"])
        check_model_files(folder, name)
    except MissingFiles as error:
        raise _not_cached("model", name, silence) if silence else error from None
    if silence:
        note(f"note: {silence.what}: using the cached copy of model {name}.")
    return folder, folder.name


@dataclass
class HubDataset:
    """A dataset on the hub or in its cache.

    name: as the user wrote it; asked: its id and revision; files: the paths of its files;
    silence: why the hub does not answer; None if it does;
    folder: where the files are that were fetched; None before the first ones.
    """

    name: str
    asked: HubName
    files: list[str]
    silence: Trouble | None
    folder: Path | None = None
    commit_there: str | None = None

    @property
    def id(self) -> str:
        return self.asked.id

    @property
    def commit(self) -> str:
        """The commit that is read."""
        return self.folder.name if self.folder else self.commit_there or MAIN

    def fetch(self, files: Iterable[str]) -> Path:
        """Download some files, unless they are in the cache.

        Returns:
            The folder in which they have their paths.

        Raises:
            UsageError: access is refused; or without the hub, not all of them are in the cache.
            RunError: the download failed.
        """
        wanted = list(files)
        patterns = [glob.escape(file) for file in wanted]
        asked = self.asked if self.folder is None else self.asked._replace(revision=self.folder.name)
        self.folder = _snapshot("dataset", asked, patterns, self.silence, name=self.name)
        if missing := [file for file in wanted if not (self.folder / file).exists()]:
            raise _not_cached("dataset", self.name, self.silence, f" (missing: {missing[0]})")
        return self.folder

    def cached(self, files: Iterable[str]) -> bool:
        """Whether all of these files are in the cache."""
        return self.folder is not None and all((self.folder / file).exists() for file in files)

    def data_files(self) -> list[str]:
        """The paths of all files that may be data: no code, no pickles, no hidden files."""
        return [
            file
            for file in self.files
            if not any(fnmatch.fnmatch(part.lower(), wrong) for part in file.split("/") for wrong in NOT_DATA)
        ]


def find_dataset(name: str) -> HubDataset:
    """Make sure that a dataset can be loaded, from the hub or from the cache, and get what says how to read it.

    Args:
        name: as `hub_name` understands it.

    Raises:
        UsageError: there is no such dataset, or access is refused.
        UsageError: the hub cannot be reached, and the dataset is not in the cache.
        RunError: the hub fails.
    """
    asked = hub_name(name, "dataset")
    info, silence = _ask(HfApi().dataset_info, "dataset", asked)
    if info is not None:
        asked = asked._replace(id=_new_id("dataset", asked.id, info.id))
        found = HubDataset(name, asked, [file.rfilename for file in info.siblings or []], None, None, info.sha)
        if card := [file for file in CARD_FILES if file in found.files]:
            found.fetch(card)
        return found
    assert silence is not None, "else there is an answer"
    asked = asked._replace(id=_id_in_cache(asked.id))
    folder = _snapshot("dataset", asked, [CARD_FILES[0]], silence, name=name)
    note(f"note: {silence.what}: using the cached copy of dataset {asked.id}.")
    return HubDataset(name, asked, _files_in_cache(asked, folder), silence, folder)


def _ask(request: Callable[..., Info], kind: Kind, asked: HubName) -> tuple[Info | None, Trouble | None]:
    """Ask the hub about a model or dataset.

    Returns:
        The answer, or None.
        Why there is no answer, or None.

    Raises:
        UsageError: the hub has no such model or dataset.
    """
    if is_offline_mode():
        return None, Trouble("HF_HUB_OFFLINE is set")

    def call() -> Info:
        return within(PATIENCE_SECONDS, lambda: request(asked.id, revision=asked.revision, timeout=REQUEST_SECONDS))

    try:
        return again(call, lambda trouble: trouble.passing and trouble.status is not None), None
    except Exception as error:  # each version of the library has other exceptions if the network does not work
        if refused := refusal(kind, asked.id, asked.revision, error):
            raise _with_folder(kind, asked.id, refused) from error
        trouble = trouble_of(error)
        return None, trouble or Trouble(f"the hub cannot be reached at {constants.ENDPOINT} ({one_line(error)})")


def _snapshot(
    kind: Kind,
    asked: HubName,
    patterns: Sequence[str],
    silence: Trouble | None,
    *,
    name: str | None = None,
    ignored: list[str] | None = None,
) -> Path:
    """The folder with some files of a repository; from the cache only, if `silence` says why there is no answer."""
    name = name or asked.id
    more: dict[str, Any] = {"ignore_patterns": ignored, "local_files_only": silence is not None}

    def download() -> str:
        return snapshot_download(
            asked.id,
            repo_type=kind,
            revision=asked.revision,
            allow_patterns=list(patterns),
            etag_timeout=REQUEST_SECONDS,
            **more,
        )

    try:
        return Path(again(download))
    except Exception as error:
        if silence and isinstance(error, LocalEntryNotFoundError):
            raise _not_cached(kind, name, silence) from error
        if refused := refusal(kind, name, asked.revision, error):
            raise refused from error
        raise failure(kind, name, error) or RunError(
            f"{kind} {name}: the download broke off ({one_line(error)}). Run the command again: the download goes on."
        ) from error


def _new_id(kind: Kind, asked: str, answered: str) -> str:
    """The id that the hub answers with, which is another one if the repository was renamed."""
    if answered.lower() != asked.lower():
        note(f"note: {kind} {asked} is called {answered} on the hub now.")
    return answered


def _id_in_cache(id: str) -> str:
    """The id of a dataset in the cache. A name without an owner is that of the only dataset there with this name."""
    if "/" in id:
        return id
    found = list(Path(constants.HF_HUB_CACHE).glob(f"datasets--*--{glob.escape(id)}"))
    return f"{found[0].name.split('--')[1]}/{id}" if len(found) == 1 else id


def _files_in_cache(asked: HubName, folder: Path) -> list[str]:
    """The files of a dataset, as listed when it was downloaded; if that is not known, those that are there."""
    try:
        from huggingface_hub import get_cached_repo_tree  # of newer versions of the library

        entries = get_cached_repo_tree(asked.id, repo_type="dataset", revision=folder.name)
        return sorted(entry.path for entry in entries)
    except Exception:  # whatever an unknown format of the list may raise
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _like_it(folder: Path) -> str:
    """What to add to a message about a folder that is not there: the folder whose name is most like it, or nothing."""
    try:
        there = [*folder.parent.iterdir()] if folder.parent.is_dir() else []
        if not there:  # the name above it may be the one that is misspelled
            there = [other / folder.name for other in folder.parent.parent.iterdir()]
        return did_you_mean(str(folder), [str(other) for other in there if other.is_dir()])
    except OSError:
        return ""


def _with_folder(kind: Kind, name: str, refused: UsageError) -> UsageError:
    """What the hub says about a name, unless a folder here has nearly the same one."""
    if "not on the hub" in str(refused) and (folder := _like_it(Path(name))):
        return UsageError(f"{kind} {name}: no such folder.{folder}")
    return refused


def _not_cached(kind: Kind, name: str, silence: Trouble | None, which: str = "") -> UsageError | RunError:
    if folder := _like_it(Path(name)):
        return UsageError(f"{kind} {name}: no such folder.{folder}")
    what = silence.what if silence else "the hub has other files than it lists"
    if silence and silence.status is not None:
        cure = "Wait some minutes, or log in with `hf auth login`" if silence.status == TOO_MANY else "Try again later"
        return RunError(f"{kind} {name}: {what}, and the cache has no complete copy{which}. {cure}.")
    return NotCached(f"{kind} {name}: no local folder, {what}, and the cache has no complete copy{which}.")
