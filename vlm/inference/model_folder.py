"""The model folder: weights, processor and metadata, written whole and loadable without this program."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.classifier import Head
from vlm.common import UsageError, existing, note, read_checksums, read_json, write_folder, write_json
from vlm.config import (
    ADAPTER_FOLDER,
    BEST_MODEL,
    DEMO_MODEL,
    FINAL_MODEL,
    HEAD_FILE,
    LAYOUTS,
    METADATA,
    MODEL_CARD,
    PREVIOUS_RUN,
    fold_folder,
    read_settings,
)
from vlm.conversation import Prompts
from vlm.data import NotCached, looks_like_path, model_folder
from vlm.families import Family
from vlm.sharing import model_card

WEIGHTS = ".safetensors"
WRITTEN_BY_US = "Expected a model that train_vlm.py --push-to-hub has put there."
OBJECTS = ("settings", "texts", "dataset", "origin", "validation", "versions")  # JSON objects, if they are there
WRITTEN_BY = "It is written by train_vlm.py with the model: copy both again, or train again."


def save_model_folder(
    folder: Path,
    family: Family,
    weights: dict[str, Tensor],
    metadata: dict[str, Any],
    dtype: torch.dtype,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a model folder: all that inference needs, loadable without this program, and a card of a model that is not
    tested.

    Args:
        folder: replaced as a whole.
        family: gives configuration and processor.
        weights: the weights by the names that transformers knows, LoRA merged.
        metadata: the content of `training_metadata.json`.
        dtype: the number format of the weights.
        write_more: writes further files into the folder whose path it is given.

    Raises:
        WriteError: the folder cannot be written.
    """

    def write(new: Path) -> None:
        family.save(new, weights, dtype)
        write_json(new / METADATA, metadata)
        if write_more:
            write_more(new)
        model_card(metadata, name=folder.name, adapter=(new / ADAPTER_FOLDER).is_dir()).save(new / MODEL_CARD)

    write_folder(folder, write)


def update_metadata(
    folder: Path,
    metadata: dict[str, Any],
    results: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
    head: Head | None = None,
) -> None:
    """Give a model folder other metadata, and its card what is known of the model now. The folder is replaced, so that
    files and checksums change together.

    Args:
        results, warnings: see `model_card`.
        head: put this one into the folder; else one that is there stays.

    Raises:
        WriteError: the folder cannot be written.
    """

    def write(new: Path) -> None:
        others = shutil.ignore_patterns(*changed)
        shutil.copytree(folder, new, ignore=others, copy_function=_link, dirs_exist_ok=True)
        write_json(new / METADATA, metadata)
        if head:
            head.save(new / HEAD_FILE)
        adapter = (new / ADAPTER_FOLDER).is_dir()
        model_card(metadata, results, warnings, folder.name, adapter).save(new / MODEL_CARD)

    changed = {METADATA, MODEL_CARD} | ({HEAD_FILE, Path(HEAD_FILE).name} if head else set())
    known = {name: value for name, value in read_checksums(folder).items() if name not in changed}
    write_folder(folder, write, known=known)


