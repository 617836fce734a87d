"""The seeded order of the training images, cut into steps, batches and processes."""

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """One optimizer step of one process.

    batches: its micro-batches of sample indices; counts=False: to be run, but with weight 0. indices: the samples of
    all processes.
    """

    batches: list[list[int]]
    counts: bool
    indices: list[int]


def epoch_plan(
    n: int, batch_size: int, accumulation: int, seed: int, epoch: int, world: int = 1, rank: int = 0
) -> list[Step]:
    """The steps of one epoch for one of `world` processes, as a function of the arguments alone: resuming needs no
    other state.

    All processes share one random order. Each step takes the next batch_size * accumulation * world samples of it, the
    last step what is left; every process has every step. A process for which nothing is left in the last step runs one
    sample of another one with weight 0, since all must take part in the exchange of gradients. So each sample counts
    once an epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    size = batch_size * accumulation * world
    steps = []
    for start in range(0, n, size):
        chunk = order[start : start + size]
        own = chunk[rank::world]
        picked = own or chunk[:1]
        steps.append(
            Step(
                [picked[i : i + batch_size] for i in range(0, len(picked), batch_size)], counts=bool(own), indices=chunk
            )
        )
    return steps
