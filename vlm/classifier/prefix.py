"""Keys and values of the constant prefix: computed once, put before those of every row.

B = images, P = prefix tokens, L = row tokens. Keys and values of the prefix are (1, heads, P, width).
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer


class Recorded(DynamicLayer):
    """A layer of an empty cache that stores what it is given.

    The forward pass may run it again, as gradient checkpointing does.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class InFront(DynamicLayer):
    """A layer with the prefix, which it puts before what it is given.

    It stores nothing of that, so the forward pass may run it again.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _prepend(self.keys, key_states), _prepend(self.values, value_states)


def _prepend(prefix: Tensor, rows: Tensor) -> Tensor:
    """(1, heads, P, width) and (B, heads, L, width) -> (B, heads, P + L, width)."""
    return torch.cat([prefix.expand(len(rows), -1, -1, -1), rows], dim=-2)


def in_front(prefix: KeysAndValues) -> Cache:
    """A cache for training: rows see the prefix, and of them only what the gradient needs is kept."""
    return Cache(layers=[InFront(keys, values) for keys, values in prefix])


def expand(cache: Cache, count: int) -> Cache:
    """A cache of `count` rows that shares the keys and values of a cache of one row, or of as many.

    What is added to it later is not added to the original.
    """
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    change_layers(result, lambda tensor: tensor.expand(count, -1, -1, -1))  # (1, heads, K, width) -> (count, ...)
    return result


def change_layers(cache: Cache, change: Callable[[Tensor], Tensor]) -> None:
    """Change keys and values of every layer of a cache, each (B, heads, K, width)."""
    for layer in cache.layers:
        keyed = cast(DynamicLayer, layer)  # families whose layers have other states do not share their prefix
        assert keyed.keys is not None and keyed.values is not None, "the layer has been run"
        keyed.keys, keyed.values = change(keyed.keys), change(keyed.values)


def keys_and_values(cache: Cache) -> KeysAndValues:
    """Keys and values of each layer of a cache that was filled."""
    layers = [cast(InFront, layer) for layer in cache.layers]
    return [(layer.keys, layer.values) for layer in layers]


class StepPrefix:
    """The prefix of one optimizer step of several batches: run once, its gradient added up over the batches.

    All batches except the last read copies (`leaves`), where their gradients add up. The last batch reads the keys and
    values themselves, and the sum is added to its gradient in the backward pass. So there is one backward pass through
    the prefix for all batches; with several processes it is also the one in which they exchange gradients.
    """

    def __init__(self, prefix: KeysAndValues):
        self.prefix = prefix
        # In float32 at least, because many small gradients are added up.
        self.leaves = [(_leaf(keys), _leaf(values)) for keys, values in prefix]

    def for_batch(self) -> KeysAndValues:
        """What a batch that is not the last puts before its rows."""
        pairs = zip(self.leaves, self.prefix, strict=True)
        return [(keys.to(own.dtype), values.to(own.dtype)) for (keys, values), (own, _) in pairs]

    def for_last_batch(self) -> KeysAndValues:
        """What the last batch puts before its rows; its backward pass brings the gradients of all batches."""
        for own, leaf in self._pairs():
            if own.requires_grad and leaf.grad is not None:
                own.register_hook(lambda gradient, leaf=leaf: gradient + leaf.grad.to(gradient.dtype))
        return self.prefix

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        for owns, leaves in zip(self.prefix, self.leaves, strict=True):
            yield from zip(owns, leaves, strict=True)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_(tensor.requires_grad)