def _link(source: str, target: str) -> None:
    """The same file under a second name or, if the file system has no such links, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def find_model_folder(model_dir: str | Path) -> Path:
    """The folder of a trained model; one on the hub is downloaded, or taken from the cache.

    Args:
        model_dir: a folder, or owner/name on the hub.

    Raises:
        UsageError: there is none, or the one on the hub was not trained by this program.
        RunError: the hub fails.
    """
    if not str(model_dir).strip():
        raise UsageError('--model-dir "": expected the folder of a trained model, such as vlm_results/best_model.')
    folder = Path(model_dir).expanduser()
    if existing(folder).is_dir():
        return folder
    previous = folder.parent / PREVIOUS_RUN / folder.name
    if previous.is_dir():
        raise UsageError(
            f"{folder} is not there: the run that overwrites it has no model yet. The model of the run before is "
            f"{previous}."
        )
    name = str(model_dir)
    if "/" in name and not looks_like_path(name) and folder.name not in (BEST_MODEL, FINAL_MODEL):
        try:
            return model_folder(name, needed={METADATA: WRITTEN_BY_US})[0]
        except NotCached as error:
            raise UsageError(f"{error.found} Give --model-dir the folder of a model that you have trained.") from None
    raise UsageError(
        f"{folder} is not a folder: train a model first (./run_vlm_training.sh --demo), or name its folder."
    )


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata in a model folder or next to it.

    Raises:
        UsageError: there is none, it is damaged, or the file next to the folder belongs to a model that was trained
            from this one.
    """
    path = _metadata_file(folder)
    if not path.is_file():
        raise UsageError(
            f"no {METADATA} in {folder} or next to it: --model-dir takes a folder such as vlm_results/best_model."
        )
    metadata = read_json(path, WRITTEN_BY)
    if isinstance(metadata, dict) and "cross_validation" in metadata:
        raise UsageError(
            f"{folder} is the folder of a cross-validation, which has no model of its own: train one on all images, or "
            f"take that of a fold, such as {folder / fold_folder(1) / BEST_MODEL}."
        )
    if not isinstance(metadata, dict) or not {"class_names", "prompts"} <= metadata.keys():
        raise UsageError(f"{path} names no classes and prompts: it was not written by train_vlm.py.")
    wrong = [name for name in OBJECTS if not isinstance(metadata.get(name), dict | None)]
    if not isinstance(metadata.get("train_images"), str | None):
        wrong.append("train_images")
    if wrong:
        raise UsageError(f"{path} is damaged: its {wrong[0]} cannot be read. {WRITTEN_BY}")
    if path.parent != folder and _is_where_it_started(folder, metadata):
        raise UsageError(f"{folder} is the model before the training: take {folder.parent / BEST_MODEL}.")
    if (folder / BEST_MODEL).is_dir():
        raise UsageError(f"{folder} is the folder of a run: its model is {folder / BEST_MODEL}.")
    return metadata


def model_identity(folder: Path, metadata: dict[str, Any]) -> str:
    """A digest that another model has not: of the checksums of the weights, and of the metadata."""
    weights = {name: value for name, value in read_checksums(folder).items() if name.endswith(WEIGHTS)}
    return hashlib.sha256(json.dumps([weights, metadata], sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(folder: Path, metadata: dict[str, Any]) -> Prompts:
    """The prompts in the metadata of a folder.

    Raises:
        UsageError: a value is missing or of another kind.
    """
    try:
        prompts = Prompts.from_json(metadata["prompts"])
        texts = (prompts.system, prompts.question, prompts.response_format, *prompts.responses)
        names = (*prompts.class_names, *prompts.readable_names)
        whole = all(isinstance(text, str) for text in (*texts, *names)) and isinstance(prompts.reasoning_tokens, int)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    whole = whole and prompts.response_format in LAYOUTS
    whole = whole and all(len(set(some)) == len(some) for some in (prompts.class_names, prompts.shown_names))
    whole = whole and len(prompts.responses) == len(prompts.shown_names) == len(prompts.class_names) > 0
    if not whole or list(prompts.class_names) != metadata["class_names"]:
        raise UsageError(f"{_metadata_file(folder)} is damaged: its classes and prompts cannot be read. {WRITTEN_BY}")
    return prompts


def trained_with(folder: Path) -> tuple[Prompts, dict[str, Any]] | None:
    """What the model in a folder was trained with, if this program trained it: its prompts, and the settings that they
    were built from (`Settings.texts`). None if it did not, or if that cannot be read, which a note says."""
    if not _metadata_file(folder).is_file():
        return None
    try:
        metadata = read_metadata(folder)
        prompts = read_prompts(folder, metadata)
        settings = read_settings({**metadata.get("settings", {}), **metadata.get("texts", {})})
    except (UsageError, TypeError) as error:
        if (folder / METADATA).is_file():  # a file next to the folder may be about another model
            note(f"note: the prompts that the model was trained with are not used: {error}")
        return None
    return prompts, settings.texts | {"response_format": prompts.response_format}


def _metadata_file(folder: Path) -> Path:
    inside = folder / METADATA
    return inside if inside.is_file() else folder.parent / METADATA


def _is_where_it_started(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether a folder is the untrained model of the run that the metadata next to it belongs to."""
    return folder.name == DEMO_MODEL or Path(str(metadata.get("model"))).expanduser().resolve() == folder.resolve()
