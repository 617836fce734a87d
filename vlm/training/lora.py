"""LoRA's product in fewer passes over memory than peft's, where nothing but the plain product is asked for. The modules
stay peft's.

N = tokens, I = inputs, O = outputs, R = rank.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def join_products(model: nn.Module, adapter: str) -> None:
    """Let every LoRA layer of a model with this one adapter compute its two products as one operation."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.forward = partial(_forward, module, adapter, module.forward)


def _forward(layer: LoraLinear, adapter: str, general: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's forward, or the joined one: the same numbers but for rounding. peft's would make a float32 copy of x under
    autocast."""
    base, down, up = layer.get_base_layer(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    plain = type(base) is nn.Linear and not (args or kwargs or layer.disable_adapters or layer.merged)
    drops = layer.training and isinstance(layer.lora_dropout[adapter], nn.Dropout) and layer.lora_dropout[adapter].p > 0
    casts = torch.is_autocast_enabled(
        x.device.type
    )  # LoRA's weights are float32 then, and the products in the format of the others
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    alike = base.weight.dtype == dtype and (casts or down.dtype == dtype)
    if not (plain and alike) or drops or base.weight.requires_grad:
        return general(x, *args, **kwargs)
    return _Joined.apply(x.to(dtype), base.weight, base.bias, down.to(dtype), up.to(dtype), layer.scaling[adapter])


class _Joined(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T for a frozen W. The second product is added to the first in place, forward and
    backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """x: (..., I). weight: (O, I). bias: (O,). down: (R, I). up: (O, R) -> (..., O)."""
        rows = x.flatten(0, -2)
        inner = rows @ down.T
        result = nn.functional.linear(rows, weight, bias)
        result.addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return result.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_inner = (gradient @ up).mul_(ctx.scale)  # (N, R)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, down).reshape(ctx.shape)
        return of_x, None, None, of_inner.T @ rows, (gradient.T @ inner).mul_(ctx.scale), None
