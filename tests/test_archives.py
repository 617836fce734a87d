"""Archives and data files: what is in them is read without unpacking by hand, and what is dangerous is not."""

import gzip
import io
import os
import tarfile
import time
import zipfile
from pathlib import Path

import datasets
import pytest
from tiny import random_image

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import load_data
from vlm.data.sources import archives
from vlm.data.sources.archives import unpacked

NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "the_cache"
    monkeypatch.setenv("VLM_CACHE", str(folder))
    return folder


def png(number):
    content = io.BytesIO()
    random_image(number, 20, 14).save(content, "PNG")
    return content.getvalue()


def image_files(prefix="", count=6, first=0):
    """Images in folders of classes, by path."""
    files = {}
    for label, name in enumerate(NAMES):
        files |= {f"{prefix}{name}/{i}.png": png(first + 100 * label + i) for i in range(count)}
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files):
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def load(path, **more):
    return load_data(resolve({"model": "m", "dataset": str(path), **more}))


def counts(data):
    return {role: len(getattr(data, role)) for role in ("train", "validation", "test")}


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar", "pets.tar.gz", "pets.tgz", "pets.tar.xz", "pets.tar.bz2"])
@pytest.mark.parametrize("wrapped", ["", "pets/"])
def test_class_folders_in_an_archive(tmp_path, name, wrapped, capsys):
    write = write_zip if name.endswith(".zip") else write_tar
    files = image_files(wrapped) | {"__MACOSX/._x": b"", f"{wrapped}.DS_Store": b""}
    data = load(write(tmp_path / name, files))
    assert data.class_names == NAMES and sum(counts(data).values()) == 12
    assert f"note: {name} is unpacked in " in capsys.readouterr().err
    load(tmp_path / name)
    assert "note:" not in capsys.readouterr().err, "it is there already"


def test_messages_name_the_archive_and_not_where_it_is_unpacked(tmp_path, capsys):
    load(write_zip(tmp_path / "pets.zip", image_files("my pets/")))
    assert "note: pets.zip has nothing but my pets, which is read as the dataset." in capsys.readouterr().err


def test_an_archive_is_unpacked_once_and_again_if_it_or_its_files_changed(tmp_path):
    path = write_zip(tmp_path / "pets.zip", image_files())
    folder = unpacked({path: Path()})
    made = (folder / "cat").stat().st_mtime_ns
    assert unpacked({path: Path()}) == folder and (folder / "cat").stat().st_mtime_ns == made
    (folder / "cat" / "1.png").unlink()
    assert unpacked({path: Path()}) == folder and (folder / "cat" / "1.png").is_file()
    write_zip(path, image_files(count=7))
    assert unpacked({path: Path()}) != folder


def test_splits_as_archives_of_a_folder(tmp_path):
    write_zip(tmp_path / "train.zip", image_files("train/", 8))
    write_tar(tmp_path / "test.tar.gz", image_files("", 3, first=500))
    data = load(tmp_path)
    assert len(data.test) == 6 and counts(data)["train"] + counts(data)["validation"] == 16


def test_classes_as_archives_of_a_folder(tmp_path):
    for label, name in enumerate(NAMES):
        write_zip(tmp_path / f"{name}.zip", {f"{i}.png": png(100 * label + i) for i in range(6)})
    assert load(tmp_path).class_names == NAMES


@pytest.mark.parametrize("names", [("images",), ("cat", "dog")])
def test_archives_in_folders_of_splits(tmp_path, names):
    for split, first in (("train", 0), ("test", 500)):
        (tmp_path / split).mkdir()
        files = image_files(first=first)
        for name in names:
            chosen = {path: content for path, content in files.items() if name == "images" or path.startswith(name)}
            write_zip(tmp_path / split / f"{name}.zip", chosen)
    data = load(tmp_path)
    assert (
        data.class_names == NAMES and len(data.test) == 12 and counts(data)["train"] + counts(data)["validation"] == 12
    )


