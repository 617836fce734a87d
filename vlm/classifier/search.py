"""The label tree run through a model: the nodes that the searches of a batch ask for, in passes of bounded size.

B = images whose search continues, N = nodes of one pass, A = nodes of earlier passes that are still in the cache, K =
tokens of prompt and opening, R = nodes of a pass over all images, D = width, V = vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlm.classifier.best_first import Searches
from vlm.classifier.label_tree import LabelTree
from vlm.classifier.prefix import change_layers, expand
from vlm.families import Family

TOLERANCE = 1e-4  # how much a probability may be wrong at most
PROVEN = 1  # the prediction; of the others those with more than the tolerance are proven anyway
NODES_AT_ONCE = 2048  # of all images in one pass
# The fixed cost of a pass on a CPU, in nodes (docs/experiments.md). Elsewhere it is far larger: NODES_AT_ONCE.
PASS_COST = 80
NODES_KEPT = 4096  # of all images, between passes; above, those that no open branch goes through are dropped
LOGITS_AT_ONCE = 2**25  # elements of one block of logits: 128 MiB in float32


@dataclass
class Reading:
    """Prompts that were read, from which scoring and writing continue.

    Attributes:
        cache: keys and values of K tokens: the prompt and the opening.
        seen: (B, K) bool, True at the prompt. seen_opening: (B, K) bool, True at the prompt and the opening.
        states: (B, 1 + O, D) hidden states of the last prompt token and of the O tokens of the opening.
        next_position: (B,) position of the first token after the prompt.
    """

    cache: Cache
    seen: Tensor
    seen_opening: Tensor
    states: Tensor
    next_position: Tensor


def run_searches(family: Family, tree: LabelTree, reading: Reading, searches: Searches) -> None:
    """Run all searches to their end.

    Args:
        family: the model. tree: its label tree. reading: prompts that were read; left as they are. searches: those of
            its images.
    """
    _record_opening(family, tree, reading, searches)
    state = TreeState(family, tree, reading)
    for number in itertools.count(1):
        room = max(1, NODES_AT_ONCE // max(1, len(state.images)))
        chosen = searches.wanted(room)
        going_on = chosen[state.images].any(1)
        if not going_on.any():
            return
        if not going_on.all():
            state.keep_images(np.flatnonzero(going_on))
        spare = number * _pass_cost(reading.states.device)
        whole = _all_at_once(searches, state.images, chosen, room, spare)
        images, nodes = searches.nodes(searches.open & chosen.any(1, keepdims=True) if whole else chosen, whole)
        rows, columns, padded = _pad(np.searchsorted(state.images, images), nodes, len(state.images))
        hidden = state.run(padded)
        _record(family, tree, searches, images, nodes, hidden[_index(rows, hidden), _index(columns, hidden)])
        state.drop_finished(searches)


def _pass_cost(device: torch.device) -> int:
    return PASS_COST if device.type == "cpu" else NODES_AT_ONCE


def _all_at_once(searches: Searches, images: np.ndarray, chosen: np.ndarray, room: int, spare: int) -> bool:
    """Whether to visit all that is left, in place of the segments that the searches want.

    Only afterwards is it known if the wanted segments were enough or if more passes follow. So a visit of all may run
    additional nodes that cost, over the batch with its padding, as much as the fixed costs of the passes up to this
    one. Then at most about twice the cost of the better way is paid, whichever it is.

    Args:
        images: those that go on. chosen: (B, H) bool, the segments wanted. room: nodes an image in one pass.
        spare: the fixed costs of these passes, in nodes.
    """
    whole = searches.left[images].max()
    wanted = (chosen[images] @ searches.tree.segment_lengths).max()
    certain = searches.tolerance == 0  # all will be visited in any case
    return bool(whole <= room and (certain or len(images) * (whole - wanted) <= spare))


def _record_opening(family: Family, tree: LabelTree, reading: Reading, searches: Searches) -> None:
    """What the states of prompt and opening predict: the first nodes, then those after each node of the opening."""
    images, predicting = reading.states.shape[:2]  # the first nodes of a tree with one beginning, after ROOT
    nodes = np.tile(np.arange(predicting) - 1, images)
    # (B, 1 + O, D) -> (B * (1 + O), D): the states of all images, one after the other
    _record(family, tree, searches, np.repeat(np.arange(images), predicting), nodes, reading.states.flatten(0, 1))
    searches.begin(predicting - 1)


def _record(
    family: Family, tree: LabelTree, searches: Searches, images: np.ndarray, nodes: np.ndarray, states: Tensor
) -> None:
    """Tell the searches the log-probabilities of all children of some nodes, or of ROOT.

    Args:
        images: (R,) image of each node. nodes: (R,). states: (R, D) their hidden states.
    """
    parent, children = tree.below(nodes)
    tokens = tree.tokens[children]
    values = np.empty(len(children))
    for block in _blocks(len(nodes), family.vocabulary):
        here = slice(*np.searchsorted(parent, (block.start, block.stop)))
        logits = family.logits(states[block])  # (rows of the block, V)
        row, token = (_index(x, logits) for x in (parent[here] - block.start, tokens[here]))
        values[here] = (logits[row, token] - logits.logsumexp(-1)[row]).double().cpu().numpy()
    searches.record(images, nodes, values)


def _blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class TreeState:
    """The cache that the nodes of later passes read, and which node is where in it.

    Attributes:
        images: numbers of the B images that it holds.
        nodes: (B, A) node of each token after prompt and opening, -1 at padding.
    """

    def __init__(self, family: Family, tree: LabelTree, reading: Reading):
        self.family = family
        self.tree = tree
        self.images = np.arange(len(reading.states))
        self.cache = expand(reading.cache, len(self.images))
        self.seen = reading.seen_opening
        self.next_position = reading.next_position
        self.nodes = np.empty((len(self.images), 0), dtype=int)

    def run(self, new: np.ndarray) -> Tensor:
        """(B, N, D) states of nodes (B, N) of each image, -1 at padding, whose ancestors are in the cache or among
        them."""
        tokens = np.where(new >= 0, self.tree.tokens[new], 0)
        depths = np.where(new >= 0, self.tree.depths[new], 0)
        self.nodes = np.concatenate([self.nodes, new], axis=1)
        tree_part = _index(self.tree.sees(new, self.nodes), self.seen)
        allowed = torch.cat([self.seen.unsqueeze(1).expand(-1, new.shape[1], -1), tree_part], dim=-1).unsqueeze(1)
        positions = self.family.text_positions(self.next_position.unsqueeze(1) + _index(depths, self.seen))
        embeddings = self.family.embed(_index(tokens, self.seen))
        return self.family.run_language(embeddings, positions, self.cache, allowed)

    def keep_images(self, which: np.ndarray) -> None:
        """Continue with some of the images."""
        index = _index(which, self.seen)
        self.images, self.nodes = self.images[which], self.nodes[which]
        self.seen, self.next_position = self.seen[index], self.next_position[index]
        change_layers(self.cache, lambda tensor: tensor[index])

    def drop_finished(self, searches: Searches) -> None:
        """Where the cache has grown large, keep only the nodes that an open branch goes through."""
        if self.nodes.size <= NODES_KEPT:
            return
        rows, columns = np.nonzero(searches.needed(self.images, self.nodes))
        _, _, places = _pad(rows, columns, len(self.images))
        prompt = self.seen.shape[1]
        self.nodes = np.where(places >= 0, np.take_along_axis(self.nodes, np.maximum(places, 0), axis=1), -1)
        index = _index(np.maximum(places, 0), self.seen)[:, None, :, None]
        change_layers(self.cache, lambda tensor: _gather(tensor, index, prompt))


def _gather(tensor: Tensor, index: Tensor, prompt: int) -> Tensor:
    """(B, heads, K + A, width) -> the first K places and those of the rest that (B, 1, A', 1) names."""
    rest = tensor[:, :, prompt:]
    kept = rest.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
    return torch.cat([tensor[:, :, :prompt], kept], dim=2)


def _index(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def _pad(rows: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of rows, in the order of the rows, side by side: (R,) row and (R,) column of each, and (count, longest)
    the values there, padded with -1."""
    lengths = np.bincount(rows, minlength=count)
    columns = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]
    result = np.full((count, lengths.max()), -1)
    result[rows, columns] = values
    return rows, columns, result
