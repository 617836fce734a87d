"""Images of every kind become upright RGB images; what cannot be read says why in one line."""

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from vlm.common.errors import UsageError
from vlm.data import UnreadableImage, find_images, finding, formats, open_image

RAMP = np.array([[0, 100], [200, 255]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source) -> list:
    """The RGB values of an image, row by row."""
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def grey(*values: int) -> list:
    return [[value] * 3 for value in values]


def test_grey_and_black_and_white_become_rgb():
    assert pixels(encoded(Image.fromarray(RAMP))) == grey(0, 100, 200, 255)
    assert pixels(encoded(Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE))) == grey(0, 0, 255, 255)


def test_a_one_by_one_image_works():
    assert pixels(encoded(Image.new("RGB", (1, 1), (10, 20, 30)))) == [[10, 20, 30]]
    assert pixels(np.full((1, 1), 7, dtype=np.uint16)) == grey(0)


def test_palette_becomes_its_colors():
    assert pixels(encoded(Image.new("RGB", (2, 1), (250, 0, 10)).quantize(4))) == [[250, 0, 10]] * 2


def test_transparent_parts_lie_over_white():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    assert pixels(encoded(rgba)) == [[255, 255, 255], [200, 0, 0]]
    assert pixels(encoded(Image.new("LA", (1, 1), (0, 0)))) == grey(255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0)) == [[255, 255, 255], [200, 0, 0]]
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))) == grey(255)


