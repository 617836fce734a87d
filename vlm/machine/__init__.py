"""The machine: its device, threads and memory, what fits into it, and the doctor that says what is missing.

The names are imported when they are first used: `wait_politely` has to run before torch is imported, and the doctor
and the set-up of the environment have to run without it.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.machine.batch_size import fit_to_memory, free_memory, largest_batch
    from vlm.machine.device import DTYPES, check_compiler, pick_device, pick_dtype, pick_threads, share_of_cores
    from vlm.machine.doctor import CHECKS, examine_machine, trial_training
    from vlm.machine.memory import GIB, Texts, estimate
    from vlm.machine.registry import MODELS, list_models
    from vlm.machine.requirements import examine
    from vlm.machine.team import Team
    from vlm.machine.threads import wait_politely

__all__ = [
    "CHECKS",
    "DTYPES",
    "GIB",
    "MODELS",
    "Team",
    "Texts",
    "check_compiler",
    "estimate",
    "examine",
    "examine_machine",
    "fit_to_memory",
    "free_memory",
    "largest_batch",
    "list_models",
    "pick_device",
    "pick_dtype",
    "pick_threads",
    "share_of_cores",
    "trial_training",
    "wait_politely",
]

__getattr__ = lazy_names(
    __name__,
    {
        ".batch_size": ("fit_to_memory", "free_memory", "largest_batch"),
        ".device": ("DTYPES", "check_compiler", "pick_device", "pick_dtype", "pick_threads", "share_of_cores"),
        ".doctor": ("CHECKS", "examine_machine", "trial_training"),
        ".memory": ("GIB", "Texts", "estimate"),
        ".registry": ("MODELS", "list_models"),
        ".requirements": ("examine",),
        ".team": ("Team",),
        ".threads": ("wait_politely",),
    },
)
