#!/usr/bin/env python3
"""Text, head and both: what each reaches on the same test images, over several seeds.

python benchmarks/evidence.py --output FILE.json -- --demo

Each seed is a run of train_vlm.py with the flags behind `--` (default: --demo); all three figures come from it
(`evidence` in results.json). Runs that are finished in the folder of a benchmark that was interrupted are not done
again. "worst" is the smallest difference, over the seeds, to the better of text and head.
"""

import statistics
import sys

import common
import runs

WAYS = ("text", "head", "both")


def main() -> int:
    parser = common.parser(__doc__)
    runs.add_options(parser)
    options = runs.parse(parser, "evidence")
    results = [runs.run(options, [], seed) for seed in options.seeds]
    tests = [result["test"] for result in results]
    lacking = [seed for seed, test in zip(options.seeds, tests, strict=True) if "evidence" not in test]
    if lacking:
        raise SystemExit(f"seeds {lacking}: no head was fitted")
    rows = []
    for way in (*WAYS, "counted"):
        figures = [test["evidence"]["figures"][way if way in WAYS else test["evidence"]["counts"]] for test in tests]
        accuracies = [each["accuracy"][0] for each in figures]
        rows.append(
            {
                "counts": way,
                "accuracy": statistics.fmean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "lowest": min(accuracies),
                "NLL": statistics.fmean(each["nll"] for each in figures),
                "worst": min(
                    own - max(test["evidence"]["figures"][other]["accuracy"][0] for other in ("text", "head"))
                    for own, test in zip(accuracies, tests, strict=True)
                ),
                "ECE": statistics.fmean(test["calibration"]["after"]["ece"][0] for test in tests)
                if way == "counted"
                else None,
                "seeds": len(tests),
            }
        )
    return common.report(options, rows)


if __name__ == "__main__":
    sys.exit(main())