def test_cmyk_becomes_rgb():
    red, green, blue = pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"))[0]
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("numbers", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_stretched_from_minimum_to_maximum(numbers):
    values = np.array([[1000, 1500], [2000, 3000]], dtype=numbers)
    expected = grey(0, 64, 128, 255)
    assert pixels(encoded(Image.fromarray(values), "TIFF")) == expected
    assert pixels(values) == expected
    assert pixels(Image.fromarray(values)) == expected


def test_values_that_are_no_numbers_do_not_disturb_the_stretch():
    assert pixels(np.array([[np.nan, 10.0, 20.0, np.inf]])) == grey(0, 0, 255, 255)
    with pytest.raises(UnreadableImage, match="not one of its values is a number"):
        open_image(np.full((2, 2), np.nan))


def test_arrays_of_all_accepted_shapes():
    assert pixels(RAMP) == pixels(RAMP[:, :, None]) == grey(0, 100, 200, 255)
    assert pixels(np.dstack([RAMP, RAMP, RAMP])) == grey(0, 100, 200, 255)
    assert pixels(np.dstack([RAMP, RAMP, RAMP, np.zeros_like(RAMP)])) == grey(255, 255, 255, 255)
    assert pixels(np.array([[0.0, 1.0, 0.2]])) == grey(0, 255, 51)
    assert pixels(np.array([[True, False]])) == grey(255, 0)


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), (0, 4), (2, 2, 2), (1, 2, 2, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(UnreadableImage, match="expected HxW"):
        open_image(np.zeros(shape, dtype=np.uint8))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (2, 2), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "TIFF"):
        assert pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:])) == [[255, 0, 0]] * 4


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_exif_orientation_is_applied(mode):
    image = Image.new(mode, (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    opened = open_image(encoded(image, exif=exif))
    assert opened.size == (2, 4)
    assert open_image(opened).size == (2, 4), "an upright image must not be turned again"


def test_damaged_exif_data_do_not_lose_the_image():
    assert open_image(encoded(Image.new("RGB", (4, 2)), "PNG", exif=b"Exif\0\0no TIFF header")).size == (4, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_unreadable(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match="half"):
        open_image(path)


def test_the_reason_is_one_line_with_the_name(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, reason in [
        ("none.png", "no such file"),
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
        ("", "directory"),
    ]:
        with pytest.raises(UnreadableImage) as caught:
            open_image(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and reason in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableImage, match="^row 7: there is no image$"):
        open_image(None, name="row 7")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert open_image(encoded(Image.new("L", (9, 11)))).size == (9, 11)
    with pytest.raises(UnreadableImage, match="10x10 is more than the 99 pixels"):
        open_image(encoded(Image.new("L", (10, 10))))
    with pytest.raises(UnreadableImage, match="its size is more than the 99 pixels"):
        open_image(encoded(Image.new("L", (100, 100))))


def test_no_file_is_left_open(tmp_path):
    frames = [Image.new("L", (2, 2), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.MonkeyPatch.context() as patch:
        opened = []
        original = Image.open
        patch.setattr(Image, "open", lambda *a, **k: opened.append(original(*a, **k)) or opened[-1])
        open_image(tmp_path / "a.gif")
    assert opened[0].fp is None or opened[0].fp.closed


def test_an_image_given_is_not_changed():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    image.getexif()[0x0112] = 6
    result = open_image(image)
    assert result is not image and image.mode == "RGBA" and image.getexif()[0x0112] == 6


def paths_in(*places):
    return list(map(Path, find_images(places)))


def test_images_are_found_in_folders_and_files_are_taken_as_given(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "b/.hidden.png", ".cache/1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [tmp_path / "a.jpg", tmp_path / "b/2.PNG"]
    assert paths_in(tmp_path) == found
    assert paths_in(str(tmp_path / "notes.txt"), tmp_path / "b") == [tmp_path / "notes.txt", found[1]]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none.png"):
        with pytest.raises(UsageError, match=name):
            find_images([tmp_path / name])
    there, not_there = tmp_path / "notes.txt", tmp_path / "none.png"
    assert paths_in(not_there, there) == [not_there, there]
    with pytest.raises(UsageError, match=r"none\.png does not exist, and neither do the other paths"):
        find_images([not_there, tmp_path / "neither.png"])


def test_each_folder_is_entered_once_by_its_path_without_links(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "outside"
    for name in (root / "b/1.png", root / "b/deep/2.png", outside / "3.png"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (root / "a").symlink_to("b/deep")  # before the folder itself in any order of names
    (root / "b/deep/up").symlink_to("../..")
    (root / "c").symlink_to(outside)
    (outside / "back").symlink_to(root / "b")
    (outside / "self").symlink_to("self")
    (outside / "gone").symlink_to("nowhere")
    found = [str(path.relative_to(root)) for path in paths_in(root)]
    assert found == ["b/1.png", "b/deep/2.png", "c/3.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert paths_in(tmp_path) == [tmp_path / "b/2.png"]
    assert f"{tmp_path / 'a'} is left out: permission denied" in capsys.readouterr().err


OTHER_FILES = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "a PDF document": b"%PDF-1.7\n",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a web page": b"\n<!DOCTYPE html><title>404</title>",
    "an SVG drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pip install pillow-heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "the file is empty": b"",
}


@pytest.mark.parametrize("words", OTHER_FILES)
def test_what_only_has_the_name_of_an_image_is_called_by_its_kind(words, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "READS_HEIF", False)
    path = tmp_path / "x.png"
    path.write_bytes(OTHER_FILES[words])
    for source, name in ((path, str(path)), (OTHER_FILES[words], "row 3")):
        with pytest.raises(UnreadableImage) as caught:
            open_image(source, name)
        assert str(caught.value).startswith(f"{name}: ") and words in str(caught.value)


def test_no_other_program_is_started_for_a_file(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript; no format that does such a thing is among those that are read."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    image = Image.new("RGB", (9, 9))
    for kind in ("EPS", "PDF", "PCX", "SGI", "ICO", "IM", "MSP", "XBM"):
        path = tmp_path / f"{kind}.png"
        (image.convert("1") if kind in ("MSP", "XBM") else image).save(path, kind)
        with pytest.raises(UnreadableImage, match=rf"{kind}\.png: not an image"):
            open_image(path)
    assert not started


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA", "MPO"])
def test_every_format_of_images_is_read_whatever_the_ending_is(kind, tmp_path):
    path = tmp_path / "image.dat"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), (200, 100, 0)), kind))
    assert np.allclose(np.asarray(open_image(path)), (200, 100, 0), atol=4)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path("x.png")
    with contextlib.ExitStack() as stack:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        with pytest.raises(UnreadableImage, match=f"^x.png: a {kind}, not a file$"):
            open_image(path)
        if kind != "directory":
            assert paths_in(tmp_path) == [tmp_path / path], "named as unreadable, not passed over"


def test_heic_is_read_with_the_package_for_it(monkeypatch):
    """With pillow-heif its formats are among those that are read; the package itself is not needed here."""
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.OPEN.setdefault("HEIF", Image.OPEN["PNG"])
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(formats, "READS_HEIF", True)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    formats.readable_formats.cache_clear()
    try:
        assert "HEIF" in formats.readable_formats()
    finally:
        formats.readable_formats.cache_clear()


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path):
    with pytest.raises(UnreadableImage) as caught:
        open_image(tmp_path / "a\x1b[2J\nb.png")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.new("L", (2, 2))))

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UnreadableImage, match=r"x\.png: permission denied$"):
        open_image(path)


def test_pillows_limits_on_texts_in_an_image_hold():
    """A text of a gigabyte fits into a megabyte of a PNG."""
    texts = PngInfo()
    texts.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(UnreadableImage, match="^row 1: Decompressed data too large"):
        open_image(encoded(Image.new("L", (2, 2)), pnginfo=texts), "row 1")


def test_images_that_are_not_read_are_counted_in_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finding, "IMAGE_ENDINGS", finding.IMAGE_ENDINGS - {".heic"})
    monkeypatch.setattr(finding, "UNREAD_ENDINGS", finding.UNREAD_ENDINGS | {".heic"})
    for name in ("1.png", "2.HEIC", "3.heic", "4.svg", "5", "notes.txt", ".hidden", "Thumbs.db", "__MACOSX/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert paths_in(tmp_path) == [tmp_path / "1.png"]
    (line,) = capsys.readouterr().err.splitlines()
    counts = "2 .heic, 1 .svg, 1 without an ending. "
    assert line.startswith(f"note: {tmp_path}: not used, as these files do not count as images: {counts}")
    assert "pillow-heif" in line
    (tmp_path / "1.png").unlink()
    with pytest.raises(UsageError, match=r"has no image but 2 \.heic, .*pillow-heif\. Files with these"):
        find_images([tmp_path])
