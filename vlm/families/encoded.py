"""Images as a model takes them."""

from dataclasses import dataclass

from torch import Tensor

# Names of cached features among the inputs of images: before and after the connector.
ENCODER_FEATURES, CONNECTED_FEATURES = "encoder_features", "connected_features"


@dataclass(frozen=True)
class EncodedImages:
    """Images as the model takes them.

    Attributes:
        inputs: tensors of all images, one image after the other; an image may have several rows.
        token_ids: for each image the tokens that stand for it in the text, placeholders and what is around them.
    """

    inputs: dict[str, Tensor]
    token_ids: list[list[int]]


def besides_pixels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that are neither pixels nor features, such as the sizes of images."""
    features = (ENCODER_FEATURES, CONNECTED_FEATURES)
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel") and name not in features}
