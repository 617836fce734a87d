"""The device to compute on, the number format, and the number of threads."""

import math
import os
import platform
from pathlib import Path

import psutil
import torch

from vlm.common import UsageError, first_line

# What OMP_NUM_THREADS was before `accelerate launch` set it (see launch_processes.py).
USERS_THREADS = "VLM_OMP_NUM_THREADS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wanted: str) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        the device, and a line that names it and says why it was taken.

    Raises:
        UsageError: the device that was asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "cuda" and not cuda:
        raise UsageError(
            "--device cuda: this PyTorch finds no CUDA device. Use --device auto, or check the driver with "
            "`python test_vlm_setup.py`."
        )
    if wanted == "mps" and not mps:
        raise UsageError("--device mps: this PyTorch finds no Apple GPU. Use --device auto.")
    if wanted == "cuda" or (wanted == "auto" and cuda):
        return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()})"
    if wanted == "mps":
        return torch.device("mps"), "mps (Apple GPU)"
    if wanted == "auto" and mps:
        return torch.device("cpu"), "cpu (the safe choice on Apple Silicon; --device mps uses the Apple GPU)"
    threads = torch.get_num_threads()
    return torch.device("cpu"), f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The number format of the computation: `auto` is bfloat16 on CUDA if the GPU has it, else float32.

    On a CPU without matrix instructions for it, bfloat16 is about 20 times slower than float32.

    Raises:
        UsageError: float16 on a device other than CUDA; gradients are scaled for it only there.
    """
    if wanted == "float16" and device.type != "cuda":
        raise UsageError(
            f"--dtype float16 works on CUDA only, and the device is {device.type}: use float32 or bfloat16."
        )
    if wanted != "auto":
        return DTYPES[wanted]
    # GPUs before Ampere emulate bfloat16, slowly.
    native = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    return torch.bfloat16 if native else torch.float32


def pick_threads(wanted: int | None) -> int:
    """Threads for torch on the CPU: `wanted`, else `OMP_NUM_THREADS` as the user set it, else `share_of_cores`."""
    said = os.environ.get(USERS_THREADS, os.environ.get("OMP_NUM_THREADS", ""))
    if wanted is None and said.isdigit():
        wanted = int(said)
    return wanted or share_of_cores()


def share_of_cores() -> int:
    """The physical cores that this process may use, shared with the other processes of the run on this machine.

    Two threads on one core (hyper-threading) slow each other down in matrix products. A container may be allowed fewer
    cores than it sees.

    Returns:
        at least 1.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable, cores_of_container() or usable)
    return max(1, int(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores_of_container(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Cores that a container on Linux may use at a time (`docker run --cpus`), rounded up; None: no limit."""
    try:
        quota, period = map(int, file.read_text(encoding="ascii").split())
    except (OSError, ValueError):  # another system, or "max"
        return None
    return math.ceil(quota / period)


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile works.

    Raises:
        UsageError: it finds no compiler.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:
        raise UsageError(
            f"--compile does not work here ({first_line(error)}): install a C++ compiler such as g++, or leave it out."
        ) from error
