"""Image vectors: what the blocks of the vision encoder make of an image, pooled over its patches.

A linear classifier can tell classes by them (vlm/evaluation/head.py). They are taken while the encoder runs for the
language model, so they cost no pass of their own.

B = images, R = rows of the vision encoder (images, or their tiles), P = patches of a row, L = blocks, S = statistics,
W = width of a block.
"""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.common import UsageError, is_out_of_memory
from vlm.families.base import Family

STATISTICS = ("mean", "deviation", "class token")  # the last one only if the encoder has a class token
CLASS_TOKENS, REGISTERS = {"cls_token", "class_embedding", "class_token"}, "register_tokens"


class NoVectors(UsageError):
    """The vision encoder has no blocks, or what they give cannot be told apart by image."""


class Listening:
    """Listens to the blocks of the vision encoder, in `with`.

    Args:
        family: its vision encoder runs inside the `with`, once.
        layers: the blocks whose vectors are wanted, counted from 0; None: all.
    """

    def __init__(self, family: Family, layers: Sequence[int] | None = None) -> None:
        blocks = vision_blocks(family)
        if layers and max(layers) >= len(blocks):
            raise NoVectors(f"the vision encoder has {len(blocks)} blocks, not {max(layers) + 1}")
        self._blocks = {i: blocks[i] for i in (range(len(blocks)) if layers is None else layers)}
        self._chosen = layers is not None
        self._special = special_tokens(family.vision)
        self._heard: dict[int, list[Tensor]] = {i: [] for i in self._blocks}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for i, block in self._blocks.items():
            self._hooks.append(block.register_forward_hook(lambda _, __, output, i=i: self._hear(i, output)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hear(self, layer: int, output: Any) -> None:
        """Take the output of a block: (R, P, W), or (P of all images, W) where images are packed into one row."""
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if hidden.dim() == 2:  # pooled later, when it is known which patches are whose
            self._heard[layer].append(hidden)
            return
        patches = hidden[:, self._special :].float()
        variance, mean = torch.var_mean(patches, dim=1, correction=0)  # (R, P, W) -> (R, W)
        first = [hidden[:, 0].float()] if self._special else []
        self._heard[layer].append(torch.stack([mean, variance, *first], dim=1))  # (R, S, W)

    def vectors(self, shares: Sequence[int]) -> Tensor:
        """(B, L, S, W) float32 on the CPU: mean, deviation and, if there is one, class token of each image and block,
        for the L blocks that ran.

        Rounded to what float16 can hold, so that vectors from the feature cache are the same.

        Args:
            shares: how much each of the B images has of all rows, as whole numbers in any unit.

        Raises:
            NoVectors: the encoder was not run, or its rows do not add up to the shares.
        """
        # The last blocks are not run if the connector reads an earlier one.
        heard = [parts for parts in self._heard.values() if parts]
        if not heard or (self._chosen and len(heard) < len(self._heard)):
            raise NoVectors("the vision encoder has no blocks that run")
        layers = [_of_images(torch.cat(parts), shares) for parts in heard]
        bound = torch.finfo(torch.float16).max
        return torch.stack(layers, dim=1).clamp(-bound, bound).half().float().cpu()


def _of_images(heard: Tensor, shares: Sequence[int]) -> Tensor:
    """What was heard of a block -> (B, S, W).

    Args:
        heard: (R, S, W) mean, variance and class token of each row, or (P of all images, W).
    """
    common = math.gcd(*shares)
    unit, rest = divmod(len(heard) * common, sum(shares))
    if rest or not unit:
        raise NoVectors(f"{len(heard)} rows of the vision encoder are those of {len(shares)} images")
    images = []
    for part in heard.split([unit * share // common for share in shares]):
        if part.dim() == 2:  # (P, W)
            variance, mean = torch.var_mean(part.float(), dim=0, correction=0)
            images.append(torch.stack([mean, variance.sqrt()]))
            continue
        mean, variance, *others = part.unbind(1)  # (rows of the image, W) each; all rows have equally many patches
        whole = variance.mean(0) + mean.var(0, correction=0)
        images.append(torch.stack([mean.mean(0), whole.sqrt(), *(other.mean(0) for other in others)]))
    return torch.stack(images)


def vision_blocks(family: Family) -> list[nn.Module]:
    """The transformer blocks of the vision encoder, in their order. Raises NoVectors if it has none."""
    blocks: list[nn.Module] = [part for part in family.vision.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not blocks:
        raise NoVectors("the vision encoder has no transformer blocks")
    return blocks


def special_tokens(vision: nn.Module) -> int:
    """How many tokens stand before the patches: a class token, and registers after it."""
    named = {name.rsplit(".", 1)[-1]: tensor for name, tensor in vision.named_parameters()}
    if not CLASS_TOKENS & named.keys():
        return 0
    return 1 + (named[REGISTERS].shape[-2] if REGISTERS in named else 0)


@torch.no_grad()
def vectors_of(family: Family, inputs: dict[str, Tensor], shares: Sequence[int]) -> Tensor:
    """The vectors of images by a pass of the vision encoder alone; see `Listening.vectors`.

    Raises:
        NoVectors: the encoder has none.
    """
    with Listening(family) as listening:
        try:
            family.encoder_features({name: tensor.to(family.device) for name, tensor in inputs.items()})
        except Exception as error:  # each model that cannot be stopped after its encoder fails in its own way
            if is_out_of_memory(error):
                raise
            reason = f"this model's vision encoder has no features of its own ({type(error).__name__})"
            raise NoVectors(reason) from error
    return listening.vectors(shares)
