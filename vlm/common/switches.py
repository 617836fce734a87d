"""Global switches of Python and of libraries, put back after a program has run inside of another one."""

import locale
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

# Attributes of modules.
ATTRIBUTES = (
    ("PIL.Image", "MAX_IMAGE_PIXELS"),
    ("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES"),
    ("torch.backends.cudnn", "benchmark"),
    ("torch.backends.cudnn", "deterministic"),
)
# Pairs of functions that read and set.
FUNCTIONS = (
    ("os", "getcwd", "chdir"),
    ("random", "getstate", "setstate"),
    ("numpy.random", "get_state", "set_state"),
    ("torch", "get_rng_state", "set_rng_state"),
    ("torch", "get_num_threads", "set_num_threads"),
    ("torch", "get_default_dtype", "set_default_dtype"),
    ("torch", "get_float32_matmul_precision", "set_float32_matmul_precision"),
    ("torch", "are_deterministic_algorithms_enabled", "use_deterministic_algorithms"),
    ("torch", "is_grad_enabled", "set_grad_enabled"),
    ("torch.multiprocessing", "get_sharing_strategy", "set_sharing_strategy"),
    ("transformers.utils.logging", "get_verbosity", "set_verbosity"),
    ("datasets.utils.logging", "get_verbosity", "set_verbosity"),
    ("huggingface_hub.utils.logging", "get_verbosity", "set_verbosity"),
    ("mlflow", "get_tracking_uri", "set_tracking_uri"),
)
# Functions that tell whether something is on, and turn it on and off.
TOGGLES = (
    ("transformers.utils.logging", "is_progress_bar_enabled", "enable_progress_bar", "disable_progress_bar"),
    ("datasets.utils.tqdm", "are_progress_bars_disabled", "disable_progress_bars", "enable_progress_bars"),
)
# What all objects of a class of accelerate have in common: one run in a process would decide the device of the next.
SHARED = ("AcceleratorState", "GradientState", "PartialState")
LOGGERS = ("bitsandbytes.autograd._functions",)


@contextmanager
def switches_as_before() -> Iterator[None]:
    """Put environment variables, working directory, random generators and switches of libraries back afterwards.

    Libraries that are not imported yet are left out: use it again inside, after the imports.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_put_environment_back, dict(os.environ))
        stack.callback(locale.setlocale, locale.LC_ALL, locale.setlocale(locale.LC_ALL))
        for module, name in ATTRIBUTES:
            if library := sys.modules.get(module):
                stack.callback(setattr, library, name, getattr(library, name))
        for module, read, write in FUNCTIONS:
            if library := sys.modules.get(module):
                with suppress(OSError):  # the working directory was deleted
                    stack.callback(getattr(library, write), getattr(library, read)())
        for module, is_on, turn_on, turn_off in TOGGLES:
            if library := sys.modules.get(module):
                stack.callback(getattr(library, turn_on if getattr(library, is_on)() else turn_off))
        for name in LOGGERS:
            stack.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
        if library := sys.modules.get("accelerate.state"):
            for name in SHARED:
                shared = getattr(library, name)._shared_state
                stack.callback(_put_dict_back, shared, dict(shared))
        yield


def _put_dict_back(shared: dict[str, Any], before: dict[str, Any]) -> None:
    shared.clear()
    shared.update(before)


def _put_environment_back(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
