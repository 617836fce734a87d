"""What is trained: all weights, the connector, or LoRA on the language model; and how LoRA is merged."""

from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from vlm.classifier import VLMClassifier
from vlm.config import Settings
from vlm.families import Family

ADAPTER = "default"


def prepare_tuning(family: Family, settings: Settings) -> None:
    """Freeze and unfreeze the parts, add LoRA, and keep the trained weights in float32.

    LoRA (Hu et al. 2021, arXiv 2106.09685) is put on every linear layer of the language model, in place: the modules
    keep their names. A connector that is aligned first is trainable until then, even with `--freeze-connector`.
    """
    model = family.model
    model.requires_grad_(settings.tune == "full")
    if settings.tune == "lora":
        targets = family.linear_layers(language=True)
        torch.manual_seed(settings.seed)  # the matrices start at random
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=cast(int, settings.lora_alpha),  # peft takes any number
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            bias="none",
        )
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    if settings.tune in ("lora", "connector") and (settings.align_connector or not settings.freeze_connector):
        family.connector.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data.float() if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.data
            )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights on the CPU with LoRA merged, under the names they had before LoRA, quantized ones as plain ones.

    Merging into the model and taking it back out would change the weights by rounding, and a resumed run with them.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.partition(".base_layer.")
        # The other parts are the weight, which follows, and how it is quantized.
        if ".lora_" not in name and part in ("", "bias"):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            state[f"{layer}.{part}" if part else name] = tensor.detach().to("cpu", kind)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            update = cast(Any, module).get_delta_weight(ADAPTER)  # each kind of LoRA layer has it, their base has not
            weight = dequantize_module_weight(module.get_base_layer())
            state[f"{name}.weight"] = (weight.to(update.dtype) + update).detach().to("cpu", dtype)
    return state


def parameter_groups(
    classifier: VLMClassifier, weight_decay: float, learning_rate: float, connector_learning_rate: float
) -> list[dict]:
    """AdamW groups. Matrices are decayed, biases and norms are not; the connector may have a learning rate of its own.

    Each group keeps its peak learning rate as `peak_lr`, from which the schedule is computed.
    """
    inside = {id(p) for p in classifier.family.connector.parameters()}
    groups = []
    for connector, peak in ((False, learning_rate), (True, connector_learning_rate)):
        part = [p for p in trained_parameters(classifier).values() if (id(p) in inside) == connector]
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            some = [p for p in part if (p.ndim >= 2) == matrices]
            if some:
                groups.append({"params": some, "weight_decay": decay, "lr": peak, "peak_lr": peak})
    return groups
