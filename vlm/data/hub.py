"""Models and datasets on the hub: found or refused in seconds, and taken from the cache if the hub is out of reach."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Literal, TypeVar

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlm.common import RunError, UsageError, did_you_mean, note, one_line
from vlm.data.model_files import MissingFiles, check_file_names, check_model_files

REQUEST_SECONDS = 5
PATIENCE_SECONDS = 8
# Nothing that runs code when it is loaded: no *.py, and no pickles (*.bin, *.pt).
MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]

Kind = Literal["model", "dataset"]
Info = TypeVar("Info", ModelInfo, DatasetInfo)
Result = TypeVar("Result")


def model_folder(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model; a model on the hub is downloaded, or taken from the cache.

    Args:
        name: a folder, or the id of a model on the hub.
        revision: branch, tag or commit on the hub; None: the main branch.

    Returns:
        The folder with config.json and safetensors weights.
        The commit on the hub; None for a folder that was given.

    Raises:
        UsageError: there is no such model, or it cannot be used.
        UsageError: the hub cannot be reached, and the model is not in the cache.
        RunError: the download broke off.
    """
    if looks_like_path(name):
        folder = Path(os.path.expanduser(name))
        if not os.path.isdir(folder):
            found = "a file, not a folder" if os.path.exists(folder) else "no such folder"
            expected = _like_it(folder) or " Expected the folder of a model, such as vlm_results/best_model."
            raise UsageError(f"model {name}: {found}.{expected}")
        check_model_files(folder, name)
        return folder, None
    info, silence = _ask(HfApi().model_info, "model", name, revision)
    if info is not None:
        check_file_names(name, [file.rfilename for file in info.siblings or []])  # before gigabytes are downloaded
    folder = _download(name, revision, silence)
    try:
        check_model_files(folder, name)
    except MissingFiles as error:
        raise _not_cached("model", name, silence) if silence else error from None
    if silence:
        note(f"note: {silence}: using the cached copy of model {name}.")
    return folder, folder.name


def check_dataset_reachable(name: str) -> str | None:
    """Make sure that a dataset can be loaded, from the hub or from the cache.

    Returns:
        The newest commit on the hub; None if the hub cannot be reached and the dataset is taken from the cache.

    Raises:
        UsageError: there is no such dataset.
        UsageError: the hub cannot be reached, and the dataset is not in the cache.
    """
    info, silence = _ask(HfApi().dataset_info, "dataset", name)
    if info is not None:
        return info.sha
    import datasets
    import datasets.config

    datasets.config.HF_HUB_OFFLINE = True  # this library has a switch of its own
    try:
        datasets.load_dataset_builder(name)
    except (ConnectionError, FileNotFoundError) as error:
        raise _not_cached("dataset", name, silence) from error
    except ValueError:
        pass  # the cache has several configurations; the loading says which
    note(f"note: {silence}: using the cached copy of dataset {name}.")
    return None


def looks_like_path(name: str) -> bool:
    """Whether a name means a local file or folder, not an id on the hub (which is `name` or `owner/name`)."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or os.path.exists(name)


def _like_it(folder: Path) -> str:
    """What to add to a message about a folder that is not there: the folder whose name is most like it, or nothing."""
    try:
        there = [*folder.parent.iterdir()] if folder.parent.is_dir() else []
        if not there:  # the name above it may be the one that is misspelled
            there = [other / folder.name for other in folder.parent.parent.iterdir()]
        return did_you_mean(str(folder), [str(other) for other in there if other.is_dir()])
    except OSError:
        return ""


def _ask(request: Callable[..., Info], kind: Kind, name: str, revision: str | None = None) -> tuple[Info | None, str]:
    """Ask the hub about a model or dataset.

    If the hub cannot be reached, its library is set offline, so that nothing later in this process waits for it again.

    Returns:
        The answer, or None.
        Why there is no answer; empty if there is one.

    Raises:
        UsageError: the hub has no such model or dataset.
    """
    if is_offline_mode():
        return None, "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
    try:
        return within(PATIENCE_SECONDS, lambda: request(name, revision=revision, timeout=REQUEST_SECONDS)), ""
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _refused(kind, name, revision, error) from error
    except Exception as error:  # each version of the library has other exceptions if the network does not work
        constants.HF_HUB_OFFLINE = True
        return None, f"the hub cannot be reached at {constants.ENDPOINT} ({one_line(error)})"


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of `call`.

    The timeout of a request itself is not enough: it begins again with each address, and does not count the look-up
    of the name.

    Raises:
        TimeoutError: the call takes longer; it goes on in a thread of its own.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds} seconds") from error


def _download(name: str, revision: str | None, silence: str) -> Path:
    """The snapshot of a model; from the cache only, if `silence` says why the hub does not answer."""
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=["*/*"], local_files_only=bool(silence)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _refused("model", name, revision, error) from error
    except LocalEntryNotFoundError as error:
        if silence:
            raise _not_cached("model", name, silence) from error
        raise _broken_off(name, error) from error
    except Exception as error:
        raise _broken_off(name, error) from error
    return Path(folder)


def _refused(kind: Kind, name: str, revision: str | None, error: Exception) -> UsageError:
    if isinstance(error, GatedRepoError):
        return UsageError(
            f"{kind} {name}: access must be asked for on its page on the hub; then log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(
            f"{kind} {name}: no revision {revision} on the hub. Expected a branch, a tag or a whole commit hash."
        )
    if isinstance(error, RepositoryNotFoundError):
        if kind == "model" and (folder := _like_it(Path(name))):
            return UsageError(f"model {name}: no such folder.{folder}")
        return UsageError(
            f"{kind} {name}: not on the hub, not a folder here, or private. "
            "Check the spelling. If it is private, log in with `hf auth login`."
        )
    return UsageError(f"{kind} {name}: no local folder, and not a valid name on the hub. Expected owner/name.")


def _not_cached(kind: Kind, name: str, silence: str) -> UsageError:
    if folder := _like_it(Path(name)):
        return UsageError(f"{kind} {name}: no such folder.{folder}")
    return UsageError(
        f"{kind} {name}: no local folder, {silence}, and the cache has no complete copy.\n"
        "       Without the hub, give a model and a dataset in folders (--model, --dataset), or try --demo."
    )


def _broken_off(name: str, error: Exception) -> RunError:
    return RunError(
        f"model {name}: the download broke off ({one_line(error)}). Run the command again: the download goes on."
    )
