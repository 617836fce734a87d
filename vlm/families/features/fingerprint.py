"""A name for the way in which features were computed."""

import hashlib
import json
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm.families.base import Family

FORMAT = 6  # of the files; with another one the features are computed again
# In a configuration.
CHANGES_NOTHING = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


def fingerprint(family: Family, connected: bool, halved: bool) -> str:
    """A name for what the features depend on besides the image: weights, image processing, number format, program.

    Args:
        connected, halved: as in `FeatureCache`.
    """
    content = hashlib.sha256(
        f"{FORMAT} {transformers.__version__} {type(family).__name__} {connected} {halved}".encode()
    )
    _add_weights(content, family.vision.state_dict())
    if connected:
        _add_weights(content, family.connector.state_dict())
    image_processor = family.processor.image_processor
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else vars(image_processor)
    content.update(
        json.dumps([settings, _vision_settings(family.model.config.to_dict())], sort_keys=True, default=str).encode()
    )
    return content.hexdigest()[:32]


def _add_weights(content: Any, weights: dict[str, Tensor]) -> None:
    for name, tensor in sorted(weights.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that is about images, such as the layer whose features are taken."""
    about = ("vision", "image", "img", "projector", "scale", "downsample")
    found = {name: value for name, value in config.items() if any(word in name for word in about)}
    return {name: _without(value) for name, value in found.items() if not name.endswith("token_id")}


def _without(value: Any) -> Any:
    """A part of a configuration without what may change when a model is saved."""
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if name not in CHANGES_NOTHING}
