"""Training on a stream: batches without a plan, and the place that a resumed run goes on from."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vlm.classifier import IGNORED
from vlm.common import UsageError, listed, note
from vlm.data import Place, Sample, Step
from vlm.training.loop import Trainer

IMAGES_AHEAD = 4  # for each thread that decodes


class StreamTrainer(Trainer):
    """As `Trainer`, on `data.stream`: its one epoch has `--max-steps` steps, of which each takes the next images."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.place = Place()

    def count_steps(self) -> int:
        """The optimizer steps of the run."""
        assert self.settings.max_steps is not None, "the rules see to it"
        return self.settings.max_steps

    def plan(self, epoch: int) -> Sequence[Step]:
        """As many steps as there are; which images each has is not known before."""
        step = Step([], counts=True, indices=range(self.run.images_a_step))
        return [step] * self.steps_per_epoch

    def train(self) -> None:
        """All steps that are left, then the final model; says what was left out."""
        super().train()
        stream = self.run.data.stream
        assert stream is not None, "only such runs are trained here"
        counts: Counter[str] = sum(map(Counter, gather_object([stream.left_out])), Counter())
        stream.left_out = dict(counts)
        if counts:
            parts = (f"{count:,} {reason}" for reason, count in counts.items())
            note(f"images of the stream that were not trained on: {listed(parts)}")

    def resume(self) -> None:
        super().resume()
        if self.progress.places:
            self.place = Place(*self.progress.places[self.accelerator.process_index])

    def note_places(self) -> None:
        """Put into the progress how far each process has read."""
        self.progress.places = gather_object([list(self.place)])

    def batches(self, plan: Sequence[Step], epoch: int = 0) -> Iterator[Any]:
        """This process's batches of each step to come, with the place after them."""
        classifier, settings = self.run.classifier, self.settings
        collate = classifier.collate(classifier.objective.has_response, None)
        size, accumulation = settings.batch_size, settings.gradient_accumulation_steps
        samples: list[Sample] = []
        for sample, place in self._samples():
            samples.append(sample)
            if len(samples) == size * accumulation:
                yield [collate(samples[i : i + size]) for i in range(0, len(samples), size)], place
                samples = []

    def run_step(self, step: Step, batches: Iterator[Any]) -> Tensor:
        """One optimizer step; see `Trainer.run_step`."""
        ours, self.place = next(batches)
        tokens = sum(int((batch.targets != IGNORED).sum()) for batch in ours)
        counts = torch.tensor([tokens, sum(map(len, ours))], device=self.accelerator.device)
        per_token, per_image = 1 / self.accelerator.reduce(counts, "sum")
        return self.update(iter(ours), len(ours), per_token, per_image)

    def _samples(self) -> Iterator[tuple[Sample, Place]]:
        """The images after the place; a pass without any is an error, as the next one would have none either.

        Raises:
            UsageError: no image can be trained on.
        """
        last = self.place.epoch
        for sample, place in self._rows():
            if sample is not None:
                last = place.epoch
                yield sample, place
            elif place.epoch > last + 1:
                raise UsageError(
                    f"--streaming: none of the images can be trained on: {self._left_out()}. Check --class-names and "
                    "the columns."
                )

    def _left_out(self) -> str:
        stream = self.run.data.stream
        return listed(f"{count:,} {reason}" for reason, count in (stream.left_out if stream else {}).items())

    def _rows(self) -> Iterator[tuple[Sample | None, Place]]:
        """The images after the place, in the order of the stream; None for those that are left out.

        As many threads decode them as there are workers.
        """
        stream, accelerator = self.run.data.stream, self.accelerator
        assert stream is not None, "only such runs are trained here"
        rows = stream.read(self.place, accelerator.process_index, accelerator.num_processes)
        if not self.run.workers:
            for row, place in rows:
                yield stream.sample(row), place
            return
        waiting: deque[tuple[Future[Sample | None], Place]] = deque()
        with ThreadPoolExecutor(self.run.workers) as pool:
            try:
                for row, place in rows:
                    waiting.append((pool.submit(stream.sample, row), place))
                    if len(waiting) > IMAGES_AHEAD * self.run.workers:
                        future, place = waiting.popleft()
                        yield future.result(), place
            finally:
                for future, _ in waiting:
                    future.cancel()
