#!/usr/bin/env python3
"""One training step of this program against one of TRL's SFTTrainer on a GPU, in bfloat16: speed, use of the chip,
memory.

python benchmarks/train_on_gpu.py --output benchmarks/results/train_on_gpu.json

Both sides as in train_vs_trl.py: the same weights, images, texts, trained parameters, batch size and fused AdamW, in
turns inside TRL's own loop. A turn is one step that is not measured, then `--steps` that are, with the GPU waited for
before and after these. Features of a frozen vision encoder are cached on our side. As many loader processes prepare
images on both sides. These go on while the other side has its turn, so that batches lie ready, and neither side pays
for a slow loader.

MFU is the share of `--peak-tflops` that a side uses: the operations of its own step, counted by torch's
FlopCounterMode, over its seconds. Attention is counted without regard to the mask, and what kernels compute twice
(attention's scores, TRL's logits) counts twice. Our step takes fewer operations for the same gradients: its MFU says
how busy the chip is, and not how fast the training. That is what "plain MFU" says: the operations of TRL's step, which
runs every row whole, over our seconds. It counts work that was left out as if it had been done, so it is no use of the
chip, and may be above 1; a plain trainer would need that MFU to be as fast. TRL's operations are those of one image
times the batch, since all rows are equally long.

"GiB" is the most that a side's own tensors took at once. A side that runs out of memory, next to what the other one
keeps between its turns, is named in its row, and then only the other one is measured. Loss and gradients of one batch
are compared without dropout. In bfloat16, where each product is rounded to 8 bits (0.4%), the loss has to agree
within 0.2%, and the norm of the difference of all gradients has to be within 5% of theirs: on a CPU, 30 narrow layers
came to 0.002% and 0.9%, and 5 of the true width to 0.01% and 0.8%."""

import argparse
import gc
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import common
import shapes
import torch
import workload
from peak import count
from train_vs_trl import GOALS, GRADIENT_TOLERANCE, LOSS_TOLERANCE, Turns

SIDES = ("ours", "TRL")
TOLERANCES = {"float32": (LOSS_TOLERANCE, GRADIENT_TOLERANCE), "bfloat16": (2e-3, 5e-2)}  # of loss and gradients
H100_TFLOPS = 989.0  # dense bfloat16, of NVIDIA's data sheet for the H100 SXM
UNMEASURED = 1  # steps that a turn begins with
OUT_OF_MEMORY, NOTHING = "out of memory", "-"


