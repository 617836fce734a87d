"""What is trained: all weights, the connector, or LoRA on the language model; and how LoRA is merged."""

from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from vlm.classifier import VLMClassifier
from vlm.config import DORA, PISSA, RSLORA, Settings
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
            use_dora=settings.lora_variant == DORA,
            use_rslora=settings.lora_variant == RSLORA,
            init_lora_weights="pissa" if settings.lora_variant == PISSA else True,
        )
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        if settings.lora_variant == PISSA:  # with them the adapter is made to fit the model as it was
            model.lora_at_start = {name: tensor.detach().clone() for name, tensor in lora_weights(model).items()}
    if settings.tune in ("lora", "connector") and (settings.align_connector or not settings.freeze_connector):
        family.connector.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data.float() if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.data
            )


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of LoRA, by the names that PEFT's files have, without their `base_model.model.`."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights on the CPU with LoRA merged, under the names they had before LoRA, quantized ones as plain ones.

    PiSSA has taken what LoRA starts with out of the weights, and the merging puts it back.

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
            state[f"{name}.weight"] = _merged_weight(module).detach().to("cpu", dtype)
    return state


def _merged_weight(layer: Any) -> Tensor:
    """The weight of a layer with its LoRA, in the number format of the latter."""
    update = layer.get_delta_weight(ADAPTER)
    weight = dequantize_module_weight(layer.get_base_layer()).to(update.dtype)
    if ADAPTER not in layer.lora_magnitude_vector:
        return weight + update
    # DoRA: each row has a length of its own, which is learned
    magnitude = layer.lora_magnitude_vector[ADAPTER]
    factors = magnitude.weight / magnitude.get_weight_norm(weight, update, scaling=1)
    return factors.unsqueeze(1) * (weight + update)


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
