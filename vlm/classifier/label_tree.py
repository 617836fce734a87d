"""The label tree: the possible responses merged into one prefix tree.

This file knows no model. T = nodes, C = classes, H = heads.

A node is one token after one history. The log-probability of a class is the sum over the nodes of its path, each node's
token being predicted by its parent (by the end of the prompt for the first one). Every response ends in the end-of-turn
token, so that no response is the beginning of another: "cat" and "catfish" are two leaves. Leaves predict nothing and
are never run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROOT = -1  # the end of the prompt


@dataclass(frozen=True)
class LabelTree:
    """The tree of C responses. Nodes are numbered depth first, so those at or below node n are n .. ends[n] - 1.

    A segment is an inner node, its head, with the inner nodes after it up to the next branching: nodes with consecutive
    numbers that are visited in one go.

    Attributes:
        tokens: (T,) token of each node. parents: (T,) parent of each node, or ROOT.
        depths: (T,) distance to the prompt, from 0. ends: (T,) see above.
        leaves: (C,) last node of each class's response.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    leaves: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(C,) number of tokens of each response."""
        return self.depths[self.leaves] + 1

    @property
    def parted(self) -> list[int]:
        """(C) how many tokens of each response it takes until no other begins with them."""
        above = np.where(self.parents == ROOT, len(self.leaves) + 1, self.class_counts[self.parents])
        # The first node of each class that no other goes through; the classes follow each other as their leaves do.
        first = np.flatnonzero((self.class_counts == 1) & (above > 1))
        return (self.depths[first[np.searchsorted(first, self.leaves, side="right") - 1]] + 1).tolist()

    @cached_property
    def predicts(self) -> np.ndarray:
        """(T,) bool, whether a node predicts something: all but the leaves."""
        return self.ends - np.arange(len(self.ends)) > 1

    @property
    def inner(self) -> list[int]:
        """All nodes that predict something, parents before children."""
        return np.flatnonzero(self.predicts).tolist()

    @cached_property
    def _by_parent(self) -> np.ndarray:
        """(T,) the nodes in the order of their parents: those with the same parent stand side by side."""
        return np.argsort(self.parents, kind="stable")

    @cached_property
    def _first_below(self) -> np.ndarray:
        """(T + 2,) where the children of ROOT, of node 0, of node 1 ... begin in `_by_parent`."""
        return np.searchsorted(self.parents[self._by_parent], np.arange(ROOT, len(self.parents) + 1))

    def below(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The children of some nodes or ROOT (N,), side by side: the place of the parent in `nodes`, and the child."""
        parent, places = ranges(self._first_below[nodes + 1], self._first_below[nodes + 2])
        return parent, self._by_parent[places]

    @cached_property
    def _goes_on(self) -> np.ndarray:
        """(T,) bool, whether the next node is a node's only child and predicts something."""
        single = np.diff(self._first_below)[1:] == 1
        return single & np.append(self.predicts[1:], False)

    @cached_property
    def heads(self) -> np.ndarray:
        """(H,) the first node of each segment."""
        continues = (self.parents != ROOT) & self._goes_on[self.parents]
        return np.flatnonzero(self.predicts & ~continues)

    @cached_property
    def head_of(self) -> np.ndarray:
        """(T,) the place of each node in `heads`, -1 for the others."""
        places = np.full(len(self.tokens), -1)
        places[self.heads] = np.arange(len(self.heads))
        return places

    @cached_property
    def segment_lengths(self) -> np.ndarray:
        """(H,) how many nodes each segment has."""
        last = np.flatnonzero(~self._goes_on)
        return last[np.searchsorted(last, self.heads)] + 1 - self.heads

    @cached_property
    def inner_below(self) -> np.ndarray:
        """(H,) how many nodes at or below each head predict something: what a visit of its whole branch runs."""
        before = np.concatenate([[0], np.cumsum(self.predicts)])
        return before[self.ends[self.heads]] - before[self.heads]

    def sees(self, nodes: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(..., N, M) bool: whether each of `nodes` (..., N) is one of `others` (..., M) or comes below it; -1 is no
        node."""
        nodes, others = nodes[..., :, None], others[..., None, :]
        return (others >= 0) & (others <= nodes) & (nodes < self.ends[others])

    @cached_property
    def by_leaf(self) -> np.ndarray:
        """(C,) the classes in the order of their leaves: those below a node stand side by side."""
        return np.argsort(self.leaves)

    @cached_property
    def class_places(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) and (T,): the classes below node n are by_leaf[first[n] : stop[n]]."""
        leaves = self.leaves[self.by_leaf]
        return np.searchsorted(leaves, np.arange(len(self.ends))), np.searchsorted(leaves, self.ends)

    @cached_property
    def class_counts(self) -> np.ndarray:
        """(T,) how many responses go through each node."""
        first, stop = self.class_places
        return stop - first

    def classes_below(self, node: int) -> np.ndarray:
        """The classes whose response goes through a node."""
        first, stop = self.class_places
        return self.by_leaf[first[node] : stop[node]]


def ranges(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers from each start to its stop, all in one array, and for each number the place of its start."""
    lengths = stops - starts
    which = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return which, np.arange(len(which)) + (starts - before)[which]


def build_label_tree(responses: Sequence[Sequence[int]]) -> LabelTree:
    """Merge token sequences into a tree.

    Args:
        responses: one token sequence a class, none the beginning of another.

    Raises:
        ValueError: an empty response, or one that equals or begins another.
    """
    # In sorted order neighbors share the most, so that nodes are made depth first.
    order = sorted(range(len(responses)), key=lambda c: list(responses[c]))
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    leaves = np.zeros(len(responses), dtype=int)
    path: list[int] = []  # the nodes of the previous response
    before: list[int] = []
    for c in order:
        response = list(responses[c])
        shared = 0
        while shared < min(len(before), len(response)) and before[shared] == response[shared]:
            shared += 1
        if not response or shared == len(response) or (before and shared == len(before)):
            raise ValueError(f"response {c} is empty, or equals or begins another one")
        path = path[:shared]
        for depth, token in enumerate(response[shared:], start=shared):
            tokens.append(token)
            parents.append(path[-1] if path else ROOT)
            depths.append(depth)
            path.append(len(tokens) - 1)
        leaves[c], before = path[-1], response
    return _finish(tokens, parents, depths, leaves)


def _finish(tokens: list[int], parents: list[int], depths: list[int], leaves: np.ndarray) -> LabelTree:
    ends = np.arange(1, len(tokens) + 1)
    for node in range(len(tokens) - 1, -1, -1):  # children come after their parent
        if parents[node] != ROOT:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return LabelTree(np.array(tokens), np.array(parents), np.array(depths), ends, leaves)
