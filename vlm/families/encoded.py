"""Images as a model takes them."""

from dataclasses import dataclass

from torch import Tensor

# Names of cached features among a batch's pixels: before and behind the connector.
ENCODER_FEATURES, CONNECTED_FEATURES = "encoder_features", "connected_features"


@dataclass(frozen=True)
class EncodedImages:
    """Images as the model takes them.

    inputs: tensors of all images one after the other (an image may take several rows). token_ids: for each image
    the tokens that stand for it in the text, placeholders and wrappers.
    """

    inputs: dict[str, Tensor]
    token_ids: list[list[int]]


def besides_pixels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of images that is neither pixels nor features of them, such as their sizes."""
    features = (ENCODER_FEATURES, CONNECTED_FEATURES)
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel") and name not in features}
