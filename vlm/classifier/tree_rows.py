"""The label tree in the rows of a training batch: class log-probabilities with gradients, all classes in one pass.

Every row is followed by inner nodes of the tree, after the opening, the tokens that all scored texts begin with. By the
mask a node sees prefix, prompt, opening and its ancestors; the row itself sees none of the nodes.

Either all inner nodes are run, and the score of a class is that of its whole scored text. Or only the nodes are run
that several classes share, and the score is that of the text up to where no other class continues alike: a few nodes
instead of hundreds.

B = images, L = row tokens without nodes, P = prefix tokens, N = nodes that are run, T = nodes that tell classes apart,
C = classes, D = width, V = vocabulary.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.classifier.label_tree import ROOT, LabelTree
from vlm.classifier.search import LOGITS_AT_ONCE
from vlm.families import Family


class TreeRows(nn.Module):
    """The part of a label tree that is equal for every row. It has only buffers: nothing is trained or saved.

    Args:
        tree: the label tree.
        opening: how many nodes all classes share; they are in the rows already, and cancel between the classes.
        whole: run all inner nodes.
    """

    tokens: Tensor  # (N,) token of each node that is run
    depths: Tensor  # (N,) its distance to the opening
    sees: Tensor  # (N, N) bool, whether a node is below another or the same
    predicted: Tensor  # (T,) tokens of the nodes that tell classes apart, in the order of the states that predict them
    predicting: Tensor  # (T,) the states that predict them: 0 is that after the opening, 1 + n that of node n
    paths: Tensor  # (C, longest path) for each class its nodes among the T, padded with T

    def __init__(self, tree: LabelTree, opening: int, whole: bool):
        super().__init__()
        run = _nodes_to_run(tree, opening, whole)
        state_of = np.zeros(len(tree.tokens) + 1, dtype=int)  # the state after each node; the opening's is 0
        state_of[run] = 1 + np.arange(len(run))
        apart, predicting = _predicted_nodes(tree, opening, state_of)
        self._keep("tokens", tree.tokens[run])
        self._keep("depths", tree.depths[run] - opening)
        self._keep("sees", tree.sees(run, run))
        self._keep("predicted", tree.tokens[apart])
        self._keep("predicting", predicting)
        self._keep("paths", _paths(tree, apart))
        # The first of the T nodes that each state predicts, so that blocks of states predict blocks of nodes.
        self._starts = np.searchsorted(predicting, np.arange(len(run) + 2)).tolist()

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self, next_position: Tensor) -> Tensor:
        """(B, N) positions of the nodes, from (B,) the position after the opening."""
        return next_position.unsqueeze(1) + self.depths  # (B, 1) + (N,) -> (B, N)

    def mask(self, prefix: int, length: int, branching: Tensor) -> Tensor:
        """(B, 1, L + N, P + L + N) bool, True where a token of a row sees another.

        Args:
            prefix: P. length: L. branching: (B,) how many tokens of each row the nodes see: prompt and opening.
        """
        batch, nodes = len(branching), len(self)
        places = torch.arange(length, device=branching.device)  # (L,)
        allowed = torch.zeros(batch, length + nodes, prefix + length + nodes, dtype=torch.bool, device=branching.device)
        allowed[:, :, :prefix] = True
        allowed[:, :length, prefix : prefix + length] = places <= places.unsqueeze(1)
        allowed[:, length:, prefix : prefix + length] = (places < branching.unsqueeze(1)).unsqueeze(1)
        allowed[:, length:, prefix + length :] = self.sees
        return allowed.unsqueeze(1)  # one mask for all heads

    def scores(self, family: Family, hidden: Tensor, branching: Tensor) -> Tensor:
        """(B, C) log-probability of each class's scored text, given the opening.

        Args:
            hidden: (B, L + N, D) states of rows and nodes. branching: as in `mask`.
        """
        length = hidden.shape[1] - len(self)
        # (B, L + N, D) -> (B, 1 + N, D): the state after the opening of each row, then those of the nodes
        first = hidden[torch.arange(len(hidden), device=hidden.device), branching - 1].unsqueeze(1)
        states = torch.cat([first, hidden[:, length:]], dim=1)
        step = max(1, LOGITS_AT_ONCE // (family.vocabulary * len(hidden)))
        blocks = range(0, states.shape[1], step)
        parts = []
        for start in blocks:
            stop = min(start + step, states.shape[1])
            nodes = slice(self._starts[start], self._starts[stop])
            arguments = family, states[:, start:stop], self.predicting[nodes] - start, self.predicted[nodes]
            # With several blocks all logits would be too many, so they are not kept for the backward pass either.
            parts.append(
                checkpoint(_predicted, *arguments, use_reentrant=False) if len(blocks) > 1 else _predicted(*arguments)
            )
        nothing = parts[0].new_zeros(len(hidden), 1)  # what padding of the paths adds
        # (B, T + 1) -> (B, C, longest path) -> (B, C): the sum over each path
        return torch.cat([*parts, nothing], dim=1)[:, self.paths].sum(-1)


def _predicted(family: Family, states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """(B, n) log-probabilities of n tokens, each predicted by one of (B, S, D) states."""
    logits = family.logits(states)  # (B, S, V)
    # (B, S, V) -> (B, n): the logit of each token minus the normalization of its state
    return logits[:, rows, tokens] - logits.logsumexp(-1)[:, rows]


def _nodes_to_run(tree: LabelTree, opening: int, whole: bool) -> np.ndarray:
    """(N,) inner nodes after the opening: all of them, or those that several classes go through."""
    run = tree.predicts if whole else tree.predicts & (tree.class_counts > 1)
    return opening + np.flatnonzero(run[opening:])


def _predicted_nodes(tree: LabelTree, opening: int, state_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,) the nodes whose parent is run or in the opening, and (T,) the states that predict them, in their order."""
    nodes = np.arange(opening, len(tree.tokens))
    parents = tree.parents[nodes]
    known = (parents < opening) | (state_of[parents] > 0)
    predicting = state_of[parents[known]]
    order = np.argsort(predicting, kind="stable")
    return nodes[known][order], predicting[order]


def _paths(tree: LabelTree, apart: np.ndarray) -> np.ndarray:
    """(C, longest path) for each class the places of its nodes among `apart`, padded with the number of these."""
    place_of = {node: place for place, node in enumerate(apart.tolist())}
    paths: list[list[int]] = []
    for leaf in tree.leaves.tolist():
        path, node = [], leaf
        while node != ROOT:
            path += [place_of[node]] if node in place_of else []
            node = int(tree.parents[node])
        paths.append(path)
    longest = max(map(len, paths))
    return np.array([path + [len(apart)] * (longest - len(path)) for path in paths])
