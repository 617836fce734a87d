"""The best-first search of the label tree, for all images of a batch together.

This file knows no model. B = images, T = nodes, C = classes, H = heads of segments, M = heads that are open.

Log-probability only falls along a branch. So the classes below a node that was not visited have, together, no more
probability than the node itself: a search that takes the most probable nodes first knows at any time how much it can be
wrong at most, and may stop.
"""

from collections.abc import Sequence

import numpy as np

from vlm.classifier.label_tree import LabelTree, ranges


class Searches:
    """One search for each of B images. Images do not depend on each other; their steps are taken together.

    Args:
        tree: the label tree.
        images: B.
        tolerance: stop when the classes that were not visited have, together, no more than this share of the
            probability; 0 visits all.
        temperature, bias: log-probabilities after the opening are divided by the first, and the second, one number,
            (C,) or (B, C), is added before they are compared. The tolerance is that of the resulting probabilities (see
            `Calibration.weighting`).
        labels: for each image a class that is visited whatever its probability.
        proven: this many of the most probable classes are proven to be the most probable, however improbable they are.
            Classes with more than the tolerance are proven anyway: they were visited, and the rest has less.

    Attributes:
        reached: (B, T + 1) log-probability of the path up to and with each node, NaN if unknown; the last column is
            that of ROOT, 0.
        opening: (B,) that of the nodes that all responses begin with.
        open: (B, H) bool, heads that may be visited next.
    """

    def __init__(
        self,
        tree: LabelTree,
        images: int,
        tolerance: float,
        temperature: float = 1.0,
        bias: float | np.ndarray = 0.0,
        labels: Sequence[int] | None = None,
        proven: int = 1,
    ):
        self.tree = tree
        self.tolerance = tolerance
        self.temperature = temperature
        shape = (images if np.ndim(bias) == 2 else 1, len(tree.leaves))
        self.bias = np.broadcast_to(bias, shape).astype(float)
        self.required = np.full(images, -1) if labels is None else tree.leaves[np.asarray(labels, dtype=int)]
        self.proven = min(proven, len(tree.leaves))
        self.reached = np.full((images, len(tree.tokens) + 1), np.nan)
        self.reached[:, -1] = 0.0
        self.opening = np.zeros(images)
        self.open = np.zeros((images, len(tree.heads)), dtype=bool)
        self._spread = _spread(tree, self.bias, 1 / temperature)

    def record(self, images: np.ndarray, nodes: np.ndarray, values: np.ndarray) -> None:
        """Nodes were run: their children are known, and the heads among these are open.

        Args:
            images: (N,) image of each node. nodes: (N,), or ROOT; parents are known before or among them.
            values: log-probability of each child, given its path, in the order of `tree.below(nodes)`.
        """
        parent, children = self.tree.below(nodes)
        of, parents = images[parent], nodes[parent]
        depths = self.tree.depths[children]
        order = np.argsort(depths, kind="stable")  # parents before children
        for level in np.split(order, np.flatnonzero(np.diff(depths[order])) + 1):
            self.reached[of[level], children[level]] = values[level] + self.reached[of[level], parents[level]]
        self._set_open(of, children, True)
        self._set_open(images, nodes, False)

    def _set_open(self, images: np.ndarray, nodes: np.ndarray, value: bool) -> None:
        heads = np.where(nodes >= 0, self.tree.head_of[nodes], -1)
        self.open[images[heads >= 0], heads[heads >= 0]] = value

    def begin(self, opening: int) -> None:
        """The nodes that all responses begin with, so many, were read with the prompt; they end with a segment."""
        self.opening = self.reached[:, opening - 1].copy()

    def bounds(self, heads: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(B, number of heads) logarithm of the largest weight, exp(log-probability / temperature + bias), that the
        classes below each head can have together.

        After the opening, their probabilities p add up to no more than that of the node, P, and none is above 1. With
        a = 1 / temperature < 1, the sum of p ** a * exp(bias) is at most, by Hoelder's inequality,
        P ** a * (sum of exp(bias / (1 - a))) ** (1 - a), which is reached. With a >= 1 the best case is that one class
        has all of P.
        """
        reached = self.reached[:, self.tree.heads[heads]]
        return (reached - self.opening[:, None]) / self.temperature + self._spread[:, heads]

    def weights(self) -> np.ndarray:
        """(B, C) log-weights of the classes that were visited, else -inf."""
        reached = self.reached[:, self.tree.leaves]
        weights = (reached - self.opening[:, None]) / self.temperature + self.bias
        return np.where(np.isnan(reached), -np.inf, weights)

    @property
    def unexplored(self) -> np.ndarray:
        """(B,) how much any probability can be wrong at most: the share of all weight that the classes not visited may
        have."""
        rest, total = _masses(np.where(self.open, self.bounds(), -np.inf), self.weights())
        with np.errstate(invalid="ignore"):  # a model whose numbers have overflowed gives NaN, which the metrics refuse
            return np.where(self.open.any(1), rest[:, :1].sum(1) / total, 0.0)

    def wanted(self, room: int) -> np.ndarray:
        """(B, H) bool, the heads of the segments to visit now; none for an image whose search is over.

        Args:
            room: how many nodes of an image there is room for; the first segment is given in any case.
        """
        columns = np.flatnonzero(self.open.any(0))  # (M,)
        is_open = self.open[:, columns]
        heads = self.tree.heads[columns]
        bounds = np.where(is_open, self.bounds(columns), -np.inf)  # (B, M)
        # The most probable first, then those that are not open; what has overflowed comes before all.
        largest = np.finfo(float).max
        order = np.argsort(
            np.where(is_open, np.nan_to_num(-bounds, nan=-np.inf, posinf=largest, neginf=-np.inf), np.inf),
            axis=1,
            kind="stable",
        )
        label = self.required[:, None]
        required = np.take_along_axis(is_open & (heads <= label) & (label < self.tree.ends[heads]), order, axis=1)
        count = self._count(np.take_along_axis(bounds, order, axis=1)) if self.tolerance > 0 else is_open.sum(1)
        chosen = required | (np.arange(len(columns)) < count[:, None])
        # The required one takes its room first, then the others in their order.
        lengths = np.where(chosen, self.tree.segment_lengths[columns][order], 0)
        own = (lengths * required).sum(1, keepdims=True)
        taken = np.where(required, 0, own + np.cumsum(lengths * ~required, axis=1))
        first = ~required.any(1, keepdims=True) & (np.arange(len(columns)) == 0)
        result = np.zeros_like(self.open)
        result[np.arange(len(order))[:, None], columns[order]] = chosen & (first | (taken <= room))
        return result

    def _count(self, bounds: np.ndarray) -> np.ndarray:
        """(B,) how many of the most probable heads have to be visited by what is known now.

        Args:
            bounds: (B, M) in falling order.
        """
        weights = self.weights()
        rest, total = _masses(bounds, weights)
        count = (rest > self.tolerance * total[:, None]).sum(1)
        # Enough for the probabilities; now for the order of the first few.
        last = np.partition(weights, -self.proven, axis=1)[:, -self.proven, None]
        return np.where(count > 0, count, np.minimum(self.proven, (bounds > last).sum(1)))

    def nodes(self, chosen: np.ndarray, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The nodes of some segments, or of their whole branches: (N,) images and (N,) nodes, parents before
        children.

        Args:
            chosen: (B, H) bool, the heads.
        """
        images, heads = np.nonzero(chosen)
        starts = self.tree.heads[heads]
        which, nodes = ranges(starts, self.tree.ends[starts] if whole else starts + self.tree.segment_lengths[heads])
        inner = self.tree.predicts[nodes]
        return images[which[inner]], nodes[inner]

    @property
    def left(self) -> np.ndarray:
        """(B,) how many nodes a visit of all that was not visited would run."""
        return self.open @ self.tree.inner_below

    def needed(self, images: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """(b, A) bool, whether an open branch of some of the images goes through each of their nodes (b, A); -1 is no
        node."""
        before = np.pad(self.open[images].cumsum(1), ((0, 0), (1, 0)))  # (b, 1 + H)
        first, stop = (np.searchsorted(self.tree.heads, places) for places in (nodes, self.tree.ends[nodes]))
        found = np.take_along_axis(before, stop, axis=1) > np.take_along_axis(before, first, axis=1)
        return (nodes >= 0) & found

    def class_log_probabilities(self) -> np.ndarray:
        """(B, C) log-probability of each response. Classes not visited share the most that their branch can have
        equally."""
        result = self.reached[:, self.tree.leaves]
        images, heads = np.nonzero(self.open)
        nodes = self.tree.heads[heads]
        first, stop = self.tree.class_places
        which, places = ranges(first[nodes], stop[nodes])
        share = self.reached[images, nodes] - np.log(stop[nodes] - first[nodes])
        result[images[which], self.tree.by_leaf[places]] = share[which]
        return result


def _masses(bounds: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, M) the weight of each head and all after it, and (B,) that of all heads and classes, as shares of the
    largest. bounds: (B, M). weights: (B, C)."""
    with np.errstate(invalid="ignore"):  # see `Searches.unexplored`
        top = np.maximum(bounds.max(1, initial=-np.inf), weights.max(1))[:, None]
        rest = np.exp(bounds - top)[:, ::-1].cumsum(1)[:, ::-1]
        return rest, rest[:, :1].sum(1) + np.exp(weights - top).sum(1)


def _spread(tree: LabelTree, bias: np.ndarray, share: float) -> np.ndarray:
    """(B, H), or (1, H), what `Searches.bounds` adds for the classes below each head."""
    first, stop = (places[tree.heads] for places in tree.class_places)
    pairs = np.stack([first, stop], axis=1).ravel()  # every second part lies between two heads
    ordered = np.pad(bias[:, tree.by_leaf], ((0, 0), (0, 1)), constant_values=-np.inf)
    if share >= 1:
        return np.maximum.reduceat(ordered, pairs, axis=1)[:, ::2]
    return (1 - share) * np.logaddexp.reduceat(ordered / (1 - share), pairs, axis=1)[:, ::2]
