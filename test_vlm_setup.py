"""Checks whether this machine can train, and says what to do if it cannot:

python test_vlm_setup.py            all checks; about a minute
python test_vlm_setup.py --quick    without the training

Exits 0 when this machine can train, 1 when it cannot. A .venv that run_vlm_training.sh made is the one that is checked,
unless another environment is active.
"""

import os
import sys
from functools import partial
from pathlib import Path

OWN = Path(__file__).resolve().parent / ".venv"


def main():
    no_environment = sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ
    if no_environment and (OWN / "vlm-setup").exists() and (OWN / "bin" / "python").exists():
        python = str(OWN / "bin" / "python")
        os.execv(python, [python] + sys.argv)
    if sys.version_info < (3, 11):  # noqa: UP036 (the point is to say so where the rest cannot even be read)
        sys.exit("failure  Python {}.{}\n         cure: use Python 3.11 or newer".format(*sys.version_info[:2]))

    from vlm.common import any_text
    from vlm.config import Parser
    from vlm.machine import CHECKS, examine_machine, trial_training

    parser = Parser(description="Check whether this machine can train.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out the one-minute training")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error, and all that the training prints"
    )
    arguments = parser.parse_args()
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    training_check = None if arguments.quick else partial(trial_training, debug=arguments.debug)
    with any_text():
        write = partial(print, flush=True)
        return examine_machine(CHECKS, training_check, write=write, color=color, debug=arguments.debug)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of a pipe (head, less) went away
        from vlm.common import drop_closed_pipes

        drop_closed_pipes()
        sys.exit(1)
