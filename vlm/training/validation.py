"""A split in the middle of a training: metrics and losses, of which each process computes its share."""

from typing import Any

from accelerate.utils import gather_object

from vlm.data import Split, leave_out_unreadable
from vlm.evaluation import metrics_of_sums, score_split, split_losses
from vlm.training.losses import named_losses
from vlm.training.setup import Run


def split_metrics(run: Run, role: str, description: str) -> dict[str, Any]:
    """The metrics of a whole split, as `evaluate_vlm_model` returns them. Unreadable images leave the split.

    Args:
        role: validation or test.
        description: what the progress bar says.
    """
    split: Split = getattr(run.data, role)
    mine, size = _share(run, split), run.settings.eval_batch_size
    with run.accelerator.autocast():
        part = score_split(run.classifier, split, size, mine, run.workers, description, cache=run.cache)
    sums = part.new_empty(len(split), part.shape[1])  # (N, C), put together from the (N / world, C) of each process
    for other, (theirs, faults) in enumerate(gather_object([(part, split.faults)])):
        sums[other :: run.accelerator.num_processes] = theirs
        for i, fault in faults.items():
            split.leave_out(i, fault)
    kept = leave_out_unreadable(run.data, role)
    return metrics_of_sums(run.classifier, getattr(run.data, role).labels, sums[kept])


def validation_losses(run: Run) -> dict[str, float]:
    """What the training minimizes, on the validation split, by the names of `log.jsonl`."""
    split, accelerator = run.data.validation, run.accelerator
    with accelerator.autocast():
        sums = split_losses(
            run.classifier, split, run.settings.eval_batch_size, _share(run, split), run.workers, run.cache
        )
    sums = accelerator.reduce(sums.float().to(accelerator.device), "sum")
    # (2, 2) -> (2,): each summed loss divided by its count, over all processes
    return named_losses((sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), run.classifier.objective)


def _share(run: Run, split: Split) -> range:
    """The positions that this process computes."""
    return range(run.accelerator.process_index, len(split), run.accelerator.num_processes)
