"""The seeded order of the training images, cut into steps, batches and processes."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np


class Step(NamedTuple):
    """One optimizer step of one process.

    batches: the micro-batches of the process, as sample indices; counts: False if they are run with weight 0;
    indices: the samples of all processes in this step.
    """

    batches: list[list[int]]
    counts: bool
    indices: Sequence[int]


class Plan(Sequence[Step]):
    """The steps of an epoch, each made when it is asked for, because those of a million images would take 100 MB."""

    def __init__(self, order: np.ndarray, size: int, batch_size: int, world: int, rank: int, steps: range) -> None:
        self._order, self._size, self._batch_size = order, size, batch_size
        self._world, self._rank, self._steps = world, rank, steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, number: int) -> Step: ...

    @overload
    def __getitem__(self, number: slice) -> "Plan": ...

    def __getitem__(self, number: int | slice) -> "Step | Plan":
        if isinstance(number, slice):
            return Plan(self._order, self._size, self._batch_size, self._world, self._rank, self._steps[number])
        start = self._steps[number] * self._size
        chunk = self._order[start : start + self._size].tolist()
        own = chunk[self._rank :: self._world]
        picked = own or chunk[:1]
        batches = [picked[i : i + self._batch_size] for i in range(0, len(picked), self._batch_size)]
        return Step(batches, counts=bool(own), indices=chunk)


def epoch_plan(
    n: int, batch_size: int, accumulation: int, seed: int, epoch: int, world: int = 1, rank: int = 0
) -> Plan:
    """The steps of one epoch for one process. They depend only on the arguments, so resuming needs nothing else.

    All processes share one random order. Each step takes the next batch_size * accumulation * world samples of it; the
    last step takes the rest. Every process has every step, since all must take part in the exchange of gradients: if
    the last step has no sample left for a process, it runs a sample of another process with weight 0. So each sample
    counts once an epoch.

    Args:
        n: how many samples there are.
        batch_size: samples in a micro-batch of one process.
        accumulation: micro-batches in a step of one process.
        seed: of the run.
        epoch: its number; each epoch has another order.
        world: how many processes there are.
        rank: the number of this process.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    size = batch_size * accumulation * world
    return Plan(order, size, batch_size, world, rank, range(-(-n // size)))
