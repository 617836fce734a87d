"""The label tree: the possible responses merged into one prefix tree, so that one forward pass scores every class.

Pure tensors: this file knows no model. B = batch, T = nodes, I = inner nodes (those with children), C = classes, N = longest response.

A node is one token after one history. The log-probability of a class is the sum over the nodes of its path, each node's
token being predicted by its parent (by the end of the prompt for the first one). Only inner nodes predict something, so
only they are run through the model. Every response ends in the end-of-turn token, so that no response is the
beginning of another: "cat" and "catfish" are two leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelTree:
    """The tree of C responses.

    tokens: (T,) token of each node. predictor: (T,) row that predicts the node: 0 is the end of the prompt, i + 1 the
    i-th inner node. paths: (C, N) nodes of each class, padded with T.
    inner_tokens: (I,), inner_depths: (I,) distance to the prompt, from 0, inner_mask: (I, I) bool, [i, j] says
    that i sees j (itself or an ancestor).
    """

    tokens: Tensor
    predictor: Tensor
    paths: Tensor
    inner_tokens: Tensor
    inner_depths: Tensor
    inner_mask: Tensor

    def to(self, device: torch.device | str) -> "LabelTree":
        return LabelTree(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @property
    def lengths(self) -> Tensor:
        """(C,) number of tokens of each response."""
        return (self.paths < len(self.tokens)).sum(-1)


def build_label_tree(responses: Sequence[Sequence[int]]) -> LabelTree:
    """Merge token sequences into a tree.

    Args:
        responses: one token sequence a class, none the beginning of another.

    Raises:
        ValueError: an empty response, or one that equals or begins another.
    """
    children: list[dict[int, int]] = [{}]  # of the prompt, then of each node
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = []
    for response in responses:
        row, path = 0, []
        for depth, token in enumerate(response):
            node = children[row].get(token)
            if node is None:
                node = len(tokens)
                children[row][token] = node
                children.append({})
                tokens.append(token)
                parents.append(row - 1)
                depths.append(depth)
            path.append(node)
            row = node + 1
        paths.append(path)
    for index, path in enumerate(paths):
        if not path or children[path[-1] + 1] or path in paths[:index]:
            raise ValueError(f"response {index} is empty, or equals or begins another one")
    return _as_tensors(tokens, parents, depths, paths, inner=[n for n in range(len(tokens)) if children[n + 1]])


def _as_tensors(tokens: list[int], parents: list[int], depths: list[int], paths: list[list[int]], inner: list[int]) -> LabelTree:
    place = {node: i for i, node in enumerate(inner)}
    mask = torch.zeros(len(inner), len(inner), dtype=torch.bool)
    for i, node in enumerate(inner):  # parents come before children, so the parent's row is complete
        if parents[node] >= 0:
            mask[i] = mask[place[parents[node]]]
        mask[i, i] = True
    longest = max(map(len, paths))
    return LabelTree(
        tokens=torch.tensor(tokens),
        predictor=torch.tensor([0 if parent < 0 else place[parent] + 1 for parent in parents]),
        paths=torch.tensor([path + [len(tokens)] * (longest - len(path)) for path in paths]),
        inner_tokens=torch.tensor([tokens[node] for node in inner], dtype=torch.long),
        inner_depths=torch.tensor([depths[node] for node in inner], dtype=torch.long),
        inner_mask=mask,
    )


def class_log_probabilities(tree: LabelTree, node_log_probabilities: Tensor) -> Tensor:
    """(B, T) log-probability of each node's token -> (B, C) log-probability of each response."""
    padded = torch.nn.functional.pad(node_log_probabilities, (0, 1))  # the padding of a path adds nothing
    return padded[:, tree.paths].sum(-1)
