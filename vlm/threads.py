"""How the CPU's threads wait for each other. Light: to be called before torch is imported."""

import os


def wait_politely() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said otherwise.

    By default they spin. When anything else runs on one of the cores, every operation then waits for a thread that is not
    running: measured on 2 cores with one other busy process, a step of the demo took 8 to 20 times longer. See docs/experiments.md.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
