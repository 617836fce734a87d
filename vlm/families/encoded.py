"""Images as a model takes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Names of cached features among the inputs of images: before and after the connector.
ENCODER_FEATURES, CONNECTED_FEATURES = "encoder_features", "connected_features"
# If the cache lacks some images of a batch: what the names of their inputs begin with, and for each feature its row in
# a tensor of the cached ones and, after them, those that are computed.
UNCACHED, FEATURE_ORDER = "uncached.", "feature_order"


@dataclass(frozen=True)
class EncodedImages:
    """Images as the model takes them.

    Attributes:
        inputs: tensors of all images, one image after the other; an image may have several rows.
        token_ids: for each image the tokens that stand for it in the text, placeholders and what is around them.
        vectors: (cached images, S, W) of one block of the vision encoder (pooling.py), if they were asked for.
        cached: for each image whether its features, and its vectors, are from the cache; None if none are.
    """

    inputs: dict[str, Tensor]
    token_ids: list[list[int]]
    vectors: Tensor | None = None
    cached: list[bool] | None = None


def besides_pixels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that are neither pixels nor features, such as the sizes of images."""
    features = (ENCODER_FEATURES, CONNECTED_FEATURES, FEATURE_ORDER)
    return {
        name: tensor
        for name, tensor in inputs.items()
        if not name.startswith(("pixel", UNCACHED)) and name not in features
    }


def uncached_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the images whose features have to be computed: of all, if none are cached."""
    if FEATURE_ORDER not in inputs:
        return inputs
    return {name.removeprefix(UNCACHED): tensor for name, tensor in inputs.items() if name.startswith(UNCACHED)}


def all_features(known: Tensor, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """The features of all images of a batch, in their order.

    Args:
        known: the cached ones.
        compute: inputs of the other images -> their features.
    """
    if FEATURE_ORDER not in inputs:
        return known
    return torch.cat([known, compute(uncached_inputs(inputs)).to(known.dtype)])[inputs[FEATURE_ORDER]]
