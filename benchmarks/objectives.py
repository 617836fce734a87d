#!/usr/bin/env python3
"""Which response format and objective classify best: the same training with each, over several seeds.

python benchmarks/objectives.py --output benchmarks/results/objectives_digits.json
python benchmarks/objectives.py --formats answer-only --output benchmarks/results/objectives_own.json -- --model MODEL
--dataset DATA

Each combination is a run of train_vlm.py in a process of its own, with the flags behind `--` (default: --demo). Runs
that are finished in the folder of a benchmark that was interrupted are not done again. Figures are those of the test
split: mean over the seeds, and standard deviation of the accuracy; "free texts" is the share of texts that agree with
the prediction though nothing constrains them.
"""

import itertools
import sys

import common
import runs

from vlm.config import BOTH, LAYOUTS, POSTERIOR, RESPONSE

TUNES = {
    "lora": ["--tune", "lora"],
    "lora-alone": ["--tune", "lora", "--freeze-connector"],
    "connector": ["--tune", "connector"],
    "full": ["--tune", "full"],
}


def main() -> int:
    parser = common.parser(__doc__)
    formats = tuple(LAYOUTS)
    parser.add_argument(
        "--formats", nargs="+", choices=formats, default=formats, metavar="FORMAT", help="(default: all three)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=(RESPONSE, POSTERIOR, BOTH),
        default=(RESPONSE, POSTERIOR, BOTH),
        metavar="NAME",
        help="(default: response posterior both)",
    )
    parser.add_argument(
        "--tunes",
        nargs="+",
        choices=tuple(TUNES),
        metavar="MODE",
        help=f"{', '.join(TUNES)} (default: that of the flags)",
    )
    runs.add_options(parser)
    options = runs.parse(parser, "objectives")
    cases = [
        {"tuning": tune, "format": response_format, "objective": objective}
        for tune, response_format, objective in itertools.product(
            options.tunes or [None], options.formats, options.objectives
        )
    ]
    cases = [{name: value for name, value in case.items() if value} for case in cases]
    return common.report(options, runs.rows(options, [(case, as_flags(case)) for case in cases]))


def as_flags(case: dict[str, str]) -> list[str]:
    """What train_vlm.py is told of a case."""
    flags = TUNES[case["tuning"]] if "tuning" in case else []
    return [*flags, "--response-format", case["format"], "--objective", case["objective"]]


if __name__ == "__main__":
    sys.exit(main())
