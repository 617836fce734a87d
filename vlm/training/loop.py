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

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.classifier import Batch, key_of
from vlm.common import Bar, RunError, note, write_json
from vlm.config import DEMO_MODEL, METADATA, read_run
from vlm.conversation import response_lengths
from vlm.data import Sample, Step, epoch_plan
from vlm.report import ended_early
from vlm.training.alignment import align_connector
from vlm.training.deadline import Deadline
from vlm.training.ending import Ended, Ending, any_process
from vlm.training.losses import advice, both_losses, losses_in_words, mean_since_evaluation, named_losses
from vlm.training.resume_state import Belonging, Progress, check_belonging, load_state, read_state
from vlm.training.run_files import begin, list_tracked
from vlm.training.run_log import RunLog
from vlm.training.saving import Saver
from vlm.training.schedule import learning_rate_at, step_seed
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
        deadline: Deadline | None = None,
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
        between = 1 if self.accelerator.num_processes == 1 else STEPS_PER_LINE
        deadline = deadline or Deadline.of(self.settings)
        self.ending = Ending(run, self.saver, deadline, self.total_steps, between)
        self.ended: Ended | None = None
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
        note(f"continuing after step {self.progress.step:,} of {self.total_steps:,}.")

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
        """All epochs that are left, or those until the training ends early; then the final model."""
        settings = self.settings
        self.run.model.train()
        total = settings.epochs * self.run.images_an_epoch
        with Bar(total, "training", initial=self.run.images_until(self.progress)) as bar:
            with bar.paused():
                if self.accelerator.is_main_process:
                    list_tracked(self.run.output)
                self._before_training()
            for epoch in range(self.progress.epoch, settings.epochs):
                if self.ended is None:
                    self._epoch(epoch, bar)
            self.enter(TESTING)
        self.saver.final_model()

    def begin(self) -> RunLog:
        """From here on the run writes into its folder. All processes have loaded the model.

        Returns:
            The log, to be used in `with` until the results are written.
        """
        if self.accelerator.is_main_process:
            begin(self.run.output, self.settings.resume, self.settings.overwrite)
        if self.settings.demo:
            self.run.folder = self.run.output / DEMO_MODEL
        settings, metadata = self.settings, self.run.metadata
        about = {name: metadata[name] for name in ("run_id", "class_names", "model_revision", "image_size", "versions")}
        self.log = RunLog(
            self.run.output,
            settings.trackers,
            settings.wandb_project,
            settings.to_json() | about | {f"dataset_{name}": value for name, value in metadata["dataset"].items()},
            resume_after=self.progress.step if settings.resume else None,
        )
        return self.log

    def _before_training(self) -> None:
        """The test of the untrained model and the alignment, if they were asked for and are not done yet."""
        if self.settings.zero_shot and self.progress.zero_shot is None:
            self.test_untrained()
        if self.settings.align_connector and not self.progress.step:  # a saved state holds what was learned
            self.progress.alignment = align_connector(self.run, self.ending.deadline.check)
        time_is_up = self.ending.begin(self.progress)
        self.enter(TRAINING if self.settings.epochs else TESTING)
        if self.accelerator.is_main_process:
            write_json(self.run.output / METADATA, self.run.metadata)  # from here on there is a run to resume
        if not self.settings.epochs:
            self._evaluate()
        elif self.progress.step < self.total_steps:
            self._before_first_step(time_is_up)

    def _before_first_step(self, time_is_up: bool) -> None:
        """A run that is resumed may have ended already; one without time for a step ends with what it has learned."""
        p = self.progress
        if self.ending.why(p, time_is_up) and p.evaluated_step != p.step:
            self._evaluate(planned=False)
            self._save_state()
        self._end_here(time_is_up)

    def count_steps(self) -> int:
        """The optimizer steps of an epoch."""
        return len(self.plan(0))

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
            stop, save, time_is_up = self._all_wish(evaluate)
            figures = self._write_losses() if save or self.progress.step % STEPS_PER_LINE == 0 else {}
            self.progress.seconds += time.monotonic() - started
            bar.update(len(step.indices), **figures)
            with bar.paused():  # its rate is only that of the training, as in the final table
                if evaluate or time_is_up:
                    self._evaluate(planned=evaluate)
                if save:
                    self._save_state()
                    self.unreadable.refuse_too_many(self.progress, self.run.images_a_step)
            if stop:
                self.accelerator.wait_for_everyone()
                raise self.saver.stopped(self.progress.step, self.total_steps)
            if self._end_here(time_is_up):
                return

    def _end_here(self, time_is_up: bool) -> bool:
        """Whether the training ends early, after this step, which is said."""
        self.ended = self.ending.why(self.progress, time_is_up)
        if self.ended:
            note(
                f"{ended_early(self.ended.to_json())}. The best model, of step {self.progress.best_step:,}, is tested."
            )
        return self.ended is not None

    def _save_state(self) -> None:
        self.note_places()
        self.saver.state(self.progress, self._belonging())

    def note_places(self) -> None:
        """Put into the progress what a state needs besides the numbers of steps: the images that cannot be read."""
        self.unreadable.note_in(self.progress)

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
            hint = advice(self.settings, self.run.dtype, self.progress.best_step)
            raise RunError(f"the loss is {loss} after step {self.progress.step}: {hint}")
        return {"loss": loss, "lr": rate}

    def _log(self, kind: str, **figures: float) -> None:
        epoch = self.progress.step / self.steps_per_epoch
        self.progress.history.append({"kind": kind, "step": self.progress.step, "epoch": epoch, **figures})
        if self.log:
            self.log.log(kind, self.progress.step, epoch=epoch, **figures)

    def _evaluate(self, planned: bool = True) -> None:
        """Metrics on the validation split; the best model so far is saved.

        Args:
            planned: False: an additional one, which does not count for --patience.
        """
        started = time.monotonic()
        metrics = split_metrics(self.run, "validation", "validating")
        p = self.progress
        losses = validation_losses(self.run)
        self.ending.evaluated(time.monotonic() - started)
        loss = losses["loss"]
        of_training = mean_since_evaluation(p.history)
        self._log("validation", **losses, **{name: metrics[name] for name in ("accuracy", "macro_f1", "nll")})
        p.evaluated_step = p.step
        better = (metrics["accuracy"], -loss) > (p.best_accuracy, -p.best_loss)
        best = " (best so far)" if metrics["accuracy"] > p.best_accuracy else " (best so far, by the smaller loss)"
        note(
            f"epoch {p.step / self.steps_per_epoch:.2f}, step {p.step}: validation accuracy {metrics['accuracy']:.4f}"
            f"{best if better else ''}; {losses_in_words(losses, of_training)}"
        )
        p.without_better = 0 if better else p.without_better + planned
        if better:
            p.best_accuracy, p.best_loss, p.best_step = metrics["accuracy"], loss, p.step
            validation = {"step": p.step, "accuracy": metrics["accuracy"], "loss": loss}
            self.saver.best_model(self.run.metadata | {"validation": validation})

    def test_untrained(self) -> None:
        """Metrics of the model as it is before the first step, on the test split, for comparison."""
        metrics = split_metrics(self.run, "test", "testing the untrained model")
        self.progress.zero_shot = {name: metrics[name] for name in ("accuracy", "nll", "macro_f1")}
        note(f"before the training: test accuracy {metrics['accuracy']:.4f} (not calibrated)")

    def _all_wish(self, evaluate: bool) -> tuple[bool, bool, bool]:
        """Whether any process was asked to stop, whether a state is to be saved, and whether the time is up.

        Several processes ask each other only when they wait for each other anyway.
        """
        if self.accelerator.num_processes > 1 and not evaluate and self.progress.step % STEPS_PER_LINE:
            return False, False, False
        due = time.monotonic() - self.saver.last_try > 60 * self.settings.save_minutes
        stop, due, up = any_process(
            self.accelerator, self.should_stop(), due, self.ending.time_is_up(self.progress, evaluate)
        )
        return stop, evaluate or stop or due or up, up and not stop
