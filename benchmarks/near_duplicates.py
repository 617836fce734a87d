#!/usr/bin/env python3
"""What the perceptual hash (`vlm/data/near_duplicates.py`) finds, what it takes for the same, and what it costs.

python benchmarks/near_duplicates.py FOLDER    (different images, such as tiles of planets)

Every pair of images of the folder is compared; then each with a changed copy of itself. The same for the digits of
scikit-learn, enlarged to 224 pixels. The time is that of checking a JPEG file, without and with the hash, by turns.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_image

from vlm.common import format_table
from vlm.data import Rows, Split, find_images, open_image
from vlm.data.images import image_key
from vlm.data.looks import perceptual_hash
from vlm.data.near_duplicates import FARTHEST, find_near
from vlm.data.splits import Check

EDGES = (224, 640, 2000)  # pixels of the images that are timed
ROUNDS = 9
PARTS = {"train": 40_000, "validation": 5_000, "test": 5_000}


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def cropped(image: Image.Image, left: float, right: float) -> Image.Image:
    """Without these shares of both edges, at the left and top and at the right and bottom."""
    (w, h), end = image.size, 1 - right
    return image.crop((round(left * w), round(left * h), round(end * w), round(end * h)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 50": lambda image: open_image(jpeg(image, 50)),
    "80% of the size": lambda image: image.resize((image.width * 4 // 5, image.height * 4 // 5)),
    "10% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "1.5% cut off at each side": lambda image: cropped(image, 0.015, 0.015),
    "3% cut off at left and top": lambda image: cropped(image, 0.03, 0),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def bits_of(hashes: list[bytes]) -> np.ndarray:
    """-> (N, 128) of 0 and 1."""
    return np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1), axis=1)


def found_of(name: str, images: list[Image.Image]) -> None:
    """Print the distances of different images, and how many changed copies are found."""
    pairs = [(image, look) for image in images if (look := perceptual_hash(image))]
    bits = bits_of([look for _, look in pairs])
    # (N, N) the number of bits that differ; an image is not compared with itself
    distances = np.stack([(bits != one).sum(1) for one in bits]) + 1000 * np.eye(len(bits), dtype=int)
    near = int((distances.min(1) <= FARTHEST).sum())
    print(f"\n{name}: {len(images):,} images, {len(images) - len(pairs)} without a hash")
    print(f"least distance of {len(pairs) * (len(pairs) - 1) // 2:,} pairs: {distances.min()} bits")
    print(f"images with another one within {FARTHEST} bits: {near} ({near / len(pairs):.1%})")
    rows = []
    for change, changed in CHANGES.items():
        looks = [perceptual_hash(changed(image)) for image, _ in pairs]
        hits = [
            look is not None and int((bits_of([look]) != own).sum()) <= FARTHEST
            for look, own in zip(looks, bits, strict=True)
        ]
        rows.append((change, f"{np.mean(hits):.1%}"))
    print(format_table(rows, ("changed copy", "found")))


def seconds(work: Callable[[], object], times: int) -> float:
    """Of the processor, an average call."""
    started = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - started) / times


def checking(edge: int) -> tuple[str, ...]:
    """Milliseconds of decoding a JPEG file and its key, and of the hash."""
    data = jpeg(Image.fromarray(load_sample_image("china.jpg")).resize((edge, edge)), 90)
    image, times = open_image(data), max(1, 200_000 // edge**2 * 10)
    rounds = [
        (seconds(lambda: image_key(open_image(data)), times), seconds(lambda: perceptual_hash(image), times))
        for _ in range(ROUNDS)
    ]
    without, with_it = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(extra / base for base, extra in rounds)
    return f"{edge} px", f"{without:.2f} ms", f"{with_it:.2f} ms", f"+{ratio:.1%}"


def compare_random_hashes() -> float:
    """Seconds of comparing 50,000 images in three splits."""
    rng, splits = np.random.default_rng(0), {}
    for role, count in PARTS.items():
        split = Split(Rows([None] * count, [0] * count, [""] * count), range(count), [0] * count)
        bits = np.pad(rng.integers(0, 2, (count, 90), dtype=np.uint8), ((0, 0), (0, 38)))
        split.checks = [Check(look=look.tobytes()) for look in np.packbits(bits, 1)]
        splits[role] = split
    return seconds(lambda: find_near(splits), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images that all differ")
    options = parser.parse_args()
    found_of(options.folder.name, [open_image(path) for path in find_images([options.folder])])
    digits = [Image.fromarray((digit * 15.9).astype(np.uint8)) for digit in load_digits().images]
    found_of("digits", [digit.resize((224, 224)).convert("RGB") for digit in digits])
    print()
    print(format_table([checking(edge) for edge in EDGES], ("image", "decoding and key", "hash", "")))
    print(f"\ncomparing {sum(PARTS.values()):,} images ({', '.join(map(str, PARTS.values()))}): ", end="")
    print(f"{compare_random_hashes():.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
