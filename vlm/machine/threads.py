"""How the CPU's threads wait for each other. Light: to be called before torch is imported."""

import os


def wait_politely() -> None:
    """Let OpenMP's threads sleep after a short wait, unless the user has said otherwise.

    GNU OpenMP spins for about a millisecond by default. When anything else runs on one of the cores, every operation
    then waits for a thread that is not running: on 2 cores with one busy process beside it a step of the demo took 20
    times longer. Figures in docs/experiments.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
