"""The state that a run is resumed from: trained weights and optimizer as safetensors, the rest as JSON.

The one that was saved before is kept too, and used if the newest is damaged.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.common import UsageError, check_checksums, existing, first_line, note, read_json, remove, write_folder
from vlm.config import METADATA, PREVIOUS_STATE, STATE, different_settings, read_run

WEIGHTS, OPTIMIZER, REST = "trained.safetensors", "optimizer.safetensors", "state.json"
START_AGAIN = "start again with --overwrite"
OLD_NAMES = {"training pictures": "training images"}  # in states of earlier versions


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch, step_in_epoch: the next step. step: optimizer steps done. seconds: of training so far.
        best_accuracy, best_loss, best_step: of the best model, on the validation split.
        evaluated_step: the step of the last evaluation. without_better: evaluations since the best model.
        zero_shot: test metrics of the untrained model, if they were asked for.
        alignment: what `align_connector` returned, if it was asked for.
        history: the logged figures, in their order.
        places: how far each process has read the stream, as `Place`; empty without one.
        unreadable: the positions of training images that cannot be read, with the reasons.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    evaluated_step: int = -1
    without_better: int = 0
    zero_shot: dict[str, float] | None = None
    alignment: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass
class Belonging:
    """What a state belongs to. All of it must be equal when the run is resumed.

    Attributes:
        run_id: of the run. settings: as JSON values. data: digests of the data by name (see `Data.fingerprint`).
        fingerprint: what the order of the samples depends on, next to the settings.
    """

    run_id: str
    settings: dict[str, Any]
    data: dict[str, str]
    fingerprint: dict[str, Any]


@dataclass
class SavedState:
    """A state that was saved, without its tensors.

    Attributes:
        folder: where it is. values: the JSON of state.json. progress: how far the run had come.
        newest_is_damaged: it is the one before, because the newest is damaged.
    """

    folder: Path
    values: dict[str, Any]
    progress: Progress
    newest_is_damaged: bool = False


def save_state(
    output: Path,
    learned: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    belonging: Belonging,
    scaler: dict[str, Any] | None,
    newest_is_damaged: bool = False,
) -> None:
    """Save what a resumed run needs; the rest is a function of seed and step.

    Args:
        learned: the trained weights by name.
        belonging: what must be equal when the run is resumed.
        scaler: the state of the gradient scaler of float16.
        newest_is_damaged: the newest state is deleted, and the one before it is kept instead.

    Raises:
        WriteError: the state cannot be written.
    """

    def write(new: Path) -> None:
        save_file({name: p.detach().contiguous() for name, p in learned.items()}, new / WEIGHTS)
        states = optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": value.contiguous() for index, state in states.items() for name, value in state.items()
        }
        save_file(tensors, new / OPTIMIZER)
        values = {**asdict(belonging), "scaler": scaler, "progress": asdict(progress)}
        (new / REST).write_text(json.dumps(values), encoding="utf-8")  # plain JSON, because infinities are kept here

    write_folder(output / STATE, write, previous=None if newest_is_damaged else output / PREVIOUS_STATE)


def read_state(output: Path) -> SavedState | None:
    """The newest saved state that is whole, or None if none was saved.

    Raises:
        UsageError: what was saved is damaged.
    """
    problem = None
    for name in (STATE, PREVIOUS_STATE):
        folder = existing(output / name)
        if not os.path.lexists(folder):
            continue
        try:
            state = _read(folder)
        except UsageError as error:
            problem = problem or str(error).rstrip()
            continue
        if problem:
            note(f"{problem} The state that was saved before it is used: {folder}.")
            state.newest_is_damaged = True
        return state
    if problem:
        raise UsageError(f"--resume: {problem} There is no other state to continue from: {START_AGAIN}.")
    return None


def delete_states(output: Path) -> None:
    """Delete what a finished run does not need any more."""
    for name in (STATE, PREVIOUS_STATE):
        for suffix in ("", ".new", ".old"):  # what a killed `write_folder` left too
            with suppress(OSError):
                remove(output / f"{name}{suffix}")


def _read(folder: Path) -> SavedState:
    """A state. Raises UsageError if it is damaged."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is damaged: it is not a folder.")
    check_checksums(folder, "")
    for name in (WEIGHTS, OPTIMIZER):
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is missing.")
    values = read_json(folder / REST, "")
    try:
        progress = Progress(**values["progress"])
        whole = isinstance(values["settings"], dict) and isinstance(values["fingerprint"], dict)
    except (KeyError, TypeError):
        whole = False
    if not whole or not all(_has_type_of_default(progress, item.name) for item in fields(Progress)):
        raise UsageError(f"{folder / REST} is damaged: it is not what a run saves.")
    return SavedState(folder, values, progress)


def _has_type_of_default(progress: Progress, name: str) -> bool:
    value, default = getattr(progress, name), getattr(Progress(), name)
    return isinstance(value, (dict, type(None)) if default is None else (int, type(default)))


def check_belonging(state: SavedState, output: Path, now: Belonging) -> None:
    """Check that a state belongs to the run that is resumed. What an earlier version did not save is not compared.

    Raises:
        UsageError: it does not; the message names what differs.
    """
    run = read_run(output)
    of_state, of_run = state.values.get("run_id"), run.get("run_id")
    if None not in (of_state, of_run) and of_state != of_run:
        raise UsageError(
            f"--resume: {state.folder} belongs to another run than {output / METADATA}. Copy the folder of the "
            f"interrupted run again, or {START_AGAIN}."
        )
    different = different_settings(state.values["settings"], run["settings"])
    if different:
        raise UsageError(
            f"--resume: the settings in {output / METADATA} are not those of the saved state: {', '.join(different)}. "
            f"Undo the change, or {START_AGAIN}."
        )
    saved = {OLD_NAMES.get(name, name): value for name, value in state.values["fingerprint"].items()}
    for name, value in now.fingerprint.items():
        before = saved.get(name, value)
        if before != value:
            raise UsageError(
                f"--resume: the interrupted run had {before} {name}, this one has {value}, so it would not continue "
                f"where the other stopped. Make them equal, or {START_AGAIN}."
            )
    digests = state.values.get("data") or {}
    changed = [name for name, value in now.data.items() if digests.get(name, value) != value]
    if changed:
        raise UsageError(
            f"--resume: the data are not those of the interrupted run: {', '.join(changed)} changed. "
            f"Bring back the data as they were, or {START_AGAIN}."
        )


def load_state(folder: Path, learned: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put saved weights and optimizer state back in place.

    Raises:
        UsageError: the state is damaged, or does not fit the model.
    """
    saved, tensors = _tensors(folder / WEIGHTS), _tensors(folder / OPTIMIZER)
    if saved.keys() != learned.keys() or any(saved[name].shape != p.shape for name, p in learned.items()):
        raise UsageError(
            f"the state in {folder} has other weights than this model trains, as one of an earlier version "
            f"may have: {START_AGAIN}."
        )
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(saved[name])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}): {START_AGAIN}.") from error
