"""`accelerate launch`, but with the exit code of the training and without a traceback of its own. For
run_vlm_training.sh."""

import os
import sys

# accelerate sets it to 1 if it is not set. Each process takes its share of the cores then (vlm/machine/device.py).
os.environ.setdefault("VLM_OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
# Of torch's launcher, which would print many lines after the error that says why.
os.environ.setdefault("LOGLEVEL", "CRITICAL")

# ruff: noqa: E402 (the launcher's loggers are made when it is imported)
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:  # the training has said why
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except (SignalException, KeyboardInterrupt):
        sys.exit(130)
