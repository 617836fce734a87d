"""The label tree in the rows of a training batch: class log-probabilities with gradients, of all classes in one pass.

Every row is made longer by inner nodes of the tree behind the tokens that all scored texts begin with. A node sees
prefix, prompt, these tokens and its ancestors, by a mask; the row itself sees nothing of them.

Either all inner nodes are run, and a class has the log-probability of its whole scored text; or only those that several
classes go through, and it has that of the text up to where no other class goes on alike: a few nodes instead of
hundreds.

B = batch, L = row tokens without nodes, P = prefix tokens, N = nodes that are run, T = nodes whose log-probability
tells classes apart, C = classes, D = width, V = vocabulary.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.classifier.label_tree import ROOT, LabelTree
from vlm.classifier.search import LOGITS_AT_ONCE
from vlm.families import Family


class TreeRows(nn.Module):
    """What of a label tree is the same for every row. Buffers only: nothing is trained here, and nothing saved.

    Args:
        opening: how many nodes all classes share; they stand in the rows already, and cancel out between the classes.
        whole: run all inner nodes.
    """

    def __init__(self, tree: LabelTree, opening: int, whole: bool):
        super().__init__()
        run = [node for node in tree.inner if node >= opening and (whole or len(tree.classes_below(node)) > 1)]
        run = np.array(run, dtype=int)
        row_of = np.full(
            len(tree.tokens) + 1, 0
        )  # of the state that predicts a node's children; 0: that behind the opening
        row_of[run] = 1 + np.arange(len(run))
        nodes = np.arange(opening, len(tree.tokens))
        parents = tree.parents[nodes]
        known = (parents < opening) | (row_of[parents] > 0)
        apart, predicting = nodes[known], row_of[parents[known]]
        order = np.argsort(predicting, kind="stable")  # blocks of states predict blocks of nodes
        place_of = {node: place for place, node in enumerate(apart[order].tolist())}
        self._keep("tokens", tree.tokens[run])
        self._keep("depths", tree.depths[run] - opening)
        self._keep("sees", tree.sees(run, run))
        self._keep("predicted", tree.tokens[apart][order])
        self._keep("predicting", predicting[order])
        self._keep("paths", self._paths(tree, place_of))
        self._starts = np.searchsorted(
            predicting[order], np.arange(len(run) + 2)
        ).tolist()  # first node that each state predicts

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values), persistent=False)

    @staticmethod
    def _paths(tree: LabelTree, place_of: dict[int, int]) -> np.ndarray:
        """(C, longest) places of the nodes of each class among those that tell classes apart; T where there is none."""
        paths: list[list[int]] = []
        for node in tree.leaves:
            paths.append([])
            while node != ROOT:
                paths[-1] += [place_of[node]] if node in place_of else []
                node = tree.parents[node]
        longest = max(map(len, paths))
        return np.array([path + [len(place_of)] * (longest - len(path)) for path in paths])

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self, next_position: Tensor) -> Tensor:
        """(B, N) positions of the nodes, from (B,) those of the first token that not all classes share."""
        return next_position.unsqueeze(1) + self.depths

    def mask(self, prefix: int, length: int, branching: Tensor) -> Tensor:
        """(B, 1, L + N, P + L + N) bool, True where a token of a row sees another.

        Args:
            prefix: P. length: L. branching: (B,) how many tokens of each row the nodes see.
        """
        batch, nodes = len(branching), len(self)
        places = torch.arange(length, device=branching.device)
        allowed = torch.zeros(batch, length + nodes, prefix + length + nodes, dtype=torch.bool, device=branching.device)
        allowed[:, :, :prefix] = True
        allowed[:, :length, prefix : prefix + length] = places <= places.unsqueeze(1)
        allowed[:, length:, prefix : prefix + length] = (places < branching.unsqueeze(1)).unsqueeze(1)
        allowed[:, length:, prefix + length :] = self.sees
        return allowed.unsqueeze(1)

    def scores(self, family: Family, hidden: Tensor, branching: Tensor) -> Tensor:
        """(B, C) log-probability of each class's scored text given what all begin with.

        Args:
            hidden: (B, L + N, D) states of rows and nodes. branching: as in `mask`.
        """
        length = hidden.shape[1] - len(self)
        first = hidden[torch.arange(len(hidden), device=hidden.device), branching - 1].unsqueeze(1)
        states = torch.cat([first, hidden[:, length:]], dim=1)
        step = max(1, LOGITS_AT_ONCE // (family.vocabulary * len(hidden)))
        blocks = range(0, states.shape[1], step)
        parts = []
        for start in blocks:
            stop = min(start + step, states.shape[1])
            nodes = slice(self._starts[start], self._starts[stop])
            arguments = family, states[:, start:stop], self.predicting[nodes] - start, self.predicted[nodes]
            # Several blocks are there because all logits would be too many: then they are not kept for the backward
            # pass either.
            parts.append(
                checkpoint(_predicted, *arguments, use_reentrant=False) if len(blocks) > 1 else _predicted(*arguments)
            )
        nothing = parts[0].new_zeros(len(hidden), 1)
        return torch.cat([*parts, nothing], dim=1)[:, self.paths].sum(-1)


def _predicted(family: Family, states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """(B, n) log-probabilities of n tokens, each predicted by one of (B, S, D) states."""
    logits = family.logits(states)
    return logits[:, rows, tokens] - logits.logsumexp(-1)[:, rows]
