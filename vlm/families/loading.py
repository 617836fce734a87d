"""Which family a folder or a configuration belongs to, and loading it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlm.common import CHECKSUMS, UsageError, check_checksums, printable
from vlm.config import METADATA, MODEL_CARD
from vlm.data import check_model_files
from vlm.families.base import Family
from vlm.families.configuration import build_config, read_config
from vlm.families.generic import GenericFamily
from vlm.families.idefics3 import Idefics3Family
from vlm.families.phi3.family import Phi3VisionFamily
from vlm.families.qwen2_vl import Qwen2VLFamily, Qwen25VLFamily

CURE = f"Copy the folder again or train again. If you changed the file on purpose, delete {CHECKSUMS} next to it."
FAMILIES: tuple[type[Family], ...] = (Idefics3Family, Qwen2VLFamily, Qwen25VLFamily, Phi3VisionFamily)


def load_family(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    images: Mapping[str, Any] | None = None,
    bits: int | None = None,
) -> Family:
    """Load model and processor from a local folder.

    Args:
        images: how images are processed, by the names of the settings. A training run passes the settings that were
            given (`{}` if none were). The family's `image_defaults` are used for the others, whatever the folder says:
            published folders are made for documents and ask for thousands of tokens. The processor that is saved with
            the model holds these values. Inference passes None, which keeps them.
        bits: 4 or 8 for a quantized language model (see vlm/families/quantization.py).

    Raises:
        UsageError: the folder holds no model that this program can train, a file that is not as it was written, or a
            model that needs code of its own.
        UsageError: one of the image options belongs to another family.
    """
    if device.type == "cpu":
        # torch's attention on a CPU lets query heads share keys and values; with a mask, no other device does.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    check_checksums(folder, CURE, movable=METADATA, editable=MODEL_CARD)
    check_model_files(folder)
    model_type = read_config(folder)["model_type"]
    family = _family_of(model_type)
    if family is GenericFamily:
        _check_model_type(folder, model_type)
    return family.load(folder, dtype, device, bits=bits, **_image_options(family, images))


def outline(config: Mapping[str, Any]) -> Family:
    """The family of the model that a config.json describes, without weights or processor (see `Family.outline`)."""
    family = _family_of(config["model_type"])
    return family.outline(build_config(config, "config.json"))


def _family_of(model_type: str) -> type[Family]:
    return next((family for family in FAMILIES if model_type in family.model_types), GenericFamily)


def _image_options(family: type[Family], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of `load_processor`. Raises UsageError for an option that belongs to another family."""
    if given is None:
        return {}
    for name in given:
        if name not in family.image_defaults:
            owners = " and ".join(other.title for other in FAMILIES if name in other.image_defaults)
            known = ", ".join(_flag(option) for option in family.image_defaults)
            raise UsageError(f"{_flag(name)} is for {owners}: leave it out{f', or use {known}' if known else ''}.")
    return {**family.image_defaults, **given}


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _check_model_type(folder: Path, model_type: str) -> None:
    """Raises UsageError unless transformers knows an image-text-to-text model of this type."""
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"the model in {folder} ({model_type}) reads text only: choose an image-text-to-text model, "
            "see --list-models."
        )
    raise UsageError(
        f"the model in {folder} is of type {printable(model_type)}, which transformers {transformers.__version__} does "
        "not know as an image-text-to-text model. Code that comes with a model is never run here: choose another, see "
        "--list-models, or a newer transformers."
    )
