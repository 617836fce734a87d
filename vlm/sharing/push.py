"""A model folder -> the hub: the model, its card and metadata, in one commit. Never data."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import RepositoryNotFoundError

from vlm.common import CHECKSUMS, RunError, UsageError, note, one_line, read_checksums, write_checksums, write_json
from vlm.config import ADAPTER_FOLDER, METADATA, MODEL_CARD
from vlm.data import again, check_model_files, fault_of_id, read_object, trouble_of, within
from vlm.sharing.card import model_card, renamed

FLAG = "--push-to-hub"
OF_AN_EMPTY_ONE = {".gitattributes", MODEL_CARD}
ENDINGS = (".json", ".txt", ".model", ".jinja", ".safetensors")
TEXTS = {"class_names", "prompts", "plain_prompt", "origin"}  # keys of the metadata whose values are no paths
PATIENCE_SECONDS = 35  # for one question


def check_push(repo: str, public: bool) -> ModelInfo | None:
    """Check that a model can be pushed under a name, before hours are spent on it. Nothing is changed on the hub.

    Args:
        repo: owner/name.
        public: whether everybody may see it.

    Returns:
        What the hub says about the repository; None if there is none yet.

    Raises:
        UsageError: no valid name, no token, or the hub refuses it.
        UsageError: the name has a repository that this program has not made, or a public one and `public` is False.
        RunError: the hub cannot be reached or fails.
    """
    fault = fault_of_id(repo) or ("" if repo.count("/") == 1 else "There is no owner in it.")
    if fault:
        expected = "Expected owner/name, your name or organization on the hub and a new name"
        raise UsageError(f"{FLAG} {repo or ascii(repo)}: {fault} {expected}.")
    if is_offline_mode():
        raise UsageError(f"{FLAG} {repo}: HF_HUB_OFFLINE is set. Unset it, or push later.")
    if get_token() is None:
        raise UsageError(f"{FLAG} {repo}: you are not logged in. Run `hf auth login`, or set HF_TOKEN.")
    _check_owner(repo, _ask(repo, lambda: HfApi().whoami()))
    try:
        info = _ask(repo, lambda: HfApi().model_info(repo))
    except RepositoryNotFoundError:
        return None
    files = {file.rfilename for file in info.siblings or []}
    if METADATA not in files and files - OF_AN_EMPTY_ONE:
        raise UsageError(
            f"{FLAG} {repo}: there is a repository of this name with other files, such as "
            f"{min(files - OF_AN_EMPTY_ONE)}, which this program has not written. Choose another name."
        )
    if not info.private and not public:
        raise UsageError(f"{FLAG} {repo}: this repository is public. Add --public, or choose another name.")
    return info


def _check_owner(repo: str, account: dict[str, Any]) -> None:
    """Raises UsageError if the token cannot write there, as far as the hub says."""
    names = [account.get("name"), *(one.get("name") for one in account.get("orgs") or [])]
    if repo.partition("/")[0] not in names:
        known = ", ".join(str(name) for name in names if name)
        raise UsageError(f"{FLAG} {repo}: your token is that of {known}. Give one of these names before the /.")
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UsageError(f"{FLAG} {repo}: your token may only read. Log in with one that may write (`hf auth login`).")


def push_model(folder: Path, metadata: dict[str, Any], repo: str, public: bool) -> str:
    """Upload a model folder in one commit.

    Uploaded is what this program has written into the folder; of the paths in its metadata only the last names. Files
    of an earlier push that are not written again are deleted.

    Args:
        folder: a model folder.
        metadata: its metadata, which may lie next to it.
        repo, public: see `check_push`.

    Returns:
        The address of its page.

    Raises:
        UsageError: see `check_push`, or the folder holds no model.
        RunError: the upload failed.
    """
    check_model_files(folder)
    info = check_push(repo, public)
    with _shared(folder, metadata, repo) as shared:
        paths = {path.relative_to(shared).as_posix(): path for path in shared.rglob("*") if path.is_file()}
        note(f"pushing {len(paths)} files to {repo} ({'public' if public else 'private'}).")
        try:
            api = HfApi()
            api.create_repo(repo, private=not public, exist_ok=True)
            stale = _earlier_files(info) - paths.keys() if info else set()
            operations = [CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
            api.create_commit(
                repo,
                [*operations, *(CommitOperationDelete(name) for name in sorted(stale))],
                commit_message="Upload a model trained with vlm-classification",
                parent_commit=info.sha if info else None,
            )
        except (UsageError, RunError):
            raise
        except Exception as error:  # each version of the library has other exceptions
            raise RunError(f"{FLAG} {repo}: the upload failed ({_reason(error)}).") from error
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _shared(folder: Path, metadata: dict[str, Any], repo: str) -> Iterator[Path]:
    """A folder with what is uploaded: links to the weights, and what is changed in other files."""
    own = read_checksums(folder)
    names = [name for name in own or (path.name for path in folder.iterdir()) if name.endswith(ENDINGS)]
    changed = {METADATA, CHECKSUMS, MODEL_CARD, f"{ADAPTER_FOLDER}/adapter_config.json"}
    with tempfile.TemporaryDirectory() as temporary:
        shared = Path(temporary)
        for name in names:
            if (folder / name).is_file():
                _check_place(folder, folder / name)
                (shared / name).parent.mkdir(exist_ok=True)
                if name not in changed:
                    os.symlink((folder / name).resolve(), shared / name)
                elif name.startswith(ADAPTER_FOLDER):
                    write_json(shared / name, _public(read_object(folder / name)))
        write_json(shared / METADATA, _public(metadata))
        _card_for(folder, metadata, repo).save(shared / MODEL_CARD)
        write_checksums(shared, {name: value for name, value in own.items() if name not in changed})
        yield shared


def _check_place(folder: Path, file: Path) -> None:
    """Raises UsageError if a file lies elsewhere: a folder from somebody else could name any file of this machine."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{FLAG}: {file} is a link to {file.resolve()}, outside of the model's folder. Remove it.")


