"""How the CPU's threads wait for each other. Imports nothing heavy: it has to be called before torch is imported."""

import os


def wait_politely() -> None:
    """Let OpenMP's threads sleep after a short wait, unless the user has set `OMP_WAIT_POLICY`.

    By default, threads of GNU OpenMP spin for about a millisecond. If another program runs on one of the cores, every
    operation then waits for a thread that is not running: on 2 cores, next to one busy process, a step of the demo took
    20 times longer. Figures in docs/experiments.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
