"""What the training minimizes. B = batch, C = classes.

response     cross entropy of the tokens of each image's response: the usual fine-tuning of a language model
posterior    cross entropy of the class, -log( exp(s_y) / sum over c of exp(s_c) ), with s_c the log-probability of the scored text of
             class c (see vlm/conversation/responses.py): the model is trained as the classifier that it is used as.
             What it would write if nothing constrained it is not trained
both         the sum of the two, each a mean: over the tokens, over the images. Here s_c is that of the text up to where no other class
             goes on alike, which takes a few nodes of the label tree instead of all; the response teaches what comes
             behind, one text a class
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
        label_smoothing: the share of the target of the posterior that all classes have equally (Szegedy et al. 2016,
            arXiv 1512.00567).
        class_weights: (C,) what the loss of an image of each class is multiplied by, or None.
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
        self.register_buffer(
            "weights", None if class_weights is None else torch.tensor(class_weights), persistent=False
        )

    @property
    def has_response(self) -> bool:
        return self.name != POSTERIOR

    @property
    def has_posterior(self) -> bool:
        return self.name != RESPONSE

    def of_metrics(self, metrics: dict[str, float]) -> float:
        """What of the metrics of a split (see `evaluate_vlm_model`) is minimized, to compare with the loss of the
        training: without weights and label smoothing, and with the posterior of whole scored texts."""
        return metrics["loss"] * self.has_response + metrics["nll"] * self.has_posterior

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
            scores: (B, C). labels: (B,).
        """
        losses = cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses.sum() if self.weights is None else (losses * self.weights[labels]).sum()


def usual_objective(tree: LabelTree, opening: int, shares_prefix: bool = True) -> str:
    """What is minimized where nobody asked for another objective: both, unless its nodes of the label tree would cost
    too much.

    In the plain forward every node that is run takes a pass over the whole sequence, and none takes one pass for all
    classes.
    """
    return BOTH if len(TreeRows(tree, opening, whole=False)) <= (FEW_NODES if shares_prefix else 0) else RESPONSE


def balanced_weights(labels: Sequence[int], classes: int) -> tuple[float, ...]:
    """(C,) weights by which all classes count equally, however many images each has: N / (classes that occur * images
    of the class).

    Their mean over the images is 1, so that the learning rate keeps its meaning.
    """
    counts = np.bincount(np.asarray(labels), minlength=classes)
    return tuple((len(labels) / np.maximum(counts, 1) / np.count_nonzero(counts)).tolist())
