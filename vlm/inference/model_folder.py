"""The model folder: weights, processor and metadata, written whole and loadable without this program."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.common import UsageError, write_folder, write_json
from vlm.config import BEST_MODEL, DEMO_MODEL, METADATA
from vlm.families import Family


def save_model_folder(
    folder: Path, family: Family, weights: dict[str, Tensor], metadata: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write a model folder: all that inference needs, and loadable without this program.

    Args:
        folder: replaced as a whole.
        family: gives configuration and processor.
        weights: the weights by the names that transformers knows, LoRA merged.
        metadata: the content of `training_metadata.json`.
        dtype: the number format of the weights.

    Raises:
        RunError: the folder cannot be written.
    """

    def write(new: Path) -> None:
        family.save(new, weights, dtype)
        write_json(new / METADATA, metadata)

    write_folder(folder, write)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata in a model folder or next to it.

    Raises:
        UsageError: there is none, it is not readable, or the file next to the folder belongs to a model that was
            trained from this one.
    """
    for path in (folder / METADATA, folder.parent / METADATA):
        if path.is_file():
            try:
                metadata = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{path} is not readable ({error}). It is written by train_vlm.py with the model."
                ) from error
            if not isinstance(metadata, dict) or not {"class_names", "prompts"} <= metadata.keys():
                raise UsageError(f"{path} names no classes and prompts: it was not written by train_vlm.py.")
            if path.parent != folder and _is_where_it_started(folder, metadata):
                raise UsageError(f"{folder} is the model before the training: take {folder.parent / BEST_MODEL}.")
            if (folder / BEST_MODEL).is_dir():
                raise UsageError(f"{folder} is the folder of a run: its model is {folder / BEST_MODEL}.")
            return metadata
    raise UsageError(
        f"no {METADATA} in {folder} or next to it: --model-dir takes a folder such as vlm_results/best_model."
    )


def _is_where_it_started(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether a folder is the untrained model of the run that the metadata next to it belongs to."""
    return folder.name == DEMO_MODEL or Path(str(metadata.get("model"))).expanduser().resolve() == folder.resolve()
