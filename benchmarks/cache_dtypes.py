#!/usr/bin/env python3
"""What --cache-dtype changes of a trained model's answers: the same images classified with features in each format.

python benchmarks/cache_dtypes.py vlm_results/best_model --images IMAGES
"""

import os
import sys
import tempfile
from pathlib import Path

import common
import torch

from inference_vlm import load_model_and_metadata, predict_batch
from vlm.data import find_images
from vlm.families import cache_root

FORMATS = ("float32", "float16")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("model_dir", type=Path, help="a trained model")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="images of its classes")
    parser.add_argument("--most", type=int, default=300, help="of the images, spread over all (default: 300)")
    options = common.start(parser.parse_args())
    found = find_images([options.images])
    files = found[:: -(-len(found) // options.most)]
    model, processor, metadata = load_model_and_metadata(options.model_dir, device="cpu")
    rows, exact = [], torch.empty(0)
    for cache_dtype in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VLM_CACHE"] = folder
            model.inference_cache = None
            metadata["settings"]["cache_dtype"] = cache_dtype
            results = predict_batch(model, processor, files, metadata, explain=False, feature_cache=True)
            size = sum(file.stat().st_size for file in cache_root().glob("*/*"))
        # (N, C)
        probabilities = torch.tensor([list(result["probabilities"].values()) for result in results.values()])
        exact = exact if len(exact) else probabilities
        changes = (probabilities - exact).abs().amax(-1)
        rows.append(
            {
                "format": cache_dtype,
                "kB an image": size / len(files) / 1e3,
                "images": len(files),
                "other predictions": int((probabilities.argmax(-1) != exact.argmax(-1)).sum()),
                "largest change of a probability": float(changes.max()),
                "mean change": float(changes.mean()),
            }
        )
    return common.report(options, rows)


if __name__ == "__main__":
    sys.exit(main())
