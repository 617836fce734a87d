"""What a family makes of texts and images, for the rest of the program."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vlm.conversation.prompts import Prompts
from vlm.conversation.responses import common_start

# Names of cached features among a batch's pixels: before and behind the connector.
ENCODER_FEATURES, CONNECTED_FEATURES = "encoder_features", "connected_features"


@dataclass(frozen=True)
class Rendered:
    """The conversation as token ids. The image's own tokens stand between prefix and question."""

    prefix_ids: list[int]
    question_ids: list[int]
    response_ids: list[list[int]]  # one a class, each ending in the end-of-turn token
    scored_ids: list[list[int]]  # one a class, what its log-probability is taken of (see vlm/conversation/responses.py)
    max_length: int  # longest row that the model can read
    prompts: Prompts  # what was rendered

    @cached_property
    def opening_ids(self) -> list[int]:
        """What all scored texts begin with; it is read together with the prompt."""
        return self.scored_ids[0][: common_start(*self.scored_ids)]


@dataclass(frozen=True)
class EncodedImages:
    """Images as the model takes them.

    inputs: tensors of all images one after the other (an image may take several rows). token_ids: for each image
    the tokens that stand for it in the text, placeholders and wrappers.
    """

    inputs: dict[str, Tensor]
    token_ids: list[list[int]]


def beside_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of images that is neither pixels nor features of them, such as their sizes."""
    features = (ENCODER_FEATURES, CONNECTED_FEATURES)
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel") and name not in features}
