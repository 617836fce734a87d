"""LoRA's joined product against peft's own forward."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vlm.training.loop import lora
from vlm.training.lora import join_products


def layers(dropout=0.0, bias=True, dtype=torch.float64):
    """A layer as peft has it, and the same with the product joined."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=bias).to(dtype))
    model.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    inject_adapter_in_model(config, model, adapter_name="default")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter, dtype=dtype)
    joined = copy.deepcopy(model)
    join_products(joined, "default")
    return model, joined


def results(model, x):
    x = x.clone().requires_grad_(True)
    y = model(x)
    (y**2).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6)])
def test_output_and_gradients_are_those_of_peft(monkeypatch, bias, shape):
    model, joined = layers(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = results(model, x)
    monkeypatch.setattr(type(model[0]), "forward", None)  # or peft's own would pass
    found = results(joined, x)
    assert set(found[2]) == {"0.lora_A.default.weight", "0.lora_B.default.weight"}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_is_the_derivative():
    _, joined = layers()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(joined, (x,))


def test_an_input_without_gradient_gets_none():
    _, joined = layers()
    y = joined(torch.randn(3, 6, dtype=torch.float64))
    y.sum().backward()
    assert joined[0].lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("case", ["dropout", "number format", "autocast"])
def test_what_the_joined_product_cannot_do_is_left_to_peft(monkeypatch, case):
    monkeypatch.setattr(lora._Joined, "apply", None)
    model, joined = layers(dropout=0.5 if case == "dropout" else 0.0, dtype=torch.float32)
    x = torch.randn(3, 6, dtype=torch.bfloat16 if case == "number format" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case != "dropout"):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(joined(x), expected, rtol=0, atol=0)


def test_under_autocast_the_products_are_in_its_format_and_no_input_is_copied_to_float32(monkeypatch):
    """As on a GPU in bfloat16: frozen weights in it, LoRA's in float32."""
    model, joined = layers(dtype=torch.bfloat16)
    for one in (model, joined):
        for parameter in one.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    x = torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, x)
        monkeypatch.setattr(type(model[0]), "forward", None)
        found = results(joined, x)
    assert found[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found[2].values())
    for ours, theirs in zip(
        [found[0], found[1], *found[2].values()], [expected[0], expected[1], *expected[2].values()], strict=True
    ):
        assert (ours.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()
