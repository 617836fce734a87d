"""Epochs, steps, evaluation, saving. Our own loop on accelerate.

Order, dropout and learning rate are functions of (seed, epoch, step), so that a resumed run continues exactly where the
other stopped, without saved generator states. The loss of a step is the mean over all its response tokens, and that of
the classes the mean over all its images, however the step is cut into batches and processes.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.classifier import Batch, key_of
from vlm.common import Bar, RunError, Stopped, note, resume_command, write_json
from vlm.config import BEST_MODEL, DEMO_MODEL, METADATA, STATE, read_run
from vlm.conversation import response_lengths
from vlm.data import Sample, Step, epoch_plan
from vlm.training.alignment import align_connector
from vlm.training.losses import both_losses, losses_in_words, mean_since_evaluation, named_losses
from vlm.training.resume_state import Belonging, Progress, check_belonging, load_state, read_state
from vlm.training.run_files import begin, list_tracked
from vlm.training.run_log import RunLog
from vlm.training.saving import Saver
from vlm.training.setup import Run
from vlm.training.stopping import TESTING, TRAINING
from vlm.training.unreadable import Unreadable
from vlm.training.validation import split_metrics, validation_losses

STEPS_PER_LINE = 10  # optimizer steps between two lines of the log
Factor = float | Tensor


class Trainer:
    """The state of a training run and its loop."""

    def __init__(
        self,
        run: Run,
        should_stop: Callable[[], bool] = lambda: False,
        enter: Callable[[str], None] = lambda phase: None,
    ):
        self.run = run
        self.settings = run.settings
        self.accelerator = run.accelerator
        self.should_stop, self.enter = should_stop, enter
        self.progress = Progress()
        self.response_lengths = response_lengths(run.data.train, run.classifier.family, run.classifier.rendered)
        self.steps_per_epoch = self.count_steps()
        self.total_steps = self.steps_per_epoch * self.settings.epochs
        self.log: RunLog | None = None
        self.unreadable = Unreadable(run.data)
        self.losses: list[Tensor] = []  # (2,) each, as `run_step` returns them
        self.saver = Saver(run)
        texts = {"the texts of the conversation": key_of(run.classifier.prompts)}
        self.data_digests = run.data.fingerprint | texts

    def resume(self) -> None:
        """Continue from the newest saved state; without one the run starts from the beginning."""
        run = self.run
        run.metadata["run_id"] = read_run(run.output).get("run_id") or run.metadata["run_id"]
        state = read_state(run.output)
        if state is None:
            note("no state was saved yet: starting from the beginning.")
            return
        check_belonging(state, run.output, self._belonging())
        load_state(state.folder, run.learned, run.optimizer)
        scaler = state.values.get("scaler")
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        self.progress = state.progress
        self.unreadable.take_over(state.progress)
        self.saver.resumed_from(state)
        note(f"continuing after step {self.progress.step} of {self.total_steps}.")

    def _belonging(self) -> Belonging:
        """What must be equal when the run is resumed."""
        data = self.run.data
        order = {
            "processes": self.accelerator.num_processes,
            "of its images checked first (--check-images, --probe)": "all" if data.checked else "some",
            "training images": len(data.train),
        }
        return Belonging(self.run.metadata["run_id"], self.settings.to_json(), self.data_digests, order)

    def train(self) -> None:
        """All epochs that are left, then the final model."""
        settings, images = self.settings, self.run.images_an_epoch
        self.run.model.train()
        done = self.progress.epoch * images + self.progress.step_in_epoch * self.images_per_step()
        total = settings.epochs * images
        self._begin()
        with self._open_log() as self.log, Bar(total, "training", initial=min(done, total)) as bar:
            with bar.paused():
                if self.accelerator.is_main_process:
                    list_tracked(self.run.output)
                self._before_training()
            if not settings.epochs:
                self._evaluate()
            for epoch in range(self.progress.epoch, settings.epochs):
                self._epoch(epoch, bar)
            self.enter(TESTING)
        self.saver.final_model()

    def _begin(self) -> None:
        """From here on the run writes into its folder. All processes have loaded the model."""
        if self.accelerator.is_main_process:
            begin(self.run.output, self.settings.resume, self.settings.overwrite)
        if self.settings.demo:
            self.run.folder = self.run.output / DEMO_MODEL

    def _open_log(self) -> RunLog:
        settings = self.settings
        return RunLog(
            self.run.output,
            settings.trackers,
            settings.wandb_project,
            settings.to_json(),
            resume_after=self.progress.step if settings.resume else None,
        )

    def _before_training(self) -> None:
        """The test of the untrained model and the alignment, if they were asked for and are not done yet."""
        if self.settings.zero_shot and self.progress.zero_shot is None:
            self.test_untrained()
        if self.settings.align_connector and not self.progress.step:  # a saved state holds what was learned
            self.progress.alignment = align_connector(self.run)
        self.enter(TRAINING if self.settings.epochs else TESTING)
        if self.accelerator.is_main_process:
            write_json(self.run.output / METADATA, self.run.metadata)  # from here on there is a run to resume

    def count_steps(self) -> int:
        """The optimizer steps of an epoch."""
        return len(self.plan(0))

    def images_per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation_steps * self.accelerator.num_processes

    def plan(self, epoch: int) -> Sequence[Step]:
        s, a = self.settings, self.accelerator
        images = len(self.run.data.train)
        return epoch_plan(
            images, s.batch_size, s.gradient_accumulation_steps, s.seed, epoch, a.num_processes, a.process_index
        )

    def _epoch(self, epoch: int, bar: Bar) -> None:
        plan = self.plan(epoch)[self.progress.step_in_epoch :]
        batches = self.batches(plan, epoch)
        for step in plan:
            started = time.monotonic()
            self.losses.append(self.run_step(step, batches))
            evaluate = self._count_step(epoch)
            stop, save = self._all_wish(evaluate)
            figures = self._write_losses() if save or self.progress.step % STEPS_PER_LINE == 0 else {}
            self.progress.seconds += time.monotonic() - started
            bar.update(len(step.indices), **figures)
            with bar.paused():  # its rate is only that of the training, as in the final table
                if evaluate:
                    self._evaluate()
                if save:
                    self.note_places()
                    self.saver.state(self.progress, self._belonging())
                    self.unreadable.refuse_too_many(self.progress, self.images_per_step())
            if stop:
                self.accelerator.wait_for_everyone()
                raise self._stopped()

    def note_places(self) -> None:
        """Put into the progress what a state needs besides the numbers of steps: the images that cannot be read."""
        self.unreadable.note_in(self.progress)

    def _stopped(self) -> Stopped:
        done = f"stopped after step {self.progress.step} of {self.total_steps}"
        if STATE in self.saver.missing:
            reason = f"the state could not be saved ({self.saver.missing[STATE]}), so make room, and that of step"
            done += f"; {reason} {self.saver.saved_step} is taken"
        return Stopped(f"{done}; continue with {resume_command(self.run.output)}")

    def _count_step(self, epoch: int) -> bool:
        """Count a step that was done; returns whether an evaluation follows it."""
        p, every = self.progress, self.settings.eval_steps
        p.step += 1
        p.step_in_epoch += 1
        end_of_epoch = p.step_in_epoch == self.steps_per_epoch
        if end_of_epoch:
            p.epoch, p.step_in_epoch = epoch + 1, 0
        return end_of_epoch or bool(every and p.step % every == 0)

    def batches(self, plan: Sequence[Step], epoch: int = 0) -> Iterator[Any]:
        """This process's batches of the steps in `plan` of an epoch, one after the other."""
        classifier = self.run.classifier
        loader: DataLoader[Sample] = DataLoader(
            cast("Dataset[Sample]", self.run.train_in(epoch)),
            batch_sampler=(batch for step in plan for batch in step.batches),
            collate_fn=classifier.collate(classifier.objective.has_response, self.run.cache),
            num_workers=self.run.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # the default would draw from the global one, and shift dropout after a resume
        )
        return cast("Iterator[Batch]", iter(loader))  # the type of what `collate_fn` makes is unknown to torch

    def run_step(self, step: Step, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step.

        Returns:
            (2,) this process's share of the mean loss of a response token, and of that of the class of an image.
        """
        counts = 1.0 if step.counts else 0.0
        per_token = counts / sum(self.response_lengths[index] for index in step.indices)
        return self.update(
            self.unreadable.watch(step, batches), len(step.batches), per_token, counts / len(step.indices)
        )

    def update(self, batches: Iterator[Batch], count: int, per_token: Factor, per_image: Factor) -> Tensor:
        """One optimizer step on the next `count` batches; returns what `run_step` does.

        Args:
            per_token, per_image: what the summed losses are multiplied by, so that they are means over all processes.
        """
        run, settings = self.run, self.settings
        for group in run.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.progress.step, group["peak_lr"])
        torch.manual_seed(step_seed(settings.seed, self.progress.step, self.accelerator.process_index))
        total = torch.zeros(2, device=self.accelerator.device)
        for number in range(1, count + 1):
            batch = next(batches).to(self.accelerator.device, non_blocking=True)
            synchronize = number == count  # processes exchange gradients once a step
            with nullcontext() if synchronize else self.accelerator.no_sync(run.model):
                found = run.model(batch, first=number == 1, last=synchronize)
                losses = both_losses(found.loss * per_token, found.posterior, per_image)
                # Several processes average their gradients; the sum is wanted.
                self.accelerator.backward(losses.sum() * self.accelerator.num_processes)
            total = total + losses.detach()  # in the format of the loss
        if settings.max_grad_norm:
            self.accelerator.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return total

    def _learning_rate(self, step: int, peak: float) -> float:
        return learning_rate_at(step, self.total_steps, self.settings.warmup_ratio, peak)

    def _write_losses(self) -> dict[str, float]:
        """Log the mean loss since the last line.

        The loss is read only here: reading it at every step would make a GPU wait.

        Raises:
            RunError: the loss is not finite.
        """
        # (steps, 2) -> (2,)
        means = self.accelerator.reduce(torch.stack(self.losses).mean(0), "sum").tolist()
        losses = named_losses(means, self.run.classifier.objective)
        self.losses.clear()
        loss = losses["loss"]
        rate = self._learning_rate(self.progress.step - 1, self.settings.learning_rate)
        self._log("train", **losses, learning_rate=rate)
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} after step {self.progress.step}: {self._advice()}")
        return {"loss": loss, "lr": rate}

    def _advice(self) -> str:
        """What helps if the loss is not finite, and what is left of the run."""
        cures = [f"a lower --learning-rate (now {self.settings.learning_rate:g})", "a smaller --max-grad-norm"]
        cures += ["--dtype float32"] if self.run.dtype != torch.float32 else []
        step = self.progress.best_step
        best = f" The best model so far (step {step}) is in {BEST_MODEL}." if step else ""
        return f"try {' or '.join(cures)}.{best}"

    def _log(self, kind: str, **figures: float) -> None:
        epoch = self.progress.step / self.steps_per_epoch
        self.progress.history.append({"kind": kind, "step": self.progress.step, "epoch": epoch, **figures})
        if self.log:
            self.log.log(kind, self.progress.step, epoch=epoch, **figures)

    def _evaluate(self) -> None:
        """Metrics on the validation split; the best model so far is saved."""
        metrics = split_metrics(self.run, "validation", "validating")
        p = self.progress
        losses = validation_losses(self.run)
        loss = losses["loss"]
        of_training = mean_since_evaluation(p.history)
        self._log("validation", **losses, **{name: metrics[name] for name in ("accuracy", "macro_f1", "nll")})
        better = (metrics["accuracy"], -loss) > (p.best_accuracy, -p.best_loss)
        best = " (best so far)" if metrics["accuracy"] > p.best_accuracy else " (best so far, by the smaller loss)"
        note(
            f"epoch {p.step / self.steps_per_epoch:.2f}, step {p.step}: validation accuracy {metrics['accuracy']:.4f}"
            f"{best if better else ''}; {losses_in_words(losses, of_training)}"
        )
        if better:
            p.best_accuracy, p.best_loss, p.best_step = metrics["accuracy"], loss, p.step
            validation = {"step": p.step, "accuracy": metrics["accuracy"], "loss": loss}
            self.saver.best_model(self.run.metadata | {"validation": validation})

    def test_untrained(self) -> None:
        """Metrics of the model as it is before the first step, on the test split, for comparison."""
        metrics = split_metrics(self.run, "test", "testing the untrained model")
        self.progress.zero_shot = {name: metrics[name] for name in ("accuracy", "nll", "macro_f1")}
        note(f"before the training: test accuracy {metrics['accuracy']:.4f} (not calibrated)")

    def _all_wish(self, evaluate: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether a state is to be saved.

        Several processes ask each other only when they wait for each other anyway.
        """
        due = time.monotonic() - self.saver.last_try > 60 * self.settings.save_minutes
        if self.accelerator.num_processes == 1:
            stop = self.should_stop()
            return stop, evaluate or stop or due
        if not evaluate and self.progress.step % STEPS_PER_LINE:
            return False, False
        wishes = torch.tensor([float(self.should_stop()), float(due)], device=self.accelerator.device)
        stop, due = (value > 0 for value in self.accelerator.reduce(wishes, "sum").tolist())
        return stop, evaluate or stop or due


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout in one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate_at(step: int, total: int, warmup_ratio: float, peak: float) -> float:
    """Linear warm-up, then a half cosine to zero. A function of only the step."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
