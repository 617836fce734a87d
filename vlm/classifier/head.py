"""The head: a linear classifier on what one block of the vision encoder makes of an image.

Its logits are evidence of their own, which is added to what the texts say (`Calibration`). How it is fitted:
vlm/evaluation/head_fit.py. In a model folder it is a file apart, so that the folder stays a plain model for others.

B = images, S = statistics, W = width of the vision encoder, F = features of the head, C = classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.common import UsageError, replacing
from vlm.config import HEAD_FILE
from vlm.families import STATISTICS

WEIGHT, BIAS, ABOUT = "weight", "bias", "about"


@dataclass(frozen=True)
class Head:
    """A linear classifier.

    Attributes:
        layer: the block that it reads, counted from 0. statistics: which of `STATISTICS` it reads.
        weight: (C, F) and bias: (C,), float64; F is W for each of the statistics.
        classes: the names of its C classes.
    """

    layer: int
    statistics: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def logits(self, vectors: Tensor) -> Tensor:
        """(B, S, W) vectors of its block -> (B, C), on the CPU, in float64.

        Raises:
            UsageError: the head belongs to another vision encoder.
        """
        statistics, width = vectors.shape[1:]
        needed = max(STATISTICS.index(name) for name in self.statistics)
        if needed >= statistics or width * len(self.statistics) != self.weight.shape[1]:
            raise UsageError(f"{HEAD_FILE} does not fit the vision encoder of this model. Copy the model folder again.")
        return features(vectors, self.statistics).double() @ self.weight.T + self.bias

    def save(self, file: Path) -> None:
        """Write it as safetensors. Raises WriteError, OSError: it cannot be written."""
        about = {"layer": self.layer, "statistics": self.statistics, "classes": self.classes}
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as new:
            save_file({WEIGHT: self.weight, BIAS: self.bias}, new, metadata={ABOUT: json.dumps(about)})


def read_head(file: Path, classes: Sequence[str]) -> Head:
    """The head in a file, for these classes.

    Raises:
        UsageError: there is none, it is damaged, or it is for other classes.
    """
    cure = "Copy the model folder again."
    if not file.is_file():
        raise UsageError(f"{file} is missing, which this model takes its evidence from. {cure}")
    try:
        with safe_open(file, "pt") as content:
            about = json.loads(content.metadata()[ABOUT])
            weight, bias = (content.get_tensor(name).double() for name in (WEIGHT, BIAS))
        head = Head(int(about["layer"]), tuple(about["statistics"]), weight, bias, tuple(about["classes"]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{file} is damaged. {cure}") from error
    fits = head.weight.dim() == 2 and len(head.weight) == len(classes) and head.bias.shape == (len(classes),)
    known = head.layer >= 0 and head.statistics and set(head.statistics) <= set(STATISTICS)
    if not fits or not known or head.classes != tuple(classes):
        raise UsageError(f"{file} does not fit the classes of this model. {cure}")
    return head


def features(vectors: Tensor, statistics: Sequence[str]) -> Tensor:
    """(B, S, W) -> (B, F): the statistics that are read, one after the other."""
    return vectors[:, [STATISTICS.index(name) for name in statistics]].flatten(1)
