"""Tar files of WebDataset: keys, labels and splits are found, and images are read in place."""

import gzip
import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import random_image

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import UnreadableImage, load_data
from vlm.data.sources import shards
from vlm.data.sources.shards import Entry, ShardImages


def encoded(number, form="PNG"):
    content = io.BytesIO()
    random_image(number, 20, 14).save(content, form)
    return content.getvalue()


def write(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples(count, first=0, label=lambda i: {"cls": str(i % 3).encode()}, image="png"):
    files = {}
    for i in range(first, first + count):
        files[f"{i:05}.{image}"] = encoded(i, {"jpg": "JPEG"}.get(image, "PNG"))
        files |= {f"{i:05}.{ending}": content for ending, content in label(i).items()}
    return files


def load(path, **more):
    return load_data(resolve({"model": "m", "dataset": str(path), **more}))


def of_json(key):
    return lambda i: {"json": json.dumps({"width": 20, key: ["ape", "bee", "cow"][i % 3]}).encode()}


@pytest.mark.parametrize(
    ("label", "image", "names", "flags"),
    [
        (lambda i: {"cls": f"{i % 3}\n".encode()}, "png", ["0", "1", "2"], {}),
        (lambda i: {"cls": ["ape", "bee", "cow"][i % 3].encode()}, "png", ["ape", "bee", "cow"], {}),
        (lambda i: {"txt": ["ape", "bee", "cow"][i % 3].encode()}, "jpg", ["ape", "bee", "cow"], {}),
        (of_json("label"), "jpg", ["ape", "bee", "cow"], {}),
        (of_json("animal"), "jpg", ["ape", "bee", "cow"], {"label_column": "animal"}),
        (
            lambda i: {"txt": b"a text", "kind.cls": str(i % 3).encode()},
            "png",
            ["0", "1", "2"],
            {"label_column": "kind.cls"},
        ),
    ],
)
def test_images_and_labels_of_a_key(tmp_path, label, image, names, flags):
    path = write(tmp_path / "d.tar", samples(18, label=label, image=image))
    data = load(path, **flags)
    assert data.class_names == names and dict(data.summary)["dataset"] == f"{path} (WebDataset)"
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            number = int(split[i].name.split(":")[1].split(".")[0])
            assert split.labels[i] == number % 3
            if image == "png":
                assert split[i].image.tobytes() == random_image(number, 20, 14).tobytes()


def test_names_in_the_json_are_those_of_the_numbers(tmp_path, capsys):
    def label(i):
        return {"json": json.dumps({"label": i % 3, "label_name": ["cow", "bee", "ape"][i % 3]}).encode()}

    for split, first in (("train", 0), ("test", 100)):
        write(tmp_path / f"{split}.tar", samples(18, first, label=label))
    data = load(tmp_path)
    assert data.class_names == ["cow", "bee", "ape"] and data.test.labels == [(100 + i) % 3 for i in range(18)]
    assert "have their names from the column label_name" in capsys.readouterr().err


def test_labels_are_texts_so_that_01_is_not_1(tmp_path):
    path = write(tmp_path / "d.tar", samples(18, label=lambda i: {"cls": [b"01", b"1", b"10"][i % 3]}))
    assert load(path).class_names == ["01", "1", "10"]


def test_shards_of_splits_by_name_and_by_folder(tmp_path):
    for place, name in (("a", "{}-00000{}.tar"), ("b", "{}/shard_{}.tar"), ("c", "{}-0000{}-of-00002.tar")):
        for split, count, first in (("train", 12, 0), ("val", 6, 100), ("test", 6, 200)):
            for shard in range(2):
                write(tmp_path / place / name.format(split, shard), samples(count, first + 50 * shard))
        data = load(tmp_path / place)
        assert (len(data.train), len(data.validation), len(data.test)) == (24, 12, 12), place


def test_keys_without_an_image_or_a_label_are_counted(tmp_path, capsys):
    files = samples(18) | {"extra.json": b"{}", "nolabel.png": encoded(99), "__x/._a.png": b""}
    data = load(write(tmp_path / "d.tar", files))
    printed = capsys.readouterr().err
    assert "not used: 1 keys of train without an image" in printed
    assert len(data.train) + len(data.validation) + len(data.test) == 18


def test_shards_without_labels_say_what_is_expected(tmp_path):
    path = write(tmp_path / "d.tar", samples(6, label=lambda i: {"json": b'{"width": 3}'}))
    with pytest.raises(UsageError, match="no image has a label. Expected 0001.cls or 0001.txt right after or before"):
        load(path)


def test_a_tar_file_of_class_folders_is_no_shard(tmp_path):
    path = write(
        tmp_path / "d.tar", {f"{name}/{i}.png": encoded(i + 50 * (name == "b")) for name in "ab" for i in range(6)}
    )
    assert not shards.is_shard(path) and load(path).class_names == ["a", "b"]


def test_shards_in_a_folder_called_data(tmp_path):
    (tmp_path / "README.md").write_text("# A dataset")
    write(tmp_path / "data" / "train-000.tar", samples(12))
    write(tmp_path / "data" / "train-001.tar", samples(12, 50))
    data = load(tmp_path)
    assert len(data.train) + len(data.validation) + len(data.test) == 24


def test_a_compressed_shard_says_what_to_do(tmp_path):
    path = tmp_path / "d.tar.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "d.tar", samples(6)).read_bytes()))
    with pytest.raises(UsageError, match="d.tar.gz: a tar file of WebDataset that is compressed.* Decompress it"):
        load(path)


def headers(path):
    """Where the headers of a tar file are, in bytes."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("at", [0, 60, 119])
@pytest.mark.parametrize("change", ["cut", "other bytes"])
def test_a_damaged_shard_is_not_read_in_part(tmp_path, at, change):
    path = write(tmp_path / "d.tar", samples(60))
    place = headers(path)[at] + 100
    content = path.read_bytes()
    path.write_bytes(content[:place] + (b"\xff" * 400 + content[place + 400 :] if change == "other bytes" else b""))
    with pytest.raises(UsageError, match="d.tar.*damaged|damaged.*d.tar"):
        load(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_places_are_those_of_tarfile(tmp_path, form):
    path = tmp_path / "d.tar"
    names = ["a.png", "ä/b.png", f"{'long' * 20}/{'name' * 20}.png", "c.d.png"]
    names += [f"{'x' * 200}/{'y' * 120}.png"] if form != tarfile.USTAR_FORMAT else []
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = number * 300
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    with tarfile.open(path) as tar, tarfile.open(path, tarinfo=shards.Header) as quick:
        expected = [(member.name, member.size, member.offset_data, member.type) for member in tar]
        assert [(member.name, member.size, member.offset_data, member.type) for member in quick] == expected
    assert [name for name, *_ in expected] == names


def test_images_are_read_by_threads_and_after_pickling_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    paths = [tmp_path / f"{i}.bin" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    images = ShardImages([str(path) for path in paths])
    for i in range(600):
        images.add(i % 6, Entry("", "", i // 6, 1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: images[row], range(600))) == [bytes([i % 6]) for i in range(600)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    again = pickle.loads(pickle.dumps(images))
    assert len(again) == 600 and again[7] == images[7]
    paths[3].unlink()
    with pytest.raises(UnreadableImage, match="3.bin"):
        pickle.loads(pickle.dumps(images))[3]


def test_a_cut_off_shard_is_refused(tmp_path):
    path = write(tmp_path / "d.tar", samples(20))
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(UsageError, match="d.tar is damaged .it ends too early"):
        load(path)


def test_a_named_label_is_not_replaced_by_another(tmp_path):
    both = lambda i: {"cls": str(i % 3).encode(), "json": json.dumps({"breed": "ab"[i % 2]}).encode()}  # noqa: E731
    path = write(tmp_path / "d.tar", samples(18, label=both))
    assert load(path, label_column="breed").class_names == ["a", "b"]
    with pytest.raises(UsageError, match="--label-column kind: no file of that ending lies next to an image of"):
        load(path, label_column="kind")


def test_a_split_within_the_name_of_a_shard(tmp_path):
    write(tmp_path / "cifar-train-000.tar", samples(18))
    write(tmp_path / "cifar-test-000.tar", samples(9, first=100))
    write(tmp_path / "train_1_shot-000.tar", samples(3, first=200))
    data = load(tmp_path)
    assert len(data.test) == 9 and len(data.train) + len(data.validation) == 18
    assert dict(data.summary)["unused splits"] == "train_1_shot"


def test_of_two_images_under_a_key_the_plain_one_is_taken(tmp_path, capsys):
    files = {}
    for i in range(12):
        files |= {f"{i}.depth.png": encoded(500 + i), f"{i}.png": encoded(i), f"{i}.cls": str(i % 2).encode()}
    data = load(write(tmp_path / "d.tar", files))
    assert all(
        split[i].name.endswith(".png") and ".depth" not in split[i].name for split in [data.train] for i in range(3)
    )
    assert "not used: further images of 12 keys of train" in capsys.readouterr().err
    files = {"a.png": encoded(1), "a.jpg": encoded(2, "JPEG"), "a.cls": b"0"}
    with pytest.raises(UsageError, match="a has 2 images"):
        load(write(tmp_path / "two.tar", files))


@pytest.mark.parametrize("ending", ["json", "txt"])
def test_texts_about_boxes_in_class_folders_are_no_labels(tmp_path, ending):
    files = {}
    for name in "ab":
        for i in range(30):  # more files than are looked at first
            files |= {f"{name}/{i}.png": encoded(i + 50 * (name == "b")), f"{name}/{i}.{ending}": b"[0, 0.5, 0.5]"}
    assert load(write(tmp_path / "d.tar", files)).class_names == ["a", "b"]
    in_one = {f"x/{name}": content for name, content in samples(18, label=of_json("label")).items()}
    assert load(write(tmp_path / "e.tar", in_one)).class_names == ["ape", "bee", "cow"]
