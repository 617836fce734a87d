"""vlm/families/features/shards.py: many images in a few files that are found quickly and read whole or not at all."""

import os
import time
from pathlib import Path

import pytest
import torch
from damage import cut_short

from vlm.families.features import shards
from vlm.families.features.shards import Index, write_shards


def entry(i, dtype=torch.float32):
    """Of as many rows as no other number below 5 has."""
    return {"features": torch.full((1 + i % 5, 2), i, dtype=dtype), "ids": torch.arange(i % 5, dtype=torch.int32)}


def write(folder, keys, **options):
    return dict(write_shards(folder, {f"image {key}": entry(key, **options) for key in keys}))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_entries_of_any_shape_and_format_come_back_as_they_were(tmp_path):
    write(tmp_path, range(10))
    write(tmp_path, range(10, 20), dtype=torch.bfloat16)
    mixed = {"one": {"a": torch.tensor(1.5)}, "two": {"a": torch.zeros(0, 3)}, "three": {"a": torch.tensor(True)}}
    assert len(dict(write_shards(tmp_path, mixed))) == 3
    index = Index(tmp_path)
    for i in range(20):
        assert_same(index.entry(f"image {i}"), entry(i, torch.float32 if i < 10 else torch.bfloat16))
    for key, content in mixed.items():
        assert_same(index.entry(key), content)
    assert index.entry("image 20") is None and "image 20" not in index and not index.damaged


def test_a_shard_that_is_written_later_is_found_once_it_is_added(tmp_path):
    index = Index(tmp_path / "new")
    assert "image 1" not in index and len(index) == 0
    for file, keys in write(tmp_path / "new", range(3)).items():
        index.add(file, keys)
    assert_same(index.entry("image 1"), entry(1))
    assert len(index) == 3


@pytest.mark.parametrize(
    "part", ["keys", "checksums", "values.features", "values.ids", "shapes.features", "shapes.ids"]
)
def test_a_changed_bit_in_any_part_is_noticed(tmp_path, part):
    (file,) = write(tmp_path, [3])
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    with shards.safe_open(file, "np") as tensors:
        changed = tensors.get_tensor(part).tobytes()
    place = content.index(changed, start)
    content[place] ^= 1
    file.write_bytes(content)
    index = Index(tmp_path)
    assert index.entry("image 3") is None
    assert index.damaged == ([] if part == "keys" else [file]), "of another key nobody asks"


def test_one_damaged_shard_takes_nothing_from_the_others(tmp_path):
    (damaged,), _, (deleted,) = write(tmp_path, [0, 1]), write(tmp_path, [1, 2]), write(tmp_path, [3])
    cut_short(damaged)
    index = Index(tmp_path)
    assert index.damaged == [damaged]
    assert_same(index.entry("image 1"), entry(1))
    deleted.unlink()  # as another run does to make room
    assert index.entry("image 3") is None and index.damaged == [damaged]


def test_looking_up_marks_a_shard_as_used_once_an_hour(tmp_path):
    (file,) = write(tmp_path, range(2))
    os.utime(file, (1, 1))
    index = Index(tmp_path)
    assert "image 0" in index and time.time() - file.stat().st_mtime < 60
    os.utime(file, (1, 1))
    assert "image 1" in index and file.stat().st_mtime == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux shows what is open")
def test_no_file_stays_open_and_few_are_mapped(tmp_path):
    count = shards.OPEN_SHARDS + 8
    for i in range(count):
        write(tmp_path, [i])
    before = len(os.listdir("/proc/self/fd"))
    index = Index(tmp_path)
    for i in range(count):
        index.entry(f"image {i}")
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= shards.OPEN_SHARDS


def test_fifty_thousand_images_are_a_handful_of_files_and_open_at_once(tmp_path):
    small = {"features": torch.zeros(1, 4)}
    for start in range(0, 50_000, shards.SHARD_IMAGES):
        list(write_shards(tmp_path, {f"{i}": small for i in range(start, min(start + shards.SHARD_IMAGES, 50_000))}))
    assert len(list(tmp_path.iterdir())) == 13
    index = Index(tmp_path)
    assert len(index) == 50_000 and all(f"{i}" in index for i in range(0, 50_000, 97))
    assert "50000" not in index
