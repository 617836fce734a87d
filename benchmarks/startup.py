#!/usr/bin/env python3
"""How long the programs take before they do anything, as whole processes, next to a Python that does nothing.

python benchmarks/startup.py --output benchmarks/results/startup.json
"""

import statistics
import subprocess
import sys

import common

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "train_vlm.py --help": ["train_vlm.py", "--help"],
    "inference_vlm.py --help": ["inference_vlm.py", "--help"],
    "import inference_vlm": ["-c", "import inference_vlm"],
    "import torch, transformers": ["-c", "import torch, transformers"],
}
GOALS = {name: (0.15, 0.3) for name in list(COMMANDS)[1:4]}  # seconds


def run(arguments: list[str]) -> None:
    """One process from start to end.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, *arguments], cwd=common.ROOT, stdout=subprocess.DEVNULL, check=True)


def main() -> int:
    options = common.start(common.parser(__doc__).parse_args())
    warm_up = 0 if options.size == "tiny" else 1
    seconds = common.take_turns(
        {name: (lambda a=arguments: run(a)) for name, arguments in COMMANDS.items()}, options.rounds, warm_up
    )
    heavy = seconds["import torch, transformers"]
    rows = [
        {**common.ratio(heavy, times), "command": name, "seconds": statistics.median(times), "slowest": max(times)}
        for name, times in seconds.items()
    ]
    return common.report(options, rows, goals=GOALS)


if __name__ == "__main__":
    sys.exit(main())
