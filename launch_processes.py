"""`accelerate launch`, but if a process fails it says which one and why, with the exit codes of the programs. For
run_vlm_training.sh and run_vlm_inference.sh."""

import logging
import os
import signal
import sys
from pathlib import Path

# accelerate sets it to 1 if it is not set. Each process takes its share of the cores then (vlm/machine/device.py).
os.environ.setdefault("VLM_OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
# Of torch's C++ parts, which would print many lines in the processes that lose another one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

# ruff: noqa: E402 (torch reads its log level when it is imported)
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vlm.common import OTHER_ENDED, UsageError
from vlm.config import METADATA, RESULTS, Settings, parse_arguments, user_path
from vlm.training import clean_up

INFERENCE = "inference_vlm.py"


def output_folder(arguments: list[str]) -> Path | None:
    """The output folder that the flags after the script name; None if the script does not train."""
    script = next((number for number, word in enumerate(arguments) if word.endswith(".py")), len(arguments))
    if [Path(word).name for word in arguments[script : script + 1]] == [INFERENCE]:
        return None
    return Path(user_path(parse_arguments(arguments[script + 1 :]).get("output_dir", Settings.output_dir)))


def cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The process with which it began, by its number, and how it ended."""
    others = {number: failure for number, failure in error.failures.items() if said(failure) != OTHER_ENDED}
    # SIGTERM is what the launcher itself sends to the others.
    others = {number: failure for number, failure in others.items() if failure.exitcode != -signal.SIGTERM} or others
    killed = {number: failure for number, failure in others.items() if failure.exitcode < 0}
    return min((killed or others or error.failures).items(), key=lambda item: (item[1].timestamp, item[0]))


def said(failure: ProcessFailure) -> str:
    """The reason that a process has given; empty if it had no time to."""
    message = failure.error_file_data["message"]
    return message["message"] if isinstance(message, dict) else ""


def explain(error: ChildFailedError, output: Path | None) -> tuple[str, int]:
    """What to print when a process has failed, and the exit code.

    Args:
        output: the output folder of a training; None for an inference.
    """
    number, failure = cause(error)
    said_all = number == 0 and (failure.exitcode == 2 or (output is None and said(failure)))
    if failure.exitcode == 130 or said_all:  # it has said everything itself
        return "", failure.exitcode
    if failure.exitcode < 0:
        memory = ", as the system does if memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        why = f"was killed by {failure.signal_name()}{memory}"
    elif number and said(failure):
        why = f"failed: {said(failure).rstrip('.')}"
    else:
        why = f"failed with exit code {failure.exitcode}"
    if output is None:
        todo = "The same command with --resume goes on"
    else:
        begun = (output / METADATA).is_file() and not (output / RESULTS).is_file()
        todo = f"Continue with --resume --output-dir {output}" if begun else "Start it again"
    code = 2 if failure.exitcode == 2 else 1
    return f"error: process {number} of this run {why}. The others were ended. {todo}.", code


if __name__ == "__main__":
    folder = output_folder(sys.argv[1:])
    try:
        if folder:
            clean_up(folder)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    logging.disable(logging.CRITICAL)  # of torch's launcher, which would print lines of its own about each process
    try:
        main()
    except ChildFailedError as error:
        text, code = explain(error, folder)
        if text:
            print(text, file=sys.stderr)
        sys.exit(code)
    except (SignalException, KeyboardInterrupt):
        sys.exit(130)
