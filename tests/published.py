"""Datasets as they are published on the hub: the layout and the card of the real ones, with tiny images."""

import io
from collections.abc import Sequence

import datasets
import numpy as np
import yaml
from fake_hub import FakeHub
from PIL import Image

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOOD = [f"{kind}_{dish}" for kind in ("apple", "baked", "beef", "chicken") for dish in ("pie", "tartare", "curry")]
MARS = ["ael", "aec", "cli", "rid", "fsf", "sfe", "fsg", "fse", "fss", "cra", "sfx", "mix", "rou", "smo", "tex"]
# Names of ImageNet-1K that have something in common with others, as published.
ALIKE = [
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "hen",
    "hen-of-the-woods, hen of the woods, Polyporus frondosus, Grifola frondosa",
    "Cardigan, Cardigan Welsh corgi",
    "cardigan",
    "crane",
    "crane bird",
    "maillot",
    "maillot, tank suit",
    "sunglass",
    "sunglasses, dark glasses, shades",
    "missile",
    "projectile, missile",
    "laptop, laptop computer",
    "notebook, notebook computer",
    "Indian elephant, Elephas maximus",
    "African elephant, Loxodonta africana",
]
IMAGENET = [*ALIKE, *(f"species {i}, Genus {i}, other name {i}" for i in range(1000 - len(ALIKE)))]


def png(value: int, size: int = 2) -> bytes:
    """A PNG file of noise. Each value has its own."""
    file = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    return file.getvalue()


def split_of(
    labels: Sequence[int], names: Sequence[str], image: str = "image", first: int = 0, size: int = 2
) -> datasets.Dataset:
    """A split with an image for each label, the images from number `first` on, with edges of `size` pixels."""
    features = datasets.Features({image: datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    cells = [{"bytes": png(first + i, size), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({image: cells, "label": list(labels)}, features=features)


def publish(
    hub: FakeHub,
    name: str,
    splits: dict[str, datasets.Dataset],
    *,
    config: str = "default",
    folder: str = "data",
    shards: int = 1,
    rows_in_group: int = 100,
    described: bool = True,
) -> None:
    """Put a dataset on the hub as `push_to_hub` does: Parquet files, and a card with the types of the columns."""
    files: dict[str, str | bytes] = {}
    for split, data in splits.items():
        for shard in range(shards):
            file = io.BytesIO()
            data.shard(shards, shard, contiguous=True).to_parquet(file, batch_size=rows_in_group)
            files[f"{folder}/{split}-{shard:05}-of-{shards:05}.parquet"] = file.getvalue()
    paths = [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]
    card = {"configs": [{"config_name": config, "data_files": paths, "default": True}]}
    if described:
        features = next(iter(splits.values())).features._to_yaml_list()
        counts = [{"name": split, "num_bytes": 1, "num_examples": len(data)} for split, data in splits.items()]
        card["dataset_info"] = {"config_name": config, "features": features, "splits": counts}
    files["README.md"] = f"---\n{yaml.safe_dump(card)}---\n"
    hub.add("datasets", name, files)


def publish_cifar10(hub: FakeHub) -> None:
    """CIFAR-10: `img` and `label`, train and test; once called cifar10."""
    splits = {"train": split_of([*range(10)] * 4, CIFAR, "img"), "test": split_of([*range(10)], CIFAR, "img", 100)}
    publish(hub, "uoft-cs/cifar10", splits, config="plain_text", folder="plain_text")
    hub.renamed["cifar10"] = "uoft-cs/cifar10"


def publish_food101(hub: FakeHub) -> None:
    """Food-101: train and validation, no test."""
    count = len(FOOD)
    splits = {"train": split_of([*range(count)] * 4, FOOD), "validation": split_of([*range(count)], FOOD, first=500)}
    publish(hub, "ethz/food101", splits, shards=2)
    hub.renamed["food101"] = "ethz/food101"


def publish_imagenet(hub: FakeHub) -> None:
    """ImageNet-1K: access must be asked for; the labels of test are -1."""
    count = len(IMAGENET)
    splits = {
        "train": split_of([*range(count)] * 2, IMAGENET),
        "validation": split_of([*range(count)], IMAGENET, first=3000),
        "test": split_of([-1] * 50, IMAGENET, first=5000),
    }
    publish(hub, "ILSVRC/imagenet-1k", splits, shards=3)
    hub.renamed["imagenet-1k"] = "ILSVRC/imagenet-1k"
    hub.gated.add("ILSVRC/imagenet-1k")


def publish_mars(hub: FakeHub) -> None:
    """mb-domars16k: 15 codes, and small partitions that are no splits of a run."""
    count = len(MARS)
    splits = {
        split: split_of([*range(count)] * times, MARS, first=1000 * place)
        for place, (split, times) in enumerate({"train": 3, "val": 1, "test": 1, "few_shot_1": 1}.items())
    }
    publish(hub, "Mirali33/mb-domars16k", splits)
