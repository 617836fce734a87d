"""The state that a run is resumed from: trained weights and optimizer as safetensors, the rest as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlm.common import RunError, recover, write_folder
from vlm.config import STATE

WEIGHTS, OPTIMIZER, REST = "trained.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch, step_in_epoch: the next step. step: optimizer steps done. seconds: of training so far.
        best_accuracy, best_loss, best_step: of the best model, on the validation split.
        zero_shot: test metrics of the untrained model, if they were asked for.
        alignment: what `align_connector` returned, if it was asked for.
        history: the logged figures, in their order.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    zero_shot: dict[str, float] | None = None
    alignment: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(
    output: Path,
    learned: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
    scaler: dict[str, Any] | None,
) -> None:
    """Save what a resumed run needs; the rest is a function of seed and step.

    Args:
        learned: the trained weights by name.
        settings, fingerprint: what must be equal when the run is resumed.
        scaler: the state of the gradient scaler of float16.

    Raises:
        RunError: the state cannot be written.
    """

    def write(new: Path) -> None:
        save_file({name: p.detach().contiguous() for name, p in learned.items()}, new / WEIGHTS)
        states = optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": value.contiguous() for index, state in states.items() for name, value in state.items()
        }
        save_file(tensors, new / OPTIMIZER)
        values = {"settings": settings, "fingerprint": fingerprint, "scaler": scaler, "progress": asdict(progress)}
        (new / REST).write_text(json.dumps(values), encoding="utf-8")  # plain JSON, because infinities are kept here

    write_folder(output / STATE, write)


def read_state(output: Path) -> dict[str, Any] | None:
    """Settings, fingerprint and progress of the newest saved state, or None if there is none."""
    recover(output / STATE)
    path = output / STATE / REST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_state(output: Path, learned: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put saved weights and optimizer state back in place.

    Raises:
        RunError: the state does not fit the model.
    """
    saved = load_file(output / STATE / WEIGHTS)
    if saved.keys() != learned.keys() or any(saved[name].shape != p.shape for name, p in learned.items()):
        raise RunError(
            f"the state in {output / STATE} has other weights than this model trains, as one of an earlier version "
            "may have: start again with --overwrite."
        )
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(saved[name])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(output / STATE / OPTIMIZER).items():
        index, name = key.split(".", 1)
        states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