class Case:
    """Both sides with one model and batch size, and what is measured of them next to the seconds.

    Attributes:
        full: the sides that ran out of memory. operations: of a step, by side. peaks: bytes on the GPU, by side.
        differences: of loss and gradients, where both sides could be compared.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.full: set[str] = set()
        self.operations: dict[str, int] = {}
        self.peaks = dict.fromkeys(SIDES, 0)
        self.differences: dict[str, float] = {}
        self.turns = Turns(self.our_step, options.steps, UNMEASURED, self.look)
        self.ours: workload.OurTraining | None = None
        self.at_rest = 0  # bytes on the GPU that our side keeps between its turns

    def measure(self) -> dict[str, list[float]]:
        """Run both sides. Returns the seconds of a step by side, none of a side that ran out of memory."""
        self.attempt("ours", self.build_ours)
        self.at_rest = allocated()
        self.attempt("TRL", self.run_trl)
        seconds = self.turns.measured()
        if "TRL" in self.full and self.ours:
            forget_peak()
            with common.small_heap():
                seconds["ours"] = [self.turns.our_turn() for _ in range(self.options.rounds + 1)][1:]
            self.look("ours")
        return {side: [] if side in self.full else seconds[side] for side in SIDES}

    def attempt(self, side: str, work: Callable[[], Any]) -> Any:
        """What it returns. A side that runs out of the GPU's memory is noted, and what it held is given back."""
        try:
            return work()
        except RuntimeError as error:  # torch.OutOfMemoryError, or that of another library on the GPU
            if OUT_OF_MEMORY not in str(error).lower():
                raise
            self.full.add(side)
            if side == "ours":
                self.ours, self.at_rest = None, 0
        gc.unfreeze()  # in the middle of a turn, what is to go is frozen (`common.small_heap`)
        common.release()  # here nothing holds the error any more, and with it the tensors of where it happened
        return None

    def build_ours(self) -> None:
        self.ours = workload.OurTraining(self.options, self.options.tune, self.options.batch_size, cached=True)
        self.operations["ours"] = count(self.ours.step)

    def run_trl(self) -> None:
        """Build TRL's side, compare it with ours, and let both take turns."""
        import trl_side

        o = self.options
        trainer = trl_side.build_trainer(
            o, *workload.given(o, o.tune, o.batch_size), steps_of_turns(o), self.turns.after_step
        )
        self.operations["TRL"] = o.batch_size * count(lambda: trl_side.forward_and_backward(trainer, [0]))
        examined = self.attempt("ours", self.ours.examine) if self.ours else None
        if examined:
            self.differences = trl_side.compare(trainer, self.ours, examined)
        trainer.model.zero_grad(set_to_none=True)
        forget_peak()
        self.turns.run(trainer)

    def our_step(self) -> None:
        if self.ours:
            self.attempt("ours", self.ours.step)

    def look(self, side: str) -> None:
        """Note the most memory of a turn that has ended, less what the other side kept meanwhile."""
        if self.options.device == "cuda":
            others = self.at_rest if side == "TRL" else allocated() - self.at_rest
            self.peaks[side] = max(self.peaks[side], torch.cuda.max_memory_allocated() - others)
            forget_peak()

    def row(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """One line of the table."""
        o, both = self.options, not self.full
        step = {side: statistics.median(taken) for side, taken in seconds.items() if taken}
        peak = o.peak_tflops * 1e12

        def figures(name: str, of: Callable[[str], Any]) -> dict[str, Any]:
            return {f"{side} {name}": of(side) if side in step else OUT_OF_MEMORY for side in SIDES}

        plain = self.operations["TRL"] / step["ours"] / peak if "ours" in step and "TRL" in self.operations else NOTHING
        unlike = {name: f"{value:.1e}" for name, value in self.differences.items()}
        ratio = {"ratio": f"{' and '.join(sorted(self.full))}: {OUT_OF_MEMORY}", "lowest": NOTHING, "highest": NOTHING}
        return {
            **(common.ratio(seconds["TRL"], seconds["ours"]) if both else ratio),
            "model": o.shape,
            "tuning": o.tune,
            "batch": o.batch_size,
            **figures("images/s", lambda side: o.batch_size / step[side]),
            **figures("s", step.get),
            **figures("MFU", lambda side: self.operations[side] / step[side] / peak),
            "ours plain MFU": plain,
            **{f"{side} TFLOP": self.operations[side] / 1e12 if side in self.operations else NOTHING for side in SIDES},
            **figures("GiB", lambda side: self.peaks[side] / 2**30 if o.device == "cuda" else NOTHING),
            "loss differs": unlike.get("loss", NOTHING),
            "gradients differ": unlike.get("gradients", NOTHING),
            "agrees": self.agrees() if self.differences else NOTHING,
        }

    def agrees(self) -> bool:
        loss, gradients = TOLERANCES[self.options.dtype]
        return self.differences["loss"] < loss and self.differences["gradients"] < gradients


def allocated() -> int:
    """Bytes of all tensors on the GPU; 0 where none is in use."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def forget_peak() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def steps_of_turns(options: argparse.Namespace) -> int:
    """Steps that a side makes in all of its turns, the first of which is to warm up."""
    return (options.rounds + 1) * (UNMEASURED + options.steps)


def measure(options: argparse.Namespace, shape: str, batch_size: int) -> dict[str, Any]:
    """One row of the table."""
    # Twice the steps of ours, if only one side is measured in the end; and some to count and compare.
    steps = 2 * steps_of_turns(options) + 4
    more = {
        "shape": shape,
        "batch_size": batch_size,
        "repeats": math.ceil(steps * batch_size / workload.images_for(batch_size)),
    }
    case = Case(argparse.Namespace(**{**vars(options), **more}))
    return case.row(case.measure())


def parse() -> argparse.Namespace:
    """The options. Exits with code 2 where they cannot be followed here."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=tuple(shapes.PUBLISHED),
        default=("256M", "2.2B"),
        metavar="SIZE",
        help=f"SmolVLM of {', '.join(shapes.PUBLISHED)} parameters (default: 256M 2.2B)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=(8, 32, 128), metavar="N", help="of a step (default: 8 32 128)"
    )
    parser.add_argument("--tune", choices=tuple(GOALS), default="lora", help="what is trained (default: lora)")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="measured steps of a turn, behind one to warm up (default: 4)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="loader processes of each side (default: the program's, at most 8)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=H100_TFLOPS,
        metavar="X",
        help="dense bfloat16 TFLOP/s of the GPU's data sheet (default: 989, H100 SXM)",
    )
    options = parser.parse_args()
    found = torch.cuda.device_count()
    if options.size != "tiny" and found != 1:
        what = f"{found} GPUs, of which TRL would take all" if found else "no CUDA GPU"
        parser.exit(
            2,
            f"train_on_gpu.py: this PyTorch finds {what}. Expected one (CUDA_VISIBLE_DEVICES=0 chooses), or --tiny.\n",
        )
    if importlib.util.find_spec("trl") is None:
        parser.exit(2, "trl is not installed: pip install -r requirements-bench.txt -c constraints.txt\n")
    options = common.start(options)
    if options.size != "tiny":  # which stays on the CPU, for the tests
        options.device, options.dtype = "cuda", "bfloat16"
        options.workers = min(8, torch.get_num_threads()) if options.workers is None else options.workers
    return options


def main() -> int:
    options = parse()
    rows = []
    for shape in options.models:
        for batch_size in options.batch_sizes:
            rows.append(measure(options, shape, batch_size))
            common.release()
            print(f"{shape}, batch {batch_size}: {rows[-1]['ratio']}", file=sys.stderr, flush=True)
    tolerances = dict(zip(("loss", "gradients"), TOLERANCES[options.dtype], strict=True))
    agree = all(row["agrees"] is not False for row in rows)
    return common.report(
        options, rows, agree, trl=version("trl"), peak_tflops=options.peak_tflops, tolerances=tolerances
    )


if __name__ == "__main__":
    sys.exit(main())
