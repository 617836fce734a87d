"""From settings to a trained model: set-up, the loop, saving and resuming, and what is written at the end.

The names are imported when they are first used: all but `fit` come before torch is imported.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.training.output import check_output, check_resumable, clean_up
    from vlm.training.running import fit
    from vlm.training.stopping import StopSignals

__all__ = ["StopSignals", "check_output", "check_resumable", "clean_up", "fit"]

__getattr__ = lazy_names(
    __name__,
    {".running": ("fit",), ".output": ("check_output", "check_resumable", "clean_up"), ".stopping": ("StopSignals",)},
)
