"""Models and datasets on the hub: whether they can be had, in seconds; from the cache where the hub cannot be
reached."""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlm.common.errors import RunError, UsageError, one_line
from vlm.common.progress import note

REQUEST_SECONDS = 5
PATIENCE_SECONDS = 8
# Nothing that runs code when it is loaded: no *.py, and no pickles (*.bin, *.pt).
MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
NOUNS = {"model": "model", "dataset": "dataset"}


def model_folder(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, downloaded from the hub if need be.

    Args:
        name: a folder, or the id of a model on the hub.
        revision: branch, tag or commit on the hub; None: the main branch.

    Returns:
        The folder with config.json and safetensors weights, and the commit; None for a folder that was given.

    Raises:
        UsageError: there is no such model, it cannot be used, or the hub cannot be reached and the model is not in the
            cache.
        RunError: the download broke off.
    """
    if looks_like_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            found = "a file, not a folder" if folder.exists() else "no such folder"
            raise UsageError(f"model {name}: {found}. Expected the folder of a model, or its id on the hub.")
        _check_folder(name, folder)
        return folder, None
    info, silence = _ask("model", name, revision)
    if info is not None:
        _check_files(name, [file.rfilename for file in info.siblings or []])  # before gigabytes are downloaded
    folder = _download(name, revision, silence)
    try:
        _check_folder(name, folder)
    except UsageError as error:
        raise _not_cached("model", name, silence) if silence else error from None
    if silence:
        note(f"note: {silence}: using the cached copy of model {name}.")
    return folder, folder.name


def check_dataset_reachable(name: str) -> str | None:
    """Make sure that a dataset of the hub can be loaded, from the hub or from the cache.

    Returns:
        The newest commit on the hub; None when the hub cannot be reached and the cached dataset is used.

    Raises:
        UsageError: there is no such dataset, or the hub cannot be reached and the dataset is not in the cache.
    """
    info, silence = _ask("dataset", name)
    if info is not None:
        return info.sha
    import datasets

    datasets.config.HF_HUB_OFFLINE = True  # it keeps a switch of its own
    try:
        datasets.load_dataset_builder(name)
    except (ConnectionError, FileNotFoundError) as error:
        raise _not_cached("dataset", name, silence) from error
    except ValueError:
        pass  # several configurations are in the cache: which one is said later
    note(f"note: {silence}: using the cached copy of dataset {name}.")
    return None


def looks_like_path(name: str) -> bool:
    """Whether a name is meant as a file or folder here, not as an id on the hub (which is `name` or `owner/name`)."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def _ask(kind: str, name: str, revision: str | None = None) -> tuple[Any, str]:
    """What the hub says of a model or dataset, and ""; or None and why it says nothing.

    When it cannot be reached, the hub's library is set offline, so that nothing later in this process waits for it
    again.
    """
    if is_offline_mode():
        return None, "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
    api = HfApi()
    request = api.model_info if kind == "model" else api.dataset_info
    try:
        return _within(PATIENCE_SECONDS, lambda: request(name, revision=revision, timeout=REQUEST_SECONDS)), ""
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _refused(kind, name, revision, error) from error
    except Exception as error:  # each version of the library has other exceptions for a network that does not work
        constants.HF_HUB_OFFLINE = True
        return None, f"the hub cannot be reached at {constants.ENDPOINT} ({one_line(error)})"


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, or TimeoutError. A request's own timeout holds for each address again, and not for the name
    look-up."""
    future: Future = Future()

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
    """The snapshot of a model; from the cache alone if the hub is silent."""
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


def _refused(kind: str, name: str, revision: str | None, error: Exception) -> UsageError:
    noun = NOUNS[kind]
    if isinstance(error, GatedRepoError):
        return UsageError(
            f"{noun} {name}: access must be asked for on its page on the hub; then log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(
            f"{noun} {name}: no revision {revision} on the hub. Expected a branch, a tag or a whole commit hash."
        )
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f"{noun} {name}: not on the hub, not a folder here, or private. "
            "Check the spelling; for a private one log in with `hf auth login`."
        )
    return UsageError(f"{noun} {name}: not a folder here, and not a name that the hub can have. Expected owner/name.")


def _not_cached(kind: str, name: str, silence: str) -> UsageError:
    return UsageError(
        f"there is no folder {name} here, {silence}, and {NOUNS[kind]} {name} is not, or not completely, in the cache.\n"
        "       Without the hub name a model and a dataset in folders (--model, --dataset), or use --demo to try things out."
    )


def _broken_off(name: str, error: Exception) -> RunError:
    return RunError(
        f"model {name}: the download broke off ({one_line(error)}). Run it again: it goes on where it stopped."
    )


def _check_files(name: str, files: list[str]) -> None:
    """Whether the files of a model, by their paths in its folder, are all that can be used.

    Raises:
        UsageError: no config.json, or no weights as safetensors.
    """
    if "config.json" not in files:
        raise UsageError(f"model {name}: no config.json there. Expected a model in the layout of transformers.")
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise UsageError(
            f"model {name}: no weights as *.safetensors there; other formats are not loaded. Choose a model that has them."
        )


def _check_folder(name: str, folder: Path) -> None:
    """Like `_check_files`, and all files that the index of the weights names must be there."""
    _check_files(name, [path.name for path in folder.iterdir()])
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"model {name}: {index.name} is damaged. Copy or download the model again.") from error
    missing = sorted(shard for shard in shards if not (folder / shard).exists())
    if missing:
        raise UsageError(
            f"model {name}: {len(missing)} of {len(shards)} files of weights are missing, such as {missing[0]}. Copy them too."
        )
