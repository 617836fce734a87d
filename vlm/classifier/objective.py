"""What the training minimizes (`--objective`).

- response: cross entropy of the tokens of each image's response, the usual fine-tuning of a language model.
- posterior: cross entropy of the class, -log( exp(s_y) / sum over c of exp(s_c) ), where s_c is the log-probability of
  the scored text of class c (vlm/conversation/responses.py). The model is trained as the classifier that it is used as;
  the text that it would write without constraint is not trained.
- both: the sum of the two, each a mean, over tokens and over images. Here s_c is that of the text up to where no other
  class continues alike, which takes a few nodes of the label tree instead of all. The response teaches the rest, which
  is one text a class.

B = images, C = classes, V = vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlm.classifier.label_tree import LabelTree
from vlm.classifier.tree_rows import TreeRows
from vlm.config import BOTH, FEW_NODES, POSTERIOR, RESPONSE


class Objective(nn.Module):
    """What is minimized, with what it needs of the label tree. Nothing here is trained or saved.

    Args:
        name: response, posterior or both.
        tree, opening: the label tree, and how many tokens all scored texts begin with.
        label_smoothing: share of the posterior's target spread evenly over all classes (Szegedy et al. 2016,
            arXiv 1512.00567).
        class_weights: (C,) factor of the loss of an image of each class, or None.
    """

    def __init__(
        self,
        name: str,
        tree: LabelTree,
        opening: int,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.name = name
        self.label_smoothing = label_smoothing
        self.rows = TreeRows(tree, opening, whole=self.name == POSTERIOR) if self.has_posterior else None
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    @property
    def has_response(self) -> bool:
        return self.name != POSTERIOR

    @property
    def has_posterior(self) -> bool:
        return self.name != RESPONSE

    def of_tokens(self, logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of response tokens.

        Args:
            logits: (N, V). targets: (N,) tokens. labels: (N,) class of the image that each token is about.
        """
        if self.weights is None:
            return cross_entropy(logits, targets, reduction="sum")
        return (cross_entropy(logits, targets, reduction="none") * self.weights[labels]).sum()

    def of_classes(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of the class posterior.

        Args:
            scores: (B, C). labels: (B,), -100 where an image does not count.
        """
        losses = cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses.sum() if self.weights is None else (losses * self.weights[labels.clamp(min=0)]).sum()


def usual_objective(tree: LabelTree, opening: int, shares_prefix: bool = True) -> str:
    """The default objective: both, unless its nodes of the label tree would cost too much.

    In the plain forward every node takes a pass over the whole sequence; without nodes one pass does for all classes.
    """
    most = FEW_NODES if shares_prefix else 0
    return BOTH if len(TreeRows(tree, opening, whole=False)) <= most else RESPONSE


def balanced_weights(labels: Sequence[int], classes: int) -> tuple[float, ...]:
    """(C,) weights with which all classes count equally: images / (classes that occur * images of the class).

    Their mean over the images is 1, so that the learning rate keeps its meaning.
    """
    counts = np.bincount(np.asarray(labels), minlength=classes)
    return tuple((len(labels) / np.maximum(counts, 1) / np.count_nonzero(counts)).tolist())
