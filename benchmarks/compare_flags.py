#!/usr/bin/env python3
"""Which flags classify best: the same training with each set of flags, over several seeds.

python benchmarks/compare_flags.py --case "--augment none" --case "--augment light" --output FILE.json -- --demo

Each case is a run of train_vlm.py in a process of its own, with the flags behind `--` (default: --demo) and those of
the case. Runs that are finished in the folder of a benchmark that was interrupted are not done again. Figures are those
of the test split: mean over the seeds, and standard deviation of the accuracy.
"""

import shlex
import sys

import common
import runs


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--case", action="append", required=True, metavar="FLAGS", help="a set of flags to compare")
    runs.add_options(parser)
    options = runs.parse(parser, "flags")
    return common.report(options, runs.rows(options, [({"flags": case}, shlex.split(case)) for case in options.case]))


if __name__ == "__main__":
    sys.exit(main())
