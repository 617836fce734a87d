#!/usr/bin/env python3
"""Kill inferences at random, in the middle of a row and at each kind of file operation; then go on with --resume.

python tests/crash/jobs.py --rounds 100 --seed 1

The file must be that of an inference that nobody disturbed, to the byte. Exit code 1 if any differs.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")

import numpy as np  # noqa: E402
from faults import Watch, kill_at_write  # noqa: E402
from PIL import Image  # noqa: E402
from rig import Ended, prepare_for_forks, run_apart  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import inference_vlm  # noqa: E402
import train_vlm  # noqa: E402

FORMATS = ("csv", "jsonl", "parquet")
KILLS = ("write", "random time", "open", "rename", "unlink", "fsync")
IMAGES = 60
UNREADABLE = 17  # one of them is no image, so each run ends with exit code 1


class Jobs:
    """Classifies the same images in folders of their own, as often as asked."""

    def __init__(self, folder: Path, model: Path | None) -> None:
        self.folder, self.model = folder, model or self._trained(folder / "run")
        self.images = folder / "images"
        self.images.mkdir()
        for i, digit in enumerate(load_digits().images[:IMAGES]):
            Image.fromarray((digit * 15).astype(np.uint8)).save(self.images / f"{i:03}.png")
        (self.images / f"{UNREADABLE:03}.png").write_bytes(b"no image")
        self.expected: dict[str, bytes] = {}
        self.counts: dict[str, dict[str, int]] = {}
        for ending in FORMATS:
            output = self.output("unbroken", ending)
            ended = self.start(output, Watch)
            if ended.code != 1 or not output.exists():
                raise SystemExit(f"the undisturbed inference ended with {ended.code}:\n{ended.text}")
            self.expected[ending] = output.read_bytes()
            self.counts[ending] = json.loads((folder / "counts.json").read_text())

    def _trained(self, output: Path) -> Path:
        flags = ["--max-samples", "50", "--epochs", "1", "--device", "cpu", "--output-dir", str(output)]
        if train_vlm.main(["--demo", *flags]):
            raise SystemExit("the model could not be trained")
        return output / "best_model"

    def output(self, name: str, ending: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name / f"predictions.{ending}"

    def start(self, output: Path, disturb: Callable[[Path], Any], kill_after: float | None = None) -> Ended:
        """Start the inference or go on with it, in a process of its own, and wait for its end."""

        def infer() -> tuple[int, Any]:
            watch = disturb(output)
            flags = ["--device", "cpu", "--threads", "1", "--batch-size", "8", "--resume", "--output", str(output)]
            return inference_vlm.main(["--model-dir", str(self.model), *flags, str(self.images)]), watch

        return run_apart(infer, self.folder, kill_after)

    def kill(self, kind: str, output: Path, chance: random.Random) -> bool:
        """Run until a kill of this kind; returns whether it came to it."""
        ending = output.suffix[1:]
        if kind == "random time":
            return self.start(output, lambda output: None, chance.uniform(0.3, 1.5)).code < 0
        if kind == "write":
            size = chance.randrange(1, len(self.expected["csv"]))
            return self.start(output, lambda output: kill_at_write(size)).code < 0
        number = chance.randint(1, self.counts[ending].get(kind, 1))
        return self.start(output, partial(Watch, kind=kind, number=number)).code < 0

    def problems(self, output: Path) -> list[str]:
        """Go on to the end, and say what differs from an undisturbed inference."""
        was_complete = output.exists()
        ended = self.start(output, lambda output: None)
        found = []
        if ended.code != 1 and not (was_complete and ended.code == 2):
            found.append(f"exit code {ended.code}: {ended.text[-300:]}")
        if not output.exists() or output.read_bytes() != self.expected[output.suffix[1:]]:
            found.append("the file differs")
        left = sorted(path.name for path in output.parent.iterdir() if path != output)
        return [*found, *(f"left behind: {name}" for name in left)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how many files (default: 60)")
    parser.add_argument("--kills", type=int, default=2, help="for each of them (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--model-dir", type=Path, help="a trained model (default: one of the demo is trained)")
    options = parser.parse_args()
    prepare_for_forks()
    chance, kills, problems = random.Random(options.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="vlm_crash_") as folder:
        jobs = Jobs(Path(folder), options.model_dir)
        for number in range(options.rounds):
            output = jobs.output(f"round_{number}", FORMATS[number % len(FORMATS)])
            for kill in range(options.kills):
                kind = KILLS[(number * options.kills + kill) % len(KILLS)]
                kills[kind] += not output.exists() and jobs.kill(kind, output, chance)
            problems += [f"round {number}, {output.name}: {problem}" for problem in jobs.problems(output)]
    for kind in KILLS:
        print(f"killed at {kind}: {kills[kind]}")
    print(*problems, f"{options.rounds} files, {sum(kills.values())} kills: {len(problems)} differences", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
