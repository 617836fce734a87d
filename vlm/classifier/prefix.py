"""Keys and values of the constant prefix: run once, put in front of every row.

B = batch, P = prefix tokens. One row of keys or values is (1, heads, P, width).
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer


class Recorded(DynamicLayer):
    """A layer of an empty cache that remembers what it is given. It may be run again: gradient checkpointing does."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class InFront(DynamicLayer):
    """A layer with the prefix, which is put in front of what it is given. It remembers nothing, so it may be run
    again."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        count = len(keys)
        whole = [
            torch.cat([own.expand(count, -1, -1, -1), new], dim=-2)
            for own, new in ((self.keys, keys), (self.values, values))
        ]
        return whole[0], whole[1]


def in_front(prefix: KeysAndValues) -> Cache:
    """A cache for training: rows see the prefix, and nothing is kept of them but what their gradient needs."""
    return Cache(layers=[InFront(keys, values) for keys, values in prefix])


def expand(cache: Cache, count: int) -> Cache:
    """A cache of `count` rows that shares the keys and values of a cache of one row, or of as many.

    What is added to it later is not added to the original.
    """
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in result.layers:
        layer.keys = layer.keys.expand(count, -1, -1, -1)
        layer.values = layer.values.expand(count, -1, -1, -1)
    return result


class StepPrefix:
    """The prefix of one optimizer step of several batches: run once, its gradient collected over the batches.

    Each batch but the last goes through `leaves`, where the gradients add up. The last goes through the keys and values
    themselves, and what was collected joins its gradient on the way back: one backward pass through the prefix for all
    batches, which with several processes is also the one in which they exchange gradients.
    """

    def __init__(self, prefix: KeysAndValues):
        self.prefix = prefix
        # In float32 at least: many small gradients are added up.
        self.leaves = [tuple(_leaf(tensor) for tensor in pair) for pair in prefix]

    def for_batch(self) -> KeysAndValues:
        """What a batch that is not the last puts in front of its rows."""
        return [
            tuple(leaf.to(own.dtype) for leaf, own in zip(*pairs, strict=True))
            for pairs in zip(self.leaves, self.prefix, strict=True)
        ]

    def for_last_batch(self) -> KeysAndValues:
        """What the last batch puts in front; its backward pass goes through the prefix, with the gradients of all
        batches."""
        for own, leaf in self._pairs():
            if own.requires_grad and leaf.grad is not None:
                own.register_hook(lambda gradient, leaf=leaf: gradient + leaf.grad.to(gradient.dtype))
        return self.prefix

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        for owns, leaves in zip(self.prefix, self.leaves, strict=True):
            yield from zip(owns, leaves, strict=True)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_(tensor.requires_grad)
