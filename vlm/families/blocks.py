"""What is done with all transformer blocks of a model: gradient checkpointing and compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.families.base import Family

COMPILATIONS = 4  # of a block: for rows and for the prefix, with and without gradients


def checkpoint_blocks(family: Family) -> None:
    """Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): a block keeps only its input, and runs again in the
    backward pass.

    transformers' own switch drops the cache, and with it the prefix.
    """
    for block in _blocks(family.model):
        block.forward = partial(_checkpointed, block.forward)


def compile_blocks(family: Family, backend: str = "inductor") -> None:
    """Have torch compile the blocks of the language model: at first use, and again for input of another kind.

    Args:
        backend: one of torch's.
    """
    blocks = _blocks(family.language)
    # All blocks share their code. torch gives up after eight compilations of the same code, and compiles it for each
    # block.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS * len(blocks))
    for block in blocks:
        block.compile(backend=backend, dynamic=True)


def _blocks(module: nn.Module) -> list[GradientCheckpointingLayer]:
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward whose activations are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
