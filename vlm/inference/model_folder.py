"""The model folder and the state to resume from, each written whole or not at all. Tensors are safetensors, the rest is
JSON."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlm.classifier.classifier import VLMClassifier
from vlm.common.errors import RunError, UsageError
from vlm.common.progress import replacing
from vlm.training.output import DEMO_MODEL, METADATA, STATE
from vlm.training.tuning import merged_state_dict


@dataclass
class Progress:
    """Where a run stands. epoch and step_in_epoch: what comes next. step: optimizer steps done. seconds: of training so
    far.

    zero_shot: the test metrics of the model before the first step, where they were asked for. alignment: see
    vlm/training/first_stage.py, where the connector was never trained.
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


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside the old one, then put it in its place: a reader never sees half of it.

    A run that is killed between the two renames leaves the old folder as `NAME.old`, which `recover` puts back.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write(new)
        usual_modes(new)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error}. What was saved before is unharmed; make room, then go on with --resume."
        ) from error


def usual_modes(folder: Path) -> None:
    """Give the files of a folder the mode that files of the user have: safetensors are written for their owner
    alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def recover(folder: Path) -> None:
    """Undo what a killed `write_folder` left."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; a number that JSON does not know (NaN, infinite) becomes null."""
    with replacing(path) as new:
        new.write_text(json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and values - values != 0 else values


def save_model_folder(folder: Path, classifier: VLMClassifier, metadata: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights (LoRA merged), processor and metadata: all that inference needs, and loadable without this program."""

    def write(new: Path) -> None:
        classifier.family.save(new, merged_state_dict(classifier.model, dtype), dtype)
        write_json(new / METADATA, metadata)

    write_folder(folder, write)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata in a model folder or beside it.

    Raises:
        UsageError: there is none, it is not readable, or what lies beside the folder tells of a model that was made
            from it.
    """
    for path in (folder / METADATA, folder.parent / METADATA):
        if path.is_file():
            try:
                metadata = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{path} is not readable ({error}). It is written by train_vlm.py with the model."
                ) from error
            if not isinstance(metadata, dict) or not {"class_names", "prompts"} <= metadata.keys():
                raise UsageError(f"{path} names no classes and prompts: it was not written by train_vlm.py.")
            if path.parent != folder and _is_where_it_started(folder, metadata):
                raise UsageError(f"{folder} is the model before the training: take {folder.parent / 'best_model'}.")
            if (folder / "best_model").is_dir():
                raise UsageError(f"{folder} is the folder of a run: its model is {folder / 'best_model'}.")
            return metadata
    raise UsageError(
        f"no {METADATA} in {folder} or beside it: --model-dir takes a folder such as vlm_results/best_model."
    )


def _is_where_it_started(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether a folder is the untrained model of the run that the metadata beside it tell of."""
    return folder.name == DEMO_MODEL or Path(str(metadata.get("model"))).expanduser().resolve() == folder.resolve()


# The state to resume from


def save_state(
    output: Path,
    learned: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
    scaler: dict[str, Any] | None,
) -> None:
    """Save what a resumed run needs: learned weights by name, optimizer, progress, settings. The rest is a function of
    seed and step."""

    def write(new: Path) -> None:
        save_file({name: p.detach().contiguous() for name, p in learned.items()}, new / "trained.safetensors")
        states = optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": value.contiguous() for index, state in states.items() for name, value in state.items()
        }
        save_file(tensors, new / "optimizer.safetensors")
        values = {"settings": settings, "fingerprint": fingerprint, "scaler": scaler, "progress": asdict(progress)}
        (new / "state.json").write_text(json.dumps(values), encoding="utf-8")  # infinities are kept here

    write_folder(output / STATE, write)


def read_state(output: Path) -> dict[str, Any] | None:
    """Settings, fingerprint and progress of the newest saved state, or None where there is none."""
    recover(output / STATE)
    path = output / STATE / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_state(output: Path, learned: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put saved weights and optimizer state back in place.

    Raises:
        RunError: the state does not fit the model.
    """
    saved = load_file(output / STATE / "trained.safetensors")
    if saved.keys() != learned.keys() or any(saved[name].shape != p.shape for name, p in learned.items()):
        raise RunError(f"the state in {output / STATE} does not fit this model: start again with --overwrite.")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(saved[name])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(output / STATE / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