def test_an_archive_next_to_its_unpacked_files_is_not_used_and_that_is_said(tmp_path, capsys):
    for name, content in (image_files("train/") | image_files("test/", first=500)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_zip(tmp_path / "pets.zip", image_files("x/", first=1000))
    assert len(load(tmp_path).test) == 12
    assert "archives that are not used, as there are unpacked files, too: pets.zip." in capsys.readouterr().err


def test_an_archive_next_to_class_folders_is_not_used_and_that_is_said(tmp_path, capsys):
    for name, content in image_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_zip(tmp_path / "birds.zip", {f"{i}.png": png(1000 + i) for i in range(6)})
    assert load(tmp_path).class_names == NAMES
    assert "archives that are not used, as there are unpacked files, too: birds.zip." in capsys.readouterr().err


def test_archives_in_archives_end(tmp_path):
    outer = {
        f"{split}.zip": write_zip(tmp_path / "x.zip", image_files(first=first)).read_bytes()
        for split, first in (("train", 0), ("test", 500))
    }
    assert len(load(write_zip(tmp_path / "outer.zip", outer)).test) == 12
    path = write_zip(tmp_path / "a.zip", image_files())
    for _ in range(4):
        path = write_zip(tmp_path / "a.zip", {"a.zip": path.read_bytes()})
    with pytest.raises(UsageError, match="archives in archives, 3 deep. Unpack it"):
        load(path)


def test_a_table_of_each_split_next_to_archives_of_their_images(tmp_path):
    for split, first in (("train", 0), ("test", 500)):
        write_zip(tmp_path / f"{split}.zip", {f"{i}.png": png(first + i) for i in range(8)})
        (tmp_path / f"{split}.csv").write_text("id,label\n" + "".join(f"{i}.png,{NAMES[i % 2]}\n" for i in range(8)))
    data = load(tmp_path, image_column="id")
    assert len(data.test) == 8 and not data.skipped
    pixels = {random_image(500 + i, 20, 14).tobytes() for i in range(8)}
    assert {data.test[i].image.tobytes() for i in range(8)} == pixels


def test_a_table_next_to_an_archive_of_its_images(tmp_path):
    write_zip(tmp_path / "images.zip", {f"images/{i}.png": png(i) for i in range(12)})
    lines = [f"images/{i}.png,{NAMES[i % 2]}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("image,label\n" + "\n".join(lines))
    data = load(tmp_path)
    assert data.class_names == NAMES and sum(counts(data).values()) == 12


def table_of(path, names):
    path.write_text("image,label\n" + "".join(f"{name},{NAMES[i % 2]}\n" for i, name in enumerate(names)))
    return path


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("archives", [["images.zip"], ["a.zip", "b.tar"]])
def test_bare_names_in_a_table_next_to_archives_are_found_in_these(tmp_path, capsys, archives, named):
    for part, name in enumerate(archives):
        files = {f"deep/{i}.png": png(i) for i in range(part, 12, len(archives))}
        (write_zip if name.endswith(".zip") else write_tar)(tmp_path / name, files)
    path = table_of(tmp_path / "labels.csv", [f"{i}.png" for i in range(12)])
    data = load(path if named else tmp_path)
    folders = ", ".join(f"{Path(name).stem}/deep" for name in archives)
    assert f"labels.csv: the images of the column image are in {folders}, below " in capsys.readouterr().err
    assert data.class_names == NAMES and sum(counts(data).values()) == 12 and not data.skipped
    for split in (data.train, data.validation, data.test):
        for i, name in enumerate(split.names):
            number = int(name.removesuffix(".png"))
            assert split.labels[i] == number % 2
            assert split[i].image.tobytes() == random_image(number, 20, 14).tobytes()


def test_names_without_an_ending_need_one_flag_only(tmp_path):
    write_zip(tmp_path / "images.zip", {f"{i}.png": png(i) for i in range(12)})
    table_of(tmp_path / "labels.csv", [str(i) for i in range(12)])
    with pytest.raises(UsageError, match="there is images/0.png. Add: --image-suffix .png$"):
        load(tmp_path)
    assert sum(counts(load(tmp_path, image_suffix=".png")).values()) == 12
    (tmp_path / "elsewhere").mkdir()
    elsewhere = table_of(tmp_path / "elsewhere/a.csv", [f"{i}.png" for i in range(12)])
    assert sum(counts(load(elsewhere, image_folder=str(tmp_path / "images.zip"))).values()) == 12


def test_a_name_that_is_in_several_archives_is_not_guessed(tmp_path):
    for number, name in enumerate(NAMES):
        write_zip(tmp_path / f"{name}.zip", {f"{i}.png": png(100 * number + i) for i in range(12)})
    path = table_of(tmp_path / "labels.csv", [f"{i}.png" for i in range(12)])
    with pytest.raises(
        UsageError, match=r"\.png of the column image is in several folders of the archives: cat, dog. "
    ):
        load(path)


def test_tables_next_to_one_archive_of_all_splits_have_the_images_in_their_folders(tmp_path, capsys):
    files = {f"d/{split}/{i}.png": png(first + i) for split, first in (("train", 0), ("test", 500)) for i in range(8)}
    write_zip(tmp_path / "images.zip", files)
    for split in ("train", "test"):
        table_of(tmp_path / f"{split}.csv", [f"{i}.png" for i in range(8)])
    data = load(tmp_path)
    assert "test.csv: the images of the column image are in images/d/test, below" in capsys.readouterr().err
    pixels = {random_image(500 + i, 20, 14).tobytes() for i in range(8)}
    assert {data.test[i].image.tobytes() for i in range(8)} == pixels


def test_an_archive_without_these_images_is_not_unpacked(tmp_path, cache):
    write_zip(tmp_path / "other.zip", image_files())
    with pytest.raises(UsageError, match="unreadable"):
        load(table_of(tmp_path / "labels.csv", [f"x{i}.png" for i in range(12)]))
    assert not cache.exists()


def test_a_table_in_an_archive(tmp_path):
    lines = [f"pics/{i}.png,{NAMES[i % 2]}" for i in range(12)]
    files = {f"d/pics/{i}.png": png(i) for i in range(12)} | {"d/t.csv": ("image,label\n" + "\n".join(lines)).encode()}
    assert sum(counts(load(write_zip(tmp_path / "d.zip", files))).values()) == 12


def test_nothing_is_written_outside_and_links_are_left_out(tmp_path, cache, capsys):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (image_files() | {"../outside.png": png(1), "/absolute.png": png(2)}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind, target in (
            ("cat/link.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("dog/fifo.png", tarfile.FIFOTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    folder = unpacked({path: Path()})
    assert {p.name for p in folder.iterdir() if p.is_dir()} == set(NAMES) and len(list(folder.rglob("*.png"))) == 12
    assert {p.name for p in cache.parent.iterdir()} == {"the_cache", "evil.tar"}
    assert "4 files are not unpacked: ../outside.png (outside of the archive)" in capsys.readouterr().err


def test_a_zip_with_a_link_and_a_path_of_windows(tmp_path):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in image_files().items():
            archive.writestr(name.replace("/", "\\"), content)
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("..\\up.png", png(1))
    folder = unpacked({path: Path()})
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")) == sorted(image_files())


@pytest.mark.parametrize("coding", ["utf-8", "cp437"])
def test_names_in_a_zip_without_the_flag_of_utf8(tmp_path, coding):
    word = "Käse".encode(coding)
    path = write_zip(
        tmp_path / "names.zip", image_files("", 6) | {f"{'x' * len(word)}/{i}.png": png(i) for i in range(6)}
    )
    path.write_bytes(path.read_bytes().replace(b"x" * len(word), word))
    assert (unpacked({path: Path()}) / "Käse" / "0.png").is_file()


def test_of_two_members_with_one_name_the_last_counts(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for content in (b"old", b"newer"):
            entry = tarfile.TarInfo("a/x.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert (unpacked({path: Path()}) / "a/x.txt").read_bytes() == b"newer"


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tgz"])
def test_a_bomb_is_not_unpacked(tmp_path, cache, monkeypatch, name):
    monkeypatch.setattr(archives, "SMALL", 10**6)
    write = write_zip if name.endswith(".zip") else write_tar
    path = write(tmp_path / name, {"a/x.png": bytes(2_000_000), "a/y.png": bytes(2_000_000)})
    with pytest.raises(UsageError, match=r"at least 1 files of 0.0 GB, [\d,]+ times as large as the archive"):
        unpacked({path: Path()})
    assert not [p for p in (cache / "archives").rglob("*") if p.is_file() and p.suffix == ".png"]


def test_a_full_disk_is_said_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "pets.zip", image_files())
    usage = type("Usage", (), {"free": 500 * 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(UsageError, match="has room for 0.0 GB. Make room, or set VLM_CACHE"):
        unpacked({path: Path()})


def with_a_method_that_is_not_read(path):
    """A zip file whose files are compressed with Deflate64, as Windows does it for large ones."""
    content = bytearray(write_zip(path, image_files()).read_bytes())
    for start, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = -1
        while (at := content.find(start, at + 1)) >= 0:
            content[at + place] = 9
    path.write_bytes(content)


def with_a_damaged_header(path):
    """A tar file whose fourth header is damaged."""
    write_tar(path.with_suffix(".tar"), image_files())
    with tarfile.open(path.with_suffix(".tar")) as tar:
        at = tar.getmembers()[3].offset
    content = bytearray(path.with_suffix(".tar").read_bytes())
    content[at : at + 512] = b"\xff" * 512
    path.write_bytes(gzip.compress(content) if path.suffix == ".tgz" else content)


def encrypted(path):
    """A zip file that says that its files are encrypted."""
    content = bytearray(write_zip(path, image_files()).read_bytes())
    at = -1
    while (at := content.find(b"PK\x01\x02", at + 1)) >= 0:
        content[at + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.zip", encrypted, "a.zip is encrypted. Unpack it with its password"),
        ("a.zip", lambda path: path.write_bytes(b"PK\x03\x04 no more"), "a.zip is damaged"),
        ("a.zip", with_a_method_that_is_not_read, "a.zip is not read here .*method.* Unpack it, and give the folder"),
        ("a.tar.gz", lambda path: path.write_bytes(b"\x1f\x8b no more"), r"a.tar.gz is damaged \(no tar file\)"),
        ("a.tar", lambda path: path.write_bytes(b"a text"), r"a.tar is damaged \(no tar file\)"),
        ("a.tar", with_a_damaged_header, r"a.tar is damaged \(no header at byte 4,608\)"),
        ("a.tgz", with_a_damaged_header, r"a.tgz is damaged \(no header at byte 4,608\)"),
        (
            "a.tar",
            lambda path: write_tar(path, {"cat": b"x"} | image_files()),
            "a.tar has several files of one name, or",
        ),
        ("a.zip", lambda path: write_zip(path, {}), "a.zip has no files"),
        ("a.rar", lambda path: path.write_bytes(b"Rar!"), "an archive, not a folder or a table. Unpack it"),
        ("a.7z", lambda path: path.write_bytes(b"7z"), "an archive, not a folder or a table. Unpack it"),
    ],
)
def test_archives_that_cannot_be_unpacked(tmp_path, name, change, message):
    change(tmp_path / name)
    with pytest.raises(UsageError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("end", [-2000, "header"])
def test_a_tar_file_that_was_cut_off_is_not_taken_for_a_whole_one(tmp_path, end):
    path = write_tar(tmp_path / "cut.tar", {name: bytes(1000) for name in image_files()})
    content = path.read_bytes()
    whole = 12 * (512 + 1024)  # headers and data in blocks
    path.write_bytes(content[: whole - 1536 if end == "header" else whole + end])
    with pytest.raises(UsageError, match="cut.tar is damaged .it ends too early"):
        unpacked({path: Path()})


@pytest.mark.parametrize("archives", [True, False])
def test_a_table_next_to_several_archives_or_folders_has_the_labels(tmp_path, archives, capsys):
    for part in (1, 2):
        files = {f"{part}_{i}.png": png(100 * part + i) for i in range(8)}
        if archives:
            write_zip(tmp_path / f"images_{part}.zip", files)
        else:
            (tmp_path / f"images_{part}").mkdir()
            for name, content in files.items():
                (tmp_path / f"images_{part}" / name).write_bytes(content)
    lines = [f"images_{part}/{part}_{i}.png,{NAMES[i % 2]}" for part in (1, 2) for i in range(8)]
    (tmp_path / "labels.csv").write_text("image,label\n" + "\n".join(lines))
    assert load(tmp_path).class_names == NAMES
    assert "labels.csv, not the names of the folders next to it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cut.zip", "cut.tar.gz", "cut.tar"])
def test_an_archive_that_was_cut_short_leaves_nothing(tmp_path, cache, name):
    files = {f"{path}": os.urandom(5000) for path in image_files()}
    path = (write_zip if name.endswith(".zip") else write_tar)(tmp_path / name, files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=f"{name}.*(damaged|cannot be unpacked)"):
        unpacked({path: Path()})
    write = write_zip if name.endswith(".zip") else write_tar
    assert len(list(unpacked({write(path, image_files()): Path()}).rglob("*.png"))) == 12
    assert not list((cache / "archives").glob("*.part"))


def test_a_killed_run_leaves_nothing_for_long_and_old_folders_go(tmp_path, cache):
    old = unpacked({write_zip(tmp_path / "old.zip", image_files()): Path()})
    left, of_another = cache / "archives" / "0123.part", cache / "archives" / "4567.part"
    left.mkdir()
    of_another.mkdir()
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    os.utime(left, (long_ago, long_ago))
    new = unpacked({write_zip(tmp_path / "new.zip", image_files()): Path()})
    assert not old.exists() and not left.exists() and new.exists()
    assert of_another.exists(), "another process may work on it now"


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_single_data_file(tmp_path, ending):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(12)], "label": [i % 2 for i in range(12)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    path = tmp_path / f"pets.{ending}"
    if ending == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(tmp_path / "saved")
        path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    loaded = load(path)
    assert loaded.class_names == NAMES and sum(counts(loaded).values()) == 12
    assert f"({ending.capitalize()} file)" in dict(loaded.summary)["dataset"]


def test_data_files_of_a_folder_by_split(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    names = {"train-00000-of-00002": 8, "train-00001-of-00002": 8, "validation-00000-of-00001": 6}
    (tmp_path / "a" / "data").mkdir(parents=True)
    (tmp_path / "a" / "README.md").write_text("# A dataset")
    for first, (name, count) in enumerate(names.items()):
        images = [{"bytes": png(100 * first + i), "path": None} for i in range(count)]
        rows = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(count)]}, features=features)
        rows.to_parquet(tmp_path / "a" / "data" / f"{name}.parquet")
    data = load(tmp_path / "a")
    assert len(data.validation) == 6 and len(data.train) + len(data.test) == 16


def test_data_files_next_to_the_images_that_they_name(tmp_path):
    (tmp_path / "p").mkdir()
    for split, first in (("train", 0), ("test", 50)):
        for i in range(first, first + 12):
            (tmp_path / "p" / f"{i}.png").write_bytes(png(i))
        rows = {"file": [f"p/{i}.png" for i in range(first, first + 12)], "label": [NAMES[i % 2] for i in range(12)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = load(tmp_path)
    assert data.class_names == NAMES and len(data.test) == 12 and not data.skipped
    assert len(data.train) + len(data.validation) == 12


@pytest.mark.parametrize("place", ["images/", ""])
def test_a_spreadsheet_next_to_images(tmp_path, place):
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / f"{place}{i}.png").write_bytes(png(i))
    (tmp_path / "labels.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="no table but labels.xlsx, a spreadsheet. Save it as CSV"):
        load(tmp_path)


def test_a_parquet_file_of_bytes_or_paths_without_types(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / "p" / f"{i}.png").write_bytes(png(i))
    labels = [NAMES[i % 2] for i in range(12)]
    for column in ([png(i) for i in range(12)], [f"p/{i}.png" for i in range(12)]):
        datasets.Dataset.from_dict({"image": column, "label": labels}).to_parquet(tmp_path / "t.parquet")
        loaded = load(tmp_path / "t.parquet")
        assert loaded.class_names == NAMES and not loaded.skipped and loaded.train[0].image.size == (20, 14)
