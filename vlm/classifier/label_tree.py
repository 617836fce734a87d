"""The label tree: the possible responses merged into one prefix tree, and the order in which it is searched.

This file knows no model. T = nodes, C = classes.

A node is one token after one history. The log-probability of a class is the sum over the nodes of its path, each node's
token being predicted by its parent (by the end of the prompt for the first one). Every response ends in the end-of-turn
token, so that no response is the beginning of another: "cat" and "catfish" are two leaves. Leaves predict nothing and
are never run.

Log-probability only falls along a branch. So the classes below a node that was not visited have, together, no more
probability than the node itself: a search that takes the most probable nodes first knows at any time how much it can be
wrong at most, and may stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

ROOT = -1  # the end of the prompt


@dataclass(frozen=True)
class LabelTree:
    """The tree of C responses. Nodes are numbered depth first, so those at or below node n are n .. ends[n] - 1.

    Attributes:
        tokens: (T,) token of each node. parents: (T,) parent of each node, or ROOT.
        depths: (T,) distance to the prompt, from 0. ends: (T,) see above.
        leaves: (C,) last node of each class's response.
        children: for each node its children.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    leaves: np.ndarray
    children: list[list[int]] = field(repr=False)

    @property
    def lengths(self) -> np.ndarray:
        """(C,) number of tokens of each response."""
        return self.depths[self.leaves] + 1

    @property
    def parted(self) -> list[int]:
        """(C) how many tokens of each response it takes until no other begins with them."""
        found = []
        for node in self.leaves:
            while self.parents[node] != ROOT and len(self.classes_below(self.parents[node])) == 1:
                node = self.parents[node]
            found.append(int(self.depths[node]) + 1)
        return found

    @property
    def first(self) -> list[int]:
        """The nodes that the end of the prompt predicts."""
        return np.flatnonzero(self.parents == ROOT).tolist()

    @property
    def inner(self) -> list[int]:
        """All nodes that predict something, parents before children."""
        return [node for node, below in enumerate(self.children) if below]

    def segment(self, node: int) -> list[int]:
        """An inner node and the inner nodes after it up to the next branching: what is visited in one go."""
        nodes = [node]
        while len(below := self.children[nodes[-1]]) == 1 and self.children[below[0]]:
            nodes.append(below[0])
        return nodes

    @cached_property
    def _inner_before(self) -> np.ndarray:
        """(T + 1,) how many nodes that predict something come before each."""
        return np.concatenate([[0], np.cumsum([bool(below) for below in self.children])])

    def inner_below(self, node: int) -> int:
        """How many nodes at or below a node predict something: what a visit of its whole branch runs."""
        return int(self._inner_before[self.ends[node]] - self._inner_before[node])

    def segments_below(self, node: int) -> list[list[int]]:
        """The segments of the whole branch of an inner node, parents before children."""
        found, starts = [], [node]
        while starts:
            found.append(self.segment(starts.pop()))
            starts += [below for below in self.children[found[-1][-1]] if self.children[below]]
        return found

    def sees(self, nodes: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(..., N, M) bool: whether each of `nodes` (..., N) is one of `others` (..., M) or comes below it; -1 is no
        node."""
        nodes, others = nodes[..., :, None], others[..., None, :]
        return (others >= 0) & (others <= nodes) & (nodes < self.ends[others])

    @cached_property
    def by_leaf(self) -> np.ndarray:
        """(C,) the classes in the order of their leaves: those below a node stand side by side."""
        return np.argsort(self.leaves)

    def classes_below(self, node: int) -> np.ndarray:
        """The classes whose response goes through a node."""
        start, stop = np.searchsorted(self.leaves[self.by_leaf], (node, self.ends[node]))
        return self.by_leaf[start:stop]


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
    children: list[list[int]] = [[] for _ in tokens]
    ends = np.arange(1, len(tokens) + 1)
    for node in range(len(tokens) - 1, -1, -1):  # children come after their parent
        if parents[node] != ROOT:
            children[parents[node]].insert(0, node)
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return LabelTree(np.array(tokens), np.array(parents), np.array(depths), ends, leaves, children)


class Search:
    """The best-first search of the tree for one image.

    Args:
        tolerance: stop when the classes that were not visited have, together, no more than this share of the
            probability; 0 visits all.
        temperature, bias: log-probabilities after the opening are divided by the first, and the second, one number or
            (C,), is added before they are compared. The tolerance is that of the resulting probabilities (see
            `Calibration.weighting`).
        label: a class that is visited whatever its probability.
        proven: this many of the most probable classes are proven to be the most probable, however improbable they are.
            Classes with more than the tolerance are proven anyway: they were visited, and the rest has less.
    """

    def __init__(
        self,
        tree: LabelTree,
        tolerance: float,
        temperature: float = 1.0,
        bias: float | np.ndarray = 0.0,
        label: int | None = None,
        proven: int = 1,
    ):
        self.tree = tree
        self.tolerance = tolerance
        self.temperature = temperature
        self.bias = np.broadcast_to(bias, tree.leaves.shape)
        self.required = -1 if label is None else int(tree.leaves[label])
        self.proven = min(proven, len(tree.leaves))
        self.reached = np.full(len(tree.tokens), np.nan)  # log-probability of the path up to and with each node
        self.opening = 0.0  # that of the nodes that all responses begin with
        self.open: dict[int, float] = {}  # inner nodes that may be visited next, with a bound of the log-weight below

    def record(self, nodes: Sequence[int], log_probabilities: Sequence[float]) -> None:
        """The log-probabilities of nodes, each given its parent's path; parents come before children."""
        for node, value in zip(nodes, log_probabilities, strict=True):
            parent = self.tree.parents[node]
            self.reached[node] = value + (0.0 if parent == ROOT else self.reached[parent])

    def visited(self, segment: Sequence[int]) -> None:
        """The nodes of a segment were run, and what follows them was recorded."""
        self.open.pop(segment[0], None)
        for node in self.tree.children[segment[-1]]:
            self._open(node)

    def begin(self, opening: Sequence[int]) -> None:
        """The prompt was run, and with it the nodes that all responses begin with."""
        if opening:
            self.opening = float(self.reached[opening[-1]])
        for node in self.tree.children[opening[-1]] if opening else self.tree.first:
            self._open(node)

    def _open(self, node: int) -> None:
        if self.tree.children[node]:
            self.open[node] = self.bound(node)

    def bound(self, node: int) -> float:
        """Logarithm of the largest weight, exp(log-probability / temperature + bias), that the classes below a node can
        have together.

        After the opening, their probabilities p add up to no more than that of the node, P, and none is above 1. With
        a = 1 / temperature < 1, the sum of p ** a * exp(bias) is at most, by Hoelder's inequality,
        P ** a * (sum of exp(bias / (1 - a))) ** (1 - a), which is reached. With a >= 1 the best case is that one class
        has all of P.
        """
        bias = self.bias[self.tree.classes_below(node)]
        share = 1 / self.temperature
        rest = 1 - share
        spread = rest * np.logaddexp.reduce(bias / rest) if rest > 0 else bias.max()
        return float((self.reached[node] - self.opening) * share + spread)

    def weights(self) -> np.ndarray:
        """(C,) log-weights of the classes that were visited, else -inf."""
        reached = self.reached[self.tree.leaves]
        return np.where(np.isnan(reached), -np.inf, (reached - self.opening) / self.temperature + self.bias)

    @property
    def unexplored(self) -> float:
        """How much any probability can be wrong at most: the share of all weight that the classes not visited may
        have."""
        if not self.open:
            return 0.0
        with np.errstate(invalid="ignore"):  # a model whose numbers have overflowed gives NaN, which the metrics refuse
            rest = np.logaddexp.reduce(list(self.open.values()))
            return float(np.exp(rest - np.logaddexp(rest, np.logaddexp.reduce(self.weights()))))

    def next(self, tokens: int) -> list[list[int]]:
        """The segments to visit now, none when the search is over.

        Args:
            tokens: how many nodes there is room for; the first segment is given in any case.
        """
        chosen: list[list[int]] = []
        for node in self._wanted():
            segment = self.tree.segment(node)
            tokens -= len(segment)
            if tokens < 0 and chosen:
                break
            chosen.append(segment)
        return chosen

    @property
    def left(self) -> int:
        """How many nodes a visit of all that was not visited would run."""
        return sum(map(self.tree.inner_below, self.open))

    def rest(self) -> list[list[int]]:
        """The segments of all that was not visited, parents before children."""
        return [segment for node in self.open for segment in self.tree.segments_below(node)]

    def _wanted(self) -> list[int]:
        """The open nodes that have to be visited by what is known now, the most probable first."""
        required = [node for node in self.open if node <= self.required < self.tree.ends[node]]
        ranked = sorted(self.open, key=self.open.__getitem__, reverse=True)
        if self.tolerance > 0 and ranked and not np.isnan(self.open[ranked[0]]):
            weights = self.weights()
            bounds = np.array([self.open[node] for node in ranked])
            rest = np.logaddexp.accumulate(bounds[::-1])[::-1]  # of each node and all after it
            total = np.logaddexp(rest[0], np.logaddexp.reduce(weights))
            count = int((rest - total > np.log(self.tolerance)).sum())
            if not count:  # enough for the probabilities; now for the order of the first few
                count = min(self.proven, int((bounds > np.sort(weights)[-self.proven]).sum()))
            ranked = ranked[:count]
        return [*required, *(node for node in ranked if node not in required)]

    def class_log_probabilities(self) -> np.ndarray:
        """(C,) log-probability of each response. Classes not visited share the most that their branch can have
        equally."""
        result = self.reached[self.tree.leaves].copy()
        for node in self.open:
            classes = self.tree.classes_below(node)
            result[classes] = self.reached[node] - np.log(len(classes))
        return result
