"""Several processes that train together: which one speaks, and how the others say why they failed."""

import json
import os
import time
from pathlib import Path

OTHER_ENDED = "another process of this run has ended"  # the reason of a process that is not the cause
# What gloo, NCCL and the store of torch say if the other side is gone.
SIGNS = ("gloo/transport", "ncclRemoteError", "remote process exited", "NCCL communicator was aborted", "TCPStore")
FILE = "TORCHELASTIC_ERROR_FILE"  # the variable with which torch's launcher names a file for the reason
SECONDS_TO_BE_ENDED = 2.0


def is_main_process() -> bool:
    """Whether this is the one process, of those that train together, that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """How many processes train or classify together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error says nothing but that another process of the run has ended."""
    return process_count() > 1 and isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def tell_launcher(message: str) -> bool:
    """Give the launcher of several processes the reason for which this one fails; it says it when all have ended.

    A process that is not the cause waits a moment: the launcher then sees the cause first, and ends this one.

    Returns:
        False if there is no launcher, or it cannot be told: then this process has to say it.
    """
    path = os.environ.get(FILE)
    if not path:
        return False
    reason = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    try:
        Path(path).write_text(json.dumps({"message": reason}), encoding="utf-8")
    except OSError:
        return False
    if message == OTHER_ENDED:
        time.sleep(SECONDS_TO_BE_ENDED)
    return True
