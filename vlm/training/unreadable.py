"""Images that turn out to be unreadable during the training, in a dataset that was not checked before.

A gray stand-in takes the place of each, with weight 0 (`vlm_collate_fn`). The image stays in the counts that the losses
are divided by, so all epochs and processes have the same ones, and a resumed run ends with the same bits.
"""

from collections.abc import Iterator

from accelerate.utils import gather_object

from vlm.classifier import Batch
from vlm.data import Data, Step, note_unreadable, refuse_unreadable
from vlm.training.resume_state import Progress


class Unreadable:
    """The unreadable images of train. The split itself knows them (`Split.faults`)."""

    def __init__(self, data: Data) -> None:
        self.data, self.train = data, data.train
        self.found = 0  # by this process

    def watch(self, step: Step, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of a step. What is unreadable in them is remembered, so that no later epoch opens it again."""
        for positions, batch in zip(step.batches, batches, strict=False):
            for row, fault in batch.faults.items():
                check = self.train.checks[positions[row]]
                if check and check.fault:
                    continue
                self.train.leave_out(positions[row], fault)
                note_unreadable(fault, self.found)
                self.found += 1
            yield batch

    def note_in(self, progress: Progress) -> None:
        """Put what all processes have found into the progress, and into the split of each."""
        if self.data.checked:
            return
        for faults in gather_object([self.train.faults]):
            for position, fault in faults.items():
                self.train.leave_out(position, fault)
        progress.unreadable = {str(position): fault for position, fault in sorted(self.train.faults.items())}

    def take_over(self, progress: Progress) -> None:
        """Leave out what the interrupted run has left out."""
        for position, fault in progress.unreadable.items():
            self.train.leave_out(int(position), fault)

    def refuse_too_many(self, progress: Progress, images_per_step: int) -> None:
        """Stop if too many of the images that were seen so far cannot be read. A state was saved before.

        Raises:
            RunError: they are too many.
        """
        seen = len(self.train) if progress.epoch else min(len(self.train), progress.step * images_per_step)
        if progress.unreadable:
            refuse_unreadable("train", self.train.faults, seen)
