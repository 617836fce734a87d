#!/usr/bin/env python3
"""What `vlm/machine/memory.py` computes against what a process really takes: the peak of its resident memory, above
what it had before loading.

python benchmarks/memory_estimate.py --json memory_estimate.json

The model has SmolVLM-256M's widths, vocabulary and image size, random bfloat16 weights and fewer layers. Each tuning
mode runs in a process of its own: two optimizer steps of two batches, then an evaluation, then saving. Linux on the CPU
only (/proc/self/status).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MIB, forget_peak, resident
from PIL import Image
from shapes import shape
from workload import build

from vlm.classifier import VLMClassifier
from vlm.common import format_table
from vlm.config import RESPONSE, TUNING_DEFAULTS, resolve
from vlm.conversation import build_prompts
from vlm.data import Sample
from vlm.evaluation import score_split
from vlm.families import load_family, outline, read_config
from vlm.inference import save_model_folder
from vlm.machine import Texts, estimate
from vlm.training.tuning import merged_state_dict, parameter_groups, prepare_tuning

NAMES = ["crater", "dune", "ridge", "slope", "plain", "cliff", "gully", "mound", "rough terrain", "smooth terrain"]


def measure(folder: Path, tune: str, dtype: torch.dtype, batch_size: int) -> dict[str, dict[str, int]]:
    """Bytes estimated and measured, by phase."""
    settings = resolve({"tune": tune, "batch_size": batch_size, "objective": RESPONSE})
    estimated_family = outline(read_config(folder))
    forget_peak()
    before = resident()["VmRSS"]
    family = load_family(folder, dtype, torch.device("cpu"), settings.image_options())
    measured = {"loading": resident()["VmHWM"] - before}
    prepare_tuning(family, settings)
    classifier = VLMClassifier(family, build_prompts(settings, NAMES))
    samples = [Sample(Image.effect_noise((512, 512), 80).convert("RGB"), i % len(NAMES), "noise") for i in range(8)]
    optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.0, 1e-4, 1e-4), fused=True)
    forget_peak()
    train(classifier, optimizer, samples[:batch_size], dtype)
    measured["training"] = resident()["VmHWM"] - before
    forget_peak()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        score_split(classifier, samples, settings.eval_batch_size)
    measured["evaluation"] = resident()["VmHWM"] - before
    forget_peak()
    with tempfile.TemporaryDirectory() as saved:
        save_model_folder(Path(saved) / "model", family, merged_state_dict(family.model, dtype), {}, dtype)
    measured["saving"] = resident()["VmHWM"] - before

    rendered = classifier.rendered
    longest = max(map(len, rendered.response_ids))
    need = estimate(
        estimated_family,
        settings,
        dtype,
        "cpu",
        Texts(len(rendered.prefix_ids), len(rendered.question_ids), longest, len(NAMES)),
    )
    kept = need.weights + need.optimizer
    estimated = {
        "loading": sum(p.numel() for p in estimated_family.model.parameters()) * dtype.itemsize,
        "training": need.training,
        "evaluation": kept + need.evaluation,
        "saving": kept + need.saving,
        "whole run": need.total,
    }
    measured["whole run"] = max(measured.values())
    return {phase: {"estimated": estimated[phase], "measured": measured[phase]} for phase in estimated}


def train(
    classifier: VLMClassifier, optimizer: torch.optim.Optimizer, samples: list[Sample], dtype: torch.dtype
) -> None:
    """Two optimizer steps of two batches each, as the training loop does them."""
    classifier.train()
    batch = classifier.collate(with_response=True)(samples)
    for _ in range(2):
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = classifier(batch).loss
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the language model, which has 30 (default: 4)")
    parser.add_argument("--vision-layers", type=int, default=2, help="of the vision encoder, which has 12 (default: 2)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="(default: 1)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--measure",
        nargs=4,
        metavar=("FOLDER", "TUNE", "DTYPE", "BATCH"),
        help="one measurement, in this process, as JSON",
    )
    options = parser.parse_args()
    if options.measure:
        folder, tune, dtype, batch = options.measure
        print(json.dumps(measure(Path(folder), tune, getattr(torch, dtype), int(batch))))
        return
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), shape(layers=(options.layers, options.vision_layers)), torch.bfloat16)
        for dtype in options.dtypes:
            for batch in options.batch_sizes:
                for tune in TUNING_DEFAULTS:
                    started = time.monotonic()
                    command = [sys.executable, __file__, "--measure", folder, tune, dtype, str(batch)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    for phase, values in json.loads(done.stdout.splitlines()[-1]).items():
                        figures.append({"tune": tune, "dtype": dtype, "batch": batch, "phase": phase, **values})
                    print(f"{dtype}, {tune}, batch {batch}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    rows = [
        (
            f["dtype"],
            f["batch"],
            f["tune"],
            f["phase"],
            f["measured"] // MIB,
            f["estimated"] // MIB,
            f["measured"] / f["estimated"],
        )
        for f in figures
    ]
    print(
        format_table(
            rows, ["format", "batch", "tuning", "phase", "measured MiB", "estimated MiB", "measured / estimated"]
        )
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
