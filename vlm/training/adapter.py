"""What LoRA learned, in PEFT's format: a few MB that turn the model as it was before the training into the trained one.

It is written into a folder of the model folder, where `PeftModel.from_pretrained` finds it, and where a program that
loads the merged model does not look.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.common import note
from vlm.config import ADAPTER_FOLDER, PISSA, Settings
from vlm.families import Family
from vlm.training.tuning import ADAPTER, lora_weights

PREFIX = "base_model.model."  # of all names in PEFT's files
WEIGHTS = "adapter_model.safetensors"


def adapter_writer(family: Family, settings: Settings, revision: str | None) -> Callable[[Path], None] | None:
    """What writes the adapter of the model as it is at that moment into a model folder; None if there is none.

    A note says so if LoRA is trained, and PEFT's format cannot hold what is trained with it.

    Args:
        revision: commit of the model on the hub.
    """
    if settings.tune != "lora":
        return None
    model, others = family.model, set[str]()
    if settings.align_connector or not settings.freeze_connector:
        inside = {id(parameter) for parameter in family.connector.parameters()}
        others = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
    modules = modules_of(model, others)
    if left := others - {name for module in modules for name in others if name.startswith(f"{module}.")}:
        note(
            f"note: the models of this run get no {ADAPTER_FOLDER}/, as {min(left)} of the connector is trained, and "
            "is no layer, which PEFT's format needs. --freeze-connector trains only what it can hold.\n"
        )
        return None

    def write(folder: Path) -> None:
        config = copy.deepcopy(model.peft_config[ADAPTER])
        lora = lora_weights(model)
        if settings.lora_variant == PISSA:
            lora = _as_lora(lora, model.lora_at_start)
            config.init_lora_weights = True
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # the scale stays the same
        state = model.state_dict()
        tensors = lora | {name: state[name] for name in others}
        config.modules_to_save = modules or None
        config.base_model_name_or_path, config.revision = settings.model, revision
        config.inference_mode = True
        (folder / ADAPTER_FOLDER).mkdir()
        kept = {f"{PREFIX}{name}": tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_file(kept, folder / ADAPTER_FOLDER / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder / ADAPTER_FOLDER)

    return write


def modules_of(model: nn.Module, names: set[str]) -> list[str]:
    """The names of the modules, as few as possible, all of whose parameters are among those that are named."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if own and own <= names and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found


def _as_lora(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PiSSA learned as a LoRA of twice the rank, which fits the model as it was before PiSSA changed its weights.

    PiSSA starts with B0 A0 and takes that out of the weights, so that what was learned is the difference
    B A - B0 A0 = [B, -B0] [A; A0].
    """
    sides: dict[str, Any] = {"lora_A": (0, 1.0), "lora_B": (1, -1.0)}
    joined = {}
    for name, tensor in after.items():
        dimension, sign = next(side for part, side in sides.items() if f".{part}." in name)
        joined[name] = torch.cat([tensor, sign * before[name].to(tensor)], dimension)
    return joined
