"""A module in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this room is imported before torch
    from torch import nn


@contextmanager
def evaluation_mode(module: "nn.Module") -> Iterator[None]:
    """Without dropout and the like inside; afterwards the module is in the mode that it was in, whatever was raised."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
