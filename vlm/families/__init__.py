"""One file per architecture. Every question about an architecture is answered in this folder and nowhere else."""

import json
from pathlib import Path

import torch

from vlm.errors import UsageError
from vlm.families.base import Family
from vlm.families.idefics3 import Idefics3Family

FAMILIES: tuple[type[Family], ...] = (Idefics3Family,)


def load_family(folder: Path, dtype: torch.dtype, device: torch.device) -> Family:
    """Load model and processor from a local folder.

    Raises:
        UsageError: the folder holds no model that this program can train.
    """
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no readable config.json ({error}).") from error
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.load(folder, dtype, device)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UsageError(f"the model in {folder} is of type {model_type}; this version trains {known} (SmolVLM-Instruct of every size).")
