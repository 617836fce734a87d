"""The interface of the two ways of running a model: with a shared prefix (shared.py), or plain (plain.py).

A `VLMClassifier` has one of them and passes its calls on. Both give the same numbers; tests compare them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm.classifier.batching import Batch
from vlm.classifier.label_tree import LabelTree
from vlm.classifier.objective import Objective
from vlm.conversation import Rendered
from vlm.families import Family


class LossOutput(NamedTuple):
    """The losses of a batch.

    loss: scalar, the summed loss of the response tokens. tokens: how many there are. posterior: scalar, the summed loss
    of the classes, if it is trained (vlm/classifier/objective.py).
    """

    loss: Tensor
    tokens: int
    posterior: Tensor | None = None


class Scored(NamedTuple):
    """What a search found.

    scores: (B, C) log-probability of the scored text of each class. unexplored: (B,) how much the probability of any
    class can be wrong at most.
    """

    scores: Tensor
    unexplored: Tensor


class Forward(ABC):
    """How a model is run.

    Args:
        family: the architecture with its weights.
        rendered: the conversation as token ids.
        tree: the label tree of its scored texts.
    """

    def __init__(self, family: Family, rendered: Rendered, tree: LabelTree):
        self.family = family
        self.rendered = rendered
        self.tree = tree

    @property
    def device(self) -> torch.device:
        return self.family.device

    @abstractmethod
    def losses(self, batch: Batch, objective: Objective, first: bool, last: bool) -> LossOutput:
        """The losses that the objective asks for.

        Args:
            batch: made with responses, if they are trained.
            first, last: whether the batch is the first, or the last, of an optimizer step.
        """

    @abstractmethod
    def read(self, batch: Batch) -> Any:
        """Read prompts and opening of a batch made without responses. The result is for `search` and `write`."""

    @abstractmethod
    def search(
        self,
        reading: Any,
        weighting: tuple[float, np.ndarray],
        tolerance: float,
        labels: Sequence[int] | None,
        proven: int,
    ) -> Scored:
        """Log-probabilities of the scored texts; see `VLMClassifier.search`, and `Calibration.weighting`."""

    @abstractmethod
    def write(self, reading: Any, limit: int) -> list[str]:
        """The text of each sample by greedy decoding, of at most `limit` tokens, to the end of turn."""

    def with_features(self, batch: Batch) -> Batch:
        """The batch with features in the place of pixels, if the model can be run from them."""
        return batch

    @abstractmethod
    def forget(self) -> None:
        """Forget what was kept of the weights, which are about to change or have changed."""