def _card_for(folder: Path, metadata: dict[str, Any], repo: str) -> ModelCard:
    """The card of the folder, with the name of the repository in it; one is made for a folder of an earlier version."""
    if (folder / MODEL_CARD).is_file():
        card = ModelCard.load(folder / MODEL_CARD, ignore_metadata_errors=True)
        if card.data.get("model_name"):
            card.data.model_name = repo.partition("/")[2]
        card.text = renamed(card.text, repo)
        return card
    return model_card(metadata, name=repo, adapter=(folder / ADAPTER_FOLDER).is_dir())


def _public(value: Any) -> Any:
    """A part of the metadata in which paths of this machine are only the last name."""
    if isinstance(value, dict):
        return {key: part if key in TEXTS else _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def _earlier_files(info: ModelInfo) -> set[str]:
    """The files that an earlier push has written."""
    there = {file.rfilename for file in info.siblings or []}
    if CHECKSUMS not in there:
        return set()
    path = hf_hub_download(info.id, CHECKSUMS, revision=info.sha)
    return there & set(read_checksums(Path(path).parent))


def _ask(repo: str, call: Any) -> Any:
    """The hub's answer. Raises RepositoryNotFoundError, and for other troubles UsageError or RunError."""
    try:
        return again(lambda: within(PATIENCE_SECONDS, call), lambda trouble: trouble.passing and bool(trouble.status))
    except RepositoryNotFoundError:
        raise
    except Exception as error:
        trouble = trouble_of(error)
        if trouble and trouble.status in (401, 403):
            raise UsageError(
                f"{FLAG} {repo}: the hub refuses your token ({trouble.status}). Log in again with `hf auth login`."
            ) from error
        raise RunError(f"{FLAG} {repo}: {_reason(error)}. Try again later, or leave out {FLAG}.") from error


def _reason(error: Exception) -> str:
    trouble = trouble_of(error)
    return trouble.what if trouble else one_line(error)
