"""The label tree run through a model: the nodes that the searches of a batch ask for, in passes of bounded size.

B = images whose search continues, N = nodes of one pass, A = nodes of earlier passes that are still in the cache, K =
tokens of prompt and opening, R = nodes of a pass over all images, D = width, V = vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlm.classifier.label_tree import LabelTree, Search
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


def run_searches(family: Family, tree: LabelTree, reading: Reading, searches: Sequence[Search]) -> None:
    """Run all searches to their end.

    Args:
        family: the model. tree: its label tree. reading: prompts that were read; left as they are. searches: one an
            image.
    """
    _record_opening(family, tree, reading, searches)
    state = TreeState(family, tree, reading)
    for number in itertools.count(1):
        room = max(1, NODES_AT_ONCE // max(1, len(state.images)))
        chosen = [searches[image].next(room) for image in state.images]
        going_on = [i for i, segments in enumerate(chosen) if segments]
        if not going_on:
            return
        if len(going_on) < len(chosen):
            state.keep_images(going_on)
        active = [searches[image] for image in state.images]
        segments = [chosen[i] for i in going_on]
        if _all_at_once(active, segments, room, number * _pass_cost(reading.states.device)):
            segments = [search.rest() for search in active]
        nodes = [[node for segment in some for node in segment] for some in segments]
        hidden = state.run(nodes)
        _record(family, tree, active, nodes, hidden)
        for search, some in zip(active, segments, strict=True):
            for segment in some:
                search.visited(segment)
        state.drop_finished(active)


def _pass_cost(device: torch.device) -> int:
    return PASS_COST if device.type == "cpu" else NODES_AT_ONCE


def _all_at_once(
    searches: Sequence[Search], segments: Sequence[Sequence[Sequence[int]]], room: int, spare: int
) -> bool:
    """Whether to visit all that is left, in place of the segments that the searches want.

    Only afterwards is it known if the wanted segments were enough or if more passes follow. So a visit of all may run
    additional nodes that cost, over the batch with its padding, as much as the fixed costs of the passes up to this
    one. Then at most about twice the cost of the better way is paid, whichever it is.

    Args:
        room: nodes an image in one pass. spare: the fixed costs of these passes, in nodes.
    """
    whole = max(search.left for search in searches)
    wanted = max(sum(map(len, some)) for some in segments)
    certain = all(search.tolerance == 0 for search in searches)  # all will be visited in any case
    return whole <= room and (certain or len(searches) * (whole - wanted) <= spare)


def _record_opening(family: Family, tree: LabelTree, reading: Reading, searches: Sequence[Search]) -> None:
    """What the states of prompt and opening predict: the first nodes, then those after each node of the opening."""
    opening = list(range(reading.states.shape[1] - 1))  # the first nodes of a tree with one beginning
    predicting = [-1, *opening]
    _record(family, tree, searches, [predicting] * len(searches), reading.states)
    for search in searches:
        search.begin(opening)


def _record(
    family: Family,
    tree: LabelTree,
    searches: Sequence[Search],
    nodes: Sequence[Sequence[int]],
    hidden: Tensor,
) -> None:
    """Tell the searches the log-probabilities of all children of some nodes (-1: the prompt).

    Args:
        nodes: for each image. hidden: (B, N, D) their states, padded.
    """
    rows = [(i, n) for i, some in enumerate(nodes) for n in range(len(some))]
    below = [tree.first if nodes[i][n] < 0 else tree.children[nodes[i][n]] for i, n in rows]
    row_of = np.repeat(np.arange(len(rows)), [len(some) for some in below])
    flat = np.concatenate(below).astype(int)
    # (B, N, D) -> (R, D): the states of all nodes of all images, without padding
    states = hidden[tuple(torch.tensor(rows, device=hidden.device).T)]
    values = np.empty(len(flat))
    for block in _blocks(len(rows), family.vocabulary):
        here = np.flatnonzero((row_of >= block.start) & (row_of < block.stop))
        logits = family.logits(states[block])  # (rows of the block, V)
        row, token = (
            torch.from_numpy(x).to(logits.device) for x in (row_of[here] - block.start, tree.tokens[flat[here]])
        )
        values[here] = (logits[row, token] - logits.logsumexp(-1)[row]).double().cpu().numpy()
    image_of = np.array([i for i, _ in rows])[row_of]
    for i, search in enumerate(searches):
        own = image_of == i
        search.record(flat[own], values[own])


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
        self.images = list(range(len(reading.states)))
        self.cache = expand(reading.cache, len(self.images))
        self.seen = reading.seen_opening
        self.next_position = reading.next_position
        self.nodes = np.empty((len(self.images), 0), dtype=int)

    def run(self, nodes: Sequence[Sequence[int]]) -> Tensor:
        """(B, N, D) states of nodes of each image, whose ancestors are in the cache or among them."""
        new = _pad(nodes)
        tokens = np.where(new >= 0, self.tree.tokens[new], 0)
        depths = np.where(new >= 0, self.tree.depths[new], 0)
        self.nodes = np.concatenate([self.nodes, new], axis=1)
        device = self.seen.device
        tree_part = torch.from_numpy(self.tree.sees(new, self.nodes)).to(device)
        allowed = torch.cat([self.seen.unsqueeze(1).expand(-1, new.shape[1], -1), tree_part], dim=-1).unsqueeze(1)
        positions = self.family.text_positions(self.next_position.unsqueeze(1) + torch.from_numpy(depths).to(device))
        embeddings = self.family.embed(torch.from_numpy(tokens).to(device))
        return self.family.run_language(embeddings, positions, self.cache, allowed)

    def keep_images(self, which: Sequence[int]) -> None:
        """Continue with some of the images."""
        index = torch.tensor(which, device=self.seen.device)
        self.images = [self.images[i] for i in which]
        self.nodes, self.seen, self.next_position = self.nodes[which], self.seen[index], self.next_position[index]
        change_layers(self.cache, lambda tensor: tensor[index])

    def drop_finished(self, searches: Sequence[Search]) -> None:
        """Where the cache has grown large, keep only the nodes that an open branch goes through."""
        if self.nodes.size <= NODES_KEPT:
            return
        places = []
        for own, search in zip(self.nodes, searches, strict=True):
            open_nodes = np.array(sorted(search.open), dtype=int)
            needed = self.tree.sees(open_nodes, own).any(0) if len(open_nodes) else np.zeros(len(own), dtype=bool)
            places.append(np.flatnonzero(needed).tolist())
        kept = _pad(places)
        prompt = self.seen.shape[1]
        self.nodes = np.where(kept >= 0, np.take_along_axis(self.nodes, np.maximum(kept, 0), axis=1), -1)
        index = torch.from_numpy(np.maximum(kept, 0)).to(self.seen.device)[:, None, :, None]
        change_layers(self.cache, lambda tensor: _gather(tensor, index, prompt))


def _gather(tensor: Tensor, index: Tensor, prompt: int) -> Tensor:
    """(B, heads, K + A, width) -> the first K places and those of the rest that (B, 1, A', 1) names."""
    rest = tensor[:, :, prompt:]
    kept = rest.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
    return torch.cat([tensor[:, :, :prompt], kept], dim=2)


def _pad(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of unequal length -> (B, longest), padded with -1."""
    result = np.full((len(rows), max(map(len, rows))), -1)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result
