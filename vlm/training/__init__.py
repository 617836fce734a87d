"""From settings to a trained model: set-up, the loop, saving and resuming, and what is written at the end.

The names are imported when they are first used: those of the output folder and `StopSignals` come before torch is
imported, and `look_at_data` needs no torch.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.training.deadline import Deadline
    from vlm.training.dry_run import look_at_run
    from vlm.training.folds import fit_folds
    from vlm.training.output import check_output, check_resumable, clean_up, may_go_on
    from vlm.training.result import Result
    from vlm.training.running import fit
    from vlm.training.show_data import look_at_data
    from vlm.training.stopping import StopSignals
    from vlm.training.tracker_check import check_trackers

__all__ = [
    "Deadline",
    "Result",
    "StopSignals",
    "check_output",
    "check_resumable",
    "check_trackers",
    "clean_up",
    "fit",
    "fit_folds",
    "look_at_data",
    "look_at_run",
    "may_go_on",
]

__getattr__ = lazy_names(
    __name__,
    {
        ".deadline": ("Deadline",),
        ".dry_run": ("look_at_run",),
        ".folds": ("fit_folds",),
        ".output": ("check_output", "check_resumable", "clean_up", "may_go_on"),
        ".result": ("Result",),
        ".running": ("fit",),
        ".show_data": ("look_at_data",),
        ".stopping": ("StopSignals",),
        ".tracker_check": ("check_trackers",),
    },
)
