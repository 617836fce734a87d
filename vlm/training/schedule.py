"""Learning rate and randomness of a step, as functions of its number, so that a resumed run continues exactly."""

import math

import numpy as np


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout in one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate_at(step: int, total: int, warmup_ratio: float, peak: float) -> float:
    """Linear warm-up, then a half cosine to zero. A function of only the step."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
