"""Models and states of a run that goes on. A full disk does not end it: what could not be saved is tried again."""

import time
from typing import Any

import torch
from torch import Tensor

from vlm.common import RunError, Stopped, WriteError, note
from vlm.config import BEST_MODEL, FINAL_MODEL, STATE, how_to_resume
from vlm.inference import save_model_folder
from vlm.training.adapter import adapter_writer
from vlm.training.resume_state import Belonging, Progress, SavedState, save_state
from vlm.training.run_files import drop_previous
from vlm.training.setup import Run
from vlm.training.tuning import merged_state_dict

SLOW_DISK = 100e6  # bytes a second


class Saver:
    """Saves models and states; does nothing on processes other than the main one.

    If the best model cannot be written, its trained weights are kept in memory, and no state is saved until it is
    written: a run that is resumed from an earlier state finds the same best model again.

    Attributes:
        missing: why something could not be saved, by the name of its folder.
        saved_step: the step of the last state that was saved.
        took: the longest time that saving took, in seconds: of a model, and of a state.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.missing: dict[str, str] = {}
        self.saved_step = 0
        self._newest_is_damaged = False
        revision = run.metadata["model_revision"]
        self._write_adapter = adapter_writer(run.classifier.family, run.settings, revision)
        self.last_try = time.monotonic()
        self.took = {"model": 0.0, "state": 0.0}
        self._best: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # trained weights and metadata

    def seconds(self, what: str) -> float:
        """How long saving takes: as long as before, or what a slow disk needs.

        Args:
            what: model or state.
        """
        if self.took[what]:
            return self.took[what]
        learned = 3 * sum(p.nbytes for p in self.run.learned.values())  # the optimizer has two numbers for each
        return (learned if what == "state" else sum(p.nbytes for p in self.run.model.parameters())) / SLOW_DISK

    def _timed(self, what: str, started: float) -> None:
        self.took[what] = max(self.took[what], time.monotonic() - started)

    def resumed_from(self, state: SavedState) -> None:
        """Go on after a state that was saved before."""
        self.saved_step, self._newest_is_damaged = state.progress.step, state.newest_is_damaged

    def best_model(self, metadata: dict[str, Any]) -> None:
        """Save the model as it is now as the best one."""
        if self.run.accelerator.is_main_process:
            self._best = None
            if not self._model(BEST_MODEL, metadata):
                learned = {name: p.detach().to("cpu", copy=True) for name, p in self.run.learned.items()}
                self._best = learned, metadata

    def final_model(self) -> None:
        """Save the model as it is now as the final one. Everything has to be saved now.

        Raises:
            RunError: something is not.
        """
        if not self.run.accelerator.is_main_process:
            return
        self._best_again()
        self._model(FINAL_MODEL, self.run.metadata)
        unsaved = [name for name in self.missing if name != STATE]
        if unsaved:
            raise RunError(
                f"{' and '.join(unsaved)} could not be saved in {self.run.output} ({self.missing[unsaved[0]]}). "
                f"Make room, then continue with {how_to_resume(self.run.output, self.run.settings.dataset)}."
            )
        self._write_adapter = None  # it holds the model, which makes room for the best one

    def state(self, progress: Progress, belonging: Belonging) -> None:
        """Save the state to resume from."""
        self.last_try = time.monotonic()
        if not self.run.accelerator.is_main_process:
            return
        self._best_again()
        if BEST_MODEL in self.missing:
            self._failed(STATE, self.missing[BEST_MODEL])
            return
        scaler = self.run.accelerator.scaler
        started = time.monotonic()
        try:
            save_state(
                self.run.output,
                self.run.learned,
                self.run.optimizer,
                progress,
                belonging,
                scaler.state_dict() if scaler else None,
                self._newest_is_damaged,
            )
        except WriteError as error:
            self._failed(STATE, error.reason)
        else:
            self._saved(STATE)
            self._timed("state", started)
            self.saved_step, self._newest_is_damaged = progress.step, False

    def stopped(self, step: int, steps: int) -> Stopped:
        """What the user who stopped the run is told.

        Args:
            step: the last one of `steps`.
        """
        done = f"stopped after step {step:,} of {steps:,}"
        if STATE in self.missing:
            reason = f"the state could not be saved ({self.missing[STATE]}), so make room, and that of step"
            done += f"; {reason} {self.saved_step} is taken"
        return Stopped(f"{done}; continue with {how_to_resume(self.run.output, self.run.settings.dataset)}")

    def _best_again(self) -> None:
        """Try again to write the best model, whose trained weights take the place of the current ones meanwhile."""
        if self._best is None:
            return
        weights, metadata = self._best
        now = {name: p.detach().to("cpu", copy=True) for name, p in self.run.learned.items()}
        _put(self.run.learned, weights)
        try:
            if self._model(BEST_MODEL, metadata):
                self._best = None
        finally:
            _put(self.run.learned, now)

    def _model(self, name: str, metadata: dict[str, Any]) -> bool:
        """Save the model as it is now; returns whether that was possible."""
        started = time.monotonic()
        family, dtype = self.run.classifier.family, self.run.dtype
        weights = merged_state_dict(self.run.classifier.model, dtype)
        try:
            save_model_folder(self.run.output / name, family, weights, metadata, dtype, self._write_adapter)
        except WriteError as error:
            self._failed(name, error.reason)
            return False
        self._saved(name)
        self._timed("model", started)
        drop_previous(self.run.output)
        return True

    def _failed(self, name: str, reason: str) -> None:
        """Say it once, not at every try and for each folder."""
        if not self.missing:
            note(
                f"warning: {name} could not be saved in {self.run.output} ({reason}). The training goes on and tries "
                "again: make room."
            )
        self.missing[name] = reason

    def _saved(self, name: str) -> None:
        if self.missing.pop(name, None):
            note(f"{name} is saved now.")


@torch.no_grad()
def _put(learned: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, parameter in learned.items():
        parameter.copy_(weights[name])
